"""What timm asks of every model in its registry, asked of every S3N in it."""

import copy
import fnmatch

import pytest
import timm
import torch

import s3n_timm

NAMES = timm.list_models("s3n*")
# more of the blocks of other ResNets: whether they are built is asked, and no more
DEEPER = ("s3n", "s3n_resnet34", "s3n_resnet101", "s3n_resnet152", "s3n_resnext50_32x4d")
BATCH = 2
# pool_size is stated for the cfg's input_size: these are cheap enough to see it there, the others are scaled down
FULL_SIZE = ("s3n_resnet18", "s3n_regnety_008", "s3n_tf_efficientnet_lite0", "s3n_swin_*")


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def image(name, chans=3, side=64):
    cfg = timm.models.get_pretrained_cfg(name)
    size = cfg.input_size[1:] if cfg.fixed_input_size else (side, side)
    return torch.randn(BATCH, chans, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[name for name in NAMES if name not in DEEPER])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """In eval mode; tests that change more of it than they put back take a copy, which costs less than another one."""
    return build(name).eval()


def test_names():
    assert set(NAMES) == {"s3n", *s3n_timm.VARIANTS}, "every row of VARIANTS, and the generic s3n, is registered"


def test_forward(name, model):
    x = image(name)
    with torch.no_grad():
        logits = model(x)
    assert logits.shape == (BATCH, model.num_classes)
    assert not logits.isnan().any(), "NaN among the logits"
    model.set_grad_checkpointing()
    # with gradients, as timm's blocks only checkpoint where they are recorded
    torch.testing.assert_close(model(x).detach(), logits, msg="checkpointing changes the logits")
    model.set_grad_checkpointing(False)


def test_backward(name):
    """Of grey images and of four channels by turns; traced models, below, learn from three."""
    chans = (1, 4)[NAMES.index(name) % 2]
    model = build(name, num_classes=42, in_chans=chans).train()
    assert model.in_chans == chans
    outputs = model(image(name, chans))
    assert isinstance(outputs, s3n_timm.S3NLogits)
    joined = torch.cat(outputs)
    joined.mean().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"parameters without a gradient: {without}"
    assert all(output.shape == (BATCH, 42) for output in outputs)
    assert not joined.isnan().any(), "NaN among the logits"
    broken = [key for key, parameter in model.named_parameters() if not parameter.grad.isfinite().all()]
    assert not broken, f"gradients that are not finite: {broken}"


def test_config_and_classifier_removal(name, model):
    model = copy.deepcopy(model)
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg
    assert min(model.num_classes, model.num_features, model.head_hidden_size) > 0
    assert cfg["num_classes"] == model.num_classes

    state = model.state_dict()
    for field in ("classifier", "first_conv"):
        modules = (cfg[field],) if isinstance(cfg[field], str) else cfg[field]
        assert modules, f"the cfg has no {field}"
        absent = [module for module in modules if f"{module}.weight" not in state]
        assert not absent, f"{field} names what is no module with a weight: {absent}"
    linear = {k.removesuffix(".weight") for k, v in state.items()
              if k.endswith(".weight") and v.shape[0] == model.num_classes}
    assert set(cfg["classifier"]) == linear, "classifier does not list every layer that depends on num_classes"

    whole = cfg["fixed_input_size"] or any(fnmatch.fnmatch(name, pattern) for pattern in FULL_SIZE)
    x = image(name, side=cfg["input_size"][1] if whole else 64)
    pool_size = tuple(
        cells * pixels // full for cells, pixels, full in zip(cfg["pool_size"], x.shape[2:], cfg["input_size"][1:])
    )
    unpooled = (BATCH, model.num_features, *pool_size)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == unpooled, "forward_features() is not what num_features and pool_size say"
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (BATCH, model.head_hidden_size), "pre_logits are not head_hidden_size wide"
        assert model.forward_head(features).shape == (BATCH, model.num_classes)

        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled, msg="reset_classifier(0) does not leave the pre_logits")
        model.reset_classifier(0, "")
        assert model(x).shape == unpooled, "reset_classifier(0, '') does not leave the features"
        del model
        model = build(name, num_classes=0, global_pool="").eval()
        assert model(x).shape == unpooled, "num_classes=0, global_pool='' does not give the features"


@pytest.mark.parametrize("feature_cls", [None, "getter"])
def test_features_only(name, feature_cls):
    model = build(name, features_only=True, **({"feature_cls": feature_cls} if feature_cls else {})).eval()
    info = model.feature_info
    x = image(name)
    with torch.no_grad():
        levels = model(x)
    assert len(levels) == len(info.channels()) >= 3, "fewer than three feature levels"
    for number, (level, width, reduction) in enumerate(zip(levels, info.channels(), info.reduction())):
        level = level.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else level
        expected = (BATCH, width, x.shape[2] // reduction, x.shape[3] // reduction)
        assert level.shape == expected, f"level {number} does not have the shape of feature_info"
        assert not level.isnan().any(), f"NaN in level {number}"


def test_features_only_of_chosen_levels(name):
    # to find the levels of a backbone costs no weights: only the chosen ones are computed
    model = build(name, features_only=True, out_indices=(1, 2)).eval()
    assert len(model.feature_info.channels()) == 2
    with torch.no_grad():
        assert [level.ndim for level in model(image(name))] == [4, 4]


def test_forward_intermediates(name, model):
    x = image(name)
    with torch.no_grad():
        final, levels = model.forward_intermediates(x)
        features = model.forward_features(x)
        alone = model.forward_intermediates(x, intermediates_only=True)
    assert len(levels) == len(model.feature_info) >= 3
    for number, (level, info) in enumerate(zip(levels, model.feature_info)):
        expected = (BATCH, info["num_chs"], x.shape[2] // info["reduction"], x.shape[3] // info["reduction"])
        assert level.shape == expected, f"level {number} is not NCHW of feature_info"
        assert not level.isnan().any(), f"NaN in level {number}"
    torch.testing.assert_close(final, features, msg="final features are not those of forward_features()")
    torch.testing.assert_close(alone, levels, msg="intermediates_only changes the intermediates")
    model.set_grad_checkpointing()
    final_again, levels_again = model.forward_intermediates(x)
    torch.testing.assert_close(
        [final_again.detach(), *(level.detach() for level in levels_again)],
        [final, *levels],
        msg="checkpointing changes the intermediates",
    )
    model.set_grad_checkpointing(False)


@pytest.mark.parametrize("each", NAMES)
def test_feature_modules_exist(each):
    with torch.device("meta"):
        model = build(each)
    modules = dict(model.named_modules())
    # a level may be called after a part of a module's name, as timm's hooks resolve it
    absent = [info["module"] for info in model.feature_info if info["module"] not in modules]
    assert not absent, f"feature_info names modules that are not there: {absent}"


def trace(model):
    """What timm's FX route makes of a model, asked for the joint logits alone."""
    return timm.models.create_feature_extractor(model, {"fusion": "joint"})


def test_traced_forward(name, model):
    x = image(name)
    with torch.no_grad():
        logits = trace(copy.deepcopy(model)).eval()(x)["joint"]
        torch.testing.assert_close(logits, model(x))
    assert logits.shape == (BATCH, model.num_classes)


def test_traced_backward(name):
    """A traced model trains: what the joint logits depend on has a gradient, also through the warps."""
    model = build(name, num_classes=42)
    traced = trace(model)
    traced.train()(image(name))["joint"].mean().backward()
    branch_head = f"backbone.{model.head.classifier}."  # the maps that it gives have no gradient
    without = [key for key, parameter in traced.named_parameters() if parameter.grad is None]
    assert without == [f"{branch_head}weight", f"{branch_head}bias"]
    assert all(p.grad.isfinite().all() for p in traced.parameters() if p.grad is not None)
