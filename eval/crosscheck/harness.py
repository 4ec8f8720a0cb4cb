"""lm-eval on our problems: task files that it reads without a network, and what it says of each problem.

Two kinds of task. `generate`: our prompt and stops; its graders, of gsm8k and math, on the response. `likelihood`: the
commonsense questions as it asks them, another metric. The files stay, for `lm_eval --include_path FOLDER`.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from eval.crosscheck import likelihood
from eval.tasks.base import Problem


class Judged(NamedTuple):
    """What lm-eval says of one problem by one rule."""

    task: str
    rule: str  # filter or metric
    id: str
    passed: bool
    response: str  # empty of a likelihood


# lm-eval 0.4.13's own gsm8k task (version 3.0), but for its prompt, which is ours.
_GSM8K = {
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "ignore_punctuation": False,
            "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
        }
    ],
    "filter_list": [
        {
            "name": "strict-match",
            "filter": [
                {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                {"function": "take_first"},
            ],
        },
        {
            "name": "flexible-extract",
            "filter": [
                {
                    "function": "regex",
                    "group_select": -1,
                    "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
                },
                {"function": "take_first"},
            ],
        },
    ],
}
_MATH = ("math", "math500")
GRADED = ("gsm8k", *_MATH)  # the suites of whose responses it has graders


def _mean(metric: str) -> dict:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def write_generate(
    folder: Path,
    suite: str,
    documents: Sequence[dict],
    stops: Sequence[str] = (),
    max_new_tokens: int = 1,
) -> str:
    """Write the task of generated responses, and give its name.

    Args:
        documents: {id, prompt, reference, output}; all of them text.
    """
    math = {"metric_list": [_mean("exact_match"), _mean("math_verify")]}
    graded = {"gsm8k": _GSM8K, "math": math, "math500": math}
    config = {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "reference",
        "generation_kwargs": {
            "until": list(stops),
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": max_new_tokens,
        },
    }
    config |= graded.get(suite, {"metric_list": [{"metric": "bypass"}]})
    return _write(folder, f"astra_{suite}_generate", config, documents, minerva=suite in _MATH)


def write_likelihood(folder: Path, suite: str, problems: Sequence[Problem]) -> str:
    """Write the task of a commonsense suite's choices, and give its name. Raises EvalError, see likelihood.document."""
    documents = [{"id": problem.id, **likelihood.document(suite, problem)} for problem in problems]
    blank = suite == "winogrande"
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": "gold"
        if blank
        else "query",  # a number: the choices are beginnings, the target is the rest
        "doc_to_target": "suffix" if blank else "gold",
        "doc_to_choice": "choices",
        "metric_list": [_mean(metric) for metric in likelihood.VIEWS[suite].metrics],
    }
    return _write(folder, f"astra_{suite}_likelihood", config, documents)


def _write(
    folder: Path, task: str, config: dict, documents: Sequence[dict], minerva: bool = False
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / f"{task}.jsonl").resolve()
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    where = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    text = yaml.safe_dump({"task": task, **where, "num_fewshot": 0, **config}, sort_keys=False)
    if minerva:
        shutil.copy(Path(__file__).with_name("minerva.py"), folder)
        text += "process_results: !function minerva.process_results\n"
    (folder / f"{task}.yaml").write_text(text)
    return task


def run(folder: Path, tasks: Sequence[str], model: dict | None, batch_size: int) -> list[Judged]:
    """What lm-eval says of every document of tasks that were written to `folder`.

    Args:
        model: {pretrained (folder), dtype, and peft (folder of an adapter) where there is one}; None to grade the
            documents' own outputs with no model.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = simple_evaluate(
        model=_stored() if model is None else HFLM(**model, batch_size=batch_size, device=device),
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return judged(results["samples"])


def _stored():  # noqa: ANN202 (a class of lm-eval, which may not be installed)
    from lm_eval.api.model import LM

    class Stored(LM):
        """A model whose response to a document is the output that the document holds."""

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return [request.doc["output"] for request in requests]

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
            raise NotImplementedError("stored responses have no likelihood")

        loglikelihood_rolling = loglikelihood

    return Stored()


def judged(samples: dict[str, list[dict]]) -> list[Judged]:
    """lm-eval's logged samples, by task, as one list: a row for each filter, or for each metric where it has one."""
    found = []
    for task, rows in samples.items():
        for row in rows:
            response = "" if task.endswith("_likelihood") else row["resps"][0][0]
            for metric in row["metrics"]:
                rule = metric if row["filter"] == "none" else row["filter"]
                passed = False if metric == "bypass" else bool(row[metric])
                found.append(Judged(task, rule, row["doc"]["id"], passed, response))
    return found
