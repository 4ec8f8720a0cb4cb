"""Errors of full disks and full memory are known whatever library they come from.

The errors are those that the libraries raise, made with real allocations, or with the texts that
were seen. Needs nothing. 2 s.
"""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from launch.runtime.shortages import describe_shortage, describe_space

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.2 GiB is free. Process 1 has 77.9 GiB memory in use. Of the allocated memory 70 GiB is "
    "allocated by PyTorch. If reserved but unallocated memory is large try setting X\nTraceback"
)


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: np.empty(2**50)])
def test_a_failed_allocation_is_out_of_memory(allocate: object) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    line = describe_shortage(caught.value, "training step 3")
    assert line.startswith("training step 3: out of memory: ")
    assert "lower train.micro_batch" in line and "\n" not in line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError(CUDA), "Tried to allocate 2.00 GiB"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), "ALLOC_FAILED"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (OSError(errno.ENOSPC, "no", "/tmp/x/y.bin"), "/tmp/x/y.bin: No space left on device ("),
        (OSError(errno.EDQUOT, "no"), os.strerror(errno.EDQUOT)),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room"),
        (SafetensorError("Error: IoError(Kind(StorageFull))"), "make room"),
    ],
)
def test_libraries_errors_are_told_in_one_line(error: Exception, words: str) -> None:
    line = describe_shortage(error, "exporting")
    assert words in line
    assert "\n" not in line and "Of the allocated" not in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the sizes of tensors must match"),
        KeyError("exp_avg"),
        ValueError("this file is out of memory lane"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        OSError(errno.EACCES, "Permission denied", "x"),
    ],
)
def test_other_errors_are_none(error: Exception) -> None:
    assert describe_shortage(error, "training") is None


def test_the_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert f"GiB are free in {tmp_path}" in describe_space(tmp_path / "not" / "yet" / "there")
