"""S3N as an `nn.Module` with timm's interface: parameters and wiring around the functions of the method."""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import register_notrace_function
from timm.models import get_model_args, get_model_input_config, get_model_traits
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from .heads import (
    Backbone,
    backbone_response_maps,
    classify,
    explain_refusal,
    features_from_map,
    features_to_map,
    hidden_maps,
    inspect_head,
)
from .multiscale import scan
from .peaks import PARTITION_MODES
from .response import class_response_maps, gate_response, gate_weights, grid_mean
from .sampling import ATTENTIONS, BRANCHES, SelectiveSample, sample_response

# these look at shapes and devices, which FX tracing cannot follow: it takes each as one node
for _function in (gate_response, gate_weights, grid_mean, sample_response, scan):
    register_notrace_function(_function)

BRANCH_SETS = ("O", "O+D", "O+C", "D+C", "O+D+C")
NECKS = ("none", "conv")
KERNELS = ("gaussian", "learned")
ANSWERS = ("joint", "mean", "original", "discriminative", "complementary")

# What arguments may be at most: they come from any config.json, and a wrong one must not fill the memory.
MAX_GRID = 255  # sparse attention holds G³ numbers for an image: 66 MB here
MAX_CLASSES = 65_536  # three times ImageNet-21k: the classifiers of a ResNet-50 then take 3.2 GB
MAX_CHANNELS = 1_024  # of an image; hyperspectral cameras give some hundred
MAX_SIDE = 65_536  # pixels of an image: it is resized, scanned or zoomed to them
MAX_BUILT_SIZE = 2_048  # pixels a side that a backbone is built for: a ViT/16 then reads 16,384 tokens
MAX_EPOCHS = 1_000_000
# in cells or in units of attention: float32 loses smaller and larger ones, or their squares, to 0 and infinity
MIN_SCALE, MAX_SCALE = 1e-6, 1e6
# these are S3N's own to give, or would load weights
_RESERVED = ("num_classes", "in_chans", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
             "cache_dir")

PRESETS: dict[str, dict[str, Any]] = {
    # the paper's text, with `expected` in place of its random partition at inference
    "paper": dict(
        partition_train="probability",
        partition_eval="expected",
        partition_warmup_epochs=0,
        neck="none",
        gate_scores="logits",
    ),
    # the authors' released code, where it differs: epochs 0 to 20 are its warm-up
    "original": dict(
        partition_train="probability",
        partition_eval="extreme",
        partition_warmup_epochs=21,
        neck="conv",
        gate_scores="maps",
    ),
}


class S3NLogits(NamedTuple):
    """B×C logits Y_J, Y_O, Y_D and Y_C; None for a branch that the model does not have."""

    joint: Tensor
    original: Tensor | None
    discriminative: Tensor | None
    complementary: Tensor | None


class Explanation(NamedTuple):
    """All that a model saw in a batch; what belongs to a branch that the model does not have is None."""

    sample: SelectiveSample | None  # response, peaks, weights, sampling maps, grids, images; None for branches="O"
    logits: S3NLogits
    maps: dict[str, Tensor]  # B×C×h×w class response maps by branch, each on the image that the branch read


class S3N(nn.Module):
    """Selective sparse sampling around a timm backbone (paper section 3, figure 2).

    The backbone reads the input X; its class response maps give peaks; two warped images, X_d around strong and X_c
    around weak peaks, go through the same backbone as one batch; a fusion layer classifies on the joined features.

    In eval mode a call gives the B×C joint logits, in train mode `S3NLogits`; `set_branch_logits` overrides that.
    Between epochs call `set_epoch`, which moves the partition schedule of the original on.

    Args:
        backbone: name of a timm model, or a module with timm's interface.
        num_classes: C; 0 for features.
        in_chans: channels of the input image.
        preset: `"paper"` or `"original"`; fills every argument below that is left at None.
        branches: `"O"`, `"O+D"`, `"O+C"`, `"D+C"` or `"O+D+C"`: what is fused. The backbone always reads X, as
            that finds the peaks; under `"D+C"` its own classifier, which gives the maps, is the D branch's.
        attention: `"sparse"`, or the dense `"response"` and `"saliency"` of table 3, which warp both images alike. The
            saliency's layer learns through the warps, from features that it does not teach.
        partition_train: how peaks are divided in train mode, see `partition_peaks`.
        partition_eval: how peaks are divided in eval mode.
        partition_warmup_epochs: so many first epochs divide by `"all"` in train and `"probability"` in eval mode.
        neck: `"conv"` puts conv 3×3 stride 2, batch norm and ReLU before the pooling of D and C; `"none"` nothing.
        beta_discriminative: start value of β₁ in cells; √2·0.09·G by default.
        beta_complementary: start value of β₂ in cells; √2·0.3·G by default.
        grid_size: G, or (rows, columns) for inputs that are not square.
        window: side of a peak's window in cells.
        peak_floor: `"mean"` or `"none"`, see `find_peaks`.
        floor: b, attention far from every peak.
        fwhm: F, full width at half maximum of the kernel k in cells.
        kernel: `"gaussian"`, or `"learned"` for a (2G-1)×(2G-1) buffer `kernel`: the same Gaussian until a state
            dict brings a k that training has changed, see `load_original_checkpoint`.
        threshold: δ of the entropy gate in nats.
        topk: classes that count in the gate.
        gate: `"paper"` or `"renormalised"`, see `gate_weights`.
        gate_scores: `"logits"`, or `"maps"` for the means of the maps resized to the grid.
        scan_size: pixels, one number or (H, W), of the reduced copy that the original branch reads; the input as it
            is by default. Not the paper's, nor are the next three.
        zoom_size: pixels of the warped images, which are sampled from the input at its full resolution, see `zoom`.
        answer: what a call gives in eval mode: `"joint"`, the fusion layer's logits; `"mean"`, the geometric mean of
            the probabilities of all outputs, the branches' and the fusion layer's, see `mean_answer`; or the logits of
            one of `branches`, `"original"`, `"discriminative"` or `"complementary"`.
        global_pool: `"avg"`, or `""` with `num_classes=0` for unpooled features.
        img_size: input size for backbones that are built for one.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of the backbone.
        backbone_args: further arguments of `timm.create_model` for the backbone.

    Raises:
        ValueError: an argument is unknown or out of range, or the backbone has no class response maps
            (`NoResponseMap`, with the reason).

    Example:
        >>> model = S3N("test_resnet", num_classes=5).eval()
        >>> model(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 5])
        >>> seen = model.explain(torch.rand(2, 3, 96, 96))
        >>> seen.sample.complementary.image.shape, seen.maps["original"].shape
        (torch.Size([2, 3, 96, 96]), torch.Size([2, 5, 3, 3]))
    """

    backbone: Backbone
    fusion: nn.Module
    saliency: nn.Conv2d
    partition_warm: Tensor
    kernel: Tensor

    def __init__(
            self,
            backbone: str | nn.Module = "resnet50",
            num_classes: int = 1000,
            in_chans: int = 3,
            preset: str = "paper",
            *,
            branches: str = "O+D+C",
            attention: str = "sparse",
            partition_train: str | None = None,
            partition_eval: str | None = None,
            partition_warmup_epochs: int | None = None,
            neck: str | None = None,
            beta_discriminative: float | None = None,
            beta_complementary: float | None = None,
            grid_size: int | Sequence[int] = 31,
            window: int = 3,
            peak_floor: str = "mean",
            floor: float = 0.09,
            fwhm: float = 13,
            kernel: str = "gaussian",
            threshold: float = 0.2,
            topk: int = 5,
            gate: str = "paper",
            gate_scores: str | None = None,
            scan_size: int | Sequence[int] | None = None,
            zoom_size: int | Sequence[int] | None = None,
            answer: str = "joint",
            global_pool: str | None = None,
            img_size: int | Sequence[int] | None = None,
            drop_rate: float = 0.0,
            drop_path_rate: float | None = None,
            backbone_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_choice("preset", preset, tuple(PRESETS))
        given: dict[str, Any] = dict(
            partition_train=partition_train,
            partition_eval=partition_eval,
            partition_warmup_epochs=partition_warmup_epochs,
            neck=neck,
            gate_scores=gate_scores,
        )
        chosen = {name: PRESETS[preset][name] if value is None else value for name, value in given.items()}
        grid = _read_pair("grid_size", grid_size, MAX_GRID, "one number or (rows, columns)")
        cells = math.sqrt(grid[0] * grid[1])
        beta_discriminative = math.sqrt(2) * 0.09 * cells if beta_discriminative is None else beta_discriminative
        beta_complementary = math.sqrt(2) * 0.3 * cells if beta_complementary is None else beta_complementary
        _check_choice("branches", branches, BRANCH_SETS)
        _check_choice("attention", attention, ATTENTIONS)
        _check_choice("partition_train", chosen["partition_train"], PARTITION_MODES)
        _check_choice("partition_eval", chosen["partition_eval"], PARTITION_MODES)
        _check_choice("neck", chosen["neck"], NECKS)
        _check_choice("gate", gate, ("paper", "renormalised"))
        _check_choice("gate_scores", chosen["gate_scores"], ("logits", "maps"))
        _check_choice("peak_floor", peak_floor, ("mean", "none"))
        _check_choice("kernel", kernel, KERNELS)
        _check_number("beta_discriminative", beta_discriminative, MIN_SCALE, MAX_SCALE)
        _check_number("beta_complementary", beta_complementary, MIN_SCALE, MAX_SCALE)
        _check_number("floor", floor, MIN_SCALE, MAX_SCALE)
        _check_number("fwhm", fwhm, MIN_SCALE, MAX_SCALE)
        _check_number("threshold", threshold, -math.inf, math.inf)
        _check_number("drop_rate", drop_rate, 0, 1)
        if drop_path_rate is not None:
            _check_number("drop_path_rate", drop_path_rate, 0, 1)
        check_count("partition_warmup_epochs", chosen["partition_warmup_epochs"], 0, MAX_EPOCHS)
        check_count("topk", topk, 1, MAX_CLASSES)
        check_count("in_chans", in_chans, 1, MAX_CHANNELS)
        check_count("num_classes", num_classes, 0, MAX_CLASSES)
        if not _is_count(window, 1, MAX_GRID) or window % 2 == 0:
            raise ValueError(
                f"window must be a positive odd number of cells, at most {MAX_GRID}, got {reprlib.repr(window)}."
            )
        if img_size is not None:
            for side in img_size if isinstance(img_size, (tuple, list)) else (img_size,):
                check_count("img_size", side, 1, MAX_BUILT_SIZE)

        self.scan_size, self.zoom_size = _read_size("scan_size", scan_size), _read_size("zoom_size", zoom_size)
        self.in_chans = in_chans
        self.branches = branches
        self.set_answer(answer)
        self.attention = attention
        self.partition_train: str = chosen["partition_train"]
        self.partition_eval: str = chosen["partition_eval"]
        self.partition_warmup_epochs: int = chosen["partition_warmup_epochs"]
        self.gate_scores = chosen["gate_scores"]
        self.gate_options: dict[str, Any] = dict(threshold=threshold, topk=topk, gate=gate)
        self.sample_options: dict[str, Any] = dict(
            grid_size=grid,
            window=window,
            peak_floor=peak_floor,
            floor=floor,
            fwhm=fwhm,
            size=self.zoom_size,
        )
        self.warped = tuple(name for name in BRANCHES if name[0].upper() in branches)
        self._branch_logits: bool | None = None

        self.backbone, backbone_name, backbone_args = _build_backbone(
            backbone,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            drop_rate=drop_rate or None,
            drop_path_rate=drop_path_rate,
            backbone_args=backbone_args,
        )
        self.head = inspect_head(self.backbone)
        self.num_features = self.head.width
        self.head_hidden_size = self.head.hidden_width * len(branches.split("+"))
        self.feature_info = [
            dict(info, module=f"backbone.{info['module']}") for info in getattr(self.backbone, "feature_info", [])
        ]

        if attention == "sparse":
            starts = dict(discriminative=beta_discriminative, complementary=beta_complementary)
            for name in self.warped:
                self.register_parameter(f"beta_{name}", nn.Parameter(torch.tensor([float(starts[name])])))
        elif attention == "saliency" and self.warped:
            self.saliency = nn.Conv2d(self.num_features, 1, 1)
        if chosen["neck"] == "conv":
            for name in self.warped:
                self.add_module(f"neck_{name}", _create_neck(self.num_features))
        if kernel == "learned" and self.warped:
            self.register_buffer("kernel", gaussian_kernel(grid, fwhm))
        if self.partition_warmup_epochs:
            # finished unless training says otherwise: a model that was never trained here evaluates deterministically
            self.register_buffer("partition_warm", torch.ones((), dtype=torch.bool))
        self._warming_up = False
        self.register_load_state_dict_post_hook(_read_partition_phase)
        self.reset_classifier(num_classes, global_pool)

        self.config = dict(
            backbone=backbone_name,
            preset=preset,
            branches=branches,
            attention=attention,
            **chosen,
            beta_discriminative=beta_discriminative,
            beta_complementary=beta_complementary,
            grid_size=list(grid),
            window=window,
            peak_floor=peak_floor,
            floor=floor,
            fwhm=fwhm,
            kernel=kernel,
            threshold=threshold,
            topk=topk,
            gate=gate,
            scan_size=None if self.scan_size is None else list(self.scan_size),
            zoom_size=None if self.zoom_size is None else list(self.zoom_size),
            answer=answer,
            backbone_args=backbone_args,
        )
        self._model_args = dict(self.config)  # timm exports these
        traits = get_model_traits(self.backbone)
        self._traits = dict(
            first_conv=_prefixed(traits.get("first_conv")),
            img_size=traits.get("img_size"),
            fixed_input_size=traits.get("fixed_input_size", False),
        )
        self.pretrained_cfg = dict(self.backbone_cfg(getattr(self.backbone, "pretrained_cfg", {})), architecture="s3n")
        self.default_cfg = self.pretrained_cfg

    def backbone_cfg(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """The backbone's own timm config, with its names as they are inside this model."""
        classifiers = [_prefixed(self.head.classifier)]
        classifiers += [name for name, _ in self.named_children() if name.startswith(("classifier_", "fusion"))]
        return dict(
            cfg,
            input_size=get_model_input_config(self.backbone)["input_size"],
            first_conv=_prefixed(cfg.get("first_conv")),
            classifier=tuple(classifiers),
        )

    # the forward path, in the order of figure 2

    def forward_features(self, x: Tensor) -> Tensor:
        """Backbone features S of X: B×3×H×W images to B×D×h×w, whatever the backbone's own layout.

        Raises:
            TypeError: the images are no floats, or not of the weights' precision.
            ValueError: their shape, size or device is not what the backbone reads. A NaN or infinite pixel is not
                looked for, which would hold up the device: it makes the answers to its own image NaN, and no others.
        """
        try:
            return self.read(x if self.scan_size is None else scan(x, self.scan_size))
        except Exception as error:
            refusal = explain_refusal(x, self.backbone, self.in_chans, error)
            if refusal is None:
                raise
            raise refusal from error

    def read(self, images: Tensor) -> Tensor:
        """Backbone features B×D×h×w of images that are as large as the backbone reads them."""
        return features_to_map(self.backbone.forward_features(images), self.head, images.shape[-2:])

    def merge_response(self, features: Tensor, logits: Tensor) -> Tensor:
        """The gated response B×h×w of features B×D×h×w with logits Y_O (eq. 1 to 3), without a gradient.

        Projecting the features on the summed classifier rows of the chosen classes gives the sum of their maps
        without building the others.
        """
        classifier = self.backbone.get_submodule(self.head.classifier)
        # under autocast the features come in low precision; here everything has the precision of the weights
        features, scores = features.detach().to(classifier.weight.dtype), logits.detach()
        grid = self.sample_options["grid_size"]
        if not self.head.reads_hidden:
            maps = backbone_response_maps(self.backbone, self.head, features).detach().float()
            scores = grid_mean(maps, grid) if self.gate_scores == "maps" else scores
            return gate_response(maps, scores, **self.gate_options)
        hidden = hidden_maps(self.backbone, self.head, features).detach()
        if self.gate_scores == "maps":
            scores = classify(classifier, grid_mean(hidden, grid)).detach()
        weight, hidden = classifier.weight.detach().flatten(1).float(), hidden.float()
        rows = gate_weights(scores, **self.gate_options) @ weight
        return torch.einsum("bd,bdhw->bhw", rows, hidden)

    def sample(self, x: Tensor, features: Tensor, logits: Tensor) -> SelectiveSample:
        """Warp B×3×H×W images by the response of their features and logits (eq. 2 to 8), in float32."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            if self.attention == "saliency":
                # detached, like the response: with this gradient the backbone forgets to classify
                saliency = self.saliency(features.detach().to(self.saliency.weight.dtype)).float()
                response = saliency.flatten(1).softmax(1).view(saliency.shape)[:, 0]
            else:
                response = self.merge_response(features, logits)
            return sample_response(
                x,
                response,
                mode=self.partition,
                beta_discriminative=getattr(self, "beta_discriminative", None),
                beta_complementary=getattr(self, "beta_complementary", None),
                attention=self.attention,
                branches=self.warped,
                kernel=getattr(self, "kernel", None),
                **self.sample_options,
            )

    def pool(self, features: Tensor) -> Tensor:
        """Pooled features of one branch, all of the backbone's head but its classifier: B×D×h×w to B×D'."""
        return self.backbone.forward_head(features_from_map(features, self.head), pre_logits=True)

    def apply_neck(self, features: Tensor, branch: str) -> Tensor:
        """The branch's neck, where the model has one."""
        neck = getattr(self, f"neck_{branch}", None)
        return features if neck is None else neck(features)

    def classify_backbone(self, features: Tensor, hidden: Tensor) -> Tensor:
        """Logits of the backbone's own classifier, from B×D' pooled features where it reads those."""
        if self.head.reads_hidden:
            return classify(self.backbone.get_submodule(self.head.classifier), hidden)
        return self.backbone.forward_head(features_from_map(features, self.head))

    def classify_branch(self, features: Tensor, hidden: Tensor, branch: str) -> Tensor:
        """Logits of a warped branch."""
        classifier = getattr(self, f"classifier_{branch}", None)
        return self.classify_backbone(features, hidden) if classifier is None else classifier(hidden)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Head on the features of X alone, as if both warps were the identity.

        This is what `forward` gives for an image without peaks: without class scores there is no response map and
        with one feature map there is no image to warp.

        Args:
            x: B×D×h×w features of `forward_features`.
            pre_logits: give the joined features, not the joint logits.

        Returns:
            B×C joint logits; B×`head_hidden_size` joined features; or `x` itself where pooling is switched off.
        """
        if self.global_pool == "":
            return x
        joined = [self.pool(x)] if "O" in self.branches else []
        joined += [self.pool(self.apply_neck(x, branch)) for branch in self.warped]
        hidden = torch.cat(joined, dim=1)
        return hidden if pre_logits else self.fusion(hidden)

    def forward_branches(
            self,
            x: Tensor,
            original: Tensor | None = None,
            keep_sample: bool = True,
    ) -> tuple[S3NLogits, SelectiveSample | None, dict[str, Tensor]]:
        """Logits of every branch and of their fusion, the sample, and each branch's B×D×h×w features.

        Args:
            x: B×3×H×W images.
            original: their `forward_features`, where those are known already.
            keep_sample: give the sample; without it its grids and images are not held while the backbone reads.
        """
        features = {"original": self.forward_features(x) if original is None else original}
        hidden = {"original": self.pool(features["original"])}
        logits = {"original": self.classify_backbone(features["original"], hidden["original"])}
        sample = None
        if self.warped:
            sample = self.sample(x, features["original"], logits["original"])
            images = torch.cat([getattr(sample, branch).image for branch in self.warped])
            sample = sample if keep_sample else None
            warped = self.read(images)
            # chunk() would tie the number of branches to a batch size that is not known when exported
            parts = warped.unflatten(0, (len(self.warped), x.shape[0]))
            for i, branch in enumerate(self.warped):
                features[branch] = self.apply_neck(parts[i], branch)
                hidden[branch] = self.pool(features[branch])
                logits[branch] = self.classify_branch(features[branch], hidden[branch], branch)
        if "O" not in self.branches:
            del hidden["original"], logits["original"]
        joint = self.fusion(torch.cat(list(hidden.values()), dim=1))
        return S3NLogits(joint, *(logits.get(name) for name in S3NLogits._fields[1:])), sample, features

    def forward(self, x: Tensor) -> Tensor | S3NLogits:
        if self.num_classes == 0:
            return self.forward_head(self.forward_features(x))
        logits, _, _ = self.forward_branches(x, keep_sample=False)
        wants_branches = self.training if self._branch_logits is None else self._branch_logits
        if wants_branches:
            return logits
        return logits.joint if self.training else self.decide(logits)

    def decide(self, logits: S3NLogits) -> Tensor:
        """The B×C logits that are the prediction, by `answer`."""
        return mean_answer(logits) if self.answer == "mean" else getattr(logits, self.answer)

    @torch.no_grad()
    def explain(self, x: Tensor) -> Explanation:
        """Return all that the model saw: what it sampled, and each branch's logits and class response maps.

        Args:
            x: B×3×H×W images.

        Returns:
            An `Explanation`. It follows the mode: call `eval()` first for what inference sees.

        Raises:
            ValueError: the model has no classes.
        """
        if self.num_classes == 0:
            raise ValueError("explain needs a classifier: this model has num_classes=0 and so no response maps.")
        logits, sample, features = self.forward_branches(x)
        maps = {}
        for branch, part in features.items():
            classifier = getattr(self, f"classifier_{branch}", None)
            if classifier is None:
                maps[branch] = backbone_response_maps(self.backbone, self.head, part)
            else:
                maps[branch] = class_response_maps(hidden_maps(self.backbone, self.head, part), classifier)
        return Explanation(sample, logits, maps)

    # state that the forward path reads

    @property
    def partition(self) -> str:
        """The partition mode in force."""
        if self._warming_up:
            return "all" if self.training else "probability"
        return self.partition_train if self.training else self.partition_eval

    def set_epoch(self, epoch: int) -> None:
        """Move the partition schedule to an epoch, counted from 0 (section 4); a no-op without warm-up epochs."""
        if self.partition_warmup_epochs:
            self._warming_up = epoch < self.partition_warmup_epochs
            self.partition_warm.fill_(not self._warming_up)

    def set_answer(self, answer: str) -> None:
        """Choose the output that is the prediction.

        Raises:
            ValueError: `answer` is none of `ANSWERS`, or a branch that the model does not have.
        """
        _check_choice("answer", answer, ANSWERS)
        if answer in S3NLogits._fields[1:] and answer[0].upper() not in self.branches:
            raise ValueError(f"answer={answer!r} needs that branch, and this model has branches={self.branches!r}.")
        self.answer = answer

    def set_branch_logits(self, enable: bool | None = True) -> None:
        """Return `S3NLogits` (True), joint logits (False), or whichever the mode asks for (None)."""
        self._branch_logits = enable

    # timm's interface

    def get_classifier(self) -> nn.Module:
        """The fusion layer, whose output is the prediction."""
        return self.fusion

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace every classifier by a new one.

        Args:
            num_classes: C. With 0 the model gives joined features B×`head_hidden_size` under identity warps.
            global_pool: `""` with `num_classes=0` gives the unpooled features B×D×h×w; None keeps what there is.

        Raises:
            ValueError: `num_classes` is out of range, or `global_pool` is not `"avg"`, or `""` without classes.
        """
        check_count("num_classes", num_classes, 0, MAX_CLASSES)
        if global_pool is None:
            global_pool = "avg" if num_classes else getattr(self, "global_pool", "avg")
        _check_choice("global_pool", global_pool, ("avg",) if num_classes else ("avg", ""))
        self.global_pool = global_pool
        self.num_classes = num_classes
        if getattr(self.backbone, "num_classes", None) != num_classes:
            self.backbone.reset_classifier(num_classes)
        reference = next(self.backbone.parameters())

        def create(width: int) -> nn.Module:
            if num_classes == 0:
                return nn.Identity()
            return nn.Linear(width, num_classes, device=reference.device, dtype=reference.dtype)

        for branch in self.warped:
            if branch == "complementary" or "O" in self.branches:
                self.add_module(f"classifier_{branch}", create(self.head.hidden_width))
        self.fusion = create(self.head_hidden_size)

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = "NCHW",
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Intermediate features of the backbone on X, as timm's models give them."""
        x = x if self.scan_size is None else scan(x, self.scan_size)
        out = self.backbone.forward_intermediates(
            x,
            indices=indices,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )
        if intermediates_only:
            return out
        return features_to_map(out[0], self.head, x.shape[-2:]), out[1]

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drop what the chosen intermediate features don't need."""
        taken = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            for name in [name for name, _ in self.named_children() if name != "backbone"]:
                delattr(self, name)
            for name in list(self._parameters):
                delattr(self, name)
        return taken

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Layer groups of the backbone, and a last one for all that S3N adds."""
        matcher = self.backbone.group_matcher(coarse=coarse)
        names = [name for name, _ in self.backbone.named_parameters()]
        groups = group_with_matcher(((n, n) for n in names), matcher, reverse=True)

        def match(name: str) -> tuple[float, ...]:
            return (float(groups.get(name.removeprefix("backbone."), math.inf)),)

        return match

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: the backbone's, and β."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        betas = {name for name in self._parameters if name.startswith("beta_")}
        return {f"backbone.{name}" for name in names} | betas

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass instead of storing them."""
        self.backbone.set_grad_checkpointing(enable)


def mean_answer(logits: S3NLogits) -> Tensor:
    """What all outputs agree on: B×C logarithms of the geometric mean of their probabilities, scaled to add up to 1.

    It beat the arithmetic mean in most runs on validation images of CUB (examples/results/README.md).
    """
    known = [each.float().log_softmax(1) for each in logits if each is not None]
    return torch.stack(known).mean(0).log_softmax(1)


def _build_backbone(
        backbone: Backbone,
        num_classes: int,
        in_chans: int,
        backbone_args: Mapping[str, Any] | None,
        **kwargs: Any,
) -> tuple[Backbone, str | None, dict[str, Any]]:
    """The backbone with at least one class, its timm name where it has one, and its further arguments."""
    named = isinstance(backbone, str)
    if not named and not isinstance(backbone, nn.Module):
        raise ValueError(f"backbone must be the name of a timm model or a module, got {reprlib.repr(backbone)}.")
    if backbone_args is not None and not isinstance(backbone_args, Mapping):
        raise ValueError(f"backbone_args must map names to values, got {reprlib.repr(backbone_args)}.")
    if named:
        # a name alone: with timm's prefixes for sources a config.json could reach for other folders and the network
        if not timm.is_model(backbone):
            raise ValueError(f"backbone {backbone!r} is not a timm model: see timm.list_models() for the names.")
        args = dict(backbone_args or {})
        reserved = [name for name in args if name in _RESERVED]
        if reserved:
            raise ValueError(f"backbone_args must not have {', '.join(reserved)}: give it to S3N, or load weights.")
        try:
            model = timm.create_model(
                backbone,
                pretrained=False,
                num_classes=max(num_classes, 1),
                in_chans=in_chans,
                **kwargs,
                **args,
            )
            # starts as nn.Linear does: EfficientNet's own start is so wide that response maps are noise for an epoch
            model.reset_classifier(max(num_classes, 1))
        except Exception as error:  # timm's constructors hardly check: a wrong argument fails anywhere and anyhow
            given = {name: value for name, value in {**kwargs, **args}.items() if value is not None}
            raise ValueError(
                f"backbone {backbone!r} cannot be built with {reprlib.repr(given)}: {type(error).__name__}: {error}"
            ) from error
        return model, backbone, args
    name: str | None = getattr(backbone, "pretrained_cfg", {}).get("architecture")
    if getattr(backbone, "num_classes", None) != num_classes:
        backbone.reset_classifier(max(num_classes, 1))
    args = {k: v for k, v in get_model_args(backbone).items() if k not in ("num_classes", "in_chans", "global_pool")}
    return backbone, name, args


def _create_neck(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def _read_partition_phase(model: S3N, _: Any) -> None:
    """Bring the phase back from a state dict: the forward path reads a plain bool, so that it stays one graph."""
    if model.partition_warmup_epochs and not model.partition_warm.is_meta:
        model._warming_up = not bool(model.partition_warm)


def _prefixed(names: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    if names is None or isinstance(names, str):
        return names and f"backbone.{names}"
    return tuple(f"backbone.{name}" for name in names)


def gaussian_kernel(grid: tuple[int, int], fwhm: float) -> Tensor:
    """The kernel k = exp(-4 ln 2 · d² / F²) of section 6, cut at ±(G - 1) cells.

    Args:
        grid: (rows, columns) of the sampling grid.
        fwhm: F in cells.

    Returns:
        (2·rows - 1)×(2·columns - 1), 1 in the middle.
    """
    y, x = (torch.arange(1 - cells, cells).square() for cells in grid)
    return torch.exp((y[:, None] + x) * (-4 * math.log(2) / fwhm**2))


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {reprlib.repr(value)}.")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    fits = isinstance(value, Real) and not isinstance(value, bool)
    if not (fits and low <= value <= high):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {reprlib.repr(value)}.")


def _is_count(value: Any, low: int, high: int) -> bool:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and bool(low <= value <= high)


def check_count(name: str, value: Any, low: int, high: int) -> None:
    """Refuse, by a ValueError that names the argument, what is not a whole number from `low` to `high`."""
    if not _is_count(value, low, high):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {reprlib.repr(value)}.")


def _read_pair(name: str, value: Any, most: int, form: str) -> tuple[int, int]:
    """Read one number, or one for rows and one for columns, as a pair."""
    pair = (value, value) if isinstance(value, Integral) else value
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(_is_count(side, 2, most) for side in pair)):
        raise ValueError(f"{name} must be {form}, each from 2 to {most}, got {reprlib.repr(value)}.")
    return int(pair[0]), int(pair[1])


def _read_size(name: str, size: Any) -> tuple[int, int] | None:
    return None if size is None else _read_pair(name, size, MAX_SIDE, "pixels, one number or (H, W)")
