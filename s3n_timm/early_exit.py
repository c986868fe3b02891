"""Early exit: confident images are answered by the original branch alone, after one pass (beyond the paper)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .model import S3N


class Prediction(NamedTuple):
    """What a model says of a batch of B images."""

    probabilities: Tensor  # B×C
    entropy: Tensor  # B, of the original branch's probabilities, in nats
    exited: Tensor  # B boolean: answered by the original branch alone


@torch.inference_mode()
def answer_batch(model: S3N, images: Tensor, exit_entropy: float | None = None) -> Prediction:
    """Answer a batch: confident images by the original branch, the others by all that the model's answer needs.

    Args:
        model: an S3N with the O branch, in eval mode.
        images: B×3×H×W images on the model's device.
        exit_entropy: τ in nats: an image whose original branch has less entropy is answered by that branch. None asks
            all branches about every image.

    Raises:
        TypeError: the images are no floats, or not of the weights' precision.
        ValueError: the model is in train mode, has no classes, several labels an image or no O branch to
            exit from; `exit_entropy` is negative; or the images are not B×3×H×W and finite.

    Example:
        >>> model = S3N("test_resnet", num_classes=5).eval()
        >>> prediction = answer_batch(model, torch.rand(4, 3, 96, 96), exit_entropy=0.5)
        >>> prediction.probabilities.shape, prediction.exited.shape
        (torch.Size([4, 5]), torch.Size([4]))
    """
    if model.training:
        raise ValueError("early exit needs a model in eval mode: call model.eval() first.")
    if model.num_classes == 0:
        raise ValueError("early exit needs a classifier: this model has num_classes=0.")
    if model.config.multi_label:
        raise ValueError("early exit judges by the probabilities of one label an image, and this model gives several.")
    if "O" not in model.config.branches:
        raise ValueError(f"early exit needs the O branch, and this model has branches={model.config.branches!r}.")
    if exit_entropy is not None and not exit_entropy >= 0:
        raise ValueError(f"exit_entropy must be at least 0 nats, got {exit_entropy}.")
    features = model.forward_features(images)
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinite values: look at the file and the std.")
    probabilities = model.classify(features, model.head.pool(model.backbone, features)).float().softmax(1)
    entropy = torch.special.entr(probabilities).sum(1)
    exited = torch.zeros_like(entropy, dtype=torch.bool) if exit_entropy is None else entropy < exit_entropy
    unsure = ~exited
    if unsure.any():
        logits = model.answer(images[unsure], features[unsure])
        probabilities = probabilities.masked_scatter(unsure[:, None], logits.float().softmax(1))
    return Prediction(probabilities, entropy, exited)


def choose_exit_entropy(
        entropy: Tensor,
        correct_original: Tensor,
        correct_joint: Tensor,
        max_loss: float = 0.003,
) -> tuple[float, float]:
    """The largest threshold of `answer_batch` that costs at most so much accuracy, on validation images.

    Args:
        entropy: N entropies of the original branch's probabilities, in nats.
        correct_original: N booleans: the original branch's answer is right.
        correct_joint: N booleans: the answer of all branches is right.
        max_loss: accuracy that may be lost against asking all branches about every image, in [0, 1].

    Returns:
        τ in nats, and the share of the images that lies below it and so exits.

    Raises:
        ValueError: the lengths differ or are 0, or an entropy is not finite.

    Example:
        >>> entropy = torch.tensor([0.1, 0.2, 0.9, 1.5])
        >>> original, joint = torch.tensor([True, True, True, False]), torch.tensor([True, True, True, True])
        >>> threshold, exits = choose_exit_entropy(entropy, original, joint)
        >>> f"{threshold:.2f} nats, {exits:.0%} exit"
        '1.20 nats, 75% exit'
    """
    if not (entropy.shape == correct_original.shape == correct_joint.shape) or entropy.ndim != 1 or not len(entropy):
        raise ValueError("entropy, correct_original and correct_joint must be of one length, and not empty.")
    if not entropy.isfinite().all():
        raise ValueError("entropy must be finite.")
    entropy, correct_original, correct_joint = (each.cpu() for each in (entropy, correct_original, correct_joint))
    values, order = entropy.double().sort()
    changes = (correct_original[order].long() - correct_joint[order].long()).cumsum(0)
    # images of one entropy exit together
    last_of_equals = torch.cat([values[1:] > values[:-1], values.new_ones(1, dtype=torch.bool)])
    allowed = (changes >= -max_loss * len(values)) & last_of_equals
    if not allowed.any():
        return 0.0, 0.0
    most = int(allowed.nonzero()[-1])
    # half way to the next image, or past the last one
    threshold = (values[most] + values[most + 1]) / 2 if most + 1 < len(values) else values[most] + 1e-6
    return float(threshold), (most + 1) / len(values)
