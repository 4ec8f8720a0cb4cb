"""What the commands share on the command line. Light: help and a wrong option answer at once."""

import argparse
import os

from launch.recipe import field_help


class _Parser(argparse.ArgumentParser):
    """Under a launcher, usage errors come from rank 0 alone."""

    def error(self, message: str) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            super().error(message)
        self.exit(2)


def parser(description: str, examples: str, fields: bool = False) -> argparse.ArgumentParser:
    """A parser with examples, the recipe's fields if asked for, and the launchers' --local_rank."""
    epilog = f"examples:\n{examples}"
    if fields:
        epilog += f"\n\nfields of a recipe (--set FIELD=VALUE):\n{field_help()}"
    result = _Parser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed passes it; LOCAL_RANK says the same
    return result
