"""TensorBoard and Weights & Biases: optional packages, to which a run's metrics also go."""

import contextlib
import importlib.util
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlparse

from launch.config.schema import Recipe
from launch.runtime.distributed import on_rank0
from launch.runtime.errors import UserError
from launch.training.loop import Metrics

Log = Callable[[Metrics], None]


def require(names: Sequence[str]) -> None:
    """Raises UserError if a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracking: {name} is not installed; pip install -r requirements-extras.txt, or leave it out"
            )


@contextlib.contextmanager
def opened(recipe: Recipe, folder: Path, done: int) -> Iterator[Log]:
    """What logs a step to the recipe's trackers, which go on after step `done`; they are rank 0's. Collective."""
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    logs: list[Log] = []

    def log(step: Metrics) -> None:
        for each in logs:
            each(step)

    with contextlib.ExitStack() as stack:

        def start() -> None:
            logs.extend(
                stack.enter_context(makers[name](recipe, folder, done)) for name in recipe.tracking
            )

        on_rank0(start)
        yield log


@contextlib.contextmanager
def _tensorboard(recipe: Recipe, folder: Path, done: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    # What a killed start logged after its last checkpoint is hidden: those steps come again.
    with SummaryWriter(folder / "tensorboard", purge_step=done + 1) as writer:

        def log(step: Metrics) -> None:
            for key, value in step.items():
                if key != "step" and value is not None:
                    writer.add_scalar(f"train/{key}", value, step["step"])

        yield log


@contextlib.contextmanager
def _wandb(recipe: Recipe, folder: Path, done: int) -> Iterator[Log]:
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if _reached() else "offline")
    kept = folder / "wandb_id"  # so that a start that goes on adds to the run of the one before
    if not done or not kept.is_file():
        kept.write_text(secrets.token_hex(4))
    to = {"id": kept.read_text(), "resume": "allow", "mode": mode}
    try:
        run = wandb.init(
            project="astra-recipes", name=folder.name, dir=folder, config=recipe.model_dump(), **to
        )
    except wandb.Error as error:
        raise UserError(
            f"tracking: wandb: {str(error).splitlines()[0]}; wandb login, or WANDB_MODE=offline"
        ) from None
    with run:
        yield lambda step: run.log(
            {f"train/{key}": value for key, value in step.items()}, step=step["step"]
        )


def _reached() -> bool:
    """Whether wandb's server can be reached from here."""
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=3).close()
    except OSError:
        return False
    return True
