"""What every data set has in common: its columns, its splits and its checks.

Every image is checked when a data set is built, by its header or, with verify=True, by decoding it; pixels are decoded
when a row is read. A fault ends the reading with an error that names the file. Streamed data sets are checked row by
row as they are read.
"""

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets.utils import tqdm
from datasets.utils.file_utils import xopen
from PIL import Image

from ..images import ImageLike, expand_path, image_size, printable, read_image

SPLITS = ("train", "test")
OFFICIAL_COUNTS = {
    "cub": {"train": 5994, "test": 5794},
    "aircraft": {"train": 6667, "test": 3333},
    "cars": {"train": 8144, "test": 8041},
}

File = TypeVar("File")

_logger = logging.getLogger("s3n_timm.data")


# columns


def recognition_features(class_names: Sequence[str], part_names: Sequence[str] | None = None) -> datasets.Features:
    """Columns of a fine-grained data set.

    Args:
        class_names: Name of each class, in label order.
        part_names: Names of the annotated parts, None for a data set without boxes and parts.

    Returns:
        image and label, and with part_names also box (x0, y0, x1, y1 in pixels) and parts (name to x, y in pixels and
        visible, 0 or 1).
    """
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(class_names)))
    if part_names is not None:
        features["box"] = datasets.Sequence(datasets.Value("float32"), length=4)
        features["parts"] = {part: datasets.Sequence(datasets.Value("float32"), length=3) for part in part_names}
    return features


def dataset_with_boxes(columns: dict[str, list[Any]], class_names: Sequence[str], split: str) -> datasets.Dataset:
    """A split with the columns image, label and box."""
    features = recognition_features(class_names)
    features["box"] = datasets.Sequence(datasets.Value("float32"), length=4)
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))


def part_names(dataset: datasets.Dataset) -> tuple[str, ...]:
    """Names of the annotated parts in the order of each row's parts, empty if the data set has none."""
    return tuple(dataset.features.get("parts", ()))


def is_multi_label(dataset: Any) -> bool:
    """Whether the column label of a data set holds a list of classes, any number of them an image."""
    return not isinstance(dataset.features["label"], datasets.ClassLabel)


def class_names(dataset: Any) -> list[str]:
    """Names of the classes of a data set, in the order of its labels."""
    feature = dataset.features["label"]
    return (feature.feature if is_multi_label(dataset) else feature).names


# images


def store_images(dataset: Any) -> Any:
    """A data set or stream whose column image gives what is stored, for `read_stored`, and not decoded images.

    The datasets library decodes images in its own way: it applies the whole EXIF block, and opens formats that start
    other programs.
    """
    return dataset.cast_column("image", datasets.Image(decode=False))


def read_stored(stored: ImageLike, mode: str = "RGB") -> Image.Image:
    """Read an image as a row of `store_images` holds it; one that lies on a server is fetched.

    Args:
        stored: mapping with path, which may be an address, and bytes, one of which may be None; or anything else that
            `s3n_timm.images.read_image` reads.
        mode: 'RGB' or 'L'.

    Raises:
        ValueError, TypeError: the image cannot be fetched or read, see `s3n_timm.images.read_image`.
    """
    if isinstance(stored, Mapping) and stored.get("bytes") is None and "://" in str(stored.get("path")):
        address = stored["path"]
        try:
            with xopen(address, "rb") as file:
                stored = dict(path=address, bytes=file.read())
        except OSError as error:
            raise ValueError(f"{address} cannot be fetched ({error}).") from error
    return read_image(stored, mode)


# checks


def check_split(split: str, known: Sequence[str] = SPLITS) -> None:
    if split not in known:
        *others, last = map(repr, known)
        raise ValueError(f"split must be {', '.join(others)} or {last}, got {split!r}.")


def data_folder(data_dir: str | Path) -> Path:
    """The absolute path of a data set's folder, with ~ expanded."""
    folder = expand_path(data_dir).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{printable(folder)} is not a folder; data_dir must name the folder of the data set.")
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


def check_image(file: Path | bytes, verify: bool, name: str | None = None) -> tuple[int, int]:
    """Width and height in pixels of an image, which must be readable; name is what an error calls it."""
    try:
        return image_size(file, name=name, verify=verify)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}; replace or remove it.") from error


def check_image_file(path: Path, verify: bool) -> tuple[int, int]:
    """Width and height in pixels of an image file, which must exist under a name that a data set can hold."""
    if printable(path) != str(path):
        raise ValueError(f"{printable(path)} has a name that is not UTF-8, which a data set cannot hold; rename it.")
    if not path.exists():
        raise FileNotFoundError(f"Image {path} does not exist; restore it or take it out of the index files.")
    return check_image(path, verify)


def check_all(check: Callable[[File], Any], files: Iterable[File], count: int | None, doing: str) -> list[Any]:
    """What a check says of each file, in their order; in threads, as it waits for disks, networks and decoders.

    Args:
        count: how many files there are, if that is known.
        doing: what a bar that appears after some seconds says.
    """
    def check_some(some: Sequence[File]) -> list[Any]:
        return list(map(check, some))

    files = iter(files)
    results: list[Any] = []
    with ThreadPoolExecutor() as pool, tqdm(total=count, desc=doing, unit="img", delay=5) as bar:
        while some := list(itertools.islice(files, 256)):  # the pool takes all that it is given into memory
            for checked in pool.map(check_some, (some[start:start + 8] for start in range(0, len(some), 8))):
                results += checked
            bar.update(len(some))
    return results


def check_image_files(paths: Collection[Path], verify: bool | None) -> list[tuple[int, int]]:
    """Width and height in pixels of image files, in their order, as `check_image_file` gives them."""
    return check_all(lambda path: check_image_file(path, bool(verify)), paths, len(paths), "verifying images")
