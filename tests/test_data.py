"""examples/support/loaders.py: which images training reads, in which order, and what is drawn for them."""

import argparse
import io
import itertools
import multiprocessing
import random
import shutil
from types import SimpleNamespace

import datasets
import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import largest_difference, train
from PIL import Image
from support.arguments import parse_args
from support.loaders import (
    TrainingImages,
    TrainingSampler,
    TrainLoader,
    create_eval_loader,
    drawing_from,
    load_splits,
)
from timm.data import create_transform

from s3n_timm.data import drawn_birds, recognition_features


def read(sampler, epoch, start=0):
    sampler.epoch, sampler.start = epoch, start
    keys = list(sampler)
    assert len(keys) == len(sampler)
    return keys


def test_an_epoch_reads_each_image_at_most_once_and_others_later():
    sampler = TrainingSampler(torch.zeros(23, dtype=torch.long), length=20, seed=1)
    first, second = read(sampler, 0), read(sampler, 1)
    assert len({index for index, _ in first}) == 20
    assert [index for index, _ in first] != [index for index, _ in second]
    assert [place for _, place in first + second] == list(range(40))
    assert read(sampler, 1, start=8) == second[8:]
    assert read(TrainingSampler(torch.zeros(23, dtype=torch.long), length=20, seed=2), 0) != first


def test_balanced_sampling_draws_classes_equally_often():
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    counts = torch.zeros(3)
    for epoch in range(40):
        keys = read(TrainingSampler(labels, 90, seed=0, balanced=True), epoch)
        counts += torch.bincount(labels[[index for index, _ in keys]], minlength=3)
    share = counts / counts.sum()
    assert (share - 1 / 3).abs().max() < 0.03  # 3,600 draws: four standard deviations


def test_augmentation_depends_on_the_place_alone_and_leaves_the_generators_as_they_were():
    images = drawn_birds("train", 4, 2, 64)

    def transform(_):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])

    data = TrainingImages(images, transform, 3, "RGB")
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = data[1, 17]["image"]
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(data[1, 17]["image"], first)
    assert torch.equal(data[2, 17]["image"], first)
    assert (data[1, 18]["image"] != first).all()
    assert len(set(first.tolist())) == 3
    with drawing_from(3, 17):
        assert random.random() == pytest.approx(first[0].item())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Parquet files with other column names, the training images in four shards of 13."""
    folder = tmp_path_factory.mktemp("parquet")
    for seed, (split, count, parts) in enumerate((("train", 52, 4), ("validation", 9, 1), ("test", 13, 1))):
        birds = drawn_birds("test", count, 4, 64, seed=seed)
        birds = birds.select_columns(["image", "label"]).rename_columns(dict(image="picture", label="kind"))
        for part in range(parts):
            birds.shard(parts, part).to_parquet(folder / f"{split}-{part:05d}-of-{parts:05d}.parquet")
    return folder


def stream_args(shards, *more):
    return (
        "--dataset", f"hub:{shards}", "--recipe", "birds", "--image-column", "picture", "--label-column", "kind",
        "--streaming", "--val-split", "validation", "--num-images", 52, "--epochs", 2, *more,
    )


def loader_args(**options):
    return argparse.Namespace(**dict(
        streaming=False, balanced=False, batch_size=2, grad_accum_steps=1, num_images=None, dataset="birds", seed=5,
        shuffle_buffer=4, workers=0, epochs=3) | options)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def take(transformed):
    return transformed["image"].flatten().tolist()


def first_pixel(image):
    """A transform that augments: the place's own draw is added to the image's first pixel."""
    return torch.tensor([float(np.asarray(image).flat[0]), torch.rand(()).item()])


@pytest.fixture(scope="module")
def numbered():
    """Images that hold their index, as 16-bit PNGs of which every other way of reading makes white."""
    features = recognition_features(["a", "b"])
    images = []
    for index in range(9):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 5), index * 257, np.uint16)).save(file, "PNG")
        images.append(dict(bytes=file.getvalue(), path=None))
    return datasets.Dataset.from_dict(dict(image=images, label=[0, 1] * 4 + [0]), features=features)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_all_loaders_read_16_bits_alike(numbered, accelerator, mode):
    train = TrainLoader(numbered, first_pixel, loader_args(), accelerator, mode)
    stream = TrainLoader(
        numbered.to_iterable_dataset(), first_pixel, loader_args(streaming=True, num_images=8), accelerator, mode)
    seen = [sorted(value for batch in each.read(0, 0) for value in batch["image"][:, 0].tolist())
            for each in (train, stream)]
    assert [len(values) for values in seen] == [8, 8]
    assert all(set(values) <= set(range(9)) and len(set(values)) == 8 for values in seen)
    for split in (numbered, numbered.to_iterable_dataset()):
        loader = create_eval_loader(split, first_pixel, loader_args(), accelerator, mode)
        assert [value for batch in loader for value in batch["image"][:, 0].tolist()] == list(range(9))


def test_workers_live_on_between_epochs_and_change_nothing(numbered, accelerator):
    alone = TrainLoader(numbered, first_pixel, loader_args(), accelerator, "RGB")
    workers = TrainLoader(numbered, first_pixel, loader_args(workers=2), accelerator, "RGB")
    places = [(0, 0), (1, 2), (1, 0), (2, 3)]  # from the middle too, as a resumed epoch
    pids = set()
    for epoch, update in places:
        expected = [take(batch) for batch in alone.read(epoch, update)]
        assert [take(batch) for batch in workers.read(epoch, update)] == expected
        pids.add(tuple(worker.pid for worker in workers.loader._iterator._workers))
    assert len(pids) == 1
    next(workers.read(0, 0))  # an epoch that was stopped leaves nothing to the next
    assert [take(batch) for batch in workers.read(2, 3)] == expected


@pytest.fixture
def forkserver():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_loaders_can_be_sent_to_workers_that_are_not_forked(numbered, accelerator, forkserver):
    """As on macOS and Windows; with the transforms of timm."""
    augment = create_transform(32, is_training=True, re_prob=0.5, color_jitter=0.4)
    squash = create_transform(32)
    args, inside = loader_args(workers=1), loader_args()
    stream = numbered.to_iterable_dataset()
    train = [TrainLoader(numbered, augment, each, accelerator, "RGB") for each in (args, inside)]
    streamed = [TrainLoader(stream, augment, loader_args(streaming=True, num_images=4, workers=1), accelerator, "RGB")]
    ours, theirs = ([take(batch) for batch in each.read(1, 0)] for each in train)
    assert ours == theirs
    assert len(list(streamed[0].read(0, 0))) == 2
    for split in (numbered, stream):
        ours, theirs = ([take(batch) for batch in create_eval_loader(split, squash, each, accelerator, "RGB")]
                        for each in (args, inside))
        assert ours == theirs


def test_evaluate_can_send_its_rows_to_workers_that_are_not_forked(accelerator, forkserver):
    birds = drawn_birds("test", 6, 3, 64)
    rows = evaluate.TransformRows(create_transform(32), "RGB", [2, 0, 1])
    ours, theirs = (list(accelerator.prepare(evaluate.create_loader(birds, rows, loader_args(workers=workers))))
                    for workers in (1, 0))
    assert [batch["label"].tolist() for batch in ours] == [[2, 0], [1, 2], [0, 1]]
    for left, right in zip(ours, theirs, strict=True):
        assert left.keys() == right.keys() >= {"image", "label", "index", "sizes", "box", "parts"}
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_memory_is_pinned_for_a_gpu(numbered, split, monkeypatch):
    made = {}
    monkeypatch.setattr("support.loaders.DataLoader", lambda *_, **options: made.update(options))
    process = SimpleNamespace(
        num_processes=1, process_index=0, device=torch.device("cuda"), prepare=lambda loader: loader)
    if split == "train":
        TrainLoader(numbered, first_pixel, loader_args(), process, "RGB")
    else:
        create_eval_loader(numbered, first_pixel, loader_args(), process, "RGB")
    assert made["pin_memory"]


def write_images(folder, *names):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / name)


def test_a_folders_own_validation_part_is_used(tmp_path):
    write_images(tmp_path, *(f"{part}/{kind}/{index}.png" for part in ("train", "test") for kind in "ab"
                             for index in range(4)))
    words = ("--dataset", "folder", "--data-dir", str(tmp_path), "--output", str(tmp_path / "out"))
    splits = load_splits(parse_args([*words, "--val-fraction", "0"]), verify=True)
    assert splits["val"] is splits["test"]
    splits = load_splits(parse_args([*words, "--val-fraction", "0.25"]), verify=True)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [6, 2, 8]
    for index, kind in enumerate("ab"):
        (tmp_path / "valid" / kind).mkdir(parents=True)
        Image.new("RGB", (20, 20), (100 + index, 0, 0)).save(tmp_path / "valid" / kind / "1.png")
    args = parse_args([*words, "--val-fraction", "0", "--patience", "1"])
    splits = load_splits(args, verify=True)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [8, 2, 8]
    assert args.val_split == "validation"


def test_processes_share_a_stream(shards):
    labels = datasets.ClassLabel(names=["a", "b", "c", "d"])
    features = datasets.Features(image=datasets.Image(), label=labels)

    def rows(shard):
        for part in shard:
            for i in range(13):
                yield dict(image=Image.new("L", (2, 2), 13 * part + i), label=i % 4)

    stream = datasets.IterableDataset.from_generator(
        rows, gen_kwargs=dict(shard=list(range(4))), features=features)
    args = loader_args(
        streaming=True, batch_size=3, grad_accum_steps=2, num_images=48, shuffle_buffer=10, epochs=2)

    def loader(rank):
        process = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        return TrainLoader(stream, lambda image: torch.tensor(image.getpixel((0, 0))), args, process, mode="L")

    def images(rank, epoch, update=0):
        return [batch["image"].tolist() for batch in loader(rank).read(epoch, update)]

    assert loader(0).updates_per_epoch == 4
    ours, theirs = images(0, 0), images(1, 0)
    assert len(ours) == len(theirs) == 8  # four updates of two batches
    first, second = (set(itertools.chain(*batches)) for batches in (ours, theirs))
    assert not first & second
    assert len(first) == len(second) == 24
    assert images(0, 0) == ours
    assert images(0, 0, update=3) == ours[6:]
    assert images(0, 1) != ours


def test_streamed_training_stops_and_goes_on(shards, tmp_path):
    args = (*stream_args(shards), "--checkpoint-every", 4, "--checkpoint-hist", 9)
    text = train(*args, "--output", tmp_path / "whole")
    assert "streamed train, streamed val, streamed test" in text
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("update-6", "update-8", "update-12"):
        (tmp_path / "cut" / "checkpoints" / name / "optimizer.bin").unlink()
    text = train(*args, "--output", tmp_path / "cut", "--resume")
    assert "Resumed from" in text
    assert "after 0 epochs and 4 updates" in text
    assert largest_difference(tmp_path / "cut", tmp_path / "whole") == 0


def test_streamed_images_are_evaluated_once_by_two_processes(shards, tmp_path):
    train(*stream_args(shards), "--epochs", 1, "--batch-size", 4, "--output", tmp_path / "two", processes=2)
    header, row = (tmp_path / "two" / "summary.csv").read_text().split()
    shares = [float(value) for name, value in zip(header.split(","), row.split(",")) if name.startswith("val_")]
    assert all(abs(share * 9 / 100 - round(share * 9 / 100)) < 1e-9 for share in shares)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--balanced"], "--balanced needs all labels at hand"),
        (["--label-column", "nonsense"], "has no column 'nonsense'"),
        (["--test-split", "nonsense"], "has no split 'nonsense'"),
    ],
)
def test_bad_streams_end_in_one_sentence(shards, tmp_path, extra, message):
    text = train(*stream_args(shards, *extra), "--output", tmp_path / "run", ok=False)
    assert message in text
    assert "Traceback" not in text


def test_columns_and_splits_of_a_repository_that_is_not_streamed(shards, tmp_path):
    args = [word for word in stream_args(shards) if word != "--streaming"]
    text = train(*args, "--output", tmp_path / "run")
    assert "52 train, 9 val, 13 test" in text
