"""What the parts share: random models, rows and recipes, and a training by the main path's functions."""

import gc
import json
import random
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from astra import adapter, inits
from bench.gpu_parts.report import Work
from launch.config.schema import Adapter, Train
from launch.data.token_set import TokenSet
from launch.engines import make_engine
from launch.engines.base import TrainState
from launch.models.check import check_model
from launch.training.loop import make_train_state
from launch.training.loss import in_bf16

SEED = 0
ENGINES = ("single", "fsdp", "zero2", "zero3")
END = "</s>"


class Shape(NamedTuple):
    """Sizes of a Llama."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int


def make_base(
    folder: Path,
    shape: Shape,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    spread: float = 0.02,
) -> None:
    """Draw a random Llama on `device` and write it to `folder`.

    Args:
        spread: standard deviation of the weights.
    """

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=0,
        dtype=str(dtype).removeprefix("torch."),
    )
    with device:
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)


def make_small_base(work: Work) -> Path:
    """Return the folder of the real model, or else of a small random one with a tokenizer."""
    if work.real_model:
        return work.real_model
    folder = work.folder / "small"
    if not folder.is_dir():
        tokenizer = write_tokenizer(folder)
        shape = Shape(2, 64, 176, 4, 2) if work.tiny else Shape(8, 512, 1408, 8, 4)
        make_base(folder, shape, len(tokenizer), torch.float32, work.device)
    return folder


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer with one token for each printable character; return it."""
    words = [END, "<unk>", *sorted(string.printable)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def make_questions(count: int) -> list[tuple[str, str]]:
    """Draw questions with their answers, of ragged length."""
    draw = random.Random(SEED)
    questions = []
    for _ in range(count):
        numbers = [draw.randrange(100) for _ in range(draw.randrange(2, 12))]
        question = f"What is {' + '.join(map(str, numbers))}?"
        questions.append((question, f"The answer is: {sum(numbers)}"))
    return questions


def write_recipe(work: Work, **train: object) -> Path:
    """Write rows and a recipe that trains the small base on them; return the recipe's path.

    Args:
        train: fields of the section of that name.
    """
    rows = work.folder / "rows.jsonl"
    records = [{"query": query, "response": answer} for query, answer in make_questions(512)]
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"global_batch": 8, "micro_batch": 4, "max_steps": 3, "lr": 1e-3} | train
    values = {
        "model": {"name": str(make_small_base(work))},
        "data": {"path": str(rows)},
        "adapter": {"rank": 8, "alpha": 8},
        "calibration": {"samples": 8, "batch_size": 4},
        "train": settings,
        "eval": {"suites": []},
        "engine": "single",
    }
    path = work.folder / "recipe.yaml"
    path.write_text(json.dumps(values, indent=1))  # JSON is YAML
    return path


def make_tokens(examples: int, length: int, vocabulary: int) -> TokenSet:
    """Draw a TokenSet of `examples` of `length` random tokens, the last three quarters answers."""
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(2, vocabulary, (examples * length,), generator=draw, dtype=torch.int32)
    offsets = torch.arange(0, len(ids) + 1, length)
    return TokenSet(ids, offsets, torch.full((examples,), length // 4), 0, 0)


@contextmanager
def start_training(
    engine_name: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    settings: Train,
    checkpointing: bool = False,
) -> Iterator[tuple[PeftModel, TrainState]]:
    """Yield a LoRA training on an engine. Frees what earlier ones held that no one holds any more."""
    free_memory()

    engine = make_engine(engine_name, device, dtype)
    base = engine.load_model(check_model(folder))
    model = adapter.attach_adapters(base, Adapter().targets, rank, rank, 0.0)
    engine.materialize(model)
    adapter.initialise_layers(
        adapter.get_lora_layers(model),
        lambda name, weight: inits.init_lora(weight, rank, SEED, name),
        engine,
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": engine.reentrant})
    state = make_train_state(engine, model, settings)
    with in_bf16(model):
        yield model, state


def free_memory() -> None:
    """Free what no one holds. transformers loads with ZeRO-3 as long as such an engine is alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def find_largest_difference(losses: list[float], wanted: list[float]) -> float:
    """Return the largest relative difference of two runs' losses; infinite where steps lack."""
    if len(losses) != len(wanted):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))


def read_losses(run: Path) -> list[float]:
    """Read the losses of a run's metrics.jsonl."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
