"""What a model gives: the logits of its outputs, their consensus, and all that it saw."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .sampling import SelectiveSample


class S3NLogits(NamedTuple):
    """B×C logits Y_J, Y_O, Y_D and Y_C; None for an output that the model does not have, or did not compute."""

    joint: Tensor | None
    original: Tensor | None
    discriminative: Tensor | None
    complementary: Tensor | None


class Explanation(NamedTuple):
    """All that a model saw in a batch; what belongs to a branch that the model does not have is None."""

    sample: SelectiveSample | None  # response, peaks and what each branch sampled; None for branches="O"
    logits: S3NLogits
    maps: dict[str, Tensor]  # B×C×h×w class response maps by branch, each on the image that the branch read


def mean_answer(logits: Sequence[Tensor | None], multi_label: bool = False) -> Tensor:
    """The consensus of outputs: B×C logarithms of the geometric mean of their probabilities, scaled to add up to 1.

    With `multi_label` each class and its absence add up to 1, which makes it the mean of the logits. For one label an
    image it beat the arithmetic mean in most runs on validation images of CUB (examples/results/README.md).
    """
    if multi_label:
        return torch.stack([each.float() for each in logits if each is not None]).mean(0)
    known = [each.float().log_softmax(1) for each in logits if each is not None]
    return torch.stack(known).mean(0).log_softmax(1)


def score_classes(logits: Tensor, multi_label: bool = False) -> Tensor:
    """B×C probabilities in float32: of one label an image, which add up to 1, or of each label on its own."""
    return logits.float().sigmoid() if multi_label else logits.float().softmax(1)
