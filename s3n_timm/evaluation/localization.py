"""Localization of the object by class response maps (table 2)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..extras import needs_extra
from ..response import normalize_response, resize_maps
from .geometry import as_float64
from .warps import carry_back


def localization_maps(
        maps: Mapping[str, Tensor],
        grids: Mapping[str, Tensor],
        classes: Tensor,
        size: Sequence[int],
) -> dict[str, Tensor]:
    """Bring each branch's response map of one class per image to the space of the input, and add them up (table 2).

    The paper adds the maps as they are. Scaled to [0, 1] first, every branch has one weight, and the threshold of
    `largest_region_box` is a share of the map's range instead of its height above zero.

    Args:
        maps: B×C×h×w class response maps by branch, such as `Explanation.maps`, of the branches to add up. A model
            with `branches="D+C"` has maps of the original, too, which the paper's row for it leaves out.
        grids: B×H×W×2 warp grid by branch, for the branches that read a warped image.
        classes: B indices of the class, the model's top-1.
        size: (H, W) of the input in pixels.

    Returns:
        B×2×H×W maps in float32 by branch, and their sum as `joint`: the map as it is, and the map scaled to [0, 1]
        before it is carried back.

    Raises:
        ValueError: `maps` is empty, or a shape does not fit.
    """
    if not maps:
        raise ValueError("maps must hold at least one branch.")
    image = torch.arange(len(classes), device=classes.device)
    moved = {}
    for branch, of_classes in maps.items():
        chosen = of_classes[image, classes].float()
        both = torch.stack([chosen, normalize_response(chosen)], dim=1)
        grid = grids.get(branch)
        if grid is not None and tuple(grid.shape[1:3]) != tuple(size):
            raise ValueError(f"grids[{branch!r}] must be B×{size[0]}×{size[1]}×2 as size, got {tuple(grid.shape)}.")
        moved[branch] = resize_maps(both, (size[0], size[1])) if grid is None else carry_back(both, grid)
    return dict(moved, joint=torch.stack(list(moved.values())).sum(0))


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
    with needs_extra("train"):
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


def localization_accuracy(iou: Tensor, correct: Tensor, threshold: float = 0.5) -> Tensor:
    """Share of images whose top-1 class is right and whose box is found (table 2).

    Args:
        iou: B intersections over union of the boxes of `largest_region_box` with the ground truth.
        correct: B booleans: the top-1 class is right.
        threshold: smallest intersection over union of a box that counts as found.

    Returns:
        Scalar in [0, 1] in float64; NaN without an image.
    """
    return as_float64(correct & (iou >= threshold)).mean()
