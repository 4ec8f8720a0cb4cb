"""astra.calibrate in one process: each module gets the named eigenvectors of its own outputs.

Tiny random Llamas on the CPU, compared with an oracle that holds all activations. A few seconds.
Several ranks: tests/distributed/test_calibration.py.
"""

import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from astra import calibrate
from astra.calibrate import (
    ModuleProblem,
    Solution,
    calibrate_modules,
    solve_subspace,
    sum_second_moments,
)
from astra.eigen import EPS, Subspace, make_generator, select_indices
from astra.errors import AstraError, FallbackWarning
from astra.moments import Batch
from astra.weights import TorchWeights
from tests.support.calibration import find_projections, find_subspaces, plan_calibration

SELECTS = ("smallest", "largest", "middle", "random")
SEED = 3
RANK = 4


def batches_of(lengths: Sequence[int], size: int) -> list[Batch]:
    """Return rows of `lengths` tokens in right-padded batches of `size`, which alters no row."""
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randint(50, (length,), generator=generator) for length in lengths]
    made = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        ids = nn.utils.rnn.pad_sequence(chunk, batch_first=True, padding_value=9)
        token_mask = nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in chunk], batch_first=True
        ).bool()
        made.append(Batch(input_ids=ids, token_mask=token_mask))
    return made


def run(
    model: nn.Module, batches: list[Batch], select: str, rank: int = RANK
) -> dict[str, Subspace]:
    return find_subspaces(
        model, find_projections(model), batches, TorchWeights(), rank=rank, select=select, seed=SEED
    )


def outputs_of(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Return the oracle's activations: name -> W x + b in fp64 at all counted tokens."""
    kept: dict[str, list[Tensor]] = {}
    token_mask = torch.empty(0)
    handles = []
    for name, linear in find_projections(model).items():

        def hook(module: nn.Linear, args: tuple, name: str = name) -> None:
            bias = 0 if module.bias is None else module.bias.double()
            kept.setdefault(name, []).append(
                (args[0].double() @ module.weight.double().T + bias)[token_mask]
            )

        handles.append(linear.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            token_mask = batch["token_mask"]
            model(input_ids=batch["input_ids"])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_module_gets_the_named_eigenvectors_of_its_outputs(
    select: str, bias: bool, make_llama: Callable[..., nn.Module]
) -> None:
    model, batches = make_llama(torch.float64, bias=bias), batches_of([5, 9, 13, 6, 11, 7, 12], 3)
    found, outputs = run(model, batches, select), outputs_of(model, batches)
    assert found.keys() == outputs.keys()
    assert len(found) == 14
    for name, y in outputs.items():
        second = y.T @ y / len(y)
        spectrum, size = torch.linalg.eigvalsh(second).clamp(min=0), len(second)
        indices = select_indices(select, size, RANK, make_generator(SEED, name))
        # Both sides sum in fp64: they differ by a few hundred roundings of the largest eigenvalue.
        slack = 10 * size * EPS * second.trace().item()
        vectors, values = found[name].vectors, found[name].values
        assert (vectors.shape, values.shape) == ((size, RANK), (RANK,))
        assert (vectors.dtype, values.dtype) == (torch.float64, torch.float64)
        torch.testing.assert_close(values, spectrum[indices], rtol=1e-9, atol=slack, msg=name)
        torch.testing.assert_close(second @ vectors, vectors * values, rtol=0, atol=slack, msg=name)
        torch.testing.assert_close(
            vectors.T @ vectors, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_fewer_tokens_than_dimensions_leave_eigenvalues_that_are_exactly_zero(
    make_llama: Callable[..., nn.Module],
) -> None:
    model, batches = make_llama(torch.float64, bias=True), batches_of([5], 1)
    found, outputs = run(model, batches, "smallest", rank=8), outputs_of(model, batches)
    for name, y in outputs.items():
        if y.shape[1] == 8:  # k_proj, v_proj: 8 outputs, 5 tokens, so three zero eigenvalues
            assert (found[name].values == 0).tolist() == [True] * 3 + [False] * 5, name
        else:
            assert (found[name].values == 0).all(), name
        null = found[name].vectors[:, found[name].values == 0]
        assert (y @ null).abs().max() < 1e-12 * y.norm(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_batch_size_does_not_change_the_energy(
    dtype: torch.dtype, tolerance: float, make_llama: Callable[..., nn.Module]
) -> None:
    model, lengths = make_llama(dtype), [5, 9, 13, 6, 11, 7, 12]
    one, many = (run(model, batches_of(lengths, size), "largest") for size in (1, 4))
    for name in one:
        torch.testing.assert_close(
            one[name].values.sum(), many[name].values.sum(), rtol=tolerance, atol=0
        )


def test_batches_without_counted_tokens_change_no_bit_and_the_model_stays_as_it_was(
    make_llama: Callable[..., nn.Module],
) -> None:
    model, batches = make_llama(), batches_of([5, 9, 13, 6, 11], 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dummy = Batch(
        input_ids=batches[0]["input_ids"], token_mask=torch.zeros_like(batches[0]["token_mask"])
    )
    alone, padded = run(model, batches, "random"), run(model, [*batches, dummy], "random")
    for name in alone:
        assert torch.equal(alone[name].vectors, padded[name].vectors), name
        assert torch.equal(alone[name].values, padded[name].values), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_each_batch_is_run_once_through_the_progress_bar(
    make_llama: Callable[..., nn.Module],
) -> None:
    model, batches, seen = make_llama(), batches_of([5, 9, 13], 1), []

    def progress(items: Sequence[Batch], name: str) -> Iterator[Batch]:
        assert name == "calibrate"
        for item in items:
            seen.append(item["input_ids"].shape[1])
            yield item

    plan = plan_calibration(model, find_projections(model), batches)
    moments = sum_second_moments(
        model, find_projections(model), batches, plan.windows[0], plan, [None] * 3, progress
    )
    assert seen == [5, 9, 13]
    assert {int(moment.count) for moment in moments} == {27}


def test_a_module_that_cannot_be_solved_is_named(make_llama: Callable[..., nn.Module]) -> None:
    model, batches = make_llama(), batches_of([5, 9], 2)
    with pytest.raises(AstraError, match=r"9 .*self_attn\.[kv]_proj") as error:
        run(model, batches, "smallest", rank=9)
    assert "\n" not in str(error.value)
    assert error.value.subject == "rank"
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 2] = float("inf")
    with pytest.raises(AstraError, match=r"model\.layers\.1\.mlp\.(up|down)_proj") as error:
        run(model, batches, "smallest")
    assert "\n" not in str(error.value)


def test_an_error_keeps_its_subject_on_the_way_to_other_ranks() -> None:
    error = pickle.loads(pickle.dumps(AstraError("too high", "rank")))
    assert (str(error), error.subject) == ("too high", "rank")


def test_calibration_without_a_single_token_is_refused(
    make_llama: Callable[..., nn.Module],
) -> None:
    model, batch = make_llama(), batches_of([5], 1)[0]
    batch["token_mask"] = torch.zeros_like(batch["token_mask"])
    with pytest.raises(AstraError):
        run(model, [batch], "smallest")


def test_what_is_said_of_solvers_is_said_once_and_other_warnings_pass(
    make_llama: Callable[..., nn.Module],
) -> None:
    model, batches, said = make_llama(), batches_of([5, 9], 2), []
    linears = find_projections(model)

    def solve(problem: ModuleProblem) -> Solution:
        warnings.warn("a solver failed", FallbackWarning, stacklevel=1)
        warnings.warn("something else", DeprecationWarning, stacklevel=1)
        return solve_subspace(problem, "largest", SEED)

    plan = plan_calibration(model, linears, batches)
    windows = calibrate_modules(
        model,
        linears,
        [batches],
        TorchWeights(),
        plan,
        solve,
        lora_ranks=dict.fromkeys(linears, RANK),
        solve_device=torch.device("cpu"),
        report_line=said.append,
    )
    with pytest.warns(DeprecationWarning, match="something else"):
        (found,) = windows
    assert said == ["a solver failed"]
    assert found.keys() == linears.keys()


def test_solutions_leave_the_gpu() -> None:
    """Simulated: fake tensors, which have a device and no values."""
    with FakeTensorMode():
        solution = {"a0": torch.empty(2, 3, device="cuda")}
        shapes = {"a0": solution["a0"].shape}
        kept = calibrate._broadcast_solution(solution, 0, shapes, solution["a0"].device)
    assert kept["a0"].device.type == "cpu"
    assert kept["a0"].shape == (2, 3)


@torch.no_grad()
def test_a_rank_that_keeps_no_solutions_gets_none(make_llama: Callable[..., nn.Module]) -> None:
    model, batches = make_llama(), batches_of([5, 9], 2)
    linears = find_projections(model)
    windows = calibrate_modules(
        model,
        linears,
        [batches],
        TorchWeights(),
        plan_calibration(model, linears, batches),
        lambda problem: solve_subspace(problem, "largest", SEED),
        lora_ranks=dict.fromkeys(linears, RANK),
        solve_device=torch.device("cpu"),
        keep=False,
    )
    assert list(windows) == [{}]
