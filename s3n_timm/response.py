"""Class response maps and the entropy gate that merges them (paper eq. 1 to 3)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATES = ("paper", "renormalized")


def in_float32(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off; meta tensors have none."""
    # torch.amp.is_autocast_available would ask for any device, but torch.compile of torch 2.6 to 2.8 can't trace it
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def class_response_maps(features: Tensor, classifier: nn.Linear | nn.Conv2d | Tensor) -> Tensor:
    """Project features on the classifier's weights at every position: M_c = sum_d W[d, c] S_d + b_c (eq. 1).

    The mean of a map over its positions is the class score that global average pooling followed by the same
    classifier gives.

    Args:
        features: B×D×h×w feature maps S.
        classifier: the linear classifier that follows pooling: `nn.Linear`, a 1×1 `nn.Conv2d`, or its C×D weight.

    Returns:
        B×C×h×w class response maps.

    Raises:
        ValueError: `features` is not 4-D or has no position, or its width is not the classifier's.

    Example:
        >>> features, classifier = torch.rand(2, 8, 7, 7), torch.nn.Linear(8, 3)
        >>> maps = class_response_maps(features, classifier)
        >>> torch.allclose(maps.mean((2, 3)), classifier(features.mean((2, 3))), atol=1e-5)
        True
    """
    if features.ndim != 4:
        raise ValueError(f"features must be B×D×h×w, got {features.ndim} dimensions.")
    if 0 in features.shape[2:]:
        raise ValueError(f"features have no position: their shape is {tuple(features.shape)}.")
    weight, bias = (classifier, None) if isinstance(classifier, Tensor) else (classifier.weight, classifier.bias)
    if weight.ndim < 2:
        raise ValueError(f"the classifier's weight must be C×D, got {tuple(weight.shape)}.")
    weight = weight.flatten(1)
    if features.shape[1] != weight.shape[1]:
        raise ValueError(f"features have {features.shape[1]} channels but the classifier reads {weight.shape[1]}.")
    return F.conv2d(features, weight[:, :, None, None], bias)


def gate_weights(scores: Tensor, threshold: float = 0.2, topk: int = 5, gate: str = "paper") -> Tensor:
    """Say which class response maps make up the response of an image (eq. 2 and 3).

    With p the `topk` largest softmax probabilities and H = -sum p ln p, the top-1 map alone is chosen where
    H <= `threshold`, else the sum of the `topk` maps.

    Args:
        scores: B×C class scores.
        threshold: δ, in nats.
        topk: how many classes count; all of them where there are fewer.
        gate: `"paper"` takes the probabilities as they are, `"renormalized"` divides them by their sum first, so
            that H does not shrink as classes are added.

    Returns:
        B×C weights, 0 or 1: a response is their product with the maps.

    Raises:
        ValueError: `scores` is not B×C with a class, `topk` is not positive, or `gate` is unknown.

    Example:
        >>> gate_weights(torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.9, 0.0]]), topk=2)
        tensor([[1., 0., 0.],
                [1., 1., 0.]])
    """
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores must be B×C with at least one class, got {tuple(scores.shape)}.")
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}.")
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}.")
    scores = scores.float()
    top, index = scores.softmax(dim=1).topk(min(topk, scores.shape[1]), dim=1)
    p = top / top.sum(dim=1, keepdim=True) if gate == "renormalized" else top
    entropy = torch.special.entr(p).sum(dim=1, keepdim=True)
    rank = torch.arange(p.shape[1], device=scores.device)
    chosen = (rank == 0) | (entropy > threshold)
    return torch.zeros_like(scores).scatter(1, index, chosen.to(scores.dtype))


def gate_response(
        maps: Tensor,
        scores: Tensor,
        threshold: float = 0.2,
        topk: int = 5,
        gate: str = "paper",
) -> Tensor:
    """Merge class response maps into one response R per image by the entropy gate (eq. 2 and 3).

    Args:
        maps: B×C×h×w class response maps.
        scores: B×C class scores.
        threshold: δ, in nats.
        topk: how many classes count where the network is unsure.
        gate: see `gate_weights`.

    Returns:
        B×h×w float32 response: the top-1 map, or the sum of the top-k maps. `normalize_response` brings it to [0, 1].

    Raises:
        ValueError: shapes don't agree, or `gate` is unknown.
    """
    if maps.ndim != 4 or maps.shape[:2] != scores.shape:
        raise ValueError(f"maps must be B×C×h×w for B×C scores, got {tuple(maps.shape)} and {tuple(scores.shape)}.")
    with in_float32(maps.device):
        return torch.einsum("bc,bchw->bhw", gate_weights(scores, threshold, topk, gate), maps.float())


def project_response(
        features: Tensor,
        weight: Tensor,
        scores: Tensor,
        threshold: float = 0.2,
        topk: int = 5,
        gate: str = "paper",
) -> Tensor:
    """The gated response of features without their class response maps (eq. 1 to 3 in one step).

    A sum of maps is the projection on the sum of the classes' weights, so that the C maps are never built. It equals
    `gate_response(class_response_maps(features, weight), scores, …)`: a bias adds a constant, which section 3's
    normalization removes.

    Args:
        features: B×D×h×w feature maps S.
        weight: C×D weight of the linear classifier.
        scores: B×C class scores.
        threshold: δ, in nats.
        topk: how many classes count where the network is unsure.
        gate: see `gate_weights`.

    Returns:
        B×h×w response, float32.

    Raises:
        ValueError: shapes don't agree, or `gate` is unknown.

    Example:
        >>> features, weight, scores = torch.rand(2, 8, 7, 7), torch.rand(3, 8), torch.rand(2, 3)
        >>> merged = gate_response(class_response_maps(features, weight), scores)
        >>> torch.allclose(project_response(features, weight, scores), merged, atol=1e-5)
        True
    """
    if features.ndim != 4 or weight.shape != (scores.shape[-1], features.shape[1]):
        raise ValueError(
            f"features must be B×D×h×w, weight C×D and scores B×C, got {tuple(features.shape)}, "
            f"{tuple(weight.shape)} and {tuple(scores.shape)}."
        )
    with in_float32(features.device):
        rows = gate_weights(scores, threshold, topk, gate) @ weight.float()
        return torch.einsum("bd,bdhw->bhw", rows, features.float())


def resize_maps(maps: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Resize B×C×h×w maps to the sampling grid, bilinearly with aligned corners (section 3.1)."""
    if maps.shape[-2:] == tuple(grid_size):
        return maps
    return F.interpolate(maps, size=grid_size, mode="bilinear", align_corners=True)


def grid_mean(maps: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Mean over positions of B×C×h×w maps resized to the grid, without building them: B×C.

    Resizing is linear, so its mean is a weighted mean of the maps' own positions, separable in y and x.
    """
    weights = []
    for cells, size in zip(maps.shape[-2:], grid_size):
        one_hot = torch.eye(cells, device=maps.device, dtype=maps.dtype)[None]
        weights.append(F.interpolate(one_hot, size=size, mode="linear", align_corners=True).mean(2)[0])
    return torch.einsum("bchw,h,w->bc", maps, *weights)


def normalize_response(response: Tensor) -> Tensor:
    """Bring each image's response to [0, 1]: (R - min R) / (max R - min R).

    Args:
        response: B×h×w response.

    Returns:
        B×h×w float32 response; all zeros where the response is constant.

    Raises:
        ValueError: `response` is not B×h×w, or has no cell.

    Example:
        >>> normalize_response(torch.tensor([[[2.0, 4.0], [3.0, 2.0]]]))
        tensor([[[0.0000, 1.0000],
                 [0.5000, 0.0000]]])
    """
    if response.ndim != 3 or 0 in response.shape[1:]:
        raise ValueError(f"response must be B×h×w with at least one cell, got {tuple(response.shape)}.")
    response = response.float()
    low = response.amin(dim=(1, 2), keepdim=True)
    span = response.amax(dim=(1, 2), keepdim=True) - low
    # a constant map has no span: dividing by one leaves it at zero instead of NaN
    return (response - low) / span.masked_fill(span == 0, 1)
