"""Proves that the loss in chunks is PyTorch's cross-entropy, with its gradients.

Padded and packed, in any chunks, for any head. Needs nothing; takes 20 seconds.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaForCausalLM

from astra import adapter
from launch.data.batches import collate_sequences
from launch.data.order import Packing, pack_examples, plan_micro_batches
from launch.data.token_set import TokenSet
from launch.training.loss import AnswerLoss, compute_chunked_cross_entropy, in_bf16

PACKED, FLAT = Packing(capacity=40, flat=False), Packing(capacity=40, flat=True)
SOFT_CAPPED = {  # a Gemma 2 that changes its logits after the head
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "final_logit_softcapping": 2.0,
    "sliding_window": 4,
    "initializer_range": 0.5,
}


@given(
    st.integers(0, 9),
    st.integers(1, 7),
    st.integers(2, 11),
    st.integers(1, 60),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_loss_in_chunks_is_cross_entropy_with_its_gradients(
    n: int, width: int, vocabulary: int, chunk: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    targets = torch.randint(vocabulary, (n,))
    inputs = [
        torch.randn(n, width),
        torch.randn(vocabulary, width),
        torch.randn(vocabulary) if bias else None,
    ]
    results = []
    for loss in (
        lambda hidden, weight, bias: compute_chunked_cross_entropy(
            hidden, weight, bias, targets, chunk
        ),
        lambda hidden, weight, bias: F.cross_entropy(
            F.linear(hidden, weight, bias), targets, reduction="sum"
        ),
    ):
        leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
        value = loss(*leaves)
        (value * 0.7).backward()
        results.append([value.detach(), *(x.grad for x in leaves if x is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tokens() -> TokenSet:
    """Nine rows of 3 to 20 tokens."""
    torch.manual_seed(5)
    lengths = torch.tensor([3, 20, 7, 12, 5, 16, 4, 9, 11])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(1, 50, (int(offsets[-1]),), dtype=torch.int32)
    return TokenSet(ids, offsets, torch.tensor([1, 8, 2, 11, 3, 4, 2, 5, 6]), 0, 0)


def by_hand(model: nn.Module, tokens: TokenSet) -> Tensor:
    """Row by row, from whole logits."""
    losses = []
    for row, start in enumerate(tokens.prompt_lengths.tolist()):
        ids = tokens.tokens[tokens.offsets[row] : tokens.offsets[row + 1]].long()
        logits = model(input_ids=ids[None]).logits[0]
        losses.append(F.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum"))
    return torch.stack(losses).sum()


def in_batches(
    model: nn.Module, tokens: TokenSet, packing: Packing | None, ranks: int, micro_batch: int
) -> Tensor:
    """By the functions of the training loop, all ranks' batches one after another."""
    rows, objective = range(len(tokens)), AnswerLoss(model)
    shares = [
        plan_micro_batches(rows, tokens.lengths(), rank, ranks, micro_batch, packing)
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = [
        collate_sequences(tokens, sequences, packing) for share in shares for sequences in share
    ]
    return torch.stack(
        [objective(b.input_ids, b.loss_indices, b.targets, b.position_ids) for b in batches]
    ).sum()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("packing", [None, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_and_packed_rows_have_the_losses_and_gradients_of_single_ones(
    packing: Packing | None,
    tied: bool,
    attention: str,
    make_llama: Callable[..., LlamaForCausalLM],
    tokens: TokenSet,
) -> None:
    model = make_llama(tied=tied)
    model.set_attn_implementation(attention)
    whole = gradients(model, by_hand(model, tokens))  # all weights, the head's included
    for ranks, micro_batch in ((1, 1), (1, 4), (2, 3), (4, 2)):
        found = gradients(model, in_batches(model, tokens, packing, ranks, micro_batch))
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_adapters_learn_the_same_from_packed_rows(
    make_llama: Callable[..., LlamaForCausalLM], tokens: TokenSet
) -> None:
    targets = [
        "q_proj",
        "v_proj",
        "down_proj",
        "lm_head",
    ]  # with an adapter, the head is no plain product
    for chosen in (targets[:3], targets):
        model = adapter.attach_adapters(make_llama(tied=False), chosen, 3, 6, 0.0)
        for layer in adapter.get_lora_layers(model).values():
            nn.init.normal_(layer.lora_B[adapter.ADAPTER].weight, std=0.3)
        whole = gradients(model, by_hand(model, tokens))
        for packing in (None, PACKED):
            found = gradients(model, in_batches(model, tokens, packing, 2, 2))
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SOFT_CAPPED),
        GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=40, initializer_range=0.5
        ),
    ],
    ids=["soft-capped logits, sliding window", "no rotary positions"],
)
def test_models_with_more_after_or_less_before_the_head(config: object, tokens: TokenSet) -> None:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    whole = gradients(model, by_hand(model, tokens))
    for packing in (None, PACKED):
        found = gradients(model, in_batches(model, tokens, packing, 1, 3))
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)


def test_the_pass_that_finds_changed_logits_out_draws_no_dropout() -> None:
    """Else a resumed run, whose first step has that pass, would not equal the undisturbed one."""
    config = Gemma2Config(**SOFT_CAPPED, attention_dropout=0.5)
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    objective, ids = AnswerLoss(model), torch.randint(50, (3, 16))
    losses = []
    for in_chunks in (True, False):
        assert objective.in_chunks == in_chunks
        torch.manual_seed(3)
        losses.append(objective(ids, torch.arange(40), ids.flatten()[1:41]))
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_a_batch_without_answers_weighs_nothing_but_runs_every_module(
    make_llama: Callable[..., LlamaForCausalLM], tokens: TokenSet
) -> None:
    model = make_llama(tied=False)
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    batch = collate_sequences(tokens, [None, None], None)
    loss, *found = gradients(
        model, AnswerLoss(model)(batch.input_ids, batch.loss_indices, batch.targets)
    )
    assert loss == 0
    assert all((gradient == 0).all() for gradient in found)
    assert sorted(called) == sorted(
        name for name, _ in model.named_modules() if name != "model.layers"
    )


def test_no_full_logits_are_held(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.training.loss.CHUNK_CPU", 100)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 (PyTorch's)
            nonlocal largest
            out = function(*args, **kwargs or {})
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if (
                    isinstance(tensor, Tensor) and tensor.shape[-1:] == (50,) and len(tensor) != 16
                ):  # not the weight
                    largest = max(largest, tensor.numel())
            return out

    model = make_llama(tied=False).requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    ids = torch.randint(50, (3, 16))
    with Watch():
        AnswerLoss(model)(ids, torch.arange(40), ids.flatten()[1:41]).backward()
    assert 0 < largest <= 100


def compute_adapter_gradients(
    model: LlamaForCausalLM, dora: bool, reentrant: bool | None
) -> tuple[set[torch.dtype], list[Tensor]]:
    """Return the dtypes of the adapters' products in training, and the adapters' gradients.

    Args:
        reentrant: the form of gradient checkpointing; None for none.
    """
    adapted = adapter.attach_adapters(model, ["q_proj", "up_proj"], 2, 2, 0.0, dora=dora)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape)
    products: set[torch.dtype] = set()
    for name, module in adapted.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *call: products.add(call[2].dtype))
    if reentrant is not None:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(4))
    with in_bf16(adapted):
        AnswerLoss(adapted.train())(ids, torch.arange(40), ids.flatten()[1:41]).backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return products, [parameter.grad for parameter in trained]


def test_adapters_of_a_bf16_base_are_multiplied_in_bf16_and_their_gradients_are_fp32(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with either form of checkpointing, which repeats the forward pass."""
    products, whole = compute_adapter_gradients(make_llama(torch.bfloat16), False, None)
    assert products == {torch.bfloat16}
    assert {gradient.dtype for gradient in whole} == {torch.float32}
    for reentrant in (True, False):
        again = compute_adapter_gradients(make_llama(torch.bfloat16), False, reentrant)
        assert again[0] == {torch.bfloat16}
        torch.testing.assert_close(again[1], whole, rtol=0, atol=0)
    # The base's own rounding to bf16 moves the gradients about as much.
    _, exact = compute_adapter_gradients(make_llama(torch.bfloat16).float(), False, None)
    monkeypatch.setattr("launch.training.loss.has_bf16_products", lambda _: False)
    products, fp32_products = compute_adapter_gradients(make_llama(torch.bfloat16), False, None)
    assert products == {torch.float32}
    ours, fp32, theirs = (
        torch.cat([gradient.flatten() for gradient in gradients])
        for gradients in (whole, fp32_products, exact)
    )
    assert (ours - theirs).norm() < 2 * (fp32 - theirs).norm() < 0.2 * theirs.norm()


def test_dora_and_fp32_bases_are_multiplied_in_fp32(
    make_llama: Callable[..., LlamaForCausalLM],
) -> None:
    for model, dora in ((make_llama(torch.bfloat16), True), (make_llama(torch.float32), False)):
        products, found = compute_adapter_gradients(model, dora, None)
        # DoRA calls no module for its products.
        assert products <= {torch.float32}
        assert {gradient.dtype for gradient in found} == {torch.float32}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 60))
def test_packing_holds_every_row_once_within_the_capacity(
    lengths: list[int], capacity: int
) -> None:
    ordered = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    packed = pack_examples(ordered, dict(enumerate(lengths)), capacity)
    assert sorted(row for rows in packed for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= capacity for rows in packed)
    rooms = [capacity - sum(lengths[row] for row in rows) for rows in packed]
    assert rooms == sorted(rooms)  # the fullest sequences first
    # First fit: when a row came, no sequence begun before its own had room for it.
    place = {row: i for i, row in enumerate(ordered)}
    begun = sorted(packed, key=lambda rows: min(place[row] for row in rows))
    for i, rows in enumerate(begun):
        for row, earlier in itertools.product(rows, begun[:i]):
            taken = sum(lengths[other] for other in earlier if place[other] < place[row])
            assert taken + lengths[row] > capacity


def test_flat_batches_have_no_padding_and_say_where_examples_begin(tokens: TokenSet) -> None:
    padded, flat = (collate_sequences(tokens, [[1, 3], [5]], packing) for packing in (PACKED, FLAT))
    assert padded.input_ids.shape == (2, 32)
    assert flat.input_ids.shape == (1, 48)
    assert flat.position_ids[0].tolist() == [*range(20), *range(12), *range(16)]
    assert torch.equal(flat.targets, padded.targets)
    assert torch.equal(flat.input_ids[0][flat.loss_indices + 1], flat.targets)
    assert padded.position_ids[1].tolist() == [*range(16)] + [0] * 16
