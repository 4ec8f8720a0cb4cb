"""The rows that a calibration runs, in batches.

`exact`: prompt, answer and EOS as in training, every real token counted. `reference`: as the authors' code has them
(LyoAI/Astra, dataset/loader.py and astra.py): another prompt, no EOS after the answer, padded with EOS to the maximum
length, the last token cut off, and padding counted. Their draw of rows is not reproduced, nor sums in less than fp64.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from astra.moments import Batch
from eval.tasks.base import ALPACA
from launch.config.schema import Data, Recipe
from launch.data.inputs import Inputs
from launch.data.sources import EMPTY, NOT_TEXT, fetch, load, select
from launch.data.tokenize import choose, collate, deal, encode
from launch.methods import registry as methods
from launch.runtime.distributed import on_rank0
from launch.runtime.errors import UserError
from launch.runtime.model_files import load_tokenizer

REFERENCE = "{instruction}\n### Response:{answer}"


def prompt(recipe: Recipe) -> str:
    """What a sample's text is made by."""
    return REFERENCE if recipe.calibration.statistics == "reference" else ALPACA


def sample_ids(recipe: Recipe, inputs: Inputs) -> list[int]:
    """The rows that are calibrated on; none for a method that looks at weights alone."""
    settings, tokens = recipe.calibration, inputs.tokens
    if methods.kind(recipe).needs == "weight":
        return []
    rows = len(tokens)
    if settings.statistics == "reference":  # it has rows too that are too long to be trained on
        rows += sum(
            count
            for reason, count in inputs.data["dropped"].items()
            if reason not in (NOT_TEXT, EMPTY)
        )
    return choose(rows, settings.samples, settings.seed)


def lengths(recipe: Recipe, inputs: Inputs, samples: Sequence[int]) -> Tensor:
    """(samples,), tokens of each that are counted."""
    if recipe.calibration.statistics == "reference":
        return torch.full((len(samples),), recipe.data.max_length - 1)
    return inputs.tokens.lengths()[samples]


def parts(
    recipe: Recipe, inputs: Inputs, samples: list[int], device: torch.device
) -> list[list[Batch]]:
    """This rank's batches of the samples, or of each of their halves; no part without samples. Collective."""
    if not samples:
        return []
    halves = [samples]
    if recipe.calibration.split_half:
        halves = [samples[: len(samples) // 2], samples[len(samples) // 2 :]]
    if not all(halves):
        raise UserError(f"calibration.samples: {len(samples)} cannot be split in halves; raise it")
    if recipe.calibration.statistics == "reference":
        encoded = on_rank0(lambda: _encode_reference(recipe.data, inputs.model_path, samples))
        return [
            _reference_batches(encoded, half, recipe.data.max_length, device) for half in halves
        ]
    return [_batches(inputs, half, recipe.calibration.batch_size, device) for half in halves]


def _batches(inputs: Inputs, samples: list[int], size: int, device: torch.device) -> list[Batch]:
    made = []
    for rows in deal(samples, dist.get_rank(), dist.get_world_size(), size):
        batch, labels = collate(inputs.tokens, rows, device)
        made.append(batch | {"labels": labels})
    return made


def _encode_reference(data: Data, model_path: Path, samples: list[int]) -> dict:
    """The token ids of each sample, and EOS, as `eos`."""
    tokenizer = load_tokenizer(model_path)
    rows = [row for chunk in select(load(data, fetch(data)), data) for row in chunk.rows]
    texts = [
        REFERENCE.format(
            instruction="\n".join(filter(None, (row.instruction, row.input))), answer=row.answer
        )
        for row in (rows[i] for i in samples)
    ]
    return dict(zip(samples, encode(tokenizer, texts), strict=True)) | {
        "eos": tokenizer.eos_token_id
    }


def _reference_batches(
    encoded: dict, samples: list[int], length: int, device: torch.device
) -> list[Batch]:
    made = []
    for (row,) in deal(samples, dist.get_rank(), dist.get_world_size(), 1):
        text = encoded[samples[0] if row is None else row][:length]
        ids = torch.tensor([text + [encoded["eos"]] * (length - len(text))], device=device)[:, :-1]
        positions = torch.arange(length - 1, device=device)[None]
        made.append(
            Batch(
                input_ids=ids,
                counted=torch.full_like(ids, row is not None, dtype=torch.bool),
                attention_mask=(positions < len(text)).long(),
            )
        )
    return made
