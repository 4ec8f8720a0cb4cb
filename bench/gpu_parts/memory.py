"""Out of memory ends a run with one line that names train.micro_batch, and exit code 2."""

import subprocess
import sys
from pathlib import Path

from bench.gpu_parts.common import write_recipe
from bench.gpu_parts.report import Report, Work

ROOT = Path(__file__).resolve().parents[2]
ROWS = 512  # of the one micro batch
LEFT = 3 * 2**30  # bytes left to the run on a GPU: its model fits, its micro batch does not
# Runs launch/train.py in a process that has little memory: all but LEFT of the GPU is taken, really.
# A CPU's limit is that on the process's data, 512 MiB above what the imports took.
SCRIPT = """
import resource, sys
import torch
from launch import pipeline, train
from launch.runtime.entry import run_command
if torch.cuda.is_available():
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(0, free - int(sys.argv.pop(1))), dtype=torch.uint8, device="cuda")
else:
    sys.argv.pop(1)
    words = dict(line.split(":") for line in open("/proc/self/status"))
    held = 1024 * int(words["VmData"].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (held + 2**29, held + 2**29))
run_command(train.main)
"""


def measure(work: Work, report: Report) -> None:
    """Start the command with a micro batch that does not fit."""
    recipe = write_recipe(work, global_batch=ROWS, micro_batch=ROWS, gradient_checkpointing=False)
    words = ["--recipe", str(recipe), "--set", "adapter.method=lora"]
    line = [sys.executable, "-c", SCRIPT, str(LEFT), *words, "--output", str(work.folder / "full")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    printed = (done.stdout + done.stderr).splitlines()
    errors = [text for text in printed if "out of memory" in text.lower()]
    found = f"exit code {done.returncode}: {(errors or printed or ['nothing printed'])[-1]}"
    is_one_line = len(errors) == 1 and "train.micro_batch" in errors[0]
    has_traceback = any(text.startswith("Traceback") for text in printed)
    report.check(
        "one line names train.micro_batch, exit code 2, no traceback",
        done.returncode == 2 and is_one_line and not has_traceback,
        found,
    )
