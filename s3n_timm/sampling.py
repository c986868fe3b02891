"""From a sampling map to a warped image, and the whole of selective sparse sampling (paper eq. 6 to 8)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import sampling_map
from .multiscale import identity_grid, layout_of, read_border, zoom
from .peaks import find_peaks, partition_peaks
from .response import gate_response, in_float32, normalize_response, resize_maps

BRANCHES = ("discriminative", "complementary")
ATTENTIONS = ("sparse", "response", "saliency")
BORDERS = ("replicate", "reflect")


class _Axis(NamedTuple):
    """What warps along one axis, from G cells to H pixels."""

    mass: Tensor  # G×G, k ∗ Q
    shift: Tensor  # G×G, k ∗ (Q·(u - u_i))
    to_pixels: Tensor  # H×G, linear interpolation with aligned corners


class _Warp(NamedTuple):
    """The constants of a warp from a grid of cells to an image, which all branches share."""

    y: _Axis
    x: _Axis
    cells: Tensor  # 2×G×G, coordinates (u, v) of the cells
    pixels: Tensor  # 2×H×W, of the pixels


def _axis_filters(cells: int, fwhm: float, border: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Write one axis of both filters as matrices that act on the unpadded cells.

    Padding and cutting k are both linear, so the padding folds into the matrix: column c gathers every padded cell
    whose value is a copy of cell c. The offset from each cell's own coordinate u_i, not u itself,
    is filtered because it keeps float32 exact where the map is uniform.
    """
    cell = torch.arange(cells, device=device)
    padded = torch.arange(1 - cells, 2 * cells - 1, device=device)
    offset = (padded[None, :] - cell[:, None]).float()
    kernel = torch.exp(offset.square() * (-4 * math.log(2) / fwhm**2)) * (offset.abs() < cells)
    copied = padded.clamp(0, cells - 1) if border == "replicate" else cells - 1 - (cells - 1 - padded.abs()).abs()
    source = (copied[:, None] == cell[None, :]).float()
    return kernel @ source, (kernel * offset / (cells - 1)) @ source


def _interpolation(cells: int, size: int, device: torch.device) -> Tensor:
    """Linear interpolation from cells to pixels with aligned corners, as a size×cells matrix."""
    one_hot = torch.eye(cells, device=device, dtype=torch.float32)[None]
    return F.interpolate(one_hot, size=size, mode="linear", align_corners=True)[0].T


def gaussian_kernel(grid: tuple[int, int], fwhm: float) -> Tensor:
    """The kernel k = exp(-4 ln 2 · d² / F²) of section 6, cut at ±(G - 1) cells.

    Args:
        grid: (rows, columns) of the sampling grid.
        fwhm: F in cells.

    Returns:
        (2·rows - 1)×(2·columns - 1), 1 in the middle.
    """
    y, x = (torch.arange(1 - cells, cells, dtype=torch.float32).square() for cells in grid)
    return torch.exp((y[:, None] + x) * (-4 * math.log(2) / fwhm**2))


def _filter_dense(sampling_map: Tensor, kernel: Tensor, border: str) -> tuple[Tensor, Tensor, Tensor]:
    """k ∗ Q, k ∗ (Q·(u - u_i)) and k ∗ (Q·(v - v_i)) for a kernel that is not separable, by plain convolution."""
    rows, columns = sampling_map.shape[1:]
    if kernel.shape != (2 * rows - 1, 2 * columns - 1):
        raise ValueError(
            f"kernel must be {2 * rows - 1}×{2 * columns - 1} for a {rows}×{columns} grid, got {tuple(kernel.shape)}."
        )
    device = sampling_map.device
    du = torch.arange(1 - columns, columns, device=device, dtype=torch.float32) / (columns - 1)
    dv = torch.arange(1 - rows, rows, device=device, dtype=torch.float32) / (rows - 1)
    kernels = torch.stack([kernel, kernel * du, kernel * dv[:, None]])[:, None].float()
    padded = F.pad(sampling_map[:, None], (columns - 1, columns - 1, rows - 1, rows - 1), mode=border)
    mass, shift_x, shift_y = F.conv2d(padded, kernels).unbind(1)
    return mass, shift_x, shift_y


def warp_grid(
        sampling_map: Tensor,
        size: Sequence[int],
        fwhm: float = 13,
        kernel: Tensor | None = None,
        border: str = "replicate",
) -> Tensor:
    """Turn a sampling map into the grid that a warped image is read from (eq. 8).

    f = (k ∗ (Q·u)) / (k ∗ Q) and g likewise in y, with Q padded by G - 1 cells of its border and u running on
    linearly into the padding. A uniform map gives the identity.

    Args:
        sampling_map: B×G×G attention Q, positive.
        size: (H, W) of the warped image in pixels.
        fwhm: F, full width at half maximum of the Gaussian k in cells.
        kernel: a (2G-1)×(2G-1) kernel to use in place of the Gaussian.
        border: `"replicate"` pads by the border as in the paper, and attention near it pushes the border out of the
            image; `"reflect"` mirrors the map, so that border pixels stay on the border and nothing is cropped.

    Returns:
        B×H×W×2 float32 grid of (x, y) in [-1, 1], the corners' centers at ±1.

    Raises:
        ValueError: `sampling_map` is not B×G×G with G >= 2, `size` has no pixel, `fwhm` is not positive and finite,
            `kernel` does not fit the map, or `border` is unknown.

    Example:
        >>> uniform = warp_grid(torch.ones(1, 31, 31), size=(5, 5))
        >>> torch.allclose(uniform[0, 0, :, 0], torch.linspace(-1, 1, 5), atol=1e-5)
        True
    """
    if sampling_map.ndim != 3 or min(sampling_map.shape[1:]) < 2:
        raise ValueError(f"sampling_map must be B×G×G with at least 2 cells a side, got {tuple(sampling_map.shape)}.")
    with in_float32(sampling_map.device):
        warp = _prepare_warp(sampling_map.shape[1:], size, fwhm, border, sampling_map.device)
        return _warp(sampling_map.float(), warp, kernel, border)


def _prepare_warp(
        grid_size: Sequence[int], size: Sequence[int], fwhm: float, border: str, device: torch.device,
) -> _Warp:
    """What warps any map of so many cells to an image of (H, W) pixels."""
    if min(size) < 1:
        raise ValueError(f"size must be (H, W) of at least one pixel a side, got {tuple(size)}.")
    if not 0 < fwhm < math.inf:
        raise ValueError(f"fwhm must be positive and finite, got {fwhm}.")
    if border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {border!r}.")
    rows, columns = grid_size
    filters_x = _axis_filters(columns, fwhm, border, device)
    filters_y = filters_x if rows == columns else _axis_filters(rows, fwhm, border, device)
    return _Warp(
        _Axis(*filters_y, _interpolation(rows, size[0], device)),
        _Axis(*filters_x, _interpolation(columns, size[1], device)),
        *(identity_grid(steps, device)[0].permute(2, 0, 1).contiguous() for steps in (grid_size, size)),
    )


def _warp(q: Tensor, warp: _Warp, kernel: Tensor | None, border: str) -> Tensor:
    """Equation 8 along both axes: B×G×G to a B×H×W×2 grid."""
    y, x, cells, pixels = warp
    if kernel is None:
        filtered_y = y.mass @ q
        mass = filtered_y @ x.mass.T
        f, g = filtered_y @ x.shift.T, y.shift @ q @ x.mass.T
    else:
        mass, f, g = _filter_dense(q, kernel, border)
    offset = (cells + torch.stack([f, g], dim=1) * (2 / mass)[:, None]).clamp(-1, 1) - cells
    # bilinear with aligned corners, as two products: forward and backward are faster so than F.interpolate; and of
    # offsets, not of coordinates, which are larger, so that products rounded to TF32 would move the grid by more
    return (y.to_pixels @ offset @ x.to_pixels.T).add_(pixels).permute(0, 2, 3, 1)


def resample(image: Tensor, grid: Tensor) -> Tensor:
    """Read an image at a warp grid (section 3.3): bilinear, corners aligned.

    The paper reads zeros outside the image. No grid of `warp_grid` leaves it, so reading the border there gives the
    same values, and on CUDA this is torch's own sampler, not cuDNN's, which computes the image's gradient even where
    nobody asks for it.

    Args:
        image: B×3×H×W.
        grid: B×H'×W'×2 of `warp_grid`.

    Returns:
        B×3×H'×W' in the image's dtype and memory format, computed in float32; NaN where an image's grid is.

    Raises:
        ValueError: the shapes are others, or of different batch sizes, or the image has no pixel.
    """
    fit = image.ndim == grid.ndim == 4 and image.shape[0] == grid.shape[0] and grid.shape[3] == 2
    if not fit or 0 in image.shape[1:]:
        raise ValueError(
            f"image must be B×C×H×W and grid B×H'×W'×2, got {tuple(image.shape)} and {tuple(grid.shape)}."
        )
    grid = grid.float()
    # warp_grid spreads NaN over the whole grid, so that one number tells
    warped = read_border(image.float(), grid) + 0 * grid.detach()[:, :1, :1, :1]
    return warped.to(image.dtype, memory_format=layout_of(image))


def as_grid(grid_size: int | Sequence[int]) -> tuple[int, int]:
    """Read G, or (rows, columns), as a pair; both at least 2."""
    pair = (grid_size, grid_size) if isinstance(grid_size, int) else tuple(grid_size)
    if len(pair) != 2 or min(pair) < 2:
        raise ValueError(f"grid_size must be one number or (rows, columns), each at least 2, got {grid_size!r}.")
    return pair


class BranchSample(NamedTuple):
    """How one branch samples a batch of images."""

    image: Tensor  # B×3×H'×W' warped image, of the input's own size unless another was asked for
    grid: Tensor  # B×H'×W'×2, where the warped image was read
    sampling_map: Tensor  # B×G×G attention Q
    weights: Tensor | None  # B×G×G weight of each cell as a peak; None for dense attention


class SelectiveSample(NamedTuple):
    """What selective sparse sampling made of a batch."""

    response: Tensor  # B×G×G in [0, 1]
    peaks: Tensor  # B×G×G boolean
    discriminative: BranchSample | None  # None for a branch that was left out
    complementary: BranchSample | None


def sample_response(
        image: Tensor,
        response: Tensor,
        *,
        mode: str,
        beta_discriminative: Tensor | float | None,
        beta_complementary: Tensor | float | None,
        attention: str = "sparse",
        grid_size: int | Sequence[int] = 31,
        window: int = 3,
        peak_floor: str = "mean",
        floor: float = 0.09,
        fwhm: float = 13,
        kernel: Tensor | None = None,
        border: str = "replicate",
        size: Sequence[int] | None = None,
        branches: Sequence[str] = BRANCHES,
        generator: torch.Generator | None = None,
) -> SelectiveSample:
    """Sample an image by a response that is already merged: `selective_sample` after its gate.

    Args:
        image: B×3×H×W.
        response: B×h×w response of `gate_response`, or the saliency to sample by.
        attention: `"sparse"`: Gaussians around peaks; `"response"`: Q = floor + R, dense; `"saliency"`: Q = floor +
            the response as it is, not normalized and with its gradient, no peaks.
        size: (H', W') of the warped images, read by `zoom`; the image's own, read by `resample`, if left out.

    The other arguments, the result and the errors are those of `selective_sample`.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}.")
    if not 0 < floor < math.inf:
        raise ValueError(f"floor must be positive and finite, got {floor}.")
    if isinstance(branches, str) or not set(branches) <= set(BRANCHES):
        raise ValueError(f"branches must be a sequence of {' and '.join(BRANCHES)}, got {branches!r}.")
    grid_size = as_grid(grid_size)
    samples: dict[str, BranchSample] = {}
    with in_float32(image.device):
        response = response.float()
        saliency = resize_maps(response[:, None], grid_size)[:, 0] if attention == "saliency" else None
        # taking the minimum off first keeps a constant map constant: resizing would leave rounding noise that has peaks
        response = response.detach() - response.detach().amin((1, 2), keepdim=True)
        response = normalize_response(resize_maps(response[:, None], grid_size)[:, 0])
        if attention == "sparse":
            peaks = find_peaks(response, window, peak_floor)
            weights = dict(zip(BRANCHES, partition_peaks(response, peaks, mode, generator)))
        else:
            peaks = torch.zeros_like(response, dtype=torch.bool)
            weights = {}
        betas = {"discriminative": beta_discriminative, "complementary": beta_complementary}
        warp = _prepare_warp(grid_size, size or image.shape[-2:], fwhm, border, response.device)
        for branch in branches:
            of_branch = weights.get(branch)
            if of_branch is None:
                q = floor + (response if saliency is None else saliency)
            else:
                beta = betas[branch]
                if beta is None:
                    raise ValueError(f"beta_{branch} is missing: the {branch} branch needs it for sparse attention.")
                q = sampling_map(response, of_branch, beta, branch, floor)
            grid = _warp(q, warp, kernel, border)
            warped = zoom(image, grid) if size else resample(image, grid)
            samples[branch] = BranchSample(warped, grid, q, of_branch)
    return SelectiveSample(response, peaks, *(samples.get(branch) for branch in BRANCHES))


def selective_sample(
        image: Tensor,
        maps: Tensor,
        scores: Tensor | None,
        *,
        mode: str,
        beta_discriminative: Tensor | float | None,
        beta_complementary: Tensor | float | None,
        threshold: float = 0.2,
        topk: int = 5,
        gate: str = "paper",
        grid_size: int | Sequence[int] = 31,
        **options: Any,
) -> SelectiveSample:
    """Warp an image twice, once around its strong and once around its weak peaks (section 3, eq. 2 to 8).

    Gate, resize, normalize, find peaks, divide them, sum their attention, warp. Everything is float32, also inside
    autocast; β and the image receive gradients, the maps and scores don't.

    Args:
        image: B×3×H×W input X.
        maps: B×C×h×w class response maps of any resolution.
        scores: B×C class scores for the gate; None takes the means of the resized maps, as the original does.
        mode: how peaks are divided, see `partition_peaks`.
        beta_discriminative: β₁ in cells.
        beta_complementary: β₂ in cells.
        threshold: δ of the gate in nats.
        topk: classes that count in the gate.
        gate: `"paper"` or `"renormalized"`, see `gate_weights`.
        grid_size: G, or (rows, columns) for images that are not square.
        **options: of `sample_response`: `attention`, `window`, `peak_floor`, `floor`, `fwhm`, `kernel`, `border`,
            `size`, `branches` and `generator`.

    Returns:
        A `SelectiveSample`.

    Raises:
        ValueError: a shape or an option is wrong; the message names the argument.

    Example:
        >>> image, maps, scores = torch.rand(2, 3, 64, 64), torch.rand(2, 10, 7, 7), torch.rand(2, 10)
        >>> sample = selective_sample(
        ...     image, maps, scores, mode="expected", beta_discriminative=3.9, beta_complementary=13.2)
        >>> sample.discriminative.image.shape, sample.discriminative.grid.shape, sample.response.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 64, 64, 2]), torch.Size([2, 31, 31]))
    """
    if image.ndim != 4 or maps.ndim != 4 or image.shape[0] != maps.shape[0]:
        raise ValueError(
            f"image must be B×3×H×W and maps B×C×h×w of one batch size, got {tuple(image.shape)} and "
            f"{tuple(maps.shape)}."
        )
    if 0 in maps.shape[1:] or 0 in image.shape[1:]:
        raise ValueError(f"image and maps must not be empty, got {tuple(image.shape)} and {tuple(maps.shape)}.")
    grid_size = as_grid(grid_size)
    with in_float32(image.device):
        maps = maps.detach().float()
        if scores is None:
            scores = resize_maps(maps, grid_size).mean((2, 3))
        response = gate_response(maps, scores.detach(), threshold, topk, gate)
        return sample_response(
            image,
            response,
            mode=mode,
            beta_discriminative=beta_discriminative,
            beta_complementary=beta_complementary,
            grid_size=grid_size,
            **options,
        )
