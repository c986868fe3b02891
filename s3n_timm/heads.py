"""How a timm backbone pools and classifies, and the response maps that its head has (section 1).

Three kinds of head exist here. Where nothing but a linear classifier follows the pooling, its weights project the
features directly. Where a LayerNorm or RMSNorm stands between, every position is normalised by the pooled vector's
own statistics, which keeps the mean of a map equal to its class score. Anything else is applied at every position as
it is, which is exact for affine layers and approximates for others. `inspect_head` finds out by running the head.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.layers import RmsNorm, RmsNorm2d
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.models import get_model_args, get_model_input_config
from torch import Tensor, nn

from .response import class_response_maps

# timm's models share an interface but no class
Backbone = Any

_NORMS = (nn.LayerNorm, RmsNorm, RmsNorm2d)
_PASSIVE = (nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd, nn.AdaptiveAvgPool2d, FastAdaptiveAvgPool)
_AFFINE = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
_AVERAGE_POOLS = ("avg", "fast", "fastavg")


class Head(NamedTuple):
    """What `inspect_head` found out about a backbone."""

    layout: str  # of forward_features: "NCHW", "NHWC" or "NLC"
    prefix_tokens: int  # tokens before the patch tokens, in NLC
    width: int  # channels of the features, D
    hidden_width: int  # channels before the classifier
    classifier: str  # name of the classifier module
    norm: str | None  # name of a norm between pooling and classifier
    linear: bool  # nothing else stands between pooling and classifier
    reads_hidden: bool  # classifier(forward_head(x, pre_logits=True)) are the logits
    modules: tuple[str, ...]  # names of all modules that the head runs
    exact: bool  # the mean of a response map equals its class score


class NoResponseMap(ValueError):
    """A backbone whose head gives no class response maps."""


def inspect_head(backbone: Backbone) -> Head:
    """Run a backbone once, at its own input size, to see how its head works.

    Args:
        backbone: a module with timm's interface and at least one class.

    Returns:
        A `Head`.

    Raises:
        NoResponseMap: the head gives no class response maps; the message says why.
    """
    name = getattr(backbone, "pretrained_cfg", {}).get("architecture") or type(backbone).__name__
    for method in ("forward_features", "forward_head", "get_classifier", "reset_classifier"):
        if not callable(getattr(backbone, method, None)):
            raise NoResponseMap(f"{name} has no {method}(): choose a timm model, or give the module timm's interface.")
    classifier = _find_classifier(backbone, name)
    pool = get_model_args(backbone).get("global_pool", "avg")
    if pool not in _AVERAGE_POOLS:
        raise NoResponseMap(
            f"{name} pools by {pool or 'nothing'!r}, so no position of its features stands for a class score: choose "
            "a backbone with average pooling, or pass backbone_args=dict(global_pool='avg') where the backbone has it."
        )
    input_size = get_model_input_config(backbone)["input_size"]
    parameter = next(backbone.parameters())
    noise = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0))
    with _evaluating(backbone.modules()), torch.no_grad():
        features = backbone.forward_features(noise.to(parameter))
        layout, prefix, width = _find_layout(backbone, features, name)
        logits, calls = _run_head(backbone, features, width)
        hidden, hidden_calls = _run_head(backbone, features, width, pre_logits=True)
        if not all(isinstance(x, Tensor) and x.ndim == 2 for x in (logits, hidden)):
            raise NoResponseMap(f"{name}'s head does not give one B×C tensor, which a response map must average to.")
        if any(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m, _ in calls.values()):
            raise NoResponseMap(
                f"{name}'s head mixes positions by a convolution before its classifier, so it cannot be applied at "
                "one position: choose a backbone with global average pooling."
            )
        between = {path: m for path, (m, _) in calls.items() if path != classifier and not isinstance(m, _PASSIVE)}
        norm = next((path for path, m in between.items() if isinstance(m, _NORMS) and calls[path][1]), None)
        linear = len(between) == (norm is not None)
        head = Head(
            layout=layout,
            prefix_tokens=prefix,
            width=width,
            hidden_width=hidden.shape[1],
            classifier=classifier,
            norm=norm if linear else None,
            linear=linear,
            reads_hidden=not between.keys() - hidden_calls.keys(),
            modules=tuple(calls),
            exact=linear or all(isinstance(m, _AFFINE) for m in between.values()),
        )
        maps = features_to_map(features, head, input_size[1:])
        if not _agree(backbone.forward_head(features_from_map(maps, head)), logits):
            raise NoResponseMap(
                f"{name} pools its class token together with the patches: choose a backbone that averages patches only."
            )
        # the structure says whether a map is exact; the figures catch what a head does outside its modules
        scores = backbone_response_maps(backbone, head, maps).mean((2, 3))
    return head._replace(exact=head.exact and _agree(scores, logits))


def _run_head(
        backbone: Backbone,
        features: Tensor,
        width: int,
        **kwargs: Any,
) -> tuple[Tensor, dict[str, tuple[nn.Module, bool]]]:
    """Run forward_head() and list the modules that it ran, each with whether its input was pooled already."""
    calls: dict[str, tuple[nn.Module, bool]] = {}

    def record(path: str, module: nn.Module, x: Tensor) -> None:
        calls[path] = module, x.ndim == 2 or (x.ndim == 4 and x.numel() == x.shape[0] * width)

    handles = [
        module.register_forward_pre_hook(lambda m, args, path=path: record(path, m, args[0]))
        for path, module in backbone.named_modules()
        if not any(module.children())
    ]
    try:
        return backbone.forward_head(features, **kwargs), calls
    finally:
        for handle in handles:
            handle.remove()


def _find_classifier(backbone: Backbone, name: str) -> str:
    """Name of the only classifier: the config's, as get_classifier() may return the layers around it too."""
    configured = getattr(backbone, "pretrained_cfg", {}).get("classifier")
    found = backbone.get_classifier()
    several = isinstance(configured, (tuple, list)) and len(configured) > 1
    if several or not isinstance(found, nn.Module) or isinstance(found, nn.ModuleList):
        raise NoResponseMap(f"{name} has several classifiers; S3N needs a backbone with one.")
    if isinstance(configured, (tuple, list)):
        configured = configured[0]
    if configured is None:
        configured = next((path for path, module in backbone.named_modules() if module is found), "")
    try:
        weight = backbone.get_submodule(configured).weight
    except AttributeError:
        weight = None
    if not configured or weight is None:
        raise NoResponseMap(f"{name} has no linear classifier to take response maps from.")
    return configured


def _find_layout(backbone: Backbone, features: object, name: str) -> tuple[str, int, int]:
    width: int = backbone.num_features
    if isinstance(features, Tensor) and features.ndim == 4:
        if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
            return "NHWC", 0, features.shape[3]
        if features.shape[1] == width:
            return "NCHW", 0, width
    if isinstance(features, Tensor) and features.ndim == 3 and features.shape[2] == width:
        return "NLC", getattr(backbone, "num_prefix_tokens", 0), width
    raise NoResponseMap(f"{name}'s forward_features() does not give one feature map or token sequence to pool over.")


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or bool((a - b).abs().amax() <= 1e-4 * b.abs().amax() + 1e-6)


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules in eval mode: dropout off, batch-norm statistics read and not updated."""
    states = [(module, module.training) for module in modules]
    for module, _ in states:
        module.training = False
    try:
        yield
    finally:
        for module, training in states:
            module.training = training


def explain_refusal(images: object, backbone: Backbone, channels: int, error: Exception) -> Exception | None:
    """Say why a backbone could not read images, where that was the images' fault; None where it was not.

    Asked after the fact, so that reading costs nothing and no image is refused that a backbone can read.

    Args:
        images: what should have been B×C×H×W.
        backbone: the model that failed.
        channels: C that it was built for.
        error: what it said.
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
        return TypeError(f"images must be floats, normalised as the model's data config says, got {images.dtype}.")
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


def features_to_map(features: Tensor, head: Head, size: Sequence[int]) -> Tensor:
    """Bring what forward_features() gives to B×D×h×w.

    Args:
        features: NCHW or NHWC features, or NLC tokens.
        head: the backbone's.
        size: (H, W) of the image in pixels, for the shape of a token grid.

    Raises:
        ValueError: the tokens don't fill a grid of the image's shape.
    """
    if head.layout == "NCHW":
        return features
    if head.layout == "NHWC":
        return features.permute(0, 3, 1, 2)
    tokens = features[:, head.prefix_tokens :]
    # patches need not fill the image, so the grid is the one whose shape comes nearest to the image's
    count = tokens.shape[1]
    stretch = {r: abs(math.log(r * r / count * size[1] / size[0])) for r in range(1, count + 1) if count % r == 0}
    rows = min(stretch, key=lambda r: stretch[r])
    if stretch[rows] >= math.log(2):
        raise ValueError(f"{count} tokens don't fill a grid of the shape of a {size[0]}×{size[1]} image.")
    return tokens.transpose(1, 2).unflatten(2, (rows, count // rows))


def features_from_map(maps: Tensor, head: Head) -> Tensor:
    """Bring B×D×h×w back to what the backbone's forward_head() reads; prefix tokens, which it ignores, are zero."""
    if head.layout == "NCHW":
        return maps
    if head.layout == "NHWC":
        return maps.permute(0, 2, 3, 1)
    tokens = maps.flatten(2).transpose(1, 2)
    return torch.cat([tokens.new_zeros(tokens.shape[0], head.prefix_tokens, head.width), tokens], dim=1)


def classify(classifier: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a linear classifier, in whichever form it is built, to B×D' pooled features."""
    if isinstance(classifier, nn.Conv2d):
        return classifier(hidden[:, :, None, None]).flatten(1)
    return classifier(hidden)


def hidden_maps(backbone: Backbone, head: Head, features: Tensor) -> Tensor:
    """Apply all of the head but pooling and classifier at every position: B×D×h×w to B×D'×h×w.

    The classifier's `class_response_maps` of the result are the backbone's (section 1).
    """
    if not head.linear:
        return _at_positions(backbone, head, features, pre_logits=True)
    if head.norm is None:
        return features
    norm = backbone.get_submodule(head.norm)
    pooled = features.mean((2, 3), keepdim=True)
    if isinstance(norm, nn.LayerNorm):
        features = features - features.mean(1, keepdim=True)
        pooled = pooled - pooled.mean(1, keepdim=True)
    features = features * torch.rsqrt(pooled.square().mean(1, keepdim=True) + norm.eps)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is not None:
        features = features * weight[:, None, None]
    return features if bias is None else features + bias[:, None, None]


def backbone_response_maps(backbone: Backbone, head: Head, features: Tensor) -> Tensor:
    """Class response maps B×C×h×w of a backbone's own classifier on B×D×h×w features (eq. 1)."""
    if not head.reads_hidden:
        return _at_positions(backbone, head, features)
    return class_response_maps(hidden_maps(backbone, head, features), backbone.get_submodule(head.classifier))


def _at_positions(backbone: Backbone, head: Head, features: Tensor, **kwargs: Any) -> Tensor:
    """Run forward_head() on every position as if it were an image of one position."""
    batch, width, rows, columns = features.shape
    positions = features.permute(0, 2, 3, 1).reshape(-1, width, 1, 1)
    # the flags alone, not eval(): dropout and batch norm must neither act nor learn from single positions
    modules = [backbone, *(backbone.get_submodule(path) for path in head.modules)]
    with _evaluating(modules):
        out = backbone.forward_head(features_from_map(positions, head), **kwargs)
    return out.view(batch, rows, columns, -1).permute(0, 3, 1, 2)
