"""S3N's names in timm's registry, and the weights that they load.

Importing this module registers the generic `s3n`, which takes `backbone=...`, and one name for each row of `VARIANTS`.
Their `pretrained=True` loads the backbone's ImageNet weights from its own timm repository on the Hub.
"""

import inspect
import logging
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, get_model_args, register_model
from torch import Tensor, nn

from .config import MAX_CHANNELS, MAX_CLASSES, MAX_SIDE, OPTIONS, check_count
from .heads import Backbone
from .hub.download import verified_cfg
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


def _as_names(names: str | Iterable[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _backbone_cfg(backbone: str) -> PretrainedCfg:
    """The timm config of a backbone's weights, with its module names as they are inside S3N."""
    cfg = timm.models.get_pretrained_cfg(backbone)
    if cfg is None:
        raise ValueError(f"backbone {backbone!r} is not a timm model: see timm.list_models() for the names.")

    def prefix(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
        return tuple(f"backbone.{name}" for name in _as_names(names))

    return replace(
        cfg,
        url=None if cfg.hf_hub_id else cfg.url,
        first_conv=prefix(cfg.first_conv),
        classifier=(*prefix(cfg.classifier), "classifier.discriminative", "classifier.complementary", "fusion"),
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
        RuntimeError: a key fits nowhere, one of the model's is missing, or a tensor holds what no weight can be.
    """
    own = model.state_dict()
    # what timm read need not be tensors, where the file is a pickle
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items()):
        raise RuntimeError("The checkpoint holds other things than named tensors: give it as a bare state dict.")
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
                f"The checkpoint {fault}: {join_names(names)}; create the variant, with the branches and neck, that "
                "it was saved from."
            )
    # timm adapts these, where classes or channels differ, and torch checks them after that
    adapted = tuple(f"{name}." for key in ("classifier", "first_conv") for name in _as_names(model.pretrained_cfg[key]))
    check_shapes({name: value for name, value in remapped.items() if not name.startswith(adapted)}, own)
    check_values(remapped, own)
    return remapped


def join_names(names: Iterable[str], most: int = 8) -> str:
    """Names for a message, the list cut after `most`."""
    names = list(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def check_shapes(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose shape is not that of the model's; torch alone would take a vector's first for a scalar.

    Raises:
        RuntimeError: shapes differ; the message lists them.
    """

    def sides(tensor: Tensor) -> str:
        return "×".join(map(str, tensor.shape)) or "a single number"

    wrong = [
        f"{name} ({sides(value)}, not {sides(own[name])})"
        for name, value in state_dict.items()
        if value.shape != own[name].shape
    ]
    if wrong:
        raise RuntimeError(f"The checkpoint has tensors of the wrong shape: {join_names(wrong)}.")


# numbers of these kinds become one another by rounding; any other change would alter what a tensor means
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_values(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors that a model cannot hold, or that would make it give NaN.

    Args:
        state_dict: names to tensors, of the model's shapes or of another number of classes or channels.
        own: the model's tensors by name; names that it lacks are passed over.

    Raises:
        RuntimeError: a tensor is not dense, is of another kind of number, or is NaN or infinite in the model's dtype.
    """
    pairs = {name: (value, own[name].dtype) for name, value in state_dict.items() if name in own}
    wrong = [
        f"{name} ({str(value.dtype).removeprefix('torch.')})"
        for name, (value, dtype) in pairs.items()
        if value.is_meta
        or value.layout is not torch.strided
        or not (value.dtype in _FLOATS if dtype.is_floating_point else value.dtype == dtype)
    ]
    if wrong:
        raise RuntimeError(f"The checkpoint has tensors of a kind that the model cannot hold: {join_names(wrong)}.")
    infinite = [name for name, (value, dtype) in pairs.items() if not value.to(dtype).isfinite().all()]
    if infinite:
        raise RuntimeError(
            f"The checkpoint has NaN or infinite values in {join_names(infinite)}: the file is damaged, or its "
            "training diverged."
        )


def _load_backbone(state_dict: dict[str, Tensor], model: S3N) -> dict[str, Tensor]:
    """Let timm load plain backbone weights into a twin of the backbone, strictly: it knows each family's remapping."""
    cfg = model.pretrained_cfg
    name = model.config.backbone
    if name is None:
        return state_dict
    args = get_model_args(model.backbone)
    args.update(num_classes=cfg["num_classes"], in_chans=cfg["input_size"][0])
    try:
        twin = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict), **args)
    except (RuntimeError, KeyError) as error:
        raise RuntimeError(f"The checkpoint is neither one of this S3N nor of its backbone {name}: {error}") from error
    return twin.state_dict()


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


def _check_cfg(cfg: Mapping[str, Any]) -> None:
    """Refuse a `pretrained_cfg` of a config.json whose values timm would stumble over without a word on what is wrong.

    Raises:
        ValueError: a value is of the wrong type or out of range, or there is not one label name for each class.
    """

    def refuse(name: str, rule: str) -> None:
        raise ValueError(f"pretrained_cfg: {name} must be {rule}, got {reprlib.repr(cfg[name])}.")

    def are_names(value: Any) -> bool:
        several = isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value)
        return isinstance(value, str) or several

    def is_number(value: Any) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool)

    given = {name: value for name, value in cfg.items() if value is not None}
    classes = given.get("num_classes", PretrainedCfg.num_classes)
    check_count("pretrained_cfg: num_classes", classes, 0, MAX_CLASSES)
    for name in ("input_size", "test_input_size", "min_input_size"):
        size = given.get(name, (1, 1, 1))
        if not isinstance(size, (tuple, list)) or len(size) != 3:
            refuse(name, "(channels, rows, columns)")
        for value, most in zip(size, (MAX_CHANNELS, MAX_SIDE, MAX_SIDE)):
            check_count(f"pretrained_cfg: {name}", value, 1, most)
    for name in ("mean", "std"):
        values = given.get(name, ())
        fits = isinstance(values, (tuple, list)) and all(is_number(value) and abs(value) < 1e6 for value in values)
        if name in given and not (fits and values and (name == "mean" or min(values) > 0)):
            refuse(name, "a number for each channel" + ", each positive" * (name == "std"))
    for name in ("crop_pct", "test_crop_pct"):
        if name in given and not (is_number(given[name]) and 0 < given[name] < 1e3):
            refuse(name, "a positive number")
    if given.get("crop_mode", "center") not in ("center", "squash", "border"):
        refuse("crop_mode", "'center', 'squash' or 'border'")
    if given.get("interpolation", "bicubic") not in _INTERPOLATIONS:
        refuse("interpolation", f"one of {', '.join(_INTERPOLATIONS)}")
    for name in ("first_conv", "classifier"):
        if name in given and not are_names(given[name]):
            refuse(name, "a module's name or a list of names")
    # both would change which weights are read, and S3N saves neither
    for name in ("custom_load", "label_offset"):
        if given.get(name):
            refuse(name, "left out, as S3N's weights have none")
    labels = given.get("label_names")
    if labels is not None:
        # a dict names classes by their index and may leave some out
        if not isinstance(labels, (tuple, list, dict)):
            refuse("label_names", "a list of names")
        if len(labels) > classes or (len(labels) < classes and not isinstance(labels, dict)):
            raise ValueError(f"pretrained_cfg: label_names has {len(labels)} names for {classes} classes.")


_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")


def _create_s3n(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    unknown = sorted(kwargs.keys() - _ARGUMENTS)
    if unknown:
        raise TypeError(f"{variant} has no argument {join_names(unknown)}: see help(s3n_timm.S3N) for those it has.")
    if isinstance(kwargs.get("pretrained_cfg"), Mapping):
        _check_cfg(kwargs["pretrained_cfg"])
        if pretrained:
            kwargs["pretrained_cfg"] = verified_cfg(kwargs["pretrained_cfg"], kwargs.get("cache_dir"))
        stated = kwargs["pretrained_cfg"].get("num_classes")
        built = (kwargs.get("pretrained_model_args") or {}).get("num_classes", stated)
        if built != stated:
            # timm would take it for a wish for new classifiers
            raise ValueError(f"config.json states {stated} classes, and {reprlib.repr(built)} in its model_args.")
    fixed = VARIANTS.get(variant)
    backbone = kwargs.setdefault("backbone", fixed or "resnet50")
    if fixed and (not isinstance(backbone, str) or backbone.split(".")[0] != fixed.split(".")[0]):
        raise ValueError(f"{variant} is built on {fixed}; create 's3n' to choose another backbone.")
    if not fixed and isinstance(backbone, str) and not kwargs.get("pretrained_cfg"):
        kwargs["pretrained_cfg"] = replace(_backbone_cfg(backbone), architecture=variant)
    levels = _count_levels(backbone) if kwargs.get("features_only") else ()
    try:
        return build_model_with_cfg(
            S3N,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(feature_cls="getter", out_indices=levels),
            **kwargs,
        )
    except _UNREADABLE as error:
        raise RuntimeError(
            f"The weights of {variant} cannot be read ({type(error).__name__}: {error}): is the file whole?"
        ) from error


# what safetensors and torch raise besides RuntimeError, ValueError and OSError on a file that is not theirs
_UNREADABLE = (SafetensorError, EOFError, LookupError, AttributeError)


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
