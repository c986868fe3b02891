"""Splits, and loaders that give the same images in the same order however training is divided or interrupted.

What is drawn at random for an image (its crop, its flip) depends on the seed and on its place in training alone: not on
the number of processes and workers, nor on where a run was resumed.
"""

import argparse
import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets.distributed import split_dataset_by_node
from timm.data import MultiLabelTarget
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, get_worker_info

from s3n_timm.data import (
    check_disjoint,
    class_names,
    has_validation,
    is_multi_label,
    load,
    read_stored,
    store_images,
)

Transform = Callable[[Any], Tensor]


def load_splits(args: argparse.Namespace, verify: bool | None) -> dict[str, Any]:
    """Training, validation and test images; without a validation part, validation is the test split itself.

    All images are decoded, and compared with those of the other splits, where verify is true; None reads none.
    Where the files of a data set have a validation part, args.val_split is set to it: it takes the place of
    --val-fraction, as a split of the Hub does.
    """
    if not args.val_split and has_validation(args.dataset, args.data_dir):
        args.val_split = "validation"
    kind = args.dataset.partition(":")[0]
    options: dict[str, Any] = dict(verify=False if args.streaming else verify)
    if kind in ("hub", "parquet"):
        options.update(image_column=args.image_column, label_column=args.label_column)
    if args.streaming:
        options.update(streaming=True)
    names = (args.train_split, args.test_split) if kind == "hub" else ("train", "test")
    if kind == "birds":
        counts = (args.num_images, count_test_birds(args.num_images, args.num_classes))
        splits = [load("birds", split=name, num_images=count, num_classes=args.num_classes, size=args.img_size)
                  for name, count in zip(names, counts)]
    else:
        splits = [load(args.dataset, args.data_dir, name, **options) for name in names]
    train, test = splits
    val = test
    if args.val_split:
        val = load(args.dataset, args.data_dir, args.val_split, **options)
    elif args.val_fraction:
        train, val = hold_out(train, args.val_fraction, args.seed)
    if verify and not args.streaming and kind != "birds":  # birds of two splits are drawn apart
        check_disjoint(train=train, test=test, **({} if val is test else dict(validation=val)))
    return dict(train=train, val=val, test=test)


def spread_over(dataset: datasets.Dataset, count: int) -> datasets.Dataset:
    """At most `count` images, evenly spaced: data sets are often in the order of their classes."""
    count = min(count, len(dataset))
    return dataset.select([place * len(dataset) // count for place in range(count)])


def hold_out(train: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training images without a part of every class, and that part: at least one image of each, in both.

    Where images have several labels it is a part of all, and training keeps an image of each class.

    Raises:
        ValueError: a class has too few images, or no image can be spared.
    """
    if is_multi_label(train):
        try:
            parts = train.train_test_split(fraction, seed=seed)
        except ValueError as error:
            raise ValueError(f"--val-fraction {fraction} cannot be held out of training: {error}") from error
        val, rest = lend_classes(parts["test"], parts["train"])
        if not len(val):
            raise ValueError(f"--val-fraction {fraction} holds out only images of classes that no other image has: "
                             "give validation images of your own (DATA/val), or --val-fraction 0.")
        return rest, val
    labels, counts = np.unique(train.with_format(None)["label"][:], return_counts=True)
    if counts.min() < 2:
        name = class_names(train)[labels[counts.argmin()]]
        raise ValueError(f"Class {name!r} has one training image, so none can be held out for validation: add some, "
                         "give validation images of your own (DATA/val), or --val-fraction 0.")
    held = max(math.ceil(fraction * len(train)), len(counts))
    if len(train) - held < len(counts):
        raise ValueError(f"--val-fraction {fraction} of {len(train)} images leaves less than one for each of "
                         f"{len(counts)} classes to train on: give a smaller one.")
    parts = train.train_test_split(held, stratify_by_column="label", seed=seed)
    rest, val = lend_classes(parts["train"], parts["test"])  # the shares of small classes were rounded
    val, rest = lend_classes(val, rest)
    return rest, val


def lend_classes(
        source: datasets.Dataset, target: datasets.Dataset,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Both, after images of the classes that the target lacks have gone there, no more than one for each."""
    known = {label for labels in list_labels(target) for label in labels}
    left, lent = [], []
    for row, labels in enumerate(list_labels(source)):
        (left if known.issuperset(labels) else lent).append(row)
        known.update(labels)
    if not lent:
        return source, target
    return source.select(left), datasets.concatenate_datasets([target, source.select(lent)])


def list_labels(split: datasets.Dataset) -> list[list[int]]:
    """The labels of each image, one or several."""
    labels = split.with_format(None)["label"][:]
    return labels if is_multi_label(split) else [[label] for label in labels]


def count_test_birds(num_images: int, num_classes: int) -> int:
    """Drawn birds of the test split beside so many for training."""
    return max(num_images // 4, num_classes)


def count_images(split: Any) -> int | None:
    """Images of a split; None for a stream that doesn't know."""
    return len(split) if isinstance(split, datasets.Dataset) else None


# randomness by place


def mix_seeds(*seeds: int) -> int:
    """One seed of 32 bits that differs wherever one of the given does."""
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


@contextmanager
def drawing_from(*seed: int) -> Iterator[None]:
    """Seed every generator that transforms draw from, and bring them back as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the devices' generators too, which the model draws from
        for generator in (random.seed, np.random.seed, torch.default_generator.manual_seed):
            generator(mix_seeds(*seed))
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def read_row(row: dict[str, Any], transform: Transform, mode: str) -> dict[str, Any]:
    """The transformed image and the label of a row of `store_images`."""
    return dict(image=transform(read_stored(row["image"], mode)), label=row["label"])


def label_reader(split: Any) -> Callable[[Any], Any]:
    """What makes the target of a row's label: of several labels C numbers, 1 for each label and 0 elsewhere."""
    return MultiLabelTarget(len(class_names(split))) if is_multi_label(split) else int


class TrainingImages(Dataset):
    """Augmented images by (index, place in training)."""

    def __init__(self, images: datasets.Dataset, transform: Transform, seed: int, mode: str) -> None:
        self.images = store_images(images.select_columns(["image", "label"]))
        self.transform, self.seed, self.mode = transform, seed, mode
        self.read_label = label_reader(images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, place = key
        with drawing_from(self.seed, place):
            row = read_row(self.images[index], self.transform, self.mode)
        return dict(row, label=self.read_label(row["label"]))


class TrainingSampler(Sampler[tuple[int, int]]):
    """(Index, place in training) of an epoch's images, from any place of the epoch on.

    Args:
        labels: N class indices.
        length: images of an epoch.
        seed: of the order; each epoch has its own.
        balanced: draw every class equally often, with replacement; else each image at most once.
    """

    def __init__(self, labels: Tensor, length: int, seed: int, balanced: bool = False) -> None:
        self.labels, self.length, self.seed, self.balanced = labels, length, seed, balanced
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        if self.balanced:
            weights = 1 / torch.bincount(self.labels)[self.labels].double()
            order = torch.multinomial(weights, self.length, replacement=True, generator=generator)
        else:
            order = torch.randperm(len(self.labels), generator=generator)[:self.length]
        first = self.epoch * self.length
        return zip(order[self.start:].tolist(), range(first + self.start, first + self.length))

    def __len__(self) -> int:
        return self.length - self.start


# what workers run: objects of this module, which every start method of processes can send to them


class StreamedTraining:
    """Augments the rows of one pass of a process over its stream."""

    def __init__(self, transform: Transform, mode: str, *seed: int) -> None:
        self.transform, self.mode, self.seed = transform, mode, seed

    def __call__(self, row: dict[str, Any], place: int) -> dict[str, Any]:
        worker = get_worker_info()
        with drawing_from(*self.seed, worker.id if worker else 0, place):
            return read_row(row, self.transform, self.mode)


class EvaluationBatch:
    """Transforms the rows of a batch."""

    def __init__(self, transform: Transform, mode: str, read_label: Callable[[Any], Any]) -> None:
        self.transform, self.mode, self.read_label = transform, mode, read_label

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        images = [self.transform(read_stored(image, self.mode)) for image in batch["image"]]
        return dict(image=images, label=[self.read_label(label) for label in batch["label"]])


# loaders


class TrainLoader:
    """Batches of one process, epoch by epoch.

    Every epoch has the same number of updates, each of as many images as all processes read between two steps of the
    optimizer; the images that are left over wait for another epoch's order.

    Args:
        split: data set or stream with the columns image and label.
        transform: of a PIL image; it must be picklable where args.workers is not 0.
        mode: in which images are read, see `s3n_timm.images.image_mode`.
    """

    def __init__(
            self, split: Any, transform: Transform, args: argparse.Namespace, accelerator: Accelerator,
            mode: str,
    ) -> None:
        self.split, self.args, self.accelerator, self.mode = split, args, accelerator, mode
        self.images_per_update = args.batch_size * accelerator.num_processes * args.grad_accum_steps
        count = count_images(split) or args.num_images
        if count is None:
            raise ValueError(f"--dataset {args.dataset} is streamed: give --num-images, the images of an epoch.")
        self.updates_per_epoch = count // self.images_per_update
        if not self.updates_per_epoch:
            raise ValueError(
                f"An update reads {self.images_per_update} images (--batch-size × processes × --grad-accum-steps), "
                f"more than the {count} of training: lower --batch-size."
            )
        if args.streaming:
            split = store_images(split).shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
            self.split = split_dataset_by_node(split, accelerator.process_index, accelerator.num_processes)
            self.transform = transform
            return
        # only --balanced, which images with several labels can't have, looks at them
        labels = torch.as_tensor([0] * count if is_multi_label(split) else split.with_format(None)["label"][:])
        length = self.updates_per_epoch * self.images_per_update
        self.sampler = TrainingSampler(labels, length, args.seed, args.balanced)
        loader = DataLoader(
            TrainingImages(split, transform, args.seed, mode),
            batch_sampler=BatchSampler(self.sampler, args.batch_size, drop_last=True),
            num_workers=args.workers,
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=args.workers > 0,  # only this process holds the sampler, which `read` sets
        )
        self.loader = accelerator.prepare(loader)

    def read(self, epoch: int, update: int) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch from its `update`-th update on."""
        if self.args.streaming:
            return self._stream(epoch, update)
        self.sampler.epoch, self.sampler.start = epoch, update * self.images_per_update
        return iter(self.loader)

    def close(self) -> None:
        """End the workers that live on between epochs.

        Left to the garbage collector, which may end their queues first, they never hear that they are done.
        """
        iterator = None if self.args.streaming else self.loader._iterator
        if iterator is not None and self.args.workers:
            iterator._shutdown_workers()

    def _stream(self, epoch: int, update: int) -> Iterator[dict[str, Tensor]]:
        """Pass after pass over this process's part of the stream; what the epoch has read is read again and dropped."""

        def passes() -> Iterator[dict[str, Tensor]]:
            for number in itertools.count():
                augment = StreamedTraining(
                    self.transform, self.mode, self.args.seed, epoch, number, self.accelerator.process_index)
                rows = self.split.map(augment, with_indices=True)
                # each pass has an order of its own, the later ones of an epoch far from those of other epochs
                rows.set_epoch(epoch + number * self.args.epochs)
                loader = DataLoader(
                    rows,
                    self.args.batch_size,
                    num_workers=self.args.workers,
                    pin_memory=self.accelerator.device.type == "cuda",
                    drop_last=True,
                )
                seen = 0
                for seen, batch in enumerate(loader, 1):  # noqa: B007
                    yield batch
                if not seen:
                    raise ValueError(f"--dataset {self.args.dataset} gives a process less than one batch: lower -b.")

        steps = self.args.grad_accum_steps
        batches = itertools.islice(passes(), update * steps, self.updates_per_epoch * steps)
        device = self.accelerator.device
        return (send_to_device(batch, device, non_blocking=device.type == "cuda") for batch in batches)


def create_eval_loader(
        split: Any, transform: Transform, args: argparse.Namespace, accelerator: Accelerator, mode: str,
) -> Any:
    """A loader prepared by Accelerate, for `gather_for_metrics`."""
    images = store_images(split.select_columns(["image", "label"]))
    transform_batch = EvaluationBatch(transform, mode, label_reader(split))
    if isinstance(split, datasets.Dataset):
        images = images.with_transform(transform_batch)
    else:
        images = images.map(transform_batch, batched=True, batch_size=args.batch_size)
    loader = DataLoader(
        images, args.batch_size, num_workers=args.workers, pin_memory=accelerator.device.type == "cuda")
    return accelerator.prepare(loader)
