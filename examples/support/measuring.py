"""Results of an evaluation as a results.json has them, from which model cards are written."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import nn

import s3n_timm
from s3n_timm.evaluation import UNITS, as_plain
from s3n_timm.hub import count_parameters


def has_peaks(model: nn.Module) -> bool:
    return isinstance(model, s3n_timm.S3N) and model.config.attention == "sparse" and bool(model.warped)


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
        run=dict(run, processes=accelerator.num_processes, device=str(accelerator.device), versions=versions),
    )
