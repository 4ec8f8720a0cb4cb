"""Start commands as real processes, send them signals, and wait until all of them are gone."""

import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.paths import ROOT

TIME_LIMIT = 120.0  # seconds within which every process of an interrupted run must be gone
RUN_MARK = "ASTRA_TEST_RUN"  # environment variable that marks every process of one run
LAUNCHERS = {
    "python": (sys.executable,),
    "deepspeed": (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus"),
    "torchrun": (
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc_per_node",
    ),
}
# Engine -> the launcher and the world size with which the fault tests start it.
ENGINES = {"zero3": ("deepspeed", 2), "fsdp": ("torchrun", 2), "single": ("python", 1)}
ERROR_LINE = re.compile(r"^(error|stopped|rank \d|.*(gone|stalled|stopped)).*", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """A signal and the processes that receive it."""

    target: str  # `rank I`, `launcher` or `all`
    signal_number: signal.Signals

    def __str__(self) -> str:
        return f"{self.signal_number.name} to {self.target}"


def make_environment() -> dict[str, str]:
    """Return this environment with one thread a rank, on which results depend, and no hub."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    return os.environ | fixed


def make_set_options(settings: Iterable[str]) -> list[str]:
    """Return `--set FIELD=VALUE` for every `FIELD=VALUE` in `settings`."""
    options = []
    for setting in settings:
        options += ["--set", setting]
    return options


def make_command(
    launcher: str, world_size: int, *arguments: object, script: Path = ROOT / "launch/train.py"
) -> list[str]:
    """Return the command line that starts `script` with `arguments` on `world_size` ranks."""
    words = list(LAUNCHERS[launcher])
    if launcher != "python":
        words.append(str(world_size))
    if launcher == "deepspeed":
        words += ["--master_port", str(random.randrange(20000, 60000))]
    return [*words, str(script), *map(str, arguments)]


class Run:
    """A started command and all its processes, which a mark in their environment identifies."""

    def __init__(self, command: Sequence[str], log: Path, folder: Path | None = None) -> None:
        """Start `command`.

        Args:
            log: file for everything that it prints.
            folder: its working folder; by default this process's.
        """
        self.log = log
        self.mark = secrets.token_hex(8)
        with log.open("w") as file:
            self.launcher = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                cwd=folder,
                env=make_environment() | {RUN_MARK: self.mark},
                start_new_session=True,
            )

    def read_output(self) -> str:
        """Return everything printed so far."""
        return self.log.read_text(errors="replace")

    def list_processes(self) -> list[psutil.Process]:
        """List the run's living processes, whether or not their launcher still lives."""
        alive = []
        for process in psutil.process_iter():
            try:
                is_marked = process.environ().get(RUN_MARK) == self.mark
                if is_marked and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
            except (psutil.Error, OSError):
                continue
        return alive

    def find_rank(self, rank: int) -> psutil.Process | None:
        """Return the process of a rank, or None while there is none."""
        for process in self.list_processes():
            try:
                if process.environ().get("RANK") == str(rank):
                    return process
            except psutil.Error:
                continue
        return None

    def send(self, fault: Fault) -> bool:
        """Send the fault's signal. Returns False if its target does not exist yet, or any more."""
        if fault.target == "launcher":
            targets = [psutil.Process(self.launcher.pid)] if self.launcher.poll() is None else []
        elif fault.target == "all":
            targets = self.list_processes()
        else:
            process = self.find_rank(int(fault.target.split()[1]))
            targets = [process] if process else []
        for process in targets:
            try:
                process.send_signal(fault.signal_number)
            except psutil.NoSuchProcess:
                continue
        return bool(targets)

    def wait(self, limit: float = TIME_LIMIT) -> float:
        """Wait until every process is gone.

        Returns:
            The seconds that took.

        Raises:
            TimeoutError: some are left after `limit` seconds; they have been killed.
        """
        began = time.monotonic()
        while True:
            self.launcher.poll()
            left = self.list_processes()
            if not left:
                self.launcher.wait()
                return time.monotonic() - began
            if time.monotonic() - began > limit:
                self.kill()
                raise TimeoutError(
                    f"{len(left)} processes left after {limit} s\n{self.read_output()[-3000:]}"
                )
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill all processes that are left, also stopped ones and those that start meanwhile."""
        while self.send(Fault("all", signal.SIGKILL)):
            time.sleep(0.05)
        self.launcher.wait()

    def wait_for(self, condition: Callable[[], bool], limit: float = TIME_LIMIT) -> None:
        """Wait until `condition()` is true.

        Raises:
            TimeoutError: it is not after `limit` seconds, or the run ends first.
        """
        began = time.monotonic()
        while not condition():
            if self.launcher.poll() is not None or time.monotonic() - began > limit:
                raise TimeoutError(f"the condition was not met\n{self.read_output()[-3000:]}")
            time.sleep(0.01)

    def find_error_line(self) -> str:
        """Return the last line that says why the run ended, or an empty string."""
        lines = [match.group(0) for match in ERROR_LINE.finditer(self.read_output())]
        return lines[-1] if lines else ""
