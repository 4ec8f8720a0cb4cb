"""Errors for people: one line from rank 0, exit code 2, no traceback, no rank left hanging."""

import os
import sys
import time
from collections.abc import Callable

from astra.errors import AstraError
from eval.errors import EvalError
from launch.runtime import watchdog as watch


class UserError(ValueError):
    """Something the user can mend; the message names the field, file or row and what to do."""


class DivergedError(UserError):
    """A training's loss or gradient is not finite: what its settings lead to, whenever they are tried."""


class RankError(UserError):
    """What one rank alone finds, when it cannot reach the others."""


USER_ERRORS = (UserError, AstraError, EvalError)


def run(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process: 0, or for a user error one line on rank 0 and 2 on every rank.
    1 is for faults that a new start may not meet.

    Every rank meets the same error (what one rank alone finds is broadcast first). A launcher stops the other ranks as
    soon as one ends, so they wait for rank 0, which has the line to print. An error that comes of another rank being
    gone ends with launch.runtime.watchdog's line about that rank.
    """
    code = 0
    try:
        main()
    except USER_ERRORS as error:
        watch.quiet()
        alone = isinstance(error, RankError)
        if alone or int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)
        code = 1 if alone else 2
    except RuntimeError:
        watch.explain()
        raise
    # Not sys.exit: process groups that DeepSpeed still refers to live on into the teardown of C++ objects, which then
    # aborts a finished rank now and then ("terminate called without an active exception", seen with 4 gloo ranks).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
