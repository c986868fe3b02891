"""Local maxima of a response, and their division between the two branches (paper eq. 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

PARTITION_MODES = ("probability", "random", "all", "extreme", "expected")
PEAK_FLOORS = ("mean", "none")


def find_peaks(response: Tensor, window: int = 3, peak_floor: str = "mean") -> Tensor:
    """Find the local maxima T of a response (section 3.2).

    A peak is the maximum of the `window`×`window` cells around it; of equal values in one window only the first in
    row-major order counts. The number of peaks is whatever the image gives; a constant response has none.

    Args:
        response: B×G×G response; its scale does not matter.
        window: side of the window in cells, odd.
        peak_floor: `"mean"` also demands that a peak be no lower than the mean of its response, `"none"` does not.

    Returns:
        B×G×G boolean mask.

    Raises:
        ValueError: `response` is not B×G×G or has no cell, `window` is even, or `peak_floor` is unknown.

    Example:
        >>> response = torch.zeros(1, 5, 5)
        >>> response[0, 1, 1], response[0, 3, 4] = 1.0, 0.6
        >>> find_peaks(response).nonzero().tolist()
        [[0, 1, 1], [0, 3, 4]]
    """
    if response.ndim != 3 or 0 in response.shape[1:]:
        raise ValueError(f"response must be B×G×G with at least one cell, got {tuple(response.shape)}.")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be a positive odd number of cells, got {window}.")
    if peak_floor not in PEAK_FLOORS:
        raise ValueError(f"peak_floor must be one of {', '.join(PEAK_FLOORS)}, got {peak_floor!r}.")
    rows, columns = response.shape[1:]
    # comparing the pooled index, not the pooled value, keeps one cell of a plateau instead of all
    index = F.max_pool2d(response[:, None], window, stride=1, padding=window // 2, return_indices=True)[1][:, 0]
    position = torch.arange(rows * columns, device=response.device).view(rows, columns)
    peaks = (index == position) & (response.amax((1, 2), keepdim=True) > response.amin((1, 2), keepdim=True))
    return peaks & (response >= response.mean((1, 2), keepdim=True)) if peak_floor == "mean" else peaks


def partition_peaks(
        response: Tensor,
        peaks: Tensor,
        mode: str,
        generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Divide peaks between the discriminative set T_d and the complementary set T_c (eq. 4).

    | mode          | T_d                           | T_c                               |
    | ------------- | ----------------------------- | --------------------------------- |
    | `probability` | R > ζ, with ζ ~ U(0, 1)       | the rest                          |
    | `random`      | a fair coin                   | the rest                          |
    | `all`         | every peak                    | every peak                        |
    | `extreme`     | the strongest peak            | the weakest peak                  |
    | `expected`    | every peak, weighted by R     | every peak, weighted by 1 - R     |

    `expected` is the mean of `probability` over ζ.

    Args:
        response: B×G×G response in [0, 1].
        peaks: B×G×G boolean mask of `find_peaks`.
        mode: one of the table.
        generator: source of the draws, on the response's device; the global one by default.

    Returns:
        Two B×G×G weight maps, for T_d and T_c, zero off the peaks.

    Raises:
        ValueError: `mode` is unknown, or the shapes differ or are not B×G×G.

    Example:
        >>> response = torch.tensor([[[1.0, 0.0], [0.0, 0.25]]])
        >>> strong, weak = partition_peaks(response, response > 0, "expected")
        >>> strong.tolist(), weak.tolist()
        ([[[1.0, 0.0], [0.0, 0.25]]], [[[0.0, 0.0], [0.0, 0.75]]])
    """
    if mode not in PARTITION_MODES:
        raise ValueError(f"mode must be one of {', '.join(PARTITION_MODES)}, got {mode!r}.")
    if response.shape != peaks.shape or response.ndim != 3 or 0 in response.shape[1:]:
        shapes = f"{tuple(response.shape)} and {tuple(peaks.shape)}"
        raise ValueError(f"response and peaks must both be B×G×G with at least one cell, got {shapes}.")
    present = peaks.to(response.dtype)
    if mode == "all":
        return present, present
    if mode == "expected":
        return present * response, present * (1 - response)
    if mode == "extreme":
        strongest = response.masked_fill(~peaks, -torch.inf).flatten(1).argmax(1, keepdim=True)
        weakest = response.masked_fill(~peaks, torch.inf).flatten(1).argmin(1, keepdim=True)
        position = torch.arange(response.shape[1] * response.shape[2], device=response.device)
        shape = response.shape
        return present * (position == strongest).view(shape), present * (position == weakest).view(shape)
    if generator is None:
        draw = torch.rand_like(response)
    else:
        draw = torch.rand(response.shape, generator=generator, device=response.device, dtype=response.dtype)
    strong = response > draw if mode == "probability" else draw < 0.5
    return present * strong, present * ~strong
