"""Calibrate in windows of decoder layers, so that the sums held stay within a memory budget.

The output moments of all modules of an 8B model take about 50 GB in fp32: too much to hold at once.
A window is a run of consecutive decoder layers whose sums are held together, and windows are
calibrated one after the other. The hidden states that leave a window are kept on the CPU and enter
the next one, so that all windows together cost one forward pass.

Engines such as FSDP2 and ZeRO-3 gather weights in hooks that expect whole forward passes of the
model. A pass through a window is therefore a forward pass of the whole model, in which stand-ins
that compute nothing take the places of the decoder layers outside of the window.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from astra.errors import AstraError
from astra.flops import Decomposition
from astra.moments import BLOCK_WIDTH, Group

FP64_BYTES = 8  # of one number

# Said of a model that cannot run in windows.
CANNOT_SPLIT = "this model's layers do not pass on one tensor; set no limit"


@dataclass(frozen=True)
class Window:
    """Consecutive decoder layers whose sums are held in memory together."""

    layers: range  # indices into the list of decoder layers; empty if the model is not split
    groups: list[Group]
    # On each rank, until the ranks' sums are added up; then an owner keeps those of its groups.
    sums_bytes: int


@dataclass(frozen=True)
class CalibrationPlan:
    """The windows of a calibration and the memory that it needs."""

    windows: list[Window]
    # On each rank in addition to the sums, at the peak: for the products of one batch, or for the
    # solution of one module.
    working_bytes: int
    # The model's decoder layers; None: one window, and the model runs as it is.
    layers: nn.ModuleList | None
    decomposition: Decomposition = "output"

    @property
    def peak_bytes(self) -> int:
        """Bytes on each rank in addition to a forward pass's, without hidden states on the CPU."""
        return max(window.sums_bytes for window in self.windows) + self.working_bytes

    def describe(self) -> str:
        """Return one line to print: windows, passes and memory."""
        plural = "s" if len(self.windows) > 1 else ""
        windows = f"{len(self.windows)} window{plural}"
        if self.layers is not None:
            most_layers = max(len(window.layers) for window in self.windows)
            windows += f" of up to {most_layers} layers"
        match self.windows[0].groups[0].statistic:
            case "weight":
                passes = "of weights alone"
            case "gradient":
                passes = "a forward and a backward pass in each"
            case _:
                passes = "one forward pass in all"
        sums = format_gib(max(window.sums_bytes for window in self.windows))
        return (
            f"calibration: {windows}, {passes}; at most {sums} of sums and "
            f"{format_gib(self.working_bytes)} to work in, on each rank"
        )


def make_plan(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Group],
    *,
    tokens: int,
    num_parts: int = 1,
    memory: float | None = None,
    decomposition: Decomposition = "output",
) -> CalibrationPlan:
    """Return the plan with the fewest windows that each stay within `memory` bytes.

    Args:
        groups: of all modules, in the order they run.
        tokens: number of tokens in the largest batch.
        num_parts: number of parts of the samples, each with its own sums.
        memory: bytes on each rank for the sums and for solving; None for no limit.
        decomposition: what the method decomposes.

    Raises:
        AstraError: one decoder layer alone needs more than `memory`, or the modules are not all in
            one list of decoder layers.
    """
    working = max(_count_working_bytes(group, linears, tokens, decomposition) for group in groups)
    sizes = {group: num_parts * count_sum_bytes(group, linears) for group in groups}
    total = sum(sizes.values())
    if memory is None or total + working <= memory:
        window = Window(range(0), list(groups), total)
        return CalibrationPlan([window], working, None, decomposition)
    layers = find_layers(model, linears)
    if layers is None:
        raise AstraError("this model's targets are not in a list of layers; set no limit", "memory")
    windows = _fill_windows(_sort_by_layer(groups, linears, layers), sizes, working, memory)
    least = max(window.sums_bytes for window in windows) + working
    if least > memory:
        raise AstraError(
            f"{format_gib(memory)} is below the {format_gib(least)} that one layer takes; raise it",
            "memory",
        )
    return CalibrationPlan(windows, working, layers, decomposition)


def _sort_by_layer(
    groups: Sequence[Group], linears: Mapping[str, nn.Linear], layers: nn.ModuleList
) -> list[list[Group]]:
    """Return the groups of each decoder layer."""
    layer_indices: dict[int, int] = {}
    for i, layer in enumerate(layers):
        for module in layer.modules():
            layer_indices[id(module)] = i
    by_layer: list[list[Group]] = [[] for _ in layers]
    for group in groups:
        first_module = linears[group.modules[0]]
        by_layer[layer_indices[id(first_module)]].append(group)
    return by_layer


def _fill_windows(
    by_layer: Sequence[Sequence[Group]], sizes: Mapping[Group, int], working: int, memory: float
) -> list[Window]:
    """Return windows of as many layers as stay within `memory` bytes, but at least one each.

    Args:
        sizes: bytes of each group's sums.
        working: bytes needed in addition to the sums.
    """
    windows: list[Window] = []
    start, window_groups, window_bytes = 0, [], 0
    for i, layer_groups in enumerate(by_layer):
        layer_bytes = sum(sizes[group] for group in layer_groups)
        # The window ends before a layer that does not fit, unless that layer would be its first.
        if i > start and window_bytes + layer_bytes + working > memory:
            # Layers that get no adapter need no window.
            if window_groups:
                windows.append(Window(range(start, i), window_groups, window_bytes))
            start, window_groups, window_bytes = i, [], 0
        window_groups += layer_groups
        window_bytes += layer_bytes
    if window_groups:
        windows.append(Window(range(start, len(by_layer)), window_groups, window_bytes))
    return windows


def format_gib(num_bytes: float) -> str:
    """Return a number of bytes as text, in GiB with three digits."""
    return f"{num_bytes / 2**30:.3g} GiB"


def count_moment_bytes(size: int) -> int:
    """Return the bytes of a moments.Moment of vectors of `size`."""
    num_numbers = size + 1  # total, count
    for i in range(0, size, BLOCK_WIDTH):
        num_numbers += (size - i) * min(BLOCK_WIDTH, size - i)
    return FP64_BYTES * num_numbers


def count_sum_bytes(group: Group, linears: Mapping[str, nn.Linear]) -> int:
    """Return the bytes of the sums of one group."""
    match group.statistic:
        case "weight":
            return 0
        case "gradient":
            linear = linears[group.modules[0]]
            return FP64_BYTES * (linear.in_features * linear.out_features + 1)
        case _:
            return count_moment_bytes(group.size)


def _count_working_bytes(
    group: Group, linears: Mapping[str, nn.Linear], tokens: int, decomposition: Decomposition
) -> int:
    """Return the bytes needed beside the sums while a batch is summed or a module solved."""
    most = 0
    for name in group.modules:
        linear = linears[name]
        d_in, d_out = linear.in_features, linear.out_features
        # fp64 copies of a batch's inputs and outputs, and of W.
        summing = FP64_BYTES * tokens * (d_in + d_out)
        if group.statistic not in ("input", "weight"):
            summing += FP64_BYTES * d_in * d_out
        solving = _count_solving_bytes(group, linear, decomposition)
        most = max(most, summing, solving)
    return most


def _count_solving_bytes(group: Group, linear: nn.Linear, decomposition: Decomposition) -> int:
    """Return the bytes needed beside the sums while one module is solved, at the peak."""
    d_in, d_out = linear.in_features, linear.out_features
    input_moment = FP64_BYTES * d_in**2 if group.statistic == "input" else 0
    # W in its own dtype and in fp64, or the gradient in its place.
    weight = FP64_BYTES * d_in * d_out + linear.weight.element_size() * d_in * d_out
    match decomposition:
        case "output":
            size = min(d_in, d_out) if group.statistic == "input" else group.size
            core = FP64_BYTES * size**2
            # W's QR factors, and W times the input moment.
            products = 2 * FP64_BYTES * d_in * d_out if input_moment else 0
            forming = weight + products + input_moment + core
            solving = 4 * core  # core, LAPACK's copy, and vectors
            return max(forming, solving)
        case "input":
            # The input moment, the covariance, LAPACK's copy of it, and vectors.
            return max(weight, 4 * input_moment)
        case "matrix":
            # W times the input moment, LAPACK's copy and workspace, and the singular vectors.
            svd = FP64_BYTES * (4 * d_in * d_out + 4 * min(d_in, d_out) ** 2)
            # The input moment, damped, and the factors of the damped one.
            return weight + svd + 3 * input_moment


def find_layers(model: nn.Module, linears: Mapping[str, nn.Linear]) -> nn.ModuleList | None:
    """Return the list of decoder layers: the first ModuleList that contains all of `linears`."""
    wanted = {id(linear) for linear in linears.values()}
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            contained = {id(inner) for inner in module.modules()}
            if wanted <= contained:
                return module
    return None


class _StandIn(nn.Module):
    """A module in the place of a decoder layer that returns its input, or `replacement` if set."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Models read attributes of their decoder layers, such as attention_type, while they run.
        for key, value in vars(layer).items():
            if key != "forward":  # set if an engine has wrapped the layer's own forward
                self.__dict__.setdefault(key, value)
        self.replacement: Tensor | None = None
        self.received: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        if not isinstance(hidden_states, Tensor):
            raise AstraError(CANNOT_SPLIT, "memory")
        self.received = hidden_states
        if self.replacement is None:
            return hidden_states
        return self.replacement.to(hidden_states.device)


def _require_tensor(_layer: nn.Module, _inputs: tuple, output: object) -> None:
    """Raise AstraError if a layer returns more than a hidden state, which no stand-in would."""
    if not isinstance(output, Tensor):
        raise AstraError(CANNOT_SPLIT, "memory")


@contextmanager
def skip_layers_outside(
    layers: nn.ModuleList | None, window: range, hidden_state: Tensor | None
) -> Iterator[list[Tensor]]:
    """Within the context, let a forward pass of the model skip the `layers` not in `window`.

    Args:
        layers: the model's decoder layers; None to run the model as it is.
        window: indices of the decoder layers to run.
        hidden_state: the input of the window's first layer; None for a window that starts at layer
            0, which receives its input from the model.

    Yields:
        A list, empty until the context ends. Then it holds the hidden state after the window, on
        the CPU, unless the window ends with the last layer.
    """
    hidden_states_after: list[Tensor] = []
    if layers is None:
        yield hidden_states_after
        return
    originals = list(layers)
    checks = [originals[i].register_forward_hook(_require_tensor) for i in window]
    stand_ins = {i: _StandIn(layer) for i, layer in enumerate(originals) if i not in window}
    if hidden_state is not None:
        stand_ins[window.start - 1].replacement = hidden_state
    try:
        for i, stand_in in stand_ins.items():
            layers[i] = stand_in
        yield hidden_states_after
    finally:
        for i in stand_ins:
            layers[i] = originals[i]
        for check in checks:
            check.remove()
    if window.stop in stand_ins:
        # A copy even from CPU to CPU: the tensor belongs to the model, which may reuse it.
        hidden_state_after = stand_ins[window.stop].received.to("cpu", copy=True)
        hidden_states_after.append(hidden_state_after)
