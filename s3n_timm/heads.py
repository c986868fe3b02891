"""How a timm backbone pools and classifies, and the response maps that its head has (section 1).

Three kinds of head exist here. Where nothing but a linear classifier follows the pooling, its weights project the
features directly. Where a LayerNorm or RMSNorm stands between, every position is normalized by the pooled vector's
own statistics, which keeps the mean of a map equal to its class score. Anything else is applied at every position as
it is, which is exact for affine layers and approximates for others. `inspect_head` finds out by running the head.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from timm.layers import Linear, RmsNorm, RmsNorm2d
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.models import get_model_args, get_model_input_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .backbones import Backbone
from .response import class_response_maps, gate_response, grid_mean, project_response

for _name in ("gate_response", "grid_mean", "project_response"):
    torch.fx.wrap(_name)  # tracing cannot follow their checks of shapes: it takes each as one node

_NORMS = (nn.LayerNorm, RmsNorm, RmsNorm2d)
_PASSIVE = (nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd, nn.AdaptiveAvgPool2d, FastAdaptiveAvgPool)
_AFFINE = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
_AVERAGE_POOLS = ("avg", "fast", "fastavg")


class NoResponseMap(ValueError):
    """A backbone whose head gives no class response maps."""


@dataclass(frozen=True)
class Head:
    """How a backbone gets from its features to pooled features, logits and class response maps.

    Found by `inspect_head`. Its methods take the backbone, so that wrapping or moving the module cannot leave a second,
    stale reference to it behind.
    """

    layout: str  # of forward_features: "NCHW", "NHWC" or "NLC"
    prefix_tokens: int  # tokens before the patch tokens, in NLC
    width: int  # channels of the features, D
    hidden_width: int  # channels before the classifier, D'
    classifier: str  # name of the classifier module
    norm: str | None  # name of a norm between pooling and classifier
    linear: bool  # nothing else stands between pooling and classifier
    reads_hidden: bool  # classifier(forward_head(x, pre_logits=True)) are the logits
    dropout: float  # rate of the dropout before the classifier, where forward_head(x, pre_logits=True) leaves it out
    modules: tuple[str, ...]  # names of all modules that the head runs
    exact: bool  # the mean of a response map equals its class score

    def to_map(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """Bring what forward_features() gives to B×D×h×w.

        Args:
            features: NCHW or NHWC features, or NLC tokens.
            size: (H, W) of the image in pixels, for the shape of a token grid.

        Raises:
            ValueError: the tokens don't fill a grid of the image's shape.
        """
        if self.layout == "NCHW":
            return features
        if self.layout == "NHWC":
            return features.permute(0, 3, 1, 2)
        tokens = features[:, self.prefix_tokens:]
        # patches need not fill the image, so the grid is the one whose shape comes nearest to the image's
        count = tokens.shape[1]
        stretch = {r: abs(math.log(r * r / count * size[1] / size[0])) for r in range(1, count + 1) if count % r == 0}
        rows = min(stretch, key=lambda r: stretch[r])
        if stretch[rows] >= math.log(2):
            raise ValueError(f"{count} tokens don't fill a grid of the shape of a {size[0]}×{size[1]} image.")
        return tokens.transpose(1, 2).unflatten(2, (rows, count // rows))

    def from_map(self, features: Tensor) -> Tensor:
        """Bring B×D×h×w back to what forward_head() reads; prefix tokens, which it ignores, are zero."""
        if self.layout == "NCHW":
            return features
        if self.layout == "NHWC":
            return features.permute(0, 2, 3, 1)
        tokens = features.flatten(2).transpose(1, 2)
        return torch.cat([tokens.new_zeros(tokens.shape[0], self.prefix_tokens, self.width), tokens], dim=1)

    def pool(self, backbone: Backbone, features: Tensor) -> Tensor:
        """All of the head but its classifier: B×D×h×w features to B×D' pooled features."""
        hidden = backbone.forward_head(self.from_map(features), pre_logits=True)
        return F.dropout(hidden, self.dropout, backbone.training) if self.dropout else hidden

    def classify(self, backbone: Backbone, features: Tensor, hidden: Tensor) -> Tensor:
        """B×C logits, from the pooled features where the classifier reads those."""
        if self.reads_hidden:
            return classify(backbone.get_submodule(self.classifier), hidden)
        return backbone.forward_head(self.from_map(features))

    def hidden_maps(self, backbone: Backbone, features: Tensor) -> Tensor:
        """Apply all of the head but pooling and classifier at every position: B×D×h×w to B×D'×h×w.

        The classifier's `class_response_maps` of the result are the backbone's (section 1).
        """
        if not self.linear:
            return self._at_positions(backbone, features, pre_logits=True)
        if self.norm is None:
            return features
        norm = backbone.get_submodule(self.norm)
        pooled = features.mean((2, 3), keepdim=True)
        if isinstance(norm, nn.LayerNorm):
            features = features - features.mean(1, keepdim=True)
            pooled = pooled - pooled.mean(1, keepdim=True)
        features = features * torch.rsqrt(pooled.square().mean(1, keepdim=True) + norm.eps)
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if weight is not None:
            features = features * weight[:, None, None]
        return features if bias is None else features + bias[:, None, None]

    def response_maps(self, backbone: Backbone, features: Tensor) -> Tensor:
        """Class response maps B×C×h×w of the backbone's own classifier on B×D×h×w features (eq. 1)."""
        if not self.reads_hidden:
            return self._at_positions(backbone, features)
        return classify_maps(backbone.get_submodule(self.classifier), self.hidden_maps(backbone, features))

    def response(
            self,
            backbone: Backbone,
            features: Tensor,
            logits: Tensor,
            grid_size: tuple[int, int],
            gate_scores: str = "logits",
            **gate: Any,
    ) -> Tensor:
        """The gated response B×h×w of features B×D×h×w with logits Y_O, float32, without a gradient (eq. 1 to 3).

        Args:
            backbone: the module that the head belongs to.
            features: B×D×h×w.
            logits: B×C.
            grid_size: (rows, columns) that maps are resized to, for `gate_scores="maps"`.
            gate_scores: class scores of the gate: `"logits"`, or `"maps"` for the means of the maps on the grid.
            gate: `threshold`, `topk` and `gate` of `gate_weights`.
        """
        classifier = backbone.get_submodule(self.classifier)
        features, scores = features.detach(), logits.detach()
        if not self.reads_hidden or not is_plain(classifier):
            maps = self.response_maps(backbone, features.to(dtype_of(backbone))).detach().float()
            return gate_response(maps, grid_mean(maps, grid_size) if gate_scores == "maps" else scores, **gate)
        # under autocast the features come in low precision; here everything has the precision of the weights
        hidden = self.hidden_maps(backbone, features.to(classifier.weight.dtype)).detach()
        if gate_scores == "maps":
            scores = classify(classifier, grid_mean(hidden, grid_size)).detach()
        return project_response(hidden, classifier.weight.detach().flatten(1), scores, **gate)

    def _at_positions(self, backbone: Backbone, features: Tensor, **kwargs: Any) -> Tensor:
        """Run forward_head() on every position as if it were an image of one position."""
        batch, width, rows, columns = features.shape
        positions = features.permute(0, 2, 3, 1).reshape(-1, width, 1, 1)
        # the flags alone, not eval(): dropout and batch norm must neither act nor learn from single positions
        modules = [backbone, *(backbone.get_submodule(path) for path in self.modules)]
        with evaluating(modules):
            out = backbone.forward_head(self.from_map(positions), **kwargs)
        return out.view(batch, rows, columns, -1).permute(0, 3, 1, 2)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The floating dtype of a module's parameters."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def is_plain(classifier: nn.Module) -> bool:
    """Whether a classifier is its weight and bias and nothing else, so that response maps may read these.

    Adapters (LoRA), quantized layers and hooks that load weights on demand are not: what they compute is known by
    calling them alone.
    """
    kind = type(classifier)
    plain = kind in (nn.Linear, Linear) or (kind is nn.Conv2d and classifier.kernel_size == (1, 1))
    return plain and not hasattr(classifier, "_hf_hook") and not classifier._forward_hooks


def classify_maps(classifier: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a linear classifier, of whatever kind, at every position: B×D'×h×w to class response maps B×C×h×w."""
    if is_plain(classifier):
        return class_response_maps(hidden, cast(nn.Linear | nn.Conv2d, classifier))
    batch, _, rows, columns = hidden.shape
    logits = classify(classifier, hidden.movedim(1, 3).flatten(0, 2))
    return logits.unflatten(0, (batch, rows, columns)).movedim(3, 1)


def classify(classifier: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a linear classifier, in whichever form it is built, to B×D' pooled features."""
    if isinstance(classifier, nn.Conv2d):
        return classifier(hidden[:, :, None, None]).flatten(1)
    return classifier(hidden)


def create_neck(width: int) -> nn.Sequential:
    """What the authors' code puts between the features of a warped branch and its head: half as many positions."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


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
    with evaluating(backbone.modules()), torch.no_grad():
        features = _draw_features(backbone, input_size)
        layout, prefix, width = _find_layout(backbone, features, name)
        logits, calls, rates = _run_head(backbone, features, width)
        hidden, hidden_calls, hidden_rates = _run_head(backbone, features, width, pre_logits=True)
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
            dropout=next(iter(rates[len(hidden_rates):]), 0.0),
            modules=tuple(calls),
            exact=linear or all(isinstance(m, _AFFINE) for m in between.values()),
        )
        maps = head.to_map(features, input_size[1:])
        if not _agree(_call(backbone, "forward_head", head.from_map(maps)), logits):
            raise NoResponseMap(
                f"{name} pools its class token together with the patches: choose a backbone that averages patches only."
            )
        # the structure says whether a map is exact; the figures catch what a head does outside its modules
        exact = head.exact and (logits.is_meta or _agree(head.response_maps(backbone, maps).mean((2, 3)), logits))
    return replace(head, exact=exact)


class _Method(nn.Module):
    """A method of a backbone as the forward of a module, for `functional_call`."""

    def __init__(self, backbone: Backbone, method: str) -> None:
        super().__init__()
        self.backbone, self.method = backbone, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.backbone, self.method)(*args, **kwargs)


def _call_on_meta(backbone: Backbone, method: str, *args: Any, **kwargs: Any) -> Any:
    """Run a method without computing anything: for the shapes alone, and for weights that are not there yet."""
    module = _Method(backbone, method)
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    return torch.func.functional_call(module, {name: tensor.to("meta") for name, tensor in tensors}, args, kwargs)


def _call(backbone: Backbone, method: str, *args: Any, **kwargs: Any) -> Any:
    on_meta = any(parameter.is_meta for parameter in backbone.parameters())
    return _call_on_meta(backbone, method, *args, **kwargs) if on_meta else getattr(backbone, method)(*args, **kwargs)


def _draw_features(backbone: Backbone, input_size: Sequence[int]) -> Any:
    """Random features of the shape that forward_features() gives; what it gave itself where that is no tensor."""
    parameter = next(backbone.parameters())
    try:
        features = _call_on_meta(backbone, "forward_features", torch.empty(
            1, *input_size, device="meta", dtype=parameter.dtype))
    except (RuntimeError, NotImplementedError):  # a constant outside its buffers, or an operator without shapes
        features = backbone.forward_features(torch.zeros(1, *input_size).to(parameter))
    if not isinstance(features, Tensor) or parameter.is_meta:
        return features
    return torch.randn(features.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(parameter)


class _DropoutRates(TorchFunctionMode):
    """Keeps the rate of every dropout that is called, also of those that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout:
            self.rates.append(float(kwargs["p"]))
        return func(*args, **(kwargs or {}))


def _run_head(
        backbone: Backbone,
        features: Tensor,
        width: int,
        **kwargs: Any,
) -> tuple[Tensor, dict[str, tuple[nn.Module, bool]], list[float]]:
    """Run forward_head() and list its modules, each with whether its input was pooled already, and dropout rates."""
    calls: dict[str, tuple[nn.Module, bool]] = {}

    def record(path: str, module: nn.Module, x: Tensor) -> None:
        calls[path] = module, x.ndim == 2 or (x.ndim == 4 and x.numel() == x.shape[0] * width)

    handles = [
        module.register_forward_pre_hook(lambda m, args, path=path: record(path, m, args[0]))
        for path, module in backbone.named_modules()
        if not any(module.children())
    ]
    try:
        with _DropoutRates() as dropouts:
            return _call(backbone, "forward_head", features, **kwargs), calls, dropouts.rates
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
    tolerance = max(1e-4, 4 * torch.finfo(b.dtype).eps)
    return a.is_meta or bool((a - b).abs().amax() <= tolerance * b.abs().amax() + 1e-6)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules in eval mode: dropout off, batch-norm statistics read and not updated."""
    states = [(module, module.training) for module in modules]
    for module, _ in states:
        module.training = False
    try:
        yield
    finally:
        for module, training in states:
            module.training = training
