"""Reading an image larger than what the network reads: beyond the paper, which warps the pixels that it scanned.

Magnifying then shows detail that the first pass never saw, and where a warp shrinks, a filter as wide as the step from
pixel to pixel keeps fine texture from turning into noise.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _sample_border(image: Tensor, grid: Tensor, align_corners: bool) -> Tensor:
    return F.grid_sample(image, grid, padding_mode="border", align_corners=align_corners)


# torch.compile takes the sampler apart and fuses the parts with their neighbors, which is slower than torch's kernel
# (pytorch/pytorch#136953, and #104710 for channels-last); an operator of its own stays whole
_sample_whole = torch.library.custom_op("s3n_timm::sample_border", _sample_border, mutates_args=())


@_sample_whole.register_fake
def _(image: Tensor, grid: Tensor, align_corners: bool) -> Tensor:
    return image.new_empty(*image.shape[:2], *grid.shape[1:3])


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    *tensors, ctx.align_corners = inputs
    ctx.save_for_backward(*tensors)


def _sample_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    image, grid = ctx.saved_tensors
    of_image, of_grid = torch.ops.aten.grid_sampler_2d_backward(
        gradient, image, grid, 0, 1, ctx.align_corners, list(ctx.needs_input_grad[:2]))  # 0: bilinear, 1: border
    return of_image, of_grid, None


_sample_whole.register_autograd(_sample_backward, setup_context=_keep_inputs)


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    """Asked outside the trace: inside it torch.compile of torch 2.11 calls every compilation an export."""
    return getattr(torch.compiler, "is_exporting", lambda: True)()


def read_border(image: Tensor, grid: Tensor, align_corners: bool = True) -> Tensor:
    """Read an image bilinearly at a grid, and its border outside; NaN reads the middle.

    torch's sampler for CPUs takes NaN for a place in memory: its backward pass ends the process.
    """
    whole = torch.compiler.is_compiling() and not _is_exporting()
    return (_sample_whole if whole else _sample_border)(image, grid.nan_to_num(), align_corners)


def layout_of(images: Tensor) -> torch.memory_format:
    """The memory format that images made of `images` should have, so that a channels-last network reads no other."""
    return torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def identity_grid(size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """The grid of no warp.

    Args:
        size: (H, W) in pixels.
        device: where to build it.

    Returns:
        1×H×W×2 grid of (x, y) in [-1, 1], the corners' centers at ±1.
    """
    y, x = (torch.linspace(-1, 1, side, device=device, dtype=torch.float32) for side in size)
    return torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)[None]


def grid_steps(grid: Tensor, size: Sequence[int]) -> Tensor:
    """Pixels of the source from one pixel of the warped image to the next.

    Args:
        grid: B×H'×W'×2 of `warp_grid`.
        size: (H, W) of the source in pixels.

    Returns:
        B×H'×W', the geometric mean of the steps in x and in y: 1 where the source is shown as it is, less where it is
        magnified.
    """
    x, y = grid.detach().float().unbind(-1)
    step_x = F.pad((x[..., 1:] - x[..., :-1]).abs() * (size[1] - 1) / 2, (0, 1), mode="replicate")
    step_y = F.pad((y[..., 1:, :] - y[..., :-1, :]).abs() * (size[0] - 1) / 2, (0, 0, 0, 1), mode="replicate")
    return (step_x * step_y).sqrt()


def zoom(source: Tensor, grid: Tensor) -> Tensor:
    """Read an image at a grid of another size, each place at the resolution that its step asks for.

    Between the two of its copies, each half of the one before, whose pixels are nearest in size to the step, values
    are blended: the trilinear filter of textures. A source with no more pixels than the grid is read as it is.

    Args:
        source: B×C×H×W.
        grid: B×H'×W'×2, or 1×H'×W'×2 for all images.

    Returns:
        B×C×H'×W' in the source's dtype and memory format, computed in float32.
    """
    size = source.shape[-2:]
    ratio = max(have / want for have, want in zip(size, grid.shape[1:3]))
    halvings = max(0, math.ceil(math.log2(ratio)))
    copy = source.float()
    grid = grid.float()
    # 0 reads the source itself, 1 the first half
    depth = grid_steps(grid, size).clamp_min(1).log2().clamp_max(halvings)[:, None]
    zoomed = torch.zeros((), device=source.device)
    for halving in range(halvings + 1):
        weight = (1 - (depth - halving).abs()).clamp_min(0)
        # a copy's pixels are means of the source's, so its borders, not its corners' centers, lie on the source's;
        # numbers, not a tensor, which would travel to the device while the host waits
        extents = [side * 2**halving for side in copy.shape[-2:]]
        places = [along * ((whole - 1) / extent) + (whole / extent - 1)
                  for along, whole, extent in zip(grid.unbind(-1), size[::-1], extents[::-1])]
        place = torch.stack(places, dim=-1).expand(source.shape[0], -1, -1, -1)
        zoomed = zoomed + weight * read_border(copy, place, align_corners=False)
        if halving < halvings:
            copy = F.avg_pool2d(copy, 2)
    return zoomed.to(source.dtype, memory_format=layout_of(source))


def scan(source: Tensor, size: Sequence[int]) -> Tensor:
    """The reduced copy that the original branch reads: what `zoom` gives without a warp, B×C×H×W to B×C×`size`."""
    return zoom(source, identity_grid(size, source.device))
