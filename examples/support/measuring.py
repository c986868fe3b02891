"""Results of an evaluation as a results.json has them, from which model cards are written."""

from collections.abc import Mapping
from typing import Any

import datasets
import timm
import torch
from accelerate import Accelerator
from torch import nn

import s3n_timm
from s3n_timm.checkpoints import has_peaks, is_multi_label_model, known_label_names
from s3n_timm.data import class_names, is_multi_label
from s3n_timm.evaluation import UNITS, as_plain
from s3n_timm.hub import count_parameters


def describe_model(model: nn.Module, data_config: Mapping[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = dict(
        architecture=model.pretrained_cfg.get("architecture"),
        num_classes=model.num_classes,
        parameters=count_parameters(model),
    )
    if isinstance(model, s3n_timm.S3N):
        betas = {f"beta_{branch}": value.item() for branch, value in model.beta.items()}
        # the config holds the values at the start of training
        now = dict(partition=model.partition if has_peaks(model) else None)
        summary["s3n"] = {**model.config.to_dict(), **betas, **now}
    return dict(summary, preprocessing=dict(data_config))


def describe_results(
        model: nn.Module, data_config: Mapping[str, Any], measures: Mapping[str, Any], accelerator: Accelerator,
        *, weights: str, dataset: str, split: str, images: int, **run: Any,
) -> dict[str, Any]:
    """What a results.json holds: what was measured on what, and by what run."""
    versions = dict(s3n_timm=s3n_timm.__version__, timm=timm.__version__, torch=torch.__version__)
    return dict(
        weights=weights,
        dataset=dataset,
        split=split,
        images=images,
        units=UNITS if "accuracy" in measures else "%",
        model=as_plain(describe_model(model, data_config)),
        measures=measures,
        run=dict(run, processes=accelerator.num_processes, device=str(accelerator.device),
                 mixed_precision=accelerator.mixed_precision, versions=versions),
    )


def match_classes(
        dataset: datasets.Dataset, model: nn.Module, data_name: str, weights: str, ignore_names: bool = False,
) -> tuple[list[str], list[int]]:
    """The name of each class of a model, and the model's class of each class of a data set.

    Args:
        dataset: with labels.
        model: with a classifier.
        data_name: what messages call the data set.
        weights: what they call the model.
        ignore_names: trust the order of the data set's classes, whatever their names.

    Raises:
        ValueError: the data set has other classes than the model, or one label an image where the model gives several.
    """
    names = list(map(str, class_names(dataset)))
    if is_multi_label(dataset) != is_multi_label_model(model):
        raise ValueError(f"--dataset {data_name} has one label an image and WEIGHTS any number, or the reverse.")
    if len(names) != model.num_classes:
        raise ValueError(
            f"--dataset {data_name} has {len(names)} classes and WEIGHTS {weights} has {model.num_classes}: take the "
            "data set that it was trained for."
        )
    stated = known_label_names(model)
    known = [stated.get(index, name) for index, name in enumerate(names)]
    if ignore_names or known == names:
        return names, list(range(len(names)))
    if sorted(known) == sorted(set(names)):
        return known, [known.index(name) for name in names]
    missing = sorted(set(names) - set(known)) or names
    raise ValueError(
        f"--dataset {data_name} names its classes otherwise than WEIGHTS {weights}, which has no "
        f"{missing[0]!r} ({len(missing)} of {len(names)} names differ). If the classes are the same in the same order, "
        "evaluate.py --ignore-names takes them as they are."
    )
