"""Metrics of models that give any number of labels an image. They need torchmetrics, imported where it is used."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import needs_extra
from ..model import S3N
from ..outputs import mean_answer
from .statistics import check_finite


def average_precision(logits: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each class: its images ranked by their scores.

    Args:
        logits: N×C, of two classes or more.
        labels: N×C, 1 for each label of an image and 0 elsewhere.

    Returns:
        C in [0, 1], NaN for a class that no image shows.
    """
    with needs_extra("train"):
        from torchmetrics.functional.classification import multilabel_average_precision

    # the order of a class's logits is what counts, and torchmetrics' sigmoid would make one of the large ones
    scores = logits.double() - logits.amin(0)
    scores = scores / scores.amax(0).clamp_min(torch.finfo(scores.dtype).tiny)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive samples")  # of such classes, which become NaN
        found = multilabel_average_precision(scores, labels.long(), num_labels=labels.shape[1], average=None)
    return found.where(labels.bool().any(0), torch.nan)


def mean_average_precision(logits: Tensor, labels: Tensor) -> float:
    """Mean of `average_precision` over the classes that an image shows; 0 where none does."""
    return average_precision(logits, labels).nanmean().nan_to_num(0.0).item()


def measure_labels(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `summarize_labels` needs of a batch of `image`, `label` and `index`, a row an image.

    Returns:
        `index`, `label` B×C, and B×C logits of the model's answer, as `logits_answer`, and of each of its outputs.
    """
    if isinstance(model, S3N):
        logits, _, _ = model.forward_branches(batch["image"])
        outputs = dict(logits._asdict(), mean=mean_answer(logits, True), answer=model.decide(logits))
    else:
        joint = model(batch["image"])
        outputs = dict(joint=joint, answer=joint)
    rows = {f"logits_{name}": each.float() for name, each in outputs.items() if each is not None}
    return dict(index=batch["index"], label=batch["label"], **rows)


def summarize_labels(records: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """Metrics of a whole split in %: mAP of each output; F1, precision and recall of the answer at probability ½.

    Args:
        records: the rows of `measure_labels`.
        names: of the classes.

    Returns:
        `mean_average_precision` by output, `f1_micro` and `f1_macro` of the answer, and `classes`, a list of `name`,
        `images`, `average_precision`, `precision`, `recall` and `f1`; None for a class that no image shows.

    Raises:
        ValueError: a logit is not finite.
    """
    with needs_extra("train"):
        from torchmetrics.functional.classification import (
            multilabel_f1_score,
            multilabel_precision,
            multilabel_recall,
        )

    check_finite(records["logits_answer"])
    labels = records["label"].long()
    scores = records["logits_answer"].double().sigmoid()
    options: dict[str, Any] = dict(num_labels=labels.shape[1], average=None)
    columns = dict(average_precision=average_precision(records["logits_answer"], labels))
    for name, metric in dict(precision=multilabel_precision, recall=multilabel_recall, f1=multilabel_f1_score).items():
        columns[name] = metric(scores, labels, **options)
    images, shown = labels.sum(0), labels.any(0)
    classes = [dict(name=names[c], images=int(images[c]), **{
        name: 100 * float(values[c]) if shown[c] else None for name, values in columns.items()
    }) for c in range(labels.shape[1])]
    outputs = {name.removeprefix("logits_"): logits for name, logits in records.items() if name.startswith("logits_")}
    return dict(
        mean_average_precision={name: 100 * mean_average_precision(each, labels) for name, each in outputs.items()},
        f1_micro=100 * float(multilabel_f1_score(scores, labels, **dict(options, average="micro"))),
        f1_macro=100 * float(columns["f1"][shown].mean().nan_to_num(0.0)),
        classes=classes,
    )
