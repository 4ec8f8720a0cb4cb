"""Tokens per second of the project's generation against transformers' `generate`."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bench.generation import Work as Generation
from bench.generation import measure_pairs
from bench.gpu_parts.common import Shape, make_base, make_questions, write_tokenizer
from bench.gpu_parts.report import Report, Work
from launch.data.prompts import format_prompt
from launch.data.tokenize import encode_texts


def measure(work: Work, report: Report) -> None:
    """Time both in turn, on a bf16 model (fp32 on CPUs)."""
    prompts, batch_size, limit = (8, 4, 16) if work.tiny else (128, 32, 128)
    folder = work.real_model or _make_talker(work)
    dtype = torch.float32 if work.tiny else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(work.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(pad_token_id=end, eos_token_id=end)
    texts = [format_prompt(question) for question, _ in make_questions(prompts)]
    ids = encode_texts(tokenizer, texts)
    found = measure_pairs(Generation(model, tokenizer, ids, batch_size, limit))
    times = found["times"]
    report.figures["response tokens"] = found["response tokens"]
    report.figures["tokens/s"] = {
        name: round(rate, 1) for name, rate in found["tokens_per_second"].items()
    }
    report.figures["times, of each pair"] = [
        round(value, 2) for value in found["times, of each pair"]
    ]
    report.figures["same responses"] = f"{found['same responses']} of {prompts}"
    if dtype == torch.float32:  # in bf16 near ties are decided by a batch's shape
        report.check(
            "responses are those of `generate`",
            found["same responses"] == prompts,
            f"{found['same responses']} of {prompts}",
        )
    report.goal("generation at least as fast as `generate`", times >= 1, f"{times:.2f} times")


def _make_talker(work: Work) -> Path:
    """Make a random model whose responses vary in length; return its folder.

    Its weights are so large that the next token depends on all before it, and any is as likely, the
    end too. With small weights a random model repeats itself up to the limit.
    """
    folder = work.folder / "talker"
    shape = Shape(2, 64, 176, 4, 2) if work.tiny else Shape(12, 768, 2048, 12, 4)
    make_base(folder, shape, len(write_tokenizer(folder)), torch.float32, work.device, spread=0.2)
    return folder
