"""The embedded default: a small Llama, pretrained here on generated English with simple arithmetic, and a task for it.

Nothing is downloaded. The base learns sums of numbers from 0 to 9 as statements, and as questions in the training
prompt that it answers "a + b = c."; fine-tuning then teaches word problems of a form it has not seen, answered
"a + b = c.\nThe answer is: c". The held-out problems share no pair of numbers with the training problems.
"""

import fcntl
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

from launch.config.schema import Recipe, Train, validate
from launch.data.tokenize import TokenSet, prompt, step_rows
from launch.engines import make_engine
from launch.runtime import watchdog as watch
from launch.runtime.distributed import on_rank0
from launch.runtime.files import cache_root, write_json
from launch.training.loop import make_stepper, train
from launch.training.metrics_log import progress

NAME, MANIFEST = "quickstart", "manifest.json"
VERSION = 1  # raise it with every change here that changes the base's or the data's bytes
VOCABULARY = 400  # sentencepiece tokens, digits one by one
ROW = 128  # tokens of a pretraining row
STEPS = 650
PRETRAINING = Train(global_batch=16, micro_batch=8, lr=4.5e-3, max_steps=STEPS)
DOCUMENTS = 30_000
TRAIN_PROBLEMS, TEST_PROBLEMS = 3600, 200
OTHER_DOCUMENTS = 300
SEED = 0
PLACES = {  # fields of a recipe that may name the quickstart, and what of its folder is meant
    ("model", "name"): "",
    ("data", "path"): "train.jsonl",
    ("eval", "data_dir"): "",
    ("eval", "other_text"): "other_text.jsonl",
}

PEOPLE = "Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor".split()
THINGS = "apples books cards coins cups eggs flowers hats keys pears pens rings shells stamps stones toys".split()
STATEMENTS = [
    "{x} has {a} {t}. {y} has {b} {t}. In all they have {c} {t}.",
    "There are {a} {t} on the table and {b} {t} in the box. That makes {c} {t}.",
    "{x} had {a} {t} and then got {b} more. Now {x} has {c} {t}.",
    "{a} plus {b} is {c}.",
    "The sum of {a} and {b} is {c}.",
    "{x} counts {a} {t} and {y} counts {b} {t}: {a} + {b} = {c}.",
]
BASE_QUESTIONS = [
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
]
PROBLEMS = [
    "{x} found {a} {t} and {y} found {b} {t}. How many {t} did they find together?",
    "{x} buys {a} {t} on Monday and {b} {t} on Friday. How many {t} does {x} buy?",
    "There were {a} {t} in a bag. {x} put in {b} more {t}. How many {t} are in the bag now?",
    "{x} made {a} {t}. {y} made {b} {t}. How many {t} were made?",
    "A shop sold {a} {t} in the morning and {b} {t} in the evening. How many {t} did the shop sell?",
]


def resolve(recipe: Recipe, device: torch.device) -> Recipe:
    """`recipe` with the quickstart's base, data and problems as local paths; made first if they are not cached.

    Collective: all ranks pretrain together. A recipe that does not name the quickstart comes back as it is.
    """
    values = recipe.model_dump()
    named = [(*place, path) for place, path in PLACES.items() if values[place[0]][place[1]] == NAME]
    if not named:
        return recipe
    folder = ensure(device)
    for section, field, path in named:
        values[section][field] = str(folder / path)
    return validate(values)


def ensure(device: torch.device) -> Path:
    """The folder with base, rows, problems and other text; made first if it is not cached. Collective."""
    folder = cache_folder()
    with alone(folder):
        if not on_rank0((folder / MANIFEST).is_file):
            make(folder, device)
    return folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Of the runs that find `folder` not made, one at a time goes on within this; the others wait for it."""
    if dist.get_rank() != 0 or (folder / MANIFEST).is_file():
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """Where base and data are kept: keyed by VERSION and torch's version, which decide their bytes."""
    key = hashlib.sha256(f"{VERSION} {torch.__version__}".encode()).hexdigest()[:12]
    return cache_root() / f"quickstart-{key}"


def make_config() -> LlamaConfig:
    """Of the quickstart's base."""
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


def make(folder: Path, device: torch.device) -> None:
    """Pretrain the base and write it with the task's data to `folder`, whole or not at all. Collective."""
    if dist.get_rank() == 0:
        print(f"quickstart: pretraining a small base once, to {folder}", flush=True)
    tokenizer_model, tokens = on_rank0(
        lambda: _pretraining_tokens(list(documents(DOCUMENTS, SEED)))
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(make_config()).to(device)
    engine = make_engine("zero2" if dist.get_world_size() > 1 else "single", device, torch.float32)
    steps = list(step_rows(len(tokens), PRETRAINING.global_batch, 1, STEPS, SEED))
    watch.stage("pretraining", timed=True)
    metrics = train(make_stepper(engine, model, PRETRAINING), tokens, steps, PRETRAINING, device)
    for metric in progress(metrics, STEPS, "pretrain", dist.get_rank()):
        last = metric
    watch.stage("writing the quickstart")
    on_rank0(lambda: _write(folder, model, tokenizer_model, last["loss"]))


def _write(folder: Path, model: LlamaForCausalLM, tokenizer_model: bytes, loss: float) -> None:
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    _tokenizer(tokenizer_model).save_pretrained(aside)
    train_rows, test_rows = problems()
    other_text = [{"text": text} for text in documents(OTHER_DOCUMENTS, SEED + 2)]
    files = {
        "train.jsonl": train_rows,
        "gsm8k_test.jsonl": test_rows,
        "other_text.jsonl": other_text,
    }
    for name, rows in files.items():
        (aside / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_json(
        aside / MANIFEST, {"parameters": parameters, "steps": STEPS, "loss": loss, "seed": SEED}
    )
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def documents(count: int, seed: int) -> Iterator[str]:
    """Pretraining text: statements, and questions in the training prompt with the base's form of answer."""
    draw = random.Random(seed)
    for _ in range(count):
        a, b = draw.randrange(10), draw.randrange(10)
        if draw.random() < 0.5:
            question = draw.choice(BASE_QUESTIONS).format(a=a, b=b)
            yield f"{prompt(question)}{a} + {b} = {a + b}."
        else:
            yield " ".join(
                _fill(draw, draw.choice(STATEMENTS), a, b)
                for a, b in ((a, b), (b, draw.randrange(10)))
            )


def problems() -> tuple[list[dict], list[dict]]:
    """Training rows in MetaMathQA's fields and test rows in GSM8K's, with no unordered pair of numbers in common."""
    draw = random.Random(SEED + 1)
    pairs = [(a, b) for a in range(10) for b in range(a, 10)]
    draw.shuffle(pairs)
    held_out, seen = pairs[:11], pairs[11:]

    def distinct(pairs: list[tuple[int, int]], count: int) -> list[tuple[str, int, int]]:
        made: dict[str, tuple[int, int]] = {}
        while len(made) < count:
            a, b = draw.sample(draw.choice(pairs), 2)
            made[_fill(draw, draw.choice(PROBLEMS), a, b)] = (a, b)
        return [(question, a, b) for question, (a, b) in made.items()]

    train_rows = [
        {
            "query": question,
            "response": f"{a} + {b} = {a + b}.\nThe answer is: {a + b}",
            "type": "QUICKSTART_sum",
            "original_question": question,
        }
        for question, a, b in distinct(seen, TRAIN_PROBLEMS)
    ]
    test_rows = [
        {"question": question, "answer": f"{a} + {b} = {a + b}.\n#### {a + b}"}
        for question, a, b in distinct(held_out, TEST_PROBLEMS)
    ]
    return train_rows, test_rows


def _fill(draw: random.Random, template: str, a: int, b: int) -> str:
    x, y = draw.sample(PEOPLE, 2)
    return template.format(x=x, y=y, t=draw.choice(THINGS), a=a, b=b, c=a + b)


def _pretraining_tokens(texts: list[str]) -> tuple[bytes, TokenSet]:
    """A sentencepiece model trained on `texts`, and the texts end to end in rows of ROW tokens."""
    # The task's words are in the vocabulary, though the base never sees its problems.
    words = [
        *texts[:5000],
        *(_fill(random.Random(i), PROBLEMS[i % len(PROBLEMS)], 1, 2) for i in range(1000)),
    ]
    model = _train_sentencepiece([*words, "The answer is: 1"])
    tokenizer = _tokenizer(model)
    ids = [i for row in tokenizer(texts).input_ids for i in (*row, tokenizer.eos_token_id)]
    rows = len(ids) // ROW
    offsets = torch.arange(rows + 1) * ROW
    tokens = torch.tensor(ids[: rows * ROW], dtype=torch.int32)
    return model, TokenSet(tokens, offsets, torch.ones(rows, dtype=torch.int64), 0, 0)


def _train_sentencepiece(texts: list[str]) -> bytes:
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


def _tokenizer(model: bytes) -> PreTrainedTokenizerBase:
    with TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model)
        return LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=False)
