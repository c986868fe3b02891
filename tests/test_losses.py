"""Class weights of train.py, and data sets of several labels an image from their CSV file to a trained model."""

import csv
import json
from pathlib import Path

import pytest
from helpers import train
from PIL import Image
from support.arguments import parse_args
from support.losses import list_class_weights, read_class_weights

from s3n_timm.data import load


def write_folder(root: Path, **counts: int) -> Path:
    """Plain images in a folder for each class, the same for training and testing but for one pixel."""
    for split in ("train", "test"):
        for color, (name, count) in enumerate(counts.items()):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (70, 70), (20 * i, 250 * color, 90))
                image.putpixel((0, 0), (255, 0, 255) if split == "test" else (0, 255, 0))
                image.save(root / split / name / f"{i}.png")
    return root


def folder_args(data: Path) -> list[str]:
    return ["--dataset", "folder", "--data-dir", str(data), "--recipe", "birds", "--val-fraction", "0", "--epochs", "1"]


def loss_of(output: Path) -> float:
    with (output / "summary.csv").open() as file:
        return float(next(csv.DictReader(file))["loss"])


def test_balanced_weights_give_each_class_the_same_sum(tmp_path):
    data = load("folder", write_folder(tmp_path / "data", owl=1, kite=2, wren=5), "train")
    args = parse_args([*folder_args(tmp_path), "--class-weights", "balanced", "--output", str(tmp_path / "none")])
    names = data.features["label"].names
    found = dict(zip(names, list_class_weights(args, names, data)))
    assert found == pytest.approx(dict(owl=8 / 3, kite=8 / 6, wren=8 / 15))


@pytest.mark.parametrize(
    ("file", "content"),
    [("w.csv", "class,weight\nwren,0.5\nowl,2\n"), ("w.csv", "\ufeffclass,weight\r\nowl,2.0\r\nwren,.5\r\n"),
     ("w.json", '{"wren": 0.5, "owl": 2}')],
)
def test_weights_of_a_file_are_those_of_the_names(tmp_path, file, content):
    (tmp_path / file).write_text(content, encoding="utf-8")
    assert read_class_weights(tmp_path / file, ["owl", "wren"]) == [2.0, 0.5]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("w.csv", "owl,2\nwren,1\n", "its first line must be class,weight"),
        ("w.csv", "class,weight\nowl,2\n", "no weight for the class 'wren'"),
        ("w.csv", "class,weight\nowl,2\nwren,1\nkite,1\n", "the data set has not, 'kite'"),
        ("w.csv", "class,weight\nowl,2\nwren,1\nowl,1\n", "'owl' twice"),
        ("w.csv", "class,weight\nowl\nwren,1\n", "weight of 'owl' must be a number"),
        ("w.csv", "class,weight\nowl,-1\nwren,1\n", "got '-1'"),
        ("w.csv", "class,weight\nowl,0\nwren,0\n", "every class the weight 0"),
        ("w.json", "[1, 2]", "one object"),
        ("w.json", '{"owl": true, "wren": 1}', "weight of 'owl'"),
        ("w.json", '{"owl": NaN, "wren": 1}', "weight of 'owl'"),
        ("w.json", "{", "cannot be read"),
    ],
)
def test_a_file_that_does_not_weigh_every_class_once_is_refused(tmp_path, file, content, said):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_class_weights(tmp_path / file, ["owl", "wren"])


def test_training_weighs_its_loss(tmp_path):
    """At a rate at which nothing is learned: a weight of 0 leaves the loss of one class, of 2 doubles it."""
    data = write_folder(tmp_path / "data", owl=4, wren=4)
    losses = {}
    for name, owl, wren in (("double", 2, 2), ("owl", 1, 0), ("wren", 0, 1)):
        weights = tmp_path / f"{name}.json"
        weights.write_text(json.dumps(dict(owl=owl, wren=wren)))
        train(*folder_args(data), "--lr", 1e-30, "--class-weights", weights, "--output", tmp_path / name)
        losses[name] = loss_of(tmp_path / name)
    assert losses["double"] == pytest.approx(2 * (losses["owl"] + losses["wren"]), rel=1e-5)
    assert min(losses.values()) > 0.1


def test_other_weights_are_another_run(tmp_path):
    data, weights = write_folder(tmp_path / "data", owl=4, wren=4), tmp_path / "w.json"
    weights.write_text('{"owl": 1, "wren": 2}')
    args = [*folder_args(data), "--class-weights", weights, "--output", tmp_path / "run"]
    train(*args)
    weights.write_text('{"owl": 1, "wren": 3}')
    text = train(*args, "--resume", ok=False)
    assert "class_weights was [1.0, 2.0] and is [1.0, 3.0]" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--class-weights", "equal"], "--class-weights must be balanced, or a .csv or .json file"),
        (["--class-weights", "nowhere.csv"], "nowhere.csv is not a file"),
        (["--class-weights", "balanced", "--balanced"], "leave out --class-weights balanced"),
        (["--class-weights", "balanced", "--dataset", "hub:x", "--streaming"], "counts all labels"),
        (["--bce-sum"], "need --bce-loss"),
        (["--bce-target-thresh", "0.2"], "need --bce-loss"),
        (["--bce-loss", "--bce-target-thresh", "1"], "must lie in [0, 1)"),
        (["--bce-loss", "--distillation", "1"], "leave out --bce-loss"),
        (["--bce-loss", "--snapmix", "5"], "labels weights that may exceed 1"),
    ],
)
def test_what_does_not_combine_is_refused_at_once(args, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(args)
    assert message in capsys.readouterr().err
