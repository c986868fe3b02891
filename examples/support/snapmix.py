"""SnapMix (Huang et al., AAAI 2021): boxes are mixed, and labels weighted by what the response maps hold in them."""

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import rand_bbox
from torch import Tensor, nn

from s3n_timm import S3N
from s3n_timm.heads import evaluating, inspect_head
from s3n_timm.response import resize_maps


class SnapMix:
    """Mix a batch like timm's `Mixup`: a box of each image is replaced by a box of another one, resized to fit.

    The weight of an image's own label is the share of its response map outside the box that was replaced, the weight of
    the other's label the share of the other's map inside the box that was taken; they need not add up to 1.

    Args:
        model: an S3N, or a plain timm model with class response maps, unwrapped. It is read in eval mode, without
            gradients: one more pass per batch.
        alpha: of the Beta distribution that both boxes' areas are drawn from.
        prob: share of batches that are mixed.

    Raises:
        NoResponseMap: a plain model's head gives no class response maps.
    """

    def __init__(self, model: nn.Module, alpha: float, prob: float = 1.0) -> None:
        self.model, self.alpha, self.prob = model, alpha, prob
        self.head = model.head if isinstance(model, S3N) else inspect_head(model)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix B×3×H×W images with B labels, in the order of the batch reversed; draws from numpy, as timm does.

        Returns:
            The mixed images, and B×C label weights.
        """
        targets = F.one_hot(labels, self.model.num_classes).to(torch.float32)
        if np.random.rand() >= self.prob:
            return images, targets
        shares = self.locate(images, labels)
        (top, bottom, left, right), taken = (rand_bbox(images.shape, np.random.beta(self.alpha, self.alpha))
                                             for _ in range(2))
        if min(bottom - top, right - left, taken[1] - taken[0], taken[3] - taken[2]) == 0:
            return images, targets
        mixed = images.clone()
        patch = images.flip(0)[..., taken[0]:taken[1], taken[2]:taken[3]]
        mixed[..., top:bottom, left:right] = F.interpolate(
            patch, (bottom - top, right - left), mode="bilinear", align_corners=True)
        lost = shares[:, top:bottom, left:right].sum((1, 2))
        gained = shares.flip(0)[:, taken[0]:taken[1], taken[2]:taken[3]].sum((1, 2))
        return mixed, (1 - lost)[:, None] * targets + gained[:, None] * targets.flip(0)

    @torch.no_grad()
    def locate(self, images: Tensor, labels: Tensor) -> Tensor:
        """B×H×W shares of each pixel in the response map of its image's own class, which add up to 1."""
        backbone = self.model.backbone if isinstance(self.model, S3N) else self.model
        with evaluating(self.model.modules()):
            features = self.model.forward_features(images)
            if backbone is self.model:
                features = self.head.to_map(features, images.shape[-2:])
            maps = self.head.response_maps(backbone, features).float()
        chosen = maps[torch.arange(len(labels), device=labels.device), labels]
        own = resize_maps(chosen[:, None], images.shape[-2:])[:, 0]
        own = own - own.amin((1, 2), keepdim=True)
        total = own.sum((1, 2), keepdim=True)
        # a constant map tells nothing: every pixel counts alike
        return torch.where(total > 0, own / total.clamp_min(torch.finfo(own.dtype).tiny), 1 / own[0].numel())
