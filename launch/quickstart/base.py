"""The embedded default: a small Llama, pretrained here on generated text. Nothing is downloaded."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerBase

from launch.config.loading import validate_recipe
from launch.config.schema import Recipe, Train
from launch.data.order import plan_steps
from launch.data.token_set import TokenSet
from launch.engines import make_engine
from launch.quickstart.data import (
    NUM_DOCUMENTS,
    NUM_OTHER_DOCUMENTS,
    PROBLEMS,
    SEED,
    fill_template,
    generate_documents,
    generate_problems,
)
from launch.run.progress import show_progress
from launch.runtime import watchdog
from launch.runtime.distributed import print_rank0, run_on_rank0
from launch.runtime.files import cache_root, write_json
from launch.runtime.locks import hold_lock
from launch.training.loop import make_train_state, train

NAME, MANIFEST = "quickstart", "manifest.json"
VERSION = 1  # raise it with every change that changes the bytes of the base or of its data
VOCABULARY = 400  # sentencepiece tokens, digits one by one
ROW = 128  # tokens of a pretraining row
STEPS = 650
PRETRAINING = Train(global_batch=16, micro_batch=8, lr=4.5e-3, max_steps=STEPS)
# Fields of a recipe that may name the quickstart -> the file of its folder that is meant.
PLACES = {
    ("model", "name"): "",
    ("data", "path"): "train.jsonl",
    ("eval", "data_dir"): "",
    ("eval", "other_text"): "other_text.jsonl",
}


def resolve_quickstart(recipe: Recipe, device: torch.device) -> Recipe:
    """Return `recipe` with local paths wherever it names the quickstart. Collective.

    The quickstart's base, data and problems are made first if they are not cached: all ranks
    pretrain together. A recipe that does not name the quickstart is returned as it is.
    """
    values = recipe.model_dump()
    named = [place for place in PLACES if values[place[0]][place[1]] == NAME]
    sources = [rows for rows in values["data"]["sources"].values() if rows["path"] == NAME]
    if not named and not sources:
        return recipe
    folder = ensure_quickstart(device)
    for section, field in named:
        values[section][field] = str(folder / PLACES[section, field])
    for rows in sources:
        rows["path"] = str(folder / PLACES["data", "path"])
    return validate_recipe(values)


def ensure_quickstart(device: torch.device) -> Path:
    """Return the folder with base, rows, problems and other text, made if needed. Collective."""
    folder = cache_folder()
    with make_alone(folder):
        if not run_on_rank0((folder / MANIFEST).is_file):
            make_quickstart(folder, device)
    return folder


@contextmanager
def make_alone(folder: Path) -> Iterator[None]:
    """Let one run at a time proceed while `folder` is not made; the others wait for it."""
    if dist.get_rank() != 0 or (folder / MANIFEST).is_file():
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.with_suffix(".lock")):
        yield


def cache_folder() -> Path:
    """Return where base and data are kept.

    The name depends on VERSION and torch's version, which decide their bytes.
    """
    key = hashlib.sha256(f"{VERSION} {torch.__version__}".encode()).hexdigest()[:12]
    return cache_root() / f"quickstart-{key}"


def make_config() -> LlamaConfig:
    """Return the configuration of the quickstart's base, of 1 million parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def make_quickstart(folder: Path, device: torch.device) -> None:
    """Pretrain the base, and write it with the task's data to `folder`, whole or not at all.

    Collective.
    """
    print_rank0(f"quickstart: pretraining a small base once, to {folder}")
    documents = list(generate_documents(NUM_DOCUMENTS, SEED))
    tokenizer_model, tokens = run_on_rank0(lambda: _make_pretraining_tokens(documents))
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(make_config()).to(device)
    engine_name = "zero2" if dist.get_world_size() > 1 else "single"
    engine = make_engine(engine_name, device, torch.float32)
    steps = list(plan_steps(len(tokens), PRETRAINING.global_batch, 1, STEPS, SEED))
    watchdog.set_phase("pretraining", timed=True)
    state = make_train_state(engine, model, PRETRAINING)
    metrics = train(state, tokens, steps, PRETRAINING, device)
    loss = 0.0
    for step in show_progress(metrics, STEPS, "pretrain", dist.get_rank(), "steps"):
        loss = step["loss"]
    watchdog.set_phase("writing the quickstart")
    run_on_rank0(lambda: _write_quickstart(folder, model, tokenizer_model, loss))


def _write_quickstart(
    folder: Path, model: LlamaForCausalLM, tokenizer_model: bytes, loss: float
) -> None:
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    _load_tokenizer(tokenizer_model).save_pretrained(aside)
    train_rows, test_rows = generate_problems()
    other_text = generate_documents(NUM_OTHER_DOCUMENTS, SEED + 2)
    _write_rows(aside / "train.jsonl", train_rows)
    _write_rows(aside / "gsm8k_test.jsonl", test_rows)
    _write_rows(aside / "other_text.jsonl", [{"text": text} for text in other_text])
    manifest = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": STEPS,
        "loss": loss,
        "seed": SEED,
    }
    write_json(aside / MANIFEST, manifest)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _make_pretraining_tokens(texts: list[str]) -> tuple[bytes, TokenSet]:
    """Train a sentencepiece model, and cut the texts, one after another, into rows of ROW tokens."""
    # The task's words are in the vocabulary, though the base never sees its problems.
    vocabulary_texts = texts[:5000]
    for i in range(1000):
        template = PROBLEMS[i % len(PROBLEMS)]
        vocabulary_texts.append(fill_template(random.Random(i), template, 1, 2))
    vocabulary_texts.append("The answer is: 1")
    model = _train_sentencepiece(vocabulary_texts)
    tokenizer = _load_tokenizer(model)
    ids: list[int] = []
    for row in tokenizer(texts).input_ids:
        ids += [*row, tokenizer.eos_token_id]
    num_rows = len(ids) // ROW
    tokens = TokenSet(
        tokens=torch.tensor(ids[: num_rows * ROW], dtype=torch.int32),
        offsets=torch.arange(num_rows + 1) * ROW,
        prompt_lengths=torch.ones(num_rows, dtype=torch.int64),  # all but the first token count
        num_truncated=0,
        num_dropped=0,
    )
    return model, tokens


def _train_sentencepiece(texts: list[str]) -> bytes:
    """Return a sentencepiece model with a vocabulary of VOCABULARY."""
    with TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=f"{folder}/tokenizer",
            vocab_size=VOCABULARY,
            model_type="bpe",
            split_digits=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            minloglevel=2,
        )
        return Path(folder, "tokenizer.model").read_bytes()


def _load_tokenizer(model: bytes) -> PreTrainedTokenizerBase:
    with TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model)
        return LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=False)
