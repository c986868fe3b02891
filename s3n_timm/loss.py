"""The training loss (paper eq. 9)."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .outputs import S3NLogits, mean_answer


class S3NLoss(nn.Module):
    """L = Σ_i CE(Y_i, y) + CE(Y_J, y) over the branches i that the model has (eq. 9, the joint term once).

    Args:
        smoothing: ε, taken from the true class and spread evenly over the other C - 1; one number for every output
            or one per field of `S3NLogits`. `S3NLoss.ORIGINAL` holds the original's, 0.15 on Y_O and Y_C.
        distillation: weight of T² · KL(teacher ‖ Y_O), by which the original branch learns from a detached teacher:
            what the other outputs say together (`mean_answer`), unless `forward` is given one. Not the paper's.
        temperature: T, by which teacher's and student's logits are divided there.

    Raises:
        ValueError: an ε lies outside [0, 1), a field is unknown, `distillation` is negative, or `temperature` not
            positive.

    Example:
        >>> from torch import zeros, tensor
        >>> even = S3NLogits(zeros(1, 2), zeros(1, 2), zeros(1, 2), zeros(1, 2))
        >>> round(S3NLoss()(even, tensor([1])).item(), 4)  # 4 ln 2
        2.7726
    """

    ORIGINAL: ClassVar[dict[str, float]] = {"original": 0.15, "complementary": 0.15}

    def __init__(self, smoothing: float | Mapping[str, float] = 0.0, distillation: float = 0.0,
                 temperature: float = 1.0) -> None:
        super().__init__()
        given = smoothing if isinstance(smoothing, Mapping) else dict.fromkeys(S3NLogits._fields, smoothing)
        for name, value in given.items():
            if name not in S3NLogits._fields:
                raise ValueError(f"smoothing has no output {name!r}: use {', '.join(S3NLogits._fields)}.")
            if not 0 <= value < 1:
                raise ValueError(f"smoothing of {name} must lie in [0, 1), got {value}.")
        if not 0 <= distillation < math.inf:
            raise ValueError(f"distillation must be a weight of at least 0, got {distillation}.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.distillation, self.temperature = distillation, temperature
        self.smoothing = {name: float(given.get(name, 0.0)) for name in S3NLogits._fields}

    def forward(self, logits: S3NLogits | Tensor, target: Tensor, teacher: Tensor | None = None) -> Tensor:
        """Loss of a batch.

        Args:
            logits: `S3NLogits` of B×C each, or the B×C joint logits alone, as a model in eval mode gives them.
            target: B class indices, or B×C class probabilities.
            teacher: B×C logits of another network, to distil from in place of the model's other outputs.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: the logits are not B×C with a class, or the target fits neither of its forms.
        """
        if isinstance(logits, Tensor):
            logits = S3NLogits(logits, None, None, None)
        terms = [
            _cross_entropy(output, target, self.smoothing[name])
            for name, output in zip(S3NLogits._fields, logits)
            if output is not None
        ]
        if self.distillation:
            student = logits.joint if logits.original is None else logits.original
            if student is None:
                raise ValueError("distillation needs the original branch's logits.")
            if teacher is None:
                others = [each / self.temperature for name, each in logits._asdict().items()
                          if each is not None and name != "original"]
                teacher_log = mean_answer(others)
            else:
                teacher_log = (teacher.float() / self.temperature).log_softmax(1)
            # detached: with a gradient the teacher would learn to be easy to follow
            terms.append(self.distillation * self.temperature**2 * F.kl_div(
                (student.float() / self.temperature).log_softmax(1), teacher_log.detach(), log_target=True,
                reduction="batchmean"))
        return sum(terms[1:], terms[0])


def _cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    # torch spreads its smoothing over all C classes, the true one included; this factor spreads it over the others
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be B×C with at least one class, got {tuple(logits.shape)}.")
    index = target.shape == logits.shape[:1] and target.dtype == torch.long
    if not index and not (target.shape == logits.shape and target.is_floating_point()):
        raise ValueError(
            f"target must be B class indices (torch.int64) or B×C probabilities for logits of {tuple(logits.shape)}, "
            f"got {target.dtype} of {tuple(target.shape)}."
        )
    classes = logits.shape[1]
    spread = smoothing * classes / max(classes - 1, 1)
    if spread > 1:
        raise ValueError(f"smoothing {smoothing} is more than {classes} classes share evenly: (C - 1) / C at most.")
    try:
        return F.cross_entropy(logits, target, label_smoothing=spread)
    except IndexError as error:  # CPUs look at the values, at no cost; looking on a GPU would hold it up
        raise ValueError(f"target must hold class indices from 0 to {classes - 1}: {error}") from error
