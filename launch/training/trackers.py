"""TensorBoard and Weights & Biases: optional packages to which a run's metrics also go."""

import contextlib
import importlib.util
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

from launch.config.schema import Recipe
from launch.run.metrics import Metrics
from launch.runtime.distributed import run_on_rank0
from launch.runtime.errors import UserError, read_first_line

Log = Callable[[Metrics], None]


def require_trackers(names: Sequence[str]) -> None:
    """Raise UserError if a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracking: {name} is not installed; pip install -r requirements-extras.txt, or "
                "leave it out"
            )


@contextlib.contextmanager
def open_trackers(recipe: Recipe, folder: Path, done: int) -> Iterator[Log]:
    """Open the recipe's trackers on rank 0; yield what logs a step to all of them. Collective.

    A tracker that fails later is left out from then on, with a line: training must not end with it,
    and metrics.jsonl has every step.

    Args:
        done: the step after which they resume.
    """
    makers = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
    logs: dict[str, Log] = {}

    def log_step(step: Metrics) -> None:
        for name, log in list(logs.items()):
            try:
                log(step)
            except Exception as error:  # noqa: BLE001 (of any library)
                print(f"warning: tracking: {name} is left out from now on: {error!r}", flush=True)
                del logs[name]

    with contextlib.ExitStack() as stack:

        def open_all() -> None:
            for name in recipe.tracking:
                tracker = makers[name](recipe, folder, done)
                logs[name] = stack.enter_context(_close_in_any_case(name, tracker))

        run_on_rank0(open_all)
        yield log_step


@contextlib.contextmanager
def _close_in_any_case(name: str, tracker: AbstractContextManager[Log]) -> Iterator[Log]:
    """Open a tracker; print its error in closing in the place of raising it."""
    stack = contextlib.ExitStack()
    log = stack.enter_context(tracker)
    try:
        yield log
    finally:
        try:
            stack.close()
        except Exception as error:  # noqa: BLE001 (of any library)
            print(f"warning: tracking: {name} could not be closed: {error!r}", flush=True)


@contextlib.contextmanager
def _open_tensorboard(recipe: Recipe, folder: Path, done: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what a killed start logged after its last checkpoint: those steps come again.
    with SummaryWriter(folder / "tensorboard", purge_step=done + 1) as writer:

        def log_step(step: Metrics) -> None:
            for key, value in step.items():
                if key == "dev":
                    for name, metric, score in _list_scores(value):
                        writer.add_scalar(f"dev/{name}/{metric}", score, step["step"])
                elif key != "step" and value is not None:
                    writer.add_scalar(f"train/{key}", value, step["step"])

        yield log_step


@contextlib.contextmanager
def _open_wandb(recipe: Recipe, folder: Path, done: int) -> Iterator[Log]:
    import wandb

    mode = os.environ.get("WANDB_MODE") or _choose_wandb_mode()
    # The id is kept, so that a resumed start adds to the wandb run of the one before.
    id_file = folder / "wandb_id"
    if not done or not id_file.is_file():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        run = wandb.init(
            project="astra-recipes",
            name=folder.name,
            dir=folder,
            config=recipe.model_dump(),
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            mode=mode,
        )
    except wandb.Error as error:
        raise UserError(
            f"tracking: wandb: {read_first_line(error)}; wandb login, or WANDB_MODE=offline"
        ) from None

    # wandb leaves out what is below its own count of steps, as are those that a resumed start trains
    # again. So it counts for itself, and charts are drawn over ours.
    run.define_metric("train/step")
    run.define_metric("*", step_metric="train/step")

    def log_step(step: Metrics) -> None:
        logged = {f"train/{key}": value for key, value in step.items() if key != "dev"}
        for name, metric, score in _list_scores(step.get("dev", {})):
            logged[f"dev/{name}/{metric}"] = score
        run.log(logged)

    with run:
        yield log_step


def _list_scores(dev: dict[str, dict[str, float]]) -> list[tuple[str, str, float]]:
    """List the scores of a step: name, metric, value."""
    scores = []
    for name, values in dev.items():
        scores += [(name, metric, value) for metric, value in values.items()]
    return scores


def _choose_wandb_mode() -> str:
    """Return `online`; or `offline`, with a line, where wandb's server cannot be reached from here.

    Behind a proxy that is not tried.
    """
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if getproxies().get(url.scheme) and not proxy_bypass(url.hostname):
        return "online"
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname, port), timeout=3).close()
    except OSError as error:
        print(
            f"tracking: wandb: offline, as {url.hostname}:{port} cannot be reached ({error}); `wandb "
            "sync` sends it later, and WANDB_MODE=online does not try",
            flush=True,
        )
        return "offline"
    return "online"
