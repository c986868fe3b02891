"""Gaussian attention around peaks, summed into sampling maps (paper eq. 5 to 7)."""

import math

import torch
from torch import Tensor

from .response import in_float32

# Below this a peak's value is taken as this: 1/R and the Gaussian's width stay finite in float32.
MIN_PEAK = 1e-6
MIN_SPREAD = 1e-12


def _squared_distances(cells: int, device: torch.device) -> Tensor:
    position = torch.arange(cells, device=device, dtype=torch.float32)
    return (position[:, None] - position[None, :]).square()


def sampling_map(
        response: Tensor,
        weights: Tensor,
        beta: Tensor | float,
        branch: str = "discriminative",
        floor: float = 0.09,
) -> Tensor:
    """Sum sparse attention over the peaks of one branch: Q = floor + Σ_i w_i A_i (eq. 5 to 7).

    With d² the squared distance in cells from peak i and R_i its value,

    - discriminative: A_i = R_i exp(-d² / (R_i β²)), a wide and high bump for a strong peak;
    - complementary: A_i = (1 / R_i) exp(-d² / (R_i β²)), a narrow and very high one for a weak peak.

    The exponential is a product of a factor in x and one in y, so the sum over peaks is one batched matrix product.
    No gradient flows to `response` and `weights`; `beta` always receives one, zero where there is no peak.

    Args:
        response: B×G×G response in [0, 1].
        weights: B×G×G weight of each cell as a peak, from `partition_peaks`.
        beta: β₁ or β₂ in cells, a number or a one-element tensor.
        branch: `"discriminative"` or `"complementary"`.
        floor: b, the attention of a cell far from every peak.

    Returns:
        B×G×G sampling map Q, float32.

    Raises:
        ValueError: shapes differ, `branch` is unknown, `floor` is not positive, or a number β is 0 or not finite.

    Example:
        >>> response = torch.zeros(1, 31, 31)
        >>> response[0, 15, 20] = 1.0
        >>> q = sampling_map(response, response, beta=3.9)
        >>> f"{q[0, 15, 20]:.2f} at the peak, {q[0, 0, 0]:.2f} far from it"
        '1.09 at the peak, 0.09 far from it'
    """
    if branch not in ("discriminative", "complementary"):
        raise ValueError(f"branch must be 'discriminative' or 'complementary', got {branch!r}.")
    if response.ndim != 3 or response.shape != weights.shape:
        raise ValueError(
            f"response and weights must both be B×G×G, got {tuple(response.shape)} and {tuple(weights.shape)}."
        )
    if not 0 < floor < math.inf:
        raise ValueError(f"floor must be positive and finite, got {floor}.")
    if not isinstance(beta, Tensor) and (beta == 0 or not math.isfinite(beta)):
        raise ValueError(f"beta must be a width in cells, finite and not 0, got {beta}.")
    weights = weights.detach().float()
    # where there is no peak any value does; a small one would have exponentials underflow, which CPUs are slow at
    value = response.detach().float().masked_fill(weights <= 0, 1.0).clamp_min(MIN_PEAK)
    height = weights * value if branch == "discriminative" else weights / value
    if isinstance(beta, Tensor):  # a number would travel to the device while the host waits
        beta = beta.to(value.device, torch.float32)
    falloff = -1 / (value * beta**2).clamp_min(MIN_SPREAD)
    rows, columns = value.shape[1:]
    along_y = _squared_distances(rows, value.device)
    along_x = along_y if rows == columns else _squared_distances(columns, value.device)
    across_y = torch.exp(along_y[:, :, None] * falloff[:, None]) * height[:, None]
    across_x = torch.exp(along_x[:, None, :] * falloff[:, None])
    with in_float32(value.device):
        return floor + across_y.flatten(2) @ across_x.flatten(2).transpose(1, 2)
