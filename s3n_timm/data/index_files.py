"""Index files: text files of one row a line that list what a data set holds."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_flag(text: str) -> int:
    return ("0", "1").index(text)


def read_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def read_table(
        path: Path, *columns: Callable[[str], Any], num_keys: int = 1, layout: str = "CUB-200-2011",
) -> dict[Any, Any]:
    """Read an index file: one row a line, its values split at spaces and converted column by column.

    Args:
        path: Index file.
        columns: What converts each column; only the last may hold spaces.
        num_keys: Number of columns, from the left, that identify a row.
        layout: Data set whose layout a missing file breaks.

    Returns:
        Identifying value, or tuple of values, to the other value or tuple of values, in the order of the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; data_dir must be in the layout of {layout}.")
    table = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = zip(columns, line.strip().split(maxsplit=len(columns) - 1), strict=True)
            values = tuple(convert(field) for convert, field in fields)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is malformed: {line!r}; correct it.") from error
        key, value = (part[0] if len(part) == 1 else part for part in (values[:num_keys], values[num_keys:]))
        if key in table:
            raise ValueError(f"{path}, line {number} repeats id {key}; remove one of the two lines.")
        table[key] = value
    return table


def read_names(path: Path) -> dict[int, str]:
    """Read an index file of names, each of which must occur once."""
    names = read_table(path, int, str)
    for name, count in Counter(names.values()).items():
        if count > 1:
            raise ValueError(f"{path} lists {name!r} {count} times; names must be unique.")
    return names


def check_ids(path: Path, table: dict[Any, Any], ids: Collection[Any], kind: str) -> None:
    for key in ids:
        if key not in table:
            raise ValueError(f"{path} has no line for {kind} {key}; add it.")
    for key in table:
        if key not in ids:
            raise ValueError(f"{path} has a line for {kind} {key}, which no other index file lists; remove it.")


def check_trained(root: Path, classes: Mapping[Any, str], trained: Collection[Any]) -> None:
    for key, name in classes.items():
        if key not in trained:
            raise ValueError(f"{root} has an empty class: {name!r} has no training image; add one or remove the class.")


def clip_box(box: Sequence[float], size: tuple[int, int], source: str) -> list[float]:
    """Clip a box (x0, y0, x1, y1) to an image (width, height); source says in an error what gives the box."""
    x0, y0, x1, y1 = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"{source} a box that is empty or outside the image; correct it.")
    return [x0, y0, x1, y1]
