"""Fixtures of all tests: the shared real data and model, a cache of its own, and tiny Llamas."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests mean CPUs, whatever the machine has

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.paths import ROOT

torch.set_num_threads(1)  # two test processes share two cores; more threads would wait


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real data and a small pretrained model.

    That is $ASTRA_SHARED, or shared/ beside the checkout; without it the test is skipped. A folder
    that ASTRA_SHARED names must be there.
    """
    named = os.environ.get("ASTRA_SHARED")
    folder = Path(named or ROOT.parent / "shared")
    if (folder / "models" / "stories260K").is_dir():
        return folder
    if named:
        pytest.fail(f"ASTRA_SHARED: {folder} has no models/stories260K; mend or unset it")
    pytest.skip("the shared real data and model are not here; set ASTRA_SHARED to their folder")


@pytest.fixture(scope="session")
def benchmark_data(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the shared benchmarks, where 1,000 problems of MATH stand for all."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for path in (shared / "data").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "math_test.jsonl").symlink_to(shared / "data" / "math_test_1000.jsonl")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tokens that tests prepare out of the user's cache."""
    os.environ["ASTRA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Return a factory of tiny seeded Llamas with grouped-query attention.

    Biases are drawn rather than zero; the head is tied or not.
    """

    def make(
        dtype: torch.dtype = torch.float32, bias: bool = True, tied: bool = True
    ) -> LlamaForCausalLM:
        torch.manual_seed(11)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=bias,
            mlp_bias=bias,
            tie_word_embeddings=tied,
            initializer_range=0.3,
        )
        model = LlamaForCausalLM(config).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return model

    return make
