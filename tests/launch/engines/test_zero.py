"""DeepSpeed's hooks are in place before anything asks for gradients of the embedding's output.

Simulated: DeepSpeed's engine. No processes. 10 s, which is DeepSpeed's import.
"""

from collections.abc import Callable
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from launch.engines.zero import ZeroEngine


def test_checkpointing_asks_for_gradients_after_deepspeeds_hooks(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_llama().requires_grad_(False)
    base.gradient_checkpointing_enable({"use_reentrant": True})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])

    def has_gradient() -> bool:
        return base.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long)).requires_grad

    def initialize(**_: object) -> tuple:
        assert not has_gradient()  # DeepSpeed would gather the embedding in every backward pass
        return None, optimizer

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    engine = SimpleNamespace(base=base, config={}, device=torch.device("cpu"), sharded=True)
    ZeroEngine.make_trainable(engine, base, optimizer, 1.0)
    assert has_gradient()
