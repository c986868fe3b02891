"""S3N's names in timm: what they load, from where, and what they refuse."""

import json
import logging

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_model import GOLDEN, Plain, build, images
from torch import nn

import s3n_timm
from s3n_timm import S3N, VARIANTS

WEIGHTS = GOLDEN.parent / "weights" / "tf_efficientnet_lite0.safetensors"
ADDED = ("beta.discriminative", "beta.complementary", "classifier.discriminative", "classifier.complementary", "fusion")

# for every argument of the architecture a value that the preset and the defaults don't have
ARGUMENTS = dict(
    preset="original",
    branches="O+C",
    attention="sparse",
    partition_train="random",
    partition_eval="all",
    partition_warmup_epochs=3,
    neck="none",
    beta_discriminative=2.5,
    beta_complementary=8.5,
    grid_size=[9, 13],
    window=5,
    peak_floor="none",
    floor=0.2,
    fwhm=7.5,
    kernel="learned",
    threshold=0.4,
    topk=3,
    gate="renormalized",
    gate_scores="logits",
    backbone_args=dict(output_stride=16),
    scan_size=[64, 96],
    zoom_size=[96, 64],
    border="reflect",
    exit_entropy=0.0,  # the one value that goes with several labels
    multi_label=True,
    answer="mean",
)


def logits(model, x=None):
    with torch.no_grad():
        return model.eval()(images() if x is None else x)


def plain(name="resnet18", **kwargs):
    """A backbone whose weights differ from those of a fresh one under the seed that models are built with."""
    torch.manual_seed(7)
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    model = plain()
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def load(name, file, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs).eval()


def assert_same(state, expected, prefix="backbone.", skip=()):
    for key, value in expected.items():
        if not key.startswith(skip):
            assert torch.equal(state[f"{prefix}{key}"], value), f"{key} was not loaded"


# plain weights of a backbone


def test_backbone_weights(resnet):
    backbone, path = resnet
    model = load("s3n_resnet18", path)
    assert_same(model.state_dict(), backbone.state_dict())
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(x), backbone(x))


def test_backbone_weights_with_other_classes(resnet):
    backbone, path = resnet
    model = load("s3n_resnet18", path, num_classes=7)
    assert_same(model.state_dict(), backbone.state_dict(), skip=("fc.",))
    assert model.backbone.fc.weight.shape[0] == model.fusion.out_features == 7
    assert logits(model).shape == (2, 7)
    assert model.pretrained_cfg["num_classes"] == 1000, "the cfg tells of the weights, as timm's do"


def test_backbone_weights_without_classes(resnet):
    backbone, path = resnet
    model = load("s3n_resnet18", path, num_classes=0)
    assert_same(model.state_dict(), backbone.state_dict(), skip=("fc.",))
    assert logits(model).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("num_classes", [1000, 7])
def test_backbone_weights_with_one_channel(resnet, num_classes):
    backbone, path = resnet
    model = load("s3n_resnet18", path, num_classes=num_classes, in_chans=1)
    torch.testing.assert_close(model.backbone.conv1.weight, backbone.conv1.weight.sum(1, keepdim=True))
    assert_same(model.state_dict(), backbone.state_dict(), skip=("fc.", "conv1."))
    assert logits(model, images(chans=1)).shape == (2, num_classes)


@pytest.mark.parametrize("kwargs", [dict(preset="original"), dict(branches="D+C"), dict(attention="saliency")])
def test_backbone_weights_into_any_architecture(resnet, kwargs):
    backbone, path = resnet
    model = load("s3n_resnet18", path, **kwargs)
    assert_same(model.state_dict(), backbone.state_dict())
    fresh = build("resnet18", num_classes=1000, **kwargs)
    # β starts as it does without weights
    for name, parameter in fresh.named_parameters():
        if name.startswith("beta."):
            assert torch.equal(parameter, model.get_parameter(name))


def test_backbone_weights_give_features(resnet):
    backbone, path = resnet
    model = load("s3n_resnet18", path, features_only=True)
    x = images()
    with torch.no_grad():
        expected = backbone.forward_intermediates(x, intermediates_only=True)
        for level, value in zip(model(x), expected):
            torch.testing.assert_close(level, value)


def test_log_names_what_stays_initialized(resnet, caplog):
    with caplog.at_level(logging.INFO, logger="s3n_timm.checkpoints"):
        load("s3n_resnet18", resnet[1], num_classes=7)
    lines = [record.getMessage() for record in caplog.records if record.name == "s3n_timm.checkpoints"]
    assert len(lines) == 1
    model = timm.create_model("s3n_resnet18", num_classes=7)
    for name in model.state_dict():
        assert (name in lines[0]) is not name.startswith("backbone.")


def test_weights_as_a_state_dict(resnet):
    backbone, _ = resnet
    overlay = dict(state_dict=backbone.state_dict())
    model = timm.create_model("s3n_resnet18", pretrained=True, pretrained_cfg_overlay=overlay)
    assert_same(model.state_dict(), backbone.state_dict())


def test_hooks_see_the_backbone_read_the_image():
    x = images()
    with torch.no_grad():
        levels, hooked = (
            timm.create_model("s3n_test_resnet", pretrained=True, features_only=True, feature_cls=kind).eval()(x)
            for kind in ("getter", "hook")
        )
    torch.testing.assert_close(hooked, levels)


@pytest.mark.parametrize("feature_cls", ["fx", "dict", "list", timm.models.FeatureListNet])
def test_feature_classes_that_do_not_see_the_backbone_are_refused(feature_cls):
    with pytest.raises(ValueError, match="feature_cls must be one of 'getter', 'hook', got"):
        timm.create_model("s3n_test_resnet", features_only=True, feature_cls=feature_cls)


@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"there are no real weights here: {WEIGHTS} is absent")
@pytest.mark.parametrize("num_classes", [1000, 5])
def test_real_weights(num_classes):
    expected = load_file(WEIGHTS)
    model = load("s3n_tf_efficientnet_lite0", WEIGHTS, num_classes=num_classes)
    assert_same(model.state_dict(), expected, skip=("classifier.",) if num_classes == 5 else ())
    backbone = load("tf_efficientnet_lite0", WEIGHTS, num_classes=num_classes)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.forward_features(x), backbone.forward_features(x))


def test_original_names_of_swin(tmp_path):
    """timm's own filter knows how the authors of a backbone called its layers."""
    small = dict(depths=(1, 1, 1, 1), embed_dim=24)
    backbone = plain("swin_tiny_patch4_window7_224", **small)
    state = {
        key.replace("head.fc.", "head."): value.contiguous()
        for key, value in backbone.state_dict().items()
        if not key.endswith(("relative_position_index", "attn_mask"))
    }
    # timm moved the downsampling to the start of the stage that follows
    for stage in (1, 2, 3):
        for key in [key for key in state if key.startswith(f"layers.{stage}.downsample.")]:
            state[key.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)] = state.pop(key)
    assert "head.weight" in state
    assert "layers.0.downsample.reduction.weight" in state
    save_file(state, tmp_path / "swin.safetensors")
    model = load("s3n_swin_tiny_patch4_window7_224", tmp_path / "swin.safetensors", backbone_args=small)
    assert_same(model.state_dict(), backbone.state_dict())


# weights that don't fit


def save_changed(path, state, drop=(), **extra):
    save_file({key: value for key, value in state.items() if key not in drop} | extra, path)
    return path


@pytest.mark.parametrize("num_classes", [1000, 7])
@pytest.mark.parametrize("whole", [False, True], ids=["backbone", "s3n"])
def test_unexpected_key_is_an_error(tmp_path, resnet, whole, num_classes):
    state = timm.create_model("s3n_resnet18").state_dict() if whole else resnet[0].state_dict()
    path = save_changed(tmp_path / "w.safetensors", state, **{"left.over": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"left\.over"):
        load("s3n_resnet18", path, num_classes=num_classes)


@pytest.mark.parametrize("num_classes", [1000, 7])
@pytest.mark.parametrize(
    ("whole", "key"),
    [(False, "layer2.0.conv1.weight"), (True, "backbone.layer2.0.conv1.weight"), (True, "beta.complementary")],
)
def test_missing_key_is_an_error(tmp_path, resnet, whole, key, num_classes):
    state = timm.create_model("s3n_resnet18").state_dict() if whole else resnet[0].state_dict()
    path = save_changed(tmp_path / "w.safetensors", state, drop=(key,))
    with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
        load("s3n_resnet18", path, num_classes=num_classes)


@pytest.mark.parametrize("num_classes", [1000, 7])
def test_weights_of_another_backbone_are_an_error(resnet, num_classes):
    with pytest.raises(RuntimeError, match=r"neither one of this S3N nor of its backbone resnet34[\s\S]*layer1\.2\."):
        load("s3n_resnet34", resnet[1], num_classes=num_classes)


@pytest.mark.parametrize(("saved", "loaded"), [("conv", "none"), ("none", "conv")])
def test_weights_of_another_architecture_are_an_error(tmp_path, saved, loaded):
    state = timm.create_model("s3n_resnet18", neck=saved, branches="O+D").state_dict()
    path = save_changed(tmp_path / "w.safetensors", state)
    with pytest.raises(RuntimeError, match=r"neck\.discriminative\.0\.weight.*create the variant"):
        load("s3n_resnet18", path, neck=loaded, branches="O+D")


def test_long_lists_of_keys_are_cut(tmp_path):
    state = timm.create_model("s3n_resnet18").state_dict()
    path = save_changed(tmp_path / "w.safetensors", state, **{f"over.{n:02d}": torch.ones(1) for n in range(20)})
    with pytest.raises(RuntimeError, match=r"over\.07 and 12 more;") as error:
        load("s3n_resnet18", path)
    assert "over.08" not in str(error.value)


# whole models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = build("resnet18", num_classes=5, preset="original")
    with torch.no_grad():
        model.beta["discriminative"].fill_(5.0)
    folder = tmp_path_factory.mktemp("models") / "s3n"
    assert s3n_timm.save(model, folder, label_names=list("abcde")) == folder
    return model, folder


def reload(folder, **kwargs):
    torch.manual_seed(9)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def test_whole_model(saved):
    model, folder = saved
    again = reload(folder)
    assert isinstance(again, S3N)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert_same(again.state_dict(), model.state_dict(), prefix="")
    assert torch.equal(logits(again), logits(model))
    assert again.pretrained_cfg["label_names"] == list("abcde")


def test_whole_model_with_other_classes(saved):
    model, folder = saved
    again = reload(folder, num_classes=9)
    classifiers = ("backbone.fc.", "fusion.", "classifier.")
    assert_same(again.state_dict(), model.state_dict(), prefix="", skip=classifiers)
    assert again.beta["discriminative"].item() == 5
    assert logits(again).shape == (2, 9)


def test_whole_model_without_classes(saved):
    model, folder = saved
    again = reload(folder, num_classes=0)
    with torch.no_grad():
        joined = model.forward_head(model.forward_features(images()), pre_logits=True)
    assert torch.equal(logits(again), joined)
    unpooled = reload(folder, num_classes=0, global_pool="")
    with torch.no_grad():
        assert torch.equal(logits(unpooled), model.forward_features(images()))


def test_whole_model_with_one_channel(saved):
    model, folder = saved
    again = reload(folder, in_chans=1)
    torch.testing.assert_close(again.backbone.conv1.weight, model.backbone.conv1.weight.sum(1, keepdim=True))
    assert_same(again.state_dict(), model.state_dict(), prefix="", skip=("backbone.conv1.",))
    x = images(chans=1)
    torch.testing.assert_close(logits(again, x), logits(model, x.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_whole_model_from_a_file(saved):
    model, folder = saved
    again = load("s3n_resnet18", folder / "model.safetensors", preset="original", num_classes=5)
    # timm compares with the cfg's 1000 classes and leaves the classifiers of other numbers out
    assert_same(again.state_dict(), model.state_dict(), prefix="", skip=("backbone.fc.", "fusion.", "classifier."))


def test_saved_model_of_one_channel(tmp_path):
    model = build("resnet18", num_classes=3, in_chans=1)
    s3n_timm.save(model, tmp_path)
    assert torch.equal(logits(reload(tmp_path), images(chans=1)), logits(model, images(chans=1)))
    assert reload(tmp_path, in_chans=3).in_chans == 3


@pytest.mark.parametrize("name", ["s3n", "s3n_resnet18"])
def test_saved_registered_name(tmp_path, name):
    torch.manual_seed(0)
    backbone = dict(backbone="test_convnext") if name == "s3n" else {}
    model = timm.create_model(name, num_classes=3, **backbone)
    s3n_timm.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_every_argument_comes_back(tmp_path):
    preset = build("resnet18", preset=ARGUMENTS["preset"]).config.to_dict()
    assert ARGUMENTS.keys() == preset.keys() - {"backbone"}, "give the new argument a value in ARGUMENTS"
    model = build("resnet18", **ARGUMENTS)
    for key, value in ARGUMENTS.items():
        assert model.config.to_dict()[key] == value
        # with another attention there would be no β to compare: test_other_architectures_come_back has that
        seen = key in ("preset", "attention") or preset[key] != value
        assert seen, f"{key} is what the preset makes it: this test would not see it lost"
    s3n_timm.save(model, tmp_path)
    again = reload(tmp_path)
    assert again.config == model.config
    torch.testing.assert_close(logits(again), logits(model))
    assert again.backbone.layer4[0].conv1.stride == (1, 1), "backbone_args did not reach the backbone"


@pytest.mark.parametrize("attention", ["response", "saliency"])
@pytest.mark.parametrize("branches", ["O", "D+C", "O+D+C"])
def test_other_architectures_come_back(tmp_path, attention, branches):
    model = build(attention=attention, branches=branches)
    s3n_timm.save(model, tmp_path)
    again = reload(tmp_path)
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))


def test_partition_phase_comes_back(tmp_path):
    model = build(preset="original")
    model.set_epoch(4)
    s3n_timm.save(model, tmp_path)
    assert reload(tmp_path).train().partition == "all"


@pytest.mark.parametrize("img_size", [96, (64, 96)])
def test_input_size_comes_back(tmp_path, img_size):
    model = build("test_vit4", img_size=img_size)
    size = (96, 96) if img_size == 96 else img_size
    s3n_timm.save(model, tmp_path)
    again = reload(tmp_path)
    assert again.pretrained_cfg["input_size"] == (3, *size)
    x = images(size=size)
    assert torch.equal(logits(again, x), logits(model, x))


def test_arguments_can_be_changed_on_loading(saved):
    model, folder = saved
    again = reload(folder, partition_eval="all", fwhm=9, drop_rate=0.5)
    assert again.config.partition_eval == "all"
    assert again.config.fwhm == 9
    assert_same(again.state_dict(), model.state_dict(), prefix="")


def test_data_config(tmp_path):
    model = build()
    data = dict(timm.data.resolve_data_config({}, model=model), crop_pct=0.5, input_size=(3, 96, 96))
    s3n_timm.save(model, tmp_path, data_config=data)
    cfg = reload(tmp_path).pretrained_cfg
    assert cfg["crop_pct"] == 0.5
    assert tuple(cfg["input_size"]) == (3, 96, 96)


def test_save_refuses_what_it_could_not_load(tmp_path):
    with pytest.raises(ValueError, match="backbone is not one of timm's"):
        s3n_timm.save(build(Plain()), tmp_path / "a")
    with pytest.raises(ValueError, match="label_names has 2 names for 7 classes"):
        s3n_timm.save(build(), tmp_path / "b", label_names=["a", "b"])
    assert not any(tmp_path.iterdir())


# names


def test_generic_name():
    model = timm.create_model("s3n", backbone="test_convnext", num_classes=3)
    assert type(model.backbone).__name__ == "ConvNeXt"
    assert model.config.backbone == "test_convnext"
    assert timm.create_model("s3n", num_classes=3).config.backbone == "resnet50"
    backbone = timm.create_model("test_resnet", num_classes=3)
    assert timm.create_model("s3n", backbone=backbone, num_classes=3).backbone is backbone


def test_generic_name_loads_weights_of_its_backbone(tmp_path):
    backbone = plain("test_resnet")
    save_file(backbone.state_dict(), tmp_path / "w.safetensors")
    model = load("s3n", tmp_path / "w.safetensors", backbone="test_resnet")
    assert_same(model.state_dict(), backbone.state_dict())


def test_unknown_backbone():
    with pytest.raises(ValueError, match="'resnet19' is not a timm model"):
        timm.create_model("s3n", backbone="resnet19")


@pytest.mark.parametrize("backbone", ["resnet34", "resnet34.tv_in1k", nn.Identity()])
def test_conflicting_backbone(backbone):
    with pytest.raises(ValueError, match=r"s3n_resnet18 is built on resnet18\.tv_in1k; create 's3n'"):
        timm.create_model("s3n_resnet18", backbone=backbone)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet18.a1_in1k"])
def test_agreeing_backbone(backbone):
    assert timm.create_model("s3n_resnet18", backbone=backbone, num_classes=2).num_classes == 2


def test_a_variant_of_other_weights_loads_those():
    model = timm.create_model("s3n_resnet18", backbone="resnet18.a1_in1k", num_classes=2)
    own = timm.models.get_pretrained_cfg("resnet18.a1_in1k")
    for field in ("hf_hub_id", "mean", "crop_pct", "interpolation"):
        assert model.pretrained_cfg[field] == getattr(own, field), field
    bare = timm.create_model("s3n_resnet18", backbone="resnet18", num_classes=2)
    assert bare.pretrained_cfg["hf_hub_id"] == "timm/resnet18.tv_in1k"


@pytest.mark.parametrize("name", VARIANTS)
def test_cfg_follows_the_backbone(name):
    own = timm.models.get_pretrained_cfg(VARIANTS[name])
    cfg = timm.models.get_pretrained_cfg(f"{name}.{own.tag}")
    for field in ("mean", "std", "input_size", "crop_pct", "interpolation", "pool_size", "hf_hub_id", "num_classes"):
        assert getattr(cfg, field) == getattr(own, field), field
    assert cfg.architecture == name
    assert cfg.tag == own.tag
    assert cfg.first_conv == (f"backbone.{own.first_conv}",)
    assert cfg.classifier == (f"backbone.{own.classifier}", *ADDED[2:])


@pytest.mark.parametrize(
    ("kwargs", "mean", "side"),
    [
        (dict(model_name="s3n_tf_efficientnet_lite0"), 0.5, 224),
        (dict(model_name="s3n", backbone="tf_efficientnet_lite0"), 0.5, 224),
        (dict(model_name="s3n", backbone="test_resnet"), 0.5, 160),
        (dict(model_name="s3n_resnet18"), 0.485, 224),
    ],
)
def test_preprocessing_follows_the_backbone(kwargs, mean, side):
    config = timm.data.resolve_model_data_config(timm.create_model(num_classes=2, **kwargs))
    assert config["mean"][0] == mean
    assert config["input_size"] == (3, side, side)


def test_preprocessing_without_the_registry():
    config = timm.data.resolve_model_data_config(build("tf_efficientnet_lite0"))
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)


def test_names_with_weights():
    names = timm.list_pretrained("s3n*")
    assert set(names) == {f"{name}.{weights.split('.')[1]}" for name, weights in VARIANTS.items()} | {
        "s3n", "s3n_test_resnet.birds"}


def test_a_module_as_backbone_states_its_own_preprocessing(tmp_path):
    backbone = timm.create_model("test_efficientnet", num_classes=5)
    model = timm.create_model("s3n", backbone=backbone, num_classes=5)
    direct = S3N(timm.create_model("test_efficientnet", num_classes=5), num_classes=5)
    for name in ("mean", "std", "input_size", "interpolation", "classifier"):
        assert model.pretrained_cfg[name] == direct.pretrained_cfg[name], name
    with torch.no_grad():
        expected = model.eval()(images())
        torch.testing.assert_close(s3n_timm.load_model(s3n_timm.save(model, tmp_path / "m")).eval()(images()), expected)
