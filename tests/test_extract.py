"""The plain timm model inside an S3N, used where s3n_timm is not: each time in an interpreter of its own."""

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
from timm.data import create_transform, resolve_data_config
from torch import nn

import s3n_timm
from s3n_timm import S3N, extract_backbone
from s3n_timm.hub import model_card
from s3n_timm.multiscale import scan

NAMES = ["a wren", "a crow", "schön"]
SIDE = 64
DATA = dict(input_size=(3, SIDE, SIDE), crop_pct=0.8, crop_mode="squash", interpolation="bilinear",
            mean=(0.4, 0.5, 0.6), std=(0.5, 0.4, 0.3))


def create(backbone="test_resnet", **options):
    torch.manual_seed(0)
    model = S3N(backbone, **dict(num_classes=3) | options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    # classifiers so far apart that a wrong pixel would change an answer
    for parameter in model.backbone.get_classifier().parameters():
        nn.init.normal_(parameter, std=3.0)
    return model.eval()


def pixels(side=SIDE, count=2):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


OPTIONS = [
    dict(),
    dict(backbone="test_convnext", branches="O+D"),
    dict(backbone="test_vit4", img_size=SIDE, branches="O+C"),
    dict(backbone="test_efficientnet", preset="original"),
    dict(backbone="test_resnet", scan_size=96, zoom_size=SIDE, answer="original"),
    dict(backbone="test_resnet", branches="O", backbone_args=dict(output_stride=16)),
    dict(backbone="test_resnet", drop_rate=0.3, drop_path_rate=0.1),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_are_those_of_the_branch(options, tmp_path):
    model = create(**options)
    x = pixels(160 if "scan_size" in options else SIDE)
    size = model.config.scan_size
    read = x if size is None else scan(x, size)
    backbone = extract_backbone(model)
    plain = timm.create_model(model.config.backbone, num_classes=3)
    assert type(backbone) is type(plain)
    assert backbone.pretrained_cfg["architecture"] == model.config.backbone
    folder = s3n_timm.save(backbone, tmp_path)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected = model.forward_branches(x)[0].original
        for network in (backbone, again, s3n_timm.load_model(folder).eval()):
            torch.testing.assert_close(network(read), expected)


def test_the_copy_is_independent():
    model = create()
    model.train()(pixels()).original.sum().backward()
    backbone = extract_backbone(model)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.backbone.layer1.parameters())
    with torch.no_grad():
        backbone.conv1[0].weight.zero_()
    assert model.backbone.conv1[0].weight.any()
    cfg = dict(model.backbone.pretrained_cfg)
    backbone.pretrained_cfg["mean"] = (9, 9, 9)
    assert model.backbone.pretrained_cfg == cfg


def test_preprocessing_and_names():
    backbone = extract_backbone(create(), label_names=NAMES, data_config=DATA)
    config = resolve_data_config({}, model=backbone)
    assert {key: config[key] for key in DATA} == DATA
    assert backbone.pretrained_cfg["label_names"] == NAMES
    # what is left of the ImageNet weights that training began with would be wrong
    assert not {"url", "hf_hub_id", "tag", "test_input_size", "source", "file"} & backbone.pretrained_cfg.keys()
    scanned = extract_backbone(create(scan_size=(48, 80), zoom_size=SIDE), data_config=DATA)
    assert resolve_data_config({}, model=scanned)["input_size"] == (3, 48, 80)
    assert resolve_data_config({}, model=scanned)["crop_pct"] == 0.8


def test_preprocessing_of_a_saved_s3n(tmp_path):
    folder = s3n_timm.save(create(), tmp_path, label_names=NAMES, data_config=DATA)
    backbone = extract_backbone(s3n_timm.load_model(folder))
    config = resolve_data_config({}, model=backbone)
    assert {key: config[key] for key in DATA} == DATA
    assert backbone.pretrained_cfg["label_names"] == NAMES


@pytest.mark.parametrize(
    ("model", "kind", "said"),
    [
        (lambda: create(branches="D+C"), ValueError, "no O branch"),
        (lambda: create(num_classes=0), ValueError, "num_classes=0"),
        (lambda: timm.create_model("test_resnet"), TypeError, "needs an S3N"),
    ],
)
def test_refusals(model, kind, said):
    with pytest.raises(kind, match=said):
        extract_backbone(model())


def test_names_that_do_not_fit():
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        extract_backbone(create(), label_names=["a", "b"])


def test_card():
    card = model_card(extract_backbone(create()), name="alice/plain")
    assert card.data.library_name == "timm"
    assert "O branch of an S3N" in card.content
    assert "s3n_timm" not in card.content.split("## How to load")[1].split("\n## ")[0]


# without s3n_timm


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of the plain model, and a folder of images by class with what it answers on them."""
    model = create()
    folder = s3n_timm.save(extract_backbone(model, label_names=NAMES, data_config=DATA), tmp_path_factory.mktemp("m"))
    transform = create_transform(**DATA)
    images = tmp_path_factory.mktemp("images")
    noise = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    answers = []
    for i, values in enumerate(noise):
        image = Image.fromarray(values.numpy()).resize((90, 70))
        (images / f"{i % 3}").mkdir(exist_ok=True)
        path = images / f"{i % 3}" / f"{i}.png"
        image.save(path)
        with torch.no_grad():
            logits = model.forward_branches(transform(image)[None])[0].original[0]
        answers.append(dict(path=str(path), label=i % 3, logits=logits.tolist()))
    return folder, answers


def run_alone(code, folder, answers):
    """What a script prints as JSON, which may import timm, transformers and torch, and not s3n_timm."""
    end = '\nimport sys\nassert "s3n_timm" not in sys.modules\nprint(json.dumps(result))\n'
    done = subprocess.run(
        [sys.executable, "-c", f"import json\nfolder, answers = {str(folder)!r}, {answers!r}\n{code}{end}"],
        text=True, capture_output=True, timeout=300, cwd=folder, encoding="utf-8",
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
            "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_timm_loads_it_alone(exported):
    folder, answers = exported
    result = run_alone("""
import timm, torch
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.no_grad():
    logits = model(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
result = dict(logits=logits.tolist(), kind=type(model).__module__, names=model.pretrained_cfg["label_names"])
""", folder, answers)
    with torch.no_grad():
        expected = create().forward_branches(pixels())[0].original
    torch.testing.assert_close(torch.tensor(result["logits"]), expected)
    assert result["kind"] == "timm.models.resnet"
    assert result["names"] == NAMES


def test_timm_evaluates_it_alone(exported):
    """As timm's validate.py does: data config and transform of the model, a data set of folders, accuracy."""
    folder, answers = exported
    result = run_alone("""
import timm, torch
from pathlib import Path
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
config = resolve_data_config({}, model=model, use_test_size=True)
dataset = create_dataset("", root=str(Path(answers[0]["path"]).parent.parent))
loader = create_loader(dataset, input_size=config["input_size"], batch_size=2, use_prefetcher=False, num_workers=0,
                       interpolation=config["interpolation"], mean=config["mean"], std=config["std"],
                       crop_pct=config["crop_pct"], crop_mode=config["crop_mode"], device=torch.device("cpu"))
with torch.no_grad():
    rows = [(model(x), y) for x, y in loader]
logits, labels = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])
result = dict(logits=logits.tolist(), top1=accuracy(logits, labels)[0].item())
""", folder, answers)
    expected = sorted(answers, key=lambda answer: (answer["label"], answer["path"]))
    logits = torch.tensor([answer["logits"] for answer in expected])
    torch.testing.assert_close(torch.tensor(result["logits"]), logits, rtol=1e-3, atol=1e-3)
    correct = (logits.argmax(1) == torch.tensor([answer["label"] for answer in expected])).double().mean().item()
    assert result["top1"] == pytest.approx(100 * correct)


def test_transformers_runs_it_alone(exported):
    pytest.importorskip("transformers")
    folder, answers = exported
    result = run_alone("""
from transformers import pipeline
classify = pipeline("image-classification", model=folder)
result = [{each["label"]: each["score"] for each in classify(answer["path"])} for answer in answers]
""", folder, answers)
    for found, answer in zip(result, answers):
        expected = torch.tensor(answer["logits"]).softmax(0).tolist()
        assert found == pytest.approx(dict(zip(NAMES, expected)), abs=1e-3)


def test_a_saved_folder_holds_no_word_of_s3n(exported):
    folder = Path(exported[0])
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert "num_classes" not in config["model_args"], "transformers refuses it"
    assert all(not name.startswith("backbone.") for name in load_file(folder / "model.safetensors"))
