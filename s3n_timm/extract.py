"""The plain timm model inside an S3N: it was taught beside the other branches and costs one pass."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import get_model_input_config
from torch import nn

from .checkpoints import known_label_names, mark_multi_label
from .checkpoints import label_names as names_of
from .images import input_config
from .model import S3N


def extract_backbone(
        model: S3N,
        *,
        label_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Copy the O branch of an S3N as the timm model that it is: backbone and classifier, of timm's class and name.

    Its logits are those of `model.forward_branches(x)[0].original` for the pixels that this branch reads. What
    `s3n_timm.save` writes of it loads without this package: by `timm.create_model("local-dir:FOLDER",
    pretrained=True)` and by the image-classification pipeline of transformers.

    Args:
        model: an S3N with the O branch and with classes, unwrapped.
        label_names: a name for each class; those that the model has if left out.
        data_config: the preprocessing that the S3N was trained with, as `timm.data.resolve_data_config` gives it; the
            model's own if left out. With `scan_size` the copy reads images of that size, cropped as before.

    Returns:
        A copy that shares no tensor with the S3N, in the mode that it is in; its `pretrained_cfg` has names and
        preprocessing.

    Raises:
        TypeError: `model` is not an S3N.
        ValueError: it has no O branch, no classes, or not as many as there are names.
    """
    if not isinstance(model, S3N):
        raise TypeError(f"extract_backbone needs an S3N, without a wrapper around it, got {type(model).__name__}.")
    if "O" not in model.config.branches:
        raise ValueError(f"branches={model.config.branches!r} has no O branch to extract: O+D+C has it.")
    if not model.num_classes:
        raise ValueError("The model has num_classes=0, so its backbone has no classifier to extract.")
    if label_names is None:
        label_names = names_of(model) if known_label_names(model) else None
    elif len(label_names) != model.num_classes:
        raise ValueError(f"label_names has {len(label_names)} names for {model.num_classes} classes.")
    backbone = copy.deepcopy(model.backbone)
    backbone.zero_grad(set_to_none=True)
    config = input_config(model, data_config)
    channels, *size = config["input_size"]
    own = getattr(backbone, "pretrained_cfg", None) or {}
    backbone.pretrained_cfg = dict(
        {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")},
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        architecture=own.get("architecture"),
        input_size=(channels, *(model.config.scan_size or size)),
        fixed_input_size=get_model_input_config(backbone)["fixed_input_size"],
        pool_size=None,
        num_classes=model.num_classes,
        first_conv=own.get("first_conv"),
        classifier=model.head.classifier,
        description=f"The O branch of an S3N with the branches {model.config.branches}.",
    )
    if label_names is not None:
        backbone.pretrained_cfg["label_names"] = list(map(str, label_names))
    if model.config.multi_label:
        mark_multi_label(backbone)
    backbone.default_cfg = backbone.pretrained_cfg
    return backbone
