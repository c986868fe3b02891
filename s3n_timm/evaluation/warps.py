"""Warps read backwards: the inverse, maps carried back to the input, and magnification (figures 1 and 2, table 2).

Grids hold coordinates in [-1, 1], the corner pixels' centers at ±1; boxes and points are in pixels, see `geometry.py`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..multiscale import identity_grid
from ..response import resize_maps
from .geometry import Crop, as_float64, grid_to_pixels, peak_pixels, pixels_to_grid, points_in_boxes, restore_boxes


def _check_grid(grid: Tensor) -> None:
    if grid.ndim != 4 or grid.shape[3] != 2 or min(grid.shape[1:3]) < 2:
        raise ValueError(f"grid must be B×H×W×2 with H and W at least 2, got {tuple(grid.shape)}.")


def resize_grid(grid: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a B×h×w×2 warp grid to (H, W) pixels, as the maps are: B×H×W×2."""
    return resize_maps(grid.movedim(-1, 1), (size[0], size[1])).movedim(1, -1)


def _jacobian(grid: Tensor) -> Tensor:
    """B×H×W×2×2 derivatives by finite differences: row i, column k is that of coordinate i along axis k (x, y)."""
    spacing = [2 / (side - 1) for side in grid.shape[1:3]]
    along_y, along_x = torch.gradient(grid, spacing=spacing, dim=(1, 2))
    return torch.stack([along_x, along_y], dim=-1)


def _areas(grid: Tensor) -> Tensor:
    """B×H×W area that each step of a warp covers, the determinant of its derivatives."""
    # torch.linalg.det decomposes each matrix, on Apple's GPUs one after the other
    (xx, xy), (yx, yy) = (row.unbind(-1) for row in _jacobian(grid.float()).unbind(-2))
    return xx * yy - xy * yx


def _find_targets(grid: Tensor, target: Tensor, steps: int = 40) -> tuple[Tensor, Tensor]:
    """Find q with T(q) = target for B×h×w×2 targets in [-1, 1]: q, and a mask of those that the grid reads.

    Newton's method from q = target. Each point halves its step where that would not bring it nearer and doubles it
    again where it does. Beyond ±1, T goes on with slope 1, so that a target that is not shown leads out of the image.
    """
    grid, target = grid.float(), target.float()
    # a little more than the Jacobian leads out of the flat parts at the border, where T is clamped to ±1
    eye = torch.eye(2, device=grid.device)
    field = torch.cat([grid, (_jacobian(grid) + 1e-3 * eye).flatten(-2)], dim=-1).permute(0, 3, 1, 2)
    half_pixel = torch.tensor([1 / (grid.shape[2] - 1), 1 / (grid.shape[1] - 1)], device=grid.device)
    near = 0.01 * half_pixel
    together = min(steps, 4)

    def read(q: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        inside = q.clamp(-1, 1)
        values = F.grid_sample(field, inside, padding_mode="border", align_corners=True).permute(0, 2, 3, 1)
        missing = target - values[..., :2] - (q - inside)
        slopes = torch.where((q != inside)[..., None, :], eye, values[..., 2:].unflatten(-1, (2, 2)))
        return missing, slopes

    def approach(q: Tensor, target: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        missing, slopes = read(q, target)
        step = torch.ones_like(q[..., :1])
        for _ in range(steps):
            (a, b), (c, d) = (row.unbind(-1) for row in slopes.unbind(-2))
            x, y = missing.unbind(-1)
            determinant = a * d - b * c
            determinant = torch.where(determinant.abs() < 1e-6, 1e-6, determinant)
            move = torch.stack([d * x - b * y, a * y - c * x], dim=-1) / determinant[..., None]
            move = move / move.norm(dim=-1, keepdim=True).clamp_min(0.5) / 2
            trial = q + step * move
            trial_missing, trial_slopes = read(trial, target)
            nearer = trial_missing.norm(dim=-1, keepdim=True) <= missing.norm(dim=-1, keepdim=True)
            q, missing = torch.where(nearer, trial, q), torch.where(nearer, trial_missing, missing)
            slopes = torch.where(nearer[..., None], trial_slopes, slopes)
            step = torch.where(nearer, (2 * step).clamp_max(1), step / 2)
            if (missing.abs() < near).all():
                break
        return q, missing

    q, missing = approach(target, target, together)
    # of a hundred thousand points a few hundred at the border take many steps: they go on alone, each image's first
    late = (missing.abs() >= near).any(-1).flatten(1)
    most = int(late.sum(1).max())
    if most and steps > together:
        places = late.byte().argsort(dim=1, descending=True)[:, :most, None].expand(-1, -1, 2)
        rest, wanted = (points.flatten(1, 2).gather(1, places)[:, :, None] for points in (q, target))
        found = approach(rest, wanted, steps - together)
        q, missing = (
            points.flatten(1, 2).scatter(1, places, better[:, :, 0]).view_as(points)
            for points, better in zip((q, missing), found)
        )
    inside = q.clamp(-1, 1)
    shown = (missing.abs() + (q - inside).abs() <= half_pixel).all(-1)
    return inside, shown


def invert_warp(grid: Tensor, steps: int = 40) -> tuple[Tensor, Tensor]:
    """Find where a warped image shows each pixel of its input.

    Made for the warps of `warp_grid`, whose derivative is positive definite (with a Gaussian k it is the covariance of
    the attention under k). Where a warp is clamped, many places show one border pixel; one of them is returned.

    Args:
        grid: B×H×W×2 warp grid T in [-1, 1], from places in the warped image to places in the input.
        steps: most Newton steps to take; few warps need more than 15.

    Returns:
        B×H×W×2 inverse grid in [-1, 1] in float32, from places in the input to places in the warped image, and a
        B×H×W mask of the input's pixels that the warped image shows, to half a pixel.

    Raises:
        ValueError: `grid` is not B×H×W×2.
    """
    _check_grid(grid)
    return _find_targets(grid, identity_grid(grid.shape[1:3], grid.device).expand_as(grid), steps)


def carry_back(maps: Tensor, grid: Tensor) -> Tensor:
    """Carry maps of a warped image to the space of its input by the inverse warp (table 2).

    Args:
        maps: B×C×h×w maps of the warped image, of any resolution; bilinear, corners aligned.
        grid: B×H×W×2 warp grid that made the image.

    Returns:
        B×C×H×W maps in float32, zero at the pixels that the warped image does not show.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_grid(grid)
    if maps.ndim != 4 or len(maps) != len(grid):
        raise ValueError(f"maps must be B×C×h×w with B = {len(grid)} of grid, got {tuple(maps.shape)}.")
    inverse, shown = invert_warp(grid)
    full = resize_maps(maps.float(), (grid.shape[1], grid.shape[2]))
    return F.grid_sample(full, inverse, padding_mode="border", align_corners=True) * shown[:, None]


def magnification(grid: Tensor, points: Tensor | None = None) -> Tensor:
    """How much larger, by area, a warped image shows each pixel of its input, or points of it.

    1 / |det J|, with J the derivative of the grid by finite differences, read at the place that shows the pixel; 1
    everywhere for the identity. Where a warp is clamped, the border's pixels fill what is left, J is 0 there, and the
    value is only its bound, H·W: for means over a region use `box_magnification`.

    Args:
        grid: B×H×W×2 warp grid.
        points: B×N×2 points (x, y) in pixels of the input, such as parts; all of its pixels if left out.

    Returns:
        B×H×W, or B×N, area scales in float32, 0 where the warped image does not show the pixel.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_grid(grid)
    if points is None:
        places, shown = invert_warp(grid)
    else:
        if points.ndim != 3 or points.shape[2] != 2 or len(points) != len(grid):
            raise ValueError(f"points must be B×N×2 with B = {len(grid)} of grid, got {tuple(points.shape)}.")
        places, shown = _find_targets(grid, pixels_to_grid(points.float(), grid.shape[1:3])[:, :, None])
    area = _areas(grid).abs()[:, None]
    area = F.grid_sample(area, places, padding_mode="border", align_corners=True)[:, 0]
    scales = shown / area.clamp_min(1 / (grid.shape[1] * grid.shape[2]))
    return scales if points is None else scales[..., 0]


def _count_box_pixels(grid: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """How many pixels of the warped image show a box, and how many pixels of the input lie in it, B each."""
    _check_grid(grid)
    if boxes.shape != (len(grid), 4):
        raise ValueError(f"boxes must be B×4 with B = {len(grid)} of grid, got {tuple(boxes.shape)}.")
    size = grid.shape[1:3]
    shown = points_in_boxes(grid_to_pixels(grid.float(), size), boxes).sum((1, 2))
    return shown, points_in_boxes(peak_pixels(size, size, grid.device)[None], boxes).sum((1, 2))


def box_magnification(grid: Tensor, boxes: Tensor) -> Tensor:
    """Mean `magnification` over a box of the input.

    That mean is the area on which the warped image shows the box over the area of the box. Both are counted in pixels,
    so that clamped borders count with what they fill.

    Args:
        grid: B×H×W×2 warp grid.
        boxes: B×4 boxes (x0, y0, x1, y1) in pixels of the input.

    Returns:
        B area scales in float32; NaN for a box without a pixel's center.

    Raises:
        ValueError: the shapes do not fit.
    """
    shown, there = _count_box_pixels(grid, boxes)
    return shown / there


def background_magnification(grid: Tensor, boxes: Tensor) -> Tensor:
    """Mean `magnification` over all of the input but a box, counted as in `box_magnification`.

    Args:
        grid: B×H×W×2 warp grid.
        boxes: B×4 boxes (x0, y0, x1, y1) in pixels of the input.

    Returns:
        B area scales in float32; NaN for a box that leaves no pixel's center.

    Raises:
        ValueError: the shapes do not fit.
    """
    shown, there = _count_box_pixels(grid, boxes)
    pixels = grid.shape[1] * grid.shape[2]
    return (pixels - shown) / (pixels - there)


def magnified_boxes(grid: Tensor, sizes: Tensor, crop: Crop) -> Tensor:
    """What a warp magnifies: the smallest box around all that it shows at least a tenth larger, by area.

    Args:
        grid: B×H×W×2 warp grid.
        sizes: B×2 sizes (height, width) of the stored images in pixels.
        crop: the model's.

    Returns:
        B×4 boxes (x0, y0, x1, y1) in pixels of the stored images, in float64; NaN where nothing is magnified.

    Raises:
        ValueError: `grid` is not B×H×W×2, or as for `transform_points`.
    """
    _check_grid(grid)
    # where the grid itself is dense, so that no warp has to be inverted
    magnified = (_areas(grid) < 1 / 1.1)[..., None]
    low = torch.where(magnified, grid, math.inf).amin((1, 2))
    high = torch.where(magnified, grid, -math.inf).amax((1, 2))
    corners = as_float64(torch.cat([low, high], dim=1))
    boxes = (corners + 1) / 2 * corners.new_tensor(crop.size[::-1] * 2)
    nothing = ~magnified.flatten(1).any(1)[:, None]
    return restore_boxes(boxes, sizes, crop).masked_fill(nothing.to(boxes.device), math.nan)
