"""The loss of train.py: --class-weights, --bce-loss and what goes with them."""

import argparse
import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from support.loaders import list_labels

import s3n_timm


def create_criterion(args: argparse.Namespace, class_weights: list[float] | None, classes: int) -> s3n_timm.S3NLoss:
    criterion = s3n_timm.S3NLoss(
        args.smoothing,
        class_weights=class_weights,
        bce=args.bce_loss,
        multi_label=args.dataset == "multi-label",
        bce_sum=args.bce_sum,
        bce_target_thresh=args.bce_target_thresh,
    )
    if not args.bce_loss and max(criterion.smoothing.values()) > (classes - 1) / classes:
        raise ValueError(f"--smoothing {args.smoothing} is more than {classes} classes share evenly, "
                         f"{(classes - 1) / classes:.2f} at most.")
    return criterion


def list_class_weights(args: argparse.Namespace, names: list[str], train: Any) -> list[float] | None:
    """The weight of each class by --class-weights, in the order of the labels; None without it.

    Args:
        args: `class_weights` is 'balanced', which gives a class the weight N / (C n) that scikit-learn gives it, where
            n of N labels are its own; or a file that `read_class_weights` reads.
        names: of the classes.
        train: training split with a column label.

    Raises:
        ValueError: the file cannot be read or names other classes, or a class has no training image.
    """
    if args.class_weights is None:
        return None
    if args.class_weights != "balanced":
        return read_class_weights(Path(args.class_weights), names)
    labels = list(itertools.chain.from_iterable(list_labels(train)))
    counts = torch.bincount(torch.as_tensor(labels), minlength=len(names))
    if not counts.all():
        raise ValueError(f"--class-weights balanced: class {names[int(counts.argmin())]!r} has no training image.")
    return (counts.sum() / (len(names) * counts)).tolist()


def read_class_weights(path: Path, names: list[str]) -> list[float]:
    """Weights by class name: a JSON object of names and numbers, or a CSV file with the columns class and weight.

    Raises:
        ValueError: it is neither, a class is missing, unknown or named twice, a weight is no number of at least 0, or
            all are 0.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            pairs = json.loads(text, object_pairs_hook=list)
            if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
                raise ValueError("it must be one object of class names and numbers")
        else:
            rows = csv.DictReader(text.splitlines(), strict=True)
            if rows.fieldnames != ["class", "weight"]:
                raise ValueError("its first line must be class,weight")
            pairs = [(row["class"], row["weight"]) for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"--class-weights {path} cannot be read: {error}.") from error
    weights: dict[str, float] = {}
    for name, value in pairs:
        try:
            weight = math.nan if isinstance(value, (bool, list)) else float(value)
        except (TypeError, ValueError):
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise ValueError(f"--class-weights {path}: the weight of {name!r} must be a number of at least 0, "
                             f"got {value!r}.")
        if name in weights:
            raise ValueError(f"--class-weights {path} names the class {name!r} twice.")
        weights[name] = weight
    for name in [*sorted(set(names) - set(weights)), *sorted(set(weights) - set(names))]:
        said = "has no weight for the class" if name in names else "names a class that the data set has not,"
        raise ValueError(f"--class-weights {path} {said} {name!r}.")
    if not any(weights.values()):
        raise ValueError(f"--class-weights {path} gives every class the weight 0.")
    return [weights[name] for name in names]
