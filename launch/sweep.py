"""Run what is missing of a table, and stop at nothing: a run that fails is named at the end, and the others go on.

Each run is launch/train.py in a folder of its own, named by its row and a hash of its resolved recipe, so runs made
under other settings stay apart. Ended or killed at any time, the same command goes on. Exit codes: 0 all runs are
there, 1 some failed, 2 something to mend before any can start, 75 told to stop."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

if (
    not __package__
):  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from launch import cli
from launch.runtime.errors import UserError, run
from launch.runtime.files import write_text
from launch.sweeps.table import Sweep, Unit, diverged, read_table

EXAMPLES = """\
  python launch/sweep.py --table miniature --jobs 2
  python launch/sweep.py --table maths --launch "deepspeed --num_gpus 8" --set model.name=/models/llama-2-7b
  python launch/sweep.py --table maths --slurm maths.sbatch; sbatch maths.sbatch
  python launch/report.py --table maths --set model.name=/models/llama-2-7b        # with the sweep's own options"""
LAUNCH = Path(__file__).resolve().parent
STOPPED = 75  # sysexits.h: a temporary failure
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Job:
    """One process to run: a training, or a measurement of what it made."""

    name: str
    command: tuple[str, ...]  # without the launcher
    makes: Path  # the file that is there when it is done
    log: Path


def jobs_of(sweep: Sweep, unit: Unit) -> list[Job]:
    """Every job of a unit that is known so far, done or not; those of its own rate follow from the choice."""
    scored = sweep.scored(unit)
    runs = [*sweep.choosing(unit).values(), *(run for of in scored.values() for run in of)]
    logs = sweep.folder / "logs"
    jobs = {}
    for of in runs:
        folder = sweep.folder / of.name
        command = (str(LAUNCH / "train.py"), *of.arguments, "--output", str(folder))
        jobs[of.name] = Job(of.name, command, folder / "results.json", logs / f"{of.name}.log")
    if sweep.table.spectra:
        first = scored.get("own", scored.get("recipe", []))[:1]
        for folder in (
            sweep.folder / of.name
            for of in first
            if (sweep.folder / of.name / "results.json").is_file()
        ):
            name = f"{folder.name}-after"
            command = (str(LAUNCH / "calibrate.py"), "--after", str(folder))
            jobs[name] = Job(
                name, command, folder / "after" / "effective_rank.json", logs / f"{name}.log"
            )
    return list(jobs.values())


def expected(sweep: Sweep, unit: Unit) -> int:
    """How many jobs the unit will have had, at most, when all are done."""
    waiting = len(sweep.table.seeds) if sweep.grid(unit) and sweep.own_rate(unit) is None else 0
    known = jobs_of(sweep, unit)
    after = sweep.table.spectra and not any(job.name.endswith("-after") for job in known)
    return len(known) + waiting + after


def is_done(job: Job) -> bool:
    """Whether another start would change nothing."""
    return job.makes.is_file() or diverged(job.makes.parent)


class Stop:
    """Set by a signal; passed on to the running jobs, which save and end."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def run_jobs(
    list_jobs: Callable[[], list[Job]], slots: int, launcher: list[str], stop: Stop
) -> Iterator[tuple[Job, str | None]]:
    """Run the jobs that `list_jobs` gives, and those that it gives once others are done, `slots` at a time.

    Yields each as it ends, with None or why it failed. When asked to stop it tells the running ones and waits for them.
    """
    ended: set[str] = set()
    running: dict[subprocess.Popen, Job] = {}
    told = False
    while True:
        if not stop.asked and len(running) < slots:
            busy = ended | {job.name for job in running.values()}
            waiting = [job for job in list_jobs() if job.name not in busy and not is_done(job)]
            for job in waiting[: slots - len(running)]:
                running[_start(job, slots, launcher)] = job
        if not running:
            return
        while not (over := [process for process in running if process.poll() is not None]):
            if stop.asked and not told:
                told = True
                for process in running:
                    os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.1)
        for process in over:
            job = running.pop(process)
            ended.add(job.name)
            yield job, None if is_done(job) else _reason(job, process.returncode)


def _start(job: Job, slots: int, launcher: list[str]) -> subprocess.Popen:
    environment = dict(os.environ)
    if (
        slots > 1
    ):  # runs side by side share the cores; a single one shares them out among its ranks itself
        environment.setdefault(
            "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // slots))
        )
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        log = files.enter_context(job.log.open("a"))
        log.write(f"$ {shlex.join([*launcher, *job.command])}\n")
        log.flush()
        # A group of its own, which Ctrl-C does not reach: it is told to stop once, by us, and so when we are killed.
        return subprocess.Popen(
            [*launcher, *job.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _reason(job: Job, code: int) -> str:
    lines = [
        line.strip() for line in job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    last = next((line for line in reversed(lines) if line), "")
    return f"exit code {code}: {last}"


def sweep_all(sweep: Sweep, units: list[Unit], slots: int, launcher: list[str]) -> int:
    """Run what is missing of `units`; the command's exit code."""
    stop = Stop()

    def list_jobs() -> list[Job]:
        return list({job.name: job for unit in units for job in jobs_of(sweep, unit)}.values())

    failed: dict[str, str] = {}
    done = sum(map(is_done, list_jobs()))
    print(f"{sweep.name}: {done} runs of {_total(sweep, units)} are in {sweep.folder}", flush=True)
    started, new = time.monotonic(), 0
    terminal = sys.stderr.isatty()
    with tqdm(
        total=_total(sweep, units), initial=done, desc=sweep.name, unit="run", disable=not terminal
    ) as bar:
        for job, why in run_jobs(list_jobs, slots, launcher, stop):
            new += 1
            if why and not stop.asked:
                failed[job.name] = why
            total = bar.total = _total(sweep, units)
            bar.set_postfix_str(job.name)
            bar.update()
            if not terminal:
                left = (total - done - new) * (time.monotonic() - started) / new / 60
                print(
                    f"{done + new}/{total} {job.name}: {why or 'done'}; {left:.0f} min left",
                    flush=True,
                )
    for unit in units if not stop.asked else []:
        if (
            sweep.grid(unit)
            and sweep.own_rate(unit) is None
            and not any(of.name in failed for of in sweep.choosing(unit).values())
        ):
            failed[unit.label] = (
                "every learning rate of its grid diverged; give the row a lower grid"
            )
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if stop.asked:
        print("stopped; the same command goes on", file=sys.stderr, flush=True)
        return STOPPED
    if failed:
        print(
            f"{len(failed)} failed; logs are in {sweep.folder / 'logs'}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return 0


def _total(sweep: Sweep, units: list[Unit]) -> int:
    return sum(expected(sweep, unit) for unit in units)


def write_slurm(path: Path, sweep: Sweep, arguments: list[str]) -> None:
    """One batch script whose array has a task for each unit of the sweep: launch/cluster/sweep.sbatch, filled in.

    Raises UserError if that file, which a cluster may need changes to, lacks a line that is filled in.
    """
    template = LAUNCH / "cluster" / "sweep.sbatch"
    lines = template.read_text(encoding="utf-8").splitlines()
    filled = {
        "#SBATCH --job-name=astra-sweep": f"#SBATCH --job-name={sweep.name}",
        "#SBATCH --array=0": f"#SBATCH --array=0-{len(sweep.units()) - 1}",
        "# set -- --table miniature": f"set -- {shlex.join(arguments)}",
    }
    for old, new in filled.items():
        if lines.count(old) != 1:
            raise UserError(f"--slurm: {template} must have the line {old!r} once; bring it back")
        lines[lines.index(old)] = new
    write_text(path, "\n".join(lines) + "\n")
    print(f"{path}: {len(sweep.units())} tasks; submit it from the repository with: sbatch {path}")


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    cli.add_table(parser)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs side by side, on CPUs (default 1)"
    )
    parser.add_argument(
        "--launch",
        default=sys.executable,
        help='what starts a run, such as "deepspeed --num_gpus 8" (default python)',
    )
    parser.add_argument(
        "--only",
        type=int,
        metavar="INDEX",
        help="only this row of --list, as a task of an array does",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the rows and their runs, and run nothing"
    )
    parser.add_argument(
        "--slurm", type=Path, metavar="FILE", help="write a batch script with a task for each row"
    )
    arguments = parser.parse_args()
    if arguments.table is None:
        raise UserError("--table: is required")
    if arguments.jobs < 1:
        raise UserError("--jobs: must be above 0")
    sweep = read_table(arguments.table, arguments.set, arguments.output)
    units = sweep.units()
    if arguments.only is not None and not 0 <= arguments.only < len(units):
        raise UserError(f"--only: {arguments.only} is none of the rows 0 to {len(units) - 1}")
    if arguments.slurm:
        options = [word for override in arguments.set for word in ("--set", override)]
        options += ["--output", str(arguments.output)] if arguments.output else []
        write_slurm(arguments.slurm, sweep, ["--table", arguments.table, *options])
    elif arguments.list:
        for index, unit in enumerate(units):
            print(f"{index} {unit.label}{'' if unit.value is None else f' {unit.value}'}")
            for job in jobs_of(sweep, unit):
                print(f"    {'done   ' if is_done(job) else 'missing'} {job.name}")
    else:
        wanted = units if arguments.only is None else [units[arguments.only]]
        sys.exit(sweep_all(sweep, wanted, arguments.jobs, shlex.split(arguments.launch)))


if __name__ == "__main__":
    run(main)
