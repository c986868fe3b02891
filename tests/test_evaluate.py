"""examples/evaluate.py and the figures under it: real processes, answers known by hand, and plain loops beside it."""

import argparse
import csv
import itertools
import json
import math
import shutil
from pathlib import Path

import evaluate
import numpy as np
import pytest
import timm
import torch
from helpers import Forked, assert_near, call, command
from helpers import run as run_process
from PIL import Image
from support import reports
from support.loaders import load_splits
from timm.data import create_transform
from timm.models import save_for_hf
from torch import tensor

import s3n_timm
from s3n_timm import S3N, S3NLogits, SelectiveSample, evaluation, save
from s3n_timm.data import PARTS, cub, draw_bird, drawn_birds
from s3n_timm.early_exit import answer_batch
from s3n_timm.evaluation import (
    Crop,
    as_plain,
    carry_annotations,
    cross_calibrate,
    draw_confusions,
    measure_batch,
    result_tables,
    summarize,
)
from s3n_timm.outputs import Explanation
from s3n_timm.sampling import BranchSample

CUB50 = Path(__file__).parents[2] / "shared" / "data" / "cub50"
CLASSES, SIZE, CROP = 6, 64, 0.8
CONFIG = dict(
    input_size=(3, SIZE, SIZE), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=CROP,
    crop_mode="center",
)
BRANCHES = ("original", "discriminative", "complementary")
FILES = ("per_class.csv", "confused.csv", "predictions.csv")
# a backend that is not there: as in a process that inherits that of a notebook
HERE = dict(COLUMNS="100", MPLBACKEND="module://nowhere")


def create_model(**options):
    torch.manual_seed(3)
    return S3N("test_resnet", num_classes=CLASSES, backbone_args=dict(output_stride=16), **options).eval()


def bird_names():
    return drawn_birds("test", CLASSES, CLASSES, SIZE).features["label"].names


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return save(create_model(), folder, label_names=bird_names(), data_config=CONFIG)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """main() of the script in this process, with what it wrote; the slow imports are done once."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(*args, output=None, workers=0):
        output = output or tmp_path / "out"
        args = [*args, "--workers", workers, "--cpu-threads", 1, "--output", output]
        evaluate.main(list(map(str, args)))
        return json.loads((output / "results.json").read_text())

    return call


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# processes


def test_two_processes_and_one_give_the_same_figures(weights, tmp_path):
    # 21 images: one process has a last batch of 5, two processes have one of 5 and one that is all repeats
    args = [weights, "--num-images", 21, "--batch-size", 8]
    fast = ("--workers", 0, "--cpu-threads", 1)
    text = run_process(command("evaluate.py", *args, *fast), **HERE)
    one, two = weights / "evaluation-birds-test", tmp_path / "two"
    assert text.count("hit rate") == Forked(
        "evaluate.py", *args, *fast, "--output", two, processes=2, **HERE).end().count("hit rate") == 1
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
    runs = ours.pop("run"), theirs.pop("run")
    assert [(each["processes"], each["mixed_precision"]) for each in runs] == [(1, "no"), (2, "no")]
    assert_near(ours, theirs)
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert [row["index"] for row in read_csv(two / "predictions.csv")] == [str(i) for i in range(21)]
    assert sorted(path.name for path in two.iterdir()) == sorted([*FILES, "results.json", "confusion.png"])
    for word in ("table 1", "table 2", "figure 5", "figure 6", *S3NLogits._fields, *PARTS):
        assert word in text, word


# plain loops beside it


def write_cub(root, model, count=11):
    """Drawn birds in CUB's layout, on canvases of three shapes, most of them with the label that the model gives."""
    (root / "images").mkdir(parents=True)
    (root / "parts").mkdir()
    transform, rng = create_transform(**CONFIG), np.random.default_rng(7)
    lines = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")}
    locations = []

    def add(image_id, name, label, box, parts, train):
        lines["images"].append(f"{image_id} {name}")
        lines["image_class_labels"].append(f"{image_id} {label + 1}")
        lines["train_test_split"].append(f"{image_id} {train}")
        lines["bounding_boxes"].append(" ".join(map(str, (image_id, *box))))
        locations.extend(f"{image_id} {part + 1} {x} {y} {seen}" for part, (x, y, seen) in enumerate(parts))

    for i in range(count):
        width, height = ((130, 90), (84, 120), (90, 90))[i % 3]
        bird = draw_bird(rng, i % CLASSES, CLASSES, 80)
        left, top = rng.integers(0, (width - 79, height - 79)).tolist()
        canvas = Image.new("RGB", (width, height), (90, 140, 90))
        canvas.paste(bird.image, (left, top))
        canvas.save(root / "images" / f"{i}.png")
        with torch.inference_mode():
            predicted = int(model(transform(canvas)[None]).argmax())
        x0, y0, x1, y1 = bird.box
        box = (x0 + left, y0 + top, x1 - x0, y1 - y0) if i else (0, 0, 9, 9)  # the first one is cropped away
        parts = [(x + left, y + top, 1) for x, y, _ in bird.parts.values()]
        parts[i % len(parts)] = (0.0, 0.0, 0)
        parts[(i + 1) % len(parts)] = (1.0, height / 2, 1)  # at the edge, cropped away where the image is wide
        if i == 4:
            parts = [(0.0, 0.0, 0)] * len(parts)
        add(i + 1, f"{i}.png", predicted if i % 3 else (predicted + 1) % CLASSES, box, parts, train=0)
    for label in range(CLASSES):
        add(count + label + 1, f"train{label}.png", label, (1, 1, 5, 5), [(0.0, 0.0, 0)] * len(PARTS), train=1)
    lines["classes"] = [f"{label + 1} bird{label}" for label in range(CLASSES)]
    lines["parts/parts"] = [f"{part + 1} {name}" for part, name in enumerate(PARTS)]
    lines["parts/part_locs"] = locations
    for name, rows in lines.items():
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return root


def carried(x, y, width, height):
    """Where the center crop takes a point of a stored image."""
    side = math.floor(SIZE / CROP)
    short = min(width, height)
    sides = [int(side * length / short) for length in (width, height)]
    return [p * new / old - round((new - SIZE) / 2) for p, new, old in zip((x, y), sides, (width, height))]


def count_pixels(grid, box):
    """Pixels of the warped image that show the box, and the box's own, by the definition."""
    x0, y0, x1, y1 = box
    pixels = (grid + 1) / 2 * (SIZE - 1) + 0.5
    shown = sum(x0 <= x <= x1 and y0 <= y <= y1 for row in pixels.tolist() for x, y in row)
    there = sum(x0 <= j + 0.5 <= x1 and y0 <= i + 0.5 <= y1 for i in range(SIZE) for j in range(SIZE))
    return shown, there


def loop(model, dataset):
    """One row an image, each by a loop of its own."""
    transform, rows = create_transform(**CONFIG), []
    for stored in dataset:
        image, label = stored["image"].convert("RGB"), stored["label"]
        seen = model.explain(transform(image)[None])
        logits = {name: each[0].double().numpy() for name, each in seen.logits._asdict().items()}
        row = dict(label=label, logits=logits["joint"])
        for name, each in logits.items():
            ranked = sorted(range(CLASSES), key=lambda c, each=each: -each[c])
            row[f"prediction_{name}"], row[f"top5_{name}"] = ranked[0], label in ranked[:5]
        peaks, response = seen.sample.peaks[0].numpy(), seen.sample.response[0].numpy()
        places = [(0.5 + j * (SIZE - 1) / 30, 0.5 + i * (SIZE - 1) / 30, response[i, j])
                  for i, j in zip(*peaks.nonzero())]
        row["peaks"] = len(places)

        x0, y0, x1, y1 = stored["box"]
        (x0, y0), (x1, y1) = carried(x0, y0, *image.size), carried(x1, y1, *image.size)
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, SIZE), min(y1, SIZE)
        row["boxed"] = x0 < x1 and y0 < y1
        if row["boxed"]:
            box = (x0, y0, x1, y1)
            row["hits"] = sum(x0 <= x <= x1 and y0 <= y <= y1 for x, y, _ in places)
            grids = {name: getattr(seen.sample, name).grid for name in BRANCHES[1:]}
            top = tensor([row["prediction_joint"]])
            for normalize in (False, True):
                kind = "normalized_iou" if normalize else "iou"
                for name in ("joint", *BRANCHES):
                    maps = seen.maps if name == "joint" else {name: seen.maps[name]}
                    located = evaluation.localization_maps(maps, grids, top, (SIZE, SIZE))
                    located = sum(located[branch] for branch in maps)[:, int(normalize)]
                    found = evaluation.largest_region_box(located)
                    row[f"{kind}_{name}"] = evaluation.box_iou(found, tensor([box])).item()
            for name, grid in grids.items():
                shown, there = count_pixels(grid[0].double(), box)
                row[f"object_{name}"] = shown / there
                row[f"background_{name}"] = (SIZE**2 - shown) / (SIZE**2 - there)

        points = {}
        row["hidden"] = row["outside"] = 0
        for name, (x, y, visible) in stored["parts"].items():
            x, y = carried(x, y, *image.size)
            row["hidden"] += not visible
            inside = 0 <= x <= SIZE and 0 <= y <= SIZE
            row["outside"] += bool(visible) and not inside
            if visible and inside:
                points[name] = (x, y)
        row["parts"] = points
        for name in BRANCHES[1:]:
            scales = evaluation.magnification(getattr(seen.sample, name).grid)[0]
            found = {part: float(scales[min(int(y), SIZE - 1), min(int(x), SIZE - 1)])
                     for part, (x, y) in points.items()}
            # shown, but less than a pixel from the edge: there a clamped warp has no scale
            row[f"scales_{name}"] = {part: scale for part, scale in found.items()
                                     if not scale or all(1 <= place <= SIZE - 1 for place in points[part])}
        if points and places:
            for kind, best in (("strongest", max), ("weakest", min)):
                x, y, _ = best(places, key=lambda place: place[2])
                row[kind] = min(points, key=lambda part: math.dist(points[part], (x, y)))
        rows.append(row)
    return rows


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_every_figure_is_that_of_plain_loops(weights, run, tmp_path):
    model = timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
    root = write_cub(tmp_path / "cub", model)
    results = run(weights, "--dataset", "cub", "--data-dir", root, "--batch-size", 4, "--ignore-names")
    figures, rows = results["measures"], loop(model, cub(root, "test"))
    labels = [row["label"] for row in rows]

    assert results["images"] == len(rows) == 11
    for name in S3NLogits._fields:
        right = [row[f"prediction_{name}"] == row["label"] for row in rows]
        ours = figures["accuracy"][name]
        assert ours["top1"] == pytest.approx(100 * mean(right))
        assert ours["top5"] == pytest.approx(100 * mean(row[f"top5_{name}"] for row in rows))
        low, high = evaluation.bootstrap_interval(tensor(right))
        assert ours["top1_interval"] == pytest.approx([100 * low, 100 * high])
        assert low < mean(right) < high or mean(right) in (0, 1)
    assert 0 < figures["accuracy"]["joint"]["top1"] < 100, "the case tells nothing"
    chances = [np.exp(row["logits"] - row["logits"].max()) for row in rows]
    chances = [chance / chance.sum() for chance in chances]
    loss = mean(-math.log(chance[label]) for chance, label in zip(chances, labels))
    assert figures["calibration"]["nll"] == pytest.approx(loss, rel=1e-5)
    bins = [int(chance.max() * 15) for chance in chances]
    error = sum(abs(sum(chance.max() - (chance.argmax() == label)
                        for chance, label, each in zip(chances, labels, bins) if each == number))
                for number in set(bins)) / len(rows)
    assert figures["calibration"]["ece"] == pytest.approx(100 * error, rel=1e-4)

    counts = [row["peaks"] for row in rows]
    assert min(counts) < max(counts), "the case tells nothing"
    assert figures["peaks"] == dict(
        mean=pytest.approx(mean(counts)), min=min(counts), max=max(counts), images_without=counts.count(0),
        histogram=[counts.count(n) for n in range(max(counts) + 1)],
    )
    boxed = [row for row in rows if row["boxed"]]
    assert not rows[0]["boxed"]
    assert figures["boxes"] == dict(measured=10, cropped_away=1)
    hits = [row["hits"] for row in boxed]
    assert figures["hits"]["images"] == sum(row["peaks"] > 0 for row in boxed)
    assert figures["hits"]["rate"] == pytest.approx(100 * mean(r["hits"] / r["peaks"] for r in boxed if r["peaks"]))
    assert figures["hits"]["mean"] == pytest.approx(mean(hits))
    assert figures["hits"]["histogram"] == [hits.count(n) for n in range(max(hits) + 1)]
    assert sum(hits) < sum(row["peaks"] for row in boxed), "the case tells nothing"

    assert figures["localization"]["images"] == 10
    for name in ("joint", *BRANCHES):
        for kind in ("", "normalized_"):
            ious = [row[f"{kind}iou_{name}"] for row in boxed]
            right = [iou >= 0.5 and row["prediction_joint"] == row["label"] for iou, row in zip(ious, boxed)]
            assert figures["localization"][name][f"{kind}iou"] == pytest.approx(mean(ious), abs=1e-3)
            assert figures["localization"][name][f"{kind}accuracy"] == pytest.approx(100 * mean(right))
    for name in BRANCHES[1:]:
        ours = figures["magnification"][name]
        for kind in ("object", "background"):
            scales = sorted(row[f"{kind}_{name}"] for row in boxed)
            assert ours[kind]["mean"] == pytest.approx(mean(scales), abs=5e-3)
            assert ours[kind]["median"] == pytest.approx((scales[4] + scales[5]) / 2, abs=5e-3)
            assert ours[kind]["images"] == 10
        per_image = [mean(row[f"scales_{name}"].values()) for row in rows if row["parts"]]
        assert ours["parts"]["images"] == len(per_image) == 10
        assert ours["parts"]["mean"] == pytest.approx(mean(per_image), rel=0.05)

    assert any(len(row["scales_discriminative"]) < len(row["parts"]) for row in rows), "no part lies at the edge"
    parts = figures["parts"]
    assert parts["images"] == sum("strongest" in row for row in rows) > 5
    assert parts["hidden"] == sum(row["hidden"] for row in rows)
    assert parts["cropped_away"] == sum(row["outside"] for row in rows) > 0
    assert parts["measured"] == sum(len(row["parts"]) for row in rows) == parts["visible"] - parts["cropped_away"]
    for name in PARTS:
        assert parts["names"][name]["measured"] == sum(name in row["parts"] for row in rows)
        for kind in ("strongest", "weakest"):
            assert parts["names"][name][kind] == sum(row.get(kind) == name for row in rows), (name, kind)
        for branch in BRANCHES[1:]:
            scales = [row[f"scales_{branch}"][name] for row in rows if name in row[f"scales_{branch}"]]
            assert parts["names"][name][branch]["magnification"]["images"] == len(scales)
            assert parts["names"][name][branch]["magnification"]["mean"] == pytest.approx(mean(scales), rel=0.1)
    strongest, weakest = ({n: p[kind] for n, p in parts["names"].items()} for kind in ("strongest", "weakest"))
    assert strongest != weakest, "the case tells nothing"

    # the files
    predicted = [row["prediction_joint"] for row in rows]
    for ours, row, chance in zip(read_csv(tmp_path / "out" / "predictions.csv"), rows, chances):
        assert (int(ours["label"]), int(ours["prediction"])) == (row["label"], row["prediction_joint"])
        assert float(ours["probability"]) == pytest.approx(chance.max(), rel=1e-5)
        assert int(ours["peaks"]) == row["peaks"]
        assert ours["hits"] == str(row.get("hits", ""))
        for name in S3NLogits._fields:
            assert int(ours[f"correct_{name}"]) == (row[f"prediction_{name}"] == row["label"])
    per_class = read_csv(tmp_path / "out" / "per_class.csv")
    assert [row["name"] for row in per_class] == [f"bird{label}" for label in range(CLASSES)]
    for label, ours in enumerate(per_class):
        right = [p == label for p, each in zip(predicted, labels) if each == label]
        assert (int(ours["images"]), int(ours["correct"])) == (len(right), sum(right))
        assert ours["accuracy"] == "" if not right else float(ours["accuracy"]) == pytest.approx(100 * mean(right))
    pairs = {}
    for label, p in zip(labels, predicted):
        if label != p:
            pairs[label, p] = pairs.get((label, p), 0) + 1
    confused = read_csv(tmp_path / "out" / "confused.csv")
    assert {(int(row["label"]), int(row["prediction"])): int(row["count"]) for row in confused} == pairs
    assert [int(row["count"]) for row in confused] == sorted(pairs.values(), reverse=True)
    assert all(row["predicted_name"] == f"bird{row['prediction']}" for row in confused)
    assert min(Image.open(tmp_path / "out" / "confusion.png").size) > 500


# known answers


class Known(S3N):
    """A model whose explanation is given."""

    def explain(self, x):
        return self.given


def zoom(x, y, size=65):
    """The warp that shows the half-sized window around (x, y) of the image, each pixel on four."""
    q = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(0.5 * q + x, 0.5 * q + y, indexing="xy"), dim=-1)[None]


@pytest.fixture
def known():
    """Two images alike but for their labels; D zooms, C does not, and only D's maps show anything."""
    model = Known("test_resnet", num_classes=3).eval()
    response, peaks = torch.zeros(1, 5, 5), torch.zeros(1, 5, 5, dtype=torch.bool)
    for row, column, value in ((2, 3, 0.9), (0, 0, 0.4)):  # at pixels (48.5, 32.5) and (0.5, 0.5)
        response[0, row, column], peaks[0, row, column] = value, True
    maps = torch.zeros(1, 3, 65, 65)
    maps[0, 2, 16:49, 16:49] = 1  # in the input, columns 32 to 48 and rows 20 to 36
    maps[0, 1, :9, :9] = 9
    grids = zoom(0.25, -0.125).repeat(2, 1, 1, 1), (2 * zoom(0, 0)).repeat(2, 1, 1, 1)
    branches = [BranchSample(None, grid, None, None) for grid in grids]
    joint, wrong = tensor([[0.0, 1, 2]] * 2), tensor([[0.0, 2, 1]] * 2)
    model.given = Explanation(
        SelectiveSample(response.repeat(2, 1, 1), peaks.repeat(2, 1, 1), *branches),
        S3NLogits(joint, wrong, wrong, joint),
        dict(original=torch.zeros(2, 3, 4, 4), discriminative=maps.repeat(2, 1, 1, 1),
             complementary=torch.zeros(2, 3, 4, 4)),
    )
    parts = [[3.5, 2.5, 1], [44.5, 30.5, 1], [48.5, 32.5, 0]]
    batch = dict(
        index=torch.arange(2), label=tensor([2, 1]), image=torch.zeros(2, 3, 65, 65), sizes=tensor([[65, 65]] * 2),
        box=tensor([[32.0, 20, 49, 37]] * 2), parts=tensor([parts] * 2),
    )
    return model, carry_annotations(batch, Crop((65, 65), 1.0, "squash"))


def test_known_warp_and_maps_give_known_figures(known):
    records = measure_batch(*known)
    assert records["iou_joint"].tolist() == records["iou_discriminative"].tolist() == [1, 1]
    assert records["normalized_iou_joint"].tolist() == [1, 1]
    assert records["iou_original"].tolist() == records["iou_complementary"].tolist() == [0, 0]
    # pixels k of the warped image are at 0.5 k + 24.5 and 0.5 k + 12.5: 35 × 35 of them show the 17 × 17 of the box
    torch.testing.assert_close(records["object_discriminative"], tensor([35**2 / 17**2] * 2))
    background = (65**2 - 35**2) / (65**2 - 17**2)
    torch.testing.assert_close(records["background_discriminative"], tensor([background] * 2))
    assert records["object_complementary"].tolist() == records["background_complementary"].tolist() == [1, 1]
    torch.testing.assert_close(records["part_magnification_discriminative"][:, :2], tensor([[0.0, 4]] * 2))
    assert records["part_measured"].tolist() == [[True, True, False]] * 2
    assert (records["strongest"].tolist(), records["weakest"].tolist()) == ([1, 1], [0, 0])
    assert (records["hits"].tolist(), records["peaks"].tolist()) == ([1, 1], [2, 2])

    figures = summarize(records, ("beak", "belly", "tail"))
    assert {name: each["top1"] for name, each in figures["accuracy"].items()} == dict.fromkeys(
        (*S3NLogits._fields, "mean"), 50)
    assert figures["localization"]["joint"] == dict(
        accuracy=50, iou=1, normalized_accuracy=50, normalized_iou=1), "a wrong class is a wrong localization"
    assert figures["localization"]["original"]["accuracy"] == 0
    assert figures["hits"] == dict(images=2, rate=50, mean=1, histogram=[0, 2])
    assert figures["peaks"] == dict(mean=2, min=2, max=2, images_without=0, histogram=[0, 0, 2])
    assert figures["magnification"]["discriminative"]["parts"] == dict(
        mean=pytest.approx(2), median=pytest.approx(2), images=2)
    parts = figures["parts"]
    assert (parts["visible"], parts["hidden"], parts["cropped_away"], parts["measured"]) == (4, 2, 0, 4)
    assert parts["not_shown"] == dict(discriminative=50, complementary=0)
    beak, belly, tail = parts["names"].values()
    assert (beak["strongest"], beak["weakest"], belly["strongest"], belly["weakest"]) == (0, 2, 2, 0)
    assert (beak["discriminative"]["not_shown"], belly["discriminative"]["not_shown"]) == (100, 0)
    assert belly["discriminative"]["magnification"]["mean"] == pytest.approx(4)
    assert (tail["measured"], tail["discriminative"]["not_shown"]) == (0, None)
    assert tail["discriminative"]["magnification"] == dict(mean=None, median=None, images=0)


def test_normalised_maps_count_from_their_minimum(known):
    model, batch = known
    model.given.maps["complementary"] = 1 + torch.zeros(2, 3, 65, 65)
    model.given.maps["complementary"][:, 2, 20:37, 32:49] = 2
    records = measure_batch(model, batch)
    assert records["iou_complementary"].tolist() == pytest.approx([17**2 / 65**2] * 2), "all of it is above 0.2 × 2"
    assert records["normalized_iou_complementary"].tolist() == [1, 1]


def test_a_part_at_the_edge_has_no_magnification(known):
    model, batch = known
    batch["parts"][0] = tensor([[0.4, 30, 1], [30.5, 30.5, 1], [64.5, 40, 1]])  # D reaches from 16.5 to 56.5 across
    batch["parts"][1] = tensor([[30.5, 64.7, 1], [30.5, 30.5, 0], [30.5, 30.5, 0]])
    records = measure_batch(model, batch)
    assert as_plain(records["part_magnification_complementary"][0].round()) == [None, 1, None]
    assert as_plain(records["part_magnification_discriminative"][0].round()) == [0, 4, 0]
    figures = summarize(records, ("beak", "belly", "tail"))
    parts = figures["magnification"]
    assert parts["complementary"]["parts"] == dict(mean=pytest.approx(1), median=pytest.approx(1), images=1)
    assert parts["discriminative"]["parts"] == dict(mean=pytest.approx(2 / 3), median=pytest.approx(2 / 3), images=2)
    assert figures["parts"]["not_shown"] == dict(discriminative=75, complementary=0)
    assert figures["parts"]["names"]["beak"]["complementary"]["magnification"]["images"] == 0


def birds_batch(count=5, drop=()):
    rows = drawn_birds("test", count, CLASSES, 80)
    transform = create_transform(**CONFIG)
    batch = dict(
        index=torch.arange(count), label=tensor(rows["label"]), sizes=tensor([[80, 80]] * count),
        image=torch.stack([transform(image) for image in rows["image"]]), box=tensor(rows["box"]),
        parts=tensor([list(parts.values()) for parts in rows["parts"]]),
    )
    return carry_annotations({k: v for k, v in batch.items() if k not in drop}, Crop((SIZE, SIZE), CROP))


def test_carried_annotations_lie_in_the_input():
    batch = dict(
        sizes=tensor([[100, 200], [100, 200]]), box=tensor([[60.0, 20, 140, 80], [0, 0, 20, 100]]),
        parts=tensor([[[100.0, 50, 1], [5, 50, 1], [100, 50, 0]]] * 2),
    )
    moved = carry_annotations(batch, Crop((50, 50), 1.0))  # halved, then 25 pixels off each side
    assert moved["box"].tolist() == [[5, 10, 45, 40], [0, 0, 0, 50]]
    assert moved["boxed"].tolist() == [True, False]
    assert moved["parts"][0].tolist() == [[25, 25, 1], [-22.5, 25, 0], [25, 25, 0]]
    assert moved["part_visible"][0].tolist() == [True, True, False]


def test_no_peaks_magnify_nothing():
    model = create_model()
    torch.nn.init.zeros_(model.backbone.fc.weight)
    with torch.no_grad():
        figures = summarize(measure_batch(model, birds_batch()), PARTS)
    assert figures["peaks"] == dict(mean=0, min=0, max=0, images_without=5, histogram=[5])
    assert figures["hits"] == dict(images=0, rate=None, mean=0, histogram=[5])
    for branch in BRANCHES[1:]:
        for kind in ("object", "background", "parts"):
            each = figures["magnification"][branch][kind]
            assert each == dict(mean=pytest.approx(1, abs=1e-4), median=pytest.approx(1, abs=1e-4), images=5)
        assert figures["parts"]["not_shown"][branch] == 0
    assert figures["parts"]["images"] == 0
    assert all(part["strongest"] == part["weakest"] == 0 for part in figures["parts"]["names"].values())


def test_without_o_in_the_fusion_its_map_is_left_out():
    model = create_model(branches="D+C")
    batch = birds_batch()
    records = measure_batch(model, batch)
    assert "iou_original" not in records
    assert "prediction_original" not in records
    seen = model.explain(batch["image"])
    maps = {branch: seen.maps[branch] for branch in BRANCHES[1:]}
    grids = {branch: getattr(seen.sample, branch).grid for branch in BRANCHES[1:]}
    located = evaluation.localization_maps(maps, grids, seen.logits.joint.argmax(1), (SIZE, SIZE))
    found = evaluation.largest_region_box(located["discriminative"][:, 0] + located["complementary"][:, 0])
    torch.testing.assert_close(records["iou_joint"], evaluation.box_iou(found, batch["box"]))
    assert set(summarize(records, PARTS)["localization"]) == {"images", "joint", *BRANCHES[1:]}


@pytest.mark.parametrize("options", [dict(branches="O"), dict(attention="response"), dict(attention="saliency")])
def test_models_without_peaks_have_no_figures_of_peaks(options):
    records = measure_batch(create_model(**options), birds_batch())
    figures = summarize(records, PARTS)
    assert not {"peaks", "hits"} & set(figures)
    assert figures["localization"]["joint"]["iou"] is not None
    assert ("magnification" in figures) == ("attention" in options)
    assert figures["parts"]["images"] is None
    assert "strongest" not in figures["parts"]["names"]["beak"]


def test_without_annotations_the_rest_is_measured():
    figures = summarize(measure_batch(create_model(), birds_batch(drop=("box", "parts"))))
    assert set(figures) == {"accuracy", "calibration", "peaks"}


# summarize by hand


def records_of(logits, labels, **more):
    logits = tensor(logits)
    predictions = logits.argmax(1)
    return dict(
        index=torch.arange(len(labels)), label=tensor(labels), logits=logits, prediction_joint=predictions,
        prediction_answer=predictions, top5_joint=torch.ones(len(labels), dtype=torch.bool), **more,
    )


def test_accuracy_and_calibration_by_hand():
    sure = [math.log(3.0), 0.0]  # 3/4 to the first class
    figures = summarize(records_of([sure] * 4, [0, 0, 0, 1]))
    assert figures["accuracy"]["joint"]["top1"] == 75
    assert figures["accuracy"]["joint"]["top1_interval"] == [25, 100]
    assert figures["accuracy"]["joint"]["top5_interval"] == [100, 100]
    calibration = figures["calibration"]
    assert calibration["nll"] == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4)
    assert calibration["ece"] == pytest.approx(0, abs=1e-4), "right as often as it is sure"
    assert summarize(records_of([sure] * 4, [1, 1, 1, 1]))["calibration"]["ece"] == pytest.approx(75)


def test_each_half_is_calibrated_by_the_other():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(41, 4, generator=generator)
    labels = (logits / 6).softmax(1).multinomial(1, generator=generator)[:, 0]
    calibrated, temperatures = cross_calibrate(logits, labels, seed=5)
    ratios = (logits / calibrated)[:, 0]
    first = (ratios - temperatures[0]).abs() < (ratios - temperatures[1]).abs()
    assert sorted([int(first.sum()), int((~first).sum())]) == [20, 21]
    for half, temperature in ((first, temperatures[0]), (~first, temperatures[1])):
        torch.testing.assert_close(calibrated[half], logits[half] / temperature)
        assert temperature == pytest.approx(evaluation.fit_temperature(logits[~half], labels[~half]), rel=1e-5)
    again, _ = cross_calibrate(logits, labels, seed=6)
    assert not torch.equal(calibrated, again)
    figures = summarize(records_of(logits.tolist(), labels.tolist()), seed=5)["calibration"]
    assert figures["temperatures"] == temperatures
    assert figures["nll_calibrated"] == pytest.approx(evaluation.nll(calibrated, labels).item())
    assert figures["nll_calibrated"] < figures["nll"], "these logits are twice too sure"


def test_what_does_not_exist_is_null():
    none = dict(boxed=tensor([False]), iou_joint=tensor([0.0]), normalized_iou_joint=tensor([0.0]))
    more = dict(peaks=tensor([3]), hits=tensor([0]), object_discriminative=tensor([math.nan]),
                background_discriminative=tensor([1.0]))
    figures = summarize(records_of([[1.0, 0]], [0], **none, **more))
    assert figures["hits"] == dict(images=0, rate=None, mean=None, histogram=[])
    assert figures["localization"]["joint"]["accuracy"] is None
    assert figures["magnification"]["discriminative"]["object"] == dict(mean=None, median=None, images=0)
    assert figures["calibration"]["nll_calibrated"] is None
    assert json.dumps(figures, allow_nan=False)
    assert as_plain({"a": [math.inf, tensor([1.0, math.nan])]}) == {"a": [None, [1.0, None]]}


def test_top_five_and_equal_logits():
    class Constant(torch.nn.Module):
        def forward(self, x):
            return tensor([[0.0] * 7, [6.0, 5, 4, 3, 2, 1, 0], [6.0, 5, 4, 3, 2, 1, 0]])

    batch = dict(index=torch.arange(3), label=tensor([0, 4, 5]), image=torch.zeros(3, 3, 8, 8))
    records = measure_batch(Constant(), batch)
    assert records["prediction_joint"].tolist() == [0, 0, 0], "of equal ones the first, as argmax has it"
    assert records["top5_joint"].tolist() == [True, True, False]


def test_errors_of_summarize():
    with pytest.raises(ValueError, match="at least one image"):
        summarize(dict(label=torch.zeros(0, dtype=torch.long), logits=torch.zeros(0, 2)))
    with pytest.raises(ValueError, match="not finite"):
        summarize(records_of([[math.nan, 0.0]], [0]))
    with pytest.raises(ValueError, match="two images or more"):
        cross_calibrate(torch.zeros(1, 2), tensor([0]))


# the picture


@pytest.mark.parametrize("classes", [8, 200])
def test_confusions_are_drawn(classes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes - 1, (20 * classes,), generator=generator)  # the last class has no image
    wrong = torch.rand(len(labels), generator=generator) < 0.3
    predictions = torch.where(wrong, torch.randint(classes, labels.shape, generator=generator), labels)
    names = [f"a rather long name of a class {label}" for label in range(classes)]
    bars, matrix = draw_confusions(labels, predictions, names, most=10).axes
    heights = [bar.get_height() for bar in bars.patches]
    assert heights == sorted(heights)
    assert len(heights) == classes - 1
    accuracy = evaluation.per_class_accuracy(labels, predictions, classes)
    assert heights[0] == pytest.approx(100 * float(accuracy[:-1].min()))
    top = evaluation.confused_pairs(labels, predictions, classes, k=1)[0].tolist()
    shown = [text.get_text() for text in matrix.get_yticklabels()]
    assert len(shown) == len(matrix.get_xticklabels()) <= 10
    assert max(map(len, shown)) <= 30
    if classes == 8:
        assert len(shown) == 8
        counts = {text.get_position(): int(text.get_text()) for text in matrix.texts}
        for label in range(8):
            for taken in range(8):
                expected = int(((labels == label) & (predictions == taken)).sum())
                assert counts.get((taken, label), 0) == expected, "predictions run to the right, labels down"
    assert str(top[2]) in [text.get_text() for text in matrix.texts]


def test_no_confusion_is_drawn_as_none():
    labels = tensor([0, 1, 1])
    _, matrix = draw_confusions(labels, labels, ["a", "b"]).axes
    assert matrix.get_title() == "no class is taken for another"


# the script's own arguments


def test_partition_can_be_changed(weights, run, tmp_path):
    args = [weights, "--num-images", 6, "--batch-size", 4]
    ours, other = run(*args), run(*args, "--partition-eval", "extreme", output=tmp_path / "extreme")
    assert ours["model"]["s3n"]["partition"] == "expected"
    assert other["model"]["s3n"]["partition"] == "extreme"
    assert ours["measures"]["magnification"] != other["measures"]["magnification"]
    assert ours["measures"]["peaks"] == other["measures"]["peaks"]
    first, again = (run(*args, "--partition-eval", "probability")["measures"] for _ in range(2))
    assert first == again, "draws repeat under a seed"


def test_answer_can_be_changed(weights, run, tmp_path):
    args = [weights, "--num-images", 6, "--batch-size", 4]
    ours, other = run(*args), run(*args, "--answer", "mean", output=tmp_path / "mean")
    assert (ours["model"]["s3n"]["answer"], other["model"]["s3n"]["answer"]) == ("joint", "mean")
    assert ours["measures"]["accuracy"] == other["measures"]["accuracy"], "every output is measured either way"


@pytest.mark.parametrize(("answer", "warped"), [("joint", 2), ("mean", 2), ("discriminative", 1)])
def test_early_exit_is_reported_as_it_is(answer, warped):
    model, batch = create_model(answer=answer), birds_batch(12)
    for head in (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)):
        torch.nn.init.normal_(head.weight, std=2)
    records = measure_batch(model, batch)
    threshold = records["entropy"].median().item() + 1e-4
    prediction = answer_batch(model, batch["image"], threshold)
    torch.testing.assert_close(records["entropy"], prediction.entropy)
    everything = model(batch["image"])
    assert torch.equal(records["prediction_answer"], everything.argmax(1))
    assert 0 < prediction.exited.sum() < 12
    assert (prediction.probabilities.argmax(1) != everything.argmax(1)).any()
    for labels in (prediction.probabilities.argmax(1), everything.argmax(1)):
        figures = summarize(dict(records, label=labels), PARTS, exit_entropy=threshold)["early_exit"]
        assert figures == dict(
            exit_entropy=threshold,
            exited=pytest.approx(100 * prediction.exited.double().mean().item()),
            top1=pytest.approx(100 * (prediction.probabilities.argmax(1) == labels).double().mean().item()),
            top1_without=pytest.approx(100 * (everything.argmax(1) == labels).double().mean().item()),
            passes=pytest.approx(1 + warped * (~prediction.exited).double().mean().item()),
        )
    with pytest.raises(ValueError, match="needs an S3N with the O branch"):
        summarize(measure_batch(create_model(branches="D+C"), batch), PARTS, exit_entropy=1.0)


def test_a_threshold_is_found_on_images_that_training_held_out(weights, run, monkeypatch, tmp_path, capsys):
    seen, original = [], evaluate.summarize
    monkeypatch.setattr(evaluate, "summarize", lambda records, *rest: seen.append(records) or original(records, *rest))
    data = write_folder(tmp_path / "data", count=8, classes=CLASSES)
    given = ["--dataset", "folder", "--data-dir", data, "--ignore-names"]
    results = run(weights, *given, "--split", "train", "--val-fraction", 0.25, "--seed", 5, "--exit-loss", 10)
    args = argparse.Namespace(
        dataset="folder", data_dir=data, train_split="train", test_split="test", streaming=False, val_split=None,
        val_fraction=0.25, seed=5)
    held_out = load_splits(args, verify=False)["val"]
    assert results["images"] == len(held_out) == 2 * CLASSES
    assert seen[0]["label"].tolist() == held_out["label"][:]
    figures = results["measures"]["early_exit"]
    assert figures["top1"] >= figures["top1_without"] - 10
    assert "early exit" in capsys.readouterr().out
    again = run(weights, *given, "--exit-entropy", 1.25)["measures"]["early_exit"]
    assert again["exit_entropy"] == 1.25


def test_a_kept_threshold_is_that_of_the_classifier(weights, run, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "weights")
    data = write_folder(tmp_path / "data", count=4, classes=CLASSES)
    found = run(folder, "--dataset", "folder", "--data-dir", data, "--ignore-names", "--exit-loss", 10, "--keep-exit")
    kept = s3n_timm.Classifier.from_pretrained(folder).exit_entropy
    assert kept == found["measures"]["early_exit"]["exit_entropy"] > 0
    assert s3n_timm.Classifier.from_pretrained(weights).exit_entropy == 0


def test_the_model_reads_batches_of_one_size_and_each_image_once(weights, run, monkeypatch):
    sizes, original = [], evaluate.measure_batch

    def measure_batch(model, batch):
        sizes.append(len(batch["image"]))
        return original(model, batch)

    monkeypatch.setattr(evaluate, "measure_batch", measure_batch)
    assert run(weights, "--num-images", 9, "--batch-size", 4)["images"] == 9
    assert sizes == [4, 4, 4]


def test_preprocessing_can_be_changed(weights, run):
    result = run(
        weights, "--num-images", 4, "--img-size", 96, "--crop-pct", 1, "--crop-mode", "squash", "--batch-size", 4)
    ours = result["model"]["preprocessing"]
    assert (ours["input_size"], ours["crop_pct"], ours["crop_mode"]) == ([3, 96, 96], 1, "squash")
    assert result["measures"]["parts"]["cropped_away"] == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def test_a_plain_model_is_measured(plain, run, tmp_path, capsys):
    figures = run(plain, "--num-images", 7, "--batch-size", 4, "--img-size", SIZE)["measures"]
    assert set(figures["accuracy"]) == {"joint"}
    assert not {"peaks", "hits", "localization", "magnification"} & set(figures)
    columns = set(read_csv(tmp_path / "out" / "predictions.csv")[0])
    assert columns == {"index", "label", "prediction", "probability", "correct_joint"}
    assert "figure 6" not in capsys.readouterr().out


def write_folder(root, broken=None, count=2, classes=2):
    for split in ("train", "test"):
        for name in "abcdefghij"[:classes]:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (80, 70), (i * 40, 100, 200)).save(root / split / name / f"{i}.png")
    if broken is not None:
        content = (root / broken).read_bytes()
        (root / broken).write_bytes(content[:len(content) // 2])
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_was_not_verified_and_cannot_be_read_is_named(weights, tmp_path, workers):
    data = write_folder(tmp_path / "data", broken="test/b/1.png", classes=CLASSES)
    for name, other in zip(bird_names(), "abcdef"):
        for split in ("train", "test"):
            (data / split / other).rename(data / split / name)
    args = ("--dataset", "folder", "--data-dir", data, "--no-verify", "--workers", workers)
    text = Forked("evaluate.py", weights, *args, "--output", tmp_path / "out").end(ok=False)
    assert text.strip().splitlines()[-1].startswith("evaluate.py: ")
    assert "1.png cannot be read as an image" in text
    assert "Traceback" not in text


def test_missing_weights_end_in_one_sentence(tmp_path):
    text = call("evaluate.py", tmp_path / "nowhere", ok=False)
    assert text.startswith(f"evaluate.py: WEIGHTS {tmp_path / 'nowhere'} cannot be loaded: there is no such folder")
    assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--partition-eval", "nonsense"], "invalid choice: 'nonsense'"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--crop-pct", "-1"], "--crop-pct must be positive"),
        (["--val-fraction", "0.2"], "--val-fraction is a part of --split train"),
        (["--split", "train", "--val-fraction", "1"], "--val-fraction must lie in [0, 1)"),
        (["--exit-entropy", "1", "--exit-loss", "1"], "not allowed with argument"),
        (["--keep-exit"], "--keep-exit needs a threshold"),
        (["--keep-exit", "--exit-entropy", "nan"], "--exit-entropy must be a number from 0"),
        (["--keep-exit", "--exit-loss", "-1"], "--exit-loss must be a number from 0"),
        (["--split", "train", "--val-fraction", "0.1"], "give its --num-images"),
        (["--keep-exit", "--exit-loss", "1", "--answer", "mean"], "--keep-exit keeps a threshold for the model's own"),
        (["--image-column", "photo"], "--image-column is for parquet and hub:NAME alone"),
        (["--split", "val"], "split must be 'train' or 'test'"),
        (["--dataset", "nonsense"], "name must be 'birds'"),
        (["--dataset", "cub"], "data_dir must name the folder"),
        (["--dataset", "folder", "--data-dir", "FOLDER"], "folder has 2 classes and WEIGHTS"),
        (["--dataset", "folder", "--data-dir", "BROKEN"], "1.png cannot be read as an image"),
    ],
)
def test_bad_arguments_end_in_one_sentence(weights, run, tmp_path, capsys, args, message):
    if "FOLDER" in args:
        args = [*args[:-1], write_folder(tmp_path / "data")]
    if "BROKEN" in args:
        args = [*args[:-1], write_folder(tmp_path / "data", broken="test/b/1.png")]
    with pytest.raises(SystemExit) as stop:
        run(weights, *args)
    assert message in f"{stop.value.code} {capsys.readouterr().err}"


def test_a_threshold_is_kept_in_a_folder_alone(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["USER/NAME", "--keep-exit", "--exit-loss", "1"])
    assert "--keep-exit writes to a folder" in capsys.readouterr().err


def test_bad_weights_end_in_one_sentence(weights, plain, run, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()

    def stopped(*args):
        with pytest.raises(SystemExit) as stop:
            run(*args)
        return str(stop.value.code)

    assert "has no config.json" in stopped(folder)
    (folder / "config.json").write_text("{}")
    assert "cannot be loaded" in stopped(folder)
    (folder / "config.json").write_bytes((weights / "config.json").read_bytes())
    assert "cannot be loaded" in stopped(folder)
    (folder / "model.safetensors").write_bytes(b"junk")
    assert "cannot be loaded" in stopped(folder)
    assert "--partition-eval all needs a model with peaks" in stopped(plain, "--partition-eval", "all")
    assert "--answer mean needs an S3N" in stopped(plain, "--answer", "mean")
    assert "need an S3N with the O branch" in stopped(plain, "--exit-loss", 0.3)


def test_images_of_16_bits_are_measured_as_those_of_8(run, tmp_path):
    probabilities = []
    for bits in (8, 16):
        for split, name in itertools.product(("train", "test"), "abcdef"):
            (tmp_path / f"{bits}" / split / name).mkdir(parents=True)
            values = np.random.default_rng(ord(name)).integers(0, 256, (70, 80))
            image = Image.fromarray(values.astype(np.uint8) if bits == 8 else (257 * values).astype(np.uint16))
            image.save(tmp_path / f"{bits}" / split / name / "1.png")
        weights = save_named(tmp_path / "weights", "abcdef")
        run(weights, "--dataset", "folder", "--data-dir", tmp_path / f"{bits}")
        probabilities.append([row["probability"] for row in read_csv(tmp_path / "out" / "predictions.csv")])
    assert len(probabilities[0]) == 6
    assert probabilities[0] == probabilities[1]


def save_named(folder, names):
    return save(create_model(), folder, label_names=names, data_config=CONFIG)


def test_classes_in_another_order_are_matched_by_name(run, tmp_path, capsys):
    data = write_folder(tmp_path / "data", classes=CLASSES)
    given = ["--dataset", "folder", "--data-dir", data]
    order = [3, 0, 5, 1, 4, 2]  # the model's class of each of the folder's
    names = ["abcdef"[order.index(i)] for i in range(CLASSES)]
    assert run(save_named(tmp_path / "same", "abcdef"), *given)["images"] == 2 * CLASSES
    ours = read_csv(tmp_path / "out" / "predictions.csv")
    assert "by name" not in capsys.readouterr().out
    run(save_named(tmp_path / "other", names), *given)
    other = read_csv(tmp_path / "out" / "predictions.csv")
    assert "by name" in capsys.readouterr().out
    assert [int(row["label"]) for row in other] == [order[int(row["label"])] for row in ours]
    assert [row["prediction"] for row in other] == [row["prediction"] for row in ours]
    assert all(int(row["correct_joint"]) == (row["label"] == row["prediction"]) for row in other)
    assert [row["name"] for row in read_csv(tmp_path / "out" / "per_class.csv")] == names


def test_other_names_are_refused_unless_they_are_to_be_ignored(run, tmp_path):
    weights = save_named(tmp_path / "weights", "abcdeX")
    given = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data", classes=CLASSES)]
    with pytest.raises(SystemExit) as stop:
        run(weights, *given)
    assert "'f'" in stop.value.code
    assert "--ignore-names" in stop.value.code
    assert not (tmp_path / "out").exists()
    run(weights, *given, "--ignore-names")
    assert [row["name"] for row in read_csv(tmp_path / "out" / "per_class.csv")] == list("abcdef")


def test_names_by_index_may_have_gaps(run, tmp_path):
    data = write_folder(tmp_path / "data", classes=CLASSES)
    model = create_model()
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names={0: "a", 4: "e"})
    save_for_hf(model, str(tmp_path / "weights"), safe_serialization=True)
    assert run(tmp_path / "weights", "--dataset", "folder", "--data-dir", data, "--img-size", SIZE)["images"] == 12


def test_workers_of_another_start_method(weights, run):
    before = torch.multiprocessing.get_start_method(allow_none=True)
    torch.multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert run(weights, "--num-images", 6, workers=1)["images"] == 6
    finally:
        torch.multiprocessing.set_start_method(before, force=True)


def test_numbers_are_written_and_printed_before_the_picture(weights, run, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(reports, "draw_confusions", fail)
    with pytest.raises(SystemExit, match="no space left"):
        run(weights, "--num-images", 6)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["images"] == 6
    assert len(read_csv(tmp_path / "out" / "predictions.csv")) == 6
    assert "hit rate" in capsys.readouterr().out


def test_cells_that_were_not_measured(plain, run, capsys):
    measures = run(plain, "--num-images", 6, "--img-size", SIZE)["measures"]
    tables = result_tables(measures)
    assert set(tables) == {"accuracy", "metrics"}
    assert dict(tables["metrics"].rows)["hit rate, % (paper's table 1)"] is None
    assert all(len(row) == len(table.header) for table in tables.values() for row in table.rows)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "hit rate" in line)
    assert "–" in line


def test_one_class():
    metrics = summarize(records_of([[2.0]] * 3, [0, 0, 0]))
    assert metrics["accuracy"]["joint"]["top1"] == 100
    assert metrics["calibration"]["ece"] == 0


@pytest.mark.skipif(not CUB50.is_dir(), reason=f"{CUB50}, 50 classes of CUB-200-2011, is not there")
def test_real_annotations_are_carried_to_the_birds():
    dataset = cub(CUB50, "test").select(range(0, 60, 5))
    sizes = tensor([[row["image"].height, row["image"].width] for row in dataset])
    batch = dict(
        sizes=sizes, box=tensor(dataset["box"]), parts=tensor([list(parts.values()) for parts in dataset["parts"]]))
    moved = carry_annotations(batch, Crop((224, 224), 0.7467, "squash"))
    x, y, measured = moved["parts"].unbind(-1)
    low, high = moved["box"][:, None].chunk(2, dim=-1)
    inside = (x >= low[..., 0] - 3) & (x <= high[..., 0] + 3) & (y >= low[..., 1] - 3) & (y <= high[..., 1] + 3)
    assert moved["boxed"].all()
    assert measured.sum() > 50
    assert inside[measured > 0].float().mean() > 0.95
