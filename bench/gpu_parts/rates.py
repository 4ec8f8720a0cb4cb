"""Rates of products, and the project's solvers against LAPACK on the CPU."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from astra.eigen import solve_eigenproblem
from astra.moments import BLOCK_WIDTH, Moment
from astra.svd import compute_svd
from bench.gpu_parts.report import Report, Work, synchronise

SEED = 0
TOKENS = 4096  # of a calibration batch, 8 examples of 512
GOAL_SUMS = 25  # TFLOP/s in fp64, on GPUs with at least twice that peak
GOAL_EIGEN = 1.5  # seconds


def measure(work: Work, report: Report) -> None:
    """Measure sums, products, an eigenproblem and SVDs."""
    torch.manual_seed(SEED)
    widths = (256, 688) if work.tiny else (4096, 11008)
    _measure_products(widths, work, report)
    _measure_eigenproblem(widths[0], work, report)
    _measure_svd(widths[0], work, report)


def measure_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Return the mean seconds of a call, after one that warms up."""
    function()
    synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronise()
    return (time.perf_counter() - start) / repeats


def _measure_products(widths: tuple[int, ...], work: Work, report: Report) -> None:
    """Measure fp64 sums at calibration's shapes, and bf16 products at training's."""
    tokens = 256 if work.tiny else TOKENS
    sums, products = {}, {}
    for width in widths:
        rows = torch.randn(tokens, width, dtype=torch.float64, device=work.device)
        moment = Moment.zeros(width, work.device)
        seconds = measure_seconds(lambda rows=rows, moment=moment: moment.add(rows))
        # The lower triangle, with the squares of BLOCK_WIDTH on its diagonal whole.
        sums[width] = round(tokens * width * (width + BLOCK_WIDTH) / seconds / 1e12, 3)
        seconds = measure_seconds(lambda rows=rows: rows.T @ rows)
        products[width] = round(2 * tokens * width**2 / seconds / 1e12, 3)
    report.figures["fp64 sums by width, TFLOP/s"] = sums
    report.figures["fp64 product by width, TFLOP/s"] = products
    a = torch.randn(tokens, widths[0], device=work.device).bfloat16()
    b = torch.randn(widths[0], widths[1], device=work.device).bfloat16()
    seconds = measure_seconds(lambda: a @ b, 20)
    report.figures["bf16 product, TFLOP/s"] = round(
        2 * tokens * widths[0] * widths[1] / seconds / 1e12, 3
    )
    reached = sums[widths[0]]
    if not work.tiny and not _has_fast_fp64():
        report.goal(f"fp64 sums at {GOAL_SUMS} TFLOP/s on an H100", None, "no H100's fp64 here")
    else:
        report.goal(f"fp64 sums at {GOAL_SUMS} TFLOP/s", reached >= GOAL_SUMS, reached)


def _has_fast_fp64() -> bool:
    """Return whether the GPU's fp64 peak allows the goal, which is half of an H100's and less."""
    from launch.runtime.gpus import find_gpu

    gpu = find_gpu(torch.cuda.get_device_name())
    return gpu is not None and gpu.fp64_tflops >= 2 * GOAL_SUMS


def _measure_eigenproblem(size: int, work: Work, report: Report) -> None:
    """Solve one moment whose eigenvalues span seven decades."""
    scales = torch.logspace(0, -3.5, size, dtype=torch.float64, device=work.device)
    moment = Moment.zeros(size, work.device)
    for _ in range(2 * size // 512 + 1):
        rows = torch.randn(512, size, dtype=torch.float64, device=work.device)
        moment.add(rows * scales)
    core = moment.second_moment()
    rank = min(128, size // 4)

    def solve() -> object:
        return solve_eigenproblem(None, core, rank, "smallest", SEED, "bench")

    seconds = measure_seconds(solve, 1)
    solution = solve()
    start = time.perf_counter()
    wanted = torch.linalg.eigvalsh(core.cpu())
    on_cpu = time.perf_counter() - start
    error = float((solution.spectrum.cpu() - wanted).abs().max() / wanted.max())
    checks = [float(f"{value:.2e}") for value in solution.checks.tolist()]
    report.figures[f"eigenproblem of {size:,}"] = {
        "seconds": round(seconds, 3),
        "seconds of LAPACK's eigenvalues alone": round(on_cpu, 3),
        "errors / tolerances": checks,
    }
    report.check("the eigenproblem's solution passes its checks", max(checks) <= 1, checks)
    report.check("eigenvalues are LAPACK's to 1e-12 of the largest", error < 1e-12, f"{error:.1e}")
    report.goal(
        f"an eigenproblem of 4,096 in {GOAL_EIGEN} s", seconds <= GOAL_EIGEN, f"{seconds:.2f} s"
    )


def _measure_svd(size: int, work: Work, report: Report) -> None:
    """Compute both ends of a random square matrix's singular triplets."""
    matrix = torch.randn(size, size, dtype=torch.float64, device=work.device)
    wanted = torch.linalg.svdvals(matrix.cpu())
    rank = min(128, size // 4)
    for end, is_smallest in (("largest", False), ("smallest", True)):
        seconds = measure_seconds(lambda s=is_smallest: compute_svd(matrix, rank, s), 1)
        triplets = compute_svd(matrix, rank, is_smallest)
        expected = wanted[-rank:].flip(0) if is_smallest else wanted[:rank]
        errors = {
            "values": _largest(triplets.values.cpu() - expected) / float(wanted[0]),
            "residual": _largest(matrix @ triplets.v - triplets.u * triplets.values)
            / float(wanted[0]),
        }
        report.figures[f"SVD of {size:,}, {end}, seconds"] = round(seconds, 3)
        report.check(
            f"{end} singular triplets are right to 1e-10 of the largest value",
            max(errors.values()) < 1e-10,
            {name: f"{value:.1e}" for name, value in errors.items()},
        )


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
