"""Peaks against annotations: hits of the object's box (table 1, figure 5) and the parts next to peaks (figure 6)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..peaks import partition_peaks
from .geometry import peak_pixels, points_in_boxes


def count_hits(peaks: Tensor, boxes: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Count the peaks inside the ground-truth box, and all peaks (table 1, figure 5).

    Args:
        peaks: B×G×G boolean mask of `find_peaks`.
        boxes: B×4 boxes (x0, y0, x1, y1) in pixels of the image that the model read.
        size: (H, W) of that image in pixels.

    Returns:
        Two B counts: hits, and all peaks of an image.

    Raises:
        ValueError: the shapes do not fit.
    """
    if peaks.ndim != 3 or boxes.shape != (len(peaks), 4):
        raise ValueError(f"peaks must be B×G×G and boxes B×4, got {tuple(peaks.shape)} and {tuple(boxes.shape)}.")
    inside = points_in_boxes(peak_pixels(peaks.shape[1:], size, peaks.device)[None], boxes)
    return (peaks & inside).sum((1, 2)), peaks.sum((1, 2))


def hit_rate(hits: Tensor, total: Tensor) -> Tensor:
    """Mean over images of the share of an image's peaks that are hits (table 1).

    Args:
        hits: B counts of `count_hits`.
        total: B counts of all peaks; an image with none has no rate and is left out.

    Returns:
        Scalar in [0, 1]; NaN where no image has a peak.
    """
    seen = total > 0
    return (hits[seen] / total[seen]).mean()


def hit_histogram(hits: Tensor) -> Tensor:
    """Count the images with 0, 1, 2, … hits (figure 5).

    Args:
        hits: B counts of `count_hits`.

    Returns:
        As many counts as the largest of `hits`, and one more for 0.
    """
    return torch.bincount(hits)


def nearest_parts(response: Tensor, peaks: Tensor, parts: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Find the visible part nearest to each image's strongest and to its weakest peak (figure 6).

    Of equal peaks, and of equally near parts, the first counts. The only peak of an image is its strongest and its
    weakest.

    Args:
        response: B×G×G response R, the attention at each peak.
        peaks: B×G×G boolean mask of `find_peaks`.
        parts: B×P×3 parts (x, y in pixels of the image that the model read, visible or not).
        size: (H, W) of that image in pixels.

    Returns:
        Two B indices of parts, for the strongest and the weakest peak; -1 for an image without a peak or without a
        visible part.

    Raises:
        ValueError: the shapes do not fit.
    """
    if parts.ndim != 3 or parts.shape[2] != 3 or len(parts) != len(peaks):
        raise ValueError(f"parts must be B×P×3 with B = {len(peaks)} of peaks, got {tuple(parts.shape)}.")
    pixels = peak_pixels(peaks.shape[1:], size, parts.device).flatten(0, 1)
    visible = parts[..., 2] > 0
    counted = peaks.flatten(1).any(1) & visible.any(1)
    strongest, weakest = (
        pixels[chosen.flatten(1).argmax(1)] for chosen in partition_peaks(response, peaks, "extreme")
    )

    def nearest(peak: Tensor) -> Tensor:
        distance = (parts[..., :2] - peak[:, None]).square().sum(-1)
        return torch.where(counted, torch.where(visible, distance, torch.inf).argmin(1), -1)

    return nearest(strongest), nearest(weakest)
