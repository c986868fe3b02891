"""examples/predict.py as its users run it."""

import ast
import os
import signal
import subprocess
import time

import datasets
import numpy as np
import pytest
import timm
import torch
from helpers import ENVIRONMENT, command, run
from PIL import Image

from s3n_timm import S3N, Classifier, save
from s3n_timm.data import drawn_birds
from s3n_timm.evaluation import Crop, magnified_boxes
from s3n_timm.sampling import warp_grid

NAMES = ["robin", "wren", "jay", "crow"]
COUNT = 23
FAST = ("--shard-size", 5, "--batch-size", 3, "--cpu-threads", 1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    model = S3N("test_resnet", len(NAMES)).eval()
    torch.nn.init.normal_(model.fusion.weight, std=20)
    folder = tmp_path_factory.mktemp("weights")
    save(model, folder, label_names=NAMES)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder in folders, one file of which is no image."""
    folder = tmp_path_factory.mktemp("photographs")
    for i, image in enumerate(drawn_birds("test", COUNT, 4, 100)["image"]):
        path = folder / f"{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image.resize((100, 140) if i % 2 else (100, 80)).save(path)
    (folder / "1" / "07.png").write_bytes((folder / "1" / "07.png").read_bytes()[:500])
    (folder / "notes.txt").write_text("no image, and not named like one")
    return folder


def read(folder, kind="parquet"):
    reader = dict(
        parquet=datasets.Dataset.from_parquet, csv=datasets.Dataset.from_csv, jsonl=datasets.Dataset.from_json)
    cache = str(folder / "cache")
    return [row for path in sorted(folder.glob(f"shard-*.{kind}")) for row in reader[kind](str(path), cache_dir=cache)]


@pytest.fixture(scope="module")
def predictions(model_folder, photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions") / "out"
    text = run(command("predict.py", model_folder, photographs, "--output", folder, *FAST), ok=False)
    assert "1 images could not be read" in text
    assert "images/s" in text
    return folder


def test_rows_are_the_answers_of_the_model(model_folder, photographs, predictions):
    rows, classifier = read(predictions), Classifier.from_pretrained(model_folder)
    paths = sorted(str(path) for path in photographs.rglob("*.png"))
    assert [row["image"] for row in rows] == paths
    assert len(list(predictions.glob("shard-*"))) == 5
    for row in rows:
        if row["image"].endswith("1/07.png"):
            assert "cannot be read" in row.pop("error")
            assert row.pop("image")
            assert set(row.values()) == {None}
            continue
        expected = classifier(row["image"])
        assert row["error"] is None
        assert row["top5"] == [each["label"] for each in expected]
        assert row["top5_probability"] == pytest.approx([each["score"] for each in expected], abs=1e-5)
        assert (row["label"], row["probability"]) == (row["top5"][0], row["top5_probability"][0])
        p = np.array(row["top5_probability"])
        assert row["entropy"] == pytest.approx(float(-(p * np.log(p.clip(1e-30))).sum()), abs=1e-4)
        seen = classifier.model.explain(classifier.prepare(row["image"])[None])
        assert row["peaks"] == seen.sample.peaks.sum()
        if row["box_discriminative"] is not None:
            x0, y0, x1, y1 = row["box_discriminative"]
            width, height = Image.open(row["image"]).size
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
    assert any(row.get("box_discriminative") for row in rows)


def test_boxes_surround_what_is_magnified():
    """A bump in the upper left of the map, on an image that is squashed into the input."""
    x = torch.arange(31.0)
    q = 0.09 + torch.exp(-((x - 8).square()[:, None] + (x - 8).square()) / 8)[None]
    grid = warp_grid(q, (64, 64))
    (box,) = magnified_boxes(grid, torch.tensor([[200, 400]]), Crop((64, 64), 1.0, "squash"))
    centre = ((box[0] + box[2]) / 2 / 400, (box[1] + box[3]) / 2 / 200)
    assert centre == pytest.approx((8 / 30, 8 / 30), abs=0.08)
    assert 0.1 < (box[2] - box[0]) / 400 < 0.6
    assert (box[2] - box[0]) / 400 == pytest.approx(((box[3] - box[1]) / 200).item(), abs=0.01)
    flat = magnified_boxes(warp_grid(torch.ones(1, 31, 31), (64, 64)), torch.tensor([[200, 400]]), Crop((64, 64)))
    assert flat.isnan().all()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_formats_agree(model_folder, photographs, predictions, tmp_path, kind):
    run(command("predict.py", model_folder, photographs, "--output", tmp_path, "--format", kind, *FAST), ok=False)
    rows = read(tmp_path, kind)
    assert len(rows) == COUNT
    for ours, expected in zip(rows, read(predictions)):
        for name, value in expected.items():
            mine = ast.literal_eval(ours[name]) if kind == "csv" and isinstance(value, list) else ours[name]
            assert mine == (pytest.approx(value, abs=1e-6) if isinstance(value, (float, list)) and name != "top5"
                            else value), name


def test_two_processes_write_what_one_writes(model_folder, photographs, predictions, tmp_path):
    run(command("predict.py", model_folder, photographs, "--output", tmp_path, *FAST, processes=2), ok=False)
    assert sorted(path.name for path in tmp_path.glob("shard-*")) == sorted(
        path.name for path in predictions.glob("shard-*"))
    for ours, expected in zip(read(tmp_path), read(predictions), strict=True):
        assert ours["probability"] == (None if expected["probability"] is None
                                       else pytest.approx(expected["probability"], abs=1e-5))
        for name in ("image", "label", "error"):
            assert ours[name] == expected[name]


def test_a_killed_run_goes_on_without_loss_or_repetition(model_folder, photographs, predictions, tmp_path):
    words = command("predict.py", model_folder, photographs, "--output", tmp_path, *FAST)
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("shard-000001-*")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    run(words, ok=False)
    assert [row["image"] for row in read(tmp_path)] == [row["image"] for row in read(predictions)]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "whole shards are not written again"
    assert "choose another folder" in run([*words, "--split", "other"], ok=False)


def test_parquet_and_hub_sources(model_folder, photographs, predictions, tmp_path):
    paths = sorted(photographs.rglob("*.png"))
    stored = [dict(bytes=path.read_bytes(), path=None) for path in paths]
    features = datasets.Features(picture=datasets.Image(decode=False))
    rows = datasets.Dataset.from_dict(dict(picture=stored), features=features)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "test.parquet")
    expected = read(predictions)
    for source in (tmp_path / "data" / "test.parquet", f"hub:{tmp_path / 'data'}"):
        folder = tmp_path / f"out{len(str(source))}"
        words = command("predict.py", model_folder, source, "--image-column", "picture", "--output", folder, *FAST)
        run(words, ok=False)
        found = read(folder)
        assert [row["image"] for row in found] == [str(i) for i in range(COUNT)]
        assert [row["label"] for row in found] == [row["label"] for row in expected]
        assert ["cannot be read" in (row["error"] or "") for row in found] == [bool(row["error"]) for row in expected]
        assert found[0]["box_discriminative"] == pytest.approx(expected[0]["box_discriminative"], abs=1e-3)


def test_plain_models_have_no_peaks(photographs, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "plain", safe_serialization=True)
    words = command("predict.py", tmp_path / "plain", photographs / "0", "--output", tmp_path / "out", *FAST)
    run(words)
    assert all(row["peaks"] is None and row["box_complementary"] is None and row["label"] in "012"
               for row in read(tmp_path / "out"))


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("nowhere", [], "is neither a folder nor"),
        ("EMPTY", [], "has no image: their names end in"),
        ("PHOTOGRAPHS", ["--shard-size", 0], "--shard-size must be positive"),
        ("PHOTOGRAPHS", ["--output", "EMPTY/used"], "is not empty"),
    ],
)
def test_bad_arguments_end_in_one_sentence(model_folder, photographs, tmp_path, source, more, message):
    (tmp_path / "used").mkdir()
    source = dict(EMPTY=tmp_path, PHOTOGRAPHS=photographs).get(source, source)
    more = [str(word).replace("EMPTY", str(tmp_path)) for word in more]
    if "used" in str(more):
        (tmp_path / "used" / "diary.txt").write_text("mine")
    text = run(command("predict.py", model_folder, source, *more), ok=False)
    assert message in text
    assert "Traceback" not in text


def test_bad_weights_end_in_one_sentence(photographs, tmp_path):
    text = run(command("predict.py", tmp_path / "none", photographs, "--output", tmp_path / "out"), ok=False)
    assert "cannot be loaded" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
