"""The examples that a calibration runs, in batches.

`exact`: prompt, answer and end of sequence as in training; every real token counts. Of rows with
labels, the texts with the tokenizer's special tokens.

`reference`: as the authors' code has them (LyoAI/Astra, dataset/loader.py and astra.py): another
prompt, no end of sequence after the answer, padded with it to the maximum length, the last token
cut off, and padding counted. Their draw of rows is not reproduced, nor sums in less than fp64.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from astra.moments import Batch
from eval.tasks.base import ALPACA_PROMPT
from launch.calibration.store import is_finished
from launch.config.schema import Recipe
from launch.data.batches import collate_examples, collate_rows
from launch.data.inputs import Inputs
from launch.data.mix.shares import Share, list_distinct
from launch.data.order import sample_examples, shard_batches
from launch.data.rows import BAD_TEXT, fetch_source, load_split, select_rows
from launch.data.token_cache import hash_source, open_prepared
from launch.data.tokenize import encode_texts
from launch.models.files import load_tokenizer
from launch.run.results import CalibrationData, DataRecord, describe_calibrated
from launch.runtime.distributed import print_rank0, run_on_rank0
from launch.runtime.errors import UserError

REFERENCE_PROMPT = "{instruction}\n### Response:{answer}"
EOS = "eos"  # the key of the end-of-sequence token among encoded samples


def choose_prompt(recipe: Recipe) -> str | None:
    """Return the template of a sample's text, which is part of what decides a calibration.

    None for plain text, which has none, and for messages and mixes, whose templates decided the
    tokens.
    """
    if recipe.calibration.data is None and (recipe.data.messages or recipe.data.sources):
        return None
    if recipe.calibration.data is not None and recipe.calibration.data.text is not None:
        return None
    return REFERENCE_PROMPT if recipe.calibration.statistics == "reference" else ALPACA_PROMPT


def list_examples(recipe: Recipe, inputs: Inputs) -> Sequence[int]:
    """List the examples from which a calibration draws its samples, each of them once."""
    num_examples = len(inputs.calibration.tokens)
    if recipe.calibration.statistics == "reference" and recipe.data.held_out == 0:
        # The reference also has rows that are too long to be trained on. Only without held-out rows:
        # those are the last kept rows, so a draw from all rows could hit one. The first
        # `num_examples` of all rows hold none.
        for reason, count in inputs.data["dropped"].items():
            if reason not in BAD_TEXT:
                num_examples += count
    if recipe.calibration.data is None and inputs.data.get("sources"):
        # A mix may hold a row several times: only distinct ones are drawn.
        sources = inputs.data["sources"]
        shares = {
            name: Share(*(sources[name][f] for f in Share._fields)) for name in sorted(sources)
        }
        return list_distinct(shares)
    return range(num_examples)


def draw_samples(recipe: Recipe, inputs: Inputs) -> list[int]:
    """Draw the examples to calibrate on; none for a method that looks at weights alone."""
    settings = recipe.calibration
    if recipe.statistic == "weight":
        return []
    examples = list_examples(recipe, inputs)
    places = sample_examples(len(examples), settings.samples, settings.seed)
    return [examples[place] for place in places]


def check_samples(recipe: Recipe, inputs: Inputs, folder: Path) -> None:
    """Check the examples of a calibration in `folder`, before a base is loaded for it. Collective.

    Raises:
        UserError: there are fewer than the calibration is to have, or their rows are not those that
            data.prepared was made from.
    """
    if recipe.adapter.method_record.is_calibrated:
        draw_samples(recipe, inputs)
        run_on_rank0(lambda: check_reference_rows(recipe, folder))


def check_reference_rows(recipe: Recipe, folder: Path) -> None:
    """Check the rows that the reference statistics read again beside prepared tokens. Rank 0 calls it.

    Raises:
        UserError: the rows that data.prepared was made from are not there, or changed.
    """
    data, settings = recipe.data, recipe.calibration
    is_reference = settings.statistics == "reference" and data.prepared is not None
    if not is_reference or settings.path is not None or is_finished(folder):
        return
    try:
        source = fetch_source(data)
        found = hash_source(load_split(data, source), source)
    except UserError as error:
        raise UserError(
            f"calibration.statistics: reference reads the rows again, not {data.prepared}: {error}"
        ) from None
    if found != open_prepared(data.prepared).manifest["source_sha256"]:
        raise UserError(
            f"calibration.statistics: reference reads the rows of {data.path} again, which are not "
            f"those that {data.prepared} was made from; bring those back, or prepare again"
        )


def print_calibration_rows(recipe: Recipe, inputs: Inputs) -> None:
    """Print what is calibrated on where that is not the training rows, and how much of it is held out."""
    rows = recipe.calibration.data
    if rows is None:
        return
    config = "" if rows.config is None else f" ({rows.config})"
    tokens, kind = inputs.calibration.tokens, "rows"
    if rows.text is not None:
        kind = f"blocks of at most {recipe.data.max_length} tokens of its field {rows.text!r}"
    dropped = "".join(
        f"; {count} rows {reason}" for reason, count in inputs.calibration.data["dropped"].items()
    )
    print_rank0(
        f"calibration data: {rows.path}{config}, split {rows.split}: {len(tokens)} {kind}{dropped}"
    )
    for subject, line in describe_calibrated(DataRecord.model_validate(inputs.data)):
        print_rank0(f"{subject}: {line}")


def count_tokens(recipe: Recipe, inputs: Inputs, samples: Sequence[int]) -> Tensor:
    """Return how many tokens of each sample count, (samples,)."""
    if recipe.calibration.statistics == "reference":
        return torch.full((len(samples),), recipe.data.max_length - 1)
    return inputs.calibration.tokens.lengths()[samples]


def describe_calibration_data(recipe: Recipe, inputs: Inputs) -> CalibrationData | None:
    """Return what the initial factors are made from; None where no example is run."""
    if recipe.statistic in (None, "weight"):
        return None
    samples = draw_samples(recipe, inputs)
    return CalibrationData(
        path=inputs.calibration.data["path"],
        tokens_sha256=inputs.calibration.data["tokens_sha256"],
        examples=len(samples),
        tokens=int(count_tokens(recipe, inputs, samples).sum()),
    )


def make_calibration_batches(
    recipe: Recipe, inputs: Inputs, samples: list[int], device: torch.device
) -> list[list[Batch]]:
    """Make this rank's batches of all samples, or with split_half of each half. Collective.

    Returns:
        One list of batches, or two; none without samples.
    """
    if not samples:
        return []
    halves = split_samples(samples) if recipe.calibration.split_half else [samples]
    if recipe.calibration.statistics == "reference":
        encoded = run_on_rank0(lambda: _encode_reference(recipe, inputs, samples))
        length = recipe.data.max_length
        return [_make_reference_batches(encoded, half, length, device) for half in halves]
    return [_make_batches(inputs, half, recipe.calibration.batch_size, device) for half in halves]


def split_samples(samples: list[int]) -> list[list[int]]:
    """Return the two halves of the samples. Raises UserError if one would be empty."""
    if len(samples) < 2:
        raise UserError(f"calibration.samples: {len(samples)} cannot be split in halves; raise it")
    # Rows may lie in an order, such as source after source: each half has its part of it all.
    return [samples[::2], samples[1::2]]


def _make_batches(
    inputs: Inputs, samples: list[int], size: int, device: torch.device
) -> list[Batch]:
    batches = []
    for examples in shard_batches(samples, dist.get_rank(), dist.get_world_size(), size):
        if inputs.calibration.tokens.labels is not None:
            batches.append(_make_row_batch(inputs, examples, device))
            continue
        batch, labels = collate_examples(inputs.calibration.tokens, examples, device)
        batches.append(batch | {"labels": labels})
    return batches


def _make_row_batch(inputs: Inputs, examples: list[int | None], device: torch.device) -> Batch:
    """Make a batch of rows with labels. All tokens of the rows count, [CLS] and [SEP] too."""
    rows = collate_rows(inputs.calibration.tokens, examples).to(device)
    is_real = rows.attention_mask.bool() & rows.weights.bool()[:, None]
    return Batch(**rows.inputs(), token_mask=is_real, row_labels=rows.labels)


def _encode_reference(recipe: Recipe, inputs: Inputs, samples: list[int]) -> dict:
    """Return the token ids of each sample by its number, and the end-of-sequence token as EOS."""
    data = recipe.data
    tokenizer = load_tokenizer(inputs.model_path)
    rows = []
    for chunk in select_rows(load_split(data, fetch_source(data)), data):
        rows += chunk.rows
    texts = []
    for sample in samples:
        row = rows[sample]
        instruction = f"{row.instruction}\n{row.input}" if row.input else row.instruction
        texts.append(REFERENCE_PROMPT.format(instruction=instruction, answer=row.answer))
    encoded = dict(zip(samples, encode_texts(tokenizer, texts), strict=True))
    return encoded | {EOS: tokenizer.eos_token_id}


def _make_reference_batches(
    encoded: dict, samples: list[int], length: int, device: torch.device
) -> list[Batch]:
    """Make this rank's batches of one sample each, padded to `length`, without the last token."""
    batches = []
    positions = torch.arange(length - 1, device=device)[None]
    for (sample,) in shard_batches(samples, dist.get_rank(), dist.get_world_size(), 1):
        # A missing sample has weight 0: it repeats another one.
        ids = encoded[samples[0] if sample is None else sample][:length]
        padded = ids + [encoded[EOS]] * (length - len(ids))
        input_ids = torch.tensor([padded], device=device)[:, :-1]
        batch = Batch(
            input_ids=input_ids,
            token_mask=torch.full_like(input_ids, sample is not None, dtype=torch.bool),
            attention_mask=(positions < len(ids)).long(),
        )
        batches.append(batch)
    return batches
