"""examples/train.py on a small network and few drawn birds."""

import argparse
import csv
import importlib
import io
import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import train as script
import yaml
from accelerate import Accelerator
from helpers import EXAMPLES, SMALL, Forked, call, command, largest_difference, run, train, weights
from PIL import Image
from safetensors.torch import load_file
from support.arguments import RECIPES, parse_args
from support.loaders import hold_out
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import s3n_timm
from s3n_timm import S3NLoss
from s3n_timm.config import PRESETS
from s3n_timm.images import input_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("train") / "run"
    return output, train("--epochs", 2, "--model-ema", "--output", output, picture=True)


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


def test_epochs_between_evaluations_are_trained_alike(trained, tmp_path):
    """--val-interval leaves evaluations out, the last epoch's excepted, and nothing else."""
    train("--epochs", 3, "--val-interval", 2, "--output", tmp_path / "run")
    first, second, third = rows(tmp_path / "run")
    assert first["val_joint"] == ""
    assert all(each["loss"] and each["val_joint"] for each in (second, third))
    train("--epochs", 3, "--output", tmp_path / "each")
    assert largest_difference(tmp_path / "run", tmp_path / "each") == 0


def test_answer_of_all_outputs_is_trained_chosen_and_kept(tmp_path):
    text = train("--epochs", 2, "--answer", "mean", "--output", tmp_path / "run")
    summary = rows(tmp_path / "run")
    assert all(each["val_mean"] and each["val_joint"] for each in summary)
    assert "mean" in json.loads((tmp_path / "run" / "results.json").read_text())["test_top1"]["best"]
    assert "mean" in text
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'best'}", pretrained=True)
    assert model.config.answer == "mean"
    chosen = max(float(each["val_mean"]) for each in summary)
    best, last = weights(tmp_path / "run", "best"), weights(tmp_path / "run")
    is_last = all(torch.equal(best[name], last[name]) for name in best)
    assert is_last == (float(summary[1]["val_mean"]) == chosen > float(summary[0]["val_mean"]))


def test_answer_is_the_recipes_for_own_data_and_of_s3n_alone(tmp_path, capsys):
    own = ["--dataset", "folder", "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]
    assert parse_args(own).answer == "mean"
    assert parse_args([*own, "--answer", "joint"]).answer == "joint"
    assert parse_args([*own, "--plain"]).answer == "joint"
    assert parse_args(["--output", str(tmp_path / "out")]).answer == "joint"
    with pytest.raises(SystemExit):
        parse_args([*own, "--plain", "--answer", "mean"])
    assert "leave out --answer" in capsys.readouterr().err


def rows(output):
    with (output / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_summary_has_a_row_an_epoch_with_live_and_averaged_weights(trained):
    output, text = trained
    summary = rows(output)
    assert [row["epoch"] for row in summary] == ["1", "2"]
    for row in summary:
        assert f"loss {float(row['loss']):.3f}" in text
        for branch in s3n_timm.S3NLogits._fields:
            assert {f"val_{branch}", f"val_{branch}_ema"} <= row.keys()
    assert text.count("averaged weights joint") == 2
    for part in ("loss=", "lr=", "<"):  # of the bar: loss, rate and time left
        assert part in text
    assert text.count("epoch 1/2:") == 1  # in a log it is a line


def test_averaged_weights_are_kept_beside_the_live_ones(trained):
    live, averaged = weights(trained[0]), weights(trained[0], "ema")
    assert any(not torch.equal(live[name], averaged[name]) for name in live)


def test_a_seed_repeats_a_run_and_another_does_not(trained, tmp_path):
    train("--epochs", 2, "--model-ema", "--workers", 2, "--output", tmp_path / "same")
    assert all(torch.equal(a, b) for a, b in zip(weights(trained[0]).values(), weights(tmp_path / "same").values()))
    assert not multiprocessing.active_children(), "workers that nobody ends"
    train("--epochs", 2, "--seed", 7, "--output", tmp_path / "other")
    ours, theirs = weights(trained[0]), weights(tmp_path / "other")
    assert not torch.equal(ours["fusion.weight"], theirs["fusion.weight"])


@pytest.mark.parametrize(
    "args",
    [
        ["--mixed-precision", "bf16"],
        ["--mixup", 0.4],
        ["--cutmix", 1],
        ["--reprob", 0.5],
        ["--color-jitter", 0.3],
        ["--aa", "rand-m9-mstd0.5-inc1"],
        ["--opt", "adamw"],
        ["--balanced"],
        ["--smoothing", 0.1],
        ["--bce-loss"],
        ["--bce-loss", "--bce-sum", "--smoothing", 0.1, "--mixup", 0.4, "--bce-target-thresh", 0.2],
        ["--clip-grad", 0.1],
        ["--attention", "saliency"],
        ["--model-kwargs", '{"border": "reflect"}'],
    ],
    ids=lambda args: " ".join(map(str, args)).lstrip("-"),
)
def test_option_changes_what_is_learned(trained, tmp_path, args):
    """The first epoch of a run with an option, against the same run without it."""
    train("--epochs", 1, *args, "--output", tmp_path / "run")
    (row,) = rows(tmp_path / "run")
    assert 0 < float(row["loss"]) < 20
    assert row["loss"] != rows(trained[0])[0]["loss"]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize(("flag", "expected"), [("--channels-last", True), ("--no-channels-last", False)])
def test_memory_format(flag, expected):
    args = parse_args([*map(str, SMALL), flag, "--output", "none"])
    model = script.create_model(args, 4, Accelerator())
    weight = next(x for x in model.parameters() if x.ndim == 4 and x.shape[1] > 1 and x.shape[2] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last) is expected


@pytest.mark.parametrize("kind", ["last", "backbone", "s3n_test_resnet"])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("classes", [4, 5])
def test_a_backbone_starts_from_a_saved_model(trained, kind, plain, classes):
    """S3N or plain; its classifier is kept where there are as many classes, as timm does."""
    path = kind if kind == "s3n_test_resnet" else str(trained[0] / kind)
    flags = ["--pretrained-path", path, "--output", "none", *(["--plain"] if plain else [])]
    model = script.create_model(parse_args([*map(str, SMALL), *flags]), classes, Accelerator())
    given = s3n_timm.load_model(path)
    ours, theirs = ((m.backbone if isinstance(m, s3n_timm.S3N) else m).state_dict() for m in (model, given))
    for name, value in theirs.items():
        if not name.startswith("fc."):
            assert torch.equal(ours[name], value), name
    kept = classes == given.num_classes
    assert ours["fc.weight"].shape[0] == classes
    assert (kept and torch.equal(ours["fc.weight"], theirs["fc.weight"])) == kept


def test_a_recipe_s_weights_are_those_of_its_backbone():
    assert parse_args(["--output", "none"]).pretrained_path == "s3n_test_resnet"
    for flags in (["--backbone", "test_convnext"], ["--no-pretrained"], ["--recipe", "birds_scratch"]):
        args = parse_args([*flags, "--output", "none"])
        assert (args.pretrained_path, args.pretrained) == (None, False)


def test_gradient_checkpointing_recomputes_the_backbone():
    """As many passes of a block as the backward pass asks for, and the same gradient."""
    passes, gradients = [], []
    for flags in ([], ["--grad-checkpointing"]):
        args = parse_args([*map(str, SMALL), "--output", "none", *flags])
        torch.manual_seed(0)
        model = script.create_model(args, 4, Accelerator()).train()
        calls = []
        model.backbone.layer2[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.configure(partition_train="expected")
        S3NLoss()(model(torch.ones(4, 3, 64, 64).cumsum(3) / 64), torch.arange(4)).backward()
        passes.append(len(calls))
        gradients.append(next(model.backbone.parameters()).grad)
    assert passes == [2, 4]
    torch.testing.assert_close(*gradients)


def test_compiled_training_ends_at_the_eager_weights(tmp_path):
    args = ("--epochs", 2, "--freeze-bn", "--model-ema")
    train(*args, "--output", tmp_path / "eager")
    train(*args, "--torchcompile", "aot_eager", "--output", tmp_path / "run")
    for kind in ("last", "ema"):
        assert largest_difference(tmp_path / "run", tmp_path / "eager", kind=kind) < 1e-4


def test_frozen_epochs_leave_the_backbone_as_it_was(tmp_path):
    train("--epochs", 2, "--freeze-epochs", 1, "--checkpoint-hist", 9, "--output", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    first, second = (load_file(checkpoints / f"update-{n}" / "model.safetensors") for n in (5, 10))
    train("--epochs", 1, "--freeze-epochs", 1, "--lr", 1e-30, "--output", tmp_path / "start")
    start = weights(tmp_path / "start")
    frozen = [name for name in start if name.startswith("backbone.") and not name.startswith("backbone.fc")]
    assert all(torch.equal(first[name], start[name]) for name in frozen)
    assert not torch.equal(first["fusion.weight"], start["fusion.weight"])
    assert not torch.equal(first["backbone.fc.weight"], start["backbone.fc.weight"])
    assert not torch.equal(second["backbone.conv1.0.weight"], start["backbone.conv1.0.weight"])


def test_frozen_epochs_freeze_what_belongs_to_no_layer(tmp_path):
    """A ConvNeXt block holds a parameter of its own, beside its layers."""
    args = parse_args([*map(str, SMALL), "--backbone", "test_convnext", "--output", str(tmp_path)])
    model = script.create_model(args, 4, Accelerator()).train()
    frozen = set(script.freeze(model))
    assert {name for name, each in model.named_parameters() if each not in frozen} == {
        "backbone.head.fc.weight", "backbone.head.fc.bias", *(f"beta.{branch}" for branch in model.warped),
        *(f"classifier.{branch}.{kind}" for branch in model.warped for kind in ("weight", "bias")),
        "fusion.weight", "fusion.bias"}


@pytest.mark.parametrize("plain", [True, False])
def test_a_backbone_of_one_size_is_built_for_that_of_the_images(tmp_path, plain):
    flags = [*map(str, SMALL), "--backbone", "swin_tiny_patch4_window7_224", "--output", "none"]
    model = script.create_model(parse_args([*flags, *(["--plain"] if plain else [])]), 4, Accelerator()).eval()
    x = torch.rand(1, 3, 64, 64)
    saved = s3n_timm.save(model, tmp_path, data_config=input_config(model, dict(img_size=64)))
    torch.testing.assert_close(s3n_timm.load_model(saved).eval()(x), model(x))


def test_layer_decay_slows_lower_layers(tmp_path):
    train("--epochs", 1, "--layer-decay", 1e-6, "--output", tmp_path / "run")
    train("--epochs", 1, "--lr", 1e-30, "--warmup-epochs", 0, "--output", tmp_path / "start")
    ours, start = weights(tmp_path / "run"), weights(tmp_path / "start")
    moved = {name: (ours[name] - start[name]).abs().max() for name in ("backbone.conv1.0.weight", "fusion.weight")}
    assert moved["backbone.conv1.0.weight"] < 1e-6 < moved["fusion.weight"]


def test_stops_early_when_no_epoch_is_better(tmp_path):
    text = train("--epochs", 9, "--patience", 2, "--lr", 1e-12, "--output", tmp_path / "run")
    assert "No better epoch for 2: stopped early after 3 epochs" in text
    assert len(rows(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "results.json").exists()


def test_trackers_are_told(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train("--epochs", 1, "--log-with", "tensorboard", "--output", tmp_path / "run")
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out*") if path.parent.name == "s3n_timm"}
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert {"loss", "lr", "val_joint"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("lr")] == [event.step for event in events.Scalars("loss")] == [
        1, 2, 3, 4, 5]
    assert max(event.value for event in events.Scalars("lr")) > 0.01, "the rate of new layers, not of beta"


def test_plain_backbone_is_trained_as_a_baseline(tmp_path):
    text = train("--plain", "--epochs", 1, "--model-ema", "--output", tmp_path / "run")
    assert "plain on test_resnet" in text
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'best'}", pretrained=True).eval()
    assert not isinstance(model, s3n_timm.S3N)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 4)
    assert json.loads((tmp_path / "run" / "best" / "config.json").read_text())["label_names"]


def test_recipes_are_the_paper_s_and_the_original_s():
    for name in ("cub", "aircraft", "cars"):
        for preset in PRESETS:
            args = parse_args(["--dataset", name, "--preset", preset])
            assert (args.backbone, args.img_size, args.batch_size, args.epochs) == ("resnet50", 448, 16, 60)
            assert (args.opt, args.momentum, args.weight_decay, args.lr) == ("momentum", 0.9, 1e-4, 0.01)
            assert args.lr * args.backbone_lr_scale == pytest.approx(0.001)
            assert args.pretrained
            assert args.val_fraction == 0
            assert args.scale == [0.5, 1.0]
            assert round(448 / args.crop_pct) == 600
            assert args.crop_mode == "squash"
            if preset == "original":
                assert args.lr * args.beta_lr_scale == pytest.approx(1e-7)
                assert (args.sched, args.decay_milestones) == ("multistep", [40])
                assert args.smoothing == s3n_timm.S3NLoss.ORIGINAL
            else:
                assert (args.sched, args.smoothing, args.beta_lr_scale) == ("constant", 0, 1)
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {
        "birds", "birds_scratch", "cub", "cub50", "aircraft", "cars", "own"}


@pytest.mark.parametrize("content", [
    "crop_mode: nonsense", "branches: O+X", "epochs: 3.5", "log_with: tensorboard", "scale: 0.5", "plain: {a: 1}",
])
def test_a_recipe_s_values_are_those_of_its_flags(content, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(f"base: cub\nshared: {{{content}}}\n")
    with pytest.raises(SystemExit):
        parse_args(["--dataset", "folder", "--recipe", str(tmp_path / "mine.yaml")])
    assert f"sets {content.partition(':')[0]} to" in capsys.readouterr().err


def test_another_backbone_keeps_a_recipe_s_options_of_the_method():
    args = parse_args(["--recipe", "cub50", "--dataset", "cub", "--preset", "original", "--backbone", "resnet18"])
    assert args.model_kwargs == dict(partition_warmup_epochs=2)
    assert parse_args(["--backbone", "resnet18"]).model_kwargs == {}


def test_rates_are_scaled_by_group_and_follow_the_schedule():
    args = parse_args(["--recipe", "cub", "--dataset", "cub", "--beta-lr-scale", "0.5", "--warmup-epochs", "2",
                       "--sched", "multistep", "--decay-milestones", "4"])
    model = timm.create_model("s3n", backbone="test_resnet", num_classes=3, neck="conv")
    groups = script.group_parameters(model, args)
    optimizer = create_optimizer_v2(groups, opt="sgd", lr=args.lr, momentum=0.9)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=6, warmup_epochs=args.warmup_epochs, step_on_epochs=False,
        decay_milestones=args.decay_milestones, updates_per_epoch=1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for epoch, share in ((1, 0.5), (2, 1), (4, 0.1)):
        scheduler.step_update(epoch)
        rates = {names[parameter]: group["lr"] / args.lr for group in optimizer.param_groups
                 for parameter in group["params"]}
        assert rates.keys() == set(names.values())
        for name, rate in rates.items():
            new = name.startswith(("classifier.", "fusion.", "backbone.fc."))
            expected = 0.5 if name.startswith("beta.") else 1 if new else 0.1
            assert rate == pytest.approx(share * expected, rel=0.01), name  # timm's warm-up begins above 0


@pytest.mark.parametrize("dataset", ["cub", "cars", "folder"])
def test_paper_and_original_are_versions_of_the_data_set_s_recipe(dataset):
    paper, original = (parse_args(["--dataset", dataset, "--recipe", name]) for name in ("paper", "original"))
    assert (paper.preset, paper.sched, paper.smoothing) == ("paper", "constant", 0)
    assert (original.preset, original.sched, original.smoothing) == ("original", "multistep", s3n_timm.S3NLoss.ORIGINAL)
    assert paper.val_fraction == original.val_fraction == (0.1 if dataset == "folder" else 0)
    assert parse_args(["--dataset", dataset, "--recipe", "birds", "--epochs", "3"]).epochs == 3


def test_every_line_of_the_paper_s_recipe_names_its_source():
    for line in (RECIPES / "cub.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            assert "#" in line, line


def test_a_recipe_stands_on_its_base(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("base: cub\nshared: {epochs: 30}\noriginal: {decay_milestones: [2]}\n")
    for preset, sched in (("paper", "constant"), ("original", "multistep")):
        args = parse_args(["--dataset", "cub", "--recipe", str(path), "--preset", preset])
        assert (args.epochs, args.lr, args.img_size, args.sched) == (30, 0.01, 448, sched)
    assert args.decay_milestones == [2]
    for content, message in (
        ("base: nowhere\n", "has base 'nowhere'"), ("epochs: 3\n", "sections shared"), ("paper: {}\n", "no section"),
        ("- a\n", "no section shared"), ("a: [\n", "is not YAML"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit):
            parse_args(["--recipe", str(path), "--output", str(tmp_path / "out")])
        assert message in capsys.readouterr().err


def test_a_model_of_one_channel_reads_grey_images(tmp_path):
    output = tmp_path / "run"
    train("--model-kwargs", '{"in_chans": 1}', "--epochs", 1, "--output", output)
    for folder in ("best", "backbone"):
        assert s3n_timm.Classifier(output / folder).data_config["input_size"] == (1, 64, 64)
    measured = json.loads((output / "results.json").read_text())["test_top1"]["best"]["joint"]
    call("evaluate.py", output / "best", "--num-images", 12, "--workers", 0, "--cpu-threads", 1,
         "--output", tmp_path / "evaluation")
    again = json.loads((tmp_path / "evaluation" / "results.json").read_text())["measures"]["accuracy"]
    assert measured == pytest.approx(again["joint"]["top1"], abs=0.1), again


def test_recipe_of_one_s_own(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    recipe = yaml.safe_load((RECIPES / "birds.yaml").read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(dict(shared=recipe["shared"] | dict(epochs=77))))
    assert parse_args(["--recipe", str(path)]).epochs == 77
    path.write_text(yaml.safe_dump(dict(shared=recipe["shared"] | dict(epoch=77))))
    short = tmp_path / "short.yaml"
    words = ["--recipe", str(short), "--backbone", "resnet18", "--num-images", "80", "--output", str(tmp_path / "out")]
    short.write_text("shared: {lr: 0.02}")
    with pytest.raises(SystemExit):
        parse_args(words)
    assert "lacks img_size" in capsys.readouterr().err
    short.write_text("base: own\nshared: {lr: 0.02}")
    assert parse_args(words).lr == 0.02
    text = train("--recipe", path, "--output", tmp_path / "run", ok=False)
    assert "sets 'epoch', which is no flag of this script" in text


def write_folder(root: Path, broken: str | None = None) -> Path:
    for split, count in (("train", 6), ("test", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                color = (i * 40, 100 if split == "train" else 50, 200 if name == "a" else 0)
                Image.new("RGB", (80, 70), color).save(root / split / name / f"{i}.png")
    if broken is not None:
        (root / broken).write_bytes(b"not an image")
    return root


def test_image_folder(tmp_path):
    data = write_folder(tmp_path / "data")
    args = ["--dataset", "folder", "--data-dir", data, "--recipe", "birds", "--val-fraction", 0.2, "--epochs", 1]
    assert "2 classes" in train(*args, "--batch-size", 4, "--output", tmp_path / "run")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--epochs", "0"], "--epochs must be positive, got 0."),
        (["--clip-grad", "-1"], "--clip-grad must be positive, got -1.0."),
        (["--val-fraction", "1"], "--val-fraction must lie in [0, 1), got 1.0."),
        (["--freeze-epochs", "99"], "--freeze-epochs must lie in 0 to --epochs"),
        (["--pretrained-path", "/nowhere"], "--pretrained-path /nowhere is neither a file nor a folder."),
        (["--sched", "plateau"], "--sched plateau does not step by updates"),
        (["--sched", "cosin"], "--sched cosin is unknown: did you mean cosine?"),
        (["--opt", "adamww"], "--opt adamww is unknown: did you mean adamw?"),
        (["--log-with", "tensorbord"], "--log-with tensorbord is unknown: did you mean tensorboard?"),
        (["--log-with", "nonsense"], "--log-with nonsense is unknown: choose from"),
        (["--patience", "2", "--val-fraction", "0"], "--patience needs validation images"),
        (["--mixup", "0.2", "--batch-size", "7"], "--batch-size must be even, got 7."),
        (["--streaming"], "--streaming reads --dataset hub:NAME"),
        (["--dataset", "hub:x", "--streaming", "--val-fraction", "0.1"], "--streaming can't hold images out"),
        (["--val-split", "validation"], "--val-split names a split of the Hub"),
        (["--plain", "--branches", "O"], "--plain has no branches"),
        (["--plain", "--model-kwargs", '{"fwhm": 9}'], "--plain has no fwhm"),
        (["--recipe", "nonsense"], "--recipe nonsense is neither a file nor"),
        (["--output", str(EXAMPLES)], "is not empty: add --resume to continue"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--cpu-threads", "0"], "--cpu-threads must be positive"),
        (["--mixup", "-0.5"], "--mixup must lie in"),
        (["--seed", "-1"], "--seed must lie in"),
        (["--model-ema-decay", "2"], "--model-ema-decay must lie in"),
        (["--scale", "0.5", "5"], "--scale must be two parts"),
        (["--sched", "multistep"], "--decay-milestones: give some"),
        (["--sched", "rsqrt", "--warmup-epochs", "0"], "--sched rsqrt needs --warmup-epochs"),
        (["--sched", "wsd", "--epochs", "2", "--warmup-epochs", "2"], "--sched wsd needs --warmup-epochs"),
        (["--preset", "original", "--epochs", "18"], "partition_warmup_epochs"),
        (["--model-kwargs", "[1]"], "must be an object"),
        (["--model-kwargs", '{"answer": "original"}'], "cannot hold answer"),
        (["--model-kwargs", '{"preset": "original"}'], "cannot hold preset"),
        (["--model-kwargs", '{"backbone_args": {"num_classes": 7}}'], "cannot hold num_classes"),
        (["--opt", "adahessian"], "second derivatives"),
        (["--crop-pct", "-1"], "--crop-pct must be positive"),
        (["--warmup-epochs", "-1"], "--warmup-epochs must lie in"),
        (["--backbone-lr-scale", "-1"], "--backbone-lr-scale must lie in"),
        (["--model-kwargs", "{"], "is not JSON"),
        (["--recipe", "cub"], "--dataset birds needs --num-images"),
    ],
)
def test_bad_arguments_are_refused_at_once(args, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(args)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--epochs", "0"], "--epochs must be positive"),
        (["--dataset", "cub", "--data-dir", "/nowhere"], "/nowhere is not a folder"),
        (["--dataset", "cub"], "data_dir must name the folder"),
        (["--val-fraction", "0.99"], "--val-fraction 0.99 of"),
        (["--backbone", "vgg11"], "vgg11's head mixes positions"),
        (["--backbone", "nonsense"], "nonsense"),
        (["--model-kwargs", '{"window": 4}'], "window must be an odd whole number"),
        (["--resume", "/nowhere"], "--resume /nowhere is refused: it has no readable manifest.json"),
        (["--log-with", "swanlab"], "--log-with swanlab needs that tracker's package: pip install swanlab"),
        (["--batch-size", "64"], "An update reads 64 images"),
        (["--mixed-precision", "fp16"], "fp16 needs a GPU"),
        (["--aa", "nonsense"], "nonsense"),
    ],
)
def test_what_cannot_be_trained_ends_in_one_sentence(tmp_path, args, message):
    text = train("--epochs", 1, *args, "--output", tmp_path / "run", ok=False)
    assert message in text
    assert "Traceback" not in text


def test_patience_needs_validation_images(tmp_path):
    data = write_folder(tmp_path / "data")
    args = ("--dataset", "folder", "--data-dir", data, "--recipe", "birds", "--val-fraction", 0, "--patience", 1)
    assert "--patience needs validation images" in train(*args, "--output", tmp_path / "run", ok=False)


def test_an_unreadable_image_is_named_before_the_first_step(tmp_path):
    data = write_folder(tmp_path / "data", broken="train/a/broken.png")
    text = train("--dataset", "folder", "--data-dir", data, "--output", tmp_path / "run", ok=False)
    assert "broken.png is not an image" in text
    assert "Traceback" not in text


def test_one_process_of_each_machine_verifies(tmp_path, monkeypatch):
    asked = []

    def load_splits(args, verify):
        asked.append(verify)
        raise ValueError("enough")

    monkeypatch.setattr(script, "load_splits", load_splits)
    for first, flag in ((True, "--verify"), (False, "--verify"), (True, "--no-verify")):
        monkeypatch.setattr("accelerate.Accelerator.is_local_main_process", first)
        train(flag, "--output", tmp_path / "run", ok=False)
    assert asked == [True, None, False]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_was_not_verified_and_cannot_be_read_is_named(tmp_path, workers):
    """And the run ends: its process doesn't wait for workers that hold back its signal."""
    data = write_folder(tmp_path / "data")
    image = data / "train" / "a" / "5.png"
    Image.effect_noise((80, 70), 50).convert("RGB").save(image)
    image.write_bytes(image.read_bytes()[:3000])
    args = ("--dataset", "folder", "--data-dir", data, "--recipe", "birds", "--val-fraction", 0, "-b", 4)
    args = (*SMALL, *args, "--no-verify", "--workers", workers, "--output", tmp_path / "run")
    text = Forked("train.py", *args).end(ok=False)
    assert f"train.py: {image} cannot be read as an image" in text
    assert "Traceback" not in text


def test_an_image_of_two_splits_is_named_before_the_first_step(tmp_path):
    data = write_folder(tmp_path / "data")
    (data / "test" / "b" / "0.png").write_bytes((data / "train" / "a" / "3.png").read_bytes())
    args = ("--dataset", "folder", "--data-dir", data, "--recipe", "birds", "--val-fraction", 0.2)
    text = train(*args, "--output", tmp_path / "run", ok=False)
    assert "test/b/0.png of test has the same content as" in text
    assert "Traceback" not in text
    shutil.copytree(data / "test", data / "val")
    (data / "test" / "b" / "0.png").unlink()
    (data / "val" / "b" / "0.png").unlink()
    text = train(*args, "--output", tmp_path / "run", ok=False)
    assert "of validation has the same content as" in text


@pytest.mark.parametrize(("count", "fraction", "held"), [(2, 0.1, 8), (3, 0.5, 12), (20, 0.1, 16)])
def test_one_image_of_each_class_is_held_out_at_least(tmp_path, count, fraction, held):
    names = [f"class {label}" for label in range(8)]
    images = [dict(image=Image.new("RGB", (2, 2)), label=label) for label in range(8) for _ in range(count)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    dataset = datasets.Dataset.from_list(images, features=features)
    for seed in range(3):
        train_part, val = hold_out(dataset, fraction, seed)
        assert len(val) == held
        assert len(train_part) == len(dataset) - held
        assert set(val["label"]) == set(train_part["label"]) == set(range(8))
    with pytest.raises(ValueError, match="class 7"):
        hold_out(dataset.select(range(7 * count + 1)), fraction, 0)


@pytest.mark.parametrize(("counts", "fraction"), [
    ([100, 2, 2, 2], 0.1), ([30] * 8 + [4] * 4, 0.1), ([40, 10], 0.04), ([97, 3], 0.1), ([2, 2, 90], 0.9)])
def test_small_classes_beside_large_ones_are_in_both_parts(counts, fraction):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    feature = datasets.ClassLabel(num_classes=len(counts))
    dataset = datasets.Dataset.from_dict(dict(label=labels, number=range(len(labels)))).cast_column("label", feature)
    for seed in range(5):
        train_part, val = hold_out(dataset, fraction, seed)
        assert set(val["label"]) == set(train_part["label"]) == set(range(len(counts)))
        assert sorted([*train_part["number"], *val["number"]]) == list(range(len(labels)))


def test_no_class_is_held_out_as_a_whole(tmp_path):
    labels = [[0], [0], [1], [0, 2], [], [0], [1, 3], [0]]
    feature = datasets.Sequence(datasets.ClassLabel(names=["owl", "wren", "night", "pair"]))
    features = datasets.Features(label=feature, number=datasets.Value("int64"))
    rows = [dict(label=label, number=number) for number, label in enumerate(labels)]
    dataset = datasets.Dataset.from_list(rows, features=features)
    sizes = set()
    for seed in range(20):
        train_part, val = hold_out(dataset, 0.4, seed)
        assert {each for row in train_part["label"] for each in row} == {0, 1, 2, 3}
        assert sorted([*train_part["number"], *val["number"]]) == list(range(len(labels)))
        sizes.add(len(val))
    assert max(sizes) == 4
    assert min(sizes) < 4
    with pytest.raises(ValueError, match="no other image has"):
        hold_out(datasets.Dataset.from_list([dict(label=[i], number=i) for i in range(4)], features=features), 0.4, 0)


def test_a_plain_baseline_starts_as_s3n_does():
    args = parse_args(["--backbone", "mobilenetv2_035", "--plain", "--output", "nowhere"])
    classifier = script.create_model(args, 50, Accelerator(cpu=True)).get_classifier()
    assert classifier.weight.detach().abs().max() * classifier.in_features**0.5 == pytest.approx(1, rel=0.02)


# the loop


def test_processes_exchange_once_an_update_and_the_host_waits_for_no_loss(tmp_path, monkeypatch):
    events = []

    def noting(owner, name, event):
        original = getattr(owner, name)

        def note(*args, **kwargs):
            events.append(event)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, note)

    noting(Accelerator, "backward", "backward")
    noting(Accelerator, "reduce", "send")
    noting(torch.Tensor, "tolist", "read")
    monkeypatch.setattr(script, "finish_epoch", lambda *_: True)  # the loop alone
    train("--epochs", 1, "--batch-size", 4, "--grad-accum-steps", 2, "--plain", "--output", tmp_path / "run")
    events = events[events.index("backward"):]
    update = ["backward", "backward", "send"]
    assert [event for event in events if event != "read"] == update * 5
    assert events[:6] == update + update[:2] + ["send"]  # nothing is read before the second update is under way
    assert events.count("read") >= 5


def test_parts_of_an_update_share_the_peaks_draws_and_no_others():
    args, images = argparse.Namespace(seed=1), torch.empty(2, 3, 8, 8)

    def draw(model, update, part):
        script.seed_batch(args, model, images, update, part)
        return torch.rand(2, 31, 31), np.random.rand()

    plain = timm.create_model("test_resnet")
    s3n = s3n_timm.S3N("test_resnet", partition_train="probability").train()
    drawn = {(name, update, part): draw(model, update, part)
             for name, model in (("plain", plain), ("s3n", s3n)) for update in (0, 1) for part in (0, 1, 2)}
    assert len({number for (name, *_), (_, number) in drawn.items() if name == "plain"}) == 6
    assert len({peaks.sum().item() for (name, *_), (peaks, _) in drawn.items() if name == "plain"}) == 6
    script.seed_batch(args, s3n, images, 1, 0)
    for part in range(3):
        assert torch.equal(drawn["s3n", 1, part][0], torch.rand(2, 31, 31)), "as if the parts were one batch"
    assert len({drawn["s3n", 1, part][1] for part in range(3)}) == 3


def test_closing_weights_are_a_plain_model_too_and_a_picture_shows_what_is_seen(trained):
    output, text = trained
    plain = timm.create_model(f"local-dir:{output / 'backbone'}", pretrained=True).eval()
    best = timm.create_model(f"local-dir:{output / 'best'}", pretrained=True).eval()
    assert not isinstance(plain, s3n_timm.S3N)
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        best.set_branch_logits(True)
        torch.testing.assert_close(plain(image), best(image).original)
    assert plain.pretrained_cfg["input_size"] == (3, 64, 64)
    with Image.open(output / "picture.png") as picture:
        assert min(picture.size) > 200
    assert str(output / "picture.png") in text
    assert 0 <= json.loads((output / "results.json").read_text())["backbone_top1"] <= 100
    assert "backbone/" in text


def test_patience_counts_evaluated_epochs(tmp_path):
    args = ("--epochs", 9, "--patience", 1, "--val-interval", 2, "--lr", 1e-12, "--freeze-bn")  # no epoch is better
    text = train(*args, "--plain", "--output", tmp_path / "run")
    assert "stopped early after 4 epochs" in text
    assert (tmp_path / "run" / "results.json").exists()


# what is refused in one sentence


def test_one_image_of_one_place_cannot_be_normalized(tmp_path):
    data = write_folder(tmp_path / "data")
    args = ("--dataset", "folder", "--data-dir", data, "--recipe", "birds", "--val-fraction", 0.25, "--img-size", 32,
            "-b", 1, "--epochs", 1, "--plain", "--model-kwargs", "{}", "--output", tmp_path / "run")
    text = train(*args, ok=False)
    assert "raise --batch-size" in text
    assert "Traceback" not in text
    train(*args, "--freeze-bn", "--resume")


def test_one_class_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (70, 70), (i * 20, 9, len(split))).save(tmp_path / split / "only" / f"{i}.png")
    args = ("--dataset", "folder", "--data-dir", tmp_path, "--recipe", "birds", "--output", tmp_path / "out")
    text = train(*args, ok=False)
    assert "has one class, 'only'" in text


def test_accumulation_steps_of_the_environment_must_agree(tmp_path):
    steps = dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    text = train("--epochs", 1, "--output", tmp_path / "run", ok=False, **steps)
    assert "make them agree" in text
    train("--epochs", 1, "-b", 2, "--grad-accum-steps", 4, "--output", tmp_path / "run", **steps)


def test_help_and_errors_in_a_terminal_of_another_encoding():
    text = run(command("train.py", "--help"), PYTHONIOENCODING="cp1252")
    assert "learning rate of newly initialized layers" in text
    assert text.isascii()


@pytest.mark.parametrize(
    "name", ["benchmark", "check_gpu", "demo", "evaluate", "export", "predict", "push", "train", "visualize"])
def test_scripts_print_what_the_terminal_has_no_letter_for(name, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    print("≥", flush=True)


def test_output_that_cannot_be_written_is_found_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_splits", None)
    (tmp_path / "file").write_text("")
    assert "file/run cannot be written" in train("--output", tmp_path / "file" / "run", ok=False)
    assert "is a file" in train("--output", tmp_path / "file", ok=False)
    assert "cannot be written" in train("--output", "/proc/nowhere", ok=False)


def test_workers_share_the_cores_of_a_machine(monkeypatch):
    from support import launching

    monkeypatch.setattr(launching.os, "sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launching.count_default_workers() == 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launching.count_default_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert launching.count_default_workers() == 1
