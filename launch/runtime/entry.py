"""The entry point of every command: run `main`, and turn user errors into a line and a code."""

import os
import sys
import time
from collections.abc import Callable

from launch.runtime import watchdog
from launch.runtime.errors import USER_ERRORS, RankError, describe_error


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process.

    The exit code is 0 if all went well, 2 for an error that the user can fix, and 1 for a fault
    that may be gone at the next start. An error that the user can fix is printed by rank 0 as one
    line, without a traceback, and every rank ends.

    Every rank raises the same user error, because what one rank finds is broadcast first. A
    launcher stops the other ranks as soon as one ends, so they wait for rank 0, which prints the
    line. After an error caused by a lost rank, the watchdog prints a line about that rank.
    """
    # Else torch prints the C++ stack when the store of a process group closes. torch reads the
    # variable when it is first imported, which `main` does.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = 0
    try:
        main()
    except USER_ERRORS as error:
        watchdog.disarm()
        alone = isinstance(error, RankError)
        if alone or int(os.environ.get("RANK", "0")) == 0:
            line = " ".join(describe_error(error).split())
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)
        code = 1 if alone else 2
    except RuntimeError:
        watchdog.report_lost_peer()
        raise
    # Not sys.exit: DeepSpeed keeps process groups alive until C++ objects are torn down, which at
    # times aborts a finished rank ("terminate called without an active exception", seen with 4 gloo
    # ranks).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
