"""S3N as an `nn.Module` with timm's interface: parameters and wiring around the functions of the method."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import register_notrace_function
from timm.models import get_model_input_config, get_model_traits
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from .backbones import Backbone, create_backbone, explain_refusal
from .config import MAX_CHANNELS, MAX_CLASSES, STRUCTURE, S3NConfig, check_choice, check_count, check_number
from .heads import classify_maps, create_neck, inspect_head
from .multiscale import scan
from .outputs import Explanation, S3NLogits, mean_answer
from .response import in_float32
from .sampling import BRANCHES, SelectiveSample, gaussian_kernel, sample_response

# these look at shapes and devices, which FX tracing cannot follow: it takes each as one node
for _function in (sample_response, scan):
    register_notrace_function(_function)

GATE_OPTIONS = ("grid_size", "gate_scores", "threshold", "topk", "gate")
SAMPLE_OPTIONS = ("attention", "grid_size", "window", "peak_floor", "floor", "fwhm", "border")


class S3N(nn.Module):
    """Selective sparse sampling around a timm backbone (paper section 3, figure 2).

    The backbone reads the input X; its class response maps give peaks; two warped images, X_d around strong and X_c
    around weak peaks, go through the same backbone as one batch; a fusion layer classifies on the joined features.

    In eval mode a call gives B×C logits, the joint ones unless `answer` says otherwise, in train mode `S3NLogits`;
    `set_branch_logits` overrides that. Between epochs call `set_epoch`, which advances the partition schedule of the
    original.

    Args:
        backbone: name of a timm model, or a module with timm's interface.
        num_classes: C; 0 for features.
        in_chans: channels of the input image.
        preset: `"paper"` or `"original"`.
        global_pool: `"avg"`, or `""` with `num_classes=0` for unpooled features.
        img_size: input size for backbones that are built for one.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of the backbone.
        options: the options of the method, see `help(s3n_timm.S3NConfig)`.

    Raises:
        TypeError: there is no such option.
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
    beta: nn.ParameterDict  # β₁ and β₂ by branch, of sparse attention
    neck: nn.ModuleDict  # by branch
    classifier: nn.ModuleDict  # by branch; one that is missing shares the backbone's own
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
            global_pool: str | None = None,
            img_size: int | Sequence[int] | None = None,
            drop_rate: float = 0.0,
            drop_path_rate: float | None = None,
            **options: Any,
    ) -> None:
        super().__init__()
        config = S3NConfig(backbone=None, preset=preset, **options)
        check_count("in_chans", in_chans, 1, MAX_CHANNELS)
        check_count("num_classes", num_classes, 0, MAX_CLASSES)
        check_number("drop_rate", drop_rate, 0, 1)
        if drop_path_rate is not None:
            check_number("drop_path_rate", drop_path_rate, 0, 1)
        self.backbone, name, backbone_args = create_backbone(
            backbone, num_classes, in_chans, config.backbone_args,
            img_size=img_size, drop_rate=drop_rate or None, drop_path_rate=drop_path_rate,
        )
        self.config = dataclasses.replace(config, backbone=name, backbone_args=backbone_args)
        self.head = inspect_head(self.backbone)
        self.in_chans = in_chans
        self.num_features = self.head.width
        self.head_hidden_size = self.head.hidden_width * len(config.branches.split("+"))
        self.feature_info = [
            dict(info, module=f"backbone.{info['module']}") for info in getattr(self.backbone, "feature_info", [])
        ]
        self.warped = tuple(branch for branch in BRANCHES if branch[0].upper() in config.branches)
        self._branch_logits: bool | None = None

        starts = dict(discriminative=config.beta_discriminative, complementary=config.beta_complementary)
        self.beta = nn.ParameterDict({
            branch: nn.Parameter(torch.tensor([float(starts[branch])]))
            for branch in self.warped if config.attention == "sparse"
        })
        self.neck = nn.ModuleDict({
            branch: create_neck(self.num_features) for branch in self.warped if config.neck == "conv"
        })
        if config.attention == "saliency" and self.warped:
            self.saliency = nn.Conv2d(self.num_features, 1, 1)
        if config.kernel == "learned" and self.warped:
            self.register_buffer("kernel", gaussian_kernel(config.grid_size, config.fwhm))
        if config.partition_warmup_epochs:
            # over unless training says otherwise: a model that was never trained here evaluates deterministically
            self.register_buffer("partition_warm", torch.ones((), dtype=torch.bool))
        self._warming_up = False
        self.register_load_state_dict_post_hook(_read_partition_phase)
        self.reset_classifier(num_classes, global_pool)

        self._model_args = self.config.to_dict()  # timm exports these
        traits = get_model_traits(self.backbone)
        self._traits = dict(
            first_conv=_prefixed(traits.get("first_conv")),
            img_size=traits.get("img_size"),
            fixed_input_size=traits.get("fixed_input_size", False),
        )
        cfg = getattr(self.backbone, "pretrained_cfg", {})
        self.pretrained_cfg = dict(  # the backbone's, with its names as they are inside this model
            cfg,
            architecture="s3n",
            input_size=get_model_input_config(self.backbone)["input_size"],
            first_conv=_prefixed(cfg.get("first_conv")),
            classifier=(_prefixed(self.head.classifier), *(f"classifier.{name}" for name in self.classifier), "fusion"),
        )
        self.default_cfg = self.pretrained_cfg

    # the forward path, in the order of figure 2

    def forward_features(self, x: Tensor) -> Tensor:
        """Backbone features S of X: B×3×H×W images to B×D×h×w, whatever the backbone's own layout.

        Raises:
            TypeError: the images are no floats, or not of the weights' precision.
            ValueError: their shape, size or device is not what the backbone reads. NaN and infinite pixels are not
                looked for, which would wait for the device: they make the answers to their own image NaN.
        """
        try:
            return self.read(x if self.config.scan_size is None else scan(x, self.config.scan_size))
        except Exception as error:
            refusal = explain_refusal(x, self.backbone, self.in_chans, error)
            if refusal is None:
                raise
            raise refusal from error

    def read(self, images: Tensor) -> Tensor:
        """Backbone features B×D×h×w of images that are as large as the backbone reads them."""
        return self.head.to_map(self.backbone.forward_features(images), images.shape[-2:])

    def merge_response(self, features: Tensor, logits: Tensor) -> Tensor:
        """The gated response B×h×w of features B×D×h×w with logits Y_O (eq. 1 to 3), without a gradient."""
        return self.head.response(self.backbone, features, logits, **self._options(*GATE_OPTIONS))

    def sample(
            self, x: Tensor, features: Tensor, logits: Tensor, branches: Sequence[str] | None = None,
    ) -> SelectiveSample:
        """Warp B×3×H×W images by the response of their features and logits (eq. 2 to 8), in float32."""
        with in_float32(next(self.parameters()).device):
            if self.config.attention == "saliency":
                # detached, like the response: with this gradient the backbone forgets to classify
                saliency = self.saliency(features.detach().to(self.saliency.weight.dtype)).float()
                response = saliency.flatten(1).softmax(1).view(saliency.shape)[:, 0]
            else:
                response = self.merge_response(features, logits)
            return sample_response(
                x,
                response,
                mode=self.partition,
                beta_discriminative=self.beta.get("discriminative"),
                beta_complementary=self.beta.get("complementary"),
                kernel=getattr(self, "kernel", None),
                size=self.config.zoom_size,
                branches=self.warped if branches is None else branches,
                **self._options(*SAMPLE_OPTIONS),
            )

    def _options(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in names}

    def apply_neck(self, features: Tensor, branch: str) -> Tensor:
        """The branch's neck, where the model has one."""
        return self.neck[branch](features) if branch in self.neck else features

    def classify(self, features: Tensor, hidden: Tensor, branch: str = "original") -> Tensor:
        """B×C logits of a branch from its features B×D×h×w and pooled features B×D'."""
        if branch in self.classifier:
            return self.classifier[branch](hidden)
        return self.head.classify(self.backbone, features, hidden)

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
        joined = [self.head.pool(self.backbone, x)] if "O" in self.config.branches else []
        joined += [self.head.pool(self.backbone, self.apply_neck(x, branch)) for branch in self.warped]
        hidden = torch.cat(joined, dim=1)
        return hidden if pre_logits else self.fusion(hidden)

    def forward_branches(
            self,
            x: Tensor,
            original: Tensor | None = None,
            keep_sample: bool = True,
            branches: Sequence[str] | None = None,
    ) -> tuple[S3NLogits, SelectiveSample | None, dict[str, Tensor]]:
        """Logits of every branch and of their fusion, the sample, and each branch's B×D×h×w features.

        Args:
            x: B×3×H×W images.
            original: their `forward_features`, where those are known already.
            keep_sample: give the sample; without it its grids and images are not held while the backbone reads.
            branches: the warped branches to read, all of the model's by default; without all of them there are no
                joint logits.
        """
        branches = self.warped if branches is None else branches
        features = {"original": self.forward_features(x) if original is None else original}
        hidden = {"original": self.head.pool(self.backbone, features["original"])}
        logits = {"original": self.classify(features["original"], hidden["original"])}
        sample = None
        if branches:
            sample = self.sample(x, features["original"], logits["original"], branches)
            images = torch.cat([getattr(sample, branch).image for branch in branches])
            sample = sample if keep_sample else None
            # chunk() would tie the number of branches to a batch size that is not known when exported
            parts = self.read(images).unflatten(0, (len(branches), x.shape[0]))
            for i, branch in enumerate(branches):
                features[branch] = self.apply_neck(parts[i], branch)
                hidden[branch] = self.head.pool(self.backbone, features[branch])
                logits[branch] = self.classify(features[branch], hidden[branch], branch)
        if "O" not in self.config.branches:
            del hidden["original"], logits["original"]
        joint = self.fusion(torch.cat(list(hidden.values()), dim=1)) if tuple(branches) == self.warped else None
        return S3NLogits(joint, *(logits.get(name) for name in S3NLogits._fields[1:])), sample, features

    def forward(self, x: Tensor) -> Tensor | S3NLogits:
        if self.num_classes == 0:
            return self.forward_head(self.forward_features(x))
        wants_branches = self.training if self._branch_logits is None else self._branch_logits
        if not (wants_branches or self.training):
            return self.answer(x)
        logits, _, _ = self.forward_branches(x, keep_sample=False)
        return logits if wants_branches else self.decide(logits, "joint")

    @property
    def answering(self) -> tuple[str, ...]:
        """The warped branches that the answer needs."""
        answer = self.config.answer
        return self.warped if answer in ("joint", "mean") else tuple(b for b in self.warped if b == answer)

    def answer(self, x: Tensor, original: Tensor | None = None) -> Tensor:
        """The B×C logits that are the prediction for B×3×H×W images, whatever the mode and `set_branch_logits` say.

        Args:
            x: the images.
            original: their `forward_features`, where those are known already.
        """
        logits, _, _ = self.forward_branches(x, original, keep_sample=False, branches=self.answering)
        return self.decide(logits)

    def decide(self, logits: S3NLogits, answer: str | None = None) -> Tensor:
        """The B×C logits that are the prediction, by `answer`, the model's own by default."""
        answer = self.config.answer if answer is None else answer
        return mean_answer(logits, self.config.multi_label) if answer == "mean" else getattr(logits, answer)

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
            if branch in self.classifier:
                maps[branch] = classify_maps(self.classifier[branch], self.head.hidden_maps(self.backbone, part))
            else:
                maps[branch] = self.head.response_maps(self.backbone, part)
        return Explanation(sample, logits, maps)

    # state that the forward path reads

    @property
    def partition(self) -> str:
        """The partition mode in force."""
        if self._warming_up:
            return "all" if self.training else "probability"
        return self.config.partition_train if self.training else self.config.partition_eval

    def set_epoch(self, epoch: int) -> None:
        """Move the partition schedule to an epoch, counted from 0 (section 4); a no-op without warm-up epochs."""
        if self.config.partition_warmup_epochs:
            self._warming_up = epoch < self.config.partition_warmup_epochs
            self.partition_warm.fill_(not self._warming_up)

    def configure(self, **options: Any) -> None:
        """Change options that decide how the model computes, not which parameters it has.

        `partition_eval` also ends a warm-up of the partition that the weights were saved in.

        Raises:
            TypeError: there is no such option.
            ValueError: an option is out of range, or decides the model's structure.
        """
        fixed = [name for name in options if name in STRUCTURE or (name == "fwhm" and self.config.kernel == "learned")]
        if fixed:
            raise ValueError(f"{fixed[0]} cannot change on a model that exists: create another one with it.")
        self.config = dataclasses.replace(self.config, **options)
        self._model_args = self.config.to_dict()
        if "partition_eval" in options:
            self.set_epoch(self.config.partition_warmup_epochs)

    def _replicate_for_data_parallel(self) -> "S3N":
        raise RuntimeError("S3N does not run in nn.DataParallel: start a process per GPU, by torchrun or accelerate.")

    def set_branch_logits(self, enable: bool | None = True) -> None:
        """Return `S3NLogits` (True), one tensor of logits (False), or whichever the mode asks for (None)."""
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
        check_choice("global_pool", global_pool, ("avg",) if num_classes else ("avg", ""))
        self.global_pool = global_pool
        self.num_classes = num_classes
        if getattr(self.backbone, "num_classes", None) != num_classes:
            self.backbone.reset_classifier(num_classes)
        reference = next(self.backbone.parameters())

        def create(width: int) -> nn.Module:
            if num_classes == 0:
                return nn.Identity()
            return nn.Linear(width, num_classes, device=reference.device, dtype=reference.dtype)

        own = [b for b in self.warped if b == "complementary" or "O" in self.config.branches]
        self.classifier = nn.ModuleDict({branch: create(self.head.hidden_width) for branch in own})
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
        x = x if self.config.scan_size is None else scan(x, self.config.scan_size)
        out = self.backbone.forward_intermediates(
            x, indices=indices, norm=norm, stop_early=stop_early, output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )
        if intermediates_only:
            return out
        return self.head.to_map(out[0], x.shape[-2:]), out[1]

    def prune_intermediate_layers(
            self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True,
    ) -> list[int]:
        """Drop what the chosen intermediate features don't need."""
        taken = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            for name in [name for name, _ in self.named_children() if name != "backbone"]:
                delattr(self, name)
        return taken

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Layer groups of the backbone; all that S3N adds is in the last one, with its classifier."""
        matcher = self.backbone.group_matcher(coarse=coarse)
        names = [name for name, _ in self.backbone.named_parameters()]
        groups = group_with_matcher(((n, n) for n in names), matcher, reverse=True)
        last = max(groups.values())

        def match(name: str) -> tuple[float, ...]:
            return (float(groups.get(name.removeprefix("backbone."), last)),)

        return match

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: the backbone's, and β."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in names} | {f"beta.{branch}" for branch in getattr(self, "beta", ())}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass instead of storing them."""
        self.backbone.set_grad_checkpointing(enable)


def _read_partition_phase(model: S3N, _: Any) -> None:
    """Bring the phase back from a state dict: the forward path reads a plain bool, so that it stays one graph."""
    if model.config.partition_warmup_epochs and not model.partition_warm.is_meta:
        model._warming_up = not bool(model.partition_warm)


def _prefixed(names: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    if names is None or isinstance(names, str):
        return names and f"backbone.{names}"
    return tuple(f"backbone.{name}" for name in names)
