"""What the paper measures beside accuracy, and how sure a measured accuracy is.

Hits of peaks (table 1, figure 5), localisation (table 2), parts that attention goes to (figure 6), magnification by the
warps (figures 1 and 2), calibration, confusions and confidence intervals.

Coordinates in pixels count from the image's top left corner, x right and y down, so that the centre of the first pixel
is (0.5, 0.5): boxes (x0, y0, x1, y1) and points of the data sets are of that kind. Coordinates of warp grids are in
[-1, 1], the corner pixels' centres at ±1.

Regions need scipy and the calibration error torchmetrics, each imported where it is used.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data import DEFAULT_CROP_PCT
from torch import Tensor

from ..peaks import partition_peaks
from ..response import normalize_response, resize_maps

CROP_MODES = ("center", "squash", "border")


# annotations in the model's input


def _input_geometry(
        sizes: Tensor,
        img_size: int | Sequence[int],
        crop_pct: float | None,
        crop_mode: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset (x, y) from stored to input pixels, B×2 each, and the input's (W, H), in float64."""
    if sizes.ndim != 2 or sizes.shape[1] != 2:
        raise ValueError(f"sizes must be B×2 (height, width), got {tuple(sizes.shape)}.")
    if crop_mode not in (None, *CROP_MODES):
        raise ValueError(f"crop_mode must be one of {', '.join(CROP_MODES)}, got {crop_mode!r}.")
    pair = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    crop_pct = crop_pct or DEFAULT_CROP_PCT
    # float64 repeats Python's own arithmetic in timm and torchvision, so that sizes round alike
    before, inputs = sizes.double(), sizes.new_tensor(pair, dtype=torch.float64)
    target = sizes.new_tensor([math.floor(x / crop_pct) for x in pair], dtype=torch.float64)
    if crop_mode == "squash":
        after = target.expand_as(before)
    elif crop_mode != "border" and target[0] == target[1]:
        after = (target * before / before.amin(1, keepdim=True)).trunc()
    else:
        ratios = before / target
        ratio = ratios.amax(1, keepdim=True) if crop_mode == "border" else ratios.amin(1, keepdim=True)
        after = (before / ratio).round()
    margin = (after - inputs) / 2
    # a crop rounds half a pixel to even; what is too small is padded instead, the odd pixel after the image
    offset = torch.where(margin < 0, margin.ceil(), margin.round())
    return (after / before).flip(1), offset.flip(1), inputs.flip(0)


def transform_points(
        points: Tensor,
        sizes: Tensor,
        img_size: int | Sequence[int],
        crop_pct: float | None = None,
        crop_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Carry points from the stored image to the model's input, as timm's evaluation transform carries the pixels.

    Args:
        points: B×N×2 points (x, y) in pixels of the stored images.
        sizes: B×2 sizes (height, width) of the stored images in pixels.
        img_size: side, or (height, width), of the model's input in pixels, as `create_transform` takes it.
        crop_pct: side of the crop over that of the resized image; 0.875 by default, as in timm.
        crop_mode: `"squash"`: each side is resized for itself; `"center"`, timm's default: the shorter side decides;
            `"border"`: the longer one does, and the rest is padded.

    Returns:
        B×N×2 points in pixels of the input in `points`' dtype, and a B×N mask of those that lie in the input.

    Raises:
        ValueError: a shape is wrong or `crop_mode` is unknown.
    """
    if points.ndim != 3 or points.shape[2] != 2 or len(points) != len(sizes):
        raise ValueError(f"points must be B×N×2 with B = {len(sizes)} of sizes, got {tuple(points.shape)}.")
    scale, offset, bounds = _input_geometry(sizes, img_size, crop_pct, crop_mode)
    moved = points.double() * scale[:, None] - offset[:, None]
    return moved.to(points.dtype), ((moved >= 0) & (moved <= bounds)).all(-1)


def transform_boxes(
        boxes: Tensor,
        sizes: Tensor,
        img_size: int | Sequence[int],
        crop_pct: float | None = None,
        crop_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Carry boxes from the stored image to the model's input, as timm's evaluation transform carries the pixels.

    Args:
        boxes: B×4 boxes (x0, y0, x1, y1) in pixels of the stored images.
        sizes: B×2 sizes (height, width) of the stored images in pixels.

    The other arguments and the errors are those of `transform_points`.

    Returns:
        B×4 boxes in pixels of the input, clipped to it, in `boxes`' dtype, and a B mask of those of which anything is
        left: the others were cropped away and measure nothing.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != len(sizes):
        raise ValueError(f"boxes must be B×4 with B = {len(sizes)} of sizes, got {tuple(boxes.shape)}.")
    scale, offset, bounds = _input_geometry(sizes, img_size, crop_pct, crop_mode)
    corners = boxes.double().view(-1, 2, 2) * scale[:, None] - offset[:, None]
    corners = torch.minimum(corners.clamp_min(0), bounds)
    return corners.flatten(1).to(boxes.dtype), (corners[:, 1] > corners[:, 0]).all(1)


# peaks: table 1, figures 5 and 6


def peak_pixels(grid_size: Sequence[int], size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Where the cells of a grid lie in the image: the corner cells on the corner pixels' centres.

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


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether B×h×w×2 (or 1×h×w×2) points lie in B×4 boxes, edges included."""
    low, high = boxes[:, None, None].to(points).chunk(2, dim=-1)
    return ((points >= low) & (points <= high)).all(-1)


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
    inside = _inside(peak_pixels(peaks.shape[1:], size, peaks.device)[None], boxes)
    return (peaks & inside).sum((1, 2)), peaks.sum((1, 2))


def hit_rate(hits: Tensor, total: Tensor) -> Tensor:
    """Mean over images of an image's hits over its peaks (table 1).

    Args:
        hits: B counts of `count_hits`.
        total: B counts of all peaks; an image with none has no rate and is left out.

    Returns:
        Scalar in [0, 1]; NaN where no image has a peak.
    """
    seen = total > 0
    return (hits[seen] / total[seen]).mean()


def hit_histogram(hits: Tensor) -> Tensor:
    """Number of images with 0, 1, 2, … hits (figure 5).

    Args:
        hits: B counts of `count_hits`.

    Returns:
        As many counts as the largest of `hits`, and one more for 0.
    """
    return torch.bincount(hits)


class PartCounts(NamedTuple):
    """Of P parts, how often each is nearest to an image's strongest and to its weakest attention."""

    strongest: Tensor  # P
    weakest: Tensor  # P


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


def part_statistics(response: Tensor, peaks: Tensor, parts: Tensor, size: Sequence[int]) -> PartCounts:
    """Count per part how often `nearest_parts` gives it (figure 6).

    An image without a peak or without a visible part counts nowhere. The arguments and the errors are those of
    `nearest_parts`.

    Returns:
        Two counts per part.
    """
    nearest = nearest_parts(response, peaks, parts, size)
    return PartCounts(*(torch.bincount(part[part >= 0], minlength=parts.shape[1]) for part in nearest))


# warps


def _check_grid(grid: Tensor) -> None:
    if grid.ndim != 4 or grid.shape[3] != 2 or min(grid.shape[1:3]) < 2:
        raise ValueError(f"grid must be B×H×W×2 with H and W at least 2, got {tuple(grid.shape)}.")


def _identity_grid(size: Sequence[int], device: torch.device) -> Tensor:
    y = torch.linspace(-1, 1, size[0], device=device)
    x = torch.linspace(-1, 1, size[1], device=device)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def _pixels_to_grid(points: Tensor, size: Sequence[int]) -> Tensor:
    extent = points.new_tensor([size[1] - 1, size[0] - 1])
    return (points - 0.5) * 2 / extent - 1


def _grid_to_pixels(grid: Tensor, size: Sequence[int]) -> Tensor:
    extent = grid.new_tensor([size[1] - 1, size[0] - 1])
    return (grid + 1) / 2 * extent + 0.5


def _jacobian(grid: Tensor) -> Tensor:
    """B×H×W×2×2 derivatives by finite differences: row i, column k is that of coordinate i along axis k (x, y)."""
    spacing = [2 / (side - 1) for side in grid.shape[1:3]]
    along_y, along_x = torch.gradient(grid, spacing=spacing, dim=(1, 2))
    return torch.stack([along_x, along_y], dim=-1)


def _find_targets(grid: Tensor, target: Tensor, steps: int) -> tuple[Tensor, Tensor]:
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
    return _find_targets(grid, _identity_grid(grid.shape[1:3], grid.device).expand_as(grid), steps)


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


def magnification(grid: Tensor) -> Tensor:
    """Tell how much larger, by area, a warped image shows each pixel of its input.

    1 / |det J|, with J the derivative of the grid by finite differences, read at the place that shows the pixel; 1
    everywhere for the identity. Where a warp is clamped, the border's pixels fill what is left, J is 0 there, and the
    value is only its bound, H·W, so take means by `box_magnification`.

    Args:
        grid: B×H×W×2 warp grid.

    Returns:
        B×H×W area scales at the input's pixels in float32, 0 for those that are not shown.

    Raises:
        ValueError: `grid` is not B×H×W×2.
    """
    _check_grid(grid)
    return _read_magnification(grid, *invert_warp(grid))


def _read_magnification(grid: Tensor, places: Tensor, shown: Tensor) -> Tensor:
    area = torch.linalg.det(_jacobian(grid.float())).abs()[:, None]
    area = F.grid_sample(area, places, padding_mode="border", align_corners=True)[:, 0]
    return shown / area.clamp_min(1 / (grid.shape[1] * grid.shape[2]))


def point_magnification(grid: Tensor, points: Tensor) -> Tensor:
    """`magnification` at points of the input, such as parts, without the rest of the image.

    Args:
        grid: B×H×W×2 warp grid.
        points: B×N×2 points (x, y) in pixels of the input.

    Returns:
        B×N area scales in float32, 0 for points that are not shown.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_grid(grid)
    if points.ndim != 3 or points.shape[2] != 2 or len(points) != len(grid):
        raise ValueError(f"points must be B×N×2 with B = {len(grid)} of grid, got {tuple(points.shape)}.")
    target = _pixels_to_grid(points.float(), grid.shape[1:3])[:, :, None]
    return _read_magnification(grid, *_find_targets(grid, target, steps=40))[..., 0]


def _count_box_pixels(grid: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """How many pixels of the warped image show a box, and how many pixels of the input lie in it, B each."""
    _check_grid(grid)
    if boxes.shape != (len(grid), 4):
        raise ValueError(f"boxes must be B×4 with B = {len(grid)} of grid, got {tuple(boxes.shape)}.")
    size = grid.shape[1:3]
    shown = _inside(_grid_to_pixels(grid.float(), size), boxes).sum((1, 2))
    return shown, _inside(peak_pixels(size, size, grid.device)[None], boxes).sum((1, 2))


def box_magnification(grid: Tensor, boxes: Tensor) -> Tensor:
    """Mean `magnification` over a box of the input.

    That mean is the area on which the warped image shows the box over the area of the box. Both are counted in pixels,
    so that clamped borders count with what they fill.

    Args:
        grid: B×H×W×2 warp grid.
        boxes: B×4 boxes (x0, y0, x1, y1) in pixels of the input.

    Returns:
        B area scales in float32; NaN for a box without a pixel's centre.

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
        B area scales in float32; NaN for a box that leaves no pixel's centre.

    Raises:
        ValueError: the shapes do not fit.
    """
    shown, there = _count_box_pixels(grid, boxes)
    pixels = grid.shape[1] * grid.shape[2]
    return (pixels - shown) / (pixels - there)


def magnified_boxes(
        grid: Tensor,
        sizes: Tensor,
        img_size: int | Sequence[int],
        crop_pct: float | None = None,
        crop_mode: str | None = None,
) -> Tensor:
    """What a warp magnifies: the smallest box around all that it shows at least a tenth larger, by area.

    Args:
        grid: B×H×W×2 warp grid.
        sizes: B×2 sizes (height, width) of the stored images in pixels.

    The other arguments and the errors are those of `transform_points`.

    Returns:
        B×4 boxes (x0, y0, x1, y1) in pixels of the stored images, in float64; NaN where nothing is magnified.

    Raises:
        ValueError: `grid` is not B×H×W×2.
    """
    _check_grid(grid)
    scale, offset, bounds = _input_geometry(sizes, img_size, crop_pct, crop_mode)
    # where the grid itself is dense, so that no warp has to be inverted
    shown = (torch.linalg.det(_jacobian(grid.float())) < 1 / 1.1)[..., None]
    corners = torch.stack([
        torch.where(shown, grid, math.inf).amin((1, 2)), torch.where(shown, grid, -math.inf).amax((1, 2))], dim=1)
    stored = ((corners.double() + 1) / 2 * bounds + offset[:, None]) / scale[:, None]
    stored = torch.minimum(stored.clamp_min(0), sizes.flip(1)[:, None])
    return torch.where(shown.any((1, 2)), stored.flatten(1), math.nan)


# localisation: table 2


def localisation_maps(
        maps: Mapping[str, Tensor],
        grids: Mapping[str, Tensor],
        classes: Tensor,
        size: Sequence[int],
) -> dict[str, Tensor]:
    """Bring each branch's response map of one class per image to the space of the input.

    Args:
        maps: B×C×h×w class response maps by branch, such as `Explanation.maps`.
        grids: B×H×W×2 warp grid by branch, for the branches that read a warped image.
        classes: B indices of the class, the model's top-1.
        size: (H, W) of the input in pixels.

    Returns:
        B×2×H×W maps by branch in float32: the map as it is, and scaled to [0, 1] before it is carried back.

    Raises:
        ValueError: a shape does not fit.
    """
    image = torch.arange(len(classes), device=classes.device)
    moved = {}
    for branch, of_classes in maps.items():
        chosen = of_classes[image, classes].float()
        both = torch.stack([chosen, normalize_response(chosen)], dim=1)
        grid = grids.get(branch)
        if grid is not None and tuple(grid.shape[1:3]) != tuple(size):
            raise ValueError(f"grids[{branch!r}] must be B×{size[0]}×{size[1]}×2 as size, got {tuple(grid.shape)}.")
        moved[branch] = resize_maps(both, (size[0], size[1])) if grid is None else carry_back(both, grid)
    return moved


def localisation_map(
        maps: Mapping[str, Tensor],
        grids: Mapping[str, Tensor],
        classes: Tensor,
        size: Sequence[int],
        normalize: bool = False,
) -> Tensor:
    """Add up the branches' response maps of one class per image in the space of the input (table 2).

    The maps are added as they are, as the paper's words have it; `normalize=True` scales each to [0, 1] first, which
    gives every branch one weight and makes a later threshold one of the map's range, not of its height above zero.

    Args:
        maps: B×C×h×w class response maps by branch, such as `Explanation.maps`, of the branches to add up. A model
            with `branches="D+C"` has maps of the original, too, which the paper's row for it leaves out.
        grids: B×H×W×2 warp grid by branch, for the branches that read a warped image.
        classes: B indices of the class, the model's top-1.
        size: (H, W) of the input in pixels.
        normalize: scale each branch's map to [0, 1] before it is carried back.

    Returns:
        B×H×W maps in float32.

    Raises:
        ValueError: `maps` is empty, or a shape does not fit.
    """
    if not maps:
        raise ValueError("maps must hold at least one branch.")
    moved = localisation_maps(maps, grids, classes, size)
    return torch.stack([both[:, int(normalize)] for both in moved.values()]).sum(0)


def largest_region_box(maps: Tensor, threshold: float = 0.2) -> Tensor:
    """Box around the largest connected region that lies above a share of the map's maximum (table 2).

    Pixels are connected along sides and corners. Of equally large regions the first in row-major order counts. Runs on
    the host (needs scipy).

    Args:
        maps: B×H×W.
        threshold: share of the maximum that a pixel must exceed, in [0, 1).

    Returns:
        B×4 float boxes (x0, y0, x1, y1) in pixels on the maps' device, around whole pixels; all zeros for a map whose
        maximum is not positive, which has no region.

    Raises:
        ValueError: `maps` is not B×H×W, or `threshold` is out of range.
    """
    from scipy import ndimage  # type: ignore[import-untyped]

    if maps.ndim != 3:
        raise ValueError(f"maps must be B×H×W, got {maps.ndim} dimensions.")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}.")
    above = (maps > threshold * maps.amax((1, 2), keepdim=True)).cpu().numpy()
    boxes = torch.zeros(len(maps), 4)
    for i, mask in enumerate(above):
        labels, count = ndimage.label(mask, structure=[[1, 1, 1]] * 3)
        if count:
            largest = torch.bincount(torch.from_numpy(labels).flatten().long())[1:].argmax()
            rows, columns = ndimage.find_objects(labels)[largest]
            boxes[i] = torch.tensor([columns.start, rows.start, columns.stop, rows.stop])
    return boxes.to(maps.device)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes, pair by pair.

    Args:
        boxes: B×4 boxes (x0, y0, x1, y1).
        others: B×4 boxes.

    Returns:
        B ratios in [0, 1]; 0 for two boxes without an area.

    Example:
        >>> box_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
        tensor([0.3333])
    """
    low, high = torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:])
    shared = (high - low).clamp_min(0).prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (others[:, 2:] - others[:, :2]).prod(1) - shared
    return torch.where(union > 0, shared / union, 0)


def localisation_accuracy(
        found: Tensor,
        boxes: Tensor,
        correct: Tensor,
        iou_threshold: float = 0.5,
) -> Tensor:
    """Share of images whose top-1 class is right and whose box is found (table 2).

    Args:
        found: B×4 boxes of `largest_region_box`.
        boxes: B×4 ground-truth boxes in pixels of the same image.
        correct: B booleans: the top-1 class is right.
        iou_threshold: least intersection over union of a box that counts as found.

    Returns:
        Scalar in [0, 1].
    """
    return (correct & (box_iou(found, boxes) >= iou_threshold)).float().mean()


# calibration


def nll(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean negative log likelihood in nats.

    Args:
        logits: B×C.
        labels: B class indices.
        temperature: divides the logits.

    Returns:
        Scalar, at least 0.
    """
    return F.cross_entropy(logits.float() / temperature, labels)


def calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0, bins: int = 15) -> Tensor:
    """Expected calibration error: mean distance of confidence from accuracy over equal bins of confidence.

    Needs torchmetrics.

    Args:
        logits: B×C.
        labels: B class indices.
        temperature: divides the logits.
        bins: number of bins.

    Returns:
        Scalar in [0, 1].
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities = (logits.float() / temperature).softmax(1)
    return multiclass_calibration_error(probabilities, labels, num_classes=logits.shape[1], n_bins=bins, norm="l1")


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature that minimises the negative log likelihood, by L-BFGS on its logarithm.

    Fit it on images that are neither trained nor tested on.

    Args:
        logits: B×C.
        labels: B class indices.

    Returns:
        Temperature in [0.01, 100]; the ends stand for logits that are all right and for logits that tell nothing.

    Raises:
        ValueError: the shapes do not fit, or there is no image.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(logits):
        raise ValueError(
            f"logits must be B×C and labels B, with B at least 1, got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    logits, labels = logits.detach().double().cpu(), labels.cpu()
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp().clamp(0.01, 100), labels)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return log_temperature.detach().exp().clamp(0.01, 100).item()


# confusions


def _check_classes(labels: Tensor, predictions: Tensor, num_classes: int) -> None:
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ValueError(
            f"labels and predictions must be of one length, got {tuple(labels.shape)} and {tuple(predictions.shape)}."
        )
    for name, classes in (("labels", labels), ("predictions", predictions)):
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(f"{name} must lie in 0 to {num_classes - 1}.")


def per_class_accuracy(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Accuracy of each class.

    Args:
        labels: B class indices.
        predictions: B class indices.
        num_classes: C.

    Returns:
        C ratios in [0, 1]; NaN for a class without images.

    Raises:
        ValueError: the lengths differ, or an index is out of range.
    """
    _check_classes(labels, predictions, num_classes)
    right = torch.bincount(labels[labels == predictions], minlength=num_classes)
    return right / torch.bincount(labels, minlength=num_classes)


def confused_pairs(labels: Tensor, predictions: Tensor, num_classes: int, k: int = 10) -> Tensor:
    """List the commonest errors: what is taken for what.

    Args:
        labels: B class indices.
        predictions: B class indices.
        num_classes: C.
        k: how many pairs to list.

    Returns:
        N×3 rows (label, prediction, count), most frequent first, equal ones by label, then prediction; N is k, or
        fewer where fewer pairs are confused at all.

    Raises:
        ValueError: the lengths differ, an index is out of range, or `k` is negative.

    Example:
        >>> labels, predictions = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 1, 0])
        >>> confused_pairs(labels, predictions, num_classes=3, k=2).tolist()  # label, prediction, count
        [[0, 1, 2], [2, 0, 1]]
    """
    _check_classes(labels, predictions, num_classes)
    if k < 0:
        raise ValueError(f"k must be 0 or more, got {k}.")
    wrong = labels != predictions
    pairs, counts = torch.unique(labels[wrong] * num_classes + predictions[wrong], return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:k]
    pairs = pairs[order]
    return torch.stack([pairs // num_classes, pairs % num_classes, counts[order]], dim=1)


# intervals


def _interval(values: Tensor, level: float) -> tuple[float, float]:
    low, high = values.quantile(values.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
    return low, high


def _check_bootstrap(count: int, level: float, samples: int) -> None:
    if not count:
        raise ValueError("correct must hold at least one image.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")


def bootstrap_interval(
        correct: Tensor,
        level: float = 0.95,
        samples: int = 10_000,
        seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of an accuracy.

    The right answers among N images drawn with replacement are binomial, so they are drawn as such.

    Args:
        correct: N booleans, one an image.
        level: share of the bootstrap samples that the interval holds.
        samples: number of bootstrap samples.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        (low, high), in [0, 1].

    Raises:
        ValueError: `correct` is empty, or `level` or `samples` is out of range.
    """
    count = len(correct)
    _check_bootstrap(count, level, samples)
    draws = torch.full((samples,), float(count), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    right = torch.binomial(draws, torch.full_like(draws, int(correct.sum()) / count), generator=generator)
    return _interval(right / count, level)


def bootstrap_difference(
        correct: Tensor,
        baseline: Tensor,
        level: float = 0.95,
        samples: int = 10_000,
        seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the difference between two accuracies on the same images.

    Images are drawn, and both models judged on each: what they have in common cancels. With several runs of each model
    an image is drawn with the answers of all its runs, which are no independent images.

    Args:
        correct: N booleans of a model, or S×N of its runs under S seeds.
        baseline: as many of another, in the same order of runs and images.
        level: share of the bootstrap samples that the interval holds.
        samples: number of bootstrap samples.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        (low, high) of the accuracy of `correct` less that of `baseline`, in [-1, 1].

    Raises:
        ValueError: the shapes differ or are empty, or `level` or `samples` is out of range.
    """
    if correct.shape != baseline.shape or correct.ndim not in (1, 2):
        raise ValueError(
            f"correct and baseline must both be N or S×N, got {tuple(correct.shape)} and {tuple(baseline.shape)}."
        )
    runs, count = (1, *correct.shape)[-2:]
    _check_bootstrap(count, level, samples)
    gains = (correct.long() - baseline.long()).view(runs, count).sum(0)
    # only how many images have each gain matters, so these counts are drawn, one after the other
    left, images = torch.full((samples,), float(count), dtype=torch.float64), count
    total = torch.zeros_like(left)
    generator = torch.Generator().manual_seed(seed)
    for gain, of_gain in zip(*(each.tolist() for each in gains.unique(return_counts=True))):
        drawn = torch.binomial(left, torch.full_like(left, of_gain / images), generator=generator)
        total += gain * drawn
        left, images = left - drawn, images - of_gain
    return _interval(total / (runs * count), level)


# early exit
