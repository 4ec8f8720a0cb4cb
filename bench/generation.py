"""Tokens per second of eval.generation.schedule against plain `generate`, one batch after another in the file's order.

    python bench/generation.py                        the quickstart's base and problems
    python bench/generation.py --model FOLDER --data-dir FOLDER

Same model, dtype, prompts, batch size, limit and end of sequence, no stops, greedy; only tokens up to the end of a
sequence count. Prompts whose limit would not fit the context are left out, for there a plain batch writes less. Each
runs a batch first; then interleaved pairs, begun by either in turn. The responses of both are compared too.

What is gained is the time that short responses wait for the longest of their batch, so it depends on how lengths vary;
where all run to the limit there is nothing to gain. Lengths vary as a fine-tuned model's do in, with DATA and MODELS
folders of GSM8K's test rows, MetaMathQA's schema and the stories260K model,

    python launch/train.py --recipe metamath --engine single --output runs/stories --set model.name=MODELS/stories260K \
        --set data.path=DATA/metamath_like_3000.jsonl --set data.max_length=320 --set data.limit=3000 \
        --set adapter.method=full --set train.lr=3e-3 --set train.epochs=5 --set train.max_steps=400 \
        --set train.global_batch=32 --set train.micro_batch=16 --set data.held_out=100 --set eval.suites=[]
    python bench/generation.py --model runs/stories/model --data-dir DATA --limit 600
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
PAIRS = 3
COMMAND = shlex.join(["python", *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="folder of a model (default: the quickstart's base)"
    )
    parser.add_argument(
        "--data-dir", type=Path, help="folder with gsm8k_test.jsonl (default: the quickstart's)"
    )
    parser.add_argument("--limit", type=int, default=200, help="problems (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "bench" / "generation.json",
        help="default %(default)s",
    )
    arguments = parser.parse_args()

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from eval.generation.schedule import generate
    from eval.tasks import gsm8k
    from launch.data.tokenize import encode, prompt
    from launch.quickstart import base as quickstart

    folder = arguments.model or quickstart.cache_folder()
    if not folder.is_dir():
        parser.error(
            f"{folder} is not there; run the quickstart first, or give --model and --data-dir"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = gsm8k.rows(arguments.data_dir or folder, arguments.limit)
    prompts = encode(tokenizer, [prompt(problem.question) for problem in problems])
    context = model.config.max_position_embeddings
    fitting = [ids for ids in prompts if len(ids) + arguments.max_new_tokens <= context]
    left_out, prompts = len(prompts) - len(fitting), fitting
    if not prompts:
        parser.error(
            f"no prompt fits the context of {context} with --max-new-tokens {arguments.max_new_tokens}"
        )
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        pad_token_id=end, eos_token_id=end
    )  # both end at these alone

    @torch.no_grad()
    def plain(prompts: list[list[int]]) -> list[str]:
        texts = []
        for start in range(0, len(prompts), arguments.batch_size):
            batch = prompts[start : start + arguments.batch_size]
            longest = max(map(len, batch))
            ids = torch.tensor([[end] * (longest - len(p)) + p for p in batch], device=device)
            mask = torch.tensor(
                [[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device
            )
            new = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=arguments.max_new_tokens
            )
            new = new[:, longest:]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def ours(prompts: list[list[int]]) -> list[str]:
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

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    def rate(make) -> tuple[float, list[str]]:  # noqa: ANN001
        start = time.perf_counter()
        texts = make(prompts)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return sum(map(tokens, texts)) / seconds, texts

    for make in (plain, ours):
        make(prompts[: arguments.batch_size])
    pairs = []
    for number in range(PAIRS):
        order = (plain, ours) if number % 2 == 0 else (ours, plain)
        found = {make: rate(make) for make in order}
        (theirs, plain_texts), (mine, texts) = found[plain], found[ours]
        pairs.append((theirs, mine))
        print(
            f"plain {theirs:.0f} tokens/s, ours {mine:.0f} tokens/s: {mine / theirs:.2f} times",
            flush=True,
        )
    lengths = [tokens(text) for text in texts]
    result = {
        "command": COMMAND,
        "model": str(folder),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{os.cpu_count()} CPU cores",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": "float32",
        "prompts": len(prompts),
        "left out, too long": left_out,
        "batch_size": arguments.batch_size,
        "max_new_tokens": arguments.max_new_tokens,
        "response tokens": {"median": statistics.median(lengths), "largest": max(lengths)},
        "tokens_per_second": {
            "plain": statistics.median(pair[0] for pair in pairs),
            "ours": statistics.median(pair[1] for pair in pairs),
        },
        "times, of each pair": [mine / theirs for theirs, mine in pairs],
        "times": statistics.median(mine / theirs for theirs, mine in pairs),
        "same responses": sum(a == b for a, b in zip(plain_texts, texts, strict=True)),
    }
    print(json.dumps(result, indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
