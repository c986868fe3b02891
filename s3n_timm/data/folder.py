"""Folders of images, a folder for each class."""

from pathlib import Path

import datasets

from ..images import find_images, is_hidden, printable
from .schema import check_image_files, check_split, data_folder, recognition_features

FOLDER_SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {"train": "train", "valid": "validation", "val": "validation", "validation": "validation",
                "test": "test"}


def split_folders(root: Path) -> dict[str, Path]:
    """Split, of 'train', 'validation' and 'test', to its folder; upper and lower case are the same.

    Raises:
        ValueError: two folders are called like the same split.
    """
    folders: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        split = _SPLIT_NAMES.get(path.name.lower())
        if split is None or not path.is_dir():
            continue
        if split in folders:
            raise ValueError(f"{root} has {folders[split].name} and {path.name}; merge them or rename one.")
        folders[split] = path
    return folders


def folder_splits(data_dir: str | Path) -> dict[str, Path]:
    """The splits that `image_folder` reads from a folder, with the folder of each.

    A validation part without a test part is the test split. A folder without any of them is the training split.

    Raises:
        FileNotFoundError: there is no such folder, or a test or validation part without a training part.
        ValueError: two folders are called like the same split.
    """
    root = data_folder(data_dir)
    folders = split_folders(root)
    if "test" not in folders and "validation" in folders:
        folders["test"] = folders.pop("validation")
    if "train" not in folders and folders:
        raise FileNotFoundError(f"{root} has a folder {folders['test'].name} but no folder train; add it.")
    return folders or dict(train=root)


def _class_folders(folder: Path) -> dict[str, Path]:
    """Class name to class folder, sorted by name."""
    folders = sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    for path in folders:
        if not path.is_dir():
            raise ValueError(f"{printable(path)} is not a class folder; move it elsewhere.")
    if not folders:
        raise ValueError(f"{folder} has no class folders; put the images of each class into a folder of its own.")
    return {printable(path.name): path for path in folders}


def image_folder(data_dir: str | Path, split: str = "train", verify: bool | None = False) -> datasets.Dataset:
    """Read data_dir/<split>/<class>/…/<image>, with classes in alphabetical order.

    The folder of the validation split may be called valid, val or validation; without a folder test it is the test
    split. Without any split folder, data_dir/<class>/…/<image> is read as the training split. Images are found as
    `s3n_timm.images.find_images` finds them, by their suffix and in subfolders too.

    Args:
        data_dir: Folder of the data set.
        split: 'train', 'validation' or 'test'.
        verify: Decode every image of the split now rather than its header only; None reads none, as where another
            process has.

    Returns:
        Dataset with the columns image and label.

    Raises:
        FileNotFoundError: If data_dir or the folder of the split is missing.
        ValueError: If split is unknown, a class folder has no image, the splits differ in their classes, or an image
            cannot be read or has a name that is not UTF-8.
    """
    check_split(split, FOLDER_SPLITS)
    parts = folder_splits(data_dir)
    if split not in parts:
        missing = "folder test, valid, val or validation" if split == "test" else "validation part beside a test part"
        raise FileNotFoundError(f"{data_folder(data_dir)} has no {missing}; add one or read the split 'train'.")
    folders = _class_folders(parts[split])
    if split != "train":
        for name in sorted(set(folders) ^ set(_class_folders(parts["train"]))):
            raise ValueError(
                f"Class {name!r} is not in both {parts['train']} and {parts[split]}; splits must have the same classes."
            )

    labels: dict[Path, int] = {}
    for label, folder in enumerate(folders.values()):
        paths = list(find_images(folder))
        if not paths:
            raise ValueError(f"{printable(folder)} is an empty class; add images or remove the folder.")
        labels.update(dict.fromkeys(paths, label))
    if verify is not None:
        check_image_files(labels, verify)
    columns = dict(image=list(map(str, labels)), label=list(labels.values()))
    features = recognition_features(list(folders))
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
