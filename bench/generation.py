r"""Measure tokens per second of eval.generation.generate against transformers' `generate`.

    python bench/generation.py                        the quickstart's base and problems
    python bench/generation.py --model FOLDER --data-dir FOLDER

`generate` runs one batch after another, in the file's order. Both have the same model, dtype,
prompts, batch size, limit and end of sequence, no stops, and are greedy. Only tokens up to the end
of a sequence count. Prompts whose limit would not fit the context are left out, for there a plain
batch writes less. Each runs a batch first; then interleaved pairs, begun by either in turn. The
responses of both are compared too.

What is gained is the time that short responses wait for the longest of their batch, so it depends
on how lengths vary; where all run to the limit there is nothing to gain. Lengths vary as a
fine-tuned model's do in, with DATA and MODELS folders of GSM8K's test rows, MetaMathQA's schema and
the stories260K model,

    python launch/train.py --recipe metamath --engine single --output runs/stories \
        --set model.name=MODELS/stories260K --set data.path=DATA/metamath_like_3000.jsonl \
        --set data.max_length=320 --set data.limit=3000 --set data.held_out=100 \
        --set adapter.method=full --set train.lr=3e-3 --set train.epochs=5 \
        --set train.max_steps=400 --set train.global_batch=32 --set train.micro_batch=16 \
        --set eval.suites=[]
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eval.generation.decoding import Completion, find_end_tokens
from eval.generation.generate import generate_responses
from eval.tasks import gsm8k
from launch.data.prompts import format_prompt
from launch.data.tokenize import encode_texts
from launch.models.check import get_num_positions
from launch.quickstart import base as quickstart

PAIRS = 3
COMMAND = shlex.join(["python", *sys.argv])


class Work(NamedTuple):
    """What both ways of generating are given."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]  # token ids
    batch_size: int
    max_new_tokens: int


Generate = Callable[[Work], list[str]]
"""Returns the response to each prompt."""


def main() -> None:
    parser = _make_parser()
    arguments = parser.parse_args()
    folder = arguments.model or quickstart.cache_folder()
    if not folder.is_dir():
        parser.error(
            f"{folder} is not there; run the quickstart first, or give --model and --data-dir"
        )
    work, num_left_out = _load_work(arguments, folder)
    if not work.prompts:
        parser.error(
            f"no prompt fits the context of {work.model.config.max_position_embeddings} with "
            f"--max-new-tokens {work.max_new_tokens}"
        )
    result = {
        "command": COMMAND,
        "model": str(folder),
        "device": _name_device(work.model.device),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": "float32",
        "prompts": len(work.prompts),
        "left out, too long": num_left_out,
        "batch_size": work.batch_size,
        "max_new_tokens": work.max_new_tokens,
        **measure_pairs(work),
    }
    print(json.dumps(result, indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def _make_parser() -> argparse.ArgumentParser:
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
        default=ROOT / "bench" / "results" / "generation.json",
        help="default %(default)s",
    )
    return parser


def _load_work(arguments: argparse.Namespace, folder: Path) -> tuple[Work, int]:
    """Load the model in `folder`, and the prompts that fit its context; count those that do not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Both ways of generating then end a sequence at this token alone.
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(pad_token_id=end, eos_token_id=end)
    problems = gsm8k.read_problems(arguments.data_dir or folder, arguments.limit)
    prompts = encode_texts(tokenizer, [format_prompt(problem.question) for problem in problems])
    room = model.config.max_position_embeddings - arguments.max_new_tokens
    fitting = [ids for ids in prompts if len(ids) <= room]
    work = Work(model, tokenizer, fitting, arguments.batch_size, arguments.max_new_tokens)
    return work, len(prompts) - len(fitting)


def measure_pairs(work: Work) -> dict:
    """Time both ways of generating in turn, and compare their responses."""
    warm_up = work._replace(prompts=work.prompts[: work.batch_size])
    for function in (generate_plainly, generate_scheduled):
        function(warm_up)
    rates: dict[Generate, list[float]] = {generate_plainly: [], generate_scheduled: []}
    texts: dict[Generate, list[str]] = {}
    for number in range(PAIRS):
        order = list(rates) if number % 2 == 0 else list(reversed(rates))
        for function in order:
            rate, texts[function] = _measure_rate(function, work)
            rates[function].append(rate)
        plain, ours = rates[generate_plainly][-1], rates[generate_scheduled][-1]
        print(
            f"plain {plain:.0f} tokens/s, ours {ours:.0f} tokens/s: {ours / plain:.2f} times",
            flush=True,
        )
    pairs = zip(rates[generate_plainly], rates[generate_scheduled], strict=True)
    times = [ours / plain for plain, ours in pairs]
    lengths = [_count_tokens(work, text) for text in texts[generate_scheduled]]
    both = zip(texts[generate_plainly], texts[generate_scheduled], strict=True)
    return {
        "response tokens": {"median": statistics.median(lengths), "largest": max(lengths)},
        "tokens_per_second": {
            "plain": statistics.median(rates[generate_plainly]),
            "ours": statistics.median(rates[generate_scheduled]),
        },
        "times, of each pair": times,
        "times": statistics.median(times),
        "same responses": sum(plain == ours for plain, ours in both),
    }


def _measure_rate(function: Generate, work: Work) -> tuple[float, list[str]]:
    """Return the tokens per second of one run, and its responses."""
    start = time.perf_counter()
    texts = function(work)
    if work.model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return sum(_count_tokens(work, text) for text in texts) / seconds, texts


@torch.no_grad()
def generate_plainly(work: Work) -> list[str]:
    """Generate with transformers, one batch after another."""
    end, device = work.tokenizer.eos_token_id, work.model.device
    texts = []
    for start in range(0, len(work.prompts), work.batch_size):
        batch = work.prompts[start : start + work.batch_size]
        longest = max(map(len, batch))
        input_ids, mask = [], []
        for prompt in batch:
            padding = longest - len(prompt)
            input_ids.append([end] * padding + prompt)
            mask.append([0] * padding + [1] * len(prompt))
        generated = work.model.generate(
            input_ids=torch.tensor(input_ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=work.max_new_tokens,
        )
        texts += work.tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
    return texts


def generate_scheduled(work: Work) -> list[str]:
    """Generate with eval.generation.generate."""
    responses: dict[int, Completion | None] = {}
    for part in generate_responses(
        work.model,
        work.tokenizer,
        work.prompts,
        num_positions=get_num_positions(work.model.config),
        max_new_tokens=work.max_new_tokens,
        batch_size=work.batch_size,
        device=work.model.device,
        sharded=False,
        end_tokens=find_end_tokens(work.model, work.tokenizer),
    ):
        responses |= part
    return [responses[i].text if responses[i] else "" for i in range(len(work.prompts))]


def _count_tokens(work: Work, text: str) -> int:
    return len(work.tokenizer(text, add_special_tokens=False).input_ids)


def _name_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores"


if __name__ == "__main__":
    main()
