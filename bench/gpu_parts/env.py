"""Versions, the device, its driver and memory."""

import importlib.metadata
import platform
import subprocess

import torch

from bench.gpu_parts.report import Report, Work

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "numpy", "triton")


def measure(work: Work, report: Report) -> None:
    """Report what the other parts run on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    report.figures["versions"] = versions
    report.figures["cuda"] = torch.version.cuda
    report.figures["cpu threads"] = torch.get_num_threads()
    if work.tiny:
        report.figures["device"] = "cpu"
    else:
        _report_gpu(report)
    import deepspeed  # without a CUDA toolkit too

    report.check("deepspeed can be imported", True, deepspeed.__version__)


def _report_gpu(report: Report) -> None:
    from launch.runtime.gpus import find_gpu

    name = torch.cuda.get_device_name()
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    report.figures["device"] = name
    report.figures["compute capability"] = f"{major}.{minor}"
    report.figures["memory, GiB"] = {"free": round(free / 2**30, 1), "all": round(total / 2**30, 1)}
    report.figures["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    report.figures["driver"] = _read_driver()
    report.check("this GPU is in launch/runtime/gpus.py", find_gpu(name) is not None, name)


def _read_driver() -> str | None:
    """Return the driver's version; None where nvidia-smi does not say it."""
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
