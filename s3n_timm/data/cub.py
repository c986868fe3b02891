"""CUB-200-2011: birds with boxes and parts."""

import itertools
from pathlib import Path
from typing import Any

import datasets

from .index_files import check_ids, check_trained, clip_box, read_flag, read_names, read_number, read_table
from .schema import check_counts, check_image_files, check_split, data_folder, recognition_features


def cub(data_dir: str | Path, split: str = "train", verify: bool | None = False) -> datasets.Dataset:
    """Read CUB-200-2011 or any data set in its layout, with a warning if the number of images is not the official one.

    Args:
        data_dir: Folder with images.txt, classes.txt, image_class_labels.txt, train_test_split.txt,
            bounding_boxes.txt, parts/parts.txt, parts/part_locs.txt and images/.
        split: 'train' or 'test'.
        verify: Decode every image of the split now rather than its header only, as None does.

    Returns:
        Dataset in the order of images.txt. Labels count from 0 in the order of classes.txt. Boxes are clipped to the
        image. Parts have x, y = 0 where they are not visible, as in the files.

    Raises:
        FileNotFoundError: If the folder, an index file or an image is missing.
        ValueError: If split is unknown, a line is malformed, the index files contradict each other, a class has no
            training image, a box lies outside its image, or an image cannot be read.
    """
    check_split(split)
    root = data_folder(data_dir)
    images, classes, parts = (read_names(root / name) for name in ("images.txt", "classes.txt", "parts/parts.txt"))
    tables = []
    for name, *converters in (
            ("image_class_labels.txt", int),
            ("train_test_split.txt", read_flag),
            ("bounding_boxes.txt", read_number, read_number, read_number, read_number),
    ):
        tables.append(read_table(root / name, int, *converters))
        check_ids(root / name, tables[-1], images, "image id")
    class_ids, in_train, boxes = tables
    locations_path = root / "parts/part_locs.txt"
    locations = read_table(locations_path, int, int, read_number, read_number, read_flag, num_keys=2)
    check_ids(locations_path, locations, dict.fromkeys(itertools.product(images, parts)), "image id and part id")

    for image, class_id in class_ids.items():
        if class_id not in classes:
            raise ValueError(
                f"{root / 'image_class_labels.txt'} gives image id {image} the class id {class_id}, which is not in "
                "classes.txt; correct one of the two."
            )
    check_trained(root, classes, {class_ids[image] for image in images if in_train[image]})

    labels = {class_id: label for label, class_id in enumerate(classes)}
    columns: dict[str, list[Any]] = {"image": [], "label": [], "box": [], "parts": []}
    paths = {image: root / "images" / name for image, name in images.items() if in_train[image] == (split == "train")}
    for (image, path), size in zip(paths.items(), check_image_files(paths.values(), verify)):
        x, y, width, height = boxes[image]
        box = clip_box((x, y, x + width, y + height), size, f"{root / 'bounding_boxes.txt'} gives image id {image}")
        columns["image"].append(str(path))
        columns["label"].append(labels[class_ids[image]])
        columns["box"].append(box)
        columns["parts"].append({name: locations[image, part] for part, name in parts.items()})
    check_counts("cub", split, len(columns["label"]))
    features = recognition_features(list(classes.values()), list(parts.values()))
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
