"""What a run's numbers hold for: versions, revision and machine."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ["torch", "transformers", "deepspeed", "peft", "datasets", "tokenizers"]


def describe_conditions(world_size: int, device: torch.device) -> dict:
    """Return the conditions of a run, as results.json and manifests have them."""
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"cpu ({platform.machine()})"
    return {
        "git_revision": find_git_revision(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "world_size": world_size,
        "device": name,
        "threads_per_rank": torch.get_num_threads(),
        "fp32_products": {"highest": "fp32", "high": "TF32 on GPUs"}[
            torch.get_float32_matmul_precision()
        ],
    }


def find_git_revision() -> str | None:
    """Return the repository's commit, with `-dirty` where files differ from it.

    None outside of a git checkout.
    """
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def name_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype as files have it: `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
