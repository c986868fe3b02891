"""Inference in batches that spends the warped branches on unsure images alone (beyond the paper)."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .model import S3N


class Prediction(NamedTuple):
    """What a model says of a batch of B images."""

    probabilities: Tensor  # B×C
    entropy: Tensor  # B, of the original branch's probabilities, in nats
    exited: Tensor  # B boolean: answered by the original branch alone


def predict(model: S3N, batches: Iterable[Tensor], *, exit_entropy: float | None = None) -> Iterator[Prediction]:
    """Answer batches of images in order; sure ones by the original branch, the others by all.

    Unsure images of several batches are gathered until they fill one as large as that they came in, so that the warped
    branches always read full batches; the answer of a batch comes when its last image has been read. The model's own
    forward is not touched.

    Args:
        model: an S3N with the O branch, in eval mode.
        batches: B×3×H×W images on the model's device, of one size.
        exit_entropy: τ in nats: an image whose original branch has less entropy is answered by that branch. None asks
            all branches about every image.

    Yields:
        A `Prediction` for each batch.

    Raises:
        TypeError: images are no floats, or not of the weights' precision.
        ValueError: the model is in train mode, has no classes, or has no O branch to exit from; `exit_entropy` is no
            entropy; or images are not B×3×H×W of one size and finite.

    Example:
        >>> model = S3N("test_resnet", num_classes=5).eval()
        >>> for prediction in predict(model, [torch.rand(4, 3, 96, 96)], exit_entropy=0.5):
        ...     print(prediction.probabilities.shape, prediction.exited.shape)
        torch.Size([4, 5]) torch.Size([4])
    """
    if model.training:
        raise ValueError("predict needs a model in eval mode: call model.eval() first.")
    if model.num_classes == 0:
        raise ValueError("predict needs a classifier: this model has num_classes=0.")
    if "O" not in model.branches:
        raise ValueError(f"predict needs the O branch, and this model has branches={model.branches!r}.")
    if exit_entropy is not None and not exit_entropy >= 0:
        raise ValueError(f"exit_entropy must be at least 0 nats, got {exit_entropy}.")
    waiting: list[Prediction] = []  # batches in order, not all of whose images are answered
    images: list[Tensor] = []  # unsure ones, their features and their (batch, image) places, in one order
    features: list[Tensor] = []
    places: list[tuple[Prediction, int]] = []

    def answer(count: int) -> None:
        """Ask all branches about the first unsure images."""
        unsure, known = torch.stack(images[:count]), torch.stack(features[:count])
        logits, _, _ = model.forward_branches(unsure, known, keep_sample=False)
        for (batch, i), row in zip(places[:count], model.decide(logits).float().softmax(1)):
            batch.probabilities[i] = row
        del images[:count], features[:count], places[:count]

    for x in batches:
        with torch.inference_mode():
            original = model.forward_features(x)
            if not x.isfinite().all():
                raise ValueError("images hold NaN or infinite values: look at the file and the std.")
            if images and images[0].shape != x.shape[1:]:
                raise ValueError(f"images must be of one size, got {tuple(images[0].shape)} and {tuple(x.shape[1:])}.")
            own = model.classify_backbone(original, model.pool(original)).float().softmax(1)
            entropy = torch.special.entr(own).sum(1)
            exited = torch.zeros_like(entropy, dtype=torch.bool) if exit_entropy is None else entropy < exit_entropy
            batch = Prediction(own.clone(), entropy, exited)
            waiting.append(batch)
            unsure = (~exited).nonzero()[:, 0].tolist()
            images += x[~exited].unbind(0)
            features += original[~exited].unbind(0)
            places += [(batch, i) for i in unsure]
            while len(x) and len(places) >= len(x):
                answer(len(x))
        open_batches = {id(batch) for batch, _ in places}
        while waiting and id(waiting[0]) not in open_batches:
            yield waiting.pop(0)
    if places:
        with torch.inference_mode():
            answer(len(places))
    yield from waiting
