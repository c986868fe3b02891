"""Pictures of what a model sees, after figures 1, 2 and 7 of the paper, and of what it confuses (needs matplotlib)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .evaluation import confused_pairs, per_class_accuracy
from .model import S3N
from .sampling import BRANCHES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"discriminative": "tab:orange", "complementary": "tab:blue"}


def draw_explanation(
        model: S3N,
        image: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        label_names: Sequence[str] | None = None,
) -> "Figure":
    """Draw one image as a model with all three branches sees it in eval mode.

    One row a branch: the original with the gated response, and for each warped branch the input with its peaks and
    warp, the warped image, and the branch's response map of the class that it predicts.

    Args:
        model: the model.
        image: 3×H×W, normalised.
        mean: of the normalisation, to undo it.
        std: of the normalisation.
        label_names: a name for each class.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: `image` is not 3×H×W, or the model lacks a branch.
    """
    from matplotlib.figure import Figure

    if image.ndim != 3:
        raise ValueError(f"image must be 3×H×W, got {image.ndim} dimensions.")
    if model.branches != "O+D+C":
        raise ValueError(f"draw_explanation needs a model with all branches, this one has {model.branches}.")
    training = model.training
    seen = model.eval().explain(image[None])
    model.train(training)
    sample = seen.sample
    assert sample is not None

    def pixels(x: Tensor) -> Any:
        scale, offset = torch.tensor(std, device=x.device), torch.tensor(mean, device=x.device)
        return (x[0].permute(1, 2, 0).float() * scale + offset).clamp(0, 1).cpu().numpy()

    def title(logits: Tensor | None) -> str:
        assert logits is not None
        probability, index = logits[0].softmax(0).max(0)
        name = label_names[int(index)] if label_names else f"class {int(index)}"
        return f"{name} {100 * float(probability):.0f} %"

    original = pixels(image[None])
    figure = Figure(figsize=(9, 9.6), layout="constrained")
    figure.suptitle(f"joint: {title(seen.logits.joint)}")
    axes = figure.subplots(3, 3)
    for ax in axes.flat:
        ax.set_axis_off()

    axes[0, 0].imshow(original)
    count = int(sample.peaks.sum())
    axes[0, 0].set_title(f"input, {count} peak{'s' * (count != 1)}", fontsize="small")
    _overlay(axes[0, 1], original, sample.response[0])
    axes[0, 1].set_title("response R", fontsize="small")
    _overlay(axes[0, 2], original, _top_map(seen.maps["original"], seen.logits.original))
    axes[0, 2].set_title("original: " + title(seen.logits.original), fontsize="small")
    for row, branch in enumerate(BRANCHES, 1):
        warped = pixels(getattr(sample, branch))
        logits = getattr(seen.logits, branch)
        axes[row, 0].imshow(original)
        _draw_warp(axes[row, 0], getattr(sample, f"grid_{branch}")[0], COLORS[branch])
        _draw_peaks(axes[row, 0], sample.response[0], getattr(sample, f"weights_{branch}"), original, COLORS[branch])
        axes[row, 0].set_title(f"{branch} peaks and warp", fontsize="small")
        axes[row, 1].imshow(warped)
        axes[row, 1].set_title(f"{branch} image", fontsize="small")
        _overlay(axes[row, 2], warped, _top_map(seen.maps[branch], logits))
        axes[row, 2].set_title(f"{branch}: {title(logits)}", fontsize="small")
    return figure


def _top_map(maps: Tensor, logits: Tensor | None) -> Tensor:
    assert logits is not None
    return maps[0, logits[0].argmax()]


def _overlay(ax: "Axes", image: Any, heat: Tensor) -> None:
    heat = F.interpolate(heat[None, None].float(), image.shape[:2], mode="bilinear", align_corners=True)[0, 0]
    ax.imshow(image)
    ax.imshow(heat.cpu().numpy(), cmap="inferno", alpha=0.5)


def _draw_warp(ax: "Axes", grid: Tensor, color: str, lines: int = 25) -> None:
    """Where evenly spaced rows and columns of the warped image are read from: dense where it magnifies."""
    rows, columns = grid.shape[:2]
    x = ((grid[..., 0] + 1) / 2 * (columns - 1)).cpu().numpy()
    y = ((grid[..., 1] + 1) / 2 * (rows - 1)).cpu().numpy()
    for i in torch.linspace(0, rows - 1, lines).long().tolist():
        ax.plot(x[i], y[i], color=color, linewidth=0.5)
    for j in torch.linspace(0, columns - 1, lines).long().tolist():
        ax.plot(x[:, j], y[:, j], color=color, linewidth=0.5)


def _draw_peaks(ax: "Axes", response: Tensor, weights: Tensor | None, image: Any, color: str) -> None:
    if weights is None:
        return
    height, width = image.shape[:2]
    rows, columns = response.shape
    y, x = weights[0].nonzero(as_tuple=True)
    value = weights[0][y, x].cpu()
    ax.scatter(
        (x.cpu() * (width - 1) / (columns - 1)).numpy(),
        (y.cpu() * (height - 1) / (rows - 1)).numpy(),
        s=(20 + 180 * value / value.max().clamp_min(1e-6)).numpy() if len(value) else 20,
        color=color,
        edgecolors="white",
    )


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
    names = [name if len(name) <= 30 else f"{name[:29]}…" for name in label_names]
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
