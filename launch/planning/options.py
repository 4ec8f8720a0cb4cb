"""The options of the command line that describe the GPUs a run is planned for."""

import argparse
from dataclasses import dataclass

from launch.runtime.errors import UserError
from launch.runtime.gpus import GPUS

H100 = GPUS["H100"]


@dataclass(frozen=True)
class PlanOptions:
    """The GPUs that a run is planned for."""

    world_size: int  # GPUs in all, with a rank each
    gpu_memory: float | None  # GiB of each; None: whether the run fits is not judged
    tflops: float  # peak of a GPU in the base's dtype
    fp64_tflops: float  # peak of a GPU in fp64
    efficiency: float  # share of the peaks that is reached
    num_rows: int | None  # training rows, where the recipe does not limit them


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `read_plan_options` reads."""
    options = parser.add_argument_group("the machine that is planned for")
    options.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="ranks in all (default %(default)s)"
    )
    options.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="GiB of each GPU; without it nothing is judged",
    )
    options.add_argument(
        "--tflops",
        type=float,
        default=H100.bf16_tflops,
        help="peak of a GPU in the base's dtype (default %(default)s, an H100's)",
    )
    options.add_argument(
        "--fp64-tflops",
        type=float,
        default=H100.fp64_tflops,
        help="peak in fp64 (default %(default)s, an H100's)",
    )
    options.add_argument(
        "--efficiency",
        type=float,
        default=0.4,
        help="share of the peak that is reached (default %(default)s)",
    )
    options.add_argument(
        "--rows", type=int, help="training rows, where the recipe has no data.limit"
    )


def read_plan_options(arguments: argparse.Namespace) -> PlanOptions:
    """Check and return the options of `add_plan_options`. Raises UserError naming the option."""
    for name in ("gpus", "tflops", "fp64_tflops", "efficiency"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')}: must be above 0")
    return PlanOptions(
        world_size=arguments.gpus,
        gpu_memory=arguments.gpu_memory,
        tflops=arguments.tflops,
        fp64_tflops=arguments.fp64_tflops,
        efficiency=arguments.efficiency,
        num_rows=arguments.rows,
    )
