"""Memory of this rank's GPU, or of its share of the machine: what may still be taken, and what was."""

import gc
import resource
import socket
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# Files of a cgroup, of version 2 and of version 1: limits, use, and the key in memory.stat of what
# is in use for files only and is given up when memory is short.
V2_FILES = (("memory.max", "memory.high"), "memory.current", "inactive_file")
V1_FILES = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def measure_free_memory(device: torch.device) -> int:
    """Return the bytes that this rank may still take on `device`. Collective.

    The ranks that have the same GPU or the same host's main memory get equal shares. Memory that
    PyTorch holds for this process without using it counts as free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        place = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
    else:
        free, place = read_free_main_memory(), (socket.gethostname(), "")
    places: list = [None] * dist.get_world_size()
    # No rank may begin to fill the memory that another still measures: this waits for all.
    dist.all_gather_object(places, place)
    return free // places.count(place)


def read_free_main_memory() -> int:
    """Return the bytes of main memory that processes like this one can still take.

    That is what the machine has available, or less within a cgroup, which Slurm, Kubernetes and
    Docker limit memory with.
    """
    free = psutil.virtual_memory().available
    for limit_files, use_file, cache_key, folder in _list_cgroups():
        limits = [_read_number(folder / name) for name in limit_files]
        used = _read_number(folder / use_file)
        known = [limit for limit in limits if limit is not None]
        if known and used is not None:
            free = min(free, min(known) - used + _read_stat(folder / "memory.stat", cache_key))
    return max(free, 0)


def _list_cgroups() -> list[tuple[tuple[str, ...], str, str, Path]]:
    """List the folders of this process's memory cgroups, from the innermost to the root.

    Inside of a container the root may be the container's own cgroup, and the path one that only the
    host has: folders that are not there are left out by the reader.
    """
    found = []
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # no Linux
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files, root = V2_FILES, CGROUPS
        elif "memory" in controllers.split(","):
            files, root = V1_FILES, CGROUPS / "memory"
        else:
            continue
        inner = root / path.lstrip("/")
        folders = [inner, *inner.parents]
        found += [(*files, folder) for folder in folders if folder.is_relative_to(root)]
    return found


def _read_number(path: Path) -> int | None:
    """Read a file of one number; None where there is none, or "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_stat(path: Path, key: str) -> int:
    """Read the number of `key` in memory.stat; 0 where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    numbers = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(numbers.get(key, 0))


def free_dropped_models() -> None:
    """Free the models that no variable holds any more: sharded ones are in cycles of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held.

    On a GPU by PyTorch's count, else resident in main memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gather_peak_memory(device: torch.device) -> list[int]:
    """Return the most bytes that each rank has held, by rank. Collective."""
    peaks = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, read_peak_memory(device))
    return peaks
