"""What a run's model card lists, and its commands. Needs nothing. A second."""

from pathlib import Path

import pytest

from launch.config.loading import read_recipe
from launch.config.schema import Export
from launch.run.results import RunResults, SmallExport
from launch.stages.export import remove_unwanted
from launch.training.model_card import (
    find_vllm_rank,
    list_exports,
    render_commands,
    render_model_card,
)
from tests.support import sweeps


@pytest.mark.parametrize(
    ("rank", "limit"),
    [(1, 1), (2, 8), (16, 16), (17, 32), (256, 256), (257, 320), (512, 512), (513, None)],
)
def test_the_rank_that_vllm_is_told_is_one_that_it_accepts(rank: int, limit: int | None) -> None:
    assert find_vllm_rank(rank) == limit


def make_results(lora_rank: int | None, small: SmallExport | None = None) -> RunResults:
    return RunResults.model_construct(lora_rank=lora_rank, small=small, dtype="bfloat16", task=None)


def test_a_base_whose_path_has_a_space_is_quoted() -> None:
    text = render_commands(["lora", "adapter"], "/my models/base", make_results(24))
    assert (
        "vllm serve '/my models/base' --generation-config vllm --dtype bfloat16 --enable-lora "
        "--max-lora-rank 32 --lora-modules tuned=lora\n" in text
    )
    assert "convert_lora_to_gguf.py --base '/my models/base' --outfile lora.gguf lora" in text
    assert "hf upload USER/NAME lora ." in text


def test_what_vllm_cannot_serve_has_no_command() -> None:
    small = SmallExport(rank=100, error=0.1, worst_module="m", worst_error=0.2)
    text = render_commands(["lora", "lora_small"], "base", make_results(1024, small))
    assert "tuned=lora\n" not in text
    assert "--max-lora-rank 128 --lora-modules tuned=lora_small" in text
    text = render_commands(["adapter", "merged"], "base", make_results(None))  # dora
    assert "--enable-lora" not in text
    assert "vllm serve ./merged --generation-config vllm --dtype bfloat16\n" in text
    assert "convert_lora_to_gguf" not in text
    assert "hf upload USER/NAME adapter ." in text


def test_an_adapters_base_is_loaded_in_the_dtype_of_the_run(tmp_path: Path) -> None:
    """By default transformers takes that of the base's files. A whole model's config names its own."""
    values = sweeps.make_results(0.5, lora_rank=20, dtype="bfloat16")
    recipe = read_recipe("codefeedback", ["model.name=base"])
    for export, loaded in (("lora", '"base", dtype="bfloat16")'), ("model", '"model")')):
        folder = tmp_path / export
        (folder / export).mkdir(parents=True)
        card = render_model_card(folder, recipe, RunResults.model_validate(values))
        assert f"AutoModelForCausalLM.from_pretrained({loaded}\n" in card
    values["task"] = {"kind": "classification", "labels": ["no", "yes"], "pad_token": None}
    card = render_model_card(tmp_path / "lora", recipe, RunResults.model_validate(values))
    # The head was trained in fp32; PEFT would round it to the dtype of the base.
    loading = """.from_pretrained("base", dtype="float32", id2label={0: 'no', 1: 'yes'})"""
    assert loading in card


def test_what_the_recipe_no_longer_asks_for_is_removed_and_not_listed(tmp_path: Path) -> None:
    for name in ("adapter", "lora", "lora_small", "merged", "merged.tmp", "mine"):
        (tmp_path / name).mkdir()
    assert list_exports(tmp_path, Export()) == ["lora", "adapter"]
    wanted = Export(rank=4, merged=True)
    remove_unwanted(tmp_path, wanted)
    assert list_exports(tmp_path, wanted) == ["lora", "lora_small", "adapter", "merged"]
    remove_unwanted(tmp_path, Export())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "lora", "mine"}
