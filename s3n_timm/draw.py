"""Pictures of what a model sees, after figures 1, 2, 4 and 7 of the paper (needs the extra "train")."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .checkpoints import has_peaks
from .extras import needs_extra
from .heads import evaluating
from .layout import GAP, LARGE, LINE, SMALL, Block, create_tiles, fit_line, name_row, show, write
from .model import S3N, Explanation
from .outputs import S3NLogits, score_classes
from .sampling import BRANCHES, SelectiveSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# after Okabe and Ito, for color-blind readers; text is darker than what is drawn on images
COLORS = {"discriminative": "#e69f00", "complementary": "#56b4e9"}
TEXT_COLORS = {"discriminative": "#a36a00", "complementary": "#1b75ad"}
RIGHT, WRONG, GREY = "#00795a", "#a8327e", "0.4"

WIDTH = 9.0  # of a figure: 900 pixels at 100 dpi
MAX_ASPECT = 1.5  # height to width of a tile: a taller image gets margins at its sides


class _Seen(NamedTuple):
    """What a model sees in one image."""

    pixels: dict[str, Any]  # H×W×3 arrays in [0, 1]: the original, and what each warped branch reads
    sample: SelectiveSample | None
    logits: S3NLogits
    maps: dict[str, Tensor]
    probabilities: Tensor  # C, of the prediction


def overlay(image: Image.Image | np.ndarray, heat: Tensor, alpha: float = 0.5) -> Image.Image:
    """Lay a response map over the image that the model read.

    Args:
        image: RGB image, or H×W×3 array of bytes or of floats in [0, 1].
        heat: h×w map, resized bilinearly; its lowest value is black, its highest yellow.
        alpha: weight of the map's colors, in [0, 1].

    Returns:
        An RGB image of the size of `image`.

    Raises:
        ValueError: a shape is wrong, or `alpha` out of range.

    Example:
        >>> model = S3N("test_resnet", num_classes=3).eval()
        >>> with torch.no_grad():
        ...     seen = model.explain(torch.rand(1, 3, 64, 64))
        >>> overlay(Image.new("RGB", (64, 64)), seen.maps["original"][0, 2]).size
        (64, 64)
    """
    with needs_extra("train"):
        from matplotlib import colormaps

    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or heat.ndim != 2:
        raise ValueError(f"image must be H×W×3 and heat h×w, got {pixels.shape} and {tuple(heat.shape)}.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    pixels = pixels / 255 if pixels.dtype == np.uint8 else pixels
    heat = heat.detach().float().cpu()
    heat = F.interpolate(heat[None, None], pixels.shape[:2], mode="bilinear", align_corners=True)[0, 0]
    span = torch.maximum(heat.max() - heat.min(), 1e-4 * heat.abs().max())  # differences by rounding have no colors
    colors = colormaps["inferno"](((heat - heat.min()) / span.clamp_min(1e-30)).numpy())[..., :3]
    return Image.fromarray((255 * ((1 - alpha) * pixels + alpha * colors)).round().astype(np.uint8))


def draw_explanation(
        model: S3N,
        image: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        label_names: Sequence[str] | None = None,
        explanation: Explanation | None = None,
) -> "Figure":
    """Draw one image as a model sees it in eval mode (figures 1, 2 and 7), in one row per branch.

    The first row shows the input with its peaks, the response in which they were found, and the response map of the
    class that the original branch predicts. The rows of the warped branches show the warp and its peaks on the input,
    the warped image, and the branch's response map on it. The area of a peak is its value: in the first row R, divided
    in the colors of the branches that use it, in the others its weight in that branch.

    Args:
        model: the model.
        image: 3×H×W, normalized; of other numbers of channels the first three are shown, or the first alone.
        mean: of the normalization, one number per channel or one for all, to undo it.
        std: of the normalization.
        label_names: a name for each class.
        explanation: what `model.explain` gave for this image in eval mode, where it is known.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: an argument does not fit the model, or the model has no classes or is no S3N.
    """
    _check_model(model, [image], mean, std, label_names)
    seen = _see(model, image, mean, std, explanation)
    branches = ("original", *model.warped)
    columns = 3 if model.warped else 2  # the original alone has no response
    left = 0.3
    side = (WIDTH - left) / columns - GAP
    figure, blocks = create_tiles((len(branches), 1), (1, columns), side, _aspect([image]), left, top=0.65, head=LINE)

    best, *others = seen.probabilities.argsort(descending=True, stable=True)[:3].tolist()
    heading = _describe(best, seen.probabilities, label_names, WIDTH - 2, LARGE)
    write(figure, WIDTH / 2, 0.28, heading, LARGE, ha="center")
    answer = model.config.answer
    line = "prediction of all outputs together" if answer == "mean" else f"{answer} prediction"
    if others:
        line += ", ahead of " + " and ".join(_describe(i, seen.probabilities, label_names, 2.5) for i in others)
    write(figure, WIDTH / 2, 0.48, line, color=GREY, ha="center")

    original = seen.pixels["original"]
    for branch, block in zip(branches, blocks):
        tiles = block.tiles[0]
        name_row(tiles[0], branch, side * _aspect([image]), TEXT_COLORS.get(branch, GREY))
        if branch == "original":
            show(tiles[0], original, _describe_input(model, seen))
            _draw_all_peaks(tiles[0], model, seen)
            if seen.sample is not None:
                title = "saliency" if model.config.attention == "saliency" else "response R"
                show(tiles[1], overlay(original, seen.sample.response[0]), title)
        else:
            weights, grid = (getattr(getattr(seen.sample, branch), name) for name in ("weights", "grid"))
            title = "warp" if weights is None else "warp and peaks" if weights.any() else "no peaks, so no warp"
            show(tiles[0], original, title)
            _draw_warp(tiles[0], grid[0], original, COLORS[branch])
            if weights is not None:
                _draw_peaks(tiles[0], original, weights[0], {COLORS[branch]: weights[0]})
            show(tiles[1], seen.pixels[branch], f"{branch} image")
        logits = getattr(seen.logits, branch)
        if logits is None:  # under branches="D+C" the original finds the peaks alone
            tiles[-1].remove()
            continue
        probabilities = score_classes(logits, model.config.multi_label)[0].cpu()
        label = int(probabilities.argmax())
        title = _describe(label, probabilities, label_names, side, start="map: ")
        show(tiles[-1], overlay(seen.pixels[branch], seen.maps[branch][0, label]), title)
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
    """Draw a batch, one image per cell: the input with its peaks, the warped images, and the prediction.

    Args:
        model: the model.
        images: B×3×H×W, normalized, or 3×H×W images of any sizes.
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
    branches = ("original", *model.warped)
    columns = min(2, len(images))
    left = 2 * GAP
    side = ((WIDTH - left + GAP) / columns - GAP) / len(branches) - GAP
    head = LINE * (2 if any(titles) else 1) + 0.05
    blocks = math.ceil(len(images) / columns), columns
    figure, cells = create_tiles(blocks, (1, len(branches)), side, _aspect(images), left, top=0.25, head=head)
    names = ("input and peaks" if has_peaks(model) else "input", *model.warped)
    for cell in cells[:columns]:
        for i, (name, branch) in enumerate(zip(names, branches)):
            x = cell.x + i * (side + GAP) + side / 2
            name = fit_line(name, side, weight="bold")
            write(figure, x, 0.2, name, color=TEXT_COLORS.get(branch, GREY), weight="bold", ha="center")
    for cell, image, label, title in zip(cells, images, labels, titles):
        seen = _see(model, image, mean, std)
        _write_prediction(figure, cell, LINE, cell.width, seen, label, label_names)
        write(figure, cell.x, cell.y + 2 * LINE, fit_line(title, cell.width, SMALL - 1), SMALL - 1, color=GREY)
        for tile, branch in zip(cell.tiles[0], branches):
            show(tile, seen.pixels[branch])
        _draw_all_peaks(cell.tiles[0, 0], model, seen)
    for cell in cells[len(images):]:
        for tile in cell.tiles.flat:
            tile.remove()
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
    """Draw how a model's attention to the same images changes in training (figure 4), in one column per checkpoint.

    An image has a row for its response and peaks, below the prediction, and one for each warped image.

    Args:
        models: the model after several epochs, in order.
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
        ValueError: as for `draw_contact_sheet`, or the models differ in their branches, or there is not one per epoch.
    """
    if not models or len(models) != len(epochs):
        raise ValueError(f"There must be one model for each epoch, got {len(models)} and {len(epochs)}.")
    for model in models:
        _check_model(model, images, mean, std, label_names)
    kinds = [model.config.branches for model in models]
    if len(set(kinds)) > 1:
        raise ValueError(f"models must have the same branches, got {', '.join(kinds)}.")
    labels, titles = _check_batch(models[0], images, labels, titles, label_names)
    branches = ("original", *models[0].warped)
    names = ("response" if models[0].warped else "input", *models[0].warped)
    left = 0.3
    side = min(max((WIDTH - left) / len(models) - GAP, 1.2), 2.2)
    head = LINE * (2 if any(titles) else 1) + 0.05
    tiles = len(branches), len(models)
    figure, blocks = create_tiles((len(images), 1), tiles, side, _aspect(images), left, top=0.25, head=head)
    for column, epoch in enumerate(epochs):
        x = left + column * (side + GAP) + side / 2
        write(figure, x, 0.18, fit_line(epoch, side, SMALL + 1, weight="bold"), SMALL + 1, weight="bold", ha="center")
    for block, image, label, title in zip(blocks, images, labels, titles):
        write(figure, left, block.y + LINE, fit_line(title, block.width, SMALL - 1), SMALL - 1, color=GREY)
        for row, (name, branch) in enumerate(zip(names, branches)):
            name_row(block.tiles[row, 0], name, side * _aspect(images), TEXT_COLORS.get(branch, GREY))
        for column, model in enumerate(models):
            seen = _see(model, image, mean, std)
            place = block._replace(x=left + column * (side + GAP))
            _write_prediction(figure, place, head - 0.05, side, seen, label, label_names)
            for tile, branch in zip(block.tiles[:, column], branches):
                response = None if branch != "original" or seen.sample is None else seen.sample.response[0]
                pixels = seen.pixels[branch]
                show(tile, pixels if response is None else overlay(pixels, response))
            _draw_all_peaks(block.tiles[0, column], model, seen)
    return figure


# checks



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
    """A label, or None, for each image, and a line with its title and label."""
    if len(images) == 0:
        raise ValueError("There is no image to draw.")
    labels = [None] * len(images) if labels is None else labels
    titles = [""] * len(images) if titles is None else titles
    if len(labels) != len(images) or len(titles) != len(images):
        raise ValueError(f"{len(images)} images need as many labels and titles, got {len(labels)} and {len(titles)}.")
    for label in labels:
        if label is not None and not 0 <= label < model.num_classes:
            raise ValueError(f"labels must lie in 0 to {model.num_classes - 1}, got {label}.")
    named = ["" if label is None else f"label {_name(label, label_names)}" for label in labels]
    return labels, [", ".join(filter(None, parts)) for parts in zip(titles, named)]


# what is seen


def _see(
        model: S3N,
        image: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        seen: Explanation | None = None,
) -> _Seen:
    if seen is None:
        with evaluating(model.modules()):
            seen = model.explain(image[None].to(next(model.parameters())))

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
        probabilities=score_classes(model.decide(seen.logits), model.config.multi_label)[0].cpu(),
    )


def _aspect(images: Tensor | Sequence[Tensor]) -> float:
    return min(max(image.shape[-2] / image.shape[-1] for image in images), MAX_ASPECT)


# text


def _describe(
        label: int,
        probabilities: Tensor,
        label_names: Sequence[str] | None,
        width: float,
        size: float = SMALL,
        start: str = "",
) -> str:
    """A class with its probability."""
    return fit_line(start + _name(label, label_names), width, size, f" {100 * float(probabilities[label]):.0f} %")


def _name(label: int, label_names: Sequence[str] | None) -> str:
    return f"class {label}" if label_names is None else str(label_names[label])


def _write_prediction(
        figure: "Figure",
        block: Block,
        line: float,
        width: float,
        seen: _Seen,
        label: int | None,
        label_names: Sequence[str] | None,
) -> None:
    prediction = int(seen.probabilities.argmax())
    right = prediction == label
    start, color = ("", "black") if label is None else ("✓ ", RIGHT) if right else ("✗ ", WRONG)
    text = _describe(prediction, seen.probabilities, label_names, width, start=start)
    write(figure, block.x, block.y + line, text, color=color)


def _describe_input(model: S3N, seen: _Seen) -> str:
    if seen.sample is None:
        return "input"
    if model.config.attention != "sparse":
        return "input; dense attention has no peaks"
    count = int(seen.sample.peaks.sum())
    return f"input, {count or 'no'} peak{'s' * (count != 1)}"


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
    """Peaks by their R, divided in the colors of the branches that they go to; grey: to none that the model has."""
    if seen.sample is None or not has_peaks(model):
        return
    parts = {COLORS[branch]: getattr(seen.sample, branch).weights[0] for branch in model.warped}
    if len(parts) < len(BRANCHES):
        parts[GREY] = (seen.sample.peaks[0].float() - sum(parts.values())).clamp_min(0)
    _draw_peaks(ax, seen.pixels["original"], seen.sample.peaks[0] * seen.sample.response[0], parts)


def _draw_peaks(ax: "Axes", image: Any, values: Tensor, parts: dict[str, Tensor]) -> None:
    """Discs whose areas grow with the G×G values in [0, 1], none for 0, divided in colors as their parts say."""
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
