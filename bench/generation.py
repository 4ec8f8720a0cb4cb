"""Tokens per second of eval.generate against plain `generate`, one batch after another in the file's order.

    python bench/generation.py                        the quickstart's base and problems
    python bench/generation.py --model FOLDER --data-dir FOLDER

Same model, prompts, batch size and limit; greedy; only tokens up to the end of a sequence count. Medians of interleaved
pairs; the responses of both are compared too.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
PAIRS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model (default: the quickstart's base)")
    parser.add_argument("--data-dir", type=Path, help="folder with gsm8k_test.jsonl (default: the quickstart's)")
    parser.add_argument("--limit", type=int, default=200, help="problems (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "generation.json", help="default %(default)s")
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from eval.generate import generate
    from eval.tasks import gsm8k
    from launch import quickstart
    from launch.data import encode, prompt

    folder = arguments.model or quickstart.cache_folder()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = gsm8k.rows(arguments.data_dir or folder, arguments.limit)
    prompts = encode(tokenizer, [prompt(problem.question) for problem in problems])
    context = model.config.max_position_embeddings
    prompts = [ids for ids in prompts if len(ids) < context]
    end = tokenizer.eos_token_id

    @torch.no_grad()
    def plain() -> list[str]:
        texts = []
        for start in range(0, len(prompts), arguments.batch_size):
            batch = prompts[start : start + arguments.batch_size]
            longest = max(map(len, batch))
            ids = torch.tensor([[end] * (longest - len(p)) + p for p in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
            model.generation_config = GenerationConfig(pad_token_id=end, eos_token_id=end)
            new = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(arguments.max_new_tokens, context - longest),
            )[:, longest:]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def ours() -> list[str]:
        found = {}
        for part in generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            device=device,
            sharded=False,
        ):
            found |= part
        return [found[i] for i in range(len(prompts))]

    def rate(make) -> tuple[float, list[str]]:  # noqa: ANN001
        start = time.perf_counter()
        texts = make()
        seconds = time.perf_counter() - start
        return sum(len(tokenizer(text).input_ids) for text in texts) / seconds, texts

    pairs = []
    for _ in range(PAIRS):
        (theirs, plain_texts), (mine, texts) = rate(plain), rate(ours)
        pairs.append((theirs, mine))
        print(f"plain {theirs:.0f} tokens/s, ours {mine:.0f} tokens/s: {mine / theirs:.2f} times", flush=True)
    lengths = [len(tokenizer(text).input_ids) for text in texts]
    result = {
        "model": folder.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        "prompts": len(prompts),
        "batch_size": arguments.batch_size,
        "max_new_tokens": arguments.max_new_tokens,
        "response tokens": {"median": statistics.median(lengths), "largest": max(lengths)},
        "tokens_per_second": {
            "plain": statistics.median(pair[0] for pair in pairs),
            "ours": statistics.median(pair[1] for pair in pairs),
        },
        "times": statistics.median(mine / theirs for theirs, mine in pairs),
        # A plain batch gives every prompt only the room that its longest one has.
        "same responses": sum(a == b for a, b in zip(plain_texts, texts, strict=True)),
    }
    print(json.dumps(result, indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
