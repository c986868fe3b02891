"""The trained model that comes with the package."""

import json

import pytest
import timm
import torch
from helpers import SMALL
from huggingface_hub import constants
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

import s3n_timm
from s3n_timm.data import drawn_birds
from s3n_timm.registry import PACKAGED


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_it_knows_drawn_birds(tmp_path):
    classifier = s3n_timm.Classifier("s3n_test_resnet")
    birds = drawn_birds("test", 80, 8, cache_dir=tmp_path)
    assert classifier.label_names == birds.features["label"].names
    answers = [best[0]["label"] for best in classifier(birds[:]["image"], top_k=1)]
    names = [classifier.label_names[label] for label in birds["label"]]
    assert sum(map(str.__eq__, answers, names)) > 64


def test_timm_loads_it_by_its_name():
    model = timm.create_model("s3n_test_resnet", pretrained=True).eval()
    assert "s3n_test_resnet.birds" in timm.list_pretrained("s3n*")
    assert resolve_model_data_config(model)["input_size"] == (3, 96, 96)
    stored = load_file(PACKAGED / "model.safetensors")
    assert all(torch.equal(stored[name].to(tensor.dtype), tensor) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int64}


def test_without_weights_and_with_other_classes():
    fresh = timm.create_model("s3n_test_resnet", num_classes=3)
    tuned = timm.create_model("s3n_test_resnet", pretrained=True, num_classes=3)
    stored = load_file(PACKAGED / "model.safetensors")
    for model, same in ((fresh, False), (tuned, True)):
        weights = model.state_dict()
        assert weights["backbone.fc.weight"].shape[0] == 3
        assert torch.equal(weights["backbone.layer1.0.conv1.weight"],
                           stored["backbone.layer1.0.conv1.weight"].float()) == same
        assert s3n_timm.checkpoints.label_names(model) == ["0", "1", "2"]


def test_it_is_saved_and_loaded_as_others_are(tmp_path):
    model = timm.create_model("s3n_test_resnet", pretrained=True).eval()
    again = timm.create_model(f"local-dir:{s3n_timm.save(model, tmp_path)}", pretrained=True).eval()
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
    assert "file" not in json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert s3n_timm.checkpoints.label_names(again) == s3n_timm.checkpoints.label_names(model)


def test_its_command_makes_such_a_folder(tmp_path, monkeypatch):
    from experiments import packaged_model

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    flags = [word if word != "4" else "8" for word in SMALL if word not in ("--backbone", "test_resnet")]
    flags += ["--num-images", "80", "--img-size", "96", "--epochs", "1"]
    packaged_model.main(["--folder", str(tmp_path), *flags])
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, PACKAGED))
    assert ours.pop("command") != theirs.pop("command")
    assert ours == theirs
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, PACKAGED))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in theirs.items()}
