"""The weights that a model starts from, the model that teaches it, and what its layers cannot normalize."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from support.measuring import match_classes
from torch import Tensor, nn

import s3n_timm
from s3n_timm import S3N
from s3n_timm.images import input_config


def read_pretrained(path: str) -> dict[str, Any]:
    """What timm is told of the backbone's weights: a file of them, or those of a saved model, S3N or plain."""
    if Path(path).is_file():
        return dict(file=path)
    model = s3n_timm.load_model(path)
    backbone = s3n_timm.extract_backbone(model) if isinstance(model, S3N) else model
    return dict(state_dict=backbone.state_dict(), num_classes=backbone.num_classes)


def read_teacher(
        args: argparse.Namespace, train: datasets.Dataset, data_config: Mapping[str, Any], accelerator: Accelerator,
) -> Callable[[Tensor], Tensor]:
    """What the model of --teacher says of a batch of images, for the loss to take as its targets.

    It reads the very images that the network learns from, mixed ones too, at their size. S3N answers by the mean of its
    outputs.

    Raises:
        ValueError: it cannot be loaded, has other classes, or its images are normalized otherwise.
    """
    model = s3n_timm.load_model(args.teacher)
    _, order = match_classes(train, model, args.dataset, args.teacher)
    theirs = input_config(model)
    for name, ours in (("mean", data_config["mean"]), ("std", data_config["std"])):
        if tuple(theirs[name]) != tuple(ours):
            raise ValueError(f"--teacher {args.teacher} reads images of {name} {theirs[name]}, and --backbone "
                             f"{args.backbone} of {ours}: take a teacher whose backbone is normalized alike.")
    if isinstance(model, S3N):
        model.configure(answer="mean")
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.eval().to(accelerator.device, memory_format=layout)
    run = torch.compile(model, backend=args.torchcompile) if args.torchcompile else model
    places = torch.tensor(order, device=accelerator.device)

    @torch.no_grad()
    def teach(images: Tensor) -> Tensor:
        with accelerator.autocast():
            logits = run(images).float()[:, places]
        return logits.sigmoid() if args.dataset == "multi-label" else logits.softmax(1)

    return teach


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
