"""Runs that are killed, stopped, frozen and starved, for real: the same command goes on, and not a bit is lost."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bench.faults import ENGINES, ROOT, Fault, Run, command, same, saved, steps

pytestmark = pytest.mark.xdist_group("faults")

WORKER = Path(__file__).parent / "workers" / "fault.py"


def line_of(
    engine: str, arguments: list[object], folder: Path, script: Path = ROOT / "launch/train.py"
) -> list[str]:
    launcher, ranks = ENGINES[engine]
    return command(
        launcher, ranks, *arguments, "--engine", engine, "--output", folder / "run", script=script
    )


@pytest.fixture
def assert_goes_on(
    launch: Callable, arguments: list[object], undisturbed: Callable[[str], Path]
) -> Callable[..., str]:
    """The same command finishes the run, from the checkpoint of step `after`, with the undisturbed run's numbers."""

    def check(engine: str, folder: Path, after: int | None, launcher: str | None = None) -> str:
        line = [*arguments, "--engine", engine, "--output", folder / "run"]
        again = launch("launch/train.py", *line, ranks=ENGINES[engine][1], launcher=launcher)
        if after is None:
            assert "going on" not in again.stdout
        else:
            assert f"going on after step {after} of 12" in again.stdout
        assert [step for step, *_ in steps(folder / "run")] == list(range(1, 13))
        assert same(folder / "run", undisturbed(engine))
        assert json.loads((folder / "run" / "state.json").read_text())["state"] == "finished"
        return again.stdout + again.stderr

    return check


def test_a_run_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    run = Run(["bash", "-c", "sleep 600 & setsid sleep 600 & kill -STOP $$"], tmp_path / "log")
    stopped = psutil.Process(run.launcher.pid)
    run.wait_for(lambda: len(run.processes()) == 3 and stopped.status() == psutil.STATUS_STOPPED)
    run.kill()
    assert not run.processes()
    assert run.launcher.returncode == -signal.SIGKILL


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
    engine: str,
    fault: Fault,
    start_run: Callable[..., Run],
    arguments: list[object],
    assert_goes_on: Callable[..., str],
    tmp_path: Path,
) -> None:
    run = start_run(line_of(engine, arguments, tmp_path), tmp_path / "log")
    run.wait_for(lambda: len(steps(tmp_path / "run")) >= 7)
    assert run.hit(fault)
    assert run.wait() < 30
    assert run.launcher.returncode != 0
    if fault.target != "all":
        assert f"error: {fault.target} (" in run.output()
        assert "training step" in run.last_words()
        assert 'launch/train.py", line' not in run.output()  # no traceback of ours
    launcher = "deepspeed" if engine == "zero3" else None  # test_network.py starts torchrun again
    assert_goes_on(engine, tmp_path, saved(tmp_path / "run"), launcher=launcher)


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
    engine: str,
    fault: Fault,
    start_run: Callable[..., Run],
    arguments: list[object],
    assert_goes_on: Callable[..., str],
    tmp_path: Path,
) -> None:
    run = start_run(line_of(engine, ["asked", *arguments], tmp_path, WORKER), tmp_path / "log")
    run.wait_for(lambda: len(steps(tmp_path / "run")) == 4)
    assert run.hit(fault)
    assert run.wait() < 30
    assert len(steps(tmp_path / "run")) == saved(tmp_path / "run") == 5  # the step it was in
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "preempted"
    assert_goes_on(engine, tmp_path, 5)


@pytest.mark.parametrize(
    ("point", "engine", "after", "words"),
    [
        ("calibration", "fsdp", None, "error: rank 1 ("),
        ("write", "fsdp", 3, "error: rank 0 ("),
        ("export", "single", 12, None),  # the only rank is gone: nobody says so
        ("stall", "fsdp", 3, "error: rank 1 ("),
    ],
)
def test_a_fault_at_a_given_point(
    point: str,
    engine: str,
    after: int | None,
    words: str | None,
    launch: Callable,
    arguments: list[object],
    assert_goes_on: Callable[..., str],
    tmp_path: Path,
) -> None:
    line = [point, *arguments, "--engine", engine, "--output", tmp_path / "run", "--stall", 6]
    began = time.monotonic()
    done = launch(WORKER, *line, ranks=ENGINES[engine][1], check=False)
    assert time.monotonic() - began < 60
    assert done.returncode not in (0, 2)
    assert words in done.stderr if words else "error" not in done.stderr
    if point == "stall":
        assert "stalled; no progress for" in done.stderr
        assert "training step 5" in done.stderr
        assert (
            "(launch/data/batches.py:" in done.stderr
        )  # where it waits for the batch that does not come
    assert not (tmp_path / "run" / "results.json").exists()
    assert_goes_on(engine, tmp_path, after)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    damage: str,
    undisturbed: Callable[[str], Path],
    assert_goes_on: Callable[..., str],
    tmp_path: Path,
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
    printed = assert_goes_on("single", tmp_path, 9)
    assert f"checkpoint {newest} is damaged and passed over" in printed


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_the_run_with_one_line(
    launch: Callable,
    arguments: list[object],
    undisturbed: Callable[[str], Path],
    assert_goes_on: Callable[..., str],
    tmp_path: Path,
) -> None:
    def size_of(pattern: str) -> int:
        return sum(path.stat().st_size for path in undisturbed("single").glob(pattern))

    # Room for the calibration and a checkpoint or two.
    size = size_of("calibration/*") + 2 * size_of("checkpoints/step-0000003/*")
    room = tmp_path / "room"
    room.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(room)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.strip()}")
    try:
        line = [*arguments, "--engine", "single", "--output", room / "run"]
        done = launch("launch/train.py", *line, check=False)
        assert done.returncode == 2
        errors = [text for text in done.stderr.splitlines() if text.startswith("error:")]
        assert len(errors) == 1, done.stderr[-3000:]
        assert "No space left on device" in errors[0] or "StorageFull" in errors[0]
        assert "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(room)], check=True)
        assert_goes_on("single", room, saved(room / "run"))
    finally:
        subprocess.run(["umount", str(room)], check=True)


def test_a_second_start_is_refused_while_the_first_one_runs(
    launch: Callable, start_run: Callable[..., Run], arguments: list[object], tmp_path: Path
) -> None:
    run = start_run(line_of("single", arguments, tmp_path), tmp_path / "log")
    run.wait_for(lambda: len(steps(tmp_path / "run")) >= 1)
    os.kill(run.launcher.pid, signal.SIGSTOP)  # it must still be there when the second one gives up
    line = ["none", *arguments, "--engine", "single", "--output", tmp_path / "run"]
    second = launch(WORKER, *line, check=False)
    assert second.returncode == 2
    assert (
        f"is in use by host {os.uname().nodename}, pid {run.launcher.pid}; stop that run"
        in second.stderr
    )


def test_another_recipe_is_refused_and_a_finished_run_stays(
    launch: Callable, arguments: list[object], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed("single"), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    line = [*arguments, "--engine", "single", "--output", tmp_path / "run"]
    assert "holds this run, finished" in launch("launch/train.py", *line).stdout
    (tmp_path / "run" / "results.json").unlink()
    other = launch("launch/train.py", *line, "--set", "train.lr=0.5", check=False)
    assert other.returncode == 2
    assert "holds an unfinished run with another train.lr (0.02, now 0.5)" in other.stderr
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")
    }
