"""Kill a run at random moments, start the same command again, and hold the result against an undisturbed run.

    python bench/faults.py --kills 20

Every kill is of a run of its own: real processes under a real launcher, on the quickstart's model. A kill hits one
rank, the launcher, or every process, with SIGKILL or a signal to stop, at a random moment between start and end.
Measured are: how long until every process is gone, what was printed, the step it went on from, and whether the losses
and gradient norms of all steps and the exported adapter equal the undisturbed run's bit for bit.
"""

import argparse
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LIMIT = 120.0  # seconds within which every process of a killed run must be gone
LAUNCHERS = {
    "python": (sys.executable,),
    "deepspeed": (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus"),
    "torchrun": (
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc_per_node",
    ),
}
ENGINES = {
    "zero3": ("deepspeed", 2),
    "fsdp": ("torchrun", 2),
    "single": ("python", 1),
}  # launcher and ranks
LAST_WORDS = re.compile(r"^(error|stopped|rank \d|.*(gone|stalled|stopped)).*", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """Whom a signal hits."""

    target: str  # `rank I`, `launcher` or `all`
    number: signal.Signals

    def __str__(self) -> str:
        return f"{self.number.name} to {self.target}"


FAULTS = [
    Fault("rank 0", signal.SIGKILL),
    Fault("rank 1", signal.SIGKILL),
    Fault("launcher", signal.SIGKILL),
    Fault("all", signal.SIGKILL),
    Fault("launcher", signal.SIGTERM),
    Fault("rank 1", signal.SIGUSR1),
]


def command(
    launcher: str, ranks: int, *arguments: object, script: Path = ROOT / "launch/train.py"
) -> list[str]:
    """The command line that trains with `arguments` on `ranks` ranks."""
    start = list(LAUNCHERS[launcher])
    if launcher != "python":
        start.append(str(ranks))
    if launcher == "deepspeed":
        start += ["--master_port", str(random.randrange(20000, 60000))]
    return [*start, str(script), *map(str, arguments)]


class Run:
    """A started command and all its processes, known by a mark in their environment; its output goes to a file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log, self.mark = log, secrets.token_hex(8)
        with log.open("w") as file:
            self.launcher = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env=ENVIRONMENT | {"FAULTS_RUN": self.mark},
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All that are alive, with or without their launcher."""
        alive = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get("FAULTS_RUN") == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    alive.append(process)
            except (psutil.Error, OSError):
                continue
        return alive

    def rank(self, number: int) -> psutil.Process | None:
        """The process of a rank, if it is there."""
        for process in self.processes():
            try:
                environment = process.environ()
                if environment.get("RANK") == str(number):
                    return process
            except psutil.Error:
                continue
        return None

    def hit(self, fault: Fault) -> bool:
        """Send the signal; False if its target is not there (yet, or any more)."""
        if fault.target == "launcher":
            targets = [psutil.Process(self.launcher.pid)] if self.launcher.poll() is None else []
        elif fault.target == "all":
            targets = self.processes()
        else:
            found = self.rank(int(fault.target.split()[1]))
            targets = [found] if found else []
        for process in targets:
            try:
                process.send_signal(fault.number)
            except psutil.NoSuchProcess:
                continue
        return bool(targets)

    def wait(self, limit: float = LIMIT) -> float:
        """Seconds until every process is gone. Raises TimeoutError, with the rest killed, after `limit`."""
        began = time.monotonic()
        while True:
            self.launcher.poll()
            rest = self.processes()
            if not rest:
                self.launcher.wait()
                return time.monotonic() - began
            if time.monotonic() - began > limit:
                self.kill()
                raise TimeoutError(
                    f"{len(rest)} processes left after {limit} s\n{self.output()[-3000:]}"
                )
            time.sleep(0.05)

    def kill(self) -> None:
        """End what is left of it, stopped processes and those that begin meanwhile too."""
        while self.hit(Fault("all", signal.SIGKILL)):
            time.sleep(0.05)
        self.launcher.wait()

    def wait_for(self, condition: Callable[[], bool], limit: float = LIMIT) -> None:
        """Wait until `condition` holds. Raises TimeoutError if it does not, or the run ends first."""
        began = time.monotonic()
        while not condition():
            if self.launcher.poll() is not None or time.monotonic() - began > limit:
                raise TimeoutError(f"the condition was not met\n{self.output()[-3000:]}")
            time.sleep(0.01)

    def last_words(self) -> str:
        """The line that says why it ended."""
        found = [match.group(0) for match in LAST_WORDS.finditer(self.output())]
        return found[-1] if found else ""


def steps(folder: Path) -> list[tuple]:
    """(step, loss, gradient norm) of every whole line in a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def saved(folder: Path) -> int:
    """The step of a run's newest whole checkpoint."""
    manifests = (folder / "checkpoints").glob("step-*/manifest.json")
    return max(int(path.parent.name.removeprefix("step-")) for path in manifests)


def same(a: Path, b: Path) -> bool:
    """Whether two finished runs have the same steps and exports, bit for bit."""
    weights = [(folder / "lora" / "adapter_model.safetensors").read_bytes() for folder in (a, b)]
    return steps(a) == steps(b) and weights[0] == weights[1]


def disturb(command: list[str], folder: Path, fault: Fault, after: float, log: Path) -> dict | None:
    """Start, hit after `after` seconds, wait, start again to the end; None if the run had ended before the hit."""
    run = Run(command, log)
    time.sleep(after)
    before = len(steps(folder))
    if not run.hit(fault):
        run.wait()
        return None
    seconds = run.wait()
    state = folder / "state.json"
    record = {
        "fault": str(fault),
        "after": round(after, 1),
        "steps_before": before,
        "ended_after": round(seconds, 1),
        "state": json.loads(state.read_text())["state"] if state.is_file() else None,
        "line": run.last_words(),
    }
    again = Run(command, log.with_suffix(".again"))
    again.wait()
    if again.launcher.returncode:
        raise RuntimeError(f"the second start failed\n{again.output()[-3000:]}")
    resumed = re.search(r"going on after step (\d+)", again.output())
    return record | {"went_on_after": int(resumed.group(1)) if resumed else None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="default %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the kinds and moments (default %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "bench" / "faults.json",
        help="default bench/faults.json",
    )
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    settings = [
        "train.max_steps=20",
        "train.checkpoint_every=3",
        "adapter.dropout=0.1",
        "eval.suites=[]",
    ]
    options = [
        "--recipe",
        "quickstart",
        *(word for setting in settings for word in ("--set", setting)),
    ]
    engines = ("zero3", "fsdp")
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed, seconds = {}, {}
        warm = command(
            *ENGINES["zero3"],
            *options,
            "--set",
            "train.max_steps=1",
            "--output",
            Path(scratch, "warm"),
        )
        Run(warm, Path(scratch, "log")).wait(
            limit=1200
        )  # the first start ever pretrains the quickstart's base
        for engine in engines:
            undisturbed[engine] = Path(scratch, engine)
            line = command(
                *ENGINES[engine], *options, "--engine", engine, "--output", undisturbed[engine]
            )
            seconds[engine] = Run(line, Path(scratch, "log")).wait()
        while len(records) < arguments.kills:
            number = len(records)
            engine = engines[number % len(engines)]
            fault = FAULTS[number // len(engines) % len(FAULTS)]
            folder = Path(scratch, f"run{draw.randrange(10**9)}")
            line = command(*ENGINES[engine], *options, "--engine", engine, "--output", folder)
            record = disturb(
                line, folder, fault, draw.uniform(1, seconds[engine]), Path(scratch, "log")
            )
            if record is None:
                continue
            record = {"engine": engine} | record | {"same": same(folder, undisturbed[engine])}
            records.append(record)
            print(json.dumps(record), flush=True)
    worst = max(record["ended_after"] for record in records)
    good = sum(record["same"] for record in records)
    print(
        f"{good} of {len(records)} runs equal the undisturbed one bit for bit; the slowest end took {worst} s"
    )
    arguments.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
