"""Readers of fine-grained data sets, all with the columns of `birds.recognition_features`.

Every file is checked when a data set is built, by its header or, with verify=True, by decoding it; pixels are decoded
when a row is read. A fault ends the reading with an error that names the file; nothing is skipped.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from .birds import SPLITS, drawn_birds, recognition_features


def part_names(dataset: datasets.Dataset) -> tuple[str, ...]:
    """Names of the annotated parts in the order of each row's parts, empty if the data set has none."""
    return tuple(dataset.features.get("parts", ()))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")


def _folder(data_dir: str | Path) -> Path:
    folder = Path(data_dir).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; data_dir must name the folder of the data set.")
    return folder


def _image_size(path: Path, verify: bool) -> tuple[int, int]:
    """Width and height in pixels from the header; decodes the image only to verify it."""
    if not path.exists():
        raise FileNotFoundError(f"Image {path} does not exist; restore it or take it out of the index files.")
    try:
        with Image.open(path) as image:
            if verify:
                image.load()
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); replace or remove it.") from error


def _flag(text: str) -> int:
    return ("0", "1").index(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _table(path: Path, *columns: Callable[[str], Any], num_keys: int = 1) -> dict[Any, Any]:
    """Read an index file: one row a line, its values split at spaces and converted column by column.

    Args:
        path: Index file.
        columns: What converts each column; only the last may hold spaces.
        num_keys: Number of columns, from the left, that identify a row.

    Returns:
        Identifying value, or tuple of values, to the other value or tuple of values, in the order of the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; data_dir must be in the layout of CUB-200-2011.")
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


def _names(path: Path) -> dict[int, str]:
    """Read an index file of names, each of which must occur once."""
    names = _table(path, int, str)
    for name, count in Counter(names.values()).items():
        if count > 1:
            raise ValueError(f"{path} lists {name!r} {count} times; names must be unique.")
    return names


def _check_ids(path: Path, table: dict[Any, Any], ids: Collection[Any], kind: str) -> None:
    for key in ids:
        if key not in table:
            raise ValueError(f"{path} has no line for {kind} {key}; add it.")
    for key in table:
        if key not in ids:
            raise ValueError(f"{path} has a line for {kind} {key}, which no other index file lists; remove it.")


def cub(data_dir: str | Path, split: str = "train", verify: bool = False) -> datasets.Dataset:
    """Read CUB-200-2011 or any data set in its layout.

    Args:
        data_dir: Folder with images.txt, classes.txt, image_class_labels.txt, train_test_split.txt,
            bounding_boxes.txt, parts/parts.txt, parts/part_locs.txt and images/.
        split: 'train' or 'test'.
        verify: Decode every image of the split now rather than its header only.

    Returns:
        Dataset in the order of images.txt. Labels count from 0 in the order of classes.txt. Boxes are clipped to the
        image. Parts have x, y = 0 where they are not visible, as in the files.

    Raises:
        FileNotFoundError: If the folder, an index file or an image is missing.
        ValueError: If split is unknown, a line is malformed, the index files contradict each other, a class has no
            training image, a box lies outside its image, or an image cannot be read.
    """
    _check_split(split)
    root = _folder(data_dir)
    images, classes, parts = (_names(root / name) for name in ("images.txt", "classes.txt", "parts/parts.txt"))
    tables = []
    for name, *converters in (
            ("image_class_labels.txt", int),
            ("train_test_split.txt", _flag),
            ("bounding_boxes.txt", _number, _number, _number, _number),
    ):
        tables.append(_table(root / name, int, *converters))
        _check_ids(root / name, tables[-1], images, "image id")
    class_ids, in_train, boxes = tables
    locations_path = root / "parts/part_locs.txt"
    locations = _table(locations_path, int, int, _number, _number, _flag, num_keys=2)
    _check_ids(locations_path, locations, dict.fromkeys(itertools.product(images, parts)), "image id and part id")

    for image, class_id in class_ids.items():
        if class_id not in classes:
            raise ValueError(
                f"{root / 'image_class_labels.txt'} gives image id {image} the class id {class_id}, which is not in "
                "classes.txt; correct one of the two."
            )
    trained = {class_ids[image] for image in images if in_train[image]}
    for class_id, name in classes.items():
        if class_id not in trained:
            raise ValueError(f"{root} has an empty class: {name!r} has no training image; add one or remove the class.")

    labels = {class_id: label for label, class_id in enumerate(classes)}
    columns: dict[str, list[Any]] = {"image": [], "label": [], "box": [], "parts": []}
    for image, name in images.items():
        if in_train[image] != (split == "train"):
            continue
        path = root / "images" / name
        width, height = _image_size(path, verify)
        x, y, box_width, box_height = boxes[image]
        box = [max(x, 0), max(y, 0), min(x + box_width, width), min(y + box_height, height)]
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(
                f"{root / 'bounding_boxes.txt'} gives image id {image} a box that is empty or outside the image; "
                "correct it."
            )
        columns["image"].append(str(path))
        columns["label"].append(labels[class_ids[image]])
        columns["box"].append(box)
        columns["parts"].append({name: locations[image, part] for part, name in parts.items()})
    features = recognition_features(list(classes.values()), list(parts.values()))
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def _class_folders(folder: Path) -> dict[str, Path]:
    """Class name to class folder, sorted by name."""
    folders = sorted(folder.iterdir())
    for path in folders:
        if not path.is_dir():
            raise ValueError(f"{path} is not a class folder; move it elsewhere.")
    if not folders:
        raise ValueError(f"{folder} has no class folders; put the images of each class into a folder of its own.")
    return {path.name: path for path in folders}


def image_folder(data_dir: str | Path, split: str = "train", verify: bool = False) -> datasets.Dataset:
    """Read data_dir/<split>/<class>/<image>, with classes in alphabetical order.

    The folder of the test split may also be called val or validation. Without any split folder, data_dir/<class>/
    <image> is read as the training split.

    Args:
        data_dir: Folder of the data set.
        split: 'train' or 'test'.
        verify: Decode every image of the split now rather than its header only.

    Returns:
        Dataset with the columns image and label.

    Raises:
        FileNotFoundError: If data_dir or the folder of the split is missing.
        ValueError: If split is unknown, a class folder is empty, the splits differ in their classes, or a file in a
            class folder cannot be read as an image.
    """
    _check_split(split)
    root = _folder(data_dir)
    train = root / "train"
    test = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    if test is not None and not train.is_dir():
        raise FileNotFoundError(f"{root} has a folder {test.name} but no folder train; add it.")
    if split == "train":
        folders = _class_folders(train if train.is_dir() else root)
    elif test is None:
        raise FileNotFoundError(f"{root} has no folder test, val or validation; add one or read the split 'train'.")
    else:
        folders = _class_folders(test)
        for name in sorted(set(folders) ^ set(_class_folders(train))):
            raise ValueError(f"Class {name!r} is not in both {train} and {test}; splits must have the same classes.")

    columns: dict[str, list[Any]] = {"image": [], "label": []}
    for label, folder in enumerate(folders.values()):
        paths = sorted(folder.iterdir())
        if not paths:
            raise ValueError(f"{folder} is an empty class; add images or remove the folder.")
        for path in paths:
            _image_size(path, verify)
            columns["image"].append(str(path))
            columns["label"].append(label)
    features = recognition_features(list(folders))
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def load(name: str, data_dir: str | Path | None = None, split: str = "train", **options: Any) -> datasets.Dataset:
    """Load a split of a data set by the name of its kind.

    Args:
        name: 'birds' (`birds.drawn_birds`), 'cub' (`cub`) or 'folder' (`image_folder`).
        data_dir: Folder of the data set; None for 'birds'.
        split: 'train' or 'test'.
        options: Passed on to the function of that kind.

    Raises:
        ValueError: If name is unknown, or data_dir is missing or given without need; and whatever that function raises.
    """
    if name == "birds":
        if data_dir is not None:
            raise ValueError(f"data_dir must be left out for 'birds', which are drawn, got {str(data_dir)!r}.")
        return drawn_birds(split, **options)
    readers = {"cub": cub, "folder": image_folder}
    if name not in readers:
        raise ValueError(f"name must be 'birds', 'cub' or 'folder', got {name!r}.")
    if data_dir is None:
        raise ValueError(f"data_dir must name the folder of the data set for {name!r}.")
    return readers[name](data_dir, split, **options)
