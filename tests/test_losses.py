"""Class weights of train.py, and data sets of several labels an image from their CSV file to a trained model."""

import csv
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from helpers import call, train, write_labels
from PIL import Image
from support.arguments import parse_args
from support.losses import list_class_weights, read_class_weights

from s3n_timm import S3N, Classifier, S3NLogits, load_model, save
from s3n_timm.data import load
from s3n_timm.early_exit import answer_batch
from s3n_timm.evaluation import average_precision, mean_average_precision


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
        (["--dataset", "multi-label", "--balanced"], "use --class-weights"),
    ],
)
def test_what_does_not_combine_is_refused_at_once(args, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(args)
    assert message in capsys.readouterr().err


# several labels an image

LABELS = ("--dataset", "multi-label", "--recipe", "birds", "--data-dir")


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """A data set of several labels an image, and a run on it."""
    root = tmp_path_factory.mktemp("labels")
    data = write_labels(root / "data", dict(train=64, val=16, test=24))
    text = train(*LABELS, data, "--epochs", 4, "--answer", "mean", "--class-weights", "balanced",
                 "--output", root / "run")
    return data, root / "run", text


def test_several_labels_are_learned_and_judged_by_average_precision(labeled):
    _, output, text = labeled
    results = json.loads((output / "results.json").read_text())
    assert results["test_map"]["best"]["mean"] > 90
    assert set(results["test_map"]["best"]) == {*S3NLogits._fields, "mean"}
    assert "mAP % on the test split" in text
    assert "top-1" not in text


def test_a_trained_model_gives_each_label_a_probability_of_its_own(labeled):
    data, output, _ = labeled
    for kind in ("best", "backbone"):
        for model in (load_model(output / kind), timm.create_model(f"local-dir:{output / kind}", pretrained=True)):
            classifier = Classifier(model)
            assert classifier.multi_label
            images = [data / "test" / "images" / f"{i}.png" for i in (0, 5, 7)]
            scores = classifier.probabilities(images)
            logits = model(torch.stack([classifier.prepare(image) for image in images]))
            torch.testing.assert_close(scores, logits.sigmoid())
            if kind == "best":
                named = [{a["label"] for a in each if a["score"] > 0.5} for each in classifier(images)]
                assert named == [set(), {"blue", "red"}, {"blue", "green", "red"}]
        assert json.loads((output / kind / "config.json").read_text())["problem_type"] == "multi_label_classification"
    with pytest.raises(ValueError, match="one label an image"):
        Classifier(load_model(output / "best"), exit_entropy=1.0)
    save(load_model(output / "backbone"), output / "again")
    assert Classifier(load_model(output / "again")).multi_label


def test_plain_models_learn_several_labels_too(labeled, tmp_path):
    data, _, _ = labeled
    text = train(*LABELS, data, "--plain", "--epochs", 1, "--mixup", 0.4, "--val-fraction", 0.2,
                 "--smoothing", 0.1, "--output", tmp_path / "run")
    assert "val mAP %" in text
    assert Classifier(load_model(tmp_path / "run" / "best")).multi_label


def test_predict_gives_the_sigmoid_scores(labeled, tmp_path):
    data, output, _ = labeled
    call("predict.py", output / "best", data / "test" / "images", "--output", tmp_path / "rows", "--format", "jsonl",
         "--workers", 0, "--cpu-threads", 1)
    (shard,) = (tmp_path / "rows").glob("shard-*")
    rows = [json.loads(line) for line in shard.read_text().splitlines()]
    row = next(row for row in rows if row["image"].endswith("/7.png"))
    answers = Classifier(load_model(output / "best"))(data / "test" / "images" / "7.png")
    assert row["top5"] == [answer["label"] for answer in answers]
    assert row["top5_probability"] == pytest.approx([answer["score"] for answer in answers], abs=1e-4)
    assert sum(row["top5_probability"]) > 1.5
    expected = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in row["top5_probability"])
    assert row["entropy"] == pytest.approx(expected, abs=1e-3)


def test_evaluate_measures_average_precision(labeled, tmp_path):
    data, output, _ = labeled
    args = ("--dataset", "multi-label", "--data-dir", data, "--cpu-threads", 1, "--workers", 0, "--output", tmp_path)
    text = call("evaluate.py", output / "best", *args)
    assert "Mean average precision" in text
    measures = json.loads((tmp_path / "results.json").read_text())["measures"]
    trained = json.loads((output / "results.json").read_text())["test_map"]["best"]
    for name, value in trained.items():
        assert measures["mean_average_precision"][name] == pytest.approx(value, abs=1e-3)
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert [(row["name"], row["images"]) for row in rows] == [("blue", "12"), ("green", "12"), ("red", "12")]
    text = call("evaluate.py", output / "best", "--num-images", 9, "--cpu-threads", 1, "--workers", 0, ok=False)
    assert "one label an image" in text


def test_average_precision_by_hand():
    """Of four images the first and third by score show the class: (1/1 + 2/3) / 2. The second class is never shown."""
    logits, labels = torch.tensor([[9.0, 1], [50, 2], [-3, 3], [60, 4]]), torch.tensor([[1, 0], [0, 0], [0, 0], [1, 0]])
    found = average_precision(logits, labels)
    assert found[0].item() == pytest.approx((1 + 2 / 3) / 2)
    assert found[1].isnan()
    assert mean_average_precision(logits, labels) == pytest.approx((1 + 2 / 3) / 2)


def test_the_mean_of_several_labels_is_that_of_the_logits():
    model = S3N("test_resnet", num_classes=3, answer="mean", multi_label=True).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        logits, _, _ = model.forward_branches(x)
        torch.testing.assert_close(model(x), torch.stack(list(logits)).mean(0))
    # a class and its absence: their geometric means, scaled to add up to 1
    p, q = (torch.stack([(sign * each).sigmoid() for each in logits]).log().mean(0).exp() for sign in (1, -1))
    torch.testing.assert_close(model(x).sigmoid(), p / (p + q))
    with pytest.raises(ValueError, match="one label an image"):
        S3N("test_resnet", num_classes=3, multi_label=True, exit_entropy=1.0)
    with pytest.raises(ValueError, match="multi_label must be True or False"):
        S3N("test_resnet", num_classes=3, multi_label=1)
    with pytest.raises(ValueError, match="one label an image"):
        answer_batch(model, x)
