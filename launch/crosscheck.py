"""Hold our numbers against lm-eval's and evalplus': their graders on the same responses, the same model run by lm-eval.

Needs requirements-crosscheck.txt, no network. Of a folder of launch/evaluate.py: lm-eval's graders of gsm8k and math,
evalplus' base check of programs, and, of the model, lm-eval's own responses and its likelihoods of the commonsense
choices, which are another metric. Of a file of responses, or the benchmarks' own answers: the graders alone."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

if (
    not __package__
):  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import grading
from eval.crosscheck import harness, programs
from eval.crosscheck.table import Comparison, describe, differing
from eval.tasks import GROUPS, TASKS, expand
from eval.tasks.base import GRADERS
from launch import cli
from launch.runtime.errors import UserError, run
from launch.runtime.files import write_text

EXAMPLES = """\
  python launch/evaluate.py --model MODEL --data-dir data --suite gsm8k --max-new-tokens 128 --limit 20 --output scores
  python launch/crosscheck.py --scores scores --data-dir data
  python launch/crosscheck.py --scores responses.jsonl --output checked            {suite, output, and reference or id}
  python launch/crosscheck.py --references --suite gsm8k --suite humaneval --data-dir data --output checked"""
INSTALL = "pip install --no-deps -r requirements-crosscheck.txt, after requirements.txt"
COMMONSENSE = expand(["commonsense"])


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--scores", type=Path, help="folder of launch/evaluate.py, or a file of responses"
    )
    what.add_argument(
        "--references", action="store_true", help="the benchmarks' own answers as the responses"
    )
    add(
        "--suite",
        action="append",
        choices=[*TASKS, *GROUPS],
        help="only these; repeatable (default all of --scores)",
    )
    add(
        "--data-dir",
        type=Path,
        help="folder with the benchmarks' files (default: that of --scores, or the hub)",
    )
    add(
        "--limit",
        type=int,
        help="with --references: problems of each suite, the first so many (default all)",
    )
    add("--revision", default="main", help="hub revision of the model (default main)")
    add(
        "--output",
        type=Path,
        help="folder for differences.jsonl and lm-eval's task files (default: in --scores)",
    )
    arguments = parser.parse_args()
    if arguments.output is None and (arguments.references or arguments.scores.is_file()):
        raise UserError("--output: is required unless --scores is a folder")
    folder = arguments.output or arguments.scores / "crosscheck"
    rows, results = (
        (_references(arguments), None) if arguments.references else _read(arguments.scores)
    )
    data_dir = arguments.data_dir or (results and results["settings"]["data_dir"])
    chosen = expand(arguments.suite or list(TASKS))
    of = {suite: [row for row in rows if row["suite"] == suite] for suite in chosen}
    of = {suite: rows for suite, rows in of.items() if rows}
    if not of:
        raise UserError("--suite: there are no responses of it; run launch/evaluate.py")
    _need("lm_eval", *(["evalplus"] if any(TASKS[suite].kind == "code" for suite in of) else []))
    ours = {suite: _graded(suite, rows, data_dir and Path(data_dir)) for suite, rows in of.items()}
    comparisons = _same_responses(ours, folder)
    if results is not None:
        comparisons += _same_model(ours, results, arguments.revision, folder)
    _report(comparisons, ours, folder)


def _need(*modules: str) -> None:
    """UserError for libraries that are not there, before anything long has run."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"crosscheck: {' and '.join(missing)} missing here: {INSTALL}")


def _read(path: Path) -> tuple[list[dict], dict | None]:
    """The responses of a folder of launch/evaluate.py, with its results, or of a file, with None."""
    from launch.scoring.score import GENERATIONS, read_generations

    file = path / GENERATIONS if path.is_dir() else path
    results = json.loads(where.read_text()) if (where := path / "results.json").is_file() else None
    if not file.is_file() or (path.is_dir() and not (results and "settings" in results)):
        raise UserError(
            f"--scores: {path} is neither a finished folder of launch/evaluate.py nor a file of responses"
        )
    rows = read_generations(file)
    for number, row in enumerate(rows, start=1):
        if row.get("suite") not in TASKS or not isinstance(row.get("output"), str):
            raise UserError(
                f"--scores: row {number} of {file} needs a suite ({', '.join(TASKS)}) and the text output"
            )
    first = [row for row in rows if row.get("sample", 0) == 0]
    return first, results


def _references(arguments: argparse.Namespace) -> list[dict]:
    """The benchmarks' own answers as responses, in MetaMath's form, or as a fenced program."""
    forms = {
        "gsm8k": "#### {0}\nThe answer is: {0}",
        **dict.fromkeys(COMMONSENSE, "the correct answer is {0}"),
    }
    math = "$\\boxed{{{0}}}$\nThe answer is: {0}"
    rows = []
    for suite in expand(arguments.suite or ["gsm8k"]):
        form = "```python\n{0}\n```" if TASKS[suite].kind == "code" else forms.get(suite, math)
        for problem in TASKS[suite].rows(arguments.data_dir, arguments.limit):
            row = {"suite": suite, "id": problem.id, "reference": problem.reference}
            rows.append(row | {"output": form.format(problem.reference)})
    return rows


def _graded(suite: str, rows: list[dict], data_dir: Path | None) -> dict[str, dict]:
    """Problem -> its row, with both our grades and the `problem`."""
    problems = grading.problems_of(TASKS[suite], rows, data_dir)
    if not all(grader in row for row in rows for grader in GRADERS):
        given = grading.grade(TASKS[suite], problems, [row["output"] for row in rows])
        rows = [
            row | {name: grade.passed for name, grade in of.items()}
            for row, of in zip(rows, given, strict=True)
        ]
    found = {
        problem.id: row | {"id": problem.id, "reference": problem.reference, "problem": problem}
        for problem, row in zip(problems, rows, strict=True)
    }
    if len(found) < len(rows):
        raise UserError(
            f"--scores: {len(rows) - len(found)} responses of {suite} are to a problem that has one already"
        )
    return found


def _same_responses(ours: dict[str, dict[str, dict]], folder: Path) -> list[Comparison]:
    """The other harnesses' graders on our responses."""
    found = []
    tasks = {
        harness.write_generate(
            folder / "tasks", suite, [_document(row) for row in ours[suite].values()]
        ): suite
        for suite in ours
        if suite in harness.GRADED
    }
    if tasks:
        found += _by_rule(harness.run(folder / "tasks", list(tasks), None, 1), tasks)
    for suite in ours:
        if TASKS[suite].kind == "code":
            rows = list(ours[suite].values())
            problems = [row["problem"] for row in rows]
            texts = [
                TASKS[suite].to_program(row["output"], row["problem"], "strict") for row in rows
            ]
            verdicts = dict(zip(ours[suite], programs.check(suite, problems, texts), strict=True))
            theirs = {problem: passed for problem, passed in verdicts.items() if passed is not None}
            if len(theirs) < len(verdicts):
                left_out = [problem for problem in verdicts if problem not in theirs]
                print(
                    f"{suite}: left out, evalplus cannot run their tests ({len(left_out)}): {', '.join(left_out)}"
                )
            found.append(Comparison(suite, "evalplus, base tests", theirs))
    return found


def _document(row: dict, prompt: str = "") -> dict[str, str]:
    return {
        "id": row["id"],
        "prompt": prompt or "-",
        "reference": row["reference"],
        "output": row["output"],
    }


def _by_rule(
    judged: list[harness.Judged], tasks: dict[str, str], name: str = "{}"
) -> list[Comparison]:
    """lm-eval's verdicts, one comparison for each task and rule. `tasks`: task -> suite."""
    rules = dict.fromkeys((row.task, row.rule) for row in judged)
    return [
        Comparison(
            tasks[task],
            "lm-eval " + name.format(rule),
            {j.id: j.passed for j in judged if j[:2] == (task, rule)},
        )
        for task, rule in rules
    ]


def _same_model(
    ours: dict[str, dict[str, dict]], results: dict, revision: str, folder: Path
) -> list[Comparison]:
    """The model of the results run by lm-eval: its own responses, and its likelihoods of commonsense choices."""
    if "url" in results:
        print("the responses came from a server: the model itself is not run again")
        return []
    model = _model(results, revision)
    settings = results["settings"]
    responses, tasks = {}, {}
    for suite in ours:
        documents, new_tokens = _fitting(suite, ours[suite], settings, Path(model["pretrained"]))
        if documents:
            stops = TASKS[suite].stops if settings["prompt"] == "literature" else ()
            responses[
                harness.write_generate(folder / "model", suite, documents, stops, new_tokens)
            ] = suite
        if suite in COMMONSENSE:
            problems = [
                row["problem"]._replace(question=row["question"]) for row in ours[suite].values()
            ]
            tasks[harness.write_likelihood(folder / "model", suite, problems)] = suite
    judged = harness.run(folder / "model", [*responses, *tasks], model, settings["batch_size"])
    found = []
    for task, suite in responses.items():
        texts = {row.id: row.response for row in judged if row.task == task}
        same = {problem: text == ours[suite][problem]["output"] for problem, text in texts.items()}
        found.append(Comparison(suite, "lm-eval's own responses", same, texts=True, outputs=texts))
    likelihoods = [row for row in judged if row.task in tasks]
    return found + _by_rule(likelihoods, tasks, "likelihood, {} (another metric)")


def _model(results: dict, revision: str) -> dict:
    """What lm-eval loads. Raises UserError where that is not the model that was scored."""
    from launch.runtime.model_files import fetch_model, weights_hash
    from launch.training import export

    base, adapter = results["base"], results["adapter"]
    path = Path(fetch_model(base["name"], revision))
    if weights_hash(path) != base["weights_sha256"]:
        raise UserError(
            f"--scores: {base['name']} has other weights now than were scored; give its --revision"
        )
    if adapter and (made_for := export.read_base(Path(adapter))) and made_for["on"] == "residual":
        raise UserError(
            f"--scores: {adapter} is for the residual base, which lm-eval cannot make; evaluate lora/ instead"
        )
    return {
        "pretrained": str(path),
        "dtype": results["dtype"],
        **({"peft": adapter} if adapter else {}),
    }


def _fitting(
    suite: str, rows: dict[str, dict], settings: dict, folder: Path
) -> tuple[list[dict], int]:
    """The documents that lm-eval runs as we do, and the new tokens: it cuts the beginning of a prompt that with those
    is longer than the context, where we write fewer. The number of those left out is printed."""
    from transformers import AutoConfig

    from launch.data.tokenize import encode, prompt
    from launch.runtime.model_files import load_tokenizer

    new_tokens = settings["max_new_tokens"] or TASKS[suite].max_new_tokens
    ask = prompt if settings["prompt"] == "recipe" else TASKS[suite].literature_prompt
    documents = [_document(row, ask(row["question"])) for row in rows.values()]
    lengths = map(
        len, encode(load_tokenizer(folder), [document["prompt"] for document in documents])
    )
    context = AutoConfig.from_pretrained(folder).max_position_embeddings
    fitting = [
        document
        for document, length in zip(documents, lengths, strict=True)
        if length + new_tokens <= context
    ]
    if len(fitting) < len(documents):
        print(
            f"{suite}: left out of lm-eval's own responses, longer than the context of {context} tokens with "
            f"{new_tokens} new ones: {len(documents) - len(fitting)} of {len(documents)}"
        )
    return fitting, new_tokens


def _report(comparisons: list[Comparison], ours: dict[str, dict[str, dict]], folder: Path) -> None:
    compared = {comparison.suite for comparison in comparisons}
    for suite in ours:
        if suite not in compared:
            print(f"{suite}: no other harness has a grader of these responses")
    if comparisons:
        differences = [
            row
            for comparison in comparisons
            for row in differing(comparison, ours[comparison.suite])
        ]
        write_text(
            folder / "differences.jsonl", "".join(json.dumps(row) + "\n" for row in differences)
        )
        table = describe(comparisons, ours)
        write_text(folder / "crosscheck.md", table + "\n")
        print(f"{table}\nproblems on which they differ: {folder / 'differences.jsonl'}")


if __name__ == "__main__":
    run(main)
