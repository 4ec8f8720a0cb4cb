"""The options of the command line that describe the GPUs a run is planned for."""

import argparse
from dataclasses import dataclass

from launch.planning.machine import (
    DEFAULT_GPU,
    EFFICIENCY,
    NETWORK,
    NODE_SIZE,
    NUM_CORES,
    Machine,
    make_machine,
)
from launch.runtime.errors import UserError
from launch.runtime.gpus import GPUS

# Options that set a field of the machine or its GPU: option -> (field, what it is).
FIELDS = {
    "tflops": ("bf16_tflops", "peak of a GPU in bf16, TFLOP/s"),
    "fp64-tflops": ("fp64_tflops", "peak of a GPU in fp64, TFLOP/s"),
    "bandwidth": ("bandwidth", "bandwidth of a GPU's memory, GB/s"),
    "link": ("nvlink", "bandwidth between the GPUs of a node, GB/s in one direction"),
    "network": (
        "network",
        f"bandwidth of a node's network, GB/s in one direction (default {NETWORK:g})",
    ),
    "efficiency": ("efficiency", f"share of the peaks that is reached (default {EFFICIENCY:g})"),
}
COUNTS = {
    "gpus-per-node": ("node_size", f"GPUs of a node (default {NODE_SIZE})"),
    "cores": ("num_cores", f"CPU cores for each GPU (default {NUM_CORES})"),
}


@dataclass(frozen=True)
class PlanOptions:
    """The machine that a run is planned for, and its rows."""

    machine: Machine
    num_rows: int | None = None  # rows of the data, held-out ones too; of a mix those of an epoch


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `read_plan_options` reads."""
    options = parser.add_argument_group(
        "the machine that is planned for",
        f"What --gpu-name gives can also be given, or changed, by hand. Without it rates are an "
        f"{DEFAULT_GPU}'s. Known: {', '.join(sorted(GPUS))}.",
    )
    options.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="ranks in all (default %(default)s)"
    )
    options.add_argument("--gpu-name", metavar="NAME", help="such as H100, or A100 80GB")
    options.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="GiB of each GPU; without it and --gpu-name whether the run fits is not judged",
    )
    for name, (_, text) in FIELDS.items():
        options.add_argument(f"--{name}", type=float, metavar="X", help=text)
    for name, (_, text) in COUNTS.items():
        options.add_argument(f"--{name}", type=int, metavar="N", help=text)
    options.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="rows of the data, held-out ones too, where the recipe has no smaller data.limit; of a "
        "mix the rows of an epoch",
    )


def read_plan_options(arguments: argparse.Namespace) -> PlanOptions:
    """Check and return the options of `add_plan_options`. Raises UserError naming the option."""
    others = {}
    for name in ("gpus", "gpu-memory", "rows", *FIELDS, *COUNTS):
        value = getattr(arguments, name.replace("-", "_"))
        if value is None:
            continue
        if not 0 < value < float("inf"):  # not NaN either
            raise UserError(f"--{name}: {value:g} is not a number above 0")
        if name in FIELDS or name in COUNTS:
            others[(FIELDS | COUNTS)[name][0]] = value
    if others.get("efficiency", 1) > 1:
        raise UserError(f"--efficiency: {others['efficiency']:g} is a share, at most 1")
    machine = make_machine(
        arguments.gpu_name, arguments.gpus, memory=arguments.gpu_memory, **others
    )
    return PlanOptions(machine, arguments.rows)
