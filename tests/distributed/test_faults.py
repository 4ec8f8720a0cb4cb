"""Runs that are killed, stopped, frozen and starved, for real: the same command goes on, and not a bit is lost."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.faults import ENGINES, Fault, Run, command, same, steps

pytestmark = pytest.mark.xdist_group("faults")

WORKER = Path(__file__).with_name("fault_worker.py")


def line_of(engine: str, arguments: list[object], folder: Path, *more: object, script: Path | None = None) -> list[str]:
    launcher, ranks = ENGINES[engine]
    options = {"script": script} if script else {}
    return command(launcher, ranks, *more, *arguments, "--engine", engine, "--output", folder / "run", **options)


def assert_goes_on(line: list[str], folder: Path, undisturbed: Path, after: int | None) -> None:
    """The same command finishes the run, from the checkpoint of step `after`, with the undisturbed run's numbers."""
    again = Run(line, folder / "again")
    again.wait()
    assert again.launcher.returncode == 0, again.output()[-3000:]
    if after is None:
        assert "going on" not in again.output()
    else:
        assert f"going on after step {after} of 12" in again.output()
    assert [step for step, *_ in steps(folder / "run")] == list(range(1, 13))
    assert same(folder / "run", undisturbed)
    assert json.loads((folder / "run" / "state.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ("zero3", Fault("rank 1", signal.SIGKILL)),
        ("fsdp", Fault("rank 0", signal.SIGKILL)),
        ("single", Fault("all", signal.SIGKILL)),
    ],
    ids=str,
)
def test_a_killed_run_goes_on(
    engine: str, fault: Fault, arguments: list[object], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    line = line_of(engine, arguments, tmp_path)
    run = Run(line, tmp_path / "log")
    run.wait_for(lambda: len(steps(tmp_path / "run")) >= 7)
    assert run.hit(fault)
    assert run.wait() < 30
    assert run.launcher.returncode != 0
    if fault.target != "all":
        assert f"error: {fault.target} (" in run.output()
        assert "training step" in run.last_words()
        assert 'launch/train.py", line' not in run.output()  # no traceback of ours
    reached = max(step for step, *_ in steps(tmp_path / "run"))
    assert_goes_on(line, tmp_path, undisturbed(engine), reached - reached % 3)


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ("single", Fault("launcher", signal.SIGTERM)),
        ("fsdp", Fault("rank 1", signal.SIGUSR1)),
        ("fsdp", Fault("launcher", signal.SIGTERM)),
        (
            "zero3",
            Fault("launcher", signal.SIGKILL),
        ),  # SIGTERM alike: it tells nobody
    ],
    ids=str,
)
def test_a_run_that_is_asked_to_stop_saves_its_step(
    engine: str, fault: Fault, arguments: list[object], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    line = line_of(engine, arguments, tmp_path)
    run = Run(line, tmp_path / "log")
    run.wait_for(lambda: len(steps(tmp_path / "run")) >= 4)
    assert run.hit(fault)
    assert run.wait() < 30
    done = len(steps(tmp_path / "run"))
    assert 4 <= done < 12
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:07d}" / "manifest.json").is_file()
    assert_goes_on(line, tmp_path, undisturbed(engine), done)


@pytest.mark.parametrize(
    ("point", "engine", "after", "words"),
    [
        ("calibration", "fsdp", None, "error: rank 1 ("),
        ("write", "fsdp", 3, "error: rank 0 ("),
        ("export", "single", 12, ""),
        ("stall", "fsdp", 3, "error: rank 1 ("),
    ],
)
def test_a_fault_at_a_given_point(
    point: str,
    engine: str,
    after: int | None,
    words: str,
    arguments: list[object],
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run = Run(line_of(engine, arguments, tmp_path, point, "--stall", 6, script=WORKER), tmp_path / "log")
    assert run.wait() < 60
    assert run.launcher.returncode not in (0, 2)
    assert words in run.output()
    if point == "stall":
        assert "stalled; no progress for" in run.output()
        assert "training step 5" in run.output()
        assert "fault_worker.py" in run.output()  # where it hangs
    assert not (tmp_path / "run" / "results.json").exists()
    assert_goes_on(line_of(engine, arguments, tmp_path), tmp_path, undisturbed(engine), after)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    damage: str, arguments: list[object], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed("single"), tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    newest = tmp_path / "run" / "checkpoints" / "step-0000012"
    match damage:
        case "truncated":
            os.truncate(newest / "tensors.safetensors", 5000)
        case "flipped":
            content = bytearray((newest / "tensors.safetensors").read_bytes())
            content[len(content) // 2] ^= 1
            (newest / "tensors.safetensors").write_bytes(content)
        case "missing":
            (newest / "metrics.jsonl").unlink()
    line = line_of("single", arguments, tmp_path)
    assert_goes_on(line, tmp_path, undisturbed("single"), 9)
    assert f"checkpoint {newest} is damaged and passed over" in (tmp_path / "again").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_the_run_with_one_line(
    arguments: list[object], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    def size_of(pattern: str) -> int:
        return sum(path.stat().st_size for path in undisturbed("single").glob(pattern))

    # Room for the calibration and a checkpoint or two.
    size = size_of("calibration/*") + 2 * size_of("checkpoints/step-0000003/*")
    room = tmp_path / "room"
    room.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(room)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.strip()}")
    try:
        line = line_of("single", arguments, room)
        run = Run(line, tmp_path / "log")
        assert run.wait() < 60
        assert run.launcher.returncode == 2
        errors = [text for text in run.output().splitlines() if text.startswith("error:")]
        assert len(errors) == 1, run.output()[-3000:]
        assert "No space left on device" in errors[0] or "StorageFull" in errors[0]
        assert "Traceback" not in run.output()
        kept = sorted(path.name for path in (room / "run" / "checkpoints").glob("step-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(room)], check=True)
        assert_goes_on(line, room, undisturbed("single"), int(kept[-1].removeprefix("step-")))
    finally:
        subprocess.run(["umount", str(room)], check=True)


def test_a_second_start_is_refused_while_the_first_one_runs(arguments: list[object], tmp_path: Path) -> None:
    line = line_of("single", arguments, tmp_path)
    run = Run(line, tmp_path / "log")
    run.wait_for(lambda: len(steps(tmp_path / "run")) >= 1)
    os.kill(run.launcher.pid, signal.SIGSTOP)  # it must still be there when the second one gives up
    second = Run(line_of("single", arguments, tmp_path, "none", script=WORKER), tmp_path / "second")
    assert second.wait() < 60
    assert second.launcher.returncode == 2
    assert f"is in use by host {os.uname().nodename}, pid {run.launcher.pid}; stop that run" in second.output()
    run.launcher.kill()
    run.wait()


def test_another_recipe_is_refused_and_a_finished_run_stays(
    arguments: list[object], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed("single"), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    line = line_of("single", arguments, tmp_path)
    again = Run(line, tmp_path / "log")
    again.wait()
    assert again.launcher.returncode == 0
    assert "holds this run, finished" in again.output()
    (tmp_path / "run" / "results.json").unlink()
    other = Run([*line, "--set", "train.lr=0.5"], tmp_path / "log")
    other.wait()
    assert other.launcher.returncode == 2
    assert "holds an unfinished run with another train.lr (0.02, now 0.5)" in other.output()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
