"""timm's backbones: building one by its name, or taking a module, and why one cannot read images."""

import reprlib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn

from .config import check_count

# timm's models share an interface but no class
Backbone = Any

# S3N passes these itself, or they would load weights
RESERVED = ("num_classes", "in_chans", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
            "cache_dir")

MAX_BUILT_SIZE = 2_048  # pixels a side that a backbone is built for: a ViT/16 then reads 16,384 tokens


def create_backbone(
        backbone: Backbone, num_classes: int, in_chans: int, backbone_args: Mapping[str, Any], **kwargs: Any,
) -> tuple[Backbone, str | None, dict[str, Any]]:
    """The backbone with at least one class, its timm name where it has one, and its further arguments.

    Raises:
        ValueError: the name is not one of timm's, or timm cannot build it with these arguments.
    """
    img_size = kwargs.get("img_size")
    for side in img_size if isinstance(img_size, (tuple, list)) else () if img_size is None else (img_size,):
        check_count("img_size", side, 1, MAX_BUILT_SIZE)
    named = isinstance(backbone, str)
    if not named and not isinstance(backbone, nn.Module):
        raise ValueError(f"backbone must be the name of a timm model or a module, got {reprlib.repr(backbone)}.")
    if named:
        # a name alone: with timm's prefixes for sources a config.json could reach for other folders and the network
        if not timm.is_model(backbone):
            raise ValueError(f"backbone {backbone!r} is not a timm model: see timm.list_models() for the names.")
        args = dict(backbone_args)
        reserved = [name for name in args if name in RESERVED]
        if reserved:
            raise ValueError(f"backbone_args must not have {', '.join(reserved)}: give it to S3N, or load weights.")
        try:
            model = timm.create_model(
                backbone, pretrained=False, num_classes=max(num_classes, 1), in_chans=in_chans, **kwargs, **args)
            # starts as nn.Linear does: EfficientNet's own start is so wide that response maps are noise for an epoch
            model.reset_classifier(max(num_classes, 1))
        except Exception as error:  # timm's constructors hardly check: a wrong argument fails anywhere and anyhow
            given = {name: value for name, value in {**kwargs, **args}.items() if value is not None}
            raise ValueError(
                f"backbone {backbone!r} cannot be built with {reprlib.repr(given)}: {type(error).__name__}: {error}"
            ) from error
        return model, backbone, args
    for option, value in {**kwargs, "backbone_args": backbone_args or None}.items():
        if value is not None:
            raise ValueError(f"{option} is for a backbone that is built here: give it to the module, or give a name.")
    channels = getattr(backbone, "in_chans", in_chans)
    if channels != in_chans:
        raise ValueError(f"in_chans must be {channels}, as many as the backbone reads, got {in_chans}.")
    name: str | None = getattr(backbone, "pretrained_cfg", {}).get("architecture")
    if getattr(backbone, "num_classes", None) != max(num_classes, 1):
        backbone.reset_classifier(max(num_classes, 1))
    own = ("num_classes", "in_chans", "global_pool", "img_size")  # S3N has these itself
    args = {k: v for k, v in get_model_args(backbone).items() if k not in own}
    return backbone, name, args


def explain_refusal(images: object, backbone: Backbone, channels: int, error: Exception) -> Exception | None:
    """Say why a backbone could not read images, where that was the images' fault; None where it was not.

    Asked after the fact, so that reading costs nothing and no image is refused that a backbone can read. `images`
    should have been B×C×H×W for a `backbone` of C `channels`, which failed with `error`.
    """
    if not isinstance(images, Tensor):
        return TypeError(f"images must be a tensor of B×{channels}×H×W, got {type(images).__name__}.")
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = " Add a batch dimension: x[None]." if images.ndim == 3 else ""
        return ValueError(f"images must be B×{channels}×H×W, got {shape}.{hint}")
    if shape[1] != channels:
        return ValueError(f"images must have the {channels} channels that the model was built for, got {shape}.")
    if 0 in shape[2:]:
        return ValueError(f"images have no pixel: their shape is {shape}.")
    if not images.is_floating_point():
        return TypeError(f"images must be floats, normalized as the model's data config says, got {images.dtype}.")
    if isinstance(error, torch.OutOfMemoryError):
        return None
    weights = [weight for weight in backbone.parameters() if weight.is_floating_point()]
    devices = {weight.device for weight in weights}
    if images.device not in devices:
        return ValueError(f"images are on {images.device} and the model on {next(iter(devices))}: move either.")
    dtypes = {weight.dtype for weight in weights}
    if images.dtype not in dtypes and not torch.is_autocast_enabled(images.device.type):
        return TypeError(f"images are {images.dtype} and the weights {next(iter(dtypes))}: convert either.")
    infos = getattr(backbone, "feature_info", None)
    cell = infos[-1].get("reduction", 32) if infos else 32
    if isinstance(error, AssertionError) or not shape[0] or min(shape[2:]) < cell:
        return ValueError(f"this backbone cannot read images of shape {shape}: {error}")
    return None
