"""S3N in transformers, through its wrapper of timm models: from a folder, from the Hub, and in its Trainer."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_server import Hub
from PIL import Image
from safetensors.torch import load_file

import s3n_timm
from s3n_timm import S3N
from s3n_timm.data import drawn_birds

pytest.importorskip("transformers")
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

NAMES = ["a wren", "a crow", "schön", "a tit"]
DATA = dict(input_size=(3, 64, 64), crop_pct=1.0, crop_mode="squash", interpolation="bicubic",
            mean=(0.4, 0.5, 0.6), std=(0.5, 0.4, 0.3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = S3N("test_resnet", num_classes=4, backbone_args=dict(output_stride=16))
    return s3n_timm.save(model, tmp_path_factory.mktemp("model"), label_names=NAMES, data_config=DATA)


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "noise.png"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    return path


def scores(answers):
    return {each["label"]: each["score"] for each in answers}


def test_pipeline_answers_as_the_classifier(folder, photograph):
    classify = pipeline("image-classification", model=str(folder))
    expected = s3n_timm.Classifier(folder)(photograph)
    assert scores(classify(str(photograph))) == pytest.approx(scores(expected), abs=1e-3)


def test_pipeline_reads_the_hub(folder, photograph, tmp_path):
    code = f"""
import json, s3n_timm
from transformers import pipeline
s3n_timm.push_to_hub(s3n_timm.load_model({str(folder)!r}), "alice/birds")
print(json.dumps(pipeline("image-classification", model="alice/birds")({str(photograph)!r})))
"""
    with Hub() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "token-alice", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", code], text=True, capture_output=True, timeout=300, env=environment)
        assert not done.returncode, done.stderr
    expected = s3n_timm.Classifier(folder)(photograph)
    assert scores(json.loads(done.stdout.splitlines()[-1])) == pytest.approx(scores(expected), abs=1e-3)


def test_trainer_accumulates_the_mean_over_an_update(folder, tmp_path):
    pixels = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rows = [dict(pixel_values=image, labels=i % 4) for i, image in enumerate(pixels)]
    found = []
    for batch in (16, 4):
        model = AutoModelForImageClassification.from_pretrained(folder)
        for module in model.modules():  # whose statistics see another batch
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True: None
                module.training = False
        model.timm_model.configure(partition_train="expected")
        arguments = TrainingArguments(
            tmp_path / f"batches of {batch}", max_steps=1, per_device_train_batch_size=batch, optim="sgd",
            gradient_accumulation_steps=16 // batch, learning_rate=0.01, max_grad_norm=0, remove_unused_columns=False,
            report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, save_strategy="no")
        trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=s3n_timm.S3NLoss().trainer_loss)
        loss = trainer.train().training_loss
        found.append((loss, model.timm_model.fusion.weight.detach()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_trainer_trains_every_branch(folder, tmp_path):
    """In train mode the logits are those of all outputs, which S3NLoss takes; in eval mode they are a tensor."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.timm_model.state_dict().items()}

    def prepare(rows):
        pixels = [processor(image.convert("RGB"))["pixel_values"][0] for image in rows["image"]]
        return dict(pixel_values=pixels, labels=rows["label"])

    train, test = (drawn_birds(split, 16, 4, 64, cache_dir=tmp_path / "birds").with_transform(prepare)
                   for split in ("train", "test"))
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path / "output", max_steps=2, per_device_train_batch_size=8, learning_rate=0.01,
                          remove_unused_columns=False, report_to=[], use_cpu=True, dataloader_pin_memory=False,
                          disable_tqdm=True),
        train_dataset=train,
        eval_dataset=test,
        compute_loss_func=s3n_timm.S3NLoss().trainer_loss,
    )
    assert trainer.train().training_loss > 3 * trainer.evaluate()["eval_loss"]  # eq. 9 has four terms, an answer one
    assert trainer.predict(test).predictions.shape == (16, 4)
    trained = model.timm_model.state_dict()
    for name, parameter in model.timm_model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    trainer.save_model(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name.removeprefix("timm_model.") for name in stored} == set(trained)
    assert scores(pipeline("image-classification", model=str(tmp_path / "saved"))(Image.new("RGB", (64, 64))))
