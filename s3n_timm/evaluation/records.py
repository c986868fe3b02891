"""Evaluation of a model in two steps: what is kept of each image of a batch, and the metrics of a whole split.

`measure_batch` gives one row per image, so that rows of several processes can be put together before `summarize` makes
metrics of them. Rows hold logits and scalars, never a map or an image.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model import S3N
from ..outputs import mean_answer
from .geometry import Crop, transform_boxes, transform_points
from .localization import box_iou, largest_region_box, localization_accuracy, localization_maps
from .peaks import count_hits, hit_histogram, hit_rate, nearest_parts
from .statistics import bootstrap_interval, calibration_error, check_finite, fit_temperature, nll
from .warps import background_magnification, box_magnification, magnification, resize_grid

OUTPUTS = ("joint", "mean", "original", "discriminative", "complementary")
UNITS = (
    "accuracies, rates, shares, their intervals and the calibration error in %; log likelihood and entropy in nats; "
    "magnification in areas of the warped image per area of the input; areas under probabilities in [0, 1]; counts as "
    "such"
)
INTERVAL = "95 %, percentile bootstrap over images by its exact binomial quantiles"
CALIBRATION = (
    "temperature fitted by cross-fitting on the evaluated images themselves: on each half of them, chosen by the seed, "
    "and applied to the other half"
)

Records = Mapping[str, Tensor]


def carry_annotations(batch: Records, crop: Crop) -> dict[str, Tensor]:
    """Carry a batch's boxes and parts from the stored images into the model's input.

    Args:
        batch: `sizes` B×2 (height, width) of the stored images in pixels, and where they are annotated `box` B×4 and
            `parts` B×P×3 (x, y, visible) in pixels of those images; the rest is passed on.
        crop: the model's.

    Returns:
        The batch with `box` and `parts` in pixels of the input, `boxed` B: something of the box is left, and
        `part_visible` B×P: the part is visible in the stored image. A part outside the input is no longer visible in
        `parts`.
    """
    moved = dict(batch)
    if "box" in batch:
        moved["box"], moved["boxed"] = transform_boxes(batch["box"], batch["sizes"], crop)
    if "parts" in batch:
        points, inside = transform_points(batch["parts"][..., :2], batch["sizes"], crop)
        moved["part_visible"] = batch["parts"][..., 2] > 0
        measured = (moved["part_visible"] & inside)[..., None]
        moved["parts"] = torch.cat([points, measured.to(points)], dim=-1)
    return moved


def measure_batch(model: nn.Module, batch: Records) -> dict[str, Tensor]:
    """Run a model on a batch and keep what metrics need, one row per image.

    Args:
        model: an S3N, or any model that gives B×C logits; in eval mode.
        batch: `image` B×3×H×W, normalized, `label` B and `index` B; optionally what `carry_annotations` adds.

    Returns:
        Tensors of B rows. Always: `index`, `label`, `logits` B×C of the model's answer, and for that, as `answer`, and
        each output of the model `prediction_…` and `top5_…`, the label is among the five best. Of an S3N: `mean`, the
        answer of all its outputs together; with an O branch `entropy`, of its probabilities, and `warped`, the warped
        images that its answer reads; with peaks `peaks`. With boxes: `boxed`; of an S3N `iou_…` and
        `normalized_iou_…` of each branch and, under `joint`, of their sum; `hits`; `object_…` and `background_…`, the
        magnification by each warp. With parts: `part_visible` and `part_measured` B×P; of an S3N `strongest` and
        `weakest`, the part next to that peak or -1; and `part_magnification_…` B×P, 0 for a part that the warped image
        does not show and NaN for one that it shows but that lies less than a pixel from the input's edge.
    """
    image, label = batch["image"], batch["label"]
    seen = model.explain(image) if isinstance(model, S3N) else None
    outputs = {"joint": model(image)} if seen is None else dict(seen.logits._asdict(), mean=mean_answer(seen.logits))
    outputs = {name: logits.float() for name, logits in outputs.items() if logits is not None}
    answer = outputs[model.config.answer if isinstance(model, S3N) else "joint"]
    records = dict(index=batch["index"], label=label, logits=answer)
    for name, logits in dict(outputs, answer=answer).items():
        # a stable order makes the first the same as that of argmax where logits are equal
        best = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
        records[f"prediction_{name}"] = best[:, 0]
        records[f"top5_{name}"] = (best == label[:, None]).any(1)
    records |= {name: batch[name] for name in ("boxed", "part_visible") if name in batch}
    if "parts" in batch:
        records["part_measured"] = batch["parts"][..., 2] > 0
    if seen is None or not isinstance(model, S3N):
        return records
    if "original" in outputs:
        records["entropy"] = torch.special.entr(outputs["original"].softmax(1)).sum(1)
        records["warped"] = torch.full_like(label, len(model.answering))

    size, sample = image.shape[-2:], seen.sample
    grids = {}
    if sample is not None:  # a warped image may have another size than the input, to whose pixels scales refer
        grids = {branch: resize_grid(getattr(sample, branch).grid, size) for branch in model.warped}
    peaks = None if sample is None or model.config.attention != "sparse" else sample.peaks
    if peaks is not None:
        records["peaks"] = peaks.sum((1, 2))
    if "box" in batch:
        box = batch["box"]
        # the class is the model's, also where a branch alone would choose another
        maps = {branch: of_classes for branch, of_classes in seen.maps.items() if branch in outputs}
        located = localization_maps(maps, grids, records["prediction_answer"], size)
        for name, both in located.items():
            for kind, found in zip(("iou", "normalized_iou"), both.unbind(1)):
                records[f"{kind}_{name}"] = box_iou(largest_region_box(found), box)
        for branch, grid in grids.items():
            records[f"object_{branch}"] = box_magnification(grid, box)
            records[f"background_{branch}"] = background_magnification(grid, box)
        if peaks is not None:
            records["hits"], _ = count_hits(peaks, box, size)
    if "parts" in batch:
        parts, points = batch["parts"], batch["parts"][..., :2]
        # a warp that is clamped fills a place of any size with the border's pixels: there a point has no scale
        bounds = points.new_tensor([size[1] - 1, size[0] - 1])
        at_edge = ((points < 1) | (points > bounds)).any(-1)
        for branch, grid in grids.items():
            scales = magnification(grid, points)
            records[f"part_magnification_{branch}"] = scales.masked_fill(at_edge & (scales > 0), math.nan)
        if peaks is not None and sample is not None:
            strongest, weakest = nearest_parts(sample.response, peaks, parts, size)
            records |= dict(strongest=strongest, weakest=weakest)
    return records


# metrics of a split


def as_plain(value: Any) -> Any:
    """Tensors and nested containers as what JSON holds; NaN and infinite numbers as None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarize(
        records: Records,
        part_names: Sequence[str] = (),
        seed: int = 0,
        exit_entropy: float | None = None,
) -> dict[str, Any]:
    """Make the metrics of a split from the rows of its images.

    Args:
        records: rows of `measure_batch`, those of all batches put together.
        part_names: a name for each part.
        seed: of the halves that calibrate each other.
        exit_entropy: threshold of `s3n_timm.early_exit.answer_batch`, whose effect is reported as `early_exit`.

    Returns:
        A nested dict of numbers, lists and None, for a metric that does not exist, in the units of `UNITS`:
        `accuracy`, `calibration`, and where the model and the data have them `early_exit`, `peaks`, `boxes`, `hits`,
        `localization`, `magnification` and `parts`.

    Raises:
        ValueError: there is no image, a logit is not finite, or the model has no O branch to exit from.
    """
    label, logits = records["label"], records["logits"]
    if not len(label):
        raise ValueError("records must hold at least one image.")
    check_finite(logits)
    metrics: dict[str, Any] = dict(accuracy=_accuracy(records), calibration=_calibration(logits, label, seed))
    if exit_entropy is not None:
        metrics["early_exit"] = _early_exit(records, exit_entropy)
    if "peaks" in records:
        metrics["peaks"] = _peaks(records["peaks"])
    if "boxed" in records:
        boxed = records["boxed"]
        metrics["boxes"] = dict(measured=int(boxed.sum()), cropped_away=int((~boxed).sum()))
    if "hits" in records:
        metrics["hits"] = _hits(records)
    if "iou_joint" in records:
        metrics["localization"] = _localization(records)
    magnified = _magnification(records)
    if magnified:
        metrics["magnification"] = magnified
    if "part_measured" in records:
        metrics["parts"] = _parts(records, part_names)
    return as_plain(metrics)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()  # NaN of nothing


def _outputs(records: Records, prefix: str) -> list[str]:
    return [name for name in OUTPUTS if prefix + name in records]


def _accuracy(records: Records) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name in _outputs(records, "prediction_"):
        correct = dict(top1=records[f"prediction_{name}"] == records["label"], top5=records[f"top5_{name}"])
        metrics[name] = {}
        for kind, right in correct.items():
            metrics[name][kind] = 100 * _mean(right)
            metrics[name][f"{kind}_interval"] = [100 * end for end in bootstrap_interval(right)]
    return metrics


def _early_exit(records: Records, exit_entropy: float) -> dict[str, Any]:
    """What early exit predicts, and how often the backbone reads an image on average."""
    if "entropy" not in records:
        raise ValueError("exit_entropy needs an S3N with the O branch.")
    exits, label = records["entropy"] < exit_entropy, records["label"]
    answers = torch.where(exits, records["prediction_original"], records["prediction_answer"])
    return dict(
        exit_entropy=exit_entropy,
        exited=100 * _mean(exits),
        top1=100 * _mean(answers == label),
        top1_without=100 * _mean(records["prediction_answer"] == label),
        passes=1 + _mean(records["warped"] * ~exits),
    )


def cross_calibrate(logits: Tensor, labels: Tensor, seed: int = 0) -> tuple[Tensor, list[float]]:
    """Divide the logits of each half of the images by the temperature fitted on the other half.

    Args:
        logits: B×C.
        labels: B class indices.
        seed: of the division into halves.

    Returns:
        B×C logits, and the temperatures of the first and of the second half.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(labels) < 2:
        raise ValueError(f"Cross-fitting needs two images or more, got {len(labels)}.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    halves = order.tensor_split(2)
    calibrated, temperatures = logits.clone(), []
    for half, other in (halves, halves[::-1]):
        temperatures.append(fit_temperature(logits[other], labels[other]))
        calibrated[half] = logits[half] / temperatures[-1]
    return calibrated, temperatures


def _calibration(logits: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    def errors(scores: Tensor) -> tuple[float, float]:
        return nll(scores, labels).item(), 100 * calibration_error(scores, labels).item()

    loss, error = errors(logits)
    metrics: dict[str, Any] = dict(nll=loss, ece=error, nll_calibrated=None, ece_calibrated=None, temperatures=None)
    if len(labels) > 1:
        calibrated, temperatures = cross_calibrate(logits, labels, seed)
        loss, error = errors(calibrated)
        metrics |= dict(nll_calibrated=loss, ece_calibrated=error, temperatures=temperatures)
    return dict(metrics, method=CALIBRATION)


def _peaks(peaks: Tensor) -> dict[str, Any]:
    return dict(
        mean=_mean(peaks),
        min=int(peaks.min()),
        max=int(peaks.max()),
        images_without=int((peaks == 0).sum()),
        histogram=torch.bincount(peaks),
    )


def _hits(records: Records) -> dict[str, Any]:
    hits, peaks = (records[name][records["boxed"]] for name in ("hits", "peaks"))
    return dict(
        images=int((peaks > 0).sum()),
        rate=100 * hit_rate(hits, peaks),
        mean=_mean(hits),
        histogram=hit_histogram(hits),
    )


def _localization(records: Records) -> dict[str, Any]:
    boxed = records["boxed"]
    correct = (records["prediction_answer"] == records["label"])[boxed]
    metrics: dict[str, Any] = dict(images=int(boxed.sum()))
    for name in _outputs(records, "iou_"):
        metrics[name] = {}
        for kind in ("", "normalized_"):
            iou = records[f"{kind}iou_{name}"][boxed]
            metrics[name][f"{kind}accuracy"] = 100 * localization_accuracy(iou, correct).item()
            metrics[name][f"{kind}iou"] = _mean(iou)
    return metrics


def _spread(values: Tensor) -> dict[str, Any]:
    """Mean and median of the numbers that exist."""
    values = values[~values.isnan()].double()
    median = values.quantile(0.5).item() if len(values) else math.nan
    return dict(mean=_mean(values), median=median, images=len(values))


def _magnification(records: Records) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for kind in ("object", "background"):
        for branch in _outputs(records, f"{kind}_"):
            metrics.setdefault(branch, {})[kind] = _spread(records[f"{kind}_{branch}"][records["boxed"]])
    for branch in _outputs(records, "part_magnification_"):
        scales = records[f"part_magnification_{branch}"].double()
        # NaN for an image without a part to measure
        of_image = scales.where(records["part_measured"], math.nan).nanmean(1)
        metrics.setdefault(branch, {})["parts"] = _spread(of_image)
    return metrics


def _parts(records: Records, names: Sequence[str]) -> dict[str, Any]:
    visible, measured = records["part_visible"], records["part_measured"]
    counted = records["strongest"] >= 0 if "strongest" in records else None
    branches = _outputs(records, "part_magnification_")
    by_name: dict[str, Any] = {}
    for part, name in enumerate(names):
        rows = measured[:, part]
        by_name[name] = dict(measured=int(rows.sum()))
        if counted is not None:
            by_name[name] |= {kind: int((records[kind] == part).sum()) for kind in ("strongest", "weakest")}
        for branch in branches:
            scales = records[f"part_magnification_{branch}"][rows, part]
            by_name[name][branch] = dict(magnification=_spread(scales), not_shown=100 * _mean(scales == 0))
    return dict(
        images=None if counted is None else int(counted.sum()),
        visible=int(visible.sum()),
        hidden=int((~visible).sum()),
        cropped_away=int((visible & ~measured).sum()),
        measured=int(measured.sum()),
        not_shown={
            branch: 100 * _mean(records[f"part_magnification_{branch}"][measured] == 0) for branch in branches
        },
        names=by_name,
    )
