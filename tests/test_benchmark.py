import json

import pytest
import timm
from helpers import command, run
from PIL import Image

import s3n_timm

SMALL = ("--backbone", "test_resnet", "--sizes", 64, "-b", 2, "--peaks", 5, "--workers", 0, "--seconds", 0.01,
         "--min-rounds", 1, "--max-rounds", 1, "--cpu-threads", 1)


def test_sections_measure_what_they_say(tmp_path):
    output = tmp_path / "speed.json"
    printed = run(command("benchmark.py", "stage", "model", "data", *SMALL, "--output", output))
    results = json.loads(output.read_text())
    assert [row["kind"] for row in results["stage"]] == ["forward", "forward + backward"]
    # time is not to be trusted in a test, the outputs of what is timed side by side are: loops, and our stage
    assert all(row["largest_difference"] < 1e-3 for row in results["stage"])
    # of three passes one is held at a time in a forward, and all in a training step
    forward, training = (row["megabytes"] for row in results["model"])
    assert 0 < forward < training
    assert results["data"][0]["steps"] == 1
    assert 0 < results["data"][0]["computes_percent"] <= 100
    assert "soak" not in results
    assert "times bare" in printed


def test_trained_models_by_turns_with_early_exit(tmp_path):
    folders = []
    for name, options in (("test_resnet", {}), ("s3n", dict(backbone="test_resnet"))):
        model = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=dict(input_size=(3, 64, 64)), **options)
        folders.append(str(s3n_timm.save(model, tmp_path / name)))
    for split, i in [("test", i) for i in range(5)] + [("train", i) for i in range(3)]:
        path = tmp_path / "images" / split / f"class {i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 80), (50 * i, 0, 0)).save(path)
    words = [*SMALL, "--dataset", "folder", "--data-dir", tmp_path / "images", "--output", tmp_path / "speed.json"]
    for entropy, exited in (("9", 1), ("0", 0)):
        run(command("benchmark.py", "--weights", *folders, "--exit-entropy", entropy, *words))
        plain, whole, early = json.loads((tmp_path / "speed.json").read_text())["weights"]
        assert [plain["weights"], whole["weights"]] == folders
        assert early["weights"] == f"{folders[1]}, early exit"
        assert early["exited"] == exited
        assert 3 < whole["gmacs"] / plain["gmacs"] < 3.5
    refused = run(command("benchmark.py", "--weights", *folders, *words, "-b", 6), ok=False)
    assert "more than the 5 test images" in refused


@pytest.mark.parametrize(("words", "message"), [
    (["--exit-entropy", "1"], "--dataset and --exit-entropy need --weights"),
    (["--weights", "folder", "--exit-entropy", "1"], "--exit-entropy needs --dataset"),
    (["rungs"], "unknown section 'rungs'"),
    (["stage", "--peaks", "101"], "can be 100 at most"),
    (["--seconds", "0"], "--seconds must be positive"),
    (["--backbone", "no_such_model"], "is not a timm model"),
])
def test_wrong_arguments_are_named(words, message):
    assert message in run(command("benchmark.py", *words), ok=False)
