"""examples/experiments.py and its table: real runs on a few small photographs, figures by hand, and those of README."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import EXAMPLES, command, run
from PIL import Image
from safetensors.torch import save_file

CLASSES, TRAINING, TEST = 4, 16, 8


@pytest.fixture(scope="module")
def scripts():
    return importlib.import_module("experiments.cub50"), importlib.import_module("experiments.tables")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """CUB's layout, and as many training images as one batch of the recipe."""
    root = tmp_path_factory.mktemp("cub")
    (root / "images").mkdir()
    (root / "parts").mkdir()
    noise = np.random.default_rng(0)
    names = ("images", "image_class_labels", "train_test_split", "bounding_boxes", "parts/part_locs")
    lines = [(f"{i} {i}.jpg", f"{i} {1 + i % CLASSES}", f"{i} {int(i < TRAINING)}", f"{i} 5 5 30 20",
              f"{i} 1 9 {i} 1") for i in range(TRAINING + TEST)]
    for name, of_file in zip(names, zip(*lines)):
        (root / f"{name}.txt").write_text("\n".join(of_file))
    (root / "parts" / "parts.txt").write_text("1 beak")
    (root / "classes.txt").write_text("\n".join(f"{1 + i} class {i}" for i in range(CLASSES)))
    for i in range(TRAINING + TEST):
        Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / "images" / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def words(photographs, tmp_path_factory):
    root = tmp_path_factory.mktemp("experiments")
    torch.manual_seed(0)
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), root / "backbone.safetensors")
    return command("experiments/cub50.py", "--data-dir", photographs,
                   "--pretrained-path", root / "backbone.safetensors", "--output", root / "runs",
                   "--results", root / "results", "--seeds", 0)


def test_rows_that_share_weights_are_trained_once(words):
    printed = run([*words, "--rows", "s3n", "mean", "exit"])
    results = Path(words[words.index("--results") + 1])
    found = {name: json.loads((results / f"{name}-0.json").read_text()) for name in ("s3n", "mean", "exit")}
    assert [line.split(":")[0] for line in printed.splitlines()] == [f"{name}, seed 0" for name in found]
    assert found["s3n"]["train_seconds"] == found["mean"]["train_seconds"] == found["exit"]["train_seconds"]
    assert found["s3n"]["answered"] == found["s3n"]["correct"]["joint"]
    assert found["mean"]["answered"] == found["s3n"]["correct"]["mean"]
    # four classes know less than 1.68 nats: every image leaves
    assert found["exit"]["answered"] == found["s3n"]["correct"]["original"]
    assert (found["mean"]["exited"], found["exit"]["exited"]) == (0, 1)
    assert len(found["s3n"]["answered"]) == TEST
    assert found["s3n"]["betas"].keys() == {"beta_discriminative", "beta_complementary"}
    assert run([*words, "--rows", "s3n", "mean", "exit"]) == "", "what is done is not run again"


def test_sure_images_are_answered_by_the_original_branch(scripts, tmp_path):
    experiments, _ = scripts
    args = experiments.argparse.Namespace(output=tmp_path, data_dir=tmp_path, pretrained_path=tmp_path, cpu_threads=1)
    planned = experiments.plan_run("focus-exit", 0, args)
    folder = experiments.evaluation_folder(planned)
    assert folder == tmp_path / "focus" / "seed-0" / "evaluation"
    folder.mkdir(parents=True)
    (planned.folder / "last").mkdir()
    save_file({"beta_discriminative": torch.tensor(2.0)}, planned.folder / "last" / "model.safetensors")
    (planned.folder / "command.json").write_text('{"seconds": 30}')
    (folder / "results.json").write_text('{"measures": {}}')
    outputs = ("joint", "mean", "original", "discriminative")
    # at the threshold an image stays
    rows = [(0.7, 0, 0, 1, 0), (0.71, 0, 0, 1, 0), (0.72, 0, 0, 1, 0), (0.1, 1, 1, 0, 1), (2.0, 0, 0, 0, 1)]
    lines = [",".join(map(str, row)) for row in rows]
    header = ",".join(("entropy", *(f"correct_{name}" for name in outputs)))
    (folder / "predictions.csv").write_text("\n".join([header, *lines]))
    found = experiments.measure(planned)
    assert found["answered"] == "10001"
    assert found["exited"] == 0.4
    assert found["betas"] == {"beta_discriminative": 2.0}
    assert found["train_seconds"] == 30


def made_up(row, seed, answered, train=(), exited=0.0):
    return dict(row=row, seed=seed, answered=answered, train=list(train), exited=exited, measures=dict(accuracy={}))


def test_figures_by_hand(scripts):
    _, table = scripts
    speed = {"plain": dict(gmacs=0.2), "focus": dict(gmacs=0.6, images_per_second=63.4, training_images_per_second=10),
             "focus-224-18-exit": dict(gmacs=0.8)}
    speed["focus-exit"] = speed["focus"]
    whole = made_up("focus", 0, "1100", ("--img-size", "320", "--model-kwargs", '{"scan_size": 160}'))
    assert table.count_passes(whole, speed) == pytest.approx(3)
    assert table.show_speed(whole, speed) == ("63", "15")
    early = whole | dict(row="focus-exit", exited=0.25)
    assert table.count_passes(early, speed) == pytest.approx(0.25 * 1 + 0.75 * 3)
    assert table.show_speed(early, speed) == ("", "15"), "how fast it is depends on the images"
    larger = made_up("focus-224-18-exit", 0, "1", ("--model-kwargs", '{"scan_size": 224}'), exited=0.5)
    assert table.count_passes(larger, speed) == pytest.approx(0.5 * (224 / 160) ** 2 + 0.5 * 4)
    ours = {0: whole, 1: made_up("focus", 1, "1111"), 2: made_up("focus", 2, "0000")}
    theirs = {0: made_up("plain", 0, "1000"), 1: made_up("plain", 1, "1010")}
    assert table.compare(ours, theirs).startswith("+37.5 ("), "seeds 0 and 1, which both have"
    assert table.compare(ours, ours) == table.compare(ours, {5: theirs[0]}) == ""


def test_table_needs_runs_and_speed(scripts, tmp_path, monkeypatch, capsys):
    _, table = scripts
    monkeypatch.setattr("sys.argv", ["experiments/tables.py", "--results", str(tmp_path)])

    def refused():
        with pytest.raises(SystemExit):
            table.main()
        return capsys.readouterr().err

    assert "holds no run" in refused()
    (tmp_path / "plain-0.json").write_text(json.dumps(made_up("plain", 0, "1110")))
    assert "has no speed.json" in refused()
    (tmp_path / "speed.json").write_text('{"rows": []}')
    assert "speed.json lacks plain" in refused()
    assert not (tmp_path / "table.md").exists()
    speed = dict(row="plain", gmacs=0.2, images_per_second=200, training_images_per_second=50)
    (tmp_path / "speed.json").write_text(json.dumps(dict(rows=[speed])))
    table.main()
    expected = "| plain | the backbone alone, equal epochs | 6 | 160 | 1.00 | 200 | 3 | 1 | 75.0 |"
    assert expected in capsys.readouterr().out
    assert (tmp_path / "table.md").is_file()
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.size == (960, 720)


def test_published_figures_are_those_of_the_runs(scripts):
    """table.md, and README's choice of its rows and columns."""
    experiments, table = scripts
    runs = table.read_runs(experiments.RESULTS)
    made = [list(table.HEADER), *table.format_rows(runs, table.read_speed(experiments.RESULTS))]
    lines = (experiments.RESULTS / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line.strip("| ").split(" | ")[0] for line in lines[2:]] == [row[0] for row in made[1:]]
    assert [line for line in lines if not line.startswith("| ---")] == [f"| {' | '.join(row)} |" for row in made]
    text = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    head, *shown = re.findall(r"^\| row \|.*\n(?:\|.*\n)+", text, re.MULTILINE)[0].replace("**", "").splitlines()
    columns = [made[0].index(name) for name in head.strip("| ").split(" | ") if name != "what"]
    rows = {row[0]: [row[column] for column in columns] for row in made}
    for line in shown[1:]:
        name, _, *figures = (cell.strip(" `") for cell in line.strip().removeprefix("|").removesuffix("|").split("|"))
        assert [name, *figures] == rows[name]
    assert len(shown) > 10
