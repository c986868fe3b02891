"""S3N's names in timm's registry, and the weights that they load.

Importing this module registers the generic `s3n`, which takes `backbone=...`, and one name for each row of `VARIANTS`.
Their `pretrained=True` loads the backbone's ImageNet weights from its own timm repository on the Hub.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, get_model_args, register_model
from torch import Tensor, nn

from .backbone import Backbone
from .model import S3N

_logger = logging.getLogger(__name__)

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
}


def _backbone_cfg(backbone: str) -> PretrainedCfg:
    """The timm config of a backbone's weights, with its module names as they are inside S3N."""
    cfg = timm.models.get_pretrained_cfg(backbone)
    if cfg is None:
        raise ValueError(f"backbone {backbone!r} is not a timm model: see timm.list_models() for the names.")

    def prefix(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else names or ()
        return tuple(f"backbone.{name}" for name in names)

    return replace(
        cfg,
        url=None if cfg.hf_hub_id else cfg.url,
        first_conv=prefix(cfg.first_conv),
        classifier=(*prefix(cfg.classifier), "classifier_discriminative", "classifier_complementary", "fusion"),
        architecture=None,
        tag=None,
    )


default_cfgs = generate_default_cfgs({
    "s3n": _backbone_cfg("resnet50.tv_in1k"),
    **{f"{name}.{backbone.split('.')[1]}": _backbone_cfg(backbone) for name, backbone in VARIANTS.items()},
})


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: S3N) -> dict[str, Tensor]:
    """Bring a checkpoint of S3N, or of its plain backbone, to the names of `model`.

    What S3N adds to a plain backbone keeps its initialisation; one log line names it.

    Args:
        state_dict: names to tensors, of the classes and channels that the model's `pretrained_cfg` states.
        model: the model that will load it.

    Returns:
        The state dict for `model`; timm drops its classifiers where the number of classes differs.

    Raises:
        RuntimeError: a key fits nowhere, or one of the model's is missing.
    """
    own = model.state_dict()
    if any(name.startswith("backbone.") for name in state_dict):
        remapped = dict(state_dict)
    else:
        added = {name: value for name, value in own.items() if not name.startswith("backbone.")}
        _logger.info("Loading the backbone's weights alone; newly initialised: %s.", ", ".join(added))
        remapped = {f"backbone.{name}": value for name, value in _load_backbone(state_dict, model).items()} | added
    # classifiers may be left over in a model without classes: timm drops them next
    classifiers = tuple(f"{name}." for name in model.pretrained_cfg["classifier"]) if model.num_classes == 0 else ()
    unexpected = [name for name in remapped if name not in own and not name.startswith(classifiers)]
    missing = [name for name in own if name not in remapped]
    for names, fault in ((unexpected, "has keys that fit nowhere"), (missing, "lacks keys of the model")):
        if names:
            raise RuntimeError(
                f"The checkpoint {fault}: {', '.join(names[:8])}{f' and {len(names) - 8} more' * (len(names) > 8)}; "
                "create the variant, with the branches and neck, that it was saved from."
            )
    return remapped


def _load_backbone(state_dict: dict[str, Tensor], model: S3N) -> dict[str, Tensor]:
    """Let timm load plain backbone weights into a twin of the backbone, strictly: it knows each family's remapping."""
    cfg = model.pretrained_cfg
    name = model.config["backbone"]
    if name is None:
        return state_dict
    args = get_model_args(model.backbone)
    args.update(num_classes=cfg["num_classes"], in_chans=cfg["input_size"][0])
    try:
        twin = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict), **args)
    except (RuntimeError, KeyError) as error:
        raise RuntimeError(f"The checkpoint is neither one of this S3N nor of its backbone {name}: {error}") from error
    return twin.state_dict()


def _create_s3n(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    fixed = VARIANTS.get(variant)
    backbone = kwargs.setdefault("backbone", fixed or "resnet50")
    if fixed and (not isinstance(backbone, str) or backbone.split(".")[0] != fixed.split(".")[0]):
        raise ValueError(f"{variant} is built on {fixed}; create 's3n' to choose another backbone.")
    if not fixed and isinstance(backbone, str) and not kwargs.get("pretrained_cfg"):
        kwargs["pretrained_cfg"] = replace(_backbone_cfg(backbone), architecture=variant)
    levels = _count_levels(backbone) if kwargs.get("features_only") else ()
    return build_model_with_cfg(
        S3N,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(feature_cls="getter", out_indices=levels),
        **kwargs,
    )


def _count_levels(backbone: Backbone) -> tuple[int, ...]:
    """Indices of all feature levels of a backbone: some families have four, some five."""
    if isinstance(backbone, str):
        with torch.device("meta"):
            backbone = timm.create_model(backbone)
    return tuple(range(len(backbone.feature_info)))


def _register(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_s3n(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"S3N on {VARIANTS[name]}." if name in VARIANTS else "S3N on the timm model given by `backbone`."
    return register_model(create)


globals().update({name: _register(name) for name in default_cfgs})
