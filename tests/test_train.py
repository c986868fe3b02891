"""examples/train.py as its users run it: real processes, a small network, few drawn birds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import s3n_timm

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"
SMALL = [
    "--backbone", "test_resnet", "--num-images", "48", "--num-classes", "4", "--img-size", "64", "--batch-size", "8",
    "--workers", "0", "--lr", "0.02", "--cpu-threads", "1",
]


ENVIRONMENT = os.environ | {
    "ACCELERATE_USE_CPU": "true",
    "PYTHONIOENCODING": "utf-8",
    "PYTHONUNBUFFERED": "1",
}


def command(*args: object, processes: int = 1) -> list[str]:
    launch = [sys.executable, str(SCRIPT)]
    if processes > 1:
        launch = [
            sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes),
            "--main_process_port", "0", str(SCRIPT),
        ]
    return [*launch, *map(str, args)]


def train(*args: object, processes: int = 1, ok: bool = True) -> str:
    run = subprocess.run(
        command(*args, processes=processes), capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert (run.returncode == 0) == ok, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("train") / "run"
    return output, train(*SMALL, "--epochs", 2, "--model-ema", "--output", output)


def test_run_leaves_weights_results_and_a_table(trained):
    output, text = trained
    for branch in s3n_timm.S3NLogits._fields:
        assert branch in text
    assert "epoch 2/2" in text
    assert "top-1 % on the test split" in text
    results = json.loads((output / "results.json").read_text())["test_top1"]
    assert set(results["best"]) == set(s3n_timm.S3NLogits._fields)
    assert not list(output.rglob("*.bin")) or {p.parent.parent.name for p in output.rglob("*.bin")} == {"checkpoints"}


@pytest.mark.parametrize("kind", ["best", "last"])
def test_weights_load_as_a_timm_model(trained, kind):
    model = timm.create_model(f"local-dir:{trained[0] / kind}", pretrained=True).eval()
    assert model.num_classes == 4
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 4)
    config = json.loads((trained[0] / kind / "config.json").read_text())
    assert len(config["label_names"]) == 4
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]


@pytest.mark.parametrize(
    "extra",
    [["--model-ema"], ["--recipe", "original", "--no-pretrained", "--grad-accum-steps", 2]],
    ids=["ema", "original"],
)
def test_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, extra):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    args = [*SMALL, *extra, "--epochs", 3]
    train(*args, "--output", whole)
    with subprocess.Popen(
        command(*args, "--output", cut), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    ) as run:
        assert run.stdout is not None
        assert any(line.startswith("epoch 2/3") for line in run.stdout)
        run.kill()  # while it saves the second epoch, or soon after
    assert not (cut / "results.json").exists()
    assert "Resumed from" in train(*args, "--output", cut, "--resume")
    ours, theirs = (load_file(folder / "last" / "model.safetensors") for folder in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_train_every_parameter_and_count_every_image_once(tmp_path):
    # 48 images: 43 to train on, 5 to validate on and 12 to test on, none of which two processes share evenly
    recipe = ["--recipe", "original", "--no-pretrained", "--model-ema", "--epochs", 1, "--batch-size", 4]
    text = train(*SMALL, *recipe, "--output", tmp_path / "run", processes=2)
    assert text.count("epoch 1/1  loss") == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())["test_top1"]["last"]
    assert all(abs(value * 12 / 100 - round(value * 12 / 100)) < 1e-3 for value in results.values())


def write_folder(root: Path, broken: str | None = None) -> Path:
    for split, count in (("train", 6), ("test", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                color = (i * 40, 100, 200 if name == "a" else 0)
                Image.new("RGB", (80, 70), color).save(root / split / name / f"{i}.png")
    if broken is not None:
        (root / broken).write_bytes(b"not an image")
    return root


def test_image_folder(tmp_path):
    data = write_folder(tmp_path / "data")
    args = ["--dataset", "folder", "--data-dir", data, "--recipe", "birds", "--val-fraction", 0.2, "--epochs", 1]
    assert "2 classes" in train(*SMALL, *args, "--output", tmp_path / "run")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset", "cub", "--data-dir", "/nowhere"], "/nowhere is not a folder"),
        (["--dataset", "cub"], "data_dir must name the folder"),
        (["--epochs", "0"], "--epochs must be positive"),
        (["--val-fraction", "1"], "--val-fraction must lie in"),
        (["--val-fraction", "0.01"], "--val-fraction 0.01 cannot be held out"),
        (["--pretrained-path", "/nowhere.safetensors"], "/nowhere.safetensors is not a file"),
        (["--backbone", "vgg11"], "vgg11's head mixes positions"),
        (["--backbone", "nonsense"], "nonsense"),
        (["--model-kwargs", '{"window": 4}'], "window must be a positive odd number"),
        (["--resume", "/nowhere"], "--resume /nowhere is not a checkpoint"),
        (["--lr", "1e30"], "The loss became"),
    ],
)
def test_bad_arguments_end_in_one_sentence(tmp_path, args, message):
    text = train(*SMALL, "--epochs", 1, *args, "--output", tmp_path / "run", ok=False)
    assert message in text
    assert "Traceback" not in text


def test_an_unreadable_image_is_named_before_the_first_step(tmp_path):
    data = write_folder(tmp_path / "data", broken="train/a/broken.png")
    text = train(*SMALL, "--dataset", "folder", "--data-dir", data, "--output", tmp_path / "run", ok=False)
    assert "broken.png cannot be read as an image" in text
    assert "Traceback" not in text


def test_a_full_output_folder_is_not_overwritten(trained):
    assert "is not empty" in train(*SMALL, "--output", trained[0], ok=False)
