"""One rank of a calibration under ZeRO-3: saves the summed moments, the subspaces and how much of the base it holds."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoTokenizer

from astra import adapter
from astra.calibrate import second_moments, solve_all
from launch import data as launch_data
from launch.distributed import start, stop
from launch.engines import make_engine
from launch.errors import run
from launch.recipe import read


def main(recipe_path: str, output: Path) -> None:
    recipe = read(recipe_path, [])
    device = start()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    tokens = launch_data.tokenise(launch_data.read_rows(recipe.data), tokenizer, recipe.data.max_length)
    engine = make_engine("zero3", device, torch.float32)
    base = engine.load(recipe.model.name)
    parameters = dict(base.named_parameters())
    held = {name: (p.ds_tensor.numel(), p.ds_numel, p.numel()) for name, p in parameters.items()}
    model = adapter.attach(base, recipe.adapter.targets, recipe.adapter.rank, recipe.adapter.alpha, 0.0)
    linears = adapter.base_layers(adapter.lora_layers(model))
    ids = launch_data.choose(len(tokens), recipe.calibration.samples, recipe.calibration.seed)
    share = launch_data.deal(ids, rank, world_size, recipe.calibration.batch_size)
    batches = [launch_data.collate(tokens, rows, device)[0] for rows in share]
    with engine.inference(model), model.disable_adapter():
        statistics = second_moments(model, linears, batches)
        found = {
            select: solve_all(statistics, linears, engine, rank=recipe.adapter.rank, select=select, seed=5)
            for select in ("smallest", "largest", "middle", "random")
        }
        after = {name: p.numel() for name, p in parameters.items()}
    tensors = {}
    for statistic in statistics:
        for part in ("outer", "total", "count"):
            tensors[f"moment.{statistic.of}.{'+'.join(statistic.modules)}.{part}"] = getattr(statistic.moment, part)
    for select, subspaces in found.items():
        for name, subspace in subspaces.items():
            tensors[f"{select}.{name}.vectors"] = subspace.vectors.contiguous()
            tensors[f"{select}.{name}.values"] = subspace.values.contiguous()
    for name, (mine, whole, live) in held.items():
        tensors[f"held.{name}"] = torch.tensor([mine, whole, live, after[name]])
    save_file(tensors, output / f"rank{rank}.safetensors")
    stop()


if __name__ == "__main__":
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    run(lambda: main(paths[0], Path(paths[1])))
