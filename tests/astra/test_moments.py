"""astra.moments, astra.output_moment: moments equal an oracle that holds every activation.

Masks, batch sizes and padding change nothing. Tiny random models on the CPU. A few seconds.
"""

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, LlamaConfig, LlamaForCausalLM

from astra.calibrate import sum_second_moments
from astra.errors import AstraError
from astra.moments import (
    BLOCK_WIDTH,
    Batch,
    Group,
    Moment,
    Statistic,
    accumulate_moments,
    find_groups,
    run_forward,
)
from astra.output_moment import Basis, form_output_moment
from astra.windows import count_moment_bytes, make_plan
from tests.support.calibration import find_projections


def make_model(bias: bool, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def make_gemma4() -> Gemma4ForCausalLM:
    """Make a Gemma 4 whose last two layers take the keys and values of the first two."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        global_head_dim=4,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=50,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return Gemma4ForCausalLM(config).double().eval()


def make_rows(count: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (3 + 2 * (i % 4),), generator=generator) for i in range(count)]


def batches_of(rows: list[Tensor], size: int, extra_padding: int = 0) -> list[Batch]:
    made = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        length = max(map(len, chunk)) + extra_padding
        ids = torch.full((len(chunk), length), 7)
        token_mask = torch.zeros(len(chunk), length, dtype=torch.bool)
        for i, row in enumerate(chunk):
            ids[i, : len(row)] = row
            token_mask[i, : len(row)] = True
        made.append(Batch(input_ids=ids, token_mask=token_mask))
    return made


def measure(
    model: nn.Module,
    batches: list[Batch],
    statistic: Statistic = "output",
    linears: dict[str, nn.Linear] | None = None,
) -> list[tuple[Group, Moment]]:
    linears = linears or find_projections(model)
    groups = find_groups(model, linears, batches[0], statistic)
    plan = make_plan(model, linears, groups, tokens=100)
    moments = sum_second_moments(
        model, linears, batches, plan.windows[0], plan, [None] * len(batches)
    )
    return list(zip(groups, moments, strict=True))


def whole(basis: Basis | None, core: Tensor) -> Tensor:
    return core if basis is None else basis.multiply(basis.multiply(core).T)


def output_moments(model: nn.Module, statistics: list[tuple[Group, Moment]]) -> dict[str, Tensor]:
    found = {}
    for group, moment in statistics:
        for name in group.modules:
            linear = model.get_submodule(name)
            bias = None if linear.bias is None else linear.bias.detach()
            found[name] = whole(
                *form_output_moment(group.statistic, moment, linear.weight.detach(), bias)
            )
    return found


def oracle(
    model: nn.Module, rows: list[Tensor], linears: dict[str, nn.Linear] | None = None
) -> dict[str, Tensor]:
    """Return 1/n sum y y^T by name, y = W x + b in fp64, one row of tokens at a time."""
    kept: dict[str, list[Tensor]] = {}
    handles = []
    for name, linear in (linears or find_projections(model)).items():

        def hook(module: nn.Linear, args: tuple, output: Tensor, name: str = name) -> None:
            y = args[0][0].double() @ module.weight.double().T
            kept.setdefault(name, []).append(y if module.bias is None else y + module.bias.double())

        handles.append(linear.register_forward_hook(hook))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    outputs = {name: torch.cat(parts) for name, parts in kept.items()}
    return {name: y.T @ y / len(y) for name, y in outputs.items()}


# An fp64 forward differs between batch sizes by rounding of 1e-16 a term; an fp32 one by 1e-8
# (measured), bound 1e-6.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "extra"), [(1, 0), (4, 0), (9, 5)])
def test_moments_equal_the_oracle_for_any_batch_size_and_padding(
    dtype: torch.dtype, tolerance: float, bias: bool, size: int, extra: int
) -> None:
    model, rows = make_model(bias, dtype), make_rows()
    found = output_moments(model, measure(model, batches_of(rows, size, extra)))
    wanted = oracle(model, rows)
    assert found.keys() == wanted.keys()
    for name, second in wanted.items():
        assert (found[name] - second).norm() <= tolerance * second.norm(), name


@pytest.mark.parametrize("kind", ["layers that share keys", "the head"])
def test_what_a_model_may_run_on_its_last_token_alone_counts_every_token(kind: str) -> None:
    rows = make_rows()
    if kind == "the head":
        model = make_model(False, torch.float64)
        names = ("model.layers.1.self_attn.q_proj", "lm_head")
        linears = {name: model.get_submodule(name) for name in names}
    else:
        model = make_gemma4()
        linears = find_projections(model)
    found = output_moments(model, measure(model, batches_of(rows, 4), linears=linears))
    wanted = oracle(model, rows, linears)
    assert found.keys() == wanted.keys()
    for name, second in wanted.items():
        assert (found[name] - second).norm() <= 1e-12 * second.norm(), name


def test_modules_that_read_one_tensor_share_one_statistic_and_the_smaller_one_is_kept() -> None:
    model = make_model(False, torch.float32)
    statistics = measure(model, batches_of(make_rows(), 3))
    kinds = [
        (g.statistic, [name.rsplit(".", 1)[-1] for name in g.modules], g.size)
        for g, _ in statistics
    ]
    layer = [
        ("input", ["q_proj", "k_proj", "v_proj"], 16),
        ("input", ["o_proj"], 16),
        ("input", ["gate_proj", "up_proj"], 16),
        ("output", ["down_proj"], 16),
    ]
    assert kinds == layer * 2


def test_rows_that_do_not_count_add_nothing_and_hooks_are_gone() -> None:
    model, rows = make_model(True, torch.float64), make_rows()
    dummy = batches_of(rows[:2], 2)[0]
    dummy["token_mask"] = torch.zeros_like(dummy["token_mask"])
    with_dummy = measure(model, [*batches_of(rows, 3), dummy])
    for (_, a), (_, b) in zip(with_dummy, measure(model, batches_of(rows, 3)), strict=True):
        assert torch.equal(a.outer_sum(), b.outer_sum())
        assert a.count == b.count == sum(map(len, rows))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_module_that_runs_twice_or_never_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor, **_: object) -> Tensor:
            return self.twice(self.twice(torch.nn.functional.one_hot(input_ids, 4).float()))

    model, batch = Odd(), batches_of([torch.tensor([1, 2])], 1)[0]
    batch["input_ids"] %= 4
    with pytest.raises(AstraError, match="twice runs more than once"):
        find_groups(model, {"twice": model.twice}, batch)
    with pytest.raises(AstraError, match="never does not run"):
        find_groups(model, {"never": model.never}, batch)


def test_a_tall_weight_gives_a_small_problem_with_orthonormal_basis() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(9, 5, generator=generator), torch.randn(9, generator=generator)
    moment = Moment.zeros(5, torch.device("cpu"))
    moment.add(x)
    basis, core = form_output_moment("input", moment, weight, bias)
    assert (basis.reflectors.shape, basis.codimension, core.shape) == ((9, 6), 3, (6, 6))
    q = basis.multiply(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(q.T @ q, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(basis.multiply_transposed(q), torch.eye(6, dtype=torch.float64))
    beyond = basis.span_in_complement(torch.randn(9, 3, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(beyond @ beyond.T, torch.eye(9, dtype=torch.float64) - q @ q.T)
    y = x @ weight.double().T + bias.double()
    torch.testing.assert_close(whole(basis, core), y.T @ y / 30, rtol=1e-12, atol=1e-12)


def test_the_moment_is_of_the_exact_output_and_not_of_the_models_rounded_one() -> None:
    """In bf16 the rounded output is off by 1e-3; the moment is of W x + b in fp64."""
    model, rows = make_model(True, torch.bfloat16), make_rows()
    found, wanted = output_moments(model, measure(model, batches_of(rows, 1))), oracle(model, rows)
    for (
        name,
        second,
    ) in wanted.items():  # the same bf16 forward, row by row: only fp64 rounding is left
        assert (found[name] - second).norm() <= 1e-12 * second.norm(), name


def test_any_tokens_may_be_left_out_and_only_those_are() -> None:
    """`token_mask` works token by token; a token that is not counted still feeds the later ones."""
    model, rows = make_model(True, torch.float64), make_rows()
    batches = batches_of(rows, 1)
    generator = torch.Generator().manual_seed(3)
    for batch in batches:
        batch["token_mask"] = torch.rand(batch["token_mask"].shape, generator=generator) < 0.6
    statistics = measure(model, batches)
    kept: dict[str, list[Tensor]] = {name: [] for name in find_projections(model)}
    token_mask = torch.empty(0)
    for name, linear in find_projections(model).items():

        def hook(module: nn.Linear, args: tuple, name: str = name) -> None:
            kept[name].append((args[0] @ module.weight.T + module.bias)[token_mask])

        linear.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            token_mask = batch["token_mask"]
            model(input_ids=batch["input_ids"])
    for name, second in output_moments(model, statistics).items():
        y = torch.cat(kept[name])
        assert 0 < len(y) < sum(map(len, rows))
        torch.testing.assert_close(second, y.T @ y / len(y), rtol=1e-12, atol=1e-12, msg=name)
    assert {int(moment.count) for _, moment in statistics} == {
        len(torch.cat(kept[name])) for name in kept
    }


def test_the_reference_moment_by_hand() -> None:
    """Of the authors' code: padding counts, and a sample is divided by |max(y)|, not by max |y|."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # What the linear layer makes of token 0, the padding, is (-1, -1); of the others (3,
            # -4), (1, 2), (-2, -4).
            self.table = nn.Embedding.from_pretrained(
                torch.tensor([[0.0, -2], [-3, 2], [3, 0], [-3, -3]])
            )
            self.linear = nn.Linear(2, 2).requires_grad_(False)
            self.linear.weight.copy_(torch.tensor([[0.0, 1], [1, 0]]))
            self.linear.bias.copy_(torch.tensor([1.0, -1]))

        def forward(self, input_ids: Tensor, **_: object) -> Tensor:
            return self.linear(self.table(input_ids))

    model = Table()
    samples = [torch.tensor([[1, 2, 0]]), torch.tensor([[3, 0, 0]])]  # whose max(y) are 3 and -1
    batches = [
        Batch(input_ids=ids, token_mask=torch.ones_like(ids).bool(), attention_mask=ids.sign())
        for ids in samples
    ]
    linears, moment = {"linear": model.linear}, Moment.zeros(2, torch.device("cpu"))
    with accumulate_moments(
        linears, find_groups(model, linears, batches[0], "scaled output"), [moment]
    ) as count:
        for batch in batches:
            count(batch["token_mask"])
            run_forward(model, batch, linears)
    first = torch.tensor([[9.0 + 1 + 1, -12 + 2 + 1], [-12 + 2 + 1, 16 + 4 + 1]])
    second = torch.tensor([[4.0 + 1 + 1, 8 + 1 + 1], [8 + 1 + 1, 16 + 1 + 1]])
    torch.testing.assert_close(
        moment.second_moment(), (first.double() / 9 + second.double() / 1) / 6
    )


@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_moments_of_a_model_are_those_of_its_padded_samples(bias: bool) -> None:
    model, batches = make_model(bias, torch.float64), []
    wanted: dict[str, list[Tensor]] = {name: [] for name in find_projections(model)}
    for batch in batches_of(make_rows(), 1, extra_padding=4):
        mask = batch["token_mask"].long()
        batches.append(
            Batch(
                input_ids=batch["input_ids"],
                token_mask=torch.ones_like(mask).bool(),
                attention_mask=mask,
            )
        )
    statistics = measure(model, batches, "scaled output")
    for name, linear in find_projections(model).items():
        linear.register_forward_hook(
            lambda _, args, y, name=name: wanted[name].append(y[0] / abs(y.max().item()))
        )
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    found = output_moments(model, statistics)
    assert found.keys() == wanted.keys()
    for name, parts in wanted.items():
        y = torch.cat(parts)
        assert len(y) == sum(len(row) + 4 for row in make_rows())
        torch.testing.assert_close(found[name], y.T @ y / len(y), rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("d_out", "d_in", "tokens"),
    [(4, 9, 30), (9, 9, 30), (9, 4, 30), (9, 4, 2), (4, 9, 2), (5, 4, 30)],
)
def test_both_statistics_give_the_moment_of_the_outputs(
    d_out: int, d_in: int, tokens: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(d_out)
    weight = torch.randn(d_out, d_in, generator=generator)
    offset = torch.randn(d_out, generator=generator) if bias else None
    x = (
        torch.randn(tokens, d_in, generator=generator, dtype=torch.float64) + 1
    )  # a mean, or b m^T would vanish
    y = x @ weight.double().T + (0 if offset is None else offset.double())
    for of, vectors in (("input", x), ("output", y)):
        moment = Moment.zeros(vectors.shape[1], torch.device("cpu"))
        for part in vectors.split(7):
            moment.add(part)
        basis, core = form_output_moment(of, moment, weight, offset)
        assert core.dtype == torch.float64
        second = whole(basis, core)
        torch.testing.assert_close(second, y.T @ y / tokens, rtol=1e-12, atol=1e-12, msg=of)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_the_lower_triangle_in_columns_is_the_whole_outer_product(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    a, b = (torch.randn(20, size, generator=generator, dtype=torch.float64) for _ in range(2))
    moments = [Moment.zeros(size, torch.device("cpu")) for _ in range(3)]
    for moment, parts in zip(moments, ([a], [b], [a, b]), strict=True):
        for part in parts:
            moment.add(part)
    for moment, z in zip(
        [moments[2], moments[0] + moments[1]], 2 * [torch.cat([a, b])], strict=True
    ):
        outer = moment.outer_sum()
        assert torch.equal(outer, outer.T)
        torch.testing.assert_close(outer, z.T @ z, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(moment.total, z.sum(0), rtol=1e-13, atol=1e-13)
        assert moment.count == 40
    assert count_moment_bytes(size) == sum(tensor.nbytes for tensor in moments[0].tensors())
    assert (
        sum(block.numel() for block in moments[0].blocks)
        <= size * (size + BLOCK_WIDTH) / 2 + BLOCK_WIDTH**2
    )
