"""One rank of a calibration under ZeRO-3: saves the summed moments, the subspaces and how much of the base it holds."""

import copy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from astra import adapter
from astra.calibrate import as_subspace, second_moments, share_out, solve_window
from astra.moments import reduce
from launch.config.schema import read
from launch.data import token_cache as prepared
from launch.data import tokenize as launch_data
from launch.engines import make_engine
from launch.runtime.distributed import start, stop
from launch.runtime.errors import run
from tests.support.whole import finder, plan_of, subspaces_by_layer


def main(recipe_path: str, output: Path) -> None:
    recipe = read(recipe_path, [])
    device = start()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = prepared.obtain(recipe.data, Path(recipe.model.name)).open()
    engine = make_engine("zero3", device, torch.float32)
    base = engine.load(recipe.model.name)
    parameters = dict(base.named_parameters())
    held = {name: (p.ds_tensor.numel(), p.ds_numel, p.numel()) for name, p in parameters.items()}
    model = adapter.attach(
        base, recipe.adapter.targets, recipe.adapter.rank, recipe.adapter.alpha, 0.0
    )
    linears = adapter.base_layers(adapter.lora_layers(model))
    ids = launch_data.choose(len(tokens), recipe.calibration.samples, recipe.calibration.seed)
    share = launch_data.deal(ids, rank, world_size, recipe.calibration.batch_size)
    batches = [launch_data.collate(tokens, rows, device)[0] for rows in share]
    with engine.inference(model), model.disable_adapter():
        plan = plan_of(model, linears, batches)
        (window,) = plan.windows
        moments = second_moments(model, linears, batches, window, plan, [None] * len(batches))
        everywhere = [copy.deepcopy(moments) for _ in range(world_size)]
        for owner, of_owner in enumerate(everywhere):
            reduce(of_owner, [owner] * len(moments))
        moments = everywhere[rank]
        found = {
            select: solve_window(
                window.groups,
                [list(moments)],
                share_out(window.groups, linears, dict.fromkeys(linears, recipe.adapter.rank)),
                linears,
                engine,
                finder(select, 5),
                ranks=dict.fromkeys(linears, recipe.adapter.rank),
            )
            for select in ("smallest", "largest", "middle", "random")
        }
        found["by_layer"] = subspaces_by_layer(
            model, linears, batches, engine, rank=recipe.adapter.rank, select="middle", seed=5
        )
        after = {name: p.numel() for name, p in parameters.items()}
    tensors = {}
    for group, moment in zip(window.groups, moments, strict=True):
        parts = {"outer": moment.outer(), "total": moment.total, "count": moment.count}
        tensors |= {
            f"moment.{group.of}.{'+'.join(group.modules)}.{part}": value
            for part, value in parts.items()
        }
    for select, modules in found.items():
        for name, module in modules.items():
            subspace = module if select == "by_layer" else as_subspace(module)
            tensors[f"{select}.{name}.vectors"] = subspace.vectors.contiguous()
            tensors[f"{select}.{name}.values"] = subspace.values.contiguous()
    for name, (mine, whole, live) in held.items():
        tensors[f"held.{name}"] = torch.tensor([mine, whole, live, after[name]])
    save_file(tensors, output / f"rank{rank}.safetensors")
    stop()


if __name__ == "__main__":
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    run(lambda: main(paths[0], Path(paths[1])))
