"""Pictures of what a model sees, after figures 1, 2, 4 and 7 of the paper, and of what it confuses (needs matplotlib).

Places and sizes in figures are inches from the upper left corner, those of text are points.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .evaluation import confused_pairs, per_class_accuracy
from .model import S3N
from .outputs import S3NLogits
from .sampling import BRANCHES, SelectiveSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# after Okabe and Ito: colour-blind people tell them apart; text is darker than what is drawn on images
COLORS = {"discriminative": "#e69f00", "complementary": "#56b4e9"}
TEXT_COLORS = {"discriminative": "#a36a00", "complementary": "#1b75ad"}
RIGHT, WRONG, GREY = "#00795a", "#a8327e", "0.4"

WIDTH = 9.0  # of a figure: 900 pixels at 100 dpi
GAP = 0.1
LINE = 0.17  # from one line of small text to the next
SMALL, LARGE = 8, 13
MAX_ASPECT = 1.5  # height to width of a tile: a taller image gets margins at its sides


class _Seen(NamedTuple):
    """What a model sees in one image."""

    pixels: dict[str, Any]  # H×W×3 arrays in [0, 1]: the original, and what each warped branch reads
    sample: SelectiveSample | None
    logits: S3NLogits
    maps: dict[str, Tensor]
    chances: Tensor  # C probabilities of the prediction


def draw_explanation(
        model: S3N,
        image: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        label_names: Sequence[str] | None = None,
) -> "Figure":
    """Draw one image as a model sees it in eval mode (figures 1, 2 and 7): a row for each branch that it has.

    The first row shows the input with its peaks, the response that they were found in, and the response map of the
    class that the original branch predicts. Those of the warped branches show the warp and its peaks on the input, the
    warped image, and the branch's response map on it. The area of a peak is its value: in the first row R, divided in
    the colours of the branches that it goes to, in the others its weight in that branch.

    Args:
        model: the model.
        image: 3×H×W, normalised; of other numbers of channels the first three are shown, or the first alone.
        mean: of the normalisation, a number a channel or one for all, to undo it.
        std: of the normalisation.
        label_names: a name for each class.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: an argument does not fit the model, or the model has no classes or is no S3N.
    """
    _check_model(model, [image], mean, std, label_names)
    seen = _see(model, image, mean, std)
    branches = ("original", *model.warped)
    left, top = 0.3, 0.65
    columns = 3 if model.warped else 2  # the original alone has no response
    side = (WIDTH - left - columns * GAP) / columns
    tall = side * _aspect([image])
    step = LINE + tall + GAP
    figure = _create_figure(WIDTH, top + len(branches) * step)

    first, *others = seen.chances.argsort(descending=True, stable=True)[:3].tolist()
    _write(figure, WIDTH / 2, 0.28, _say(first, seen.chances, label_names, WIDTH - 2, LARGE), LARGE, ha="center")
    line = "prediction of all outputs together" if model.config.answer == "mean" else f"{model.config.answer} prediction"
    if others:
        line += ", ahead of " + " and ".join(_say(label, seen.chances, label_names, 2.5) for label in others)
    _write(figure, WIDTH / 2, 0.48, line, color=GREY, ha="center")

    for row, branch in enumerate(branches):
        y = top + row * step + LINE
        _write_row_name(figure, left / 2, y, tall, branch, branch)
        places = [(left + column * (side + GAP), y, side, tall) for column in range(columns)]
        logits, original = getattr(seen.logits, branch), seen.pixels["original"]
        if branch == "original":
            ax = _add_tile(figure, *places[0], _describe_input(model, seen))
            _show(ax, original)
            _draw_all_peaks(ax, model, seen)
            if seen.sample is not None:
                ax = _add_tile(figure, *places[1], "saliency" if model.config.attention == "saliency" else "response R")
                _overlay(ax, original, seen.sample.response[0])
        else:
            weights = getattr(seen.sample, branch).weights
            title = "warp" if weights is None else "warp and peaks" if weights.any() else "no peaks, so no warp"
            ax = _add_tile(figure, *places[0], title)
            _show(ax, original)
            _draw_warp(ax, getattr(seen.sample, branch).grid[0], original, COLORS[branch])
            if weights is not None:
                _draw_peaks(ax, original, weights[0], {COLORS[branch]: weights[0]})
            _show(_add_tile(figure, *places[1], f"{branch} image"), seen.pixels[branch])
        if logits is not None:  # under branches="D+C" the first pass finds the peaks alone
            chances = logits[0].float().softmax(0).cpu()
            label = int(chances.argmax())
            ax = _add_tile(figure, *places[-1], _say(label, chances, label_names, side, start="map: "))
            _overlay(ax, seen.pixels[branch], seen.maps[branch][0, label])
    return figure


def draw_contact_sheet(
        model: S3N,
        images: Tensor | Sequence[Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        label_names: Sequence[str] | None = None,
        labels: Sequence[int | None] | None = None,
        titles: Sequence[str] | None = None,
) -> "Figure":
    """Draw a batch, an image a cell: the input with its peaks, the warped images, and the prediction.

    Args:
        model: the model.
        images: B×3×H×W, normalised, or 3×H×W images of any sizes.
        mean: as for `draw_explanation`.
        std: as for `draw_explanation`.
        label_names: a name for each class.
        labels: B class indices, None where unknown; predictions are then marked ✓ and green, or ✗ and purple.
        titles: B lines to write above the images, such as file names.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: as for `draw_explanation`, or there are no images, or not one label and title for each.
    """
    _check_model(model, images, mean, std, label_names)
    labels, titles = _check_batch(model, images, labels, titles, label_names)
    has_peaks = model.config.attention == "sparse" and len(model.warped) > 0
    columns = min(2, len(images))
    branches = ("original", *model.warped)
    width = (WIDTH - GAP) / columns - 2 * GAP
    side = (width - (len(branches) - 1) * GAP / 2) / len(branches)
    tall = side * _aspect(images)
    top, head = 0.3, LINE * (2 if any(titles) else 1) + 0.05
    step = head + tall + 1.5 * GAP
    figure = _create_figure(WIDTH, top + math.ceil(len(images) / columns) * step)
    for i, (image, label, title) in enumerate(zip(images, labels, titles)):
        seen = _see(model, image, mean, std)
        x, y = 1.5 * GAP + i % columns * (width + 2 * GAP), top + i // columns * step
        _write_prediction(figure, x, y + LINE, width, seen.chances, label, label_names)
        if title:
            _write(figure, x, y + 2 * LINE, _fit(title, width, SMALL - 1), SMALL - 1, GREY)
        for tile, branch in enumerate(branches):
            place = x + tile * (side + GAP / 2)
            if i < columns:
                name = branch if branch != "original" else "input and peaks" if has_peaks else "input"
                _write(figure, place + side / 2, 0.2, name, SMALL, TEXT_COLORS.get(branch, GREY), "bold", ha="center")
            ax = _add_tile(figure, place, y + head, side, tall)
            _show(ax, seen.pixels[branch])
            if branch == "original":
                _draw_all_peaks(ax, model, seen)
    return figure


def draw_epochs(
        models: Sequence[S3N],
        epochs: Sequence[str],
        images: Tensor | Sequence[Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        label_names: Sequence[str] | None = None,
        labels: Sequence[int | None] | None = None,
        titles: Sequence[str] | None = None,
) -> "Figure":
    """Draw how a model's attention to the same images changes in training (figure 4): a column a checkpoint.

    An image has a row for its response and peaks, below the prediction, and one for each warped image.

    Args:
        models: the model as several epochs left it, in order.
        epochs: what to write above the column of each.
        images: as for `draw_contact_sheet`.
        mean: as for `draw_explanation`.
        std: as for `draw_explanation`.
        label_names: a name for each class.
        labels: as for `draw_contact_sheet`.
        titles: as for `draw_contact_sheet`.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: as for `draw_contact_sheet`, or the models differ in their branches, or are not one an epoch.
    """
    if not models or len(models) != len(epochs):
        raise ValueError(f"models must be one for each of the epochs, got {len(models)} and {len(epochs)}.")
    for model in models:
        _check_model(model, images, mean, std, label_names)
    if len({model.config.branches for model in models}) > 1:
        raise ValueError(f"models must have the same branches, got {', '.join(model.config.branches for model in models)}.")
    labels, titles = _check_batch(models[0], images, labels, titles, label_names)
    branches = ("original", *models[0].warped)
    left, top = 0.3, 0.25
    side = min(max((WIDTH - left) / len(models) - GAP, 1.2), 2.2)
    tall = side * _aspect(images)
    head = LINE * (2 if any(titles) else 1) + 0.05
    step = head + len(branches) * (tall + GAP / 2) + 1.5 * GAP
    width = left + len(models) * (side + GAP)
    figure = _create_figure(width, top + len(images) * step)
    for column, epoch in enumerate(epochs):
        x = left + (column + 0.5) * (side + GAP) - GAP / 2
        _write(figure, x, 0.18, _fit(epoch, side, SMALL + 1, weight="bold"), SMALL + 1, weight="bold", ha="center")
    for i, (image, label, title) in enumerate(zip(images, labels, titles)):
        y = top + i * step
        if title:
            _write(figure, left, y + LINE, _fit(title, width - left, SMALL - 1), SMALL - 1, GREY)
        for row, branch in enumerate(branches):
            name = branch if branch != "original" else "response" if models[0].warped else "input"
            _write_row_name(figure, left / 2, y + head + row * (tall + GAP / 2), tall, name, branch)
        for column, model in enumerate(models):
            seen = _see(model, image, mean, std)
            x = left + column * (side + GAP)
            _write_prediction(figure, x, y + head - 0.05, side, seen.chances, label, label_names)
            for row, branch in enumerate(branches):
                ax = _add_tile(figure, x, y + head + row * (tall + GAP / 2), side, tall)
                if branch == "original" and seen.sample is not None:
                    _overlay(ax, seen.pixels[branch], seen.sample.response[0])
                    _draw_all_peaks(ax, model, seen)
                else:
                    _show(ax, seen.pixels[branch])
    return figure


# what is checked


def _check_model(
        model: S3N,
        images: Tensor | Sequence[Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        label_names: Sequence[str] | None,
) -> None:
    if not isinstance(model, S3N):
        raise ValueError(f"Pictures need an S3N model, got {type(model).__name__}, which has no peaks and no warps.")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"label_names has {len(label_names)} names for {model.num_classes} classes.")
    for image in images:
        if image.ndim != 3 or len(image) != model.in_chans:
            raise ValueError(f"An image must be {model.in_chans}×H×W for this model, got {tuple(image.shape)}.")
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) not in (1, model.in_chans):
            raise ValueError(f"{name} must have a number for each of {model.in_chans} channels, got {len(numbers)}.")


def _check_batch(
        model: S3N,
        images: Tensor | Sequence[Tensor],
        labels: Sequence[int | None] | None,
        titles: Sequence[str] | None,
        label_names: Sequence[str] | None,
) -> tuple[Sequence[int | None], list[str]]:
    """A label, or None, for each image, and a line that says its title and label."""
    if len(images) == 0:
        raise ValueError("There is no image to draw.")
    labels = [None] * len(images) if labels is None else labels
    titles = [""] * len(images) if titles is None else titles
    if len(labels) != len(images) or len(titles) != len(images):
        raise ValueError(f"{len(images)} images need as many labels and titles, got {len(labels)} and {len(titles)}.")
    for label in labels:
        if label is not None and not 0 <= label < model.num_classes:
            raise ValueError(f"labels must lie in 0 to {model.num_classes - 1}, got {label}.")
    said = ["" if label is None else f"label {_name(label, label_names)}" for label in labels]
    return labels, [", ".join(filter(None, parts)) for parts in zip(titles, said)]


# what is seen


def _see(model: S3N, image: Tensor, mean: Sequence[float], std: Sequence[float]) -> _Seen:
    training = model.training
    model.eval()
    try:
        seen = model.explain(image[None].to(next(model.parameters())))
    finally:
        model.train(training)

    def pixels(x: Tensor) -> Any:
        x = x[0].permute(1, 2, 0).float().cpu() * torch.tensor(std) + torch.tensor(mean)
        return (x[..., :3] if x.shape[-1] >= 3 else x[..., :1].expand(-1, -1, 3)).clamp(0, 1).numpy()

    return _Seen(
        pixels={
            "original": pixels(image[None]),
            **{name: pixels(getattr(seen.sample, name).image) for name in model.warped},
        },
        sample=seen.sample,
        logits=seen.logits,
        maps=seen.maps,
        chances=model.decide(seen.logits)[0].float().softmax(0).cpu(),
    )


def _aspect(images: Tensor | Sequence[Tensor]) -> float:
    return min(max(image.shape[-2] / image.shape[-1] for image in images), MAX_ASPECT)


# what is written


def _fit(text: str, width: float, size: float = SMALL, end: str = "", weight: str = "normal") -> str:
    """One line of a text and its end, cut to so many inches and protected from matplotlib's reading of $ as TeX."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    text, font = " ".join(text.split()), FontProperties(size=size, weight=weight)
    for length in range(min(len(text), 200), 0, -1):
        line = text[:length] + "…" * (length < len(text)) + end
        # on a screen letters are up to 5 % wider, as their widths are whole pixels
        if text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] <= 68 * width:
            return line.replace("$", r"\$")
    return end.strip()


def _say(
        label: int,
        chances: Tensor,
        label_names: Sequence[str] | None,
        width: float,
        size: float = SMALL,
        start: str = "",
) -> str:
    """A class with its probability."""
    return _fit(start + _name(label, label_names), width, size, f" {100 * float(chances[label]):.0f} %")


def _name(label: int, label_names: Sequence[str] | None) -> str:
    return f"class {label}" if label_names is None else str(label_names[label])


def _write(
        figure: "Figure",
        x: float,
        y: float,
        text: str,
        size: float = SMALL,
        color: str = "black",
        weight: str = "normal",
        **kwargs: Any,
) -> None:
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - y / height, text, size=size, color=color, weight=weight, **kwargs)


def _write_row_name(figure: "Figure", x: float, y: float, tall: float, name: str, branch: str) -> None:
    """A name beside a row that is so tall, or its initial where the row is too low."""
    size = SMALL + 1
    text = name if _fit(name, tall, size, weight="bold") == name else name[0].upper()
    color = TEXT_COLORS.get(branch, GREY)
    _write(figure, x, y + tall / 2, text, size, color, "bold", ha="center", va="center", rotation=90)


def _write_prediction(
        figure: "Figure",
        x: float,
        y: float,
        width: float,
        chances: Tensor,
        label: int | None,
        label_names: Sequence[str] | None,
) -> None:
    prediction = int(chances.argmax())
    right = prediction == label
    start, color = ("", "black") if label is None else ("✓ ", RIGHT) if right else ("✗ ", WRONG)
    _write(figure, x, y, _say(prediction, chances, label_names, width, start=start), color=color)


# what is drawn


def _create_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _add_tile(figure: "Figure", x: float, y: float, side: float, tall: float, title: str = "") -> "Axes":
    width, height = figure.get_size_inches()
    ax = figure.add_axes((x / width, 1 - (y + tall) / height, side / width, tall / height))
    ax.set_axis_off()
    ax.set_title(title, size=SMALL, pad=3)
    return ax


def _describe_input(model: S3N, seen: _Seen) -> str:
    if seen.sample is None:
        return "input"
    if model.config.attention != "sparse":
        return "input; dense attention has no peaks"
    count = int(seen.sample.peaks.sum())
    return f"input, {count or 'no'} peak{'s' * (count != 1)}"


def _show(ax: "Axes", image: Any) -> None:
    ax.imshow(image)
    ax.autoscale(False)  # what is drawn on it does not shrink it


def _overlay(ax: "Axes", image: Any, heat: Tensor) -> None:
    heat = F.interpolate(heat[None, None].float(), image.shape[:2], mode="bilinear", align_corners=True)[0, 0].cpu()
    low, high = heat.min(), torch.maximum(heat.max(), heat.min() + 1e-4 * heat.abs().max())  # rounding has no colours
    _show(ax, image)
    ax.imshow(heat.numpy(), cmap="inferno", vmin=float(low), vmax=float(high), alpha=0.5)


def _draw_warp(ax: "Axes", grid: Tensor, image: Any, color: str, lines: int = 25) -> None:
    """Where evenly spaced rows and columns of the warped image are read from: dense where it magnifies."""
    rows, columns = grid.shape[:2]
    height, width = image.shape[:2]  # of what the grid reads, which need not have the grid's own size
    x = ((grid[..., 0] + 1) / 2 * (width - 1)).cpu().numpy()
    y = ((grid[..., 1] + 1) / 2 * (height - 1)).cpu().numpy()
    longer = max(height, width)
    for i in torch.linspace(0, rows - 1, max(2, lines * height // longer)).long().tolist():
        ax.plot(x[i], y[i], color=color, linewidth=0.7)
    for j in torch.linspace(0, columns - 1, max(2, lines * width // longer)).long().tolist():
        ax.plot(x[:, j], y[:, j], color=color, linewidth=0.7)


def _draw_all_peaks(ax: "Axes", model: S3N, seen: _Seen) -> None:
    """Peaks by their R, divided in the colours of the branches that they go to; grey: to none that the model has."""
    if seen.sample is None or model.config.attention != "sparse":
        return
    parts = {COLORS[branch]: getattr(seen.sample, branch).weights[0] for branch in model.warped}
    if len(parts) < len(BRANCHES):
        parts[GREY] = (seen.sample.peaks[0].float() - sum(parts.values())).clamp_min(0)
    _draw_peaks(ax, seen.pixels["original"], seen.sample.peaks[0] * seen.sample.response[0], parts)


def _draw_peaks(ax: "Axes", image: Any, values: Tensor, parts: dict[str, Tensor]) -> None:
    """Discs whose areas grow with the G×G values in [0, 1], none for 0, divided in colours as their parts say."""
    from matplotlib.patches import Circle, Wedge

    height, width = image.shape[:2]
    rows, columns = values.shape
    style: dict[str, Any] = dict(linewidth=0, zorder=3)
    for row, column in values.nonzero().tolist():
        place = (column * (width - 1) / (columns - 1), row * (height - 1) / (rows - 1))
        radius = 0.035 * max(height, width) * math.sqrt(0.2 + 0.8 * float(values[row, column]))
        ax.add_patch(Circle(place, 1.25 * radius, color="white", **style))
        ax.add_patch(Circle(place, radius, color=GREY, **style))
        total, angle = sum(float(part[row, column]) for part in parts.values()), 90.0
        for color, part in parts.items():
            share = float(part[row, column])
            if share:
                ax.add_patch(Wedge(place, radius, angle - 360 * share / total, angle, color=color, **style))
                angle -= 360 * share / total


def draw_confusions(
        labels: Tensor,
        predictions: Tensor,
        label_names: Sequence[str],
        most: int = 16,
) -> "Figure":
    """Draw each class's accuracy, from the worst to the best, and what the classes most confused are taken for.

    Args:
        labels: B class indices.
        predictions: B class indices.
        label_names: a name for each class.
        most: how many classes of the most confused pairs to show, at most.

    Returns:
        A matplotlib figure: bars above, a matrix of counts below, its colours telling the errors alone.

    Raises:
        ValueError: the lengths differ, or an index is out of range.
    """
    from matplotlib.figure import Figure

    classes = len(label_names)
    names = [(name if len(name) <= 30 else f"{name[:29]}…").replace("$", r"\$") for name in label_names]
    accuracy = 100 * per_class_accuracy(labels, predictions, classes)
    order = [label for label in accuracy.argsort(stable=True).tolist() if not accuracy[label].isnan()]
    pairs = confused_pairs(labels, predictions, classes, k=classes * classes)[:, :2].flatten().tolist()
    shown = sorted(list(dict.fromkeys(pairs))[:most])

    width = min(max(9.0, 2 + 0.11 * len(order)), 24.0)
    figure = Figure(figsize=(width, 11), layout="constrained")
    bars, matrix = figure.subplots(2, 1, height_ratios=(2, 3))
    bars.bar(range(len(order)), accuracy[order].tolist(), color="tab:blue")
    bars.set_xticks(range(len(order)), [names[label] for label in order], rotation=90, fontsize=7)
    bars.set_xlim(-0.6, len(order) - 0.4)
    bars.set_ylim(0, 100)
    mean = 100 * float((labels == predictions).float().mean())
    bars.axhline(mean, color="tab:orange")
    bars.set_ylabel("accuracy %")
    bars.set_title(f"accuracy of the {len(order)} classes, from the worst to the best; all images: {mean:.1f} % (line)")

    if not shown:
        matrix.set_axis_off()
        matrix.set_title("no class is taken for another")
        return figure
    counts = torch.bincount(labels * classes + predictions, minlength=classes * classes).view(classes, classes)
    counts = counts[shown][:, shown].cpu()
    errors = counts.clone().fill_diagonal_(0)
    matrix.imshow(errors.numpy(), cmap="Oranges", vmin=0, vmax=max(1, int(errors.max())))
    for row, column in counts.nonzero().tolist():
        dark = row != column and errors[row, column] > 0.6 * errors.max()
        color = "tab:blue" if row == column else "white" if dark else "black"
        text = str(int(counts[row, column]))
        matrix.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    matrix.set_xticks(range(len(shown)), [names[label] for label in shown], rotation=90, fontsize=8)
    matrix.set_yticks(range(len(shown)), [names[label] for label in shown], fontsize=8)
    matrix.set_xlabel("prediction")
    matrix.set_ylabel("label")
    matrix.set_title("images of the classes most confused; the right answers in blue")
    return figure
