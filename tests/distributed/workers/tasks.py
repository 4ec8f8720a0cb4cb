"""One rank of runs with a new head: `tasks.py OUTPUT RECIPE [SETTING ...] [-- RECIPE ...]`.

Each recipe is run with its settings in the folder OUTPUT/<number>.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from launch import pipeline
from launch.config.loading import read_recipe
from launch.runtime.distributed import run_on_rank0, start_process_group, stop_process_group
from launch.runtime.entry import run_command
from tests.support.worker import read_arguments, skip_plots


def main(output: Path, words: list[str]) -> None:
    """Run every recipe."""
    device = start_process_group()
    skip_plots()
    runs: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            runs.append([])
        else:
            runs[-1].append(word)
    for number, (recipe, *settings) in enumerate(runs):
        folder = output / str(number)
        run_on_rank0(lambda folder=folder: folder.mkdir(exist_ok=True))
        pipeline.run_stages(read_recipe(recipe, settings), "task", folder, device)
    stop_process_group()


if __name__ == "__main__":
    output, *words = read_arguments()
    run_command(lambda: main(Path(output), words))
