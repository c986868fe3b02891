"""Readers of fine-grained data sets.

All give the columns image and label of `birds.recognition_features`; data sets with boxes add box, those with parts
box and parts.

Every file is checked when a data set is built, by its header or, with verify=True, by decoding it; pixels are decoded
when a row is read. A fault ends the reading with an error that names the file; nothing is skipped. Streamed data sets
are checked row by row as they are read.
"""

import hashlib
import io
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq  # type: ignore
from PIL import Image

from .birds import SPLITS, drawn_birds, recognition_features

OFFICIAL_COUNTS = {
    "cub": {"train": 5994, "test": 5794},
    "aircraft": {"train": 6667, "test": 3333},
    "cars": {"train": 8144, "test": 8041},
}

_MISSING_LABELS = {None, "", -1}

_logger = logging.getLogger(__name__)


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


def check_counts(name: str, split: str, count: int) -> None:
    """Log a warning if a split has another number of images than the official data set.

    Args:
        name: Key of `OFFICIAL_COUNTS`.
        split: 'train' or 'test'.
        count: Number of images found.
    """
    official = OFFICIAL_COUNTS[name][split]
    if count != official:
        _logger.warning("%s: the split %r has %d images, the official one has %d.", name, split, count, official)


def _open_image(file: Path | io.BytesIO, verify: bool, source: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            if verify:
                image.load()
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{source} cannot be read as an image ({error}); replace or remove it.") from error


def _image_size(path: Path, verify: bool) -> tuple[int, int]:
    """Width and height in pixels from the header; decodes the image only to verify it."""
    if not path.exists():
        raise FileNotFoundError(f"Image {path} does not exist; restore it or take it out of the index files.")
    return _open_image(path, verify, str(path))


def _clip(box: Sequence[float], size: tuple[int, int], source: str) -> list[float]:
    """Clip a box (x0, y0, x1, y1) to an image (width, height); source says in an error what gives the box."""
    x0, y0, x1, y1 = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"{source} a box that is empty or outside the image; correct it.")
    return [x0, y0, x1, y1]


def _with_boxes(columns: dict[str, list[Any]], class_names: Sequence[str], split: str) -> datasets.Dataset:
    features = recognition_features(class_names)
    features["box"] = datasets.Sequence(datasets.Value("float32"), length=4)
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def _flag(text: str) -> int:
    return ("0", "1").index(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _table(
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


def _check_trained(root: Path, classes: Mapping[Any, str], trained: Collection[Any]) -> None:
    for key, name in classes.items():
        if key not in trained:
            raise ValueError(f"{root} has an empty class: {name!r} has no training image; add one or remove the class.")


def cub(data_dir: str | Path, split: str = "train", verify: bool = False) -> datasets.Dataset:
    """Read CUB-200-2011 or any data set in its layout, with a warning if the number of images is not the official one.

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
    _check_trained(root, classes, {class_ids[image] for image in images if in_train[image]})

    labels = {class_id: label for label, class_id in enumerate(classes)}
    columns: dict[str, list[Any]] = {"image": [], "label": [], "box": [], "parts": []}
    for image, name in images.items():
        if in_train[image] != (split == "train"):
            continue
        path = root / "images" / name
        size = _image_size(path, verify)
        x, y, width, height = boxes[image]
        box = _clip((x, y, x + width, y + height), size, f"{root / 'bounding_boxes.txt'} gives image id {image}")
        columns["image"].append(str(path))
        columns["label"].append(labels[class_ids[image]])
        columns["box"].append(box)
        columns["parts"].append({name: locations[image, part] for part, name in parts.items()})
    check_counts("cub", split, len(columns["label"]))
    features = recognition_features(list(classes.values()), list(parts.values()))
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def aircraft(data_dir: str | Path, split: str = "train", verify: bool = False) -> datasets.Dataset:
    """Read FGVC-Aircraft, its 100 variants as classes, with a warning if the number of images is not the official one.

    At the bottom of each image there is a banner, 20 pixels high, that names its author; it is left in place.

    Args:
        data_dir: Folder of the release, fgvc-aircraft-2013b, or its folder data with images/, variants.txt,
            images_variant_train.txt, images_variant_val.txt, images_variant_test.txt and images_box.txt.
        split: 'train', which takes in the release's val, or 'test'.
        verify: Decode every image of the split now rather than its header only.

    Returns:
        Dataset with the columns image, label and box, in the order of the files. Labels count from 0 in the order of
        variants.txt. Boxes run from pixel edge to pixel edge, 0-based, and are clipped to the image.

    Raises:
        FileNotFoundError: If the folder, an index file or an image is missing.
        ValueError: If split is unknown, a line is malformed, the index files contradict each other, a class has no
            training image, a box lies outside its image, or an image cannot be read.
    """
    _check_split(split)
    root, layout = _folder(data_dir), "FGVC-Aircraft"
    if not (root / "variants.txt").exists() and (root / "data").is_dir():
        root = root / "data"
    classes = {name: name for name in _table(root / "variants.txt", str, layout=layout)}
    variants: dict[str, dict[str, str]] = {}
    for part in ("train", "val", "test"):
        path = root / f"images_variant_{part}.txt"
        variants[part] = _table(path, str, str, layout=layout)
        for image, variant in variants[part].items():
            if variant not in classes:
                raise ValueError(
                    f"{path} gives image id {image} the variant {variant!r}, which is not in variants.txt; "
                    "correct one of the two."
                )
            for other in variants:
                if other != part and image in variants[other]:
                    raise ValueError(f"{path} lists image id {image}, as images_variant_{other}.txt does; remove one.")
    train = variants["train"] | variants["val"]
    _check_trained(root, classes, set(train.values()))
    boxes_path = root / "images_box.txt"
    boxes = _table(boxes_path, str, _number, _number, _number, _number, layout=layout)
    _check_ids(boxes_path, boxes, train | variants["test"], "image id")

    labels = {name: label for label, name in enumerate(classes)}
    columns: dict[str, list[Any]] = {"image": [], "label": [], "box": []}
    for image, variant in (train if split == "train" else variants["test"]).items():
        path = root / "images" / f"{image}.jpg"
        size = _image_size(path, verify)
        x_min, y_min, x_max, y_max = boxes[image]  # first and last pixel, counted from 1
        columns["image"].append(str(path))
        columns["label"].append(labels[variant])
        columns["box"].append(_clip((x_min - 1, y_min - 1, x_max, y_max), size, f"{boxes_path} gives image id {image}"))
    check_counts("aircraft", split, len(columns["label"]))
    return _with_boxes(columns, list(classes), split)


def _mat_array(path: Path, variable: str) -> Any:
    """The 1-D array that a MATLAB file holds under the name variable, its cells and structs unpacked."""
    try:
        from scipy import io as scipy_io  # type: ignore
    except ImportError as error:
        raise ImportError("Stanford Cars comes as MATLAB files, which SciPy reads: pip install scipy") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; data_dir must be in the layout of Stanford Cars.")
    try:
        content = scipy_io.loadmat(path, squeeze_me=True)
    except Exception as error:  # SciPy has no common error for damaged files
        raise ValueError(f"{path} cannot be read as a MATLAB file ({error}); restore it.") from error
    if variable not in content:
        raise ValueError(f"{path} has no variable {variable!r}; restore the official file.")
    return np.atleast_1d(content[variable])


def _car_annotations(path: Path, num_classes: int) -> dict[str, tuple[int, tuple[float, ...]]]:
    """File name to label, from 0, and box (x0, y0, x1, y1)."""
    rows = _mat_array(path, "annotations")
    fields = ("fname", "class", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    for field in fields:
        if field not in (rows.dtype.names or ()):
            raise ValueError(f"{path} has annotations without {field!r}; use the file that has labels and boxes.")
    annotations: dict[str, tuple[int, tuple[float, ...]]] = {}
    for number, row in enumerate(rows, 1):
        try:
            name, label = str(row["fname"]), int(row["class"]) - 1
            x_min, y_min, x_max, y_max = (_number(row[field]) for field in fields[2:])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, annotation {number} is malformed: {row}; correct it.") from error
        if not 0 <= label < num_classes:
            raise ValueError(f"{path} gives {name} the class {label + 1}, not one of 1 to {num_classes}; correct it.")
        if name in annotations:
            raise ValueError(f"{path}, annotation {number} repeats {name}; remove one of the two.")
        annotations[name] = (label, (x_min - 1, y_min - 1, x_max, y_max))
    return annotations


def cars(data_dir: str | Path, split: str = "train", verify: bool = False) -> datasets.Dataset:
    """Read Stanford Cars, with a warning if the number of images is not the official one.

    Args:
        data_dir: Folder with cars_train/, cars_test/, devkit/cars_meta.mat, devkit/cars_train_annos.mat and, for the
            test split, cars_test_annos_withlabels.mat, itself or in devkit/.
        split: 'train' or 'test'.
        verify: Decode every image of the split now rather than its header only.

    Returns:
        Dataset with the columns image, label and box, in the order of the annotations. Labels count from 0 in the order
        of cars_meta.mat. Boxes run from pixel edge to pixel edge, 0-based, and are clipped to the image.

    Raises:
        ImportError: If SciPy, which reads the annotations, is not installed.
        FileNotFoundError: If the folder, an annotation file or an image is missing.
        ValueError: If split is unknown, an annotation file is damaged or malformed, a class has no training image, a
            box lies outside its image, or an image cannot be read.
    """
    _check_split(split)
    root = _folder(data_dir)
    classes = [str(name) for name in _mat_array(root / "devkit/cars_meta.mat", "class_names")]
    path = root / "devkit/cars_train_annos.mat"
    annotations = _car_annotations(path, len(classes))
    _check_trained(root, dict(enumerate(classes)), {label for label, _ in annotations.values()})
    if split == "test":
        path = root / "cars_test_annos_withlabels.mat"
        if not path.exists():
            path = root / "devkit" / path.name
        if not path.exists():
            raise FileNotFoundError(f"{path.name} is neither in {root} nor in {path.parent}; put it into one of them.")
        annotations = _car_annotations(path, len(classes))

    columns: dict[str, list[Any]] = {"image": [], "label": [], "box": []}
    for name, (label, box) in annotations.items():
        image = root / f"cars_{split}" / name
        columns["image"].append(str(image))
        columns["label"].append(label)
        columns["box"].append(_clip(box, _image_size(image, verify), f"{path} gives {name}"))
    check_counts("cars", split, len(columns["label"]))
    return _with_boxes(columns, classes, split)


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


def _check_columns(source: str | Path, columns: Collection[str], *needed: str) -> None:
    for column in needed:
        if column not in columns:
            known = ", ".join(map(repr, columns))
            raise ValueError(f"{source} has no column {column!r}, only {known}; name one of them.")


def _values(dataset: Any, column: str) -> list[Any]:
    """A column of a data set or of a stream, which is read through once."""
    dataset = dataset.select_columns([column])
    return dataset[:][column] if isinstance(dataset, datasets.Dataset) else [row[column] for row in dataset]


def _class_index(splits: Mapping[str, Any], source: str, split: str, column: str) -> tuple[list[str], dict[Any, int]]:
    """Class names, and values of the label column to labels; they are the same for all splits."""
    feature = splits[split].features[column]
    if isinstance(feature, datasets.ClassLabel) and feature.names:
        return feature.names, {label: label for label in range(feature.num_classes)}
    dtype = getattr(feature, "dtype", None)
    if not isinstance(dtype, str) or not dtype.startswith(("int", "uint", "string", "large_string")):
        raise ValueError(f"Column {column!r} of {source} has the type {feature}; labels must be strings or integers.")
    if "train" not in splits:
        raise ValueError(f"{source} has no split 'train' to take the classes of split {split!r} from; add it.")
    values = sorted(set(_values(splits["train"], column)) - _MISSING_LABELS)
    return [str(value) for value in values], {value: label for label, value in enumerate(values)}


def _image_files(dataset: Any) -> Iterator[tuple[str | None, bytes | None]]:
    """Path and bytes of each image, one of which may be None, without decoding."""
    dataset = dataset.with_format(None).select_columns(["image"])
    for row in dataset.cast_column("image", datasets.Image(decode=False)):
        yield (row["image"]["path"], row["image"]["bytes"]) if row["image"] else (None, None)


def _check_image(path: str | None, content: bytes | None, verify: bool, place: str) -> None:
    """Check an image as `_image_files` gives it, unless it is still to be fetched from an address."""
    if content is not None:
        _open_image(io.BytesIO(content), verify, place)
    elif path is None:
        raise ValueError(f"{place} has no image; add it or remove the row.")
    elif "://" not in path:
        _image_size(Path(path), verify)


def _label(index: Mapping[Any, int], value: Any, place: str) -> int:
    if value not in index:
        raise ValueError(
            f"{place} has the label {value!r}, which is none of the {len(index)} classes; correct it or remove the row."
        )
    return index[value]


def _streamed_row(
        example: dict[str, Any], row: int, image_column: str, label_column: str, index: dict[Any, int], where: str,
) -> dict[str, Any]:
    image, place = example[image_column], f"{where}, row {row}"
    if not isinstance(image, dict):
        image = dict(path=None, bytes=image)
    _check_image(image["path"], image["bytes"], False, place)
    return dict(image=image, label=_label(index, example[label_column], place))


def _two_columns(
        splits: Mapping[str, Any], source: str, split: str, image_column: str, label_column: str, verify: bool,
) -> Any:
    """Columns image and label, alone and under these names, of one of the splits, data sets or streams."""
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}, only {', '.join(map(repr, splits))}; choose one of them.")
    dataset = splits[split]
    _check_columns(source, dataset.features, image_column, label_column)
    feature = dataset.features[image_column]
    if not (
            isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) == "binary"
            or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ):
        raise ValueError(f"Column {image_column!r} of {source} has the type {feature}; it must hold images.")
    names, index = _class_index(splits, source, split, label_column)
    if not names:
        raise ValueError(f"{source} has no labelled image in the split 'train'; add some.")
    features = recognition_features(names)

    where = f"{source}, split {split!r}"
    if not isinstance(dataset, datasets.Dataset):
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        dataset = dataset.map(
            _streamed_row, with_indices=True, remove_columns=list(dataset.features),
            fn_kwargs=dict(image_column=image_column, label_column=label_column, index=index, where=where),
        )
        return dataset.cast(features)  # not by map, which would leave the images encoded

    # The labels go into a table of their own: a cast or map would write all images to the disk again
    values = _values(dataset, label_column)
    labels = datasets.Dataset.from_dict(
        dict(label=[_label(index, value, f"{where}, row {row}") for row, value in enumerate(values)]),
        features=datasets.Features(label=features["label"]), split=dataset.split,
    )
    images = dataset.select_columns([image_column])
    if image_column != "image":
        images = images.rename_column(image_column, "image")
    images = images.cast_column("image", datasets.Image())
    for row, (path, content) in enumerate(_image_files(images)):
        _check_image(path, content, verify, f"{where}, row {row}")
    return datasets.concatenate_datasets([images, labels], split=datasets.NamedSplit(split), axis=1)


def hub(
        name: str,
        split: str = "train",
        image_column: str = "image",
        label_column: str = "label",
        config: str | None = None,
        streaming: bool = False,
        verify: bool = False,
        cache_dir: str | Path | None = None,
) -> Any:
    """Read a repository of the Hugging Face Hub, or a local folder, that `datasets.load_dataset` can load.

    Labels that have no class names are numbered in the sorted order of the values that occur in the split 'train',
    whichever split is read. Streaming has to read that column of 'train' through for it.

    Args:
        name: Repository, such as 'user/repository', or folder.
        split: Any split that the repository has.
        image_column: Column with the images.
        label_column: Column with the labels: class labels, strings or integers.
        config: Configuration of the repository, None if there is but one.
        streaming: Read rows as they are needed instead of downloading all first.
        verify: Decode every image of the split now rather than its header only; not for streaming.
        cache_dir: Folder to cache in, by default that of the datasets library.

    Returns:
        Dataset, or for streaming IterableDataset, with the columns image and label.

    Raises:
        FileNotFoundError: If an image that a row names is missing.
        ValueError: If the split or a column does not exist or a column has an unfit type, a row has no label or one
            that 'train' has not, an image is missing or cannot be read, or verify is given for streaming; and
            whatever `datasets.load_dataset` raises.
    """
    if streaming and verify:
        raise ValueError("verify must be False for streaming, which reads images only as they are needed.")
    cache = None if cache_dir is None else str(cache_dir)
    splits = datasets.load_dataset(name, config, streaming=streaming, cache_dir=cache)
    if streaming:  # the columns of some formats are known only from the first rows
        splits = {key: part if part.features else part._resolve_features() for key, part in splits.items()}
    return _two_columns(splits, name, split, image_column, label_column, verify)


def parquet(
        data_dir: str | Path,
        split: str = "train",
        verify: bool = False,
        image_column: str = "image",
        label_column: str = "label",
        cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Read data_dir/train*.parquet and data_dir/test*.parquet, with labels numbered as `hub` does.

    Args:
        data_dir: Folder of the data set.
        split: 'train' or 'test'.
        verify: Decode every image of the split now rather than its header only.
        image_column: Column with the images: encoded bytes, or structs of bytes and path.
        label_column: Column with the labels: class labels, strings or integers.
        cache_dir: Folder to cache in, by default that of the datasets library.

    Returns:
        Dataset with the columns image and label, in the order of the sorted files.

    Raises:
        FileNotFoundError: If data_dir, the files of the split or of 'train', or an image that a row names are missing.
        ValueError: If split is unknown, a file cannot be read, lacks a column or differs from the first in the type of
            its labels, a column has an unfit type, a row has no label or one that 'train' has not, or an image is
            missing or cannot be read.
    """
    _check_split(split)
    root = _folder(data_dir)
    files = {key: sorted(str(path) for path in root.glob(f"{key}*.parquet")) for key in dict.fromkeys(("train", split))}
    first = None
    for key, paths in files.items():
        if not paths:
            raise FileNotFoundError(f"{root} has no files {key}*.parquet; add them.")
        for path in paths:
            try:
                features = datasets.Features.from_arrow_schema(pq.read_schema(path))
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} cannot be read as a Parquet file ({error}); replace it.") from error
            _check_columns(path, features, image_column, label_column)
            first = first or features
            if features[label_column] != first[label_column]:
                raise ValueError(
                    f"{path} has labels of another type than {files['train'][0]}; write both with the same classes."
                )
    splits = datasets.load_dataset(
        "parquet", data_files=files, columns=[image_column, label_column],
        cache_dir=None if cache_dir is None else str(cache_dir),
    )
    return _two_columns(splits, str(root), split, image_column, label_column, verify)


def check_disjoint(train: Any, other: Any) -> None:
    """Check that a validation or test split shares no image file with training.

    A file is shared if it is the same path, or another path or row with the same bytes. Only files whose size occurs on
    both sides are hashed.

    Args:
        train: Training split with a column image; a data set or a stream, which is read through up to twice.
        other: Validation or test split, likewise.

    Raises:
        FileNotFoundError: If a file does not exist locally.
        ValueError: If a file is shared; names the first.
    """
    def size(path: str | None, content: bytes | None) -> int:
        if content is not None:
            return len(content)
        if path is None or not os.path.isfile(path):
            raise FileNotFoundError(f"Image {path} is not a local file and cannot be compared; restore or download it.")
        return os.path.getsize(path)

    def digest(path: str | None, content: bytes | None) -> bytes:
        return hashlib.sha256(Path(str(path)).read_bytes() if content is None else content).digest()

    def called(row: int, path: str | None, content: bytes | None) -> str:
        return str(path) if content is None else f"row {row}" + (f" ({path})" if path else "")

    # The path of an image that is stored as bytes is but a note, which two different images may share
    train_paths: set[str] = set()
    train_sizes: set[int] = set()
    for path, content in _image_files(train):
        train_sizes.add(size(path, content))
        if content is None:
            train_paths.add(os.path.abspath(str(path)))
    sizes = set()
    for path, content in _image_files(other):
        if content is None and os.path.abspath(str(path)) in train_paths:
            raise ValueError(f"{path} is also in training; remove it from one of the two splits.")
        sizes.add(size(path, content))
    sizes &= train_sizes
    if not sizes:
        return
    digests: dict[bytes, str] = {}
    for row, file in enumerate(_image_files(train)):
        if size(*file) in sizes:
            digests.setdefault(digest(*file), called(row, *file))
    for row, file in enumerate(_image_files(other)):
        twin = digests.get(digest(*file)) if size(*file) in sizes else None
        if twin is not None:
            raise ValueError(
                f"{called(row, *file)} has the same content as {twin} of training; remove it from one of the two."
            )


def load(name: str, data_dir: str | Path | None = None, split: str = "train", **options: Any) -> Any:
    """Load a split of a data set by the name of its kind.

    Args:
        name: 'birds' (`birds.drawn_birds`), 'cub' (`cub`), 'aircraft' (`aircraft`), 'cars' (`cars`), 'folder'
            (`image_folder`), 'parquet' (`parquet`) or 'hub:NAME' (`hub`, with the NAME of a repository).
        data_dir: Folder of the data set; None for 'birds' and 'hub:NAME'.
        split: 'train' or 'test', for 'hub:NAME' any that the repository has.
        options: Passed on to the function of that kind.

    Raises:
        ValueError: If name is unknown, or data_dir is missing or given without need; and whatever that function raises.
    """
    readers: dict[str, Callable[..., Any]] = {
        "cub": cub, "aircraft": aircraft, "cars": cars, "folder": image_folder, "parquet": parquet,
    }
    kind, _, repository = name.partition(":")
    if name == "birds" or (kind == "hub" and repository):
        if data_dir is not None:
            why = "which are drawn" if name == "birds" else "which names its own source"
            raise ValueError(f"data_dir must be left out for {name!r}, {why}, got {str(data_dir)!r}.")
        return drawn_birds(split, **options) if name == "birds" else hub(repository, split, **options)
    if name not in readers:
        raise ValueError(f"name must be 'birds', {', '.join(map(repr, readers))} or 'hub:NAME', got {name!r}.")
    if data_dir is None:
        raise ValueError(f"data_dir must name the folder of the data set for {name!r}.")
    return readers[name](data_dir, split, **options)
