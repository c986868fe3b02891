"""--teacher: a trained model's answers in place of the labels."""

from argparse import Namespace

import pytest
import timm
import torch
from accelerate import Accelerator
from helpers import SMALL, call, weights
from support.arguments import parse_args
from support.models import read_teacher
from torch import nn

import s3n_timm
from s3n_timm.data import drawn_birds
from s3n_timm.images import input_config

NAMES = ["owl", "wren", "rook", "tern"]


def save_teacher(folder, names=NAMES, data_config=None, multi_label=False, **options):
    torch.manual_seed(0)
    model = timm.create_model("s3n", backbone="test_resnet", num_classes=len(names), **options)
    if multi_label:
        s3n_timm.checkpoints.mark_multi_label(model)
    with torch.no_grad():
        for classifier in (model.backbone.get_classifier(), *(m for m in model.modules() if isinstance(m, nn.Linear))):
            classifier.weight.mul_(20)  # answers that are no toss-up
    s3n_timm.save(model.eval(), folder, label_names=list(names), data_config=data_config)
    return model


def read(folder, names=NAMES, dataset="folder", multi_label=False):
    """What the teacher of a folder says, for a student on images of ImageNet's normalization."""
    import datasets

    label = datasets.ClassLabel(names=list(names))
    feature = datasets.List(label) if multi_label else label
    train = datasets.Dataset.from_dict(dict(label=[[0]] if multi_label else [0]),
                                       features=datasets.Features(label=feature))
    args = Namespace(teacher=str(folder), dataset=dataset, backbone="test_resnet", channels_last=True,
                     torchcompile=None)
    student = timm.create_model("test_resnet", num_classes=len(names))
    return read_teacher(args, train, input_config(student), Accelerator(cpu=True))


def test_s3n_teaches_by_the_mean_of_its_outputs(tmp_path):
    model, x = save_teacher(tmp_path), torch.rand(3, 3, 64, 64)
    model.configure(answer="mean")
    with torch.no_grad():
        expected = model(x).softmax(1)
        model.configure(answer="joint")
        assert not torch.allclose(model(x).softmax(1), expected, atol=1e-3)
    torch.testing.assert_close(read(tmp_path)(x), expected)


def test_its_classes_are_found_by_their_names(tmp_path):
    save_teacher(tmp_path)
    x, names = torch.rand(3, 3, 64, 64), NAMES[::-1]
    torch.testing.assert_close(read(tmp_path, names)(x), read(tmp_path)(x).flip(1))


def test_of_several_labels_it_gives_each_a_probability(tmp_path):
    save_teacher(tmp_path, multi_label=True)
    said = read(tmp_path, dataset="multi-label", multi_label=True)(torch.rand(3, 3, 64, 64))
    assert ((said > 0) & (said < 1)).all()
    assert (said.sum(1) - 1).abs().max() > 0.01


def test_refuses_a_teacher_that_reads_other_images(tmp_path):
    save_teacher(tmp_path, data_config=dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match="normalized alike"):
        read(tmp_path)


def test_refuses_a_teacher_of_other_classes(tmp_path):
    save_teacher(tmp_path, names=["owl", "wren", "rook", "kite"])
    with pytest.raises(ValueError, match="tern"):
        read(tmp_path)


@pytest.mark.parametrize("flags", [["--plain"], [], ["--plain", "--mixup", 0.5]], ids=["plain", "s3n", "mixed"])
def test_the_network_learns_what_the_teacher_says_and_not_the_labels(tmp_path, flags):
    """The teacher takes every bird for one of class 1."""
    names = drawn_birds("test", 1, num_classes=4, size=64).features["label"].names
    teacher = timm.create_model("test_resnet", num_classes=4)
    with torch.no_grad():
        teacher.get_classifier().bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
        teacher.get_classifier().weight.zero_()
    s3n_timm.save(teacher, tmp_path / "teacher", label_names=names)
    call("train.py", *SMALL, *flags, "--epochs", 3, "--teacher", tmp_path / "teacher", "--output", tmp_path / "run")
    student = s3n_timm.Classifier(tmp_path / "run" / "last")
    images = drawn_birds("test", 8, num_classes=4, size=64)["image"]
    assert {answer[0]["label"] for answer in student(list(images))} == {names[1]}


def test_goes_on_with_its_teacher_alone(tmp_path):
    save_teacher(tmp_path / "teacher", drawn_birds("test", 1, num_classes=4, size=64).features["label"].names)
    taught = (*SMALL, "--plain", "--teacher", tmp_path / "teacher", "--val-fraction", 0)
    call("train.py", *taught, "--epochs", 2, "--output", tmp_path / "whole")
    call("train.py", *taught, "--epochs", 1, "--sched", "constant", "--output", tmp_path / "parts")
    call("train.py", *taught, "--epochs", 2, "--sched", "constant", "--output", tmp_path / "once")
    call("train.py", *taught, "--epochs", 2, "--sched", "constant", "--output", tmp_path / "parts", "--resume")
    for name, tensor in weights(tmp_path / "once").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name
    text = call("train.py", *SMALL, "--plain", "--val-fraction", 0, "--epochs", 3, "--output", tmp_path / "whole",
                "--resume", ok=False)
    assert "teacher" in text


def test_smoothing_of_a_recipe_is_meant_for_labels(tmp_path):
    words = ["--recipe", "cub50", "--dataset", "birds", "--num-images", "48", "--output", str(tmp_path / "run")]
    assert parse_args(words).smoothing == 0.1
    assert parse_args([*words, "--teacher", "output/s3n/best"]).smoothing == 0
    assert parse_args([*words, "--teacher", "output/s3n/best", "--smoothing", "0.2"]).smoothing == 0.2
