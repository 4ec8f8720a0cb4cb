"""A run that is killed with SIGKILL and started again has the losses of an undisturbed one."""

import subprocess
import sys
import time
from pathlib import Path

from bench.gpu_parts.common import find_largest_difference, read_losses, write_recipe
from bench.gpu_parts.report import Report, Work

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-4  # of losses; some kernels of GPUs add up in an order that changes


def measure(work: Work, report: Report) -> None:
    """Kill a run of the command, resume it, and compare with an undisturbed run of the command."""
    steps, every = (40, 5) if work.tiny else (60, 10)
    recipe = write_recipe(work, max_steps=steps, checkpoint_every=every)
    recipe_words = ["--recipe", str(recipe), "--set", "model.dtype=float32"]
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *recipe_words]
    disturbed, undisturbed = work.folder / "killed", work.folder / "undisturbed"
    killed_after = _kill_after(every, [*command, "--output", str(disturbed)], disturbed)
    report.figures["steps before the kill"] = killed_after
    report.check("the kill came before the end", killed_after < steps, f"{killed_after} of {steps}")
    before = (disturbed / "metrics.jsonl").read_text().splitlines()[:every]
    both = [subprocess.Popen([*command, "--output", str(run)]) for run in (disturbed, undisturbed)]
    codes = [process.wait() for process in both]
    report.check("the resumed run and the undisturbed one end with 0", codes == [0, 0], codes)
    # A run that had begun anew would have taken other seconds for the same steps.
    kept = (disturbed / "metrics.jsonl").read_text().splitlines()[:every] == before
    report.check("the run resumed: its first steps were not run again", kept, f"{every} steps")
    difference = find_largest_difference(read_losses(disturbed), read_losses(undisturbed))
    report.check(
        f"losses of {steps} steps are the undisturbed run's to {LIMIT:g}",
        difference <= LIMIT,
        f"{difference:.1e}",
    )


def _kill_after(steps: int, command: list[str], run: Path) -> int:
    """Start a run and kill it once it is past its first checkpoint; return the steps it wrote."""
    metrics = run / "metrics.jsonl"

    def count() -> int:
        return len(metrics.read_text().splitlines()) if metrics.is_file() else 0

    process = subprocess.Popen(command)
    while process.poll() is None and count() <= steps + 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    return count()
