"""Proves that the commands a run ends with are accepted by their parsers and name its own files.

Nothing is run here; tests/distributed/test_quickstart.py runs some of them. 2 s.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.config.loading import read_recipe
from launch.config.schema import Recipe
from launch.run.results import RunResults
from launch.stages.next_steps import (
    describe_next_steps,
    list_next_steps,
    make_page_command,
    make_repeat_command,
)
from tests.support.commands import find_faults
from tests.support.sweeps import make_results


def make_folder(path: Path, exports: Sequence[str]) -> Path:
    """Make a run folder that exported `exports`."""
    for name in exports:
        (path / name).mkdir(parents=True)
    return path


def make_recipe(*overrides: str) -> Recipe:
    """Return the quickstart's recipe with overrides."""
    return read_recipe("quickstart", list(overrides))


def make_run_results(**others: object) -> RunResults:
    """Return results of a run on the base `/models/my base`."""
    base = {"name": "/models/my base", "weights_sha256": "w"}
    return RunResults.model_validate(make_results(0.5, base=base, lora_rank=20) | others)


def list_commands(folder: Path, recipe: Recipe, **others: object) -> dict[str, list[str]]:
    """Return the words of the next steps. Each command of this repository must be accepted."""
    results = make_run_results(**({"engine": recipe.engine} | others))
    steps = list_next_steps(folder, recipe, results)
    for label, command in steps.items():
        assert label == "serve" or find_faults(command) == []
    return {label: shlex.split(command) for label, command in steps.items()}


def test_an_adapter_is_scored_as_its_run_was_and_served(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a run", ["lora", "adapter", "astra_init"])
    steps = list_commands(folder, make_recipe("eval.limit=7", "eval.data_dir=/my data"))
    assert list(steps) == ["score", "compare", "serve"]
    score = " ".join(steps["score"])
    assert f"--model /models/my base --adapter {folder / 'lora'} --engine zero3" in score
    assert "--suite gsm8k --data-dir /my data --limit 7 --max-new-tokens 24" in score
    assert "--dtype float32" in score  # what the run's auto became
    assert steps["score"][:3] == ["deepspeed", "--num_gpus", "2"]  # the run's ranks
    # 20 is no --max-lora-rank of vLLM; 32 is the next.
    served = (
        "vllm serve /models/my base --generation-config vllm --dtype bfloat16 --enable-lora "
        f"--max-lora-rank 32 --lora-modules tuned={folder}/lora"
    )
    assert " ".join(steps["serve"]) == served


def test_a_run_is_scored_again_as_it_was_whatever_auto_became(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", ["lora"])
    drawn = ["eval.samples=4", "eval.temperature=0.7", "eval.seed=3", "eval.allow_unsandboxed=true"]
    changed = ["engine=auto", "model.dtype=bfloat16", *drawn]
    steps = list_commands(folder, make_recipe(*changed), engine="zero3", dtype="bfloat16")
    score = " ".join(steps["score"])
    assert "--dtype bfloat16" in score
    assert score.startswith("deepspeed --num_gpus 2 launch/evaluate.py")
    assert "--engine zero3" in score
    assert "--samples 4 --temperature 0.7 --seed 3 --allow-unsandboxed --output" in score


@pytest.mark.parametrize(
    ("engine", "nodes", "words"),
    [
        ("zero3", 2, "deepspeed --num_gpus 8 launch/evaluate.py"),
        ("fsdp", 2, "torchrun --nproc_per_node 8 launch/evaluate.py"),
        ("fsdp", 16, "python launch/evaluate.py"),
        ("zero3_offload", None, "--engine zero3 --dtype"),
        ("zero2", None, "/lora --dtype"),  # every rank holds the base whole, as with single
    ],
)
def test_a_score_is_made_on_one_node_by_an_engine_that_evaluate_has(
    engine: str, nodes: int | None, words: str, tmp_path: Path
) -> None:
    conditions = {"git_revision": "r", "world_size": 16, "device": "cpu"}
    if nodes is not None:  # earlier versions did not record it
        conditions["nodes"] = nodes
    folder = make_folder(tmp_path / "run", ["lora"])
    recipe = make_recipe(f"engine={engine}")
    assert words in " ".join(list_commands(folder, recipe, conditions=conditions)["score"])


@pytest.mark.parametrize(
    ("exports", "adapter", "served"),
    [
        (["model"], None, "model"),
        (["adapter"], "adapter", None),  # dora, which vLLM does not serve
        (["adapter", "merged"], "adapter", "merged"),
    ],
)
def test_other_exports_have_commands_of_their_own(
    exports: list[str], adapter: str | None, served: str | None, tmp_path: Path
) -> None:
    recipe = make_recipe("export.merged=true") if "merged" in exports else make_recipe()
    folder = make_folder(tmp_path / "run", exports)
    steps = list_commands(folder, recipe, lora_rank=None)
    if adapter is None:
        assert str(folder / "model") in steps["score"] and "--adapter" not in steps["score"]
    else:
        assert steps["score"][steps["score"].index("--adapter") + 1] == str(folder / adapter)
    neutral = ["--generation-config", "vllm", "--dtype", "float32"]
    assert steps.get("serve") == (served and ["vllm", "serve", str(folder / served), *neutral])


def test_a_run_is_compared_with_its_base_where_that_was_scored(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", ["lora", "baseline"])
    page = list_commands(folder, make_recipe())["compare"]
    assert page == ["python", "launch/report.py", str(folder), "--html", str(folder / "page.html")]
    for part in (folder, folder / "baseline"):
        (part / "generations.jsonl").touch()
    compared = list_commands(folder, make_recipe())["compare"]
    assert compared[1:] == [
        "launch/evaluate.py",
        "--compare",
        str(folder / "baseline"),
        str(folder),
    ]


def test_a_run_whose_exports_are_gone_has_its_page(tmp_path: Path) -> None:
    assert list(list_commands(make_folder(tmp_path / "run", ["other"]), make_recipe())) == [
        "compare"
    ]


def test_a_revision_of_the_hub_is_kept(tmp_path: Path) -> None:
    base = {"name": "a/b", "weights_sha256": "w", "revision": "0123abc"}
    score = list_commands(make_folder(tmp_path / "run", ["lora"]), make_recipe(), base=base)[
        "score"
    ]
    assert score[score.index("--revision") + 1] == "0123abc"


@pytest.mark.parametrize(
    ("engine", "ranks", "launcher"),
    [("single", 1, "python"), ("zero2", 2, "deepspeed"), ("fsdp", 4, "torchrun")],
)
def test_a_run_is_repeated_by_its_launcher_in_a_new_folder(
    engine: str, ranks: int, launcher: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {name: m}\ndata: {path: d}\n")
    command = make_repeat_command(tmp_path, engine, ranks)
    assert find_faults(command) == []
    words = shlex.split(command)
    assert words[0] == launcher and (str(ranks) in words) == (ranks > 1)
    assert words[-1] == f"{tmp_path}-again"
    assert find_faults(make_page_command([tmp_path], tmp_path / "page.html")) == []


def test_the_lines_of_a_run_are_its_commands(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", ["lora"])
    lines = describe_next_steps(folder, make_recipe(), make_run_results()).splitlines()
    assert [line.split()[0] for line in lines] == ["next:", "score", "compare", "serve"]
    assert len({line.index(line.split()[1]) for line in lines[1:]}) == 1  # in one column
