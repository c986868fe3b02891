"""Statistics of predictions: calibration, confusions and confidence intervals.

The calibration error needs torchmetrics and an interval scipy, each imported where it is used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import needs_extra

ROWS = 128  # at a time, where all at once would take several times the memory of the logits

# calibration


def confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability of each image, and its class: B in [0, 1] and B, of B×C logits."""
    parts = [part.float().softmax(1).max(1) for part in logits.split(ROWS)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log likelihood in nats.

    Args:
        logits: B×C.
        labels: B class indices.

    Returns:
        Scalar, at least 0.
    """
    return F.cross_entropy(logits.float(), labels)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error: mean distance of confidence from accuracy over equal bins of confidence.

    Needs the extra "train".

    Args:
        logits: B×C.
        labels: B class indices.
        bins: number of bins.

    Returns:
        Scalar in [0, 1].
    """
    with needs_extra("train"):
        from torchmetrics.functional.classification import binary_calibration_error

    confidences, predictions = confidence(logits)
    return binary_calibration_error(confidences, predictions == labels, n_bins=bins, norm="l1")


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature that minimizes the negative log likelihood, by L-BFGS on its logarithm.

    Fit it on images that are neither trained nor tested on.

    Args:
        logits: B×C.
        labels: B class indices.

    Returns:
        Temperature in [0.01, 100]; the ends stand for logits that are all right and for logits that tell nothing.

    Raises:
        ValueError: the shapes do not fit, or there is no image.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(logits):
        raise ValueError(
            f"logits must be B×C and labels B, with B at least 1, got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    logits, labels = logits.detach().cpu(), labels.cpu()
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for part, of_part in zip(logits.split(ROWS), labels.split(ROWS)):
            scores = part.double() / log_temperature.exp().clamp(0.01, 100)
            loss = F.cross_entropy(scores, of_part, reduction="sum") / len(labels)
            loss.backward()
            total += loss.detach()
        return total

    with torch.enable_grad():
        optimizer.step(closure)
    return log_temperature.detach().exp().clamp(0.01, 100).item()


# confusions


def _check_classes(labels: Tensor, predictions: Tensor, num_classes: int) -> None:
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ValueError(
            f"labels and predictions must be of one length, got {tuple(labels.shape)} and {tuple(predictions.shape)}."
        )
    for name, classes in (("labels", labels), ("predictions", predictions)):
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(f"{name} must lie in 0 to {num_classes - 1}.")


def per_class_accuracy(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Accuracy of each class.

    Args:
        labels: B class indices.
        predictions: B class indices.
        num_classes: C.

    Returns:
        C ratios in [0, 1]; NaN for a class without images.

    Raises:
        ValueError: the lengths differ, or an index is out of range.
    """
    _check_classes(labels, predictions, num_classes)
    right = torch.bincount(labels[labels == predictions], minlength=num_classes)
    return right / torch.bincount(labels, minlength=num_classes)


def confused_pairs(labels: Tensor, predictions: Tensor, num_classes: int, k: int = 10) -> Tensor:
    """List the commonest errors: what is taken for what.

    Args:
        labels: B class indices.
        predictions: B class indices.
        num_classes: C.
        k: how many pairs to list.

    Returns:
        N×3 rows (label, prediction, count), most frequent first, equal ones by label, then prediction; N is k, or
        fewer where fewer pairs are confused at all.

    Raises:
        ValueError: the lengths differ, an index is out of range, or `k` is negative.

    Example:
        >>> labels, predictions = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 1, 0])
        >>> confused_pairs(labels, predictions, num_classes=3, k=2).tolist()  # label, prediction, count
        [[0, 1, 2], [2, 0, 1]]
    """
    _check_classes(labels, predictions, num_classes)
    if k < 0:
        raise ValueError(f"k must be 0 or more, got {k}.")
    wrong = labels != predictions
    pairs, counts = torch.unique(labels[wrong] * num_classes + predictions[wrong], return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:k]
    pairs = pairs[order]
    return torch.stack([pairs // num_classes, pairs % num_classes, counts[order]], dim=1)


# intervals


def check_finite(logits: Tensor) -> None:
    """Raise a ValueError where a model's training diverged."""
    if not logits.isfinite().all():
        raise ValueError("The model gives logits that are not finite: its training diverged, take other weights.")


def _check_bootstrap(count: int, level: float) -> None:
    if not count:
        raise ValueError("correct must hold at least one image.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")


def bootstrap_interval(correct: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of an accuracy.

    The number of right answers among N images drawn with replacement is binomial, so its quantiles are known and
    nothing is drawn. Needs the extra "train".

    Args:
        correct: N booleans, one per image.
        level: probability of the interval.

    Returns:
        (low, high), in [0, 1].

    Raises:
        ValueError: `correct` is empty, or `level` is out of range.
    """
    with needs_extra("train"):
        from scipy.stats import binom  # type: ignore[import-untyped]

    count = len(correct)
    _check_bootstrap(count, level)
    low, high = binom.ppf(((1 - level) / 2, (1 + level) / 2), count, int(correct.sum()) / count) / count
    return float(low), float(high)


def bootstrap_difference(
        correct: Tensor,
        baseline: Tensor,
        level: float = 0.95,
        samples: int = 10_000,
        seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the difference between two accuracies on the same images.

    Images are drawn, and both models judged on each: what they have in common cancels. With several runs of each model
    an image is drawn with the answers of all its runs, which are no independent images.

    Args:
        correct: N booleans of a model, or S×N of its runs under S seeds.
        baseline: as many of another, in the same order of runs and images.
        level: share of the bootstrap samples that the interval holds.
        samples: number of bootstrap samples.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        (low, high) of the accuracy of `correct` less that of `baseline`, in [-1, 1].

    Raises:
        ValueError: the shapes differ or are empty, or `level` or `samples` is out of range.
    """
    if correct.shape != baseline.shape or correct.ndim not in (1, 2):
        raise ValueError(
            f"correct and baseline must both be N or S×N, got {tuple(correct.shape)} and {tuple(baseline.shape)}."
        )
    runs, count = (1, *correct.shape)[-2:]
    _check_bootstrap(count, level)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    gains = (correct.long() - baseline.long()).view(runs, count).sum(0)
    # only how many images have each gain matters, so these counts are drawn, one after the other
    left, images = torch.full((samples,), float(count), dtype=torch.float64), count
    total = torch.zeros_like(left)
    generator = torch.Generator().manual_seed(seed)
    for gain, of_gain in zip(*(each.tolist() for each in gains.unique(return_counts=True))):
        drawn = torch.binomial(left, torch.full_like(left, of_gain / images), generator=generator)
        total += gain * drawn
        left, images = left - drawn, images - of_gain
    low, high = (total / (runs * count)).quantile(total.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
    return low, high
