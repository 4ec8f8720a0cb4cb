"""Tiny random bases with their tokenizers, rows with labels, and plain PEFT training on them."""

import inspect
import json
import math
import random
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from launch.config.loading import read_recipe
from launch.config.schema import Recipe
from launch.models.check import check_model, draw_weight
from launch.models.head import Head

WORDS = [f"w{i}" for i in range(40)]
LABELS = ["no", "maybe", "yes"]
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
VOCABULARY = {word: i for i, word in enumerate([*SPECIALS, *WORDS])}
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.15,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MAX_LENGTH = 16
# Kind of base -> linear modules of its layers.
TARGETS = {
    "bert": ["query", "value", "dense"],
    "roberta": ["query", "value", "dense"],
    "deberta": ["query_proj", "key_proj", "value_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}


def make_rows(count: int, seed: int, regression: bool = False) -> list[dict]:
    """Make pairs of texts of ragged length; the label follows from their words, mostly."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        first, second = ([draw.randrange(40) for _ in range(draw.randrange(1, 14))] for _ in "ab")
        place = (sum(first) + sum(second)) % 3
        label = round(place + draw.random(), 3) if regression else LABELS[place]
        texts = (" ".join(WORDS[i] for i in words) for words in (first, second))
        rows.append(dict(zip(("left", "right"), texts, strict=True)) | {"label": label})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_base(folder: Path, kind: str) -> Path:
    """Write a random base, as such bases are published, with a tokenizer of whole words."""
    torch.manual_seed(5)
    match kind:
        case "bert":  # without a prefix in its files, and with the pooler, as MiniLM
            model = BertModel(BertConfig(**SIZES, **NO_DROPOUT, max_position_embeddings=32))
        case "roberta":  # with the head of its pretraining, and without a pooler
            config = RobertaConfig(
                **SIZES, **NO_DROPOUT, max_position_embeddings=20, type_vocab_size=1, pad_token_id=0
            )
            model = RobertaForMaskedLM(config)
        case "deberta":  # as version 3: query and key also run on relative positions
            config = DebertaV2Config(
                **SIZES,
                **NO_DROPOUT,
                max_position_embeddings=32,
                relative_attention=True,
                position_buckets=8,
                share_att_key=True,
                pos_att_type=["p2c", "c2p"],
                norm_rel_ebd="layer_norm",
                position_biased_input=False,
                type_vocab_size=0,
            )
            model = DebertaV2Model(config)
        case "llama":  # without a padding token
            config = LlamaConfig(
                **SIZES, num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=1
            )
            model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    make_tokenizer(kind).save_pretrained(folder)
    return folder


def make_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """Make a tokenizer that joins pairs as the kind's own one does."""
    whole = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = "[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    options = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    if kind == "roberta":
        pair = "[CLS] $A [SEP] [SEP] $B [SEP]"
        options["model_input_names"] = ["input_ids", "attention_mask"]
    if kind == "llama":
        single, pair = "[CLS] $A", "[CLS] $A $B"
        options = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    if kind != "roberta":  # a Llama takes no token types, whatever its tokenizer gives
        options["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    tokens = [(token, VOCABULARY[token]) for token in ("[CLS]", "[SEP]")]
    whole.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=tokens
    )
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="[UNK]", **options)


def make_recipe(folder: Path, kind: str, regression: bool = False) -> Path:
    """Write a base, training and development rows, and a recipe of 20 steps; its path."""
    folder.mkdir(exist_ok=True)
    labelled = {"kind": "classification", "labels": LABELS}
    values = {
        "model": {"name": str(make_base(folder / "base", kind))},
        "data": {
            "path": str(write_rows(folder / "train.jsonl", make_rows(60, 1, regression))),
            "max_length": MAX_LENGTH,
        },
        "task": {
            **({"kind": "regression"} if regression else labelled),
            "sentence1": "left",
            "sentence2": "right",
            "dev": str(write_rows(folder / "dev.jsonl", make_rows(21, 2, regression))),
        },
        "adapter": {"method": "astra", "rank": 4, "alpha": 8, "targets": TARGETS[kind]},
        "calibration": {"samples": 12, "batch_size": 2},
        "train": {
            "global_batch": 6,
            "micro_batch": 2,
            "max_steps": 20,
            "lr": 1e-3,
            "head_lr": 2e-3,
            "checkpoint_every": 7,
            "keep": 9,
        },
        "engine": "single",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


# Plain transformers and PEFT


def load_plain_base(recipe: Recipe) -> nn.Module:
    """Load the base with a new head by plain transformers."""
    options = {} if recipe.task.labels else {"problem_type": "regression"}
    model = AutoModelForSequenceClassification.from_pretrained(
        recipe.model.name, num_labels=max(1, len(recipe.task.labels)), **options
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = VOCABULARY["[SEP]"]
    return model


def encode_rows(rows: list[dict], recipe: Recipe, model: nn.Module) -> dict[str, Tensor]:
    """Encode and pad rows by the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded = tokenizer(
        [row["left"] for row in rows],
        [row["right"] for row in rows],
        padding=True,
        truncation="longest_first",
        max_length=MAX_LENGTH,
        return_tensors="pt",
    )
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in encoded.items() if name in accepted}


def make_plain_model(run: Path, recipe: Recipe, modules_to_save: list[str]) -> PeftModel:
    """Make the model by plain PEFT, with the run's initial factors, residual base and head."""
    base = load_plain_base(recipe)
    initial = load_file(run / "checkpoints" / "step-0000000" / "tensors.safetensors")
    names = list(dict.fromkeys(key.rsplit(".", 2)[0] for key in initial))
    adapter = recipe.adapter
    head = Head(tuple(recipe.task.labels), VOCABULARY["[SEP]"])
    checked = check_model(Path(recipe.model.name), head=head)
    with torch.no_grad():
        for name in checked.new_weights:
            drawn = draw_weight(checked.folder, name, recipe.train.seed, head)
            base.get_parameter(name).copy_(drawn)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=names,
        task_type="SEQ_CLS",
        modules_to_save=modules_to_save,
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name in names:
            layer = model.get_base_model().get_submodule(name)
            a, b = (initial[f"{name}.{side}.initial"] for side in "AB")
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
            product = adapter.alpha / adapter.rank * (b.double() @ a.double())
            weight = layer.base_layer.weight
            weight.copy_(weight.double() - product)
    return model


def train_classifier(model: PeftModel, recipe: Recipe, rows: list[dict]) -> list[float]:
    """Train by PyTorch alone, whole steps at once; return the loss of every step."""
    settings, model = recipe.train, model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if "lora_" not in name]
    others = [p for name, p in trained.items() if "lora_" in name]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": head}], weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    warmup = math.ceil(settings.max_steps * settings.warmup_ratio)
    losses = []
    for step in range(settings.max_steps):
        while len(order) < settings.global_batch:
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen = [rows[i] for i in order[: settings.global_batch]]
        order = order[settings.global_batch :]
        labels = [row["label"] for row in chosen]
        if recipe.task.labels:
            labels = [recipe.task.labels.index(label) for label in labels]
        inputs = encode_rows(chosen, recipe, model.get_base_model())
        loss = model(**inputs, labels=torch.tensor(labels)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), settings.max_grad_norm)
        share = (step - warmup) / (settings.max_steps - warmup)
        rate = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
        for group, peak in zip(
            optimizer.param_groups, (settings.lr, settings.head_lr), strict=True
        ):
            group["lr"] = peak * rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def predict_plainly(model: nn.Module, recipe: Recipe, rows: list[dict]) -> Tensor:
    """Return the outputs for each row, run alone and so without padding: (rows, outputs)."""
    model = model.eval()
    outputs = [model(**encode_rows([row], recipe, model.get_base_model())).logits for row in rows]
    return torch.cat(outputs).double()


def read_predictions(run: Path, step: int | None = None) -> list[dict]:
    """Read the predictions that a run kept after a step, its last epoch's when None."""
    name = "*.jsonl" if step is None else f"*-step-{step:07d}.jsonl"
    path = sorted((run / "predictions").glob(name))[-1]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load_recipe(path: Path, *settings: str) -> Recipe:
    """Read a recipe of `make_recipe`."""
    return read_recipe(str(path), list(settings))
