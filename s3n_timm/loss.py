"""The training loss (paper eq. 9)."""

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .model import S3NLogits


class S3NLoss(nn.Module):
    """L = Σ_i CE(Y_i, y) + CE(Y_J, y) over the branches i that the model has (eq. 9, the joint term once).

    Args:
        smoothing: ε, taken from the true class and spread evenly over the other C - 1; one number for every output
            or one per field of `S3NLogits`. `S3NLoss.ORIGINAL` holds the original's, 0.15 on Y_O and Y_C.

    Raises:
        ValueError: an ε lies outside [0, 1), or a field is unknown.
    """

    ORIGINAL: ClassVar[dict[str, float]] = {"original": 0.15, "complementary": 0.15}

    def __init__(self, smoothing: float | Mapping[str, float] = 0.0) -> None:
        super().__init__()
        given = smoothing if isinstance(smoothing, Mapping) else dict.fromkeys(S3NLogits._fields, smoothing)
        for name, value in given.items():
            if name not in S3NLogits._fields:
                raise ValueError(f"smoothing has no output {name!r}: use {', '.join(S3NLogits._fields)}.")
            if not 0 <= value < 1:
                raise ValueError(f"smoothing of {name} must lie in [0, 1), got {value}.")
        self.smoothing = {name: float(given.get(name, 0.0)) for name in S3NLogits._fields}

    def forward(self, logits: S3NLogits | Tensor, target: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            logits: `S3NLogits` of B×C each, or the B×C joint logits alone, as a model in eval mode gives them.
            target: B class indices, or B×C class probabilities.

        Returns:
            The loss, a scalar.
        """
        if isinstance(logits, Tensor):
            logits = S3NLogits(logits, None, None, None)
        terms = [
            _cross_entropy(output, target, self.smoothing[name])
            for name, output in zip(S3NLogits._fields, logits)
            if output is not None
        ]
        return sum(terms[1:], terms[0])


def _cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    # torch spreads its smoothing over all C classes, the true one included; this factor spreads it over the others
    classes = logits.shape[1]
    spread = smoothing * classes / max(classes - 1, 1)
    if spread > 1:
        raise ValueError(f"smoothing {smoothing} is more than {classes} classes share evenly: (C - 1) / C at most.")
    return F.cross_entropy(logits, target, label_smoothing=spread)
