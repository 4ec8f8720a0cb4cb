"""One rank that loads models: `loading.py ENGINE OUTPUT FOLDER ...`.

Rank 0 writes to OUTPUT/NAME.safetensors, for every folder, all whole parameters and persistent
buffers of the model that the engine loaded, and its logits on IDS. Of a folder called HEADLESS the
head is new, and all parameters are loaded to be trained.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from launch.engines import make_engine
from launch.models.check import check_model
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.entry import run_command
from launch.training.trainable import draw_new_weights
from tests.support.worker import read_arguments

HEADLESS, HEAD, SEED = "headless", "lm_head.weight", 7
IDS = torch.arange(20, 44)[None]


@torch.no_grad()
def main(engine_name: str, output: Path, folders: list[Path]) -> None:
    """Load one model after the other."""
    device = start_process_group()
    for folder in folders:
        engine = make_engine(engine_name, device, torch.float32)
        is_new = folder.name == HEADLESS
        checked = check_model(folder, new_weights=[HEAD] if is_new else [])
        model = engine.load_model(checked, full=is_new)
        engine.materialize(model)
        draw_new_weights(model, checked, SEED, engine)
        tensors = {}
        for name, parameter in model.named_parameters():
            tensors[name] = engine.read(parameter).contiguous()
        persistent = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in persistent:
                tensors[name] = buffer.clone()
        with engine.inference_mode(model):
            tensors["logits"] = model(input_ids=IDS, use_cache=False).logits
        if dist.get_rank() == 0:
            save_file(tensors, output / f"{folder.name}.safetensors")
    stop_process_group()


if __name__ == "__main__":
    engine_name, output, *folders = read_arguments()
    run_command(lambda: main(engine_name, Path(output), [Path(folder) for folder in folders]))
