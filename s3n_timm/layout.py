"""Figures of tiles with lines of text above them (needs the extra "train").

Figures are matplotlib's `Figure` objects, made without pyplot, so that no backend is needed. Lengths are in inches,
sizes of text in points.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .extras import needs_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP = 0.1  # between tiles
LINE = 0.17  # from one line of small text to the next
SMALL, LARGE = 8, 13


@cache
def _advance(character: str, weight: str) -> float:
    """Width of a character in ems."""
    with needs_extra("train"):
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(character, FontProperties(size=100, weight=weight), False)
    return width / 100


def fit_line(text: str, width: float, size: float = SMALL, end: str = "", weight: str = "normal") -> str:
    """A line of a text and its end, cut to so many inches and protected from matplotlib's reading of $ as TeX."""
    text = " ".join(text.split())
    # on a screen letters are up to 5 % wider, as their widths are whole pixels
    room = 68 * width / size - sum(_advance(character, weight) for character in end)
    widths = [_advance(character, weight) for character in text[:200]]
    if sum(widths) > room or len(text) > len(widths):
        room -= _advance("…", weight)
        while widths and sum(widths) > room:
            widths.pop()
        text = text[:len(widths)] + "…" * bool(widths)
    return (text + end).strip().replace("$", r"\$")


def write(figure: "Figure", x: float, y: float, text: str, size: float = SMALL, **options: Any) -> None:
    """Write at a place in inches from the upper left corner."""
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - y / height, text, size=size, **options)


class Block(NamedTuple):
    """The tiles of one image below its lines of text."""

    tiles: np.ndarray  # of axes
    x: float  # of the upper left corner, in inches from that of the figure
    y: float
    width: float


def create_tiles(
        blocks: tuple[int, int],
        tiles: tuple[int, int],
        side: float,
        aspect: float,
        left: float,
        top: float,
        head: float,
) -> "tuple[Figure, list[Block]]":
    """A figure with rows and columns of blocks, each of them rows and columns of tiles below a head of that height."""
    with needs_extra("train"):
        from matplotlib.figure import Figure

    tall, gap = side * aspect, GAP / 2
    across = tiles[1] * (side + GAP) - GAP
    down = tiles[0] * (tall + gap) - gap
    width = left + blocks[1] * (across + 2 * GAP) - GAP
    height = top + blocks[0] * (head + down + GAP)
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        *blocks, left=left / width, right=1 - GAP / width, top=1 - (top + head) / height, bottom=GAP / height,
        wspace=2 * GAP / across, hspace=(head + GAP) / down,
    )
    made = []
    for i in range(blocks[0] * blocks[1]):
        inner = grid[i].subgridspec(*tiles, wspace=GAP / side, hspace=gap / tall)
        row, column = divmod(i, blocks[1])
        place = left + column * (across + 2 * GAP), top + row * (head + down + GAP)
        made.append(Block(inner.subplots(squeeze=False), *place, across))
        for ax in made[-1].tiles.flat:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_anchor("N")  # below its text
            ax.spines[:].set_visible(False)
    return figure, made


def name_row(ax: "Axes", name: str, length: float, color: str) -> None:
    """A name left of a row of tiles, or its initial where the row is too low."""
    text = name if fit_line(name, length, SMALL + 1, weight="bold") == name else name[0].upper()
    ax.set_ylabel(text, size=SMALL + 1, color=color, weight="bold")


def show(ax: "Axes", image: Any, title: str = "") -> None:
    ax.imshow(image)
    ax.autoscale(False)  # what is drawn on it does not shrink it
    ax.set_title(title, size=SMALL, pad=3)
