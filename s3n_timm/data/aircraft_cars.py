"""FGVC-Aircraft and Stanford Cars: images with boxes."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..extras import needs_extra
from .index_files import check_ids, check_trained, clip_box, read_number, read_table
from .schema import check_counts, check_image_files, check_split, data_folder, dataset_with_boxes


def aircraft(data_dir: str | Path, split: str = "train", verify: bool | None = False) -> datasets.Dataset:
    """Read FGVC-Aircraft, its 100 variants as classes, with a warning if the number of images is not the official one.

    At the bottom of each image there is a banner, 20 pixels high, that names its author; it is left in place.

    Args:
        data_dir: Folder of the release, fgvc-aircraft-2013b, or its folder data with images/, variants.txt,
            images_variant_train.txt, images_variant_val.txt, images_variant_test.txt and images_box.txt.
        split: 'train', which takes in the release's val, or 'test'.
        verify: Decode every image of the split now rather than its header only, as None does.

    Returns:
        Dataset with the columns image, label and box, in the order of the files. Labels count from 0 in the order of
        variants.txt. Boxes run from pixel edge to pixel edge, 0-based, and are clipped to the image.

    Raises:
        FileNotFoundError: If the folder, an index file or an image is missing.
        ValueError: If split is unknown, a line is malformed, the index files contradict each other, a class has no
            training image, a box lies outside its image, or an image cannot be read.
    """
    check_split(split)
    root, layout = data_folder(data_dir), "FGVC-Aircraft"
    if not (root / "variants.txt").exists() and (root / "data").is_dir():
        root = root / "data"
    classes = {name: name for name in read_table(root / "variants.txt", str, layout=layout)}
    variants: dict[str, dict[str, str]] = {}
    for part in ("train", "val", "test"):
        path = root / f"images_variant_{part}.txt"
        variants[part] = read_table(path, str, str, layout=layout)
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
    check_trained(root, classes, set(train.values()))
    boxes_path = root / "images_box.txt"
    boxes = read_table(boxes_path, str, read_number, read_number, read_number, read_number, layout=layout)
    check_ids(boxes_path, boxes, train | variants["test"], "image id")

    labels = {name: label for label, name in enumerate(classes)}
    columns: dict[str, list[Any]] = {"image": [], "label": [], "box": []}
    images = train if split == "train" else variants["test"]
    paths = [root / "images" / f"{image}.jpg" for image in images]
    for (image, variant), path, size in zip(images.items(), paths, check_image_files(paths, verify)):
        x_min, y_min, x_max, y_max = boxes[image]  # first and last pixel, counted from 1
        columns["image"].append(str(path))
        columns["label"].append(labels[variant])
        box = (x_min - 1, y_min - 1, x_max, y_max)
        columns["box"].append(clip_box(box, size, f"{boxes_path} gives image id {image}"))
    check_counts("aircraft", split, len(columns["label"]))
    return dataset_with_boxes(columns, list(classes), split)


def _mat_array(path: Path, variable: str) -> Any:
    """The 1-D array that a MATLAB file holds under the name variable, its cells and structs unpacked."""
    with needs_extra("train"):
        from scipy import io as scipy_io  # type: ignore
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
            x_min, y_min, x_max, y_max = (read_number(row[field]) for field in fields[2:])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, annotation {number} is malformed: {row}; correct it.") from error
        if not 0 <= label < num_classes:
            raise ValueError(f"{path} gives {name} the class {label + 1}, not one of 1 to {num_classes}; correct it.")
        if name in annotations:
            raise ValueError(f"{path}, annotation {number} repeats {name}; remove one of the two.")
        annotations[name] = (label, (x_min - 1, y_min - 1, x_max, y_max))
    return annotations


def cars(data_dir: str | Path, split: str = "train", verify: bool | None = False) -> datasets.Dataset:
    """Read Stanford Cars, with a warning if the number of images is not the official one.

    Args:
        data_dir: Folder with cars_train/, cars_test/, devkit/cars_meta.mat, devkit/cars_train_annos.mat and, for the
            test split, cars_test_annos_withlabels.mat, itself or in devkit/.
        split: 'train' or 'test'.
        verify: Decode every image of the split now rather than its header only, as None does.

    Returns:
        Dataset with the columns image, label and box, in the order of the annotations. Labels count from 0 in the order
        of cars_meta.mat. Boxes run from pixel edge to pixel edge, 0-based, and are clipped to the image.

    Raises:
        ImportError: If SciPy, which reads the annotations, is not installed.
        FileNotFoundError: If the folder, an annotation file or an image is missing.
        ValueError: If split is unknown, an annotation file is damaged or malformed, a class has no training image, a
            box lies outside its image, or an image cannot be read.
    """
    check_split(split)
    root = data_folder(data_dir)
    classes = [str(name) for name in _mat_array(root / "devkit/cars_meta.mat", "class_names")]
    path = root / "devkit/cars_train_annos.mat"
    annotations = _car_annotations(path, len(classes))
    check_trained(root, dict(enumerate(classes)), {label for label, _ in annotations.values()})
    if split == "test":
        path = root / "cars_test_annos_withlabels.mat"
        if not path.exists():
            path = root / "devkit" / path.name
        if not path.exists():
            raise FileNotFoundError(f"{path.name} is neither in {root} nor in {path.parent}; put it into one of them.")
        annotations = _car_annotations(path, len(classes))

    columns: dict[str, list[Any]] = {"image": [], "label": [], "box": []}
    paths = [root / f"cars_{split}" / name for name in annotations]
    for (name, (label, box)), image, size in zip(annotations.items(), paths, check_image_files(paths, verify)):
        columns["image"].append(str(image))
        columns["label"].append(label)
        columns["box"].append(clip_box(box, size, f"{path} gives {name}"))
    check_counts("cars", split, len(columns["label"]))
    return dataset_with_boxes(columns, classes, split)
