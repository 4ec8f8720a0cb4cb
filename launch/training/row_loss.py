"""The training loss of rows with labels: cross-entropy of a class, or the squared error of a number."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astra.moments import Batch, get_row_inputs
from launch.training.loss import has_bf16_products


class RowLoss(nn.Module):
    """A model with a head that returns its training loss. Training calls it, and engines wrap it.

    For autocast see AnswerLoss.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.autocast = has_bf16_products(model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None,
        labels: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Compute the loss summed over rows: cross-entropy in nats, or squared error.

        Args: see data.batches.RowBatch.

        Returns:
            A scalar, fp32, summed in fp64.
        """
        inputs = get_row_inputs(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
            }
        )
        with torch.autocast(
            input_ids.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False
        ):
            logits = self.model(**inputs).logits
        return (compute_row_losses(logits, labels).double() * weights).sum().float()


def compute_row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss of each row, (rows,), fp32.

    Args:
        logits: (rows, outputs).
        labels: (rows,): int64 classes, or fp32 numbers for a single output.
    """
    if labels.is_floating_point():
        return (logits[:, 0].float() - labels).square()
    return F.cross_entropy(logits.float(), labels, reduction="none")


def sum_row_label_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the sum of RowLoss.forward for a calibration; rows without real tokens do not count.

    Args:
        batch: with `row_labels`.
    """
    losses = compute_row_losses(model(**get_row_inputs(batch)).logits, batch["row_labels"])
    return (losses.double() * batch["token_mask"].any(1)).sum().float()
