"""Run lm-eval on our problems: write task files that need no network, and read what it says.

There are two kinds of task. `generate` has our prompt and stops, and lm-eval's graders of gsm8k and
math read the response. `likelihood` asks the commonsense questions as lm-eval does, which is
another metric. The files stay, for `lm_eval --include_path FOLDER`.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from eval.crosscheck import likelihood
from eval.tasks.base import Problem


class Judgement(NamedTuple):
    """What lm-eval says of one problem by one rule."""

    task: str
    rule: str  # filter or metric
    id: str
    passed: bool
    response: str  # empty for a likelihood


# The gsm8k task of lm-eval 0.4.13 (version 3.0), except for its prompt.
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
GRADED = ("gsm8k", *_MATH)  # benchmarks that lm-eval has graders of responses for


def _make_mean(metric: str) -> dict:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def write_generate_task(
    folder: Path,
    benchmark: str,
    documents: Sequence[dict],
    stops: Sequence[str] = (),
    max_new_tokens: int = 1,
) -> str:
    """Write the task of generated responses to `folder`, and return its name.

    Args:
        documents: {id, prompt, reference, output}, all of them text.
    """
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
    if benchmark == "gsm8k":
        config |= _GSM8K
    elif benchmark in _MATH:
        config["metric_list"] = [_make_mean("exact_match"), _make_mean("math_verify")]
    else:
        config["metric_list"] = [{"metric": "bypass"}]
    name = f"astra_{benchmark}_generate"
    return _write_task(folder, name, config, documents, minerva=benchmark in _MATH)


def write_likelihood_task(folder: Path, benchmark: str, problems: Sequence[Problem]) -> str:
    """Write the task of a commonsense benchmark's choices to `folder`, and return its name.

    Raises:
        EvalError: a question does not list its choices.
    """
    documents = []
    for problem in problems:
        documents.append({"id": problem.id, **likelihood.make_document(benchmark, problem)})
    # Of WinoGrande, lm-eval takes the choices as beginnings and scores the rest of the sentence.
    blank = benchmark == "winogrande"
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": "gold" if blank else "query",
        "doc_to_target": "suffix" if blank else "gold",
        "doc_to_choice": "choices",
        "metric_list": [_make_mean(metric) for metric in likelihood.VIEWS[benchmark].metrics],
    }
    return _write_task(folder, f"astra_{benchmark}_likelihood", config, documents)


def _write_task(
    folder: Path, task: str, config: dict, documents: Sequence[dict], minerva: bool = False
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    # lm-eval reads a relative path from where it runs.
    data = (folder / f"{task}.jsonl").resolve()
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    text = yaml.safe_dump({"task": task, **source, "num_fewshot": 0, **config}, sort_keys=False)
    if minerva:
        shutil.copy(Path(__file__).with_name("minerva.py"), folder)
        text += "process_results: !function minerva.process_results\n"
    (folder / f"{task}.yaml").write_text(text)
    return task


def run_lm_eval(
    folder: Path, tasks: Sequence[str], model: dict | None, batch_size: int
) -> list[Judgement]:
    """Run lm-eval on tasks that were written to `folder`, and return what it says of each document.

    Args:
        model: {pretrained (folder), dtype, peft (folder of an adapter, if there is one)}; None to
            grade the documents' own outputs without a model.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if model is None:
        loaded = _make_stored_model()
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = HFLM(**model, batch_size=batch_size, device=device)
    results = simple_evaluate(
        model=loaded,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,  # no intervals: only the verdicts are read
        log_samples=True,
    )
    return read_samples(results["samples"])


def _make_stored_model() -> Any:
    """Return an lm_eval LM whose response to a document is the output that the document holds."""
    from lm_eval.api.model import LM

    class StoredModel(LM):
        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return [request.doc["output"] for request in requests]

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
            raise NotImplementedError("stored responses have no likelihood")

        loglikelihood_rolling = loglikelihood

    return StoredModel()


def read_samples(samples: dict[str, list[dict]]) -> list[Judgement]:
    """Return lm-eval's logged samples as one list.

    Args:
        samples: by task.

    Returns:
        For each sample, one judgement by its filter, or one for each metric if it has no filter.
    """
    judgements = []
    for task, rows in samples.items():
        for row in rows:
            response = "" if task.endswith("_likelihood") else row["resps"][0][0]
            for metric in row["metrics"]:
                rule = metric if row["filter"] == "none" else row["filter"]
                # "bypass" has no verdict; its samples are read for their responses.
                passed = False if metric == "bypass" else bool(row[metric])
                judgements.append(Judgement(task, rule, row["doc"]["id"], passed, response))
    return judgements
