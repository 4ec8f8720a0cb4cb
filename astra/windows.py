"""Calibration in windows of decoder layers, so that the statistics held at a time stay within a budget.

Hidden states are carried from window to window: all windows together cost one forward pass. No pass is cut short and
no module is called by hand, since engines' hooks would be left hanging: the model's own forward runs, and outside of
the window stand-ins are in the places of its layers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from astra.errors import AstraError
from astra.flops import Decomposed
from astra.moments import WIDTH, Group

FP64 = 8  # bytes


@dataclass(frozen=True)
class Window:
    """Consecutive decoder layers whose statistics are held together."""

    layers: range
    groups: list[Group]
    statistics: int  # bytes held on each rank until they are reduced


@dataclass(frozen=True)
class Plan:
    """What a calibration will hold and run."""

    windows: list[Window]
    working: int  # bytes at most, beside the statistics, in which one product or eigenproblem is worked out
    layers: nn.ModuleList | None  # None: one window, and the model is run as it is
    decomposed: Decomposed = "output"

    @property
    def peak(self) -> int:
        """Bytes that the calibration adds to those of a forward pass, on each rank; hidden states not included."""
        return max(window.statistics for window in self.windows) + self.working

    def describe(self) -> str:
        number = f"{len(self.windows)} window{'s' * (len(self.windows) > 1)}"
        if self.layers is not None:
            number += f" of up to {max(len(window.layers) for window in self.windows)} layers"
        passes = {"weight": "of weights alone", "gradient": "a forward and a backward pass in each"}
        return (
            f"calibration: {number}, {passes.get(self.windows[0].groups[0].of, 'one forward pass in all')}; at most "
            f"{gib(max(window.statistics for window in self.windows))} of statistics and "
            f"{gib(self.working)} to work in, on each rank"
        )


def make_plan(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Group],
    *,
    tokens: int,
    parts: int = 1,
    memory: float | None = None,
    decomposed: Decomposed = "output",
) -> Plan:
    """The fewest windows whose statistics, with what they are worked out in, stay within `memory` bytes.

    Args:
        groups: of all targets, in the order they run.
        tokens: of the largest batch.
        parts: in how many parts the samples are summed, each with statistics of its own.
        memory: bytes on each rank; None for one window.
        decomposed: what is worked out from the statistics.

    Raises:
        AstraError: a single layer is above `memory`, or the targets are not in decoder layers.
    """
    working = max(_working(group, linears, tokens, decomposed) for group in groups)
    size = {group: parts * statistic_bytes(group, linears) for group in groups}
    layers = find_layers(model, linears)
    if memory is None or sum(size.values()) + working <= memory:
        return Plan([Window(range(0), list(groups), sum(size.values()))], working, None, decomposed)
    if layers is None:
        raise AstraError(
            "calibration.memory_gib: this model's targets are not in a list of layers; leave it null"
        )
    layer_of = {id(module): i for i, layer in enumerate(layers) for module in layer.modules()}
    by_layer: list[list[Group]] = [[] for _ in layers]
    for group in groups:
        by_layer[layer_of[id(linears[group.modules[0]])]].append(group)
    windows: list[Window] = []
    start, held = 0, 0
    sizes = [sum(size[group] for group in inside) for inside in by_layer]
    for i, bytes_here in enumerate([*sizes, math.inf]):
        if i > start and held + bytes_here + working > memory:
            inside = [group for part in by_layer[start:i] for group in part]
            if inside:
                windows.append(Window(range(start, i), inside, held))
            start, held = i, 0
        held += bytes_here
    least = max(window.statistics for window in windows) + working
    if least > memory:
        raise AstraError(
            f"calibration.memory_gib: {gib(memory)} is below the {gib(least)} that one layer takes; raise it"
        )
    return Plan(windows, working, layers, decomposed)


def gib(number: float) -> str:
    """Bytes as text."""
    return f"{number / 2**30:.3g} GiB"


def moment_bytes(size: int) -> int:
    """Bytes of a Moment of vectors of `size`."""
    return FP64 * (sum((size - i) * min(WIDTH, size - i) for i in range(0, size, WIDTH)) + size + 1)


def statistic_bytes(group: Group, linears: Mapping[str, nn.Linear]) -> int:
    """Bytes of what is summed for a group."""
    match group.of:
        case "weight":
            return 0
        case "gradient":
            linear = linears[group.modules[0]]
            return FP64 * (linear.in_features * linear.out_features + 1)
        case _:
            return moment_bytes(group.size)


def _working(
    group: Group, linears: Mapping[str, nn.Linear], tokens: int, decomposed: Decomposed
) -> int:
    """Bytes at most in use beside the statistics: while a batch is summed, or while one of the modules is solved."""
    most = 0
    for name in group.modules:
        d_in, d_out = linears[name].in_features, linears[name].out_features
        of_input = FP64 * d_in**2 if group.of == "input" else 0
        product = 0 if group.of in ("input", "weight") else FP64 * d_in * d_out
        summing = FP64 * tokens * (d_in + d_out) + product
        # W in its own dtype and in fp64, or the gradient in its place.
        weight = FP64 * d_in * d_out + linears[name].weight.element_size() * d_in * d_out
        match decomposed:
            case (
                "output"
            ):  # W's factorisation, S whole, W S, C; or C, LAPACK's copy and its vectors
                small = FP64 * (min(d_in, d_out) if group.of == "input" else group.size) ** 2
                forming = weight + (2 * FP64 * d_in * d_out if of_input else 0) + of_input + small
                solving = 4 * small
            case "input":  # S whole and centred, LAPACK's copy and its vectors
                forming, solving = weight, 4 * of_input
            case "matrix":  # W S, LAPACK's copy and its two sets of vectors, its workspace; S, damped and factored
                forming = (
                    weight + FP64 * (4 * d_in * d_out + 4 * min(d_in, d_out) ** 2) + 3 * of_input
                )
                solving = 0
        most = max(most, summing, forming, solving)
    return most


def find_layers(model: nn.Module, linears: Mapping[str, nn.Linear]) -> nn.ModuleList | None:
    """The model's list of decoder layers: the first that has every one of `linears` in its items."""
    wanted = {id(linear) for linear in linears.values()}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and wanted <= {
            id(inner) for inner in module.modules()
        }:
            return module
    return None


class _StandIn(nn.Module):
    """In the place of a decoder layer: hands the hidden state on, or notes it, or replaces it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # What a model reads off its layers while it runs them, such as attention_type.
        for key, value in vars(layer).items():
            if key != "forward":  # an engine's wrapping of the layer's own
                self.__dict__.setdefault(key, value)
        self.given: Tensor | None = None  # replaces the hidden state
        self.seen: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        if not isinstance(hidden_states, Tensor):
            raise AstraError(
                "calibration.memory_gib: this model's layers do not hand on one tensor; leave it null"
            )
        self.seen = hidden_states
        return hidden_states if self.given is None else self.given.to(hidden_states.device)


@contextmanager
def only(
    layers: nn.ModuleList | None, window: range, state: Tensor | None
) -> Iterator[list[Tensor]]:
    """Within it one forward pass of the model runs none of `layers` but those of `window`.

    Args:
        state: the hidden state that the window's first layer is given; None for what the layer before hands on.

    Yields:
        a list that holds, afterwards, the hidden state after the window, on the CPU (nothing after the last layer).
    """
    after: list[Tensor] = []
    if layers is None:
        yield after
        return
    inside = list(layers)
    stand_ins = {i: _StandIn(layer) for i, layer in enumerate(inside) if i not in window}
    if state is not None:
        stand_ins[window.start - 1].given = state
    try:
        for i, stand_in in stand_ins.items():
            layers[i] = stand_in
        yield after
    finally:
        for i in stand_ins:
            layers[i] = inside[i]
    if window.stop in stand_ins:
        after.append(stand_ins[window.stop].seen.to("cpu", copy=True))
