"""Folders of images with any number of labels each, which a CSV file beside them lists."""

import csv
import re
from pathlib import Path

import datasets

from ..images import find_images, printable
from .folder import FOLDER_SPLITS, folder_splits
from .schema import check_image_files, check_split, data_folder

METADATA = "metadata.csv"
SEPARATOR = "|"


def multi_label_folder(data_dir: str | Path, split: str = "train", verify: bool | None = False) -> datasets.Dataset:
    """Read data_dir/<split>/metadata.csv and the images that it names, as Hugging Face's imagefolder lays them out.

    The column file_name holds paths from the folder of the file, the column labels class names with | between them;
    an empty cell is an image with none of the classes. Other columns are not read, among them columns of 0 and 1 for
    each class. Splits are found as `image_folder` finds them; the classes are the names that occur in training, in
    alphabetical order.

    Args:
        data_dir: Folder of the data set.
        split: 'train', 'validation' or 'test'.
        verify: Decode every image of the split now rather than its header only; None reads none, as where another
            process has.

    Returns:
        Dataset with the columns image and label, a list of class labels.

    Raises:
        FileNotFoundError: If data_dir, the folder of the split, its metadata.csv or an image is missing.
        ValueError: If split is unknown, metadata.csv cannot be read, lacks a column, names an image twice or not at
            all, or holds labels in another form or of another class than training; or an image cannot be read.
    """
    check_split(split, FOLDER_SPLITS)
    parts = folder_splits(data_dir)
    if split not in parts:
        raise FileNotFoundError(f"{data_folder(data_dir)} has no folder for the split {split!r}; add it.")
    rows = _read_rows(parts[split])
    trained = rows if split == "train" else _read_rows(parts["train"])
    names = sorted({name for labels in trained.values() for name in labels})
    if not names:
        raise ValueError(f"{printable(parts['train'] / METADATA)} has no label; add some.")
    index = {name: label for label, name in enumerate(names)}
    if verify is not None:
        check_image_files(rows, verify)
    for path, labels in rows.items():
        for name in labels:
            if name not in index:
                raise ValueError(f"{path} has the label {name!r}, which no training image has; correct it.")
    for path in find_images(parts[split], beside=(METADATA,)):
        if path not in rows:
            raise ValueError(f"{printable(path)} has no row in {METADATA}; add it or remove the image.")
    features = datasets.Features(image=datasets.Image(), label=datasets.Sequence(datasets.ClassLabel(names=names)))
    columns = dict(image=list(map(str, rows)), label=[[index[name] for name in labels] for labels in rows.values()])
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def _read_rows(folder: Path) -> dict[Path, list[str]]:
    """Image to the names of its classes, in the order of the file."""
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{printable(path)} does not exist; write it, with the columns file_name and labels.")
    rows: dict[Path, list[str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for column in ("file_name", "labels"):
                if (reader.fieldnames or ()).count(column) != 1:
                    raise ValueError(f"it must have one column {column}: give one line an image, its path in file_name "
                                     f"and the names of its classes in labels, with {SEPARATOR} between them")
            for row in reader:
                image, labels = _read_row(row, f"line {reader.line_num}")
                if folder / image in rows:
                    raise ValueError(f"line {reader.line_num} names {image} again: give all labels in one line")
                rows[folder / image] = labels
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{printable(path)} cannot be read: {error}.") from error
    if not rows:
        raise ValueError(f"{printable(path)} names no image; add some.")
    return rows


def _read_row(row: dict[str, str], place: str) -> tuple[Path, list[str]]:
    if None in row or None in row.values():
        raise ValueError(f"{place} has another number of columns than the first line")
    image = Path(row["file_name"])
    if not row["file_name"].strip() or image.is_absolute() or ".." in image.parts:
        raise ValueError(f"{place} has the file_name {row['file_name']!r}, which is no path inside of this folder")
    labels = [name.strip() for name in row["labels"].split(SEPARATOR)] if row["labels"].strip() else []
    for name in labels:
        if not name or labels.count(name) > 1 or re.search(r"[;,\[\]]", name):
            raise ValueError(f"{place} has the labels {row['labels']!r}: names must differ, be separated by "
                             f"{SEPARATOR} and hold no ; , [ or ]")
    return image, labels
