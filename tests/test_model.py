"""S3N as a module: its outputs, branches, presets and schedule, and what it promises to training code."""

import copy
import math
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from s3n_timm import S3N, NoResponseMap, S3NLogits, S3NLoss, gate_response, selective_sample
from s3n_timm.config import ATTENTIONS, BRANCH_SETS, NECKS, PRESETS
from s3n_timm.response import resize_maps

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
CLASSES = 7
LETTERS = {"O": "original", "D": "discriminative", "C": "complementary"}
WARPED = ("discriminative", "complementary")


def build(backbone="test_resnet", num_classes=CLASSES, **kwargs):
    torch.manual_seed(0)
    return S3N(backbone, num_classes, **kwargs).eval()


def images(batch=2, size=(64, 64), chans=3):
    """Smooth random images: their warps differ visibly from them."""
    noise = torch.randn(batch, chans, 9, 9, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, size=size, mode="bicubic", align_corners=True)


def without_peaks(model):
    """Make every response constant: no class reads any feature."""
    nn.init.zeros_(model.backbone.get_submodule(model.head.classifier).weight)
    return model


# what a call gives


def test_eval_gives_joint_logits():
    model = build("resnet18")
    x = images(3)
    with torch.no_grad():
        first, second = model(x), model(x)
        alone = torch.cat([model(one[None]) for one in x])
    assert isinstance(first, torch.Tensor)
    assert first.shape == (3, CLASSES)
    assert torch.equal(first, second), "evaluation draws at random"
    torch.testing.assert_close(alone, first, msg="an image's logits depend on the batch")


def test_train_gives_every_branch():
    model = build().train()
    outputs = model(images())
    assert isinstance(outputs, S3NLogits)
    assert outputs._fields == ("joint", "original", "discriminative", "complementary")
    assert all(output.shape == (2, CLASSES) for output in outputs)
    assert len({output.sum().item() for output in outputs}) == 4, "two outputs are the same"


@pytest.mark.parametrize("training", [False, True])
def test_set_branch_logits(training):
    model = build().train(training)
    x = images()
    model.set_branch_logits()
    assert isinstance(model(x), S3NLogits)
    model.set_branch_logits(False)
    assert isinstance(model(x), torch.Tensor)
    model.set_branch_logits(None)
    assert isinstance(model(x), S3NLogits if training else torch.Tensor)


def test_branch_logits_do_not_change_the_joint_ones():
    model = build()
    x = images()
    with torch.no_grad():
        joint = model(x)
        model.set_branch_logits(True)
        assert torch.equal(model(x).joint, joint)


@pytest.mark.parametrize("mode", ["probability", "random"])
def test_random_partition_repeats_under_a_seed(mode):
    model = build(partition_eval=mode)
    x = images(4, (160, 160))
    with torch.no_grad():
        torch.manual_seed(5)
        first, other = model(x), model(x)
        torch.manual_seed(5)
        again = model(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# branches


@pytest.mark.parametrize("branches", BRANCH_SETS)
def test_absent_branches_are_none(branches):
    model = build(branches=branches)
    model.set_branch_logits(True)
    outputs = model(images())
    for letter, name in LETTERS.items():
        output = getattr(outputs, name)
        assert (output is not None) == (letter in branches), f"{name} is present though branches={branches!r}"
    assert model.head_hidden_size == model.fusion.in_features == model.head.hidden_width * len(branches.split("+"))
    assert model.num_features == model.backbone.num_features
    expected = {name for letter, name in LETTERS.items() if letter in branches and letter not in "OJ"}
    assert set(model.classifier) == (expected - {"discriminative"} if branches == "D+C" else expected)
    assert set(model.beta) == expected


def test_backbone_classifies_the_strong_branch_where_the_original_is_left_out():
    model = build(branches="D+C")
    model.set_branch_logits(True)
    x = images()
    with torch.no_grad():
        outputs = model(x)
        strong = model.explain(x).sample.discriminative.image
        torch.testing.assert_close(outputs.discriminative, model.backbone(strong))
    outputs = model.train()(x)
    outputs.discriminative.sum().backward()
    assert model.backbone.get_classifier().weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("neck", "preset"), list(zip(NECKS, PRESETS)))
@pytest.mark.parametrize(("branches", "attention"), list(product(BRANCH_SETS, ATTENTIONS)))
def test_every_parameter_learns(branches, attention, neck, preset):
    model = build(branches=branches, attention=attention, neck=neck, preset=preset).train()
    outputs = model(images())
    S3NLoss()(outputs, torch.tensor([1, 2])).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"parameters without a gradient: {without}"
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(output.isfinite().all() for output in outputs if output is not None)
    if attention == "saliency" and branches != "O":
        assert model.saliency.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("branches", BRANCH_SETS[1:])
def test_beta_learns_from_its_branch(branches):
    # every peak is in both sets: no draw can leave a branch without one
    model = build(branches=branches, partition_train="all").train()
    outputs = model(images())
    for name in model.warped:
        beta = model.beta[name]
        (gradient,) = torch.autograd.grad(getattr(outputs, name).square().sum(), beta, retain_graph=True)
        assert gradient.shape == (1,)
        assert gradient.abs() > 0


@pytest.mark.parametrize(("branches", "batches"), [("O", [3]), ("O+D", [3, 3]), ("O+D+C", [3, 6]), ("D+C", [3, 6])])
def test_warped_images_are_one_batch(branches, batches):
    model = build(branches=branches)
    seen = []
    # the stem runs once for each call of forward_features
    model.backbone.conv1.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    model(images(3))
    assert seen == batches


def test_backbone_is_registered_once():
    model = build(preset="original")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    assert len({id(parameter) for parameter in model.parameters()}) == len(names)
    own = {f"backbone.{name}" for name, _ in model.backbone.named_parameters()}
    added = ("fusion.", "classifier.", "neck.", "beta.")
    assert own == {name for name in names if not name.startswith(added)}


# presets


def test_configure_changes_how_a_model_computes():
    model = build(kernel="learned").eval()
    with torch.no_grad():
        logits = model.forward_branches(images())[0]
        model.configure(answer="original")
        assert model.config.answer == "original"
        torch.testing.assert_close(model(images()), logits.original)
    for option in (dict(branches="O"), dict(fwhm=9)):
        with pytest.raises(ValueError, match="cannot change on a model that exists"):
            model.configure(**option)
    with pytest.raises(TypeError):
        model.configure(nonsense=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_what_is_not_given(preset):
    model = build(preset=preset)
    for name, value in PRESETS[preset].items():
        assert model.config.to_dict()[name] == value
    assert ("discriminative" in model.neck) == (PRESETS[preset]["neck"] == "conv")


def test_presets_are_those_of_the_method():
    assert PRESETS["paper"] == dict(
        partition_train="probability",
        partition_eval="expected",
        partition_warmup_epochs=0,
        neck="none",
        gate_scores="logits",
    )
    assert PRESETS["original"] == dict(
        partition_train="probability",
        partition_eval="extreme",
        partition_warmup_epochs=21,
        neck="conv",
        gate_scores="maps",
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partition_train", "all"),
        ("partition_eval", "random"),
        ("partition_warmup_epochs", 0),
        ("partition_warmup_epochs", 3),
        ("neck", "none"),
        ("neck", "conv"),
        ("gate_scores", "logits"),
        ("gate_scores", "maps"),
    ],
)
def test_explicit_argument_wins(preset, name, value):
    model = build(preset=preset, **{name: value})
    assert model.config.to_dict()[name] == value
    others = {key: model.config.to_dict()[key] for key in PRESETS[preset] if key != name}
    assert others == {key: PRESETS[preset][key] for key in others}
    if name == "neck":
        assert ("complementary" in model.neck) == (value == "conv")


@pytest.mark.parametrize(("grid_size", "cells"), [(31, 31.0), ((15, 31), math.sqrt(15 * 31))])
def test_default_beta(grid_size, cells):
    model = build(grid_size=grid_size)
    assert model.beta["discriminative"].item() == pytest.approx(math.sqrt(2) * 0.09 * cells)
    assert model.beta["complementary"].item() == pytest.approx(math.sqrt(2) * 0.3 * cells)
    model = build(grid_size=grid_size, beta_discriminative=2.5, beta_complementary=7)
    assert (model.beta["discriminative"].item(), model.beta["complementary"].item()) == (2.5, 7.0)


def test_neck_is_the_originals():
    model = build(preset="original")
    conv, norm, act = model.neck["discriminative"]
    width = model.num_features
    assert (conv.weight.shape, conv.stride, conv.padding, conv.bias) == ((width, width, 3, 3), (2, 2), (1, 1), None)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(act, nn.ReLU)


# response and sampling


@pytest.mark.parametrize("gate_scores", ["logits", "maps"])
@pytest.mark.parametrize(
    "backbone", ["test_resnet", "test_convnext", "test_vit4", "test_mambaout", "mobilenetv3_small_050", "shvit_s1"]
)
@pytest.mark.parametrize("options", [{}, dict(threshold=0.9, topk=3, gate="renormalized")])
def test_merged_response_is_that_of_the_full_maps(backbone, gate_scores, options):
    model = build(backbone, num_classes=12, gate_scores=gate_scores, grid_size=(9, 12), **options)
    sharp = model.backbone.get_submodule(model.head.classifier)
    if hasattr(sharp, "weight"):
        with torch.no_grad():  # scores far enough apart for images to fall on both sides of the gate
            sharp.weight.copy_(torch.randn(sharp.weight.shape, generator=torch.Generator().manual_seed(4)))
    x = images(6, model.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        features = model.forward_features(x)
        logits = model.backbone(x)
        maps = model.head.response_maps(model.backbone, features)
        scores = resize_maps(maps, (9, 12)).mean((2, 3)) if gate_scores == "maps" else logits
        expected = gate_response(maps, scores, **options)
        response = model.merge_response(features, logits)
    # a bias adds the same to every position: the normalization that follows takes it away
    response, expected = (r - r.mean((1, 2), keepdim=True) for r in (response, expected))
    torch.testing.assert_close(response, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_no_gradient_flows_through_the_response():
    model = build()
    features = model.forward_features(images()).requires_grad_()
    response = model.merge_response(features, model.backbone.forward_head(features))
    assert not response.requires_grad


def test_saliency_learns_and_teaches_no_features():
    model, x = build(attention="saliency").train(), images()
    features = model.backbone.forward_features(x).detach().requires_grad_()
    sample = model.sample(x, features, model.backbone.forward_head(features))
    sample.discriminative.image.square().sum().backward()
    assert model.saliency.weight.grad.abs().sum() > 0
    assert features.grad is None


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("branches", BRANCH_SETS)
def test_image_without_peaks_is_not_warped(branches, preset):
    model = without_peaks(build(branches=branches, preset=preset))
    x = images()
    with torch.no_grad():
        explanation = model.explain(x)
        expected = model.forward_head(model.forward_features(x))
        assert explanation.sample is None or not explanation.sample.peaks.any()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_one_image_without_peaks_among_others():
    model = build()
    x = images(3)
    x[1] = 0
    with torch.no_grad():
        logits = model(x)
        rest = model(x[[0, 2]])
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[[0, 2]], rest)


def test_without_classes():
    model = build(num_classes=0)
    x = images()
    features = model.forward_features(x)
    assert model(x).shape == (2, model.head_hidden_size)
    assert torch.equal(model(x), model.forward_head(features, pre_logits=True))
    assert torch.equal(build(num_classes=0, global_pool="")(x), features)
    with pytest.raises(ValueError, match="num_classes=0"):
        model.explain(x)


def test_classes_come_back():
    model = build(num_classes=0, global_pool="")
    model.reset_classifier(5)
    model.train()
    assert [output.shape for output in model(images())] == [(2, 5)] * 4
    assert model.get_classifier() is model.fusion
    assert model.num_classes == model.backbone.num_classes == 5
    assert model.global_pool == "avg"


# explain


@pytest.mark.parametrize("gate_scores", ["logits", "maps"])
@pytest.mark.parametrize("branches", BRANCH_SETS)
def test_explain(branches, gate_scores):
    options = dict(grid_size=(10, 14), floor=0.2, fwhm=6, window=5, peak_floor="none")
    gate = dict(threshold=0.4, topk=3, gate="renormalized")
    model = build(branches=branches, gate_scores=gate_scores, **options, **gate)
    x = images(3, (64, 96))
    sample, logits, maps = model.explain(x)
    model.set_branch_logits(True)
    with torch.no_grad():
        for got, expected in zip(logits, model(x)):
            assert (got is None) == (expected is None)
            assert got is None or torch.equal(got, expected)
        cells = model.forward_features(x).shape[2:]
    assert list(maps) == ["original", *model.warped], "the original's maps, and those of each warped branch"
    assert all(value.shape == (3, CLASSES, *cells) for value in maps.values())
    for name, value in maps.items():
        score = model.backbone(x) if name == "original" else getattr(logits, name)
        torch.testing.assert_close(value.mean((2, 3)), score.detach(), rtol=1e-4, atol=1e-5)
    if branches == "O":
        assert sample is None
        return
    assert sample.response.shape == sample.peaks.shape == (3, 10, 14)
    assert sample.peaks.any()
    scores = None if gate_scores == "maps" else model.backbone(x).detach()
    betas = {f"beta_{name}": model.beta.get(name) for name in WARPED}
    expected = selective_sample(
        x, maps["original"], scores, mode="expected", branches=model.warped, **betas, **options, **gate
    )
    torch.testing.assert_close(sample.response, expected.response, rtol=1e-4, atol=1e-4)
    for name in WARPED:
        if name not in model.warped:
            assert getattr(sample, name) is None
            continue
        image, grid, sampling_map, weights = getattr(sample, name)
        assert (image.shape, grid.shape) == (x.shape, (3, 64, 96, 2))
        assert sampling_map.shape == weights.shape == (3, 10, 14)
        torch.testing.assert_close(grid, getattr(expected, name).grid.detach(), rtol=0, atol=1e-4)
        torch.testing.assert_close(image, getattr(expected, name).image.detach(), rtol=0, atol=1e-3)
        assert (image - x).abs().max() > 0.1, "nothing was warped"


def test_explain_of_necked_branches():
    model = build(preset="original")
    sample, logits, maps = model.explain(images(2, (128, 128)))
    assert maps["original"].shape[2:] == (4, 4)
    for name in WARPED:
        assert maps[name].shape == (2, CLASSES, 2, 2)
        torch.testing.assert_close(maps[name].mean((2, 3)), getattr(logits, name), rtol=1e-4, atol=1e-5)
    assert sample.discriminative.image.shape == (2, 3, 128, 128)


def test_explain_records_no_gradient_and_changes_no_mode():
    model = build().train()
    sample, logits, maps = model.explain(images())
    assert model.training
    tensors = [*sample[:2], *sample.discriminative, *sample.complementary, *logits, *maps.values()]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("attention", ["response", "saliency"])
def test_dense_attention_warps_both_alike(attention):
    sample = build(attention=attention).explain(images()).sample
    assert torch.equal(sample.discriminative.image, sample.complementary.image)
    assert not sample.peaks.any()
    assert sample.discriminative.weights is sample.complementary.weights is None


# what training code asks


def test_layer_decay():
    model = build("resnet18")
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.5)
    scales, decays = {}, {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scales[names[id(parameter)]] = group["lr_scale"]
            decays[names[id(parameter)]] = group["weight_decay"]
    assert scales.keys() == dict(model.named_parameters()).keys()
    stages = ("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1")
    depths = [scales[f"backbone.{stage}.weight"] for stage in stages]
    assert depths == sorted(depths), "deeper layers do not learn faster"
    assert len(set(depths)) == len(depths)
    added = [name for name in scales if not name.startswith("backbone.")]
    assert {scales[name] for name in (*added, "backbone.fc.weight", "backbone.fc.bias")} == {1.0}
    plain = create_optimizer_v2(model.backbone, opt="sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.5)
    expected = {name: group["lr_scale"] for group in plain.param_groups
                for name, parameter in model.backbone.named_parameters()
                if any(parameter is each for each in group["params"])}
    assert {name.removeprefix("backbone."): scale for name, scale in scales.items() if name not in added} == expected
    assert max(depths) < 1
    assert {decays[f"beta.{name}"] for name in WARPED} == {0.0}
    assert decays["fusion.weight"] == 1e-4


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_of_a_backbone_with_its_own_rules(coarse):
    model = build("test_vit4", preset="original")
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    last = max(groups.values())
    assert {name for name in groups if not name.startswith("backbone.")} <= {n for n, g in groups.items() if g == last}
    own = timm.models.group_parameters(model.backbone, model.backbone.group_matcher(coarse=coarse), reverse=True)
    order = sorted(own, key=own.get)
    assert [groups[f"backbone.{name}"] for name in order] == sorted(groups[f"backbone.{name}"] for name in order)


def test_no_weight_decay():
    model = build("test_vit4")
    names = model.no_weight_decay()
    own = model.backbone.no_weight_decay()
    assert own, "this backbone has some"
    assert names == {f"backbone.{name}" for name in own} | {"beta.discriminative", "beta.complementary"}
    assert build(attention="response").no_weight_decay() == set()


def test_partition_schedule():
    model = build(preset="original")

    def modes():
        return model.train().partition, model.eval().partition

    assert modes() == ("probability", "extreme"), "a fresh model is past its warm-up"
    for epoch, expected in ((0, ("all", "probability")), (20, ("all", "probability"))):
        model.set_epoch(epoch)
        assert modes() == expected
    model.set_epoch(21)
    assert modes() == ("probability", "extreme")
    model.set_epoch(5)
    assert modes() == ("all", "probability")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("epoch", "expected"), [(3, "all"), (30, "probability")])
def test_partition_phase_survives_a_checkpoint(epoch, expected, assign):
    model, other = build(preset="original"), build(preset="original")
    model.set_epoch(epoch)
    other.set_epoch(0 if epoch == 30 else 30)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert other.train().partition == expected


def test_paper_has_no_schedule():
    model = build()
    model.set_epoch(0)
    assert (model.train().partition, model.eval().partition) == ("probability", "expected")
    assert not [name for name, _ in model.named_buffers() if "partition" in name]


@pytest.mark.parametrize(
    ("backbone", "attention", "preset"),
    [
        *(("test_resnet", attention, "paper") for attention in ATTENTIONS),
        ("test_resnet", "sparse", "original"),
        ("test_convnext", "sparse", "paper"),  # a norm between pooling and classifier
        ("mobilenetv3_small_050", "sparse", "paper"),  # a head that is applied at every position
        ("shvit_s1", "sparse", "original"),  # a classifier that does not read the pre-logits
    ],
)
def test_autocast(backbone, attention, preset):
    model = build(backbone, attention=attention, preset=preset).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images(size=(128, 128)))
        loss = S3NLoss()(outputs, torch.tensor([0, 1]))
    loss.backward()
    assert outputs.joint.dtype == torch.bfloat16
    assert all(output.isfinite().all() for output in outputs)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast_keeps_sampling_in_float32():
    model = build("resnet18")
    with torch.autocast("cpu", torch.bfloat16):
        sample = model.explain(images()).sample
    dtypes = {sample.discriminative.grid.dtype, sample.response.dtype, sample.complementary.sampling_map.dtype}
    assert dtypes == {torch.float32}


def test_half_precision_weights():
    model = build("resnet18", attention="saliency").bfloat16()
    with torch.no_grad():
        logits = model(images().bfloat16())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.parametrize(("size", "grid_size"), [((64, 128), (15, 31)), ((96, 64), 31), ((64, 64), (9, 5))])
def test_inputs_that_are_not_square(size, grid_size):
    model = build(grid_size=grid_size).train()
    x = images(2, size)
    S3NLoss()(model(x), torch.tensor([0, 1])).backward()
    sample = model.eval().explain(x).sample
    assert sample.discriminative.image.shape == (2, 3, *size)
    assert sample.response.shape == (2, *((grid_size, grid_size) if isinstance(grid_size, int) else grid_size))


def test_drop_rates_reach_the_backbone():
    model = build("resnet18", drop_rate=0.3, drop_path_rate=0.2)
    assert model.backbone.drop_rate == 0.3
    assert any(getattr(m, "drop_prob", 0) == 0.2 for m in model.modules())


def test_backbone_args():
    model = build("test_vit", img_size=64, backbone_args=dict(global_pool="avg", class_token=False))
    assert model.head.prefix_tokens == 0
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    assert model(images()).shape == (2, CLASSES)


# errors


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("preset", "papers"),
        ("kernel", "dense"),
        ("branches", "C+D"),
        ("branches", "O+D+"),
        ("attention", "dense"),
        ("partition_train", "some"),
        ("partition_eval", "none"),
        ("neck", "linear"),
        ("gate", "original"),
        ("gate_scores", "mean"),
        ("peak_floor", "max"),
        ("beta_discriminative", 0),
        ("beta_complementary", -1.0),
        ("beta_complementary", math.inf),
        ("floor", 0),
        ("floor", math.nan),
        ("fwhm", "13"),
        ("topk", 0),
        ("in_chans", 0),
        ("window", 4),
        ("window", 0),
        ("num_classes", -1),
        ("num_classes", 65_537),
        ("topk", 1.5),
        ("threshold", math.nan),
        ("fwhm", 1e-7),
        ("grid_size", 1),
        ("grid_size", "31"),
        ("grid_size", 256),
        ("grid_size", (31, 31, 31)),
        ("global_pool", "max"),
        ("global_pool", ""),
    ],
)
def test_errors_name_the_argument(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} must"):
        build(**{argument: value})


def test_backbone_without_maps_is_an_error_with_its_reason():
    with pytest.raises(NoResponseMap, match=r"test_vit pools by 'token'.*global_pool='avg'"):
        build("test_vit")


def test_global_pool_can_be_switched_off_without_classes_alone():
    model = build()
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "")
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(0, "max")


# backbones of one's own, copies, compilation


class Plain(nn.Module):
    """The smallest module with the part of timm's interface that S3N asks for."""

    num_features = 12

    def __init__(self, num_classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, self.num_features, 3, stride=8, padding=1)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes, global_pool=None):
        self.num_classes = num_classes
        self.out = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self):
        return self.out

    def forward_features(self, x):
        return self.stem(x).relu()

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.out(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("num_classes", [3, CLASSES])
def test_backbone_of_ones_own(num_classes):
    backbone = Plain()
    model = build(backbone, num_classes=num_classes)
    assert model.backbone is backbone
    assert backbone.num_classes == num_classes
    assert model.config.backbone is None
    S3NLoss()(model.train()(images()), torch.tensor([0, 1])).backward()
    assert model.eval()(images()).shape == (2, num_classes)
    assert model.no_weight_decay() == {"beta.discriminative", "beta.complementary"}


def test_timm_model_given_as_a_module():
    torch.manual_seed(3)
    backbone = timm.create_model("resnet18", num_classes=CLASSES).eval()
    weight = backbone.fc.weight.clone()
    model = build(backbone)
    assert torch.equal(model.backbone.fc.weight, weight), "a fitting classifier was replaced"
    assert model.config.backbone == "resnet18"
    assert build(timm.create_model("test_resnet", num_classes=0), num_classes=0)(images()).shape == (2, 3 * 96)


@pytest.mark.parametrize("option", [
    dict(drop_rate=0.5), dict(drop_path_rate=0.1), dict(img_size=64), dict(backbone_args=dict(output_stride=16)),
    dict(in_chans=1),
])
def test_a_module_takes_no_arguments_of_a_backbone_that_is_built_here(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        build(timm.create_model("test_resnet"), **option)


def test_data_parallel_is_refused_in_a_sentence():
    with pytest.raises(RuntimeError, match="a process per GPU"):
        build("test_resnet")._replicate_for_data_parallel()  # which torch calls on every module, for each GPU


@pytest.mark.parametrize("preset", PRESETS)
def test_deepcopy(preset):
    model = build(preset=preset)
    model.set_epoch(2)
    other = copy.deepcopy(model)
    assert other.train().partition == model.train().partition
    x = images()
    model.set_epoch(30)
    other.set_epoch(30)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))
        before = model(x)
        other.beta["discriminative"].mul_(0.5)
        other.fusion.weight.zero_()
        assert torch.equal(model(x), before), "the copy shares parameters"


def test_ema():
    model = build()
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model)
    torch.testing.assert_close(ema.module.beta["discriminative"], model.beta["discriminative"] - 0.5)


@pytest.mark.parametrize(("backbone", "preset"), [("test_resnet", "paper"), ("test_vit4", "original")])
def test_compiles_to_one_graph(backbone, preset):
    model = build(backbone, preset=preset)
    x = images(2, model.pretrained_cfg["input_size"][1:])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backbone", ["test_resnet", "mobilenetv3_small_050"])
def test_traces_with_fx(backbone, preset):
    model = build(backbone, preset=preset)
    traced = timm.models.create_feature_extractor(model, {"fusion": "joint"})
    with torch.no_grad():
        torch.testing.assert_close(traced(images())["joint"], model(images()))
        torch.testing.assert_close(traced(images(1))["joint"], model(images(1)))


def test_size_of_the_cfg_follows_the_channels():
    model = build(in_chans=1)
    assert model.in_chans == 1
    assert model.pretrained_cfg["input_size"][0] == 1
    assert model(images(chans=1)).shape == (2, CLASSES)


def test_prune_intermediate_layers():
    model = build("resnet18")
    x = images()
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
        taken = model.prune_intermediate_layers([1, 2])
        levels = model.forward_intermediates(x, indices=taken, intermediates_only=True)
    for level, value in zip(levels, expected):
        assert torch.equal(level, value)
    assert all(name.startswith("backbone.") for name, _ in model.named_parameters())


def test_every_classifier_starts_alike():
    """A family's own start of the backbone's classifier may be wide, and peaks are those of its maps."""
    torch.manual_seed(0)
    model = S3N("mobilenetv2_035", 50)
    widest = [layer.weight.abs().max() * layer.in_features**0.5
              for layer in (model.backbone.get_classifier(), model.classifier["complementary"], model.fusion)]
    torch.testing.assert_close(torch.stack(widest), torch.ones(3), rtol=0.02, atol=0)
