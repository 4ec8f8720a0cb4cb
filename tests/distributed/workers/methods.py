"""One rank of a whole run of each method, one after the other in this process; one of them is then taken up again."""

import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from matplotlib.figure import Figure

from launch import pipeline
from launch.config.schema import read
from launch.run.folder import open_run
from launch.runtime.distributed import on_rank0, start, stop
from launch.runtime.errors import run

METHODS = {
    "pissa": ["adapter.method=pissa"],
    "milora": ["adapter.method=milora"],
    "olora": ["adapter.method=olora"],
    "corda-ipm": ["adapter.method=corda"],
    "corda-kpm": ["adapter.method=corda", "adapter.corda_mode=kpm"],
    "eva": ["adapter.method=eva"],
    "lora_ga": ["adapter.method=lora_ga"],
    "lora_ga-windows": ["adapter.method=lora_ga", "calibration.memory_gib=0.0004"],
    "reference": [
        "calibration.statistics=reference",
        "calibration.batch_size=1",
        "adapter.eigen_select=largest",
    ],
}
AGAIN = "corda-kpm"
COMMON = ["train.max_steps=3", "train.checkpoint_every=1", "eval.suites=[]"]


def cut_back(whole: Path, part: Path) -> None:
    """A copy of a run as it was after its first step."""
    shutil.copytree(whole, part)
    for name in ("step-0000002", "step-0000003"):
        shutil.rmtree(part / "checkpoints" / name)
    for name in ("results.json", "state.json"):
        (part / name).unlink()


def main(recipe_path: str, engine: str, output: Path) -> None:
    device = start()
    Figure.savefig = lambda *_, **__: None  # half of the time; plots are looked at elsewhere

    def fine_tune(name: str, folder: Path) -> None:
        recipe = read(recipe_path, [*COMMON, f"engine={engine}", *METHODS[name]])
        on_rank0(lambda: open_run(folder, recipe) and None)
        pipeline.run_stages(recipe, name, folder, device)

    for name in METHODS:
        fine_tune(name, output / name)
        if name == AGAIN:
            part = output / f"{name}-again"
            on_rank0(lambda name=name, part=part: cut_back(output / name, part))
            fine_tune(name, part)
    stop()


if __name__ == "__main__":
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    run(lambda: main(paths[0], paths[1], Path(paths[2])))
