"""Coordinates: from stored images into the model's input, and between pixels and grids.

Pixel coordinates count from the image's top left corner, x right and y down, so that the center of the first pixel is
(0.5, 0.5): boxes (x0, y0, x1, y1) and points of the data sets are of that kind. A stored image is what `read_image`
makes of a file, turned as its EXIF block says. Coordinates of warp grids are in [-1, 1], the corner pixels' centers at
±1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.data import DEFAULT_CROP_PCT
from torch import Tensor

from ..checkpoints import CROP_MODES


def as_float64(values: Tensor) -> Tensor:
    """Values in float64; on the CPU if their device is Apple's, which has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


class Crop(NamedTuple):
    """How timm's evaluation transform resizes and crops a stored image to the model's input."""

    size: tuple[int, int]
    """(height, width) of the input in pixels."""
    crop_pct: float = DEFAULT_CROP_PCT
    """Side of the crop over that of the resized image."""
    mode: str = "center"
    """`"squash"`: each side is resized on its own; `"center"`, timm's default: the shorter side decides; `"border"`:
    the longer one does, and the rest is padded."""

    @classmethod
    def from_config(cls, data_config: Mapping[str, Any]) -> "Crop":
        """That of a model, from what `timm.data.resolve_data_config` returns for it."""
        _, height, width = data_config["input_size"]
        return cls((height, width), data_config["crop_pct"], data_config["crop_mode"])

    def scale_and_offset(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The transform as arithmetic: a point p of a stored image lies at scale · p - offset in the input.

        Args:
            sizes: B×2 sizes (height, width) of the stored images in pixels.

        Returns:
            B×2 scales and B×2 offsets (x, y), in float64.

        Raises:
            ValueError: `sizes` is not B×2, or the mode is unknown.
        """
        if sizes.ndim != 2 or sizes.shape[1] != 2:
            raise ValueError(f"sizes must be B×2 (height, width), got {tuple(sizes.shape)}.")
        if self.mode not in CROP_MODES:
            raise ValueError(f"mode must be one of {', '.join(CROP_MODES)}, got {self.mode!r}.")
        # float64 repeats Python's own arithmetic in timm and torchvision, so that sizes round alike
        before = as_float64(sizes)
        sides = [math.floor(side / self.crop_pct) for side in self.size]
        inputs, target = before.new_tensor(self.size), before.new_tensor(sides)
        if self.mode == "squash":
            after = target.expand_as(before)
        elif self.mode != "border" and sides[0] == sides[1]:
            after = (target * before / before.amin(1, keepdim=True)).trunc()
        else:
            ratios = before / target
            ratio = ratios.amax(1, keepdim=True) if self.mode == "border" else ratios.amin(1, keepdim=True)
            after = (before / ratio).round()
        margin = (after - inputs) / 2
        # a crop rounds half a pixel to even; an image that is too small is padded, the odd pixel after it
        offset = torch.where(margin < 0, margin.ceil(), margin.round())
        return (after / before).flip(1), offset.flip(1)


def transform_points(points: Tensor, sizes: Tensor, crop: Crop) -> tuple[Tensor, Tensor]:
    """Carry points from the stored images to the model's input, as timm's evaluation transform carries the pixels.

    Args:
        points: B×N×2 points (x, y) in pixels of the stored images.
        sizes: B×2 sizes (height, width) of the stored images in pixels.
        crop: the model's.

    Returns:
        B×N×2 points in pixels of the input in `points`' dtype, and a B×N mask of those that lie in the input.

    Raises:
        ValueError: a shape is wrong, or the crop's mode is unknown.
    """
    if points.ndim != 3 or points.shape[2] != 2 or len(points) != len(sizes):
        raise ValueError(f"points must be B×N×2 with B = {len(sizes)} of sizes, got {tuple(points.shape)}.")
    scale, offset = crop.scale_and_offset(sizes)
    moved = as_float64(points) * scale[:, None] - offset[:, None]
    inside = ((moved >= 0) & (moved <= moved.new_tensor(crop.size[::-1]))).all(-1)
    return moved.to(points), inside.to(points.device)


def transform_boxes(boxes: Tensor, sizes: Tensor, crop: Crop) -> tuple[Tensor, Tensor]:
    """Carry boxes from the stored images to the model's input, as timm's evaluation transform carries the pixels.

    Args:
        boxes: B×4 boxes (x0, y0, x1, y1) in pixels of the stored images.
        sizes: as for `transform_points`.
        crop: as for `transform_points`.

    Returns:
        B×4 boxes in pixels of the input, clipped to it, in `boxes`' dtype, and a B mask of those of which anything is
        left; the others were cropped away.

    Raises:
        ValueError: as for `transform_points`.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != len(sizes):
        raise ValueError(f"boxes must be B×4 with B = {len(sizes)} of sizes, got {tuple(boxes.shape)}.")
    scale, offset = crop.scale_and_offset(sizes)
    corners = as_float64(boxes).view(-1, 2, 2) * scale[:, None] - offset[:, None]
    corners = torch.minimum(corners.clamp_min(0), corners.new_tensor(crop.size[::-1]))
    return corners.flatten(1).to(boxes), (corners[:, 1] > corners[:, 0]).all(1).to(boxes.device)


def restore_boxes(boxes: Tensor, sizes: Tensor, crop: Crop) -> Tensor:
    """Carry boxes from the model's input back to the stored images: the inverse of `transform_boxes`.

    Args:
        boxes: B×4 boxes (x0, y0, x1, y1) in pixels of the input.
        sizes: as for `transform_points`.
        crop: as for `transform_points`.

    Returns:
        B×4 boxes in pixels of the stored images, clipped to them, in float64.

    Raises:
        ValueError: as for `transform_points`.
    """
    scale, offset = crop.scale_and_offset(sizes)
    corners = (as_float64(boxes).view(-1, 2, 2) + offset[:, None]) / scale[:, None]
    return torch.minimum(corners.clamp_min(0), as_float64(sizes).flip(1)[:, None]).flatten(1)


def peak_pixels(grid_size: Sequence[int], size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Where the cells of a grid lie in the image: the corner cells on the corner pixels' centers.

    Args:
        grid_size: (rows, columns) of the grid.
        size: (H, W) of the image in pixels.
        device: where to put the result.

    Returns:
        rows×columns×2 points (x, y) in pixels.
    """
    y = torch.linspace(0.5, size[0] - 0.5, grid_size[0], device=device)
    x = torch.linspace(0.5, size[1] - 0.5, grid_size[1], device=device)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def pixels_to_grid(points: Tensor, size: Sequence[int]) -> Tensor:
    """Points (x, y) in pixels of an H×W image as coordinates in [-1, 1]; any shape that ends in 2."""
    return (points - 0.5) * 2 / points.new_tensor([size[1] - 1, size[0] - 1]) - 1


def grid_to_pixels(grid: Tensor, size: Sequence[int]) -> Tensor:
    """Coordinates in [-1, 1] as points (x, y) in pixels of an H×W image; any shape that ends in 2."""
    return (grid + 1) / 2 * grid.new_tensor([size[1] - 1, size[0] - 1]) + 0.5


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points lie in boxes, edges included.

    Args:
        points: B×h×w×2 or 1×h×w×2 points (x, y).
        boxes: B×4 boxes (x0, y0, x1, y1).

    Returns:
        B×h×w mask.
    """
    low, high = boxes[:, None, None].to(points).chunk(2, dim=-1)
    return ((points >= low) & (points <= high)).all(-1)
