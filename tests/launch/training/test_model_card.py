"""The commands of a run's model card. Needs nothing. A second."""

import pytest

from launch.run.results import RunResults, SmallExport
from launch.training.model_card import find_vllm_rank, render_commands


@pytest.mark.parametrize(
    ("rank", "limit"),
    [(1, 1), (2, 8), (16, 16), (17, 32), (256, 256), (257, 320), (512, 512), (513, None)],
)
def test_the_rank_that_vllm_is_told_is_one_that_it_accepts(rank: int, limit: int | None) -> None:
    assert find_vllm_rank(rank) == limit


def make_results(lora_rank: int | None, small: SmallExport | None = None) -> RunResults:
    return RunResults.model_construct(lora_rank=lora_rank, small=small)


def test_a_base_whose_path_has_a_space_is_quoted() -> None:
    text = render_commands(["lora", "adapter"], "/my models/base", make_results(24))
    assert (
        "vllm serve '/my models/base' --enable-lora --max-lora-rank 32 --lora-modules tuned=lora\n"
        in text
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
    assert "vllm serve ./merged" in text
    assert "convert_lora_to_gguf" not in text
    assert "hf upload USER/NAME adapter ." in text
