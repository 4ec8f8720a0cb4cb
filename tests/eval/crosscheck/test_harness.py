"""lm-eval's task files and what is read of its answers; and lm-eval itself, where it is installed.

Needs nothing for the files. With lm-eval (requirements-crosscheck.txt) its graders run on the
labelled cases, and with the shared stories260K and GSM8K it generates; a minute then, else a second.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.crosscheck import harness
from eval.tasks import gsm8k, math
from eval.tasks.base import ALPACA_PROMPT
from tests.support.generation import generate_all
from tests.support.grader_cases import FILES, read_grader_cases

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install --no-deps -r requirements-crosscheck.txt",
)


def test_task_files(tmp_path: Path) -> None:
    documents = [{"id": "gsm8k/0", "prompt": "p", "reference": "18", "output": "so\n#### 18"}]
    name = harness.write_generate_task(tmp_path, "gsm8k", documents, ("Instruction:",), 64)
    config = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    assert (config["task"], config["output_type"], config["num_fewshot"]) == (
        name,
        "generate_until",
        0,
    )
    assert config["generation_kwargs"]["until"] == ["Instruction:"]
    assert config["generation_kwargs"]["max_gen_toks"] == 64
    assert [rule["name"] for rule in config["filter_list"]] == ["strict-match", "flexible-extract"]
    data = Path(config["dataset_kwargs"]["data_files"]["test"])
    assert data.is_absolute()  # lm-eval reads a relative one from where it runs
    assert [json.loads(line) for line in data.read_text().splitlines()] == documents
    harness.write_generate_task(tmp_path, "math500", documents)
    assert (tmp_path / "minerva.py").is_file()


# As lm-eval 0.4.13 logged them, but for fields that are not read.
_ANSWER = {"doc": {"id": "gsm8k/0"}, "resps": [["a 18"]], "metrics": ["exact_match"]}
_CHOICE = {"doc": {"id": "piqa/3"}, "resps": [[[-3.1, False]], [[-9.0, False]]], "filter": "none"}
SAMPLES = {
    "astra_gsm8k_generate": [
        _ANSWER | {"filter": "strict-match", "exact_match": 0.0},
        _ANSWER | {"filter": "flexible-extract", "exact_match": 1.0},
    ],
    "astra_piqa_likelihood": [
        _CHOICE | {"metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": 0.0}
    ],
    "astra_boolq_generate": [
        {
            "doc": {"id": "boolq/0"},
            "resps": [["true"]],
            "filter": "none",
            "metrics": ["bypass"],
            "bypass": 999,
        },
    ],
}


def test_what_lm_eval_logs_is_read() -> None:
    assert [tuple(row) for row in harness.read_samples(SAMPLES)] == [
        ("astra_gsm8k_generate", "strict-match", "gsm8k/0", False, "a 18"),
        ("astra_gsm8k_generate", "flexible-extract", "gsm8k/0", True, "a 18"),
        ("astra_piqa_likelihood", "acc", "piqa/3", True, ""),
        ("astra_piqa_likelihood", "acc_norm", "piqa/3", False, ""),
        ("astra_boolq_generate", "bypass", "boolq/0", False, "true"),
    ]


@needs_lm_eval
def test_lm_eval_still_has_the_graders_that_the_task_files_hold() -> None:
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    theirs = yaml.safe_load((folder / "gsm8k" / "gsm8k.yaml").read_text())
    assert {key: theirs[key] for key in ("metric_list", "filter_list")} == harness._GSM8K


@needs_lm_eval
def test_lm_evals_graders_on_the_labelled_cases(tmp_path: Path) -> None:
    graders = {"gsm8k": gsm8k.grade_answer, "math": math.grade_answer}
    tasks, expected = [], {}
    for benchmark, grade in graders.items():
        rows = []
        for case in read_grader_cases(benchmark, files=FILES[:1]):
            if case.get("contested"):
                continue
            row = {"id": str(case["id"]), "reference": case["reference"], "output": case["output"]}
            rows.append(row | {"prompt": "-"})
            expected[benchmark, row["id"]] = case["expected"]
            assert grade(row["output"], row["reference"]) == case["expected"]
        tasks.append(harness.write_generate_task(tmp_path, benchmark, rows))
    wrong: dict[str, list[int]] = {}
    for judgement in harness.run_lm_eval(tmp_path, tasks, None, 1):
        is_right = expected[judgement.task.split("_")[1], judgement.id]
        counts = wrong.setdefault(judgement.rule, [0, 0])
        counts[0] += judgement.passed and not is_right
        counts[1] += is_right and not judgement.passed
    # docs/crosscheck.md quotes these: passed though wrong, failed though right. Ours fail none.
    assert wrong == {
        "strict-match": [0, 22],
        "flexible-extract": [1, 6],
        "exact_match": [0, 28],
        "math_verify": [0, 12],
    }


@needs_lm_eval
def test_lm_eval_writes_the_same_responses(shared: Path, tmp_path: Path) -> None:
    path = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    problems = gsm8k.read_problems(shared / "data", 4)
    prompts = [ALPACA_PROMPT.format(instruction=problem.question) for problem in problems]
    ids = tokenizer(prompts).input_ids
    ours = generate_all(model, tokenizer, ids, max_new_tokens=24, batch_size=3)
    rows = []
    for problem, prompt in zip(problems, prompts, strict=True):
        row = {"id": problem.id, "prompt": prompt, "reference": problem.reference, "output": ""}
        rows.append(row)
    task = harness.write_generate_task(tmp_path, "gsm8k", rows, (), 24)
    options = {"pretrained": str(path), "dtype": "float32"}
    judgements = harness.run_lm_eval(tmp_path, [task], options, 2)
    theirs = {judgement.id: judgement.response for judgement in judgements}
    assert theirs == {problem.id: ours[i] for i, problem in enumerate(problems)}
    assert all(ours)
