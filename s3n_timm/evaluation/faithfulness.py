"""Whether a network decides by what its response maps show: deletion and insertion curves (RISE, BMVC 2018).

The pixels that a map ranks highest are taken from the image, or given to an image that had lost them, and the
probability of the class is read again at every step. A map is faithful where the probability falls at once, or rises
at once. RISE: Petsiuk, Das and Saenko, "Randomized Input Sampling for Explanation of Black-box Models", section 3.3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur  # type: ignore[import-untyped]

from ..heads import inspect_head
from ..model import S3N
from ..response import resize_maps
from .localization import localization_maps
from .warps import resize_grid

STEPS = 16
METHOD = (
    "RISE's deletion and insertion: area under the probability of the predicted class while the pixels of the image "
    "that the branch reads, those of the highest response first, are replaced by each channel's mean in the "
    "model's normalization, or replace those of a blurred copy (standard deviation a tenth of its shorter side), in "
    f"{STEPS} equal steps; the sum of all maps is tested on the input, read by the whole model with its warps made "
    "anew; random map: random values in the map's cells, resized as the map is"
)
ORDERS = ("", "random_")
KINDS = ("deletion", "insertion")

Classify = Callable[[Tensor], Tensor]


def rank_pixels(importance: Tensor) -> Tensor:
    """How many pixels of the image come before each one, the most important first.

    Pixels that are equally important come in one random order, the same for every image and every call, and not row
    by row, which would order the pixels of a constant map from top to bottom.

    Args:
        importance: B×H×W.

    Returns:
        B×H×W ranks from 0 to H·W - 1, int64.

    Raises:
        ValueError: `importance` is not B×H×W.
    """
    if importance.ndim != 3:
        raise ValueError(f"importance must be B×H×W, got {tuple(importance.shape)}.")
    values = importance.flatten(1)
    shuffled = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(0)).to(values.device)
    order = shuffled[values[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    ranks = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks).view_as(importance)


def replacement_curve(
        classify: Classify,
        before: Tensor,
        after: Tensor,
        importance: Tensor,
        classes: Tensor,
        steps: int = STEPS,
        batch_size: int = 64,
) -> Tensor:
    """Probability of a class while the pixels of one image replace those of another, the most important first.

    Args:
        classify: gives N×C logits of N×3×H×W images.
        before: B×3×H×W images as they are at first.
        after: B×3×H×W images as they are in the end.
        importance: B×H×W, of each pixel.
        classes: B class indices.
        steps: S, in each of which an equal share of the pixels is replaced.
        batch_size: most images that `classify` reads at once, and at least the B of one step.

    Returns:
        B×(S+1) probabilities at the shares 0, 1/S, …, 1 of replaced pixels, float32.

    Raises:
        ValueError: shapes don't agree, or there is no step.

    Example:
        >>> image, gone = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
        >>> classify = lambda x: torch.stack([x[:, 0, 0, 0], torch.zeros(len(x))], dim=1)  # reads the first pixel
        >>> importance = torch.tensor([[[9.0, 1.0], [1.0, 1.0]]])
        >>> replacement_curve(classify, image, gone, importance, torch.tensor([0]), steps=4)
        tensor([[0.7311, 0.5000, 0.5000, 0.5000, 0.5000]])
    """
    count, size = len(before), before.shape[-2:]
    if before.ndim != 4 or before.shape != after.shape or importance.shape != (count, *size) or len(classes) != count:
        raise ValueError(
            f"before and after must be B×3×H×W, importance B×H×W and classes B, got {tuple(before.shape)}, "
            f"{tuple(after.shape)}, {tuple(importance.shape)} and {tuple(classes.shape)}."
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    ranks = rank_pixels(importance)[None, :, None]
    replaced = torch.linspace(0, size.numel(), steps + 1, device=before.device).round()[:, None, None, None, None]
    curve = []
    for some in replaced.split(max(batch_size // max(count, 1), 1)):
        mixed = torch.where(ranks < some, after, before)  # steps×B×3×H×W
        probabilities = classify(mixed.flatten(0, 1)).float().softmax(1).unflatten(0, (-1, count))
        curve.append(probabilities.gather(2, classes.expand(len(some), -1)[..., None])[..., 0])
    return torch.cat(curve).T


def deletion_curve(
        classify: Classify, images: Tensor, importance: Tensor, classes: Tensor, steps: int = STEPS, **kwargs: Any,
) -> Tensor:
    """Probability of a class while the most important pixels are replaced by 0, the mean of normalized channels.

    That of the image itself would bring its colors back, by which many classes can be told.

    Args:
        classify: as for `replacement_curve`, and so are the others.
        images: B×3×H×W, normalized.
        importance: B×H×W.
        classes: B class indices.
        steps: S.
        kwargs: `batch_size`.

    Returns:
        B×(S+1) probabilities at the shares 0, 1/S, …, 1 of deleted pixels, float32.

    Raises:
        ValueError: as for `replacement_curve`.
    """
    return replacement_curve(classify, images, torch.zeros_like(images), importance, classes, steps, **kwargs)


def insertion_curve(
        classify: Classify, images: Tensor, importance: Tensor, classes: Tensor, steps: int = STEPS, **kwargs: Any,
) -> Tensor:
    """Probability of a class while the most important pixels replace those of a blurred copy, see `blur`.

    RISE starts from a blurred image too: pixels on a flat one would make sharp edges, which networks take for shapes.
    Arguments and errors are those of `deletion_curve`, and what is returned is, by shares of inserted pixels.
    """
    return replacement_curve(classify, blur(images), images, importance, classes, steps, **kwargs)


def blur(images: Tensor) -> Tensor:
    """B×3×H×W images blurred by a Gaussian whose standard deviation is a tenth of their shorter side.

    RISE takes 5 pixels of 224, through which drawn birds can still be told apart.
    """
    shorter = min(images.shape[-2:])
    radius = min(shorter // 4, shorter - 1)  # the kernel reaches two and a half deviations to each side
    return gaussian_blur(images, [2 * radius + 1] * 2, [max(shorter / 10, 0.1)] * 2)


def curve_area(curve: Tensor) -> Tensor:
    """Area under B×(S+1) values at equal steps from 0 to 1, by trapezoids: B areas."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1))


def random_importance(cells: Sequence[int], size: Sequence[int], indices: Tensor, seed: int = 0) -> Tensor:
    """A map that knows nothing: random values in as many cells as a response map has, resized as that is.

    Random values of pixels would leave specks in an image, which a network reads otherwise than the patches that a
    response map takes away.

    Args:
        cells: (h, w) of the response map.
        size: (H, W) of the image in pixels.
        indices: B numbers of the images: each has its own map, whatever the batch.
        seed: of all of them.

    Returns:
        B×H×W importance in float32.
    """
    maps = [
        torch.rand(1, *cells, generator=torch.Generator().manual_seed(seed + index)) for index in indices.tolist()
    ]
    return resize_maps(torch.stack(maps), (size[0], size[1]))[:, 0].to(indices.device)


class _Claim(NamedTuple):
    """A map of a class, and what it is a map of."""

    images: Tensor  # B×3×H×W
    importance: Tensor  # B×H×W
    cells: Sequence[int]  # (h, w), in which the map was made
    classify: Classify


def _claims_of_s3n(model: S3N, images: Tensor) -> tuple[dict[str, _Claim], Tensor]:
    seen = model.explain(images)
    classes = model.decide(seen.logits).argmax(1)
    maps = {branch: of_classes for branch, of_classes in seen.maps.items() if getattr(seen.logits, branch) is not None}

    def reader(branch: str) -> Classify:
        def classify(images: Tensor) -> Tensor:
            features = model.forward_features(images) if branch == "original" else model.read(images)
            features = model.apply_neck(features, branch)
            return model.classify(features, model.head.pool(model.backbone, features), branch)

        return classify

    size = (images.shape[-2], images.shape[-1])
    read = {branch: getattr(seen.sample, branch) for branch in model.warped}
    grids = {branch: resize_grid(warped.grid, size) for branch, warped in read.items()}
    total = localization_maps(maps, grids, classes, size)["joint"][:, 1]
    claims = dict(joint=_Claim(images, total, seen.maps["original"].shape[-2:], model.answer))
    for branch, of_classes in maps.items():
        branch_images = read[branch].image if branch in read else images
        claims[branch] = _claim(branch_images, of_classes, classes, reader(branch))
    return claims, classes


def _claim(images: Tensor, maps: Tensor, classes: Tensor, classify: Classify) -> _Claim:
    chosen = maps.float()[torch.arange(len(classes), device=classes.device), classes]
    importance = resize_maps(chosen[:, None], (images.shape[-2], images.shape[-1]))[:, 0]
    return _Claim(images, importance, maps.shape[-2:], classify)


@torch.no_grad()
def measure_faithfulness(
        model: nn.Module, images: Tensor, indices: Tensor, steps: int = STEPS, seed: int = 0,
) -> dict[str, Tensor]:
    """Deletion and insertion curves of the response maps of a model, beside those of random maps.

    Each branch is tested on what its map speaks of: the image that the branch reads, which for D and C is the warped
    one, and the logits of that branch. Pixels deleted from the input would move the peaks and so change all warps,
    and tell nothing of the map of one branch. What the whole model makes of the input is tested by the sum of all maps,
    as `localization_maps` carries them back to it; there the warps follow.

    Args:
        model: an S3N or a plain timm model that has class response maps; in eval mode.
        images: B×3×H×W, normalized.
        indices: B numbers of the images, see `random_importance`.
        steps: S.
        seed: of the random maps.

    Returns:
        B×(S+1) probabilities of the class that the model predicts: `deletion_…`, `insertion_…`, `random_deletion_…`
        and `random_insertion_…` of each branch and, under `joint`, of the whole model. A plain model has `original`.

    Raises:
        NoResponseMap: the head of a plain model gives no class response maps.
    """
    if isinstance(model, S3N):
        claims, classes = _claims_of_s3n(model, images)
    else:
        head = inspect_head(model)
        features = cast(Any, model).forward_features(images)
        maps = head.response_maps(model, head.to_map(features, images.shape[-2:]))
        classes = model(images).argmax(1)
        claims = dict(original=_claim(images, maps, classes, model))
    curves = {}
    for name, (seen, importance, cells, classify) in claims.items():
        maps_by_order = (importance, random_importance(cells, seen.shape[-2:], indices, seed))
        for order, each in zip(ORDERS, maps_by_order):
            for kind, curve in zip(KINDS, (deletion_curve, insertion_curve)):
                curves[f"{order}{kind}_{name}"] = curve(classify, seen, each, classes, steps, batch_size=len(seen))
    return curves


def summarize_faithfulness(records: Mapping[str, Tensor]) -> dict[str, Any]:
    """Mean areas and mean curves of the rows of all images.

    Args:
        records: rows of `measure_faithfulness`, those of all batches put together.

    Returns:
        `images` and `steps`, their numbers; `method`; and `maps`: by branch, and `joint` for the sum of all maps,
        `deletion`, `insertion`, `random_deletion` and `random_insertion`, the areas in [0, 1], with the S+1 points of
        the mean curves under `curves`.
    """
    names = [name.removeprefix("deletion_") for name in records if name.startswith("deletion_")]
    keys = [order + kind for kind in KINDS for order in ORDERS]
    maps = {}
    for name in names:
        curves = {key: records[f"{key}_{name}"].double().mean(0, keepdim=True) for key in keys}
        areas: dict[str, Any] = {key: curve_area(curve).item() for key, curve in curves.items()}
        maps[name] = dict(areas, curves={key: curve[0].tolist() for key, curve in curves.items()})
    count, points = records[f"deletion_{names[0]}"].shape
    return dict(images=count, steps=points - 1, method=METHOD, maps=maps)
