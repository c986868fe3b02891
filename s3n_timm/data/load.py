"""A data set by the name of its kind, and a check that two splits share no image."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .aircraft_cars import aircraft, cars
from .birds import drawn_birds
from .cub import cub
from .folder import folder_splits, image_folder
from .multi_label import multi_label_folder
from .schema import data_folder
from .tables import hub, image_files, parquet, parquet_files


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
    for path, content in image_files(train):
        train_sizes.add(size(path, content))
        if content is None:
            train_paths.add(os.path.abspath(str(path)))
    sizes = set()
    for path, content in image_files(other):
        if content is None and os.path.abspath(str(path)) in train_paths:
            raise ValueError(f"{path} is also in training; remove it from one of the two splits.")
        sizes.add(size(path, content))
    sizes &= train_sizes
    if not sizes:
        return
    digests: dict[bytes, str] = {}
    for row, file in enumerate(image_files(train)):
        if size(*file) in sizes:
            digests.setdefault(digest(*file), called(row, *file))
    for row, file in enumerate(image_files(other)):
        twin = digests.get(digest(*file)) if size(*file) in sizes else None
        if twin is not None:
            raise ValueError(
                f"{called(row, *file)} has the same content as {twin} of training; remove it from one of the two."
            )


def has_validation(name: str, data_dir: str | Path | None) -> bool:
    """Whether a data set has a split 'validation' beside train and test that its files tell."""
    if name not in ("folder", "multi-label", "parquet") or data_dir is None:
        return False
    if name != "parquet":
        return "validation" in folder_splits(data_dir)
    return bool(parquet_files(data_folder(data_dir), "validation"))


def load(name: str, data_dir: str | Path | None = None, split: str = "train", **options: Any) -> Any:
    """Load a split of a data set by the name of its kind.

    Args:
        name: 'birds' (`birds.drawn_birds`), 'cub' (`cub`), 'aircraft' (`aircraft`), 'cars' (`cars`), 'folder'
            (`image_folder`), 'multi-label' (`multi_label_folder`), 'parquet' (`parquet`) or 'hub:NAME' (`hub`, with the
            NAME of a repository).
        data_dir: Folder of the data set; None for 'birds' and 'hub:NAME'.
        split: 'train' or 'test', for 'folder', 'multi-label' and 'parquet' also 'validation', for 'hub:NAME' any that
            the repository has.
        options: Passed on to the function of that kind.

    Raises:
        ValueError: If name is unknown, or data_dir is missing or given without need; and whatever that function raises.
    """
    readers: dict[str, Callable[..., Any]] = {
        "cub": cub, "aircraft": aircraft, "cars": cars, "folder": image_folder, "multi-label": multi_label_folder,
        "parquet": parquet,
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
