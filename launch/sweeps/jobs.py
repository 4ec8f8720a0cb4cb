"""Run the missing jobs of a sweep, several side by side. A job that fails does not end the others.

Each training is launch/train.py with a folder of its own. Killed at any time, the same command
resumes: finished runs are skipped, and the others resume from their last checkpoint.
"""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from tqdm import tqdm

from launch.run.folder import EFFECTIVE_RANKS
from launch.run.progress import has_terminal
from launch.run.results import RESULTS
from launch.runtime.launcher import is_alive
from launch.sweeps.curves import list_exhausted
from launch.sweeps.inputs import check_inputs
from launch.sweeps.kept import keep_runs
from launch.sweeps.rates import LOWEST_STEP, make_rate
from launch.sweeps.remaining import describe_remaining, format_minutes
from launch.sweeps.table import Cell, Run, Sweep, has_diverged, has_ended

COMMANDS = Path(__file__).resolve().parents[1]  # the folder of train.py and calibrate.py
STOPPED = 75  # sysexits.h: a temporary failure
PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_SECONDS = 0.1  # between two looks at the running jobs


@dataclass(frozen=True)
class Job:
    """One process to run: a training, or a measurement of a finished run."""

    name: str
    command: tuple[str, ...]  # without the launcher
    output: Path  # the file that exists once the job is done
    log: Path


class Stop:
    """A request to stop, made by a signal. The running jobs are told; they save and end."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._request)

    def _request(self, *_: object) -> None:
        """Handle a signal."""
        self.requested = True


def list_jobs(sweep: Sweep, cell: Cell) -> list[Job]:
    """List every job of a cell that is known so far, done or not.

    The runs at the cell's own learning rate are known once that is chosen, and the measurement of
    effective ranks once the run that it measures has finished.
    """
    logs = sweep.folder / "logs"
    jobs = {}
    for run in sweep.list_runs(cell):
        folder = sweep.folder / run.name
        command = (str(COMMANDS / "train.py"), *run.arguments, "--output", str(folder))
        output = sweep.find_folder(run) / RESULTS
        jobs[run.name] = Job(run.name, command, output, logs / f"{run.name}.log")
    measured = _find_measured_run(sweep, cell)
    if measured is not None:
        name = f"{measured.name}-after"
        command = (str(COMMANDS / "calibrate.py"), "--after", str(measured))
        jobs[name] = Job(name, command, measured / EFFECTIVE_RANKS, logs / f"{name}.log")
    return list(jobs.values())


def _find_measured_run(sweep: Sweep, cell: Cell) -> Path | None:
    """Return the folder of the run whose effective ranks the table wants.

    Returns:
        None until it has finished. A run that is kept without its effective ranks has none: the
        measurement needs the trained model.
    """
    first_run = _find_first_run(sweep, cell)
    if not sweep.table.spectra or first_run is None:
        return None
    kept = sweep.kept / first_run.name
    if (kept / EFFECTIVE_RANKS).is_file():
        return kept
    folder = sweep.folder / first_run.name
    return folder if (folder / RESULTS).is_file() else None


def _find_first_run(sweep: Sweep, cell: Cell) -> Run | None:
    """Return the cell's run of the first seed; None until its learning rate is chosen."""
    eval_runs = sweep.list_eval_runs(cell)
    runs = eval_runs.get("own", eval_runs.get("recipe"))
    return runs[0] if runs else None


def count_jobs(sweep: Sweep, cell: Cell) -> int:
    """Count the jobs that the cell will have had when all are done, without further rates."""
    jobs = list_jobs(sweep, cell)
    count = len(jobs)
    rates = sweep.table.learning_rates
    if rates and sweep.choose_rate(cell) is None:
        count += len(sweep.table.seeds) * (3 if rates.neighbours else 1)
    if sweep.table.spectra and not any(job.output.name == EFFECTIVE_RANKS.name for job in jobs):
        # A run that is kept without its effective ranks, or diverged, is not measured any more.
        first_run = _find_first_run(sweep, cell)
        count += first_run is None or not has_ended(sweep.find_folder(first_run))
    return count


def is_done(job: Job) -> bool:
    """Return whether a new launch of the job would change nothing."""
    return job.output.is_file() or has_diverged(job.output.parent)


def print_jobs(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Print each of `cells` with its index in the table, and under it its jobs that are known so far."""
    for index, cell in enumerate(sweep.list_cells()):
        if cell not in cells:
            continue
        print(f"{index} {cell.name}")
        for job in list_jobs(sweep, cell):
            print(f"    {'done   ' if is_done(job) else 'missing'} {job.name}")


def run_jobs(
    list_known_jobs: Callable[[], list[Job]], num_slots: int, launcher: list[str], stop: Stop
) -> Iterator[tuple[Job, str | None]]:
    """Run the jobs that are not done, `num_slots` at a time.

    Once `stop` is requested no job is started, and the running ones are told to stop.

    Args:
        list_known_jobs: lists all jobs. It is called again whenever a job has ended, since the
            results of that job may lead to others.
        launcher: the words that come before every job's command.

    Yields:
        Each job as it ends, with None or why it failed.
    """
    ended: set[str] = set()
    running: dict[subprocess.Popen, Job] = {}
    is_told = False
    while True:
        if not stop.requested and len(running) < num_slots:
            started = ended | {job.name for job in running.values()}
            missing = [
                job for job in list_known_jobs() if job.name not in started and not is_done(job)
            ]
            for job in missing[: num_slots - len(running)]:
                running[_start_job(job, num_slots, launcher)] = job
        if not running:
            return
        while not (finished := [one for one in running if _has_ended(one, stop.requested)]):
            if stop.requested and not is_told:
                is_told = True
                for process in running:
                    _tell_to_stop(process, launcher)
            time.sleep(POLL_SECONDS)
        for process in finished:
            job = running.pop(process)
            ended.add(job.name)
            yield job, None if is_done(job) else _describe_failure(job, process.returncode)


def _has_ended(process: subprocess.Popen, is_stopping: bool) -> bool:
    """Return whether a job's launcher has ended and, while the sweep stops, its ranks too.

    On one machine `deepspeed` itself ends at SIGTERM at once, while its ranks save (the end of `main` in
    deepspeed/launcher/runner.py).
    """
    return process.poll() is not None and not (is_stopping and _has_processes(process.pid))


def _has_processes(group: int) -> bool:
    """Return whether a process group has one that runs; a zombie may wait for its parent for ever."""
    for number in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(number) == group and is_alive(psutil.Process(number)):
                return True
    return False


def _is_srun(launcher: list[str]) -> bool:
    """Return whether Slurm's srun starts the ranks."""
    return bool(launcher) and Path(launcher[0]).name == "srun"


def _choose_stop_signal(launcher: list[str]) -> signal.Signals:
    """Return the signal at which a run of `launcher` saves and ends.

    srun sends its ranks SIGKILL when it gets SIGTERM or SIGHUP. It forwards SIGUSR1, which the
    ranks take as they take SIGTERM (`_srun_signal_mgr` in Slurm's src/srun/libsrun/srun_job.c).
    """
    return signal.SIGUSR1 if _is_srun(launcher) else signal.SIGTERM


def _tell_to_stop(process: subprocess.Popen, launcher: list[str]) -> None:
    """Have a running job save and end."""
    number = _choose_stop_signal(launcher)
    if _is_srun(launcher):
        # Not its group: the ranks are not in it, and srun's own helper is.
        process.send_signal(number)
    else:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, number)


def _start_job(job: Job, num_slots: int, launcher: list[str]) -> subprocess.Popen:
    """Start a job. What it prints is appended to its log, after its command line."""
    environment = dict(os.environ)
    if num_slots > 1:  # a single job divides the cores among its ranks itself
        threads = max(1, len(os.sched_getaffinity(0)) // num_slots)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        log = files.enter_context(job.log.open("a"))
        log.write(f"$ {shlex.join([*launcher, *job.command])}\n")
        log.flush()
        # In a session of its own Ctrl-C does not reach the job: only `run_jobs` tells it to stop.
        return subprocess.Popen(
            [*launcher, *job.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=partial(_stop_with_parent, _choose_stop_signal(launcher)),
        )


def _stop_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent is gone, however that ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _describe_failure(job: Job, code: int) -> str:
    """Return a job's exit code and the last line of its log that is not empty."""
    text = job.log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else ''}"


def run_sweep(
    sweep: Sweep, cells: list[Cell], num_slots: int, launcher: list[str], keep: bool = False
) -> int:
    """Run the missing jobs of `cells` and print which failed.

    Args:
        keep: whether to copy the small files of every finished run to `sweep.kept`.

    Returns:
        The command's exit code: 0 if all jobs are done, 1 if some failed, STOPPED if told to stop.

    Raises:
        UserError: finished runs were made with different inputs, so none may choose a rate beside
            the others. Running jobs are told to stop.
    """
    stop = Stop()

    def list_known_jobs() -> list[Job]:
        jobs = {}
        for cell in cells:
            jobs |= {job.name: job for job in list_jobs(sweep, cell)}
        return list(jobs.values())

    def count_all() -> int:
        return sum(count_jobs(sweep, cell) for cell in cells)

    def take_stock() -> None:
        check_inputs(sweep)
        if keep:
            keep_runs(sweep, cells)

    take_stock()
    total, num_before = count_all(), sum(map(is_done, list_known_jobs()))
    where = f"{sweep.folder} and {sweep.kept}" if sweep.kept.is_dir() else f"{sweep.folder}"
    print(f"{sweep.name}: {num_before} runs of {total} are in {where}", flush=True)
    for line in describe_remaining(sweep, cells, total - num_before, num_slots):
        print(f"{sweep.name}: {line}", flush=True)
    failures: dict[str, str] = {}
    started = time.monotonic()
    with tqdm(
        total=total,
        initial=num_before,
        desc=sweep.name,
        unit="run",
        disable=not has_terminal(),
    ) as bar:
        ended = run_jobs(list_known_jobs, num_slots, launcher, stop)
        for num_ended, (job, failure) in enumerate(ended, start=1):
            if failure and not stop.requested:  # a job that is told to stop has not failed
                failures[job.name] = failure
            take_stock()
            total = count_all()
            bar.total = total
            bar.set_postfix_str(job.name)
            bar.update()
            if bar.disable:
                done = num_before + num_ended
                minutes = (total - done) * (time.monotonic() - started) / num_ended / 60
                state, left = failure or "done", format_minutes(minutes)
                print(f"{done}/{total} {job.name}: {state}; {left} left", flush=True)
    if not stop.requested:
        failures |= _find_exhausted_grids(sweep, cells)
    return _print_outcome(sweep, failures, stop)


def _find_exhausted_grids(sweep: Sweep, cells: list[Cell]) -> dict[str, str]:
    """Return a failure for each cell whose tuning runs have all diverged, by its name."""
    found = {}
    for cell in list_exhausted(sweep):
        if cell in cells:
            tried = list(sweep.read_tuning_losses(cell))
            is_least = tried[0] <= make_rate(LOWEST_STEP)
            found[cell.name] = (
                f"every learning rate from {tried[0]:g} to {tried[-1]:g} diverged; "
                + (
                    "look for what is wrong with the row"
                    if is_least
                    else "give the row a lower grid"
                )
            )
    return found


def _print_outcome(sweep: Sweep, failures: dict[str, str], stop: Stop) -> int:
    """Print what failed and return the command's exit code."""
    for name, failure in failures.items():
        print(f"failed: {name}: {failure}", file=sys.stderr)
    if stop.requested:
        print("stopped; the same command resumes", file=sys.stderr, flush=True)
        return STOPPED
    if failures:
        logs = sweep.folder / "logs"
        print(f"{len(failures)} failed; logs are in {logs}", file=sys.stderr, flush=True)
        return 1
    return 0
