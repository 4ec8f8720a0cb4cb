"""FSDP2's model is that of the other engines, before it has values.

One process. Takes 3 s.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from eval.generation.decoding import find_end_tokens
from launch.engines import make_engine
from launch.models.check import check_model
from tests.support.architectures import configure_ernie, make_model
from tests.support.generation import make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_end_tokens_are_those_of_the_other_engines(
    make_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    model = make_llama()
    model.generation_config.eos_token_id = [2, 7]  # config.json has 2 alone
    model.save_pretrained(tmp_path)
    settings = tmp_path / "generation_config.json"
    # transformers does without a file that is broken or missing.
    for change, expected in (
        (lambda: None, [0, 2, 7]),
        (lambda: settings.write_text("{"), [0, 2]),
        (settings.unlink, [0, 2]),
    ):
        change()
        for name in ("single", "fsdp"):
            loaded = make_engine(name, CPU, torch.float32).load_model(check_model(tmp_path))
            assert find_end_tokens(loaded, make_tokenizer()) == expected, name


def test_the_dtypes_are_those_of_the_other_engines(tmp_path: Path) -> None:
    """Of some parameters (Ernie) and buffers (DeepSeek-V3) transformers keeps fp32."""
    ernie = AutoModelForCausalLM.from_config(configure_ernie())
    for model in (ernie, make_model("deepseek_v3")):
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder)
        single, fsdp = (
            make_engine(name, CPU, torch.bfloat16).load_model(check_model(folder)).state_dict()
            for name in ("single", "fsdp")
        )
        dtypes = {name: value.dtype for name, value in single.items()}
        assert {name: value.dtype for name, value in fsdp.items()} == dtypes
        assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
