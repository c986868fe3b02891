"""Models to and from folders: safetensors weights beside the config.json that timm rebuilds them from."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf

from .model import S3N


def save(
        model: S3N,
        folder: str | Path,
        *,
        label_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model.safetensors` and `config.json`; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

    Args:
        model: the model, unwrapped.
        folder: where to write; made if need be.
        label_names: a name for each class, in order.
        data_config: the preprocessing the model was trained with, as `timm.data.resolve_data_config` gives it.

    Returns:
        The folder.

    Raises:
        ValueError: the backbone has no timm name to rebuild it from, or the number of names is not that of classes.
    """
    if model.config["backbone"] is None:
        raise ValueError("This model's backbone is not one of timm's by name, so config.json could not rebuild it.")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"label_names has {len(label_names)} names for {model.num_classes} classes.")
    # safetensors wants contiguous tensors, which a model trained in channels-last does not have
    save_for_hf(
        deepcopy(model).to(memory_format=torch.contiguous_format),
        str(folder),
        model_config=None if label_names is None else dict(label_names=list(label_names)),
        model_args=dict(model.config),
        safe_serialization=True,
        data_config=None if data_config is None else dict(data_config),
    )
    return Path(folder)
