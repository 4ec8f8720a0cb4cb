"""Compare our grades and responses with those of lm-eval and evalplus.

Both harnesses grade the responses that we graded. Where the scored model is here, lm-eval also runs
it, on our prompts and, for the commonsense benchmarks, by the likelihood of the choices.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import grading
from eval.crosscheck import harness
from eval.crosscheck.programs import check_with_evalplus
from eval.crosscheck.table import Comparison, find_differences, render_comparisons
from eval.tasks import BENCHMARKS, expand_groups
from eval.tasks.base import GRADERS
from launch.config.schema import Eval
from launch.data.tokenize import encode_texts
from launch.models.check import check_model, get_num_positions, read_config
from launch.models.files import fetch_model, hash_weights, load_tokenizer
from launch.models.identity import differs, hash_config
from launch.run.results import RESULTS, EvaluationResults, read_evaluation_results
from launch.runtime.errors import UserError
from launch.runtime.files import write_text
from launch.scoring.requests import choose_prompt, get_new_tokens, get_stops
from launch.scoring.responses import GENERATIONS, check_responses, read_generations
from launch.training.export import read_adapter_base

INSTALL = "pip install --no-deps -r requirements-crosscheck.txt, after requirements.txt"
COMMONSENSE = expand_groups(["commonsense"])

GradedRows = dict[str, dict[str, Any]]
"""Of one benchmark: id of a problem -> its row of generations.jsonl, with its `problem`."""


def crosscheck_scores(
    source: Path,
    benchmarks: Sequence[str] | None,
    data_dir: Path | None,
    revision: str,
    folder: Path,
) -> None:
    """Cross-check the responses of a finished evaluation, or of a file; print and write the table.

    Args:
        source: folder of launch/evaluate.py, whose model lm-eval runs too; or a file of responses.
        benchmarks: names of benchmarks and groups; None for all in `source`.
        data_dir: folder with the benchmarks' files; None for that of the evaluation, or the hub.
        revision: of the model, where it is from the hub.
        folder: where differences.jsonl, crosscheck.md and lm-eval's task files are written.

    Raises:
        UserError: `source` cannot be used, a harness is not installed, or the model has changed.
    """
    rows, results = _read_source(source)
    if data_dir is None and results is not None and results.settings["data_dir"]:
        recorded = Path(results.settings["data_dir"]).expanduser()
        # Without it, as on another machine, answers are checked by the references in their rows.
        data_dir = recorded if recorded.is_dir() else None
    ours = _grade_rows(rows, benchmarks, data_dir)
    comparisons = _compare_graders(ours, folder)
    if results is not None:
        comparisons += _compare_model(ours, results, revision, folder)
    _report(comparisons, ours, folder)


def crosscheck_references(
    benchmarks: Sequence[str] | None, data_dir: Path | None, limit: int | None, folder: Path
) -> None:
    """Cross-check the graders on the benchmarks' own answers; see `crosscheck_scores`.

    Args:
        benchmarks: names of benchmarks and groups; None for gsm8k.
        limit: the first so many problems of each benchmark; None for all.
    """
    rows = _make_reference_rows(benchmarks or ["gsm8k"], data_dir, limit)
    ours = _grade_rows(rows, benchmarks, data_dir)
    _report(_compare_graders(ours, folder), ours, folder)


def require_harnesses(*modules: str) -> None:
    """Raise a UserError for libraries that are not installed, before anything long has run."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"crosscheck: {' and '.join(missing)} missing here: {INSTALL}")


def _read_source(source: Path) -> tuple[list[dict], EvaluationResults | None]:
    """Read the first response to each problem, and the evaluation's results, None of a file."""
    path, results = source, None
    if source.is_dir():
        path = source / GENERATIONS
        if (source / RESULTS).is_file():
            results = _read_results(source)
    if not path.is_file() or (source.is_dir() and results is None):
        raise UserError(
            f"--scores: {source} is neither a finished folder of launch/evaluate.py nor a file of "
            "responses"
        )
    rows = read_generations(path)
    check_responses(rows, path, "--scores")
    # The other harnesses are given one response to each problem, the first sample.
    rows = [row for row in rows if row.get("sample", 0) == 0]
    return rows if results is None else _select_scored(rows, results), results


def _select_scored(rows: Sequence[dict], results: EvaluationResults) -> list[dict]:
    """Return the rows that the scores of an evaluation were made of.

    Its file may also have graded responses of an earlier command, with another limit or of other
    benchmarks, which come first, and those of a later command that was killed, which have no grades.
    """
    scored = []
    for name, score in results.scores.items():
        graded = [row for row in rows if row["suite"] == name and "strict" in row]
        scored += graded[-score.n :]
    return scored


def _read_results(folder: Path) -> EvaluationResults:
    try:
        return read_evaluation_results(folder)
    except UserError as error:
        raise UserError(
            f"--scores: {error}; give a folder of launch/evaluate.py or a file of responses"
        ) from None


def _make_reference_rows(
    benchmarks: Sequence[str], data_dir: Path | None, limit: int | None
) -> list[dict]:
    """Make rows whose response is the benchmark's own answer: MetaMath's form, or a program."""
    rows = []
    for name in expand_groups(list(benchmarks)):
        form = _get_reference_form(name)
        for problem in BENCHMARKS[name].read_problems(data_dir, limit):
            row = {"suite": name, "id": problem.id, "reference": problem.reference}
            row["output"] = form.format(problem.reference)
            rows.append(row)
    return rows


def _get_reference_form(name: str) -> str:
    """Return the response, as a format string, that states a benchmark's reference."""
    if BENCHMARKS[name].kind == "code":
        return "```python\n{0}\n```"
    if name in COMMONSENSE:
        return "the correct answer is {0}"
    if name == "gsm8k":
        return "#### {0}\nThe answer is: {0}"
    return "$\\boxed{{{0}}}$\nThe answer is: {0}"


def _grade_rows(
    rows: Sequence[dict], benchmarks: Sequence[str] | None, data_dir: Path | None
) -> dict[str, GradedRows]:
    """Return the rows of `benchmarks`, with both our grades, by benchmark and problem.

    Raises:
        UserError: there are none, or a harness that they need is not installed.
    """
    ours = {}
    for name in expand_groups(list(benchmarks or BENCHMARKS)):
        of_benchmark = [row for row in rows if row["suite"] == name]
        if of_benchmark:
            ours[name] = of_benchmark
    if not ours:
        raise UserError("--suite: there are no responses of it; run launch/evaluate.py")
    has_programs = any(BENCHMARKS[name].kind == "code" for name in ours)
    # Before the grading, which may run hundreds of programs.
    require_harnesses("lm_eval", *(["evalplus"] if has_programs else []))
    return {
        name: _grade_benchmark(name, of_benchmark, data_dir) for name, of_benchmark in ours.items()
    }


def _grade_benchmark(name: str, rows: Sequence[dict], data_dir: Path | None) -> GradedRows:
    """Grade the rows of one benchmark, unless they have their grades, and add their problems."""
    problems = grading.match_problems(BENCHMARKS[name], rows, data_dir)
    if all(grader in row for row in rows for grader in GRADERS):
        graded = list(rows)
    else:
        graded = []
        grades = grading.grade_responses(
            BENCHMARKS[name], problems, [row["output"] for row in rows]
        )
        for row, given in zip(rows, grades, strict=True):
            graded.append(row | {grader: grade.passed for grader, grade in given.items()})
    by_problem = {}
    for problem, row in zip(problems, graded, strict=True):
        known = {"id": problem.id, "reference": problem.reference, "problem": problem}
        by_problem[problem.id] = row | known
    if len(by_problem) < len(rows):
        raise UserError(
            f"--scores: {len(rows) - len(by_problem)} responses of {name} are to a problem that "
            "has one already"
        )
    return by_problem


def _compare_graders(ours: Mapping[str, GradedRows], folder: Path) -> list[Comparison]:
    """Have the other harnesses grade our responses."""
    comparisons = []
    tasks = {}  # lm-eval's name of a task -> benchmark
    for name, rows in ours.items():
        if name in harness.GRADED:
            documents = [_make_document(row) for row in rows.values()]
            tasks[harness.write_generate_task(folder / "tasks", name, documents)] = name
    if tasks:
        judged = harness.run_lm_eval(folder / "tasks", list(tasks), None, 1)
        comparisons += _compare_by_rule(judged, tasks, "lm-eval {}")
    for name, rows in ours.items():
        if BENCHMARKS[name].kind == "code":
            comparisons.append(_compare_programs(name, rows))
    return comparisons


def _compare_programs(name: str, rows: GradedRows) -> Comparison:
    """Have evalplus check our programs. Problems whose tests it cannot run are printed."""
    benchmark = BENCHMARKS[name]
    problems = [row["problem"] for row in rows.values()]
    texts = [
        benchmark.extract_program(row["output"], row["problem"], "strict") for row in rows.values()
    ]
    verdicts = dict(zip(rows, check_with_evalplus(name, problems, texts), strict=True))
    left_out = [problem for problem, passed in verdicts.items() if passed is None]
    if left_out:
        print(
            f"{name}: left out, evalplus cannot run their tests ({len(left_out)}): "
            f"{', '.join(left_out)}"
        )
    theirs = {problem: passed for problem, passed in verdicts.items() if passed is not None}
    return Comparison(name, "evalplus, base tests", theirs)


def _make_document(row: dict, prompt: str = "") -> dict[str, str]:
    """Make the document of a task file. lm-eval refuses an empty prompt."""
    return {
        "id": row["id"],
        "prompt": prompt or "-",
        "reference": row["reference"],
        "output": row["output"],
    }


def _compare_by_rule(
    judged: Sequence[harness.Judgement], tasks: Mapping[str, str], label: str
) -> list[Comparison]:
    """Make one comparison for each of lm-eval's tasks and rules.

    Args:
        tasks: lm-eval's name of a task -> benchmark.
        label: format string of the comparison's name; it takes the rule.
    """
    verdicts: dict[tuple[str, str], dict[str, bool]] = {}
    for row in judged:
        verdicts.setdefault((row.task, row.rule), {})[row.id] = row.passed
    return [
        Comparison(tasks[task], label.format(rule), passed)
        for (task, rule), passed in verdicts.items()
    ]


def _compare_model(
    ours: Mapping[str, GradedRows], results: EvaluationResults, revision: str, folder: Path
) -> list[Comparison]:
    """Have lm-eval run the scored model: its own responses, and its likelihoods of choices."""
    if results.url is not None:
        print("the responses came from a server: the model itself is not run again")
        return []
    # Without its checks: an earlier version may have had others.
    settings = Eval.model_construct(**results.settings)
    if settings.prompt == "chat":
        print("the prompt was a chat template's: the model itself is not run again")
        return []
    if settings.temperature:
        print("the responses were drawn at a temperature: the model itself is not run again")
        return []
    model = _find_model(results, revision)
    folder = folder / "model"
    response_tasks, likelihood_tasks = {}, {}  # lm-eval's name of a task -> benchmark
    for name, rows in ours.items():
        documents = _select_fitting(name, rows, settings, Path(model["pretrained"]))
        if documents:
            stops = get_stops(BENCHMARKS[name], settings)
            new_tokens = get_new_tokens(BENCHMARKS[name], settings)
            task = harness.write_generate_task(folder, name, documents, stops, new_tokens)
            response_tasks[task] = name
        if name in COMMONSENSE:
            problems = []
            for row in rows.values():
                # Without a data folder problems are made from their rows, which have the question.
                problems.append(row["problem"]._replace(question=row["question"]))
            likelihood_tasks[harness.write_likelihood_task(folder, name, problems)] = name
    tasks = [*response_tasks, *likelihood_tasks]
    judged = harness.run_lm_eval(folder, tasks, model, settings.batch_size)
    comparisons = []
    for task, name in response_tasks.items():
        texts = {row.id: row.response for row in judged if row.task == task}
        same = {problem: text == ours[name][problem]["output"] for problem, text in texts.items()}
        comparisons.append(
            Comparison(name, "lm-eval's own responses", same, texts=True, outputs=texts)
        )
    likelihoods = [row for row in judged if row.task in likelihood_tasks]
    label = "lm-eval likelihood, {} (another metric)"
    return comparisons + _compare_by_rule(likelihoods, likelihood_tasks, label)


def _find_model(results: EvaluationResults, revision: str) -> dict[str, str]:
    """Return the arguments with which lm-eval loads the model that was scored.

    Raises:
        UserError: the base's weights have changed, or lm-eval cannot make the adapter's base.
    """
    base, adapter = results.base, results.adapter
    path = fetch_model(base.name, revision, field="--scores", remedy="bring the scored base back")
    if differs(base.config_sha256, hash_config(path)):
        raise UserError(
            f"--scores: {base.name} has another config.json now than was scored; bring that back"
        )
    if hash_weights(check_model(path, "--scores").files) != base.weights_sha256:
        raise UserError(
            f"--scores: {base.name} has other weights now than were scored; give its --revision"
        )
    model = {"pretrained": str(path), "dtype": results.dtype}
    if adapter:
        # lm-eval knows PEFT's files, but nothing of astra_init/.
        made_for = read_adapter_base(Path(adapter))
        if made_for and made_for["on"] == "residual":
            raise UserError(
                f"--scores: {adapter} is for the residual base, which lm-eval cannot make; "
                "evaluate lora/ instead"
            )
        model["peft"] = adapter
    return model


def _select_fitting(
    name: str, rows: GradedRows, settings: Eval, model: Path
) -> list[dict[str, str]]:
    """Return the documents of problems that lm-eval can run as we do; print how many it cannot.

    Where a prompt and its new tokens are longer than the context, lm-eval cuts the prompt's
    beginning, and we generate fewer tokens.
    """
    new_tokens = get_new_tokens(BENCHMARKS[name], settings)
    format_question = choose_prompt(BENCHMARKS[name], settings, template=None)
    prompts = [format_question(row["question"]) for row in rows.values()]
    encoded = encode_texts(load_tokenizer(model), prompts)
    context = get_num_positions(read_config(model, "--scores")) or 2**31
    documents = []
    for row, prompt, ids in zip(rows.values(), prompts, encoded, strict=True):
        if len(ids) + new_tokens <= context:
            documents.append(_make_document(row, prompt))
    if len(documents) < len(rows):
        print(
            f"{name}: left out of lm-eval's own responses, longer than the context of {context} "
            f"tokens with {new_tokens} new ones: {len(rows) - len(documents)} of {len(rows)}"
        )
    return documents


def _report(
    comparisons: Sequence[Comparison], ours: Mapping[str, GradedRows], folder: Path
) -> None:
    """Print and write the table of comparisons, and write the problems on which they differ."""
    compared = {comparison.benchmark for comparison in comparisons}
    for name in ours:
        if name not in compared:
            print(f"{name}: no other harness has a grader of these responses")
    if not comparisons:
        return
    differences = []
    for comparison in comparisons:
        differences += find_differences(comparison, ours[comparison.benchmark])
    # Of programs alone, nothing has been written there yet.
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "differences.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in differences))
    table = render_comparisons(comparisons, ours)
    write_text(folder / "crosscheck.md", table + "\n")
    print(f"{table}\nproblems on which they differ: {path}")
