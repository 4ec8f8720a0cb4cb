"""Read what a run left in its folder, and compare two runs."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file


def read_metrics(run: Path) -> list[dict]:
    """Return the records of metrics.jsonl, one a step; a half-written last line is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_losses(run: Path) -> list[float]:
    """Return the loss of every step."""
    return [record["loss"] for record in read_metrics(run)]


def read_steps(run: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of every step."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(run)]


def read_results(run: Path) -> dict:
    """Return results.json."""
    return json.loads((run / "results.json").read_text())


def read_facts(run: Path) -> dict:
    """Return the facts that the newest checkpoint keeps."""
    newest = max((run / "checkpoints").glob("step-*/manifest.json"))
    return json.loads(newest.read_text())["facts"]


def read_state(run: Path) -> str:
    """Return the state that state.json names, such as `finished` or `preempted`."""
    return json.loads((run / "state.json").read_text())["state"]


def read_generations(run: Path) -> list[dict]:
    """Return the rows of generations.jsonl."""
    lines = (run / "generations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_calibration(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all windows of a calibration."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("window-*.safetensors")):
        tensors |= load_file(path)
    return tensors


def find_newest_step(run: Path) -> int:
    """Return the step of the newest whole checkpoint, which is one with a manifest."""
    manifests = (run / "checkpoints").glob("step-*/manifest.json")
    return max(int(path.parent.name.removeprefix("step-")) for path in manifests)


def runs_are_equal(first: Path, second: Path) -> bool:
    """Return whether two finished runs have the same steps and lora/ weights, bit for bit."""
    weights = [(run / "lora" / "adapter_model.safetensors").read_bytes() for run in (first, second)]
    return read_steps(first) == read_steps(second) and weights[0] == weights[1]


def copy_unfinished(run: Path, copy: Path, step: int) -> None:
    """Copy a finished run as it was after the checkpoint of `step`."""
    shutil.copytree(run, copy)
    (copy / "results.json").unlink()
    for folder in (copy / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
