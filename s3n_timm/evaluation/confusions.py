"""A picture of what a model confuses (needs the extra "train")."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..extras import needs_extra
from .statistics import confused_pairs, per_class_accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMES = 300  # below bars: more would overlap, and take minutes


def draw_confusions(
        labels: Tensor,
        predictions: Tensor,
        label_names: Sequence[str],
        most: int = 16,
) -> "Figure":
    """Draw each class's accuracy, from the worst to the best, and which classes are predicted in their place.

    Args:
        labels: B class indices.
        predictions: B class indices.
        label_names: a name for each class.
        most: how many classes of the most confused pairs to show, at most.

    Returns:
        A matplotlib figure: bars above, a matrix of counts below, whose colors show the errors alone.

    Raises:
        ValueError: the lengths differ, or an index is out of range.
    """
    with needs_extra("train"):
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
    if len(order) <= MOST_NAMES:
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
    place = labels.new_full((classes,), -1)
    place[shown] = torch.arange(len(shown), device=labels.device)
    rows, columns = place[labels], place[predictions]
    among = (rows >= 0) & (columns >= 0)
    counts = torch.bincount(rows[among] * len(shown) + columns[among], minlength=len(shown) ** 2)
    counts = counts.view(len(shown), len(shown)).cpu()
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
