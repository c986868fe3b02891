"""Results of an evaluation as rows of text, for the terminal and for the model card."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

INITIALS = dict(discriminative="D", complementary="C")


class ResultTable(NamedTuple):
    """A table of text; a cell that was not measured is None."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str | None, ...]]


def result_tables(measures: Mapping[str, Any]) -> dict[str, ResultTable]:
    """Tables of the metrics of a split.

    Args:
        measures: what `summarize` or `summarize_labels` returned, or `measures` of the results.json of
            examples/evaluate.py.

    Returns:
        Tables by name, in the order in which they are read: `accuracy`, `metrics` and, where they were measured,
        `localization`, `faithfulness`, `early_exit`, `magnification` and `parts`. Where images have several labels,
        `precision` and `classes`.
    """
    if "mean_average_precision" in measures:
        return dict(precision=_precision(measures["mean_average_precision"]), classes=_classes(measures["classes"]))
    tables = dict(accuracy=_accuracy(measures["accuracy"]), metrics=_metrics(measures))
    makers = dict(
        localization=_localization,
        faithfulness=_faithfulness,
        early_exit=_early_exit,
        magnification=_magnification,
    )
    tables |= {name: make(measures[name]) for name, make in makers.items() if name in measures}
    if "parts" in measures and (measures["parts"]["images"] is not None or measures["parts"]["not_shown"]):
        tables["parts"] = _parts(measures["parts"])
    return tables


def _number(value: float | None, digits: int = 1) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _accuracy(outputs: Mapping[str, Any]) -> ResultTable:
    rows: list[tuple[str | None, ...]] = []
    for name, metrics in outputs.items():
        intervals = (metrics[f"{kind}_interval"] for kind in ("top1", "top5"))
        rows.append((name, *(f"{metrics[kind]:.1f} ({low:.1f}–{high:.1f})"
                             for kind, (low, high) in zip(("top1", "top5"), intervals))))
    return ResultTable("Accuracy, % with 95 % interval", ("output", "top-1 %", "top-5 %"), rows)


def _precision(outputs: Mapping[str, Any]) -> ResultTable:
    rows = [(name, _number(each)) for name, each in outputs.items()]
    return ResultTable("Mean average precision, %", ("output", "mAP"), list(rows))


def _classes(classes: Sequence[Mapping[str, Any]]) -> ResultTable:
    kinds = ("average_precision", "precision", "recall", "f1")
    return ResultTable("Classes, %; precision, recall and F1 at probability ½",
                       ("class", "images", "average precision", "precision", "recall", "F1"),
                       [(row["name"], str(row["images"]), *(_number(row[kind]) for kind in kinds)) for row in classes])


def _metrics(measures: Mapping[str, Any]) -> ResultTable:
    calibration, peaks, hits = (measures.get(name, {}) for name in ("calibration", "peaks", "hits"))
    rows = [
        ("negative log likelihood, nats", _number(calibration["nll"], 3)),
        ("negative log likelihood, calibrated", _number(calibration["nll_calibrated"], 3)),
        ("expected calibration error, %", _number(calibration["ece"])),
        ("expected calibration error, calibrated", _number(calibration["ece_calibrated"])),
        ("peaks per image", _number(peaks.get("mean"))),
    ]
    if peaks:
        rows += [
            ("fewest and most peaks of an image", f"{peaks['min']}, {peaks['max']}"),
            ("images without a peak", str(peaks["images_without"])),
        ]
    rows.append(("hit rate, % (paper's table 1)", _number(hits.get("rate"))))
    if hits:
        rows += [
            ("hits per image", _number(hits["mean"])),
            ("images with 0, 1, 2, … hits (figure 5)", " ".join(map(str, hits["histogram"]))),
        ]
    return ResultTable("Calibration and peaks", ("metric", "value"), list(rows))


def _localization(measured: Mapping[str, Any]) -> ResultTable:
    keys = (("accuracy", 1), ("iou", 3), ("normalized_accuracy", 1), ("normalized_iou", 3))
    rows = []
    for name, metrics in measured.items():
        if name != "images":
            rows.append((_map_name(name), *(_number(metrics[key], digits) for key, digits in keys)))
    header = ("response map of the predicted class", "accuracy %", "mean IoU", "normalized: accuracy %", "mean IoU")
    return ResultTable("Localization, IoU ≥ 0.5 (paper's table 2)", header, rows)


def _map_name(name: str) -> str:
    return "sum of all maps" if name == "joint" else f"{name} map"


def _faithfulness(measured: Mapping[str, Any]) -> ResultTable:
    keys = ("deletion", "random_deletion", "insertion", "random_insertion")
    rows = [(_map_name(name), *(_number(areas[key], 3) for key in keys)) for name, areas in measured["maps"].items()]
    header = ("response map of the predicted class", "deletion ↓", "random map", "insertion ↑", "random map")
    title = f"Faithfulness: area under the class probability (RISE), {measured['images']} images"
    return ResultTable(title, header, list(rows))


def _early_exit(metrics: Mapping[str, Any]) -> ResultTable:
    rows = [
        ("exit entropy, nats", _number(metrics["exit_entropy"], 4)),
        ("images that exit, %", _number(metrics["exited"])),
        ("backbone passes per image", _number(metrics["passes"], 2)),
        ("top-1 %", _number(metrics["top1"])),
        ("top-1 % without early exit", _number(metrics["top1_without"])),
    ]
    return ResultTable("Early exit: confident images use the original branch alone", ("metric", "value"), list(rows))


def _magnification(branches: Mapping[str, Any]) -> ResultTable:
    rows = []
    for kind in ("object", "background", "parts"):
        spreads = [metrics[kind] for metrics in branches.values() if kind in metrics]
        if spreads:
            rows.append((kind, *(_number(spread[each], 2) for spread in spreads for each in ("mean", "median"))))
    header = ("of", *(f"{INITIALS[branch]} {each}" for branch in branches for each in ("mean", "median")))
    return ResultTable("Magnification, × by area", header, rows)


def _parts(parts: Mapping[str, Any]) -> ResultTable:
    branches = list(parts["not_shown"])
    extremes = ("strongest", "weakest") if parts["images"] is not None else ()
    rows = []
    for name, metrics in parts["names"].items():
        scales = (_number(metrics[branch]["magnification"]["median"], 2) for branch in branches)
        hidden = (_number(metrics[branch]["not_shown"]) for branch in branches)
        rows.append((name, *(str(metrics[kind]) for kind in extremes), *scales, *hidden))
    blank = [""] * (len(extremes) + len(branches))
    rows.append(("all", *blank, *(_number(parts["not_shown"][branch]) for branch in branches)))
    header = (
        "part",
        *extremes,
        *(f"{INITIALS[branch]} median ×" for branch in branches),
        *(f"{INITIALS[branch]} not shown %" for branch in branches),
    )
    return ResultTable("Parts next to the strongest and weakest peak, and their magnification (figure 6)", header, rows)
