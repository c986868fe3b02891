"""A data set by the name of its kind, and a check that two splits share no image."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .aircraft_cars import aircraft, cars
from .birds import drawn_birds
from .cub import cub
from .folder import folder_splits, image_folder
from .multi_label import multi_label_folder
from .schema import check_all, data_folder
from .tables import StoredFile, hub, image_files, parquet, parquet_files


def check_disjoint(**splits: Any) -> None:
    """Check that no two splits share an image file: `check_disjoint(train=…, validation=…, test=…)`.

    A file is shared if it is the same path, or another path or row with the same bytes. Only files whose size occurs in
    two splits are hashed.

    Args:
        splits: By name, splits with a column image; a data set or a stream, which is read through up to twice.

    Raises:
        FileNotFoundError: If a file does not exist locally.
        ValueError: If a file is shared; names the first and both splits.
    """
    def describe(file: StoredFile) -> tuple[str | None, int]:
        path, content = file
        if content is not None:  # the path beside it is but a note, which two different images may share
            return None, len(content)
        if path is None or not os.path.isfile(path):
            raise FileNotFoundError(f"Image {path} is not a local file and cannot be compared; restore or download it.")
        return os.path.abspath(path), os.path.getsize(path)

    def name_and_digest(row: int, file: StoredFile) -> tuple[str, bytes]:
        path, content = file
        digest = hashlib.sha256(Path(str(path)).read_bytes() if content is None else content).digest()
        return str(path) if content is None else f"row {row}" + (f" ({path})" if path else ""), digest

    def digests(dataset: Any, described: Sequence[tuple[str | None, int]]) -> list[tuple[str, bytes]]:
        rows = zip(enumerate(image_files(dataset)), described)
        chosen = (row for row, (_, size) in rows if size in sizes)
        return check_all(lambda row: name_and_digest(*row), chosen, None, "comparing images")

    described = {split: check_all(describe, image_files(dataset), None, "comparing images")
                 for split, dataset in splits.items()}
    owners: dict[str, str] = {}
    for split, files in described.items():
        for path in (path for path, _ in files if path is not None):
            if owners.setdefault(path, split) != split:
                raise ValueError(f"{path} is in {owners[path]} and in {split}; remove it from one of the two splits.")
    occurring = Counter(size for files in described.values() for size in {size for _, size in files})
    sizes = {size for size, count in occurring.items() if count > 1}
    if not sizes:
        return
    known: dict[bytes, tuple[str, str]] = {}
    for split, files in described.items():
        for name, digest in digests(splits[split], files):
            first, owner = known.setdefault(digest, (name, split))
            if owner != split:
                raise ValueError(
                    f"{name} of {split} has the same content as {first} of {owner}; remove it from one of the two."
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
