"""S3N's names in timm's registry.

Importing this module registers the generic `s3n`, which takes `backbone=...`, and one name for each row of `VARIANTS`.
Their `pretrained=True` loads the backbone's ImageNet weights from its own timm repository on the Hub. One of them,
`s3n_test_resnet`, comes with the weights of a whole S3N, which knows the drawn birds.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._hub import load_model_config_from_path
from torch import nn

from .backbones import Backbone
from .checkpoints import (
    CLASSIFIERS,
    WEIGHTS,
    as_names,
    build_on_meta,
    check_cfg,
    check_names,
    check_numbers,
    check_shapes,
    check_weights_file,
    checkpoint_filter_fn,
    explain_damage,
    join_names,
    read_header,
)
from .config import OPTIONS, check_choice
from .hub.download import verified_cfg
from .model import S3N

# name in the registry: the backbone with the tag of its weights (for ResNets those of the paper's era)
VARIANTS = {
    "s3n_resnet18": "resnet18.tv_in1k",
    "s3n_resnet34": "resnet34.tv_in1k",
    "s3n_resnet50": "resnet50.tv_in1k",
    "s3n_resnet101": "resnet101.tv_in1k",
    "s3n_resnet152": "resnet152.tv_in1k",
    "s3n_resnext50_32x4d": "resnext50_32x4d.tv_in1k",
    "s3n_densenet121": "densenet121.tv_in1k",
    "s3n_tf_efficientnet_lite0": "tf_efficientnet_lite0.in1k",
    "s3n_regnety_008": "regnety_008.pycls_in1k",
    "s3n_swin_tiny_patch4_window7_224": "swin_tiny_patch4_window7_224.ms_in1k",
    "s3n_convnext_tiny": "convnext_tiny.fb_in1k",
    "s3n_test_resnet": "test_resnet.r160_in1k",
}
# a folder of `save` with the weights that come with the package; its config.json states the command that made it
PACKAGED = Path(__file__).with_name("weights")


def _backbone_cfg(backbone: str) -> PretrainedCfg:
    """The timm config of a backbone's weights, with its module names as they are inside S3N."""
    cfg = timm.models.get_pretrained_cfg(backbone)
    if cfg is None:
        raise ValueError(f"backbone {backbone!r} is not a timm model: see timm.list_models() for the names.")
    return _as_s3n(cfg)


def _read_cfg(cfg: Mapping[str, Any]) -> PretrainedCfg:
    """A model's own config, without what is no field of timm's."""
    return PretrainedCfg(**{name: value for name, value in cfg.items() if name in PretrainedCfg.__dataclass_fields__})


def _as_s3n(cfg: PretrainedCfg) -> PretrainedCfg:
    return replace(
        cfg,
        url=None if cfg.hf_hub_id else cfg.url,
        first_conv=tuple(f"backbone.{name}" for name in as_names(cfg.first_conv)),
        classifier=(*(f"backbone.{name}" for name in as_names(cfg.classifier)), *CLASSIFIERS),
        architecture=None,
        tag=None,
    )


def _packaged_cfg() -> PretrainedCfg:
    cfg, *_ = load_model_config_from_path(PACKAGED)
    own = dict(source=None, file=str(PACKAGED / WEIGHTS), pool_size=(6, 6), architecture=None, tag=None)
    return replace(_read_cfg(cfg), **own)


default_cfgs = generate_default_cfgs({
    "s3n": _backbone_cfg("resnet50.tv_in1k"),
    "s3n_test_resnet.birds": _packaged_cfg(),
    **{f"{name}.{backbone.split('.')[1]}": _backbone_cfg(backbone) for name, backbone in VARIANTS.items()},
})


# besides S3N's own arguments, what timm.create_model hands on
_TIMM_ARGUMENTS = {
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "cache_dir",
    "features_only",
    "out_indices",
    "feature_cls",
}
_ARGUMENTS = (set(inspect.signature(S3N).parameters) | set(OPTIONS) | _TIMM_ARGUMENTS) - {"options"}


def _create_s3n(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    unknown = sorted(kwargs.keys() - _ARGUMENTS)
    if unknown:
        raise TypeError(f"{variant} has no argument {join_names(unknown)}: see help(s3n_timm.S3N) for those it has.")
    if kwargs.get("features_only"):
        # timm's others take levels from the backbone's second call, on warped images, or see S3N's own children alone
        check_choice("feature_cls", kwargs.get("feature_cls", "getter"), ("getter", "hook"))
    fixed = VARIANTS.get(variant)
    backbone = kwargs.setdefault("backbone", fixed or "resnet50")
    if fixed and (not isinstance(backbone, str) or backbone.split(".")[0] != fixed.split(".")[0]):
        raise ValueError(f"{variant} is built on {fixed}; create 's3n' to choose another backbone.")
    with explain_damage(variant):
        if isinstance(kwargs.get("pretrained_cfg"), Mapping):
            _check_saved(variant, pretrained, kwargs)
        elif isinstance(backbone, str) and not kwargs.get("pretrained_cfg") and (
                not fixed or ("." in backbone and backbone != fixed)):  # other weights than the variant's
            kwargs["pretrained_cfg"] = replace(_backbone_cfg(backbone), architecture=variant)
        elif isinstance(backbone, nn.Module) and not kwargs.get("pretrained_cfg"):
            cfg = _read_cfg(getattr(backbone, "pretrained_cfg", {}))
            kwargs["pretrained_cfg"] = replace(_as_s3n(cfg), architecture=variant)
        given = kwargs.get("pretrained_cfg_overlay") or {}
        if pretrained and given.get("file") is not None:
            check_weights_file(given["file"])
        if pretrained and given.get("state_dict") == {}:  # timm would ask the Hub for other weights
            raise RuntimeError("The state dict in pretrained_cfg_overlay is empty.")
        levels = _count_levels(backbone) if kwargs.get("features_only") else ()
        return build_model_with_cfg(
            S3N,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(feature_cls="getter", out_indices=levels),
            **kwargs,
        )


def _check_saved(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> None:
    """Check a config.json and its weight file, and let `kwargs` point to verified files where they are on the Hub."""
    cfg, args = kwargs["pretrained_cfg"], kwargs.get("pretrained_model_args") or {}
    check_cfg(cfg)
    check_numbers("backbone_args", kwargs.get("backbone_args"))
    stated = cfg.get("num_classes", PretrainedCfg.num_classes)
    if args.get("num_classes", stated) != stated:
        # timm would take it for a wish for new classifiers
        raise ValueError(f"config.json states {stated} classes, and {args['num_classes']!r:.80} in its model_args.")
    if pretrained:
        cfg = kwargs["pretrained_cfg"] = verified_cfg(cfg, kwargs.get("cache_dir"))
    # as it was saved, whatever classes, channels, pooling and image size are asked for now
    options = {name: value for name, value in kwargs.items() if name not in (*_TIMM_ARGUMENTS, "global_pool")}
    options |= dict(num_classes=stated, in_chans=cfg.get("input_size", PretrainedCfg.input_size)[0])
    if "img_size" in args:
        options["img_size"] = args["img_size"]
    saved = build_on_meta(lambda: build_model_with_cfg(S3N, variant, False, pretrained_cfg=cfg, **options))
    if pretrained and cfg.get("source") == "local-dir":
        header = read_header(cfg["file"])
        if saved is not None:
            own = saved.state_dict()
            check_names((name for name in header if name not in own), (name for name in own if name not in header))
            check_shapes(header, own)


def _count_levels(backbone: Backbone) -> tuple[int, ...]:
    """Indices of all feature levels of a backbone: some families have four, some five."""
    if isinstance(backbone, str):
        with torch.device("meta"):
            backbone = timm.create_model(backbone)
    return tuple(range(len(backbone.feature_info)))


@register_model
def s3n(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on the timm model given by `backbone`."""
    return _create_s3n("s3n", pretrained, **kwargs)


@register_model
def s3n_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on resnet18.tv_in1k."""
    return _create_s3n("s3n_resnet18", pretrained, **kwargs)


@register_model
def s3n_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on resnet34.tv_in1k."""
    return _create_s3n("s3n_resnet34", pretrained, **kwargs)


@register_model
def s3n_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on resnet50.tv_in1k."""
    return _create_s3n("s3n_resnet50", pretrained, **kwargs)


@register_model
def s3n_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on resnet101.tv_in1k."""
    return _create_s3n("s3n_resnet101", pretrained, **kwargs)


@register_model
def s3n_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on resnet152.tv_in1k."""
    return _create_s3n("s3n_resnet152", pretrained, **kwargs)


@register_model
def s3n_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on resnext50_32x4d.tv_in1k."""
    return _create_s3n("s3n_resnext50_32x4d", pretrained, **kwargs)


@register_model
def s3n_densenet121(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on densenet121.tv_in1k."""
    return _create_s3n("s3n_densenet121", pretrained, **kwargs)


@register_model
def s3n_tf_efficientnet_lite0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on tf_efficientnet_lite0.in1k."""
    return _create_s3n("s3n_tf_efficientnet_lite0", pretrained, **kwargs)


@register_model
def s3n_regnety_008(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on regnety_008.pycls_in1k."""
    return _create_s3n("s3n_regnety_008", pretrained, **kwargs)


@register_model
def s3n_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on swin_tiny_patch4_window7_224.ms_in1k."""
    return _create_s3n("s3n_swin_tiny_patch4_window7_224", pretrained, **kwargs)


@register_model
def s3n_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on convnext_tiny.fb_in1k."""
    return _create_s3n("s3n_convnext_tiny", pretrained, **kwargs)


@register_model
def s3n_test_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S3N on test_resnet, timm's smallest ResNet, whose response maps have a stride of 16 pixels here.

    By default `pretrained=True` loads an S3N that was trained on drawn birds of 96 px. It comes with this package.
    """
    kwargs.setdefault("backbone_args", dict(output_stride=16))
    return _create_s3n("s3n_test_resnet", pretrained, **kwargs)
