"""Data sets of rows: Parquet files, and whatever the datasets library loads from the Hub or from a folder."""

import glob
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq  # type: ignore
from datasets.data_files import get_data_patterns
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..images import expand_path, find_images, is_hidden
from .folder import FOLDER_SPLITS, split_folders
from .schema import (
    check_all,
    check_image,
    check_image_file,
    check_split,
    data_folder,
    recognition_features,
    store_images,
)

StoredFile = tuple[str | None, bytes | None]  # path and bytes of an image, one of which may be None

_MISSING_LABELS = {None, "", -1}
_PREFIXES = {"train": "train", "validation": "val", "test": "test"}  # of Parquet files


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


def image_files(dataset: Any) -> Iterator[StoredFile]:
    """Path and bytes of each image, one of which may be None, without decoding."""
    for row in store_images(dataset.with_format(None).select_columns(["image"])):
        yield (row["image"]["path"], row["image"]["bytes"]) if row["image"] else (None, None)


def _check_row(file: StoredFile, verify: bool, place: str) -> None:
    """Check an image as `image_files` gives it, unless it is still to be fetched from an address."""
    path, content = file
    if content is not None:
        check_image(content, verify, place)
    elif path is None:
        raise ValueError(f"{place} has no image; add it or remove the row.")
    elif "://" not in path:
        check_image_file(Path(path), verify)


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
    _check_row((image["path"], image["bytes"]), False, place)
    return dict(image=image, label=_label(index, example[label_column], place))


def _two_columns(
        splits: Mapping[str, Any], source: str, split: str, image_column: str, label_column: str, verify: bool | None,
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
        raise ValueError(f"{source} has no labeled image in the split 'train'; add some.")
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
    rows = enumerate(image_files(images))
    if verify is not None:
        check_all(
            lambda row: _check_row(row[1], verify, f"{where}, row {row[0]}"), rows, len(images), "verifying images")
    return datasets.concatenate_datasets([images, labels], split=datasets.NamedSplit(split), axis=1)


def load_repository(
        name: str, config: str | None = None, streaming: bool = False, cache_dir: str | Path | None = None,
) -> Mapping[str, Any]:
    """All splits of a repository of the Hugging Face Hub, or of a local folder, as `datasets.load_dataset` gives them.

    A local folder with folders train, valid (val, validation) or test of images is read by these folders: to the
    datasets library, a class called test below train would belong to both splits.

    Args:
        name: Repository, such as 'user/repository', or folder; ~ is expanded.
        config: Configuration of the repository, None if there is but one.
        streaming: Read rows as they are needed instead of downloading all first.
        cache_dir: Folder to cache in, by default that of the datasets library.

    Returns:
        Split to Dataset, or for streaming to IterableDataset.

    Raises:
        FileNotFoundError: If name cannot be a repository and is no folder.
        Exception: Whatever `datasets.load_dataset` raises.
    """
    options: dict[str, Any] = dict(streaming=streaming, cache_dir=None if cache_dir is None else str(cache_dir))
    folder = expand_path(name)
    if not folder.is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise FileNotFoundError(
                f"{name} is not a folder, and names on the Hub have the form USER/NAME; correct it."
            ) from None
        return datasets.load_dataset(name, config, **options)
    root = folder.resolve()
    described = (root / "README.md").is_file() or any(root.glob("metadata.*"))
    parts = {} if config or described else split_folders(root)
    if parts and all(next(find_images(part), None) for part in parts.values()):
        files = {split: f"{glob.escape(str(parts[split]))}/**" for split in FOLDER_SPLITS if split in parts}
        return datasets.load_dataset("imagefolder", data_files=files, **options)
    if glob.has_magic(str(root)):
        base = glob.escape(str(root))
        options["data_files"] = {
            split: [f"{base}/{pattern}" for pattern in patterns] for split, patterns in get_data_patterns(base).items()
        }
    return datasets.load_dataset(str(folder), config, **options)


def parquet_files(root: Path, split: str) -> list[str]:
    """The Parquet files of 'train', 'validation' or 'test' in a folder, sorted."""
    return sorted(str(path) for path in root.iterdir() if path.name.startswith(_PREFIXES[split])
                  and path.suffix.lower() == ".parquet" and not is_hidden(path.name) and path.is_file())


def hub(
        name: str,
        split: str = "train",
        image_column: str = "image",
        label_column: str = "label",
        config: str | None = None,
        streaming: bool = False,
        verify: bool | None = False,
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
        verify: Decode every image of the split now rather than its header only; None reads none, as where another
            process has. Not for streaming.
        cache_dir: Folder to cache in, by default that of the datasets library.

    Returns:
        Dataset, or for streaming IterableDataset, with the columns image and label.

    Raises:
        FileNotFoundError: If the folder or an image that a row names is missing.
        ValueError: If the split or a column does not exist or a column has an unfit type, a row has no label or one
            that 'train' has not, an image is missing or cannot be read, or verify is given for streaming; and
            whatever `datasets.load_dataset` raises.
    """
    if streaming and verify:
        raise ValueError("verify must be False for streaming, which reads images only as they are needed.")
    splits = load_repository(name, config, streaming, cache_dir)
    if streaming:  # the columns of some formats are known only from the first rows
        splits = {key: part if part.features else part._resolve_features() for key, part in splits.items()}
    return _two_columns(splits, name, split, image_column, label_column, verify)


def parquet(
        data_dir: str | Path,
        split: str = "train",
        verify: bool | None = False,
        image_column: str = "image",
        label_column: str = "label",
        cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Read data_dir/train*.parquet, val*.parquet and test*.parquet, with labels numbered as `hub` does.

    Args:
        data_dir: Folder of the data set.
        split: 'train', 'validation' or 'test'.
        verify: Decode every image of the split now rather than its header only; None reads none.
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
    check_split(split, FOLDER_SPLITS)
    root = data_folder(data_dir)
    files = {key: parquet_files(root, key) for key in dict.fromkeys(("train", split))}
    first = None
    for key, paths in files.items():
        if not paths:
            raise FileNotFoundError(f"{root} has no files {_PREFIXES[key]}*.parquet; add them.")
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
        "parquet", data_files={key: list(map(glob.escape, paths)) for key, paths in files.items()},
        columns=[image_column, label_column], cache_dir=None if cache_dir is None else str(cache_dir),
    )
    return _two_columns(splits, str(root), split, image_column, label_column, verify)
