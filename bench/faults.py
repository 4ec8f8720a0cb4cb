"""Kill runs at random moments, start them again, and compare them with an undisturbed run.

    python bench/faults.py --kills 20

Each kill has a run of its own: real processes under a real launcher, on the quickstart's model. A
kill hits one rank, the launcher, or every process, with SIGKILL or a signal to stop, at a random
moment between start and end. Measured are: the time until every process is gone, what was printed,
the step from which the run resumed, and whether the losses and gradient norms of all steps and the
exported adapter equal the undisturbed run's bit for bit.
"""

import argparse
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from tests.support.processes import ENGINES, Fault, Run, make_command, make_set_options
from tests.support.runs import read_state, read_steps, runs_are_equal

FAULTS = [
    Fault("rank 0", signal.SIGKILL),
    Fault("rank 1", signal.SIGKILL),
    Fault("launcher", signal.SIGKILL),
    Fault("all", signal.SIGKILL),
    Fault("launcher", signal.SIGTERM),
    Fault("rank 1", signal.SIGUSR1),
]
SHARDED_ENGINES = ("zero3", "fsdp")
SETTINGS = (
    "train.max_steps=20",
    "train.checkpoint_every=3",
    "adapter.dropout=0.1",
    "eval.suites=[]",
)
OPTIONS = ["--recipe", "quickstart", *make_set_options(SETTINGS)]
FIRST_START_LIMIT = 1200  # seconds: the first start ever pretrains the quickstart's base


def make_train_command(engine: str, folder: Path, *settings: str) -> list[str]:
    """Return the command that trains the measured run into `folder` under `engine`."""
    options = [*OPTIONS, *make_set_options(settings), "--engine", engine, "--output", folder]
    return make_command(*ENGINES[engine], *options)


def interrupt_and_resume(
    command: list[str], folder: Path, fault: Fault, after: float, log: Path
) -> dict | None:
    """Start `command`, send `fault` after `after` seconds, and start it again to finish the run.

    Returns:
        What was measured; None if the run had ended before the signal.

    Raises:
        RuntimeError: the second start failed.
    """
    run = Run(command, log)
    time.sleep(after)
    num_steps = len(read_steps(folder))
    if not run.send(fault):
        run.wait()
        return None
    seconds = run.wait()
    record = {
        "fault": str(fault),
        "after": round(after, 1),
        "steps_before": num_steps,
        "ended_after": round(seconds, 1),
        "state": read_state(folder) if (folder / "state.json").is_file() else None,
        "line": run.find_error_line(),
    }
    second = Run(command, log.with_suffix(".again"))
    second.wait()
    if second.launcher.returncode:
        raise RuntimeError(f"the second start failed\n{second.read_output()[-3000:]}")
    resumed = re.search(r"resuming after step (\d+)", second.read_output())
    return record | {"went_on_after": int(resumed.group(1)) if resumed else None}


def measure_faults(num_kills: int, seed: int, scratch: Path) -> list[dict]:
    """Interrupt `num_kills` runs, print and return a record for each."""
    log = scratch / "log"
    first_start = make_train_command("zero3", scratch / "first", "train.max_steps=1")
    Run(first_start, log).wait(limit=FIRST_START_LIMIT)
    undisturbed = {engine: scratch / engine for engine in SHARDED_ENGINES}
    seconds = {
        engine: Run(make_train_command(engine, folder), log).wait()
        for engine, folder in undisturbed.items()
    }
    draw = random.Random(seed)
    records: list[dict] = []
    while len(records) < num_kills:
        number = len(records)
        engine = SHARDED_ENGINES[number % len(SHARDED_ENGINES)]
        fault = FAULTS[number // len(SHARDED_ENGINES) % len(FAULTS)]
        folder = scratch / f"run{draw.randrange(10**9)}"
        after = draw.uniform(1, seconds[engine])
        command = make_train_command(engine, folder)
        record = interrupt_and_resume(command, folder, fault, after, log)
        if record is None:
            continue
        same = runs_are_equal(folder, undisturbed[engine])
        records.append({"engine": engine} | record | {"same": same})
        print(json.dumps(records[-1]), flush=True)
    return records


def describe(records: Sequence[dict]) -> str:
    """Return the line that sums the records up."""
    slowest = max(record["ended_after"] for record in records)
    num_same = sum(record["same"] for record in records)
    return (
        f"{num_same} of {len(records)} runs equal the undisturbed one bit for bit; the slowest end "
        f"took {slowest} s"
    )


def main() -> None:
    """Measure, print a summary, and write the records."""
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
        default=ROOT / "bench/results/faults.json",
        help="default bench/results/faults.json",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        records = measure_faults(arguments.kills, arguments.seed, Path(scratch))
    print(describe(records))
    arguments.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
