"""The versions of the packages whose private parts are used."""

import functools
import importlib.metadata

import torch.distributed as dist

# With which the tests were run.
TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "peft": "0.21.2"}


@functools.cache
def warn_on_other_versions() -> None:
    """Print one line on rank 0 if a package's version is not the tested one; once in a process.

    A build's own suffix, as in 2.13.0+cpu, does not count.
    """
    if dist.get_rank() != 0:
        return
    others = []
    for package, tested in TESTED.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # whoever needs it will say so
        if installed.partition("+")[0] != tested:
            others.append(f"{package} {installed} (tested: {tested})")
    if others:
        print(
            "warning: private parts of these packages are used and may differ: "
            + ", ".join(others),
            flush=True,
        )
