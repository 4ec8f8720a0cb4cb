"""Rows to prompts to token batches: hub or local files, in one global order that no world size changes."""

import difflib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from astra.moments import Batch
from eval.tasks.suite import ALPACA
from launch import watch
from launch.errors import UserError
from launch.recipe import Data

CHUNK = 1000  # rows tokenised between two ticks of the progress bar


@dataclass(frozen=True)
class TokenSet:
    """Tokenised rows, end to end on the CPU. Row i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: Tensor  # (total tokens,), int32
    offsets: Tensor  # (rows + 1,), int64
    answer_starts: Tensor  # (rows,), int64: index in its row of the first token that holds part of the answer
    num_cut: int  # rows whose answer was shortened to fit max_length
    num_left_out: int  # rows left out because no answer token fitted

    def __len__(self) -> int:
        return len(self.answer_starts)

    def lengths(self) -> Tensor:
        """(rows,), tokens of each row."""
        return self.offsets.diff()

    def answer_tokens(self, rows: Sequence[int]) -> int:
        """Tokens of `rows` that the loss counts."""
        index = torch.as_tensor(rows)
        return int((self.lengths()[index] - self.answer_starts[index]).sum())


def prompt(instruction: str) -> str:
    """The prompt of one instruction, for calibration, training and evaluation alike."""
    return ALPACA.format(instruction=instruction)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids with the tokenizer's own beginning-of-sequence token and no end-of-sequence token."""
    rows = tokenizer(texts).input_ids
    return [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]


def read_rows(data: Data) -> list[tuple[str, str]]:
    """The (instruction, answer) pairs that `data` asks for, in file order.

    Raises:
        UserError: a path that is not there or cannot be read, a missing field, a row whose field is empty or not text,
            no row left.
    """
    dataset = _load(data)
    for key, field in (("data.instruction", data.instruction), ("data.answer", data.answer)):
        _require_column(dataset.column_names, field, key, data.path)
    for field in data.keep:
        _require_column(dataset.column_names, field, "data.keep", data.path)
    rows: list[tuple[str, str]] = []
    for number, row in enumerate(dataset, start=1):
        if any(row[field] != value for field, value in data.keep.items()):
            continue
        for field in (data.instruction, data.answer):
            if not isinstance(row[field], str) or not row[field].strip():
                raise UserError(
                    f"data.path: row {number} of {data.path}: field {field!r} is {row[field]!r}, not text; mend the row"
                )
        rows.append((row[data.instruction], row[data.answer]))
        if len(rows) == data.limit:
            break
    if not rows:
        why = f"no row has {data.keep}" if data.keep else "it has no rows"
        raise UserError(f"data.path: nothing to train on in {data.path}: {why}")
    return rows


def _require_column(columns: list[str], field: str, key: str, path: str) -> None:
    if field not in columns:
        near = difflib.get_close_matches(field, columns, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{key}: no field {field!r} in the rows of {path}; {hint}fields: {', '.join(columns)}")


def _load(data: Data):  # noqa: ANN202 (datasets is imported late: it takes seconds)
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # the error itself says what is wrong
    path = Path(data.path).expanduser()
    try:
        if path.is_file():
            kinds = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
            if path.suffix not in kinds:
                raise UserError(f"data.path: {path} is none of {', '.join(kinds)}")
            if path.stat().st_size == 0:
                raise UserError(f"data.path: {path} is empty")
            return datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        if path.is_dir():
            return datasets.load_dataset(str(path), split=data.split)
        if not is_hub_id(data.path):
            raise UserError(f"data.path: no file or folder {data.path}")
        return datasets.load_dataset(data.path, split=data.split, revision=data.revision)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"data.path: cannot load {data.path} (split {data.split}): {type(cause).__name__}: {str(cause)[:300]}; "
            "give a hub id that can be reached, or a local file or folder"
        ) from None


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id, `name` or `owner/name`, and not of a path."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith((".json", ".jsonl"))


def tokenise(rows: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenSet:
    """prompt + answer + newline + EOS of every row, cut at `max_length` tokens. CPU-bound; shows a progress bar.

    The loss counts every token that holds part of the answer: those after the longest common beginning of the prompt's
    own tokens and the whole text's. Rows of which no such token is left are left out and counted.
    """
    pieces: list[Tensor] = []
    starts: list[int] = []
    num_cut = num_left_out = 0
    for first in tqdm(range(0, len(rows), CHUNK), desc="tokenise", unit="k rows", disable=not sys.stderr.isatty()):
        watch.mark()
        chunk = rows[first : first + CHUNK]
        prompts = encode(tokenizer, [prompt(instruction) for instruction, _ in chunk])
        wholes = encode(tokenizer, [prompt(instruction) + answer + "\n" for instruction, answer in chunk])
        for begin, whole in zip(prompts, wholes, strict=True):
            whole = [*whole, tokenizer.eos_token_id]
            pairs = zip(begin, whole, strict=False)
            start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(begin), len(whole)))
            num_cut += len(whole) > max_length
            whole = whole[:max_length]
            if start >= len(whole):
                num_left_out += 1
                continue
            pieces.append(torch.tensor(whole, dtype=torch.int32))
            starts.append(start)
    if not pieces:
        raise UserError("data.max_length: no row has an answer token within it; raise it")
    offsets = torch.tensor([0, *(len(piece) for piece in pieces)], dtype=torch.int64).cumsum(0)
    return TokenSet(torch.cat(pieces), offsets, torch.tensor(starts), num_cut, num_left_out)


def collate(tokens: TokenSet, rows: Sequence[int | None], device: torch.device) -> tuple[Batch, Tensor]:
    """Right-padded batch of `rows`, and labels with -100 where the loss does not count; both (rows, tokens).

    A row that is None is a dummy of weight 0: a copy of a row beside it with nothing counted.
    """
    real = next((row for row in rows if row is not None), 0)
    pieces = []
    for row in rows:
        index = real if row is None else row
        pieces.append(tokens.tokens[tokens.offsets[index] : tokens.offsets[index + 1]].long())
    input_ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=0)
    lengths = torch.tensor([len(piece) for piece in pieces])[:, None]
    is_real = torch.tensor([row is not None for row in rows])[:, None]
    starts = torch.tensor([0 if row is None else int(tokens.answer_starts[row]) for row in rows])[:, None]
    counted = (torch.arange(input_ids.shape[1]) < lengths) & is_real
    labels = input_ids.masked_fill(~counted | (torch.arange(input_ids.shape[1]) < starts), -100)
    return Batch(input_ids=input_ids.to(device), counted=counted.to(device)), labels.to(device)


def deal(items: Sequence[int], rank: int, world_size: int, size: int) -> list[list[int | None]]:
    """This rank's share of `items` in batches of `size`, filled up with None so that every rank has as many.

    Batch i of the whole list goes to rank i mod world_size: what a batch holds does not depend on world size.
    """
    batches = math.ceil(len(items) / size)
    per_rank = math.ceil(batches / world_size)
    share = []
    for i in range(per_rank):
        start = (i * world_size + rank) * size
        batch: list[int | None] = list(items[start : start + size])
        share.append(batch + [None] * (size - len(batch)))
    return share


def choose(num_rows: int, samples: int, seed: int) -> list[int]:
    """`samples` distinct row ids, a seeded choice, ascending. Raises UserError if there are fewer rows."""
    if samples > num_rows:
        raise UserError(f"calibration.samples: {samples} is above the {num_rows} training rows; lower it")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_rows, generator=generator)[:samples].sort().values.tolist()


def num_steps(num_rows: int, global_batch: int, epochs: float, max_steps: int | None) -> int:
    """Optimiser steps of a run; the last one may be short of rows."""
    return max_steps or math.ceil(num_rows * epochs / global_batch)


def step_rows(num_rows: int, global_batch: int, epochs: float, max_steps: int | None, seed: int) -> Iterator[list[int]]:
    """The row ids of each optimiser step: epoch after epoch in seeded order, independent of world size."""
    generator = torch.Generator().manual_seed(seed)
    left = max_steps * global_batch if max_steps else math.ceil(num_rows * epochs)
    pending: list[int] = []
    while left > 0:
        while len(pending) < min(global_batch, left):
            pending += torch.randperm(num_rows, generator=generator).tolist()
        step = pending[: min(global_batch, left)]
        pending = pending[len(step) :]
        left -= len(step)
        yield step
