import json

import benchmark
import pytest
import timm
from experiments import speed
from helpers import command, run
from PIL import Image

import s3n_timm

ROUNDS = ("--seconds", 0.01, "--min-rounds", 1, "--max-rounds", 1, "--cpu-threads", 1)
SMALL = ("--backbone", "test_resnet", "--sizes", 64, "-b", 2, "--peaks", 5, "--workers", 0, *ROUNDS)


def main(*words):
    benchmark.main([str(word) for word in words])


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


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
    assert {(row["precision"], row["how"]) for row in results["model"]} == {("float32", "eager")}
    assert results["data"][0]["steps"] == 1
    assert 0 < results["data"][0]["computes_percent"] <= 100
    assert "soak" not in results
    assert "times bare" in printed


def test_model_in_mixed_precision_and_compiled(tmp_path, monkeypatch):
    precisions, compiled = set(), []

    def watch(model, args):
        classifier = model.get_classifier()
        classifier.register_forward_hook(lambda _, __, logits: precisions.add(str(logits.dtype)))
        return model

    create = benchmark.create_models
    monkeypatch.setattr(benchmark, "create_models", lambda *args: tuple(watch(m, args) for m in create(*args)))
    monkeypatch.setattr(benchmark.torch, "compile", lambda model, **_: compiled.append(model) or model)  # takes minutes
    main("model", *SMALL, "--device", "cpu", "--amp", "bf16", "--compile", "--output", tmp_path / "speed.json")
    results = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["how"], row["precision"], row["kind"]) for row in results["model"]] == [
        (how, precision, kind)
        for how, precision in (("eager", "float32"), ("eager", "bf16"), ("compiled", "bf16"))
        for kind in ("forward", "training step")]
    assert precisions == {"torch.float32", "torch.bfloat16"}
    assert [isinstance(model, s3n_timm.S3N) for model in compiled] == [True, False]
    assert results["args"]["device"] == "cpu"


def test_trained_models_by_turns_with_early_exit(tmp_path):
    folders = []
    for name, options in (("test_resnet", {}), ("s3n", dict(backbone="test_resnet"))):
        model = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=dict(input_size=(3, 64, 64)), **options)
        folders.append(str(s3n_timm.save(model, tmp_path / name)))
    for split, i in [("test", i) for i in range(5)] + [("train", i) for i in range(9)]:
        path = tmp_path / "images" / split / f"class {i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 80), (50 * i, 0, 0)).save(path)
    words = [*SMALL, "--dataset", "folder", "--data-dir", tmp_path / "images", "--output", tmp_path / "speed.json"]
    for entropy, exited in (("9", 1), ("0", 0)):
        main("--weights", *folders, "--exit-entropy", entropy, *words)
        plain, whole, early = json.loads((tmp_path / "speed.json").read_text())["weights"]
        assert [plain["weights"], whole["weights"]] == folders
        assert early["weights"] == f"{folders[1]}, early exit"
        assert early["exited"] == exited
        assert 3 < whole["gmacs"] / plain["gmacs"] < 3.5
    with pytest.raises(SystemExit, match="more than the 5 test images"):
        main("--weights", *folders, *words, "-b", 6)
    main("data", *words)
    (row,) = json.loads((tmp_path / "speed.json").read_text())["data"]
    assert row["steps"] == 1
    with pytest.raises(SystemExit, match="no second one of 5"):
        main("data", *words, "-b", 5)


@pytest.mark.parametrize(("words", "message"), [
    (["--exit-entropy", "1"], "--exit-entropy needs --weights"),
    (["stage", "--dataset", "folder"], "--dataset needs --weights or the section data"),
    (["--weights", "folder", "--exit-entropy", "1"], "--exit-entropy needs --dataset"),
    (["rungs"], "unknown section 'rungs'"),
    (["stage", "--peaks", "101"], "can be 100 at most"),
    (["--seconds", "0"], "--seconds must be positive"),
    (["--backbone", "no_such_model"], "is not a timm model"),
])
def test_wrong_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        main(*words)
    assert message in capsys.readouterr().err


def test_rows_of_experiments_by_turns(tmp_path, capsys):
    words = ["--rows", "s3n", "plain-224", "--output", tmp_path / "speed.json", "-b", 2, *ROUNDS]
    speed.main([str(word) for word in words])
    rows = {row["row"]: row for row in json.loads((tmp_path / "speed.json").read_text())["rows"]}
    assert list(rows) == ["plain", "s3n", "plain-224"], "the others are compared with plain"
    assert rows["plain-224"]["gmacs"] / rows["plain"]["gmacs"] == pytest.approx((224 / 160) ** 2, rel=0.02)
    assert 3 < rows["s3n"]["gmacs"] / rows["plain"]["gmacs"] < 3.1
    assert rows["plain"]["times_plain"] == rows["plain"]["training_times_plain"] == 1
    assert "gmacs" in capsys.readouterr().out
