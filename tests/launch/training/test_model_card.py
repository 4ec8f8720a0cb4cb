"""What a run's model card lists, and its commands. Needs nothing. A second."""

from pathlib import Path

import pytest

from launch.config.loading import read_recipe
from launch.config.schema import Export
from launch.run.results import Base, RunResults, SmallExport
from launch.stages.export import remove_unwanted
from launch.training.model_card import (
    find_vllm_rank,
    list_exports,
    render_commands,
    render_model_card,
)
from tests.support import sweeps
from tests.support.hub import COMMIT

HUB_BASE = Base(name="owner/base", weights_sha256="w", revision=COMMIT, revision_verified=True)


@pytest.mark.parametrize(
    ("rank", "limit"),
    [(1, 1), (2, 8), (16, 16), (17, 32), (256, 256), (257, 320), (512, 512), (513, None)],
)
def test_the_rank_that_vllm_is_told_is_one_that_it_accepts(rank: int, limit: int | None) -> None:
    assert find_vllm_rank(rank) == limit


def make_results(
    lora_rank: int | None, small: SmallExport | None = None, base: Base = HUB_BASE
) -> RunResults:
    return RunResults.model_construct(
        lora_rank=lora_rank, small=small, base=base, dtype="bfloat16", task=None
    )


def test_a_local_base_is_named_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my models").mkdir()
    monkeypatch.chdir(tmp_path)
    base = Base(name="my models", weights_sha256="w")
    text = render_commands(["lora", "adapter"], make_results(24, base=base), has_files=False)
    assert (
        f"vllm serve '{tmp_path}/my models' --generation-config vllm --dtype bfloat16 --enable-lora "
        "--max-lora-rank 32 --lora-modules tuned=lora\n" in text
    )
    assert f"convert_lora_to_gguf.py --base '{tmp_path}/my models' --outfile lora.gguf lora" in text
    assert "hf upload USER/NAME lora .\nhf upload USER/NAME README.md\n" in text
    assert "put its id on the hub into `lora/adapter_config.json`" in text


def test_a_base_from_the_hub_is_named_with_its_commit() -> None:
    text = render_commands(["lora"], make_results(24), has_files=False)
    assert f"vllm serve owner/base --revision {COMMIT} --generation-config vllm " in text
    assert "convert_lora_to_gguf.py --outfile lora.gguf lora" in text
    assert "put its id" not in text


def test_a_server_of_conversations_is_told_the_template_and_where_answers_end() -> None:
    text = render_commands(["lora", "merged"], make_results(24), has_files=True)
    assert (
        "--generation-config lora --dtype bfloat16 --chat-template lora/chat_template.jinja" in text
    )
    assert "vllm serve ./merged --generation-config vllm --dtype bfloat16\n" in text


def test_what_vllm_cannot_serve_has_no_command() -> None:
    small = SmallExport(rank=100, error=0.1, worst_module="m", worst_error=0.2)
    text = render_commands(["lora", "lora_small"], make_results(1024, small), has_files=False)
    assert "tuned=lora\n" not in text
    assert "--max-lora-rank 128 --lora-modules tuned=lora_small" in text
    text = render_commands(["adapter", "merged"], make_results(None), has_files=False)  # dora
    assert "--enable-lora" not in text
    assert "vllm serve ./merged --generation-config vllm --dtype bfloat16\n" in text
    assert "convert_lora_to_gguf" not in text
    assert "hf upload USER/NAME adapter ." in text


def test_an_adapters_base_is_loaded_in_the_dtype_of_the_run(tmp_path: Path) -> None:
    """By default transformers takes that of the base's files. A whole model's config names its own."""
    values = sweeps.make_results(0.5, lora_rank=20, dtype="bfloat16")
    recipe = read_recipe("codefeedback", ["model.name=m"])
    for export, loaded in (("lora", '"m", dtype="bfloat16")'), ("model", '"model")')):
        folder = tmp_path / export
        (folder / export).mkdir(parents=True)
        card = render_model_card(folder, recipe, RunResults.model_validate(values))
        assert f"AutoModelForCausalLM.from_pretrained({loaded}\n" in card
    values["base"] |= {"revision": COMMIT, "revision_verified": True}
    card = render_model_card(tmp_path / "lora", recipe, RunResults.model_validate(values))
    assert card.startswith(
        "---\nbase_model: m\nlibrary_name: peft\npipeline_tag: text-generation\n---"
    )
    assert f'.from_pretrained("m", dtype="bfloat16", revision="{COMMIT}")\n' in card
    assert "ask it by that, as plain text, not as a chat" in card  # Alpaca's prompt
    values["base"] |= {"revision_verified": False}
    values["task"] = {"kind": "classification", "labels": ["no", "yes"], "pad_token": None}
    card = render_model_card(tmp_path / "lora", recipe, RunResults.model_validate(values))
    # The head was trained in fp32; PEFT would round it to the dtype of the base.
    loading = """.from_pretrained("m", dtype="float32", id2label={0: 'no', 1: 'yes'})"""
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
