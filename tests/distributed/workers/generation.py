"""One rank of a generation by three ranks that act as if they were sharded: `generation.py OUTPUT`.

Rank 0 writes to the file OUTPUT, for each model and number of prompts, what each rank generated and
how many forward passes it made.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch.distributed as dist

from tests.support.cases import NEW_TOKENS, PROMPT_COUNTS, make_prompts
from tests.support.generation import (
    generate_all,
    make_model,
    make_other_models,
    make_tokenizer,
)


def main(output: Path) -> None:
    """Generate with each model for each number of prompts."""
    dist.init_process_group("gloo")
    tokenizer, options = make_tokenizer(), {"max_new_tokens": NEW_TOKENS, "batch_size": 2}
    found, calls = [], []
    for model in (make_model(), make_other_models()["convolutions"].eval()):
        model.register_forward_hook(lambda *_: calls.append(1))
        for count in PROMPT_COUNTS:
            calls.clear()
            texts = generate_all(model, tokenizer, make_prompts(count), sharded=True, **options)
            from_ranks: list = [None] * dist.get_world_size()
            dist.all_gather_object(from_ranks, (texts, len(calls)))
            found.append(from_ranks)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
