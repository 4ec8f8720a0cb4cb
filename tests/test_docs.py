"""Check the commands and links of every Markdown page, and the examples that --help shows.

No command is run: each line is parsed by its own command, and recipes, tables and --set are
validated (tests/support/commands.py). Some 10 s.
"""

from pathlib import Path

import pytest
import torch

from launch.config.loading import read_recipe
from tests.support.commands import find_all_faults, find_faults, load_script
from tests.support.markdown import (
    find_anchors,
    find_blocks,
    find_broken_links,
    find_code_lines,
    find_pages,
)
from tests.support.paths import ROOT

PAGES = [str(page.relative_to(ROOT)) for page in find_pages(ROOT)]
COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "launch").glob("*.py")
    if "EXAMPLES = " in path.read_text()
)


def describe(faults: list[str]) -> str:
    """Return a failure message with a fault a line."""
    return "\n" + "\n".join(faults)


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_are_accepted(name: str) -> None:
    faults = find_all_faults(find_code_lines(ROOT / name))
    assert not faults, describe(faults)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_resolve(name: str) -> None:
    faults = find_broken_links(ROOT / name)
    assert not faults, describe(faults)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_a_command_are_accepted(command: str) -> None:
    examples = load_script(command)["EXAMPLES"].replace("\\\n", " ").splitlines()
    faults = find_all_faults(examples)
    assert not faults, describe(faults)


def test_the_example_of_a_method_works() -> None:
    block = find_blocks(ROOT / "docs" / "add-a-method.md", "python")[0]
    example: dict = {}
    exec(compile(block, "docs/add-a-method.md", "exec"), example)
    settings = read_recipe("metamath", []).method_settings()
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    a0, b0 = example["METHOD"].make_factors("layer", weight, 3, settings, None)
    torch.testing.assert_close(b0.T @ b0, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(a0, b0.T @ weight.double())


@pytest.mark.parametrize(
    "line",
    [
        "deepspeed --num_gpus 2 launch/train.py --recipe quickstart --set train.lr=1e-4",
        "HF_HUB_OFFLINE=1 .venv/bin/python launch/plan.py --recipe metamath --gpus 8",
        "torchrun --nproc_per_node 8 launch/train.py --recipe metamath --engine fsdp  # a comment",
        "python launch/train.py --recipe runs/mine/recipe.yaml --set train.lr=1e-4",
        "sbatch launch/cluster/slurm.sbatch --set train.lr=1e-4",
        "python launch/sweep.py --table maths --slurm maths.sbatch; sbatch maths.sbatch",
        'make miniature TABLE=miniature_ranks OPTIONS="--set train.max_steps=3"',
        "pip install -r requirements.txt && make test",
        "| run | it's a table | launch |",
    ],
)
def test_the_check_accepts(line: str) -> None:
    assert find_faults(line) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("python launch/trian.py --recipe metamath", "no such file"),
        ("python launch/train.py --recipe metamath --ouptut runs/x", "--ouptut"),
        ("deepspeed launch/train.py --recipe metamth", "metamth"),
        ("deepspeed launch/train.py --recipe metamath --set adapter.rnk=3", "adapter.rnk"),
        ("deepspeed launch/train.py --recipe metamath --set train.lr=fast", "train.lr"),
        ("deepspeed launch/train.py --recipe metamath --engine zero9", "engine"),
        ("ls; X=1 torchrun --nproc_per_node 2 launch/evaluate.py --sweet gsm8k", "--sweet"),
        ("python launch/sweep.py --table math", "math"),
        ("python launch/report.py --table maths --set data.pth=x", "data.pth"),
        ("sbatch launch/cluster/slurm.sbatch --set train.lr=fast", "train.lr"),
        ("bash recipes/metamath.sh --set train.lr=fast", "train.lr"),
        ("python bench/faults.py --kill 3", "--kill"),
        ("make tests", "no such target"),
        ("make miniature TABLE=miniatures", "miniatures"),
        ("python launch/train.py --recipe 'metamath", "cannot be parsed"),
    ],
)
def test_the_check_finds(line: str, fault: str) -> None:
    (found,) = find_faults(line)
    assert fault in found


def test_variables_of_a_page_are_expanded() -> None:
    lines = [
        'OPTIONS="--recipe metamath --set train.lr=1e-4"  # of every run',
        "python launch/train.py $OPTIONS --output runs/a",
        "python launch/train.py ${OPTIONS} --ouptut runs/b",
    ]
    (fault,) = find_all_faults(lines)
    assert "--ouptut" in fault


def test_the_check_finds_commands_and_broken_links_of_a_page(tmp_path: Path) -> None:
    other, page = tmp_path / "other.md", tmp_path / "page.md"
    other.write_text("# One `two` three?\n\n## Same\n\n## Same\n")
    page.write_text(
        "[a](other.md) [b](other.md#one-two-three) [c](other.md#same-1) [d](#e-f) ## no\n"
        "# E, f\n![x](no.png) [g](other.md#four) `[h](no.md)` [i](https://example.org/no)\n"
        "<!-- unchecked: an example -->\n```\nmake no\n```\n"
        "```sh\n# not a heading\nmake test \\\n  lint\n[j](no.md)\n```\n"
    )
    assert find_anchors(other) == {"one-two-three", "same", "same-1"}
    assert find_code_lines(page) == ["# not a heading", "make test    lint", "[j](no.md)"]
    assert [fault.split(":")[0] for fault in find_broken_links(page)] == ["no.png", "other.md#four"]
