"""The entry point of every command: run `main`, and turn user errors into a line and a code."""

import contextlib
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from launch.runtime import watchdog
from launch.runtime.errors import (
    USER_ERRORS,
    RankError,
    RankZeroError,
    describe_error,
    is_rank0_error,
)
from launch.runtime.shortages import describe_shortage


def describe_failure(error: Exception) -> tuple[str, int]:
    """Return the line and the exit code of an error of this rank that ends a run.

    Where another rank is gone, which makes collectives fail, the process ends here instead.
    """
    if isinstance(error, RankError):
        return describe_error(error), 1
    if isinstance(error, USER_ERRORS):
        return " ".join(describe_error(error).split()), 2
    shortage = describe_shortage(error, watchdog.current_phase())
    if shortage is not None:
        # Met again with the same settings: the user must change something.
        return " ".join(shortage.split()), 2
    if isinstance(error, RuntimeError) and not is_rank0_error(error):
        watchdog.report_lost_peer()
    text = " ".join(str(error).split())[:500]
    return f"{watchdog.current_phase()}: {type(error).__name__}: {text}", 1


class OutputClosedError(Exception):
    """Raised in the place of BrokenPipeError when what reads this command's output has ended."""


@contextlib.contextmanager
def _expecting_closed_outputs() -> Iterator[None]:
    """Within the context, let it be no fault that what reads the output ends first, as `head` does.

    Python ignores SIGPIPE. It raises BrokenPipeError when it prints, and complains again when it
    flushes at the end, unless the output goes elsewhere by then (docs.python.org/3/library/signal.html,
    "Note on SIGPIPE").

    Raises:
        OutputClosedError: what reads the output has ended.
    """
    try:
        yield
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it was closed at the start
            stream.flush()
    except BrokenPipeError:
        if not _discard_closed_outputs():
            raise  # of another pipe
        raise OutputClosedError("what reads this command's output has ended") from None
    except BaseException:  # SystemExit too
        _discard_closed_outputs()
        raise


def _discard_closed_outputs() -> bool:
    """Send standard output and error nowhere if their readers have ended. Return whether one has."""
    poll, found = select.poll(), False
    for number in (1, 2):
        poll.register(number, 0)
    for number, events in poll.poll(0):
        if events & select.POLLERR:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            found = True
    return found


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process.

    The exit code is 0 if all went well, 2 for an error that the user can fix, full disks and full
    memory among them, and 1 for a fault that may be gone at the next start. An error that the user
    can fix is printed as one line, without a traceback, and every rank ends. Where what reads the
    output has ended, nothing is printed and the code is 1.

    Once the ranks have found each other, the watchdog ends all of them with one line and one code,
    whether one rank alone meets an error or every rank the same user error (`report_error`); after
    an error caused by a lost rank, with a line about that rank. Before that a rank does not know
    whether others meet its error too. The first rank of a node prints the line at once; the others
    wait first, because a launcher stops a node's ranks as soon as one ends.
    """
    # Else torch prints the C++ stack when the store of a process group closes. torch reads the
    # variable when it is first imported, which `main` does.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = 0
    try:
        with _expecting_closed_outputs():
            main()
    except OutputClosedError as error:
        watchdog.report_error(str(error), 1)
        code = 1
    except USER_ERRORS as error:
        line = " ".join(describe_error(error).split())
        alone = isinstance(error, RankError)
        if not alone:
            watchdog.report_error(line, 2, shared=True)
        watchdog.disarm()
        local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID", "0")
        if not alone and local_rank != "0":
            time.sleep(10)
        print(f"error: {line}", file=sys.stderr, flush=True)
        code = 1 if alone else 2
    except RankZeroError:
        time.sleep(10)  # rank 0 reports it
        code = 1
    except Exception as error:  # noqa: BLE001 (of any kind: it ends all ranks)
        line, code = describe_failure(error)
        if code == 1:
            traceback.print_exc()
        watchdog.report_error(line, code)
        if code == 2:
            print(f"error: {line}", file=sys.stderr, flush=True)
    # Not sys.exit: DeepSpeed keeps process groups alive until C++ objects are torn down, which at
    # times aborts a finished rank ("terminate called without an active exception", seen with 4 gloo
    # ranks).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
