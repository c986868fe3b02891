"""The training loss (paper eq. 9)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from .outputs import S3NLogits


class S3NLoss(nn.Module):
    """L = Σ_i CE(Y_i, y) + CE(Y_J, y) over the branches i that the model has (eq. 9, the joint term once).

    With `bce` each CE becomes a binary cross-entropy of every class on its own, by `timm.loss.BinaryCrossEntropy`: for
    one label an image as timm offers it, and with `multi_label` for any number of labels. It changes what the outputs
    learn and nothing else of the method: the response gate (eq. 2, 3) still takes the softmax of the scores, which only
    chooses the maps that say where to look.

    Args:
        smoothing: ε, taken from the true class and spread evenly over the other C - 1; one number for every output
            or one per field of `S3NLogits`. `S3NLoss.ORIGINAL` holds the original's, 0.15 on Y_O and Y_C. Under `bce`
            as timm does it: targets t become (1 - ε) t + ε / C, with `multi_label` (1 - ε) t + ε / 2.
        class_weights: a weight of each class, C in order: w_c in -Σ_c w_c t_c ln p_c, as torch's `cross_entropy` has it
            with targets t; under `bce` the `pos_weight` of `BinaryCrossEntropy`, of images that show the class. The sum
            over images is divided by their number and not by the sum of their weights, so that the loss of a batch is
            the mean of those of its parts.
        bce: binary cross-entropy in place of CE, the mean over the classes.
        multi_label: targets hold any number of labels an image; implies `bce`.
        bce_sum: the sum over the classes in place of their mean.
        bce_target_thresh: soft targets above it become 1 and others 0, as timm does for mixed images.

    Raises:
        ValueError: an ε lies outside [0, 1), a field is unknown, a class weight is negative, not finite or all are 0,
            or an option of `bce` is given without it.

    Example:
        >>> from torch import zeros, tensor
        >>> even = S3NLogits(zeros(1, 2), zeros(1, 2), zeros(1, 2), zeros(1, 2))
        >>> round(S3NLoss()(even, tensor([1])).item(), 4)  # 4 ln 2
        2.7726
    """

    ORIGINAL: ClassVar[dict[str, float]] = {"original": 0.15, "complementary": 0.15}

    class_weights: Tensor | None

    def __init__(
            self,
            smoothing: float | Mapping[str, float] = 0.0,
            *,
            class_weights: Sequence[float] | Tensor | None = None,
            bce: bool = False,
            multi_label: bool = False,
            bce_sum: bool = False,
            bce_target_thresh: float | None = None,
    ) -> None:
        super().__init__()
        given = smoothing if isinstance(smoothing, Mapping) else dict.fromkeys(S3NLogits._fields, smoothing)
        for name, value in given.items():
            if name not in S3NLogits._fields:
                raise ValueError(f"smoothing has no output {name!r}: use {', '.join(S3NLogits._fields)}.")
            if not 0 <= value < 1:
                raise ValueError(f"smoothing of {name} must lie in [0, 1), got {value}.")
        bce = bce or multi_label
        if not bce and (bce_sum or bce_target_thresh is not None):
            raise ValueError("bce_sum and bce_target_thresh are options of bce: add it, or leave them out.")
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        if weights is not None:
            fits = weights.ndim == 1 and len(weights) and weights.isfinite().all() and weights.min() >= 0
            if not fits or not weights.any():
                raise ValueError(
                    f"class_weights must hold a number of at least 0 for each class, not all 0, got {class_weights}.")
        self.register_buffer("class_weights", weights, persistent=False)
        self.binary = None
        if bce:
            self.binary = BinaryCrossEntropy(0.0, bce_target_thresh, sum_classes=bce_sum, pos_weight=weights)
        self.multi_label = multi_label
        self.smoothing = {name: float(given.get(name, 0.0)) for name in S3NLogits._fields}

    def forward(self, logits: S3NLogits | Tensor, target: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            logits: `S3NLogits` of B×C each, or the B×C joint logits alone, as a model in eval mode gives them.
            target: B class indices, or B×C class probabilities; with `multi_label` B×C, 1 for each label of an image
                and 0 elsewhere, or mixtures of such.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: the logits are not B×C with a class, the target fits neither of its forms, or there is another
                number of class weights.
        """
        if isinstance(logits, Tensor):
            logits = S3NLogits(logits, None, None, None)
        terms = [
            self._term(output, target, self.smoothing[name])
            for name, output in zip(S3NLogits._fields, logits)
            if output is not None
        ]
        return sum(terms[1:], terms[0])

    def trainer_loss(
            self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss as transformers' Trainer asks for it: `Trainer(…, compute_loss_func=S3NLoss().trainer_loss)`.

        Args:
            outputs: what its wrapper of timm models gives, with the field logits.
            labels: the target.
            num_items_in_batch: numbers in the labels of all batches of an update; the loss is this batch's part of
                their mean. None: its own mean.
        """
        loss: Tensor = self(outputs.logits, labels)
        return loss if num_items_in_batch is None else loss * labels.numel() / num_items_in_batch

    def _term(self, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        if logits.ndim != 2 or not logits.shape[1]:
            raise ValueError(f"logits must be B×C with at least one class, got {tuple(logits.shape)}.")
        classes, weights = logits.shape[1], self.class_weights
        index = not self.multi_label and target.shape == logits.shape[:1] and target.dtype == torch.long
        if not index and not (target.shape == logits.shape and target.is_floating_point()):
            forms = "B×C floats, 0 or 1," if self.multi_label else "B class indices (torch.int64) or B×C probabilities"
            raise ValueError(f"target must be {forms} for logits of {tuple(logits.shape)}, "
                             f"got {target.dtype} of {tuple(target.shape)}.")
        if weights is not None and len(weights) != classes:
            raise ValueError(f"class_weights has {len(weights)} weights for {classes} classes.")
        if self.binary is not None:
            if index:
                target = _one_hot(target, classes).to(logits.dtype)
            shared = 2 if self.multi_label else classes
            return self.binary(logits, (1 - smoothing) * target + smoothing / shared)
        # torch spreads its smoothing over all C classes, the true one included; this factor spreads it over the others
        spread = smoothing * classes / max(classes - 1, 1)
        if spread > 1:
            raise ValueError(f"smoothing {smoothing} is more than {classes} classes share evenly: (C - 1) / C at most.")
        weights = None if weights is None else weights.to(logits.dtype)
        try:
            total = F.cross_entropy(logits, target, weights, label_smoothing=spread, reduction="sum")
        except IndexError as error:  # CPUs look at the values, at no cost; looking on a GPU would hold it up
            raise ValueError(f"target must hold class indices from 0 to {classes - 1}: {error}") from error
        return total / len(logits)


def _one_hot(target: Tensor, classes: int) -> Tensor:
    try:
        return F.one_hot(target, classes)
    except RuntimeError as error:
        raise ValueError(f"target must hold class indices from 0 to {classes - 1}: {error}") from error
