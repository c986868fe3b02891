"""examples/data.py: which images training reads, in which order, and what is drawn for them."""

import argparse
import itertools
import random
import shutil
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scripts import EXAMPLES, largest_difference, train

from s3n_timm.data import drawn_birds

sys.path.insert(0, str(EXAMPLES))
from support.loaders import TrainingImages, TrainingSampler, TrainLoader, drawing_from


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

    data = TrainingImages(images, transform, seed=3)
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


def test_processes_share_a_stream(shards):
    labels = datasets.ClassLabel(names=["a", "b", "c", "d"])
    features = datasets.Features(image=datasets.Image(), label=labels)

    def rows(shard):
        for part in shard:
            for i in range(13):
                yield dict(image=Image.new("L", (2, 2), 13 * part + i), label=i % 4)

    stream = datasets.IterableDataset.from_generator(
        rows, gen_kwargs=dict(shard=list(range(4))), features=features)
    args = argparse.Namespace(
        streaming=True, batch_size=3, grad_accum_steps=2, num_images=48, dataset="hub:x", seed=5, shuffle_buffer=10,
        workers=0, epochs=2,
    )

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
