"""Find the files that a model's weights are read from, and read what their headers promise.

No value of a weight is read: a header holds the name, dtype, shape and place of every tensor.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from launch.runtime.compat.transformers_parts import resolve_weight_files
from launch.runtime.errors import UserError

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
LFS_POINTER = b"version https://git-lfs"
# What to do with weights in another format. Another AutoModel would write a head of its own.
CONVERT = (
    "load it with transformers' AutoModel (a decoder with AutoModelForCausalLM), write it and its "
    "tokenizer with save_pretrained, and give that folder"
)


class ModelFault(ValueError):
    """What is wrong with a model's files, and what to do, without the field that names the model."""


@contextmanager
def naming_model(field: str) -> Iterator[None]:
    """Let a ModelFault become a UserError that begins with `field`."""
    try:
        yield
    except ModelFault as fault:
        raise UserError(f"{field}: {fault}") from None


class StoredTensor(NamedTuple):
    """What a file's header says of one tensor."""

    file: Path
    dtype: str  # in the words of the format: F32, BF16, F8_E4M3
    shape: tuple[int, ...]


class WeightFiles(NamedTuple):
    """The files that transformers reads for a model, in its order."""

    files: tuple[Path, ...]
    index: Mapping[str, str] | None  # tensor -> name of its file; None for a single file

    def read_headers(self) -> dict[str, StoredTensor]:
        """Return name -> tensor of all files.

        Raises:
            ModelFault: a file is missing or not whole, or two files hold the same tensor.
        """
        missing = [path for path in self.files if not path.is_file()]
        if missing:
            raise ModelFault(
                f"{missing[0]} is missing ({len(missing)} of the {len(self.files)} files "
                "that the model's index names); copy or download it again"
            )
        tensors: dict[str, StoredTensor] = {}
        for path in self.files:
            for name, tensor in _read_header(path).items():
                if name in tensors:
                    raise ModelFault(
                        f"{name} is in {tensors[name].file.name} and in {path}; keep one"
                    )
                tensors[name] = tensor
        return tensors

    def check_index(self, tensors: Mapping[str, StoredTensor], ignored: set[str]) -> None:
        """Check that the index names what the files hold, and no more.

        Args:
            tensors: what `read_headers` returned.
            ignored: tensors that loading ignores, which need not be in the index.

        Raises:
            ModelFault: it does not.
        """
        if self.index is None:
            return
        for name, file in self.index.items():
            if name not in tensors or tensors[name].file.name != file:
                raise ModelFault(
                    f"the index says that {name} is in {file}, but it is not there; copy or download "
                    "the model again"
                )
        for name, tensor in tensors.items():
            if name not in self.index and name not in ignored:
                raise ModelFault(
                    f"{tensor.file} holds {name}, which the index does not name; copy or download "
                    "the model again"
                )


def find_weight_files(folder: Path, config: PretrainedConfig) -> WeightFiles:
    """Find the files that transformers would read for the model in `folder`.

    It decides itself: a single file comes before an index, and only files that the index names
    are read. Files beside them are never read.

    Raises:
        ModelFault: there are no safetensors weights, or the index cannot be used.
    """
    try:
        paths, index = resolve_weight_files(folder, config)
    except OSError:
        raise ModelFault(_describe_no_weights(folder)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFault(
            f"cannot read the index of the weights in {folder} "
            f"({type(error).__name__}: {str(error)[:100]}); copy or download it again"
        ) from None
    if not paths or not all(path.suffix == ".safetensors" for path in paths):
        raise ModelFault(_describe_no_weights(folder))
    for path in paths:
        if path.parent != folder:
            raise ModelFault(
                f"the index of the weights in {folder} names {path}, which is in another "
                "folder; put the file beside the index"
            )
    return WeightFiles(tuple(paths), index)


def _describe_no_weights(folder: Path) -> str:
    """Describe a folder without weights that are read."""
    others: list[str] = []
    for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf"):
        others += [path.name for path in folder.glob(pattern)]
    if others:
        return f"{folder} has weights as {min(others)} only, not as safetensors; {CONVERT}"
    return (
        f"{folder} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}; if the model has its "
        f"weights in another format, {CONVERT}"
    )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of one file.

    safetensors checks that the header can be read, that every tensor has the bytes of its dtype and
    shape, and that the file ends where the last one does.

    Raises:
        ModelFault: the file is not whole, or cannot be read.
    """
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_slice(name)
                tensors[name] = StoredTensor(path, tensor.get_dtype(), tuple(tensor.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ModelFault(_describe_damage(path, error)) from None
    return tensors


def _describe_damage(path: Path, error: Exception) -> str:
    """Say what is wrong with a file that safetensors cannot read, and what to do."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as unreadable:
        return f"{path} cannot be read: {unreadable.strerror}"
    if start == LFS_POINTER:
        return (
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder, or "
            "download it"
        )
    return (
        f"{path} is no whole safetensors file ({size} bytes; {str(error)[:120]}); copy or download "
        "it again"
    )
