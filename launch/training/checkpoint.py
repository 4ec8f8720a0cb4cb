"""Checkpoints of a run: all that training resumes from, alike for every engine and world size.

A checkpoint is a folder `checkpoints/step-<n>` of three files:

    tensors.safetensors   see below
    metrics.jsonl         the metrics of the steps done
    manifest.json         written last: step, facts, the SHA-256 of the other two and its own

The facts are what was measured before the first step (launch.run.results.RunFacts). A checkpoint is
written to a folder `tmp-step-<n>` and then renamed, so `step-<n>` is complete or absent. Damage on
disk after that is detected by the checksums: a checkpoint is intact if they match.

A tensor is named `<parameter>.<kind>`, the parameter as in
launch.training.trainable.find_trained_parameters. The kinds are

    initial               an adapter's factors A0 and B0, from which W_res is rebuilt; at step 0 there
                          are only these
    trained               the parameter in fp32: the optimiser's master copy where the model holds
                          the parameter in bf16
    exp_avg, exp_avg_sq   AdamW's moments

Nothing else needs saving. The examples of a step follow from (recipe, step); so do the learning rate
and AdamW's step counter. Dropout masks follow from (recipe, step, rank, micro batch), so with
dropout a resume is exact only at the same world size and micro batch.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from astra.adapter import Factors
from launch.engines.base import MOMENTS, STATE_KINDS, Engine, TrainState
from launch.run.best import find_best
from launch.run.metrics import METRICS, Metrics
from launch.runtime import watchdog
from launch.runtime.compat.deepspeed_parts import count_elements, get_full_shape
from launch.runtime.distributed import broadcast_tensor, run_on_rank0
from launch.runtime.errors import DivergedError, UserError
from launch.runtime.files import hash_file, sync_file, sync_folder, write_json
from launch.runtime.shortages import describe_space
from launch.runtime.units import GIB

FOLDER = "checkpoints"  # in the run folder
STEP_GLOB = f"step-{'[0-9]' * 7}"
REHEARSAL = "tmp-rehearsal"  # beside the checkpoints
# What reading a damaged checkpoint may raise.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint, as every rank knows it. Only rank 0 need see its files."""

    folder: Path
    step: int
    facts: dict  # the facts that `save` was given
    history: list[Metrics]  # of the steps done


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsed checkpoint was; the same on every rank, but for num_bytes."""

    folder: Path
    num_bytes: int  # that a whole checkpoint takes, on rank 0
    unreached: list[str]  # parameters that no gradient has reached: their moments are 0


class CheckpointStore:
    """The checkpoints of one run, of which the newest few are kept, and the best one if asked."""

    def __init__(self, run_folder: Path, num_kept: int, keep_best: str | None = None) -> None:
        """Open the checkpoints in `run_folder`.

        Args:
            num_kept: train.keep.
            keep_best: name of the score whose best step's checkpoint is kept too.
        """
        self.folder = run_folder / FOLDER
        self.num_kept = num_kept
        self.keep_best = keep_best
        self.damaged: set[Path] = set()  # found by rank 0; they do not count as kept ones

    def find_newest(self) -> Checkpoint | None:
        """Return the newest intact checkpoint, and print which ones are skipped. Rank 0 calls it.

        One whose best step has no intact checkpoint is skipped too: that step is to be trained
        again.
        """
        for path in sorted(self.folder.glob(STEP_GLOB), reverse=True):
            try:
                found = _read_checkpoint(path)
            except UNREADABLE as error:
                print(f"checkpoint {path} is damaged and skipped: {error}", flush=True)
                self.damaged.add(path)
                continue
            best = self.find_best_step(found.history)
            if best is None or best == found.step or self._is_intact(best):
                return found
            print(
                f"checkpoint {path} is skipped: that of step {best}, the best by "
                f"{self.keep_best}, is missing or damaged",
                flush=True,
            )
        return None

    def find_best_step(self, history: Sequence[Metrics]) -> int | None:
        """Return the best step by the score whose checkpoint is kept; None where there is none."""
        if self.keep_best is None:
            return None
        best = find_best(history, self.keep_best)
        return None if best is None else best.step

    def read_best(self, step: int) -> Checkpoint:
        """Read the checkpoint of the best step. Rank 0 calls it.

        Raises RuntimeError if it is damaged: the same command may succeed.
        """
        path = self.get_path(step)
        try:
            return _read_checkpoint(path)
        except UNREADABLE as error:
            raise RuntimeError(
                f"checkpoint {path}, the best by {self.keep_best}, is damaged ({error}); the same "
                "command trains again from the newest one before it, or from the start"
            ) from None

    def _is_intact(self, step: int) -> bool:
        try:
            _read_checkpoint(self.get_path(step))
        except UNREADABLE:
            return False
        return True

    def get_path(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return self.folder / f"step-{step:07d}"

    def save(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        initial: Mapping[str, Factors],
        state: TrainState | None,
        facts: dict,
        history: list[Metrics],
    ) -> None:
        """Write the checkpoint of `step`, then remove all but the newest few and the best. Collective.

        The tensors are gathered one after another. Only rank 0 keeps them, in the CPU's memory,
        until they are written.

        Args:
            parameters: name -> trained parameter.
            initial: on rank 0, module name -> A0, B0 of its adapter.
            state: None at step 0, when what is trained follows from `initial` and the base.
            facts: JSON values, which `find_newest` returns.

        Raises:
            UserError: on every rank, if it cannot be written. Older ones are left as they were.
        """
        tensors = _gather_tensors(parameters, initial, state)

        def write() -> None:
            self._write(step, tensors, facts, history)
            self._prune(step, self.find_best_step(history))

        with watchdog.without_stall_limit():
            run_on_rank0(write)

    def rehearse(
        self,
        parameters: Mapping[str, nn.Parameter],
        initial: Mapping[str, Factors],
        state: TrainState,
        facts: dict,
        history: list[Metrics],
    ) -> "Rehearsal":
        """Read all that a checkpoint holds, and write it with one of its tensors. Collective.

        Names, files and format are those of `save`. All tensors but the smallest parameter's are
        written without values. The folder REHEARSAL is left to the caller; a start that finds one
        of a launch that was killed removes it with the next checkpoint.

        Args:
            parameters, initial, facts, history: see `save`.
            state: after at least one step.

        Raises:
            UserError: on every rank, if a file cannot be written.
        """
        smallest = min(parameters, key=lambda name: count_elements(parameters[name]))
        tensors, num_bytes, unreached = {}, 0, []
        for name, kind, value in _read_states(parameters, state):
            shape = get_full_shape(parameters[name])
            if value.shape != shape:
                raise ValueError(f"{name}.{kind} has the shape {value.shape}, not {shape}")
            if kind == MOMENTS[0] and not value.any():
                unreached.append(name)
            num_bytes += value.nbytes
            value = value if name == smallest else value.new_empty(0)
            tensors[f"{name}.{kind}"] = value.cpu().contiguous()
        for key, value in _name_initial(initial):
            num_bytes += value.nbytes
            tensors[key] = value.new_empty(0)
        folder = self.folder / REHEARSAL

        def write() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            self._write_files(folder, len(history), tensors, facts, history)

        run_on_rank0(write)
        return Rehearsal(folder, num_bytes, unreached)

    def _write(
        self, step: int, tensors: dict[str, Tensor], facts: dict, history: list[Metrics]
    ) -> None:
        """Write one checkpoint beside its place, and rename it. Raises UserError."""
        path = self.get_path(step)
        aside = self.folder / f"tmp-{path.name}"
        try:
            for left in self.folder.glob("tmp-*"):  # by a launch that was killed
                shutil.rmtree(left)
            self._write_files(aside, step, tensors, facts, history)
            # One that `find_newest` skipped (it or its best step's checkpoint is damaged or missing);
            # it makes way for the new one.
            if path.exists():
                shutil.rmtree(path)
            aside.rename(path)
            self.damaged.discard(path)
            sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            needed = sum(tensor.nbytes for tensor in tensors.values())
            raise UserError(
                f"checkpoint of step {step}: cannot write {path}: {error}; it takes "
                f"{needed / GIB:.2f} GiB and {describe_space(self.folder)}: make room, or lower "
                "train.keep, and start the same command again, which resumes from the one before"
            ) from None

    @staticmethod
    def _write_files(
        folder: Path, step: int, tensors: dict[str, Tensor], facts: dict, history: list[Metrics]
    ) -> None:
        """Make the folder and write a checkpoint's files, the manifest last. Raises OSError."""
        folder.mkdir(parents=True)
        save_file(tensors, folder / TENSORS)
        lines = "".join(json.dumps(metrics) + "\n" for metrics in history)
        (folder / METRICS).write_text(lines, encoding="utf-8")
        sums = {}
        for name in (TENSORS, METRICS):
            sync_file(folder / name)
            sums[name] = hash_file(folder / name)
        manifest = {"step": step, "sha256": sums, "facts": facts}
        checksum = {"manifest_sha256": _hash_manifest(manifest)}
        write_json(folder / MANIFEST, manifest | checksum)

    def _prune(self, step: int, best: int | None) -> None:
        """Of the checkpoints up to `step`, keep the newest intact ones and that of the step `best`.

        Later ones are those that `find_newest` skipped: they or their best step's checkpoint are
        damaged or missing. They stay until training reaches their step and replaces them.
        """
        paths = sorted(self.folder.glob(STEP_GLOB))
        older = [path for path in paths if int(path.name.removeprefix("step-")) <= step]
        intact = [path for path in older if path not in self.damaged]
        kept = intact[-self.num_kept :]
        if best is not None:
            kept.append(self.get_path(best))
        for path in older:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


def name_best_step(
    training: Iterator[Metrics], store: CheckpointStore, history: Sequence[Metrics]
) -> Iterator[Metrics]:
    """Yield the steps of a training; where it diverges, the error says where the best step is.

    Args:
        history: of the steps done; it grows.
    """
    try:
        yield from training
    except DivergedError as error:
        best = store.find_best_step(history)
        if best is None:
            raise
        raise DivergedError(
            f"{error}; step {best}, the best by {store.keep_best}, stays in {store.get_path(best)}, "
            "but only a run that ends exports it, and this one diverges at each start: train another"
        ) from None


def _gather_tensors(
    parameters: Mapping[str, nn.Parameter],
    initial: Mapping[str, Factors],
    state: TrainState | None,
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors on rank 0, nothing on the others. Collective."""
    is_rank0 = dist.get_rank() == 0
    tensors = {}
    if state is not None:
        for name, kind, value in _read_states(parameters, state):
            if is_rank0:
                tensors[f"{name}.{kind}"] = value.cpu().contiguous()
    if is_rank0:
        for key, value in _name_initial(initial):
            tensors[key] = value.contiguous()
    return tensors


def _read_states(
    parameters: Mapping[str, nn.Parameter], state: TrainState
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield parameter's name, kind and whole value of every STATE_KINDS. Collective."""
    for name, parameter in parameters.items():
        watchdog.heartbeat()
        for kind, value in zip(STATE_KINDS, state.read_state(parameter), strict=True):
            yield name, kind, value


def _name_initial(initial: Mapping[str, Factors]) -> Iterator[tuple[str, Tensor]]:
    """Yield the initial factors by their names in a checkpoint."""
    for name, factors in initial.items():
        yield f"{name}.A.initial", factors.a
        yield f"{name}.B.initial", factors.b


def make_initial_reader(
    checkpoint: Checkpoint, device: torch.device
) -> Callable[[str, Tensor], tuple[Tensor, Tensor]]:
    """Return a function (module name, W) -> (A0, B0) that reads a checkpoint.

    Rank 0 reads, and every rank gets the factors: its calls are collective, in the same order.
    """

    def read_initial_factors(name: str, _weight: Tensor) -> tuple[Tensor, Tensor]:
        a0 = _read_tensor(checkpoint, f"{name}.A.initial", device)
        b0 = _read_tensor(checkpoint, f"{name}.B.initial", device)
        return a0, b0

    return read_initial_factors


def restore_training(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    state: TrainState,
    device: torch.device,
) -> None:
    """Set trained parameters and AdamW's state to what the checkpoint holds. Collective."""
    if checkpoint.step == 0:
        return

    def read_states() -> Iterator[tuple[nn.Parameter, Tensor, Tensor, Tensor]]:
        for name, parameter in parameters.items():
            values = [_read_tensor(checkpoint, f"{name}.{kind}", device) for kind in STATE_KINDS]
            yield parameter, *values

    state.restore_state(checkpoint.step, read_states())


def restore_trained(
    checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], engine: Engine
) -> None:
    """Set trained parameters, and nothing of the optimiser, to a checkpoint's. Collective."""
    for name, parameter in parameters.items():
        watchdog.heartbeat()
        engine.write(parameter, _read_tensor(checkpoint, f"{name}.trained", engine.device))


def _read_tensor(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    """Read one tensor on rank 0 and broadcast it. Collective."""
    value = None
    if dist.get_rank() == 0:
        with safe_open(checkpoint.folder / TENSORS, framework="pt") as file:
            value = file.get_tensor(name)
    return broadcast_tensor(value, device)


def _read_checkpoint(path: Path) -> Checkpoint:
    """Read an intact checkpoint. Raises one of UNREADABLE for a damaged one."""
    manifest = _verify_checkpoint(path)
    lines = (path / METRICS).read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    return Checkpoint(path, manifest["step"], manifest["facts"], history)


def _verify_checkpoint(path: Path) -> dict:
    """Return the manifest of an intact checkpoint. Raises one of UNREADABLE for a damaged one."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if manifest.pop("manifest_sha256") != _hash_manifest(manifest):
        raise ValueError(f"{MANIFEST} does not match its checksum")
    for name in (TENSORS, METRICS):
        if hash_file(path / name) != manifest["sha256"][name]:
            raise ValueError(f"{name} does not match its checksum")
    if path.name != f"step-{manifest['step']:07d}":
        raise ValueError(f"{MANIFEST} is of step {manifest['step']}")
    return manifest


def _hash_manifest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
