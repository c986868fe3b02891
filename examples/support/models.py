"""The weights that a model starts from, and what its layers cannot normalize."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import s3n_timm
from s3n_timm import S3N


def read_pretrained(path: str) -> dict[str, Any]:
    """What timm is told of the backbone's weights: a file of them, or those of a saved model, S3N or plain."""
    if Path(path).is_file():
        return dict(file=path)
    model = s3n_timm.load_model(path)
    backbone = s3n_timm.extract_backbone(model) if isinstance(model, S3N) else model
    return dict(state_dict=backbone.state_dict(), num_classes=backbone.num_classes)


def refuse_single_values(model: nn.Module, args: argparse.Namespace, size: tuple[int, ...]) -> None:
    """Refuse a batch of one image whose last feature map has one place: batch norm has no variance there.

    Raises:
        ValueError: a layer normalizes a single value per channel.
    """
    if args.batch_size > 1 or args.freeze_bn:
        return
    seen: list[str] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            seen.append(type(module).__name__)

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [module.register_forward_pre_hook(look) for module in norms]
    with torch.no_grad():
        model.eval()(torch.zeros(1, *size, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    if seen:
        raise ValueError(f"{args.backbone} has one feature per channel at {size[1]} px, which batch norm cannot "
                         "normalize in a batch of one image: raise --batch-size or --img-size, or add --freeze-bn.")
