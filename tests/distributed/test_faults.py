"""Kill, stop, freeze and starve real runs, and start the same command again.

Proves that every process of an interrupted run ends in time, that one line names the rank that is
at fault, that a damaged checkpoint is skipped, and that the resumed run equals an undisturbed one
bit for bit. Real launchers; the full disk needs root, to mount a small file system. About 3
minutes.
"""

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

from tests.support.paths import ROOT, WORKERS
from tests.support.processes import ENGINES, Fault, Run, make_command, make_set_options
from tests.support.runs import find_newest_step, read_state, read_steps, runs_are_equal

pytestmark = pytest.mark.xdist_group("faults")

NUM_STEPS = 12
END_LIMIT = 30  # seconds within which every process of an interrupted run is gone


def make_train_command(
    engine: str, arguments: list[object], folder: Path, script: Path = ROOT / "launch/train.py"
) -> list[str]:
    """Return the command that trains into FOLDER/run under the engine's own launcher."""
    options = [*arguments, "--engine", engine, "--output", folder / "run"]
    return make_command(*ENGINES[engine], *options, script=script)


@pytest.fixture
def assert_resumes(
    launch: Callable, arguments: list[object], undisturbed: Callable[[str], Path]
) -> Callable[..., str]:
    """Run the same command, check that it resumes after step `after`, and return what it prints.

    The finished run must have the undisturbed run's numbers. With `after` None it starts anew.
    """

    def check(engine: str, folder: Path, after: int | None, launcher: str | None = None) -> str:
        line = [*arguments, "--engine", engine, "--output", folder / "run"]
        again = launch("launch/train.py", *line, ranks=ENGINES[engine][1], launcher=launcher)
        if after is None:
            assert "resuming" not in again.stdout
        else:
            assert f"resuming after step {after} of {NUM_STEPS}" in again.stdout
        numbers = [step for step, *_ in read_steps(folder / "run")]
        assert numbers == list(range(1, NUM_STEPS + 1))
        assert runs_are_equal(folder / "run", undisturbed(engine))
        assert read_state(folder / "run") == "finished"
        return again.stdout + again.stderr

    return check


def test_a_run_is_killed_with_everything_that_it_started(tmp_path: Path) -> None:
    run = Run(["bash", "-c", "sleep 600 & setsid sleep 600 & kill -STOP $$"], tmp_path / "log")
    shell = psutil.Process(run.launcher.pid)

    def is_stopped_with_both_children() -> bool:
        return len(run.list_processes()) == 3 and shell.status() == psutil.STATUS_STOPPED

    run.wait_for(is_stopped_with_both_children)
    run.kill()
    assert not run.list_processes()
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
def test_a_killed_run_resumes(
    engine: str,
    fault: Fault,
    start_run: Callable[..., Run],
    arguments: list[object],
    assert_resumes: Callable[..., str],
    tmp_path: Path,
) -> None:
    run = start_run(make_train_command(engine, arguments, tmp_path), tmp_path / "log")
    run.wait_for(lambda: len(read_steps(tmp_path / "run")) >= 7)
    assert run.send(fault)
    assert run.wait() < END_LIMIT
    assert run.launcher.returncode != 0
    if fault.target != "all":
        output = run.read_output()
        assert f"error: {fault.target} (" in output
        assert "training step" in run.find_error_line()
        assert 'launch/train.py", line' not in output  # no traceback of ours
    launcher = "deepspeed" if engine == "zero3" else None  # test_network.py starts torchrun again
    assert_resumes(engine, tmp_path, find_newest_step(tmp_path / "run"), launcher=launcher)


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ("single", Fault("launcher", signal.SIGTERM)),
        ("fsdp", Fault("rank 1", signal.SIGUSR1)),
        # torchrun passes SIGTERM on to its ranks. How a rank handles it is tested with `single`
        # above, and how ranks agree on the step to stop after with SIGUSR1 to one of them.
        pytest.param("fsdp", Fault("launcher", signal.SIGTERM), marks=pytest.mark.full),
        # deepspeed dies of SIGTERM as it does of SIGKILL, and tells nobody.
        ("zero3", Fault("launcher", signal.SIGKILL)),
    ],
    ids=str,
)
def test_a_run_that_is_asked_to_stop_saves_its_step(
    engine: str,
    fault: Fault,
    start_run: Callable[..., Run],
    arguments: list[object],
    assert_resumes: Callable[..., str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    line = make_train_command(engine, ["signal", *arguments], tmp_path, WORKERS / "fault.py")
    run = start_run(line, tmp_path / "log")
    run.wait_for(lambda: len(read_steps(folder)) == 4)
    assert run.send(fault)
    assert run.wait() < END_LIMIT
    assert len(read_steps(folder)) == find_newest_step(folder) == 5  # the step it was in
    assert read_state(folder) == "preempted"
    assert_resumes(engine, tmp_path, 5)


@pytest.mark.parametrize(
    ("point", "engine", "after", "words"),
    [
        ("calibration", "fsdp", None, "error: rank 1 ("),
        ("write", "fsdp", 3, "error: rank 0 ("),
        pytest.param("rehearsal", "fsdp", 0, "error: rank 0 (", marks=pytest.mark.full),
        ("export", "single", 12, None),  # no other rank is there to name the one that is gone
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
    assert_resumes: Callable[..., str],
    tmp_path: Path,
) -> None:
    line = [point, *arguments, "--engine", engine, "--output", tmp_path / "run", "--stall", 6]
    began = time.monotonic()
    done = launch(WORKERS / "fault.py", *line, ranks=ENGINES[engine][1], check=False)
    assert time.monotonic() - began < 60
    assert done.returncode not in (0, 2)
    assert words in done.stderr if words else "error" not in done.stderr
    if point == "stall":
        assert "stalled; no progress for" in done.stderr
        assert "training step 5" in done.stderr
        assert "(launch/data/batches.py:" in done.stderr  # where it waits for the next batch
    assert not (tmp_path / "run" / "results.json").exists()
    assert_resumes(engine, tmp_path, after)


def damage_checkpoint(checkpoint: Path, damage: str) -> None:
    """Truncate the tensors of a checkpoint, flip one bit of them, or remove a file."""
    tensors = checkpoint / "tensors.safetensors"
    match damage:
        case "truncated":
            os.truncate(tensors, 5000)
        case "flipped":
            content = bytearray(tensors.read_bytes())
            content[len(content) // 2] ^= 1
            tensors.write_bytes(content)
        case "missing":
            (checkpoint / "metrics.jsonl").unlink()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_skipped(
    damage: str,
    undisturbed: Callable[[str], Path],
    assert_resumes: Callable[..., str],
    tmp_path: Path,
) -> None:
    shutil.copytree(undisturbed("single"), tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    newest = tmp_path / "run" / "checkpoints" / "step-0000012"
    damage_checkpoint(newest, damage)
    printed = assert_resumes("single", tmp_path, 9)
    assert f"checkpoint {newest} is damaged and skipped" in printed


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_the_run_with_one_line(
    launch: Callable,
    arguments: list[object],
    undisturbed: Callable[[str], Path],
    assert_resumes: Callable[..., str],
    tmp_path: Path,
) -> None:
    def measure(pattern: str) -> int:
        return sum(path.stat().st_size for path in undisturbed("single").glob(pattern))

    # Room for the calibration and a checkpoint or two.
    size = measure("calibration/*") + 2 * measure("checkpoints/step-0000003/*")
    room = tmp_path / "room"
    room.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(room)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
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
        assert_resumes("single", room, find_newest_step(room / "run"))
    finally:
        subprocess.run(["umount", str(room)], check=True)


def test_a_second_start_is_refused_while_the_first_one_runs(
    launch: Callable, start_run: Callable[..., Run], arguments: list[object], tmp_path: Path
) -> None:
    run = start_run(make_train_command("single", arguments, tmp_path), tmp_path / "log")
    run.wait_for(lambda: len(read_steps(tmp_path / "run")) >= 1)
    # Stopped, it is still there when the second one gives up.
    os.kill(run.launcher.pid, signal.SIGSTOP)
    line = ["none", *arguments, "--engine", "single", "--output", tmp_path / "run"]
    second = launch(WORKERS / "fault.py", *line, check=False)
    assert second.returncode == 2
    holder = f"host {os.uname().nodename}, pid {run.launcher.pid}"
    assert f"is in use by {holder}; stop that run" in second.stderr


def test_another_recipe_is_refused_and_a_finished_run_stays(
    launch: Callable, arguments: list[object], undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(undisturbed("single"), tmp_path / "run")

    def list_changes() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}

    before = list_changes()
    line = [*arguments, "--engine", "single", "--output", folder]
    assert "holds this run, finished" in launch("launch/train.py", *line).stdout
    (folder / "results.json").unlink()
    other = launch("launch/train.py", *line, "--set", "train.lr=0.5", check=False)
    assert other.returncode == 2
    assert "holds an unfinished run with another train.lr (0.02, now 0.5)" in other.stderr
    assert list_changes() == before


@pytest.mark.parametrize(
    ("point", "engine", "code", "words"),
    [
        ("memory", "fsdp", 2, "out of memory: "),
        pytest.param("memory", "single", 2, "out of memory: ", marks=pytest.mark.full),
        pytest.param("mistake", "fsdp", 1, "KeyError: 'exp_avg'", marks=pytest.mark.full),
        pytest.param("rank0", "fsdp", 1, "KeyError: 'exp_avg'", marks=pytest.mark.full),
        pytest.param("mistake", "single", 1, "KeyError: 'exp_avg'", marks=pytest.mark.full),
        pytest.param("writer", "fsdp", 1, "exporting: KeyError", marks=pytest.mark.full),
        pytest.param("refusal", "fsdp", 2, "tracking: not on this node", marks=pytest.mark.full),
        pytest.param("early", "fsdp", 2, "tracking: not on this node", marks=pytest.mark.full),
        pytest.param("unsaveable", "fsdp", 2, "RuntimeError: no reverse", marks=pytest.mark.full),
        pytest.param("library", "fsdp", 1, "RuntimeError: no reverse", marks=pytest.mark.full),
        pytest.param("small", "single", 2, "could not be saved at its end", marks=pytest.mark.full),
        pytest.param("disk", "fsdp", 2, "No space left on device", marks=pytest.mark.full),
    ],
)
def test_any_error_is_the_runs_state(
    point: str,
    engine: str,
    code: int,
    words: str,
    launch: Callable,
    arguments: list[object],
    tmp_path: Path,
) -> None:
    """A real failed allocation, a mistake in the code, and a full disk, which is simulated."""
    line = [point, *arguments, "--engine", engine, "--output", tmp_path / "run"]
    if point == "small":
        line += make_set_options(["export.rank=2", "data.held_out=5"])
    done = launch(WORKERS / "fault.py", *line, ranks=ENGINES[engine][1], check=False)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["state"], state["exit_code"]) == ("error", code)
    assert words in state["error"] and "\n" not in state["error"]
    assert done.returncode == code
    lines = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    if code == 2:
        assert len(lines) == 1 and words in lines[0], done.stderr[-3000:]
        assert "Traceback" not in done.stderr
    else:
        assert done.stderr.count("Traceback") == 1, done.stderr[-3000:]
    if point in ("memory", "refusal", "early") and engine == "fsdp":
        assert lines[0].startswith("error: rank 1 (")


@pytest.mark.full
@pytest.mark.parametrize("point", ["plot", "card"])
def test_what_nothing_depends_on_does_not_fail_a_trained_run(
    point: str, launch: Callable, arguments: list[object], undisturbed: Callable, tmp_path: Path
) -> None:
    line = [point, *arguments, "--engine", "single", "--output", tmp_path / "run"]
    done = launch(WORKERS / "fault.py", *line)
    assert "could not be written: KeyError: 'exp_avg'" in done.stdout
    assert read_state(tmp_path / "run") == "finished"
    assert runs_are_equal(tmp_path / "run", undisturbed("single"))
