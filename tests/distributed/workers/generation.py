"""What three sharded ranks generate, and how many forward passes each of them runs; rank 0 writes both to a file."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist

from tests.eval.generation.test_schedule import generate, make_model, make_tokenizer, other_models

NUMBERS = (1, 2, 5, 14)  # of prompts: fewer than ranks, as many as places, more


def prompts(n: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(n)
    return [torch.randint(1, 40, (1 + 3 * (i % 5),), generator=draw).tolist() for i in range(n)]


def main() -> None:
    dist.init_process_group("gloo")
    found, calls = [], []
    for model in (make_model(), other_models()["convolutions"].eval()):
        model.register_forward_hook(lambda *_: calls.append(1))
        for n in NUMBERS:
            calls.clear()
            texts = generate(
                model, make_tokenizer(), prompts(n), max_new_tokens=19, batch_size=2, sharded=True
            )
            of_all: list = [None] * dist.get_world_size()
            dist.all_gather_object(of_all, (texts, len(calls)))
            found.append(of_all)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
