"""Full disks and full memory: errors of many libraries become one line that says what to lower."""

import errno
import os
import shutil
from pathlib import Path

from launch.runtime.units import GIB

FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries that lose the error's number say: safetensors (Rust's io::ErrorKind), torch.save.
FULL_TEXTS = ("no space left on device", "disk quota exceeded", "storagefull", "quotaexceeded")
# torch on CPUs and GPUs, cuBLAS, NCCL, the C++ library.
MEMORY_TEXTS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
    "bad_alloc",
)


def is_full_disk(error: BaseException) -> bool:
    """Return whether the error comes of a full disk or a used-up quota."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    text = str(error).lower()
    return any(words in text for words in FULL_TEXTS)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error comes of memory, a device's or the machine's, that is used up."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch.OutOfMemoryError is a RuntimeError too.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in MEMORY_TEXTS)


def describe_space(path: Path) -> str:
    """Say how much room is left where `path` is, or is to be."""
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return f"make room in {folder}"
    return f"{free / GIB:.2f} GiB are free in {folder}"


def describe_shortage(error: BaseException, phase: str) -> str | None:
    """Return the line of an error that comes of a full disk or full memory; None for others.

    Args:
        phase: what the run did, such as "training step 3".
    """
    if is_full_disk(error):
        file = getattr(error, "filename", None)
        text = _shorten(error)
        if isinstance(error, OSError) and error.errno in FULL:
            text = os.strerror(error.errno)
        where = f"{file}: " if file else ""
        room = f" ({describe_space(Path(file))})" if file else ""
        return (
            f"{phase}: {where}{text}{room}; make room, or lower train.keep, and start the same "
            "command again"
        )
    if is_out_of_memory(error):
        return (
            f"{phase}: out of memory: {_shorten(error)}; lower train.micro_batch, data.max_length, "
            "eval.batch_size or calibration.memory_gib, set train.gradient_checkpointing=true, or "
            "spread the model: engine=zero3 or fsdp on more devices, or zero3_offload (see --plan)"
        )
    return None


def _shorten(error: BaseException) -> str:
    """Return the first sentences of an error's text; torch adds advice and addresses to it."""
    lines = str(error).strip().splitlines()
    text = lines[0].partition(" (Triggered internally")[0] if lines else type(error).__name__
    return text.partition(" Of the allocated memory")[0][:300].rstrip(".")
