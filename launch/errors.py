"""Errors for people: one line from rank 0, exit code 2, no traceback, no rank left hanging."""

import os
import sys
import time
from collections.abc import Callable

from astra.errors import AstraError
from eval.errors import EvalError


class UserError(ValueError):
    """Something the user can mend; the message names the field, file or row and what to do."""


USER_ERRORS = (UserError, AstraError, EvalError)


def run(main: Callable[[], None]) -> None:
    """Run a command's `main`; turn a user error into one line on rank 0 and exit code 2 on every rank.

    Every rank meets the same error (what one rank alone finds is broadcast first). A launcher stops the other ranks as
    soon as one ends, so they wait for rank 0, which has the line to print.
    """
    try:
        main()
    except USER_ERRORS as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)
        sys.exit(2)
