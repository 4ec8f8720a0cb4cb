"""What a run would take, before it is paid for: memory of each GPU, calibration windows, arithmetic, time, disk.

From the model's config alone: no weights are fetched and no GPU is needed. Every row is taken to be data.max_length
tokens long, so memory is an upper bound and so, where rows are shorter, is time. Exit code 1: it does not fit."""

import argparse
import sys
import warnings
from pathlib import Path

if (
    not __package__
):  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.config.schema import Recipe
from launch.runtime.errors import UserError, run

EXAMPLES = """\
  python launch/plan.py --recipe metamath --gpus 8 --gpu-memory 80
  python launch/plan.py --recipe metamath --set model.name=/models/llama-70b --gpus 64 --gpu-memory 80
  python launch/train.py --plan --recipe metamath --gpus 4 --gpu-memory 24 --engine fsdp"""
GIB = 2**30


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The options that describe the GPUs."""
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
        default=989,
        help="peak of a GPU in the base's dtype (default %(default)s, an H100's)",
    )
    options.add_argument(
        "--fp64-tflops",
        type=float,
        default=67,
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


def show(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Print the plan of `recipe` on the machine of add_machine's options. Raises UserError; exits with 1: no fit."""
    import torch

    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # from inside transformers, every call
    from launch.data.inputs import resolve_dtype
    from launch.data.tokenize import num_steps
    from launch.planning.estimate import estimate
    from launch.quickstart import base as quickstart
    from launch.runtime.model_files import fetch_config

    for name in ("gpus", "tflops", "fp64_tflops", "efficiency"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')}: must be above 0")
    ranks, settings = arguments.gpus, recipe.train
    if recipe.engine == "single" and ranks > 1:
        raise UserError(
            f"engine: single trains in one process, not {ranks}; set engine=zero3 or --gpus 1"
        )
    of_quickstart = recipe.model.name == quickstart.NAME
    config = (
        quickstart.make_config()
        if of_quickstart
        else fetch_config(recipe.model.name, recipe.model.revision)
    )
    rows = (
        arguments.rows
        or recipe.data.limit
        or (quickstart.TRAIN_PROBLEMS if of_quickstart else None)
    )
    if rows is None and settings.max_steps is None:
        raise UserError(
            "--rows: how many training rows there are; the recipe sets neither data.limit nor max_steps"
        )
    steps = num_steps(
        rows or settings.global_batch, settings.global_batch, settings.epochs, settings.max_steps
    )
    dtype = resolve_dtype(recipe.model.dtype, torch.device("cuda"))
    print(
        f"planning {recipe.model.name}: running its layers without numbers",
        file=sys.stderr,
        flush=True,
    )
    found = estimate(
        config,
        recipe,
        ranks=ranks,
        dtype=dtype,
        checkpointing=settings.gradient_checkpointing is not False,
        steps=steps,
    )

    print(
        f"{recipe.model.name}, {recipe.engine} on {ranks} ranks, {str(dtype).removeprefix('torch.')} base"
    )
    print(
        f"parameters: {found.parameters / 1e9:.3f} B of the base, {found.trainable / 1e6:.2f} M trainable"
    )
    print("\nmemory of each GPU in GiB, at the stage's peak:")
    stages = {
        "calibration": found.calibration,
        "initialisation": found.initialisation,
        "training": found.training,
    }
    for name, stage in stages.items():
        parts = ", ".join(f"{part} {size / GIB:.3g}" for part, size in stage.memory.items() if size)
        print(f"  {name:<15} {stage.peak / GIB:8.3g}  = {parts}")
    if found.windows:
        print(f"\n{found.windows.describe()}")
        if found.hidden_states:
            print(
                f"hidden states between windows: {found.hidden_states / GIB:.3g} GiB on the CPU, on each rank"
            )

    rate, rate64 = (
        peak * arguments.efficiency * 1e12 * ranks
        for peak in (arguments.tflops, arguments.fp64_tflops)
    )
    peaks = f"{arguments.tflops:g} and {arguments.fp64_tflops:g} TFLOP/s"
    print(f"\nfloating-point operations, and time at {arguments.efficiency:.0%} of {peaks}:")
    print(f"  calibration, forward passes   {_work(found.calibration.flops, rate)}")
    print(f"  calibration, sums (fp64)      {_work(found.sum_flops, rate64)}")
    print(f"  calibration, solving (fp64)   {_work(found.solve_flops, rate64)}")
    print(f"  training, {steps:>7} steps       {_work(found.training.flops, rate)}")
    print("\nfiles, GiB:")
    for name, size in found.files.items():
        print(f"  {size / GIB:8.3g}  {name}")
    if arguments.gpu_memory is None:
        return
    short = [name for name, stage in stages.items() if stage.peak > arguments.gpu_memory * GIB]
    if not short:
        peak = max(stage.peak for stage in stages.values())
        print(f"\nit fits: at most {peak / GIB:.3g} of {arguments.gpu_memory:g} GiB")
        return
    print(
        f"\nit does not fit in {arguments.gpu_memory:g} GiB: {', '.join(short)}; {_advice(found, short, arguments)}"
    )
    sys.exit(1)


def _advice(found, short: list[str], arguments: argparse.Namespace) -> str:  # noqa: ANN001 (imported late)
    """What would make it fit."""
    if short == ["calibration"]:
        others = found.calibration.peak - found.windows.peak
        left = arguments.gpu_memory * GIB - max(others, 0)
        if left > found.windows.working:
            return f"set calibration.memory_gib={int(left / GIB * 10) / 10}"
    return "more GPUs, engine=fsdp or zero3, a smaller train.micro_batch or data.max_length, or a smaller rank"


def _work(flops: float, rate: float) -> str:
    seconds = flops / rate
    hours, rest = divmod(round(seconds), 3600)
    return f"{flops:10.3e}  {hours:3d} h {rest // 60:02d} min {rest % 60:02d} s"


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    cli.add_recipe(parser)
    add_machine(parser)
    arguments = parser.parse_args()
    recipe, _ = cli.read_recipe(arguments)
    show(recipe, arguments)


if __name__ == "__main__":
    run(main)
