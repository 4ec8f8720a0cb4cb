"""A command ends with the exit code and the one line that belong to its error; help needs no torch.

Needs nothing: each case is a short process. Takes 30 s.
"""

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py"))
COMMANDS = [name for name in COMMANDS if name not in ("__init__", "cli", "pipeline")]


def run_main(body: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command whose `main` is `body`."""
    code = f"""
from astra.errors import AstraError
from launch.runtime.entry import run_command
from launch.runtime.errors import RankError, UserError
def main():
    {body}
run_command(main)"""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("print('done')", 0, ""),
        ("raise UserError('data.path: no\\n  such file')", 2, "error: data.path: no such file\n"),
        ("raise AstraError('8 is too much', 'rank')", 2, "error: adapter.rank: 8 is too much\n"),
        ("raise RankError('rank 0 is alone')", 1, "error: rank 0 is alone\n"),
        (
            "raise MemoryError('no more')",
            2,
            "error: starting: out of memory: no more; lower train.micro_batch, data.max_length, "
            "eval.batch_size or calibration.memory_gib, set train.gradient_checkpointing=true, or "
            "spread the model: engine=zero3 or fsdp on more devices, or zero3_offload (see "
            "--plan)\n",
        ),
    ],
)
def test_the_exit_code_and_the_line(body: str, code: int, line: str) -> None:
    done = run_main(body)
    assert (done.returncode, done.stderr) == (code, line)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("for i in range(100_000): print(i)", 1, ""),
        ("print('end')", 1, ""),  # met at the end only, when the output is flushed
        ("print('end'); sys.exit()", 0, ""),
        ("raise UserError('no such file')", 2, "error: no such file\n"),
    ],
)
def test_a_reader_that_ends_first_is_no_fault(
    body: str, code: int, line: str, joined: bool
) -> None:
    """As `launch/sweep.py --list | head` ends, also with standard error in the same pipe."""
    program = f"""
import sys
from launch.runtime.entry import run_command
from launch.runtime.errors import UserError
def main():
    sys.stdin.readline()  # until the reader has ended
    {body}
run_command(main)"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if joined else subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    process.stdin.close()
    printed = "" if joined else process.stderr.read()
    assert (process.wait(60), printed) == (code, "" if joined else line)


def test_a_broken_pipe_of_another_kind_is_a_fault() -> None:
    done = run_main("raise BrokenPipeError('of a server')")
    assert done.returncode == 1
    assert done.stderr.endswith("BrokenPipeError: of a server\n")


@pytest.mark.parametrize(
    ("error", "local_rank", "waited", "code"),
    [("UserError", "0", "", 2), ("UserError", "1", "10\n", 2), ("RankError", "1", "", 1)],
)
def test_an_error_that_one_rank_alone_may_have_met_is_printed_by_any_rank(
    error: str, local_rank: str, waited: str, code: int
) -> None:
    """Where its node's first rank met it too, the launcher ends a rank while it waits."""
    body = f"from launch.runtime import entry; entry.time.sleep = print; raise {error}('no driver')"
    done = run_main(body, RANK="9", LOCAL_RANK=local_rank)
    assert (done.returncode, done.stdout, done.stderr) == (code, waited, "error: no driver\n")


def test_what_is_no_user_error_has_a_traceback() -> None:
    done = run_main("raise RuntimeError('a fault')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "RuntimeError: a fault" in done.stderr


def test_torchs_log_level_is_set_before_main_and_kept_if_given() -> None:
    body = "import os; print(os.environ['TORCH_CPP_LOG_LEVEL'])"
    assert run_main(body).stdout == "ERROR\n"
    assert run_main(body, TORCH_CPP_LOG_LEVEL="INFO").stdout == "INFO\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_imports_torch_before_main(name: str) -> None:
    """Help answers at once, and the log level is read when torch is first imported."""
    code = f"import sys, launch.{name}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
