"""Each answer is graded once, a killed scoring resumes to the same file, and scores add up.

The responses are made here, without a model; a second.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

from eval.generation.decoding import Completion
from eval.tasks import BENCHMARKS
from eval.tasks.base import GRADERS, Problem
from launch.config.schema import Eval
from launch.data.chat.template import load_template
from launch.run.results import Score
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.errors import UserError
from launch.scoring import score as scoring
from launch.scoring.requests import Request, make_requests
from launch.scoring.responses import GENERATIONS, PREVIOUS, read_generations
from launch.scoring.score import (
    check_prompts,
    read_problems,
    score_benchmarks,
    score_responses,
)
from launch.scoring.score_table import render_scores
from tests.support.chat import CASES, make_chat_model, make_chat_tokenizer
from tests.support.generation import make_tokenizer

IDENTITY = {"base": {"name": "model", "weights_sha256": "0"}, "dtype": "float32"}
SETTINGS = Eval(suites=["gsm8k", "siqa"], samples=2, temperature=0.5)
PROBLEMS = {
    "gsm8k": [Problem(f"gsm8k/{i}", f"What is {i} + 1?", str(i + 1)) for i in range(5)],
    "siqa": [Problem(f"siqa/{i}", "Which?", "answer2") for i in range(3)],
}


class KilledError(Exception):
    """Stands for a kill."""


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    start_process_group()
    yield
    stop_process_group()


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The responses to gsm8k that were graded, each with its grader."""
    calls = []
    own_grade = BENCHMARKS["gsm8k"].grade

    def grade(output: str, problem: Problem, grader: str) -> bool:
        calls.append((output, grader))
        return own_grade(output, problem, grader)

    monkeypatch.setitem(BENCHMARKS, "gsm8k", BENCHMARKS["gsm8k"]._replace(grade=grade))
    return calls


def make_responder(
    asked: list[Request], limit: int | None = None
) -> Callable[..., Iterable[dict[int, Completion]]]:
    """Make a function that responds in parts of two, last requests first, until `limit` is asked.

    The first sample of a problem is right, the second is not; each response has the names of its
    problem and sample.
    """

    def respond(_: object, requests: list[Request]) -> Iterator[dict[int, Completion]]:
        backwards = list(reversed(range(len(requests))))
        for start in range(0, len(backwards), 2):
            if limit is not None and len(asked) >= limit:
                raise KilledError
            part = {}
            for i in backwards[start : start + 2]:
                request = requests[i]
                asked.append(request)
                answer = "0" if request.sample else request.problem.reference
                text = f"{request.problem.id} {request.sample}\nThe answer is: {answer}"
                part[i] = Completion(text)
            yield part

    return respond


def score(folder: Path, asked: list[Request], **options: object) -> dict[str, Score]:
    settings = options.pop("settings", SETTINGS)
    identity = options.pop("identity", IDENTITY)
    problems = {name: PROBLEMS[name] for name in settings.suites}
    respond = make_responder(asked, **options)
    return score_responses(respond, problems, settings, folder, identity)


def test_a_file_with_another_number_of_problems_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = '{"question": "1 + 1?", "answer": "#### 2"}\n'
    (tmp_path / "gsm8k_test.jsonl").write_text(row * 2)
    whole = Eval(suites=["gsm8k"], data_dir=str(tmp_path))
    assert len(read_problems(whole)["gsm8k"]) == 2
    line = f"gsm8k: 2 problems from {tmp_path}; the benchmark has 1319\n"
    assert capsys.readouterr().out == line
    assert len(read_problems(whole.model_copy(update={"limit": 1}))["gsm8k"]) == 1
    monkeypatch.setitem(BENCHMARKS, "gsm8k", BENCHMARKS["gsm8k"]._replace(num_problems=2))
    read_problems(whole)
    assert capsys.readouterr().out == ""


def test_each_answer_is_graded_once_by_each_grader(
    graded: list[tuple[str, str]], tmp_path: Path
) -> None:
    scores = score(tmp_path, [])
    assert len(graded) == len(set(graded)) == 5 * 2 * len(GRADERS)
    assert (scores["gsm8k"].accuracy, scores["gsm8k"].correct, scores["gsm8k"].n) == (0.5, 5, 5)
    assert scores["gsm8k"].pass_at == {"1": 0.5}
    assert scores["gsm8k"].literature.accuracy == 0.5
    rows = read_generations(tmp_path / GENERATIONS)
    # In the order of benchmarks, problems and samples, although the last responses came first.
    expected = [
        (name, problem.id, sample)
        for name, problems in PROBLEMS.items()
        for problem in problems
        for sample in range(2)
    ]
    assert [(row["suite"], row["id"], row["sample"]) for row in rows] == expected
    assert all(row["strict"] == (row["sample"] == 0) for row in rows)


def test_a_killed_scoring_resumes_to_the_same_file(
    graded: list[tuple[str, str]], tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    whole = score(undisturbed, [])
    before: list[Request] = []
    with pytest.raises(KilledError):
        score(killed, before, limit=12)
    with (killed / GENERATIONS).open("a") as file:
        file.write('{"suite": "siqa", "id": "siqa/0", "sam')  # what a kill in a write leaves
    graded.clear()
    after: list[Request] = []
    resumed = score(killed, after)
    assert sorted(request.key for request in before + after) == sorted(
        (row["suite"], row["id"], row["sample"])
        for row in read_generations(undisturbed / GENERATIONS)
    )
    assert len(graded) == len(set(graded)) == 5 * 2 * len(GRADERS)
    assert (killed / GENERATIONS).read_bytes() == (undisturbed / GENERATIONS).read_bytes()
    for name, score_of_benchmark in resumed.items():
        expected = whole[name].model_dump(exclude={"seconds"})
        assert score_of_benchmark.model_dump(exclude={"seconds"}) == expected


def test_responses_to_other_benchmarks_stay(tmp_path: Path) -> None:
    score(tmp_path, [])
    first = read_generations(tmp_path / GENERATIONS)
    asked: list[Request] = []
    score(tmp_path, asked, settings=SETTINGS.model_copy(update={"suites": ["gsm8k"], "samples": 1}))
    assert not asked
    # And those beyond the number of samples.
    of_gsm8k = [row for row in first if row["suite"] == "gsm8k" and row["sample"] == 0]
    others = [row for row in first if row not in of_gsm8k]
    assert read_generations(tmp_path / GENERATIONS) == [*others, *of_gsm8k]


def test_responses_beyond_a_limit_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(tmp_path, [])
    with monkeypatch.context() as limited:
        limited.setitem(PROBLEMS, "gsm8k", PROBLEMS["gsm8k"][:2])
        assert score(tmp_path, [])["gsm8k"].n == 2
    assert len(read_generations(tmp_path / GENERATIONS)) == 16
    again = score(tmp_path, asked := [])
    assert not asked and again["gsm8k"].accuracy == whole["gsm8k"].accuracy


def test_every_file_that_is_set_aside_is_kept(tmp_path: Path) -> None:
    files = []
    for seed in range(4):
        score(tmp_path, [], settings=SETTINGS.model_copy(update={"seed": seed}))
        files.append((tmp_path / GENERATIONS).read_bytes())
    names = [PREVIOUS, "generations.previous-2.jsonl", "generations.previous-3.jsonl"]
    assert len(set(files)) == 4 and [(tmp_path / name).read_bytes() for name in names] == files[:3]


def test_responses_of_other_settings_are_set_aside(tmp_path: Path) -> None:
    score(tmp_path, [])
    first = (tmp_path / GENERATIONS).read_bytes()
    asked: list[Request] = []
    score(tmp_path, asked, settings=SETTINGS.model_copy(update={"seed": 1}))
    assert len(asked) == 16
    assert (tmp_path / PREVIOUS).read_bytes() == first


@pytest.mark.parametrize("key", ["config_sha256", "tokenizer_sha256", "adapter_config_sha256"])
def test_responses_of_another_config_or_tokenizer_are_set_aside(key: str, tmp_path: Path) -> None:
    score(tmp_path, [])  # as an earlier version, which did not hash it
    score(tmp_path, asked := [], identity=IDENTITY | {key: "1"})
    assert not asked
    score(tmp_path, asked, identity=IDENTITY | {key: "2"})
    assert len(asked) == 16


def test_a_context_under_any_name_is_kept_to(tmp_path: Path) -> None:
    """MPT has it as max_seq_len."""
    config = MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=40, max_seq_len=32)
    engine = SimpleNamespace(device=torch.device("cpu"), sharded=False)
    settings = Eval(suites=["gsm8k"], max_new_tokens=4)
    questions = {"fits": "w2", "long": "w2 " * 40}
    problems = {"gsm8k": [Problem(name, text, "1") for name, text in questions.items()]}
    model = MptForCausalLM(config)
    found = score_benchmarks(
        engine, model, make_tokenizer(), problems, settings, tmp_path, IDENTITY
    )["gsm8k"]
    assert found.overlong == ["long"]
    assert "end_tokens" in json.loads((tmp_path / "generation.json").read_text())


def test_a_chat_prompt_is_the_templates_and_a_response_ends_at_its_end_of_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3's turns end in <|eot_id|>, which its tokenizer does not call the end of sequence."""
    tokenizer = make_chat_tokenizer(CASES["llama3"])
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end != tokenizer.eos_token_id
    model = make_chat_model(eos_token_id=tokenizer.eos_token_id)
    question = "one? <|eot_id|>"  # in a question it is text
    messages = [{"role": "user", "content": question}]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, sanitize_control_tokens=True
    )["input_ids"]
    with torch.no_grad():  # the first token of the response is made the end of turn
        first = int(model(torch.tensor([expected])).logits[0, -1].argmax())
        model.lm_head.weight[[first, end]] = model.lm_head.weight[[end, first]]
    prompts = []
    generate = scoring.generate_responses

    def keep_prompts(
        *arguments: object, **options: object
    ) -> Iterator[dict[int, Completion | None]]:
        prompts.extend(arguments[2])
        yield from generate(*arguments, **options)

    monkeypatch.setattr(scoring, "generate_responses", keep_prompts)
    engine = SimpleNamespace(device=torch.device("cpu"), sharded=False)
    settings = Eval(suites=["gsm8k"], max_new_tokens=4, prompt="chat")
    problems = {"gsm8k": [Problem("gsm8k/0", question, "3")]}
    found = score_benchmarks(engine, model, tokenizer, problems, settings, tmp_path, IDENTITY)
    assert prompts == [expected]
    assert [row["output"] for row in read_generations(tmp_path / GENERATIONS)] == [""]
    recorded = found["gsm8k"].model_dump()
    assert (recorded["prompt"], recorded["end_of_turn"]) == ("chat", "<|eot_id|>")
    template = hashlib.sha256(CASES["llama3"].template.encode()).hexdigest()
    assert recorded["chat_template_sha256"] == template
    assert json.loads((tmp_path / "generation.json").read_text())["end_tokens"] == [1, end]


@pytest.mark.parametrize(
    ("switch", "batch_size", "warned"), [(8, 2, True), (8, 1, False), (64, 2, False)]
)
def test_a_line_says_where_longrope_lets_rows_change_each_other(
    switch: int, batch_size: int, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [4.0] * 4, "original_max_position_embeddings": switch}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 40}
    model = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            rope_parameters=rope,
        )
    )
    engine = SimpleNamespace(device=torch.device("cpu"), sharded=False)
    settings = Eval(suites=["gsm8k"], max_new_tokens=4, batch_size=batch_size)
    problems = {"gsm8k": PROBLEMS["gsm8k"][:2]}
    score_benchmarks(engine, model, make_tokenizer(), problems, settings, tmp_path, IDENTITY)
    assert ("a row of this base (longrope) changes" in capsys.readouterr().out) is warned


def test_a_question_that_the_template_refuses_is_named_with_its_benchmark() -> None:
    tokenizer = make_chat_tokenizer(CASES["llama3"])
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('not this') }}{% endif %}"
        + tokenizer.chat_template
    )
    template = load_template(None, tokenizer, "eval.chat_template")
    problems = [Problem("gsm8k/0", "bad", "3")]
    with pytest.raises(UserError, match=r"^eval.prompt: chat, gsm8k: .*\(not this\)"):
        make_requests(BENCHMARKS["gsm8k"], problems, Eval(prompt="chat"), template)


def test_responses_to_other_prompts_are_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Another data folder has other problems under the same ids."""
    score(tmp_path, [])
    first = (tmp_path / GENERATIONS).read_bytes()
    others = [problem._replace(question="Another.", reference="7") for problem in PROBLEMS["siqa"]]
    monkeypatch.setitem(PROBLEMS, "siqa", others)
    asked: list[Request] = []
    score(tmp_path, asked)
    assert {request.key[:2] for request in asked} == {("siqa", problem.id) for problem in others}
    assert "6 responses are to other prompts than those of now" in capsys.readouterr().out
    assert (tmp_path / PREVIOUS).read_bytes() == first
    rows = read_generations(tmp_path / GENERATIONS)
    assert {row["question"] for row in rows if row["suite"] == "siqa"} == {"Another."}
    score(tmp_path, asked := [])
    assert not asked


def test_responses_beyond_a_limit_go_where_the_prompts_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of another chat template: --compare and --grade would mix the two."""
    score(tmp_path, [])
    first = (tmp_path / GENERATIONS).read_bytes()
    others = [problem._replace(question="Another.") for problem in PROBLEMS["siqa"][:1]]
    monkeypatch.setitem(PROBLEMS, "siqa", others)
    monkeypatch.setitem(PROBLEMS, "gsm8k", PROBLEMS["gsm8k"][:1])
    score(tmp_path, [])
    rows = read_generations(tmp_path / GENERATIONS)
    assert {row["question"] for row in rows if row["suite"] == "siqa"} == {"Another."}
    assert len([row for row in rows if row["suite"] == "gsm8k"]) == 10
    assert (tmp_path / PREVIOUS).read_bytes() == first


def test_another_reference_is_graded_without_new_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(tmp_path, [])
    others = [problem._replace(reference="99") for problem in PROBLEMS["gsm8k"]]
    monkeypatch.setitem(PROBLEMS, "gsm8k", others)
    asked: list[Request] = []
    assert score(tmp_path, asked)["gsm8k"].accuracy == 0
    assert not asked


def test_responses_of_an_earlier_version_are_kept_where_their_question_is_known(
    tmp_path: Path,
) -> None:
    score(tmp_path, [])
    path = tmp_path / GENERATIONS
    rows = [dict(row) for row in read_generations(path)]
    for row in rows:
        del row["request_sha256"]
    graded, ungraded = rows[:10], rows[10:]
    for row in ungraded:  # as a kill left them
        for name in ("question", "reference", *GRADERS):
            del row[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[Request] = []
    score(tmp_path, asked)
    assert {request.benchmark for request in asked} == {"siqa"} and len(asked) == 6
    assert read_generations(path)[:10] == graded
    score(tmp_path, asked := [])
    assert not asked


def test_a_prompt_that_is_too_long_is_counted_and_named(tmp_path: Path) -> None:
    def respond(_: object, requests: list[Request]) -> Iterator[dict[int, Completion | None]]:
        for i, request in enumerate(requests):
            is_long = request.problem.id == "gsm8k/3"
            yield {
                i: None if is_long else Completion(f"The answer is: {request.problem.reference}")
            }

    settings = SETTINGS.model_copy(update={"suites": ["gsm8k"]})
    problems = {"gsm8k": PROBLEMS["gsm8k"]}
    found = score_responses(respond, problems, settings, tmp_path, IDENTITY)["gsm8k"]
    assert (found.accuracy, found.n, found.empty, found.overlong) == (0.8, 5, 2, ["gsm8k/3"])
    # A new start knows it from the file.
    again = score_responses(respond, problems, settings, tmp_path, IDENTITY)["gsm8k"]
    assert (again.empty, again.overlong) == (2, ["gsm8k/3"])


def test_responses_that_were_cut_off_are_counted(tmp_path: Path) -> None:
    def respond(_: object, requests: list[Request]) -> Iterator[dict[int, Completion]]:
        for i, request in enumerate(requests):
            yield {i: Completion("", truncated=request.benchmark == "siqa" and i < 2)}

    found = score_responses(respond, PROBLEMS, SETTINGS, tmp_path, IDENTITY)
    again = score_responses(respond, PROBLEMS, SETTINGS, tmp_path, IDENTITY)  # from the file
    for scores in (found, again):
        assert (scores["gsm8k"].truncated, scores["siqa"].truncated) == (None, 2)
        assert "truncated" not in scores["gsm8k"].model_fields_set  # no claim of 0
        (line,) = [line for line in render_scores(scores).splitlines() if "cut off" in line]
        assert line.startswith("siqa: 2 responses were cut off")


def test_kept_responses_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    score(tmp_path, [])
    assert "of an earlier start are kept" not in capsys.readouterr().out
    score(tmp_path, [])
    assert "16 responses of an earlier start are kept\n" in capsys.readouterr().out
    served = IDENTITY | {"base": {"name": "model", "weights_sha256": None}}
    score(tmp_path / "served", [], identity=served)
    score(tmp_path / "served", [], identity=served)
    assert "weights it has: choose another --output if they changed" in capsys.readouterr().out


def test_a_line_that_is_no_response_is_named(tmp_path: Path) -> None:
    score(tmp_path, [])
    path = tmp_path / GENERATIONS
    path.write_text('{"suite": "gsm8k", "output": "x"}\n')
    with pytest.raises(UserError, match=r"line 1 of .* has no id"):
        score(tmp_path, [])


def test_the_data_hash_is_that_of_the_problems(tmp_path: Path) -> None:
    """Evaluations by two versions can be compared only while the hash stays what it was."""
    values = [[f"siqa/{i}", "Which?", "answer2", None, ""] for i in range(3)]
    expected = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    assert score(tmp_path, [])["siqa"].data_sha256 == expected


def test_the_table_has_both_graders_and_the_mean_of_the_eight() -> None:
    literature = {"accuracy": 0.25, "n": 4, "correct": 1, "interval": (0.05, 0.7)}
    one = Score(
        accuracy=0.5,
        n=4,
        samples=10,
        correct=2,
        interval=(0.15, 0.85),
        pass_at={"1": 0.5, "10": 1.0},
        literature=literature,
        prompt="recipe",
    )
    lines = render_scores({"gsm8k": one}).splitlines()
    assert lines[2:] == [
        "| gsm8k | 50.0 | 15.0 to 85.0 | 25.0 | 4 | recipe |",
        "| gsm8k pass@1 | 50.0 | | | 4 | recipe |",
        "| gsm8k pass@10 | 100.0 | | | 4 | recipe |",
    ]
    names = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"]
    assert "mean" not in render_scores(dict.fromkeys(names, one))
    table = render_scores(dict.fromkeys([*names, "openbookqa"], one))
    # Eight alike: the interval of one, its sides divided by the square root of eight.
    assert table.splitlines()[-1] == "| mean of the eight | 50.0 | 37.6 to 62.4 | 25.0 | | |"
    named = one.model_copy(update={"overlong": ["gsm8k/7"]})
    assert render_scores({"gsm8k": named}).splitlines()[-1] == (
        "gsm8k: the prompts of 1 problems are too long for the model, so they have an empty "
        "response: gsm8k/7"
    )
    unread = one.literature.model_copy(update={"no_answer": 3})
    told = one.model_copy(update={"literature": unread, "truncated": 2})
    assert render_scores({"gsm8k": told}).splitlines()[-3::2] == [
        "gsm8k: no answer found in 0 responses (strict) and 3 (literature), which count as wrong",
        "gsm8k: 2 responses were cut off before their end, by the limit of new tokens or of the "
        "context",
    ]


def test_chat_prompts_are_tried_before_anything_is_trained() -> None:
    problems = {"gsm8k": [Problem("gsm8k/0", "good", "3"), Problem("gsm8k/1", "bad", "3")]}
    tokenizer = make_chat_tokenizer(CASES["llama3"])
    check_prompts(problems, Eval(prompt="chat"), tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('not this') }}{% endif %}"
        + tokenizer.chat_template
    )
    with pytest.raises(UserError, match=r"^eval\.prompt: chat, gsm8k: .*\(not this\)"):
        check_prompts(problems, Eval(prompt="chat"), tokenizer)
    check_prompts(problems, Eval(), tokenizer)
    check_prompts({}, Eval(prompt="chat"), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match=r"^eval\.chat_template: the tokenizer has no chat template"
    ):
        check_prompts(problems, Eval(prompt="chat"), tokenizer)


# A file of one row, the published prompt, stop strings and most new tokens. PiSSA, CorDA and Astra
# publish those of maths, WizardCoder and PiSSA those of code, LLM-Adapters that of BoolQ.
INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n"
)
CREATE = INSTRUCTION + "Create a Python script for this problem:\n"
STOPS = ("Instruction:", "Instruction", "Response:", "Response")
PUBLISHED = {
    "gsm8k": (
        "gsm8k_test.jsonl",
        {"question": "What is {1} + 1?", "answer": "It is\n#### 2"},
        INSTRUCTION + "What is {1} + 1?\n\n### Response: Let's think step by step.",
        STOPS,
        1024,
    ),
    "math": (
        "math_test.jsonl",
        {"problem": r"Find $\frac{4}{2}$.", "answer": "2"},
        INSTRUCTION + "Find $\\frac{4}{2}$.\n\n### Response: Let's think step by step.",
        STOPS,
        2048,
    ),
    "humaneval": (
        "humaneval.jsonl",
        {
            "task_id": "HumanEval/0",
            "prompt": 'def f(x):\n    """Add one."""\n',
            "entry_point": "f",
            "canonical_solution": "    return x + 1\n",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n",
        },
        CREATE + 'def f(x):\n    """Add one."""\n\n\n### Response:',
        (),
        1024,
    ),
    "mbpp": (
        "mbpp.jsonl",
        {
            "task_id": 11,
            "text": "Write a function to add one.",
            "code": "def f(x):\n    return x + 1\n",
            "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
        },
        CREATE
        + "Write a function to add one.\nTest examples:\nassert f(1) == 2\nassert f(2) == 3\n\n"
        "### Response:",
        (),
        1024,
    ),
    "boolq": (
        "boolq/test.jsonl",
        {"instruction": "Is it so?\n\nAnswer format: true/false", "input": "", "answer": "true"},
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request. \n\n                ### Instruction:\n                Is it so?\n\n"
        "Answer format: true/false\n\n                ### Response:\n                ",
        (),
        32,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_prompt_has_its_stops_and_its_most_new_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, row, prompt, stops, new_tokens = PUBLISHED[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(row) + "\n")
    problems = {name: BENCHMARKS[name].read_problems(tmp_path, None)}
    encoded, decoding = [], {}

    def encode(_: object, texts: list[str]) -> list[list[int]]:
        encoded.extend(texts)
        return [[1] for _ in texts]

    def generate(*_: object, **options: object) -> Iterator[dict[int, str | None]]:
        decoding.update(options)
        raise KilledError

    monkeypatch.setattr(scoring, "encode_texts", encode)
    monkeypatch.setattr(scoring, "generate_responses", generate)
    engine = SimpleNamespace(device=torch.device("cpu"), sharded=False)
    model = MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=40))
    for chosen in ("literature", "recipe"):
        with pytest.raises(KilledError):
            settings = Eval(suites=[name], prompt=chosen)
            folder = tmp_path / chosen
            folder.mkdir()
            score_benchmarks(engine, model, make_tokenizer(), problems, settings, folder, IDENTITY)
        # Other prompts are not cut at the words of the published one.
        assert decoding["stops"] == (stops if chosen == "literature" else ())
        assert decoding["max_new_tokens"] == new_tokens
    assert encoded[0] == prompt


def test_every_benchmark_has_its_published_stops_and_most_new_tokens() -> None:
    published = {
        name: (benchmark.stops, benchmark.max_new_tokens) for name, benchmark in BENCHMARKS.items()
    }
    assert published == {
        "gsm8k": (STOPS, 1024),
        "math": (STOPS, 2048),
        "math500": (STOPS, 2048),
        "humaneval": ((), 1024),
        "mbpp": ((), 1024),
        "mbpp_sanitized": ((), 1024),
    } | dict.fromkeys(
        (
            "boolq",
            "piqa",
            "siqa",
            "hellaswag",
            "winogrande",
            "arc_easy",
            "arc_challenge",
            "openbookqa",
        ),
        ((), 32),
    )
