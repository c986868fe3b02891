"""Where predict.py's images come from, and how the workers of a DataLoader read them."""

import argparse
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from huggingface_hub import HfApi
from torch import Tensor
from torch.utils.data import Dataset

from s3n_timm import Classifier
from s3n_timm.data import load_repository, read_stored
from s3n_timm.images import expand_path, find_images, printable


class Item(NamedTuple):
    shard: int
    name: str
    stored: Any  # what read_stored reads


class Source(NamedTuple):
    """All images, in an order that does not change."""

    digest: str
    names: list[str] | None  # paths; None where rows have numbers and are read as a stream
    rows: Any = None


def open_source(args: argparse.Namespace) -> Source:
    kind, _, name = args.source.partition(":")
    path = expand_path(args.source)
    if kind == "hub" and name:
        splits, folder = load_repository(name, streaming=True), expand_path(name)
        if args.split not in splits:
            raise ValueError(f"--split {args.split} is not there: {args.source} has {', '.join(map(str, splits))}.")
        if folder.is_dir():
            digest = digest_files(each for each in sorted(folder.rglob("*")) if each.is_file())
        else:
            digest = str(HfApi().dataset_info(name).sha)
        return open_rows(splits[args.split], digest, args)
    if path.suffix.lower() == ".parquet" and path.is_file():
        files = dict(data=glob.escape(str(path)))  # as a pattern: brackets in a path are no choice of letters
        rows = datasets.load_dataset("parquet", data_files=files, split="data", streaming=True)
        return open_rows(rows, digest_files([path]), args)
    if not path.is_dir():
        raise ValueError(f"SOURCE {printable(path)} is neither a folder nor a .parquet file, nor does it begin with "
                         "hub:.")
    names = list(map(str, find_images(path)))
    if not names:
        raise ValueError(f"SOURCE {printable(path)} has no image, by the suffixes of its files.")
    return Source(digest_names(names), names)


def digest_names(names: Iterable[str]) -> str:
    return hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """Of names, sizes and times: rows are too many to be read twice."""
    stats = [(os.fsencode(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def open_rows(rows: Any, digest: str, args: argparse.Namespace) -> Source:
    """Rows as they are stored: one that cannot be decoded must not end the stream."""
    column = args.image_column
    if rows.column_names and column not in rows.column_names:
        raise ValueError(f"--image-column {column} is not there: the columns are {', '.join(rows.column_names)}.")
    rows = rows.select_columns([column])
    if isinstance((rows.features or {}).get(column), datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return Source(digest, None, rows)


def list_items(source: Source, parts: list[int], args: argparse.Namespace) -> Iterator[Item]:
    """Items with the numbers of their shards; each part, what one --append added, begins a shard of its own."""
    if source.names is None:
        for number, row in enumerate(source.rows):
            yield Item(number // args.shard_size, str(number), row[args.image_column])
        return
    start = shard = 0
    for count in parts:
        for i, name in enumerate(source.names[start:start + count]):
            yield Item(shard + i // args.shard_size, name, name)
        start, shard = start + count, shard + -(-count // args.shard_size)


class Batch(NamedTuple):
    items: list[tuple[int, str]]  # shard and name
    errors: list[str | None]
    images: Tensor | None  # those that could be read
    sizes: Tensor  # height and width in pixels


class Reader(Dataset):
    """Reads batches of items in a worker: its keys are the items themselves, so that streams need no index."""

    def __init__(self, classifier: Classifier) -> None:
        self.transform, self.mode = classifier.transform, classifier.mode

    def __getitems__(self, items: list[Item]) -> Batch:
        errors: list[str | None] = []
        images, sizes = [], []
        for item in items:
            error = None
            try:
                image = read_stored(item.stored, self.mode)
                images.append(self.transform(image))
                sizes.append((image.height, image.width))
            except Exception as fault:  # whatever a file does to Pillow, it is this file's row alone
                error = str(fault) or type(fault).__name__
            errors.append(error)
        return Batch(
            items=[(item.shard, item.name) for item in items],
            errors=errors,
            images=torch.stack(images) if images else None,
            sizes=torch.tensor(sizes),
        )


def keep_batch(batch: Any) -> Any:
    """A DataLoader's `collate_fn`: the reader has stacked what can be stacked."""
    return batch
