"""Measure how well a model predicts tokens, or labels, that it is never trained on."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from launch.data.batches import IGNORED, collate_examples
from launch.data.order import shard_batches
from launch.data.readers import UnreadableError, read_json_rows
from launch.data.rows import find_text_fault
from launch.data.token_set import TokenSet, make_text_set
from launch.data.tokenize import encode_texts
from launch.engines.base import Engine
from launch.run.results import Prediction
from launch.runtime.distributed import all_reduce_sum
from launch.runtime.errors import UserError
from launch.scoring.development import predict_rows

# Examples of one forward pass. Fixed, so that neither a setting nor the world size changes which
# losses a sum in fp32 puts together.
BATCH_SIZE = 8


def read_other_text(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[TokenSet, dict[str, str]]:
    """Read text outside the task, on which a training's forgetting is measured.

    Args:
        path: a .jsonl file with a field `text` in every row, or a .txt file, which is one text.
        max_length: a text is cut into pieces of at most so many tokens. In each piece every token
            but the first is predicted.

    Returns:
        The pieces, and {path, sha256} of the file's text.

    Raises:
        UserError: the file cannot be read, or a row has no text.
    """
    content, texts = _read_texts(path)
    for number, text in enumerate(texts, start=1):
        fault = find_text_fault(text)
        if fault is not None:
            what = "has no field 'text'" if text is None else f"has a field 'text' that is {fault}"
            raise UserError(f"eval.other_text: row {number} of {path} {what}; mend it")
    pieces = []
    for ids in encode_texts(tokenizer, texts):
        starts = range(0, len(ids), max_length)
        pieces += [ids[start : start + max_length] for start in starts]
    pieces = [piece for piece in pieces if len(piece) > 1]  # one token alone predicts nothing
    if not pieces:
        raise UserError(f"eval.other_text: {path} has no text; give another file")
    sha256 = hashlib.sha256(content).hexdigest()
    return make_text_set(pieces), {"path": str(path), "sha256": sha256}


def _read_texts(path: Path) -> tuple[bytes, list[str]]:
    """Return the bytes of the file at `path` and its texts. Raises what read_other_text does."""
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"eval.other_text: {path} is neither .jsonl nor .txt")
    try:
        content = path.read_bytes()
        if path.suffix == ".txt":
            return content, [content.decode("utf-8-sig")]
        return content, [row.get("text") for row in read_json_rows(path)] if content else []
    except (OSError, UnicodeDecodeError, UnreadableError) as error:
        raise UserError(f"eval.other_text: cannot read {path}: {error}") from None


@torch.no_grad()
def measure_prediction(engine: Engine, model: nn.Module, tokens: TokenSet) -> Prediction:
    """Measure how well `model` predicts the answer tokens, or labels, of `tokens`. Collective.

    Args:
        model: able to run forward passes: within the engine's `inference_mode`, or in training.

    Returns:
        Mean loss and accuracy over all ranks' tokens; the sums over tokens are in fp64.
    """
    if tokens.labels is not None:
        return _measure_rows(predict_rows(engine, model, tokens), tokens)
    loss = num_correct = num_tokens = 0.0
    examples = range(len(tokens))
    for batch in shard_batches(examples, dist.get_rank(), dist.get_world_size(), BATCH_SIZE):
        inputs, labels = collate_examples(tokens, batch, engine.device)
        targets = labels[:, 1:]
        losses = []
        for row, wanted in zip(
            model(input_ids=inputs["input_ids"], use_cache=False).logits, targets, strict=True
        ):  # one at a time: the fp32 copies of all rows may be larger than what training takes
            logits = row[:-1].float()
            losses.append(F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none"))
            num_correct += (logits.argmax(-1) == wanted).sum().item()
        loss += torch.cat(losses).double().sum().item()
        num_tokens += (targets != IGNORED).sum().item()
    loss, num_correct, num_tokens = all_reduce_sum([loss, num_correct, num_tokens], engine.device)
    return Prediction(
        loss=loss / num_tokens, accuracy=num_correct / num_tokens, tokens=int(num_tokens)
    )


def _measure_rows(outputs: Tensor, tokens: TokenSet) -> Prediction:
    """Measure how well the outputs of a head predict the labels of all rows."""
    labels = tokens.labels
    if labels.is_floating_point():
        losses, accuracy = (outputs[:, 0] - labels).square(), None
    else:
        losses = F.cross_entropy(outputs, labels, reduction="none")
        accuracy = (outputs.argmax(1) == labels).double().mean().item()
    return Prediction(loss=losses.mean().item(), accuracy=accuracy, tokens=len(tokens))


def measure_predictions(
    engine: Engine, model: nn.Module, sets: Mapping[str, TokenSet]
) -> dict[str, Prediction]:
    """Measure the prediction of each of `sets`, by name. Collective."""
    model.eval()
    return {name: measure_prediction(engine, model, tokens) for name, tokens in sets.items()}
