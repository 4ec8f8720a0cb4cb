"""Write a model's weights as transformers lays them out: safetensors files and their index."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from launch.runtime import watchdog
from launch.runtime.distributed import run_on_rank0
from launch.runtime.files import write_json

# Bytes of a file; a tensor that is larger has a file of its own. Rank 0 holds one file's tensors.
MAX_BYTES = 5 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers' names


def write_shards(
    folder: Path,
    parts: Iterable[Mapping[str, Tensor]],
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Write tensors to `folder` as they come, file by file, and an index last. Collective.

    Weights of an earlier, unfinished call are removed first. A model of one file has no index.

    Args:
        parts: each is name -> tensor on rank 0, and empty on the other ranks. All ranks yield as
            many parts, so that making one may be collective.
        convert: makes of a part what is written, on rank 0. Tensors may be views, and on any
            device.
        max_bytes: of a file.

    Raises:
        UserError: on every rank, if a file cannot be written.
        ValueError: two tensors have one name.
    """
    writer = _ShardWriter(folder, max_bytes)
    run_on_rank0(writer.open)
    for part in parts:
        watchdog.heartbeat()
        # An error of rank 0 must reach the other ranks before they make the next part.
        run_on_rank0(lambda part=part: writer.add(convert(part)))
    run_on_rank0(writer.close)


class _ShardWriter:
    """Collects tensors and writes them whenever a file is full. Only rank 0 calls its methods."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.pending: dict[str, Tensor] = {}  # of the file that is being filled
        self.addresses: set[int] = set()  # of the same
        self.pending_bytes = self.total_bytes = 0
        self.files: dict[str, int] = {}  # name of a tensor -> number of its file, from 1
        self.num_written = 0

    def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.safetensors", INDEX):
            for path in self.folder.glob(pattern):
                path.unlink()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self.files:
                raise ValueError(f"two weights are called {name}")
            if self.pending and self.pending_bytes + tensor.nbytes > self.max_bytes:
                self._write()
            value = _own(tensor)
            if value.data_ptr() in self.addresses:  # the same tensor under another name
                value = value.clone()
            self.addresses.add(value.data_ptr())
            self.pending[name] = value
            self.pending_bytes += tensor.nbytes
            self.files[name] = self.num_written + 1

    def close(self) -> None:
        self._write()
        if self.num_written == 1:
            self._name_file(1).rename(self.folder / SINGLE)
            return
        final = [f"model-{i + 1:05d}-of-{self.num_written:05d}" for i in range(self.num_written)]
        for number, stem in enumerate(final, start=1):
            self._name_file(number).rename(self.folder / f"{stem}.safetensors")
        weight_map = {name: f"{final[i - 1]}.safetensors" for name, i in self.files.items()}
        metadata = {"total_size": self.total_bytes}
        write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": weight_map})

    def _write(self) -> None:
        self.num_written += 1
        # transformers looks for the format in the metadata.
        save_file(self.pending, self._name_file(self.num_written), metadata={"format": "pt"})
        self.total_bytes += self.pending_bytes
        self.pending, self.addresses, self.pending_bytes = {}, set(), 0

    def _name_file(self, number: int) -> Path:
        """Return the path of a file until it is known how many there are."""
        return self.folder / f"part-{number:05d}.safetensors"


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU in memory of its own, contiguous.

    A view keeps all of another tensor's memory alive, and safetensors refuses two views of one.
    """
    tensor = tensor.detach().cpu()
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
