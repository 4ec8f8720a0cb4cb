"""With `shard_within: node` each node holds the whole base, and trains what all ranks together would.

Proves it for FSDP2 (HSDP) and ZeRO-3 (hpZ) with four ranks on two nodes, that checkpoints resume in
another layout, and which layouts are refused. The nodes are made by the variables that launchers
set; test_network.py has two hosts in network namespaces. About 10 s; `make test-full` adds full
fine-tuning, bf16, scores, merged exports and resumes, another minute.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.cases import CHECKPOINTING, FULL_FINE_TUNING, NO_SCORES
from tests.support.paths import ROOT, WORKERS
from tests.support.processes import Run, make_set_options
from tests.support.runs import (
    copy_unfinished,
    read_generations,
    read_losses,
    read_metrics,
    read_results,
    read_steps,
    runs_are_equal,
)

BIN = Path(sys.executable).parent
Settings = Sequence[str]
WITHIN_NODES = "shard_within=node"


@pytest.fixture
def train_on_nodes(launch: Callable, recipe: Path, tmp_path: Path) -> Callable[..., dict]:
    """Train every case, name -> settings, in one launch of two nodes; return name -> run folder."""

    def train(cases: dict[str, Settings]) -> dict[str, Path]:
        folders = {name: tmp_path / name for name in cases}
        path = tmp_path / "cases.json"
        listed = [[list(settings), str(folders[name])] for name, settings in cases.items()]
        path.write_text(json.dumps(listed))
        launch(WORKERS / "train.py", recipe, path, 2, ranks=4)
        return folders

    return train


def require_close(run: Path, wanted: Path, weights: str) -> None:
    """Require the losses, gradient norms and exported weights of another run, up to fp32 rounding.

    HSDP adds up gradients within nodes first: another order of the same four numbers.
    """
    assert read_losses(run) == pytest.approx(read_losses(wanted), rel=1e-6)
    norms = [[step["grad_norm"] for step in read_metrics(each)] for each in (run, wanted)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    found, expected = load_file(run / weights), load_file(wanted / weights)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max()
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=2e-5)


def test_nodes_that_hold_the_base_train_what_all_ranks_do(train_on_nodes: Callable) -> None:
    short = [NO_SCORES, "train.max_steps=3"]
    runs = train_on_nodes(
        {
            f"{engine} {layout}": [f"engine={engine}", f"shard_within={layout}", *short]
            for engine in ("zero3", "fsdp")
            for layout in ("all", "node")
        }
    )
    losses = read_losses(runs["zero3 all"])
    assert losses[-1] < losses[0]
    # hpZ changes where a frozen weight is gathered from, and no sum.
    assert runs_are_equal(runs["zero3 node"], runs["zero3 all"])
    require_close(runs["fsdp node"], runs["fsdp all"], "lora/adapter_model.safetensors")
    assert read_results(runs["fsdp node"])["shard_within"] == "node"
    assert "shard_within" not in read_results(runs["fsdp all"])


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_on_nodes(train_on_nodes: Callable, dtype: str) -> None:
    shared = [*FULL_FINE_TUNING, f"model.dtype={dtype}", NO_SCORES]
    runs = train_on_nodes(
        {
            f"{engine} {layout}": [*shared, f"engine={engine}", f"shard_within={layout}"]
            for engine in ("zero3", "fsdp")
            for layout in ("all", "node")
        }
    )
    for engine in ("zero3", "fsdp"):
        weights = [
            (runs[f"{engine} {layout}"] / "model" / "model.safetensors").read_bytes()
            for layout in ("all", "node")
        ]
        if engine == "zero3":
            assert read_steps(runs["zero3 node"]) == read_steps(runs["zero3 all"])
            assert weights[0] == weights[1]
        elif dtype == "float32":
            require_close(runs["fsdp node"], runs["fsdp all"], "model/model.safetensors")
        else:  # exported in bf16, where a last bit is 2^-8
            losses = [read_losses(runs[f"fsdp {layout}"]) for layout in ("node", "all")]
            assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.full
def test_scores_ranks_and_merged_exports_on_nodes(train_on_nodes: Callable) -> None:
    """Ranks by a calibration load two models in one process, which hpZ's groups must survive."""
    shared = ["adapter.rank_allocation=effective_rank", "export.merged=true", CHECKPOINTING]
    runs = train_on_nodes(
        {
            f"{engine} {layout}": [*shared, f"engine={engine}", f"shard_within={layout}"]
            for engine in ("zero3", "fsdp")
            for layout in ("all", "node")
        }
    )
    for engine in ("zero3", "fsdp"):
        here, wanted = runs[f"{engine} node"], runs[f"{engine} all"]
        for weights in ("lora/adapter_model.safetensors", "merged/model.safetensors"):
            require_close(here, wanted, weights)
        assert read_generations(here) == read_generations(wanted)


@pytest.mark.full
def test_a_checkpoint_resumes_in_another_layout(train_on_nodes: Callable) -> None:
    layouts = {
        "zero3 all": ["engine=zero3"],
        "zero3 node": ["engine=zero3", WITHIN_NODES],
        "fsdp all": ["engine=fsdp"],
        "fsdp node": ["engine=fsdp", WITHIN_NODES],
    }
    shared = [NO_SCORES, "train.weight_decay=0.1"]
    runs = train_on_nodes({name: [*own, *shared] for name, own in layouts.items()})
    moves = [
        ("zero3 node", "zero3 node"),
        ("zero3 node", "fsdp node"),
        ("fsdp node", "fsdp all"),
        ("fsdp all", "fsdp node"),
        ("fsdp node", "zero3 node"),
    ]
    resumed = {}
    for earlier, later in moves:
        name = f"{earlier} then {later}"
        copy_unfinished(runs[earlier], runs[earlier].with_name(name), step=4)
        resumed[name] = [*layouts[later], *shared]
    for name, run in train_on_nodes(resumed).items():
        require_close(run, runs[name.split(" then ")[0]], "lora/adapter_model.safetensors")
    assert runs_are_equal(
        runs["zero3 node"].with_name("zero3 node then zero3 node"), runs["zero3 node"]
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ((2,), "shard_within: node is the same as all here, as there is one node"),
        ((2, 1), "error: shard_within: node needs equally many ranks on every node"),
    ],
)
def test_layouts_that_launchers_make(
    sizes: tuple[int, ...],
    line: str,
    start_run: Callable[..., Run],
    recipe: Path,
    tmp_path: Path,
) -> None:
    """tests/launch/engines/test_nodes.py has the other layouts."""
    settings = ["engine=fsdp", WITHIN_NODES, NO_SCORES, "train.max_steps=1"]
    options = ["--recipe", recipe, *make_set_options(settings), "--output", tmp_path / "run"]
    port = random.randrange(20000, 60000)
    runs = []
    for node, size in enumerate(sizes):
        place = ["--nnodes", len(sizes), "--node_rank", node, "--nproc_per_node", size]
        place += ["--master_addr", "127.0.0.1", "--master_port", port]
        words = [BIN / "torchrun", *place, ROOT / "launch" / "train.py", *options]
        runs.append(start_run([str(word) for word in words], tmp_path / f"log-{node}"))
    for run in runs:
        run.wait()
    assert line in runs[0].read_output()
    assert all((run.launcher.returncode == 0) == (len(sizes) == 1) for run in runs)
