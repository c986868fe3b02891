"""One way to load a model and to name its classes, and folders that are never there in part."""

import json
import os
import threading

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_model import build, images

import s3n_timm
from s3n_timm import Classifier, load_model
from s3n_timm.checkpoints import label_names

NAMES = list("abcde")


def logits(model):
    with torch.no_grad():
        return model.eval()(images())


def create(plain=False):
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=5) if plain else build(num_classes=5)


@pytest.fixture(params=[False, True], ids=["s3n", "plain"])
def folder(request, tmp_path):
    return s3n_timm.save(create(request.param), tmp_path / "m", label_names=NAMES)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for place, value in changes.items():
        parent = config
        *parents, last = place.split("__")
        for key in parents:
            parent = parent.setdefault(key, {})
        parent[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_what_json_cannot_hold_is_refused_before_a_file_is_touched(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="cannot hold"):
        s3n_timm.save(timm.create_model("test_resnet", num_classes=5, act_layer=torch.nn.SiLU), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_numbers_of_numpy_are_options(tmp_path):
    model = build(window=np.int64(5), floor=np.float32(0.125), grid_size=np.int64(9))
    config = load_model(s3n_timm.save(model, tmp_path / "m")).config
    assert (config.window, config.floor, tuple(config.grid_size)) == (5, 0.125, (9, 9))


# ways to say which model


def test_a_folder(folder, monkeypatch):
    model = create(plain="backbone" not in (folder / "config.json").read_text())
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    s3n_timm.save(model, "~/again", label_names=NAMES)
    for name in (folder, str(folder), f"local-dir:{folder}", "m", "./m", "~/m", folder.parent / "again"):
        torch.testing.assert_close(logits(load_model(name)), logits(model), rtol=0, atol=0)


def test_a_name_of_timm():
    assert isinstance(load_model("s3n_resnet18", pretrained=False, num_classes=3), s3n_timm.S3N)
    model = load_model("test_resnet", pretrained=False, num_classes=3)
    assert (type(model).__name__, model.num_classes) == ("ResNet", 3)


def test_new_classifiers_for_another_number_of_classes(folder):
    state = load_file(folder / "model.safetensors")
    for classes in (3, 0, 5):
        model = load_model(folder, num_classes=classes)
        assert model.num_classes == classes
        own = model.state_dict()
        assert all(torch.equal(own[name], value) for name, value in state.items()
                   if name in own and own[name].shape == value.shape and (classes == 5 or "bn" in name))
    assert load_model(folder, in_chans=1).in_chans == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "no such folder"),
        ("./no/where", "no such folder"),
        ("local-dir:test_resnet", "no such folder"),
        ("local-dir:", "no config"),
        ("", "no config"),
        ("a/b/c", "no such folder"),
        ("hf-hub:a/b@c@d", "USER/NAME"),
        ("here/misspelled", "no such folder"),
        ("here", "no config"),
        ("s3n_resnet19", "no such folder"),
    ],
)
def test_wrong_names(tmp_path, monkeypatch, name, said):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        load_model(name)
    assert "\n" not in str(error.value)


# weights that are not those of this model: before, each gave a random model without an error


def wrong_weights(kind, state):
    return {
        "a stranger": {"x": torch.zeros(1)},
        "prefixed": {f"model.{name}": value for name, value in state.items()},
        "another network": timm.create_model("test_convnext", num_classes=5).state_dict(),
        "without a stage": {name: value for name, value in state.items() if "layer4" not in name},
        "without a classifier": {name: value for name, value in state.items() if "fc." not in name},
        "empty": {},
        "the plain backbone's": timm.create_model("test_resnet", num_classes=5).state_dict() | {"y": torch.ones(1)},
        "NaN": {name: value * torch.nan if name.endswith("fc.bias") else value for name, value in state.items()},
    }[kind]


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize(
    "kind",
    ["a stranger", "prefixed", "another network", "without a stage", "without a classifier", "empty",
     "the plain backbone's", "NaN"],
)
def test_wrong_weights_are_no_model(folder, kind, num_classes):
    file = folder / "model.safetensors"
    save_file(wrong_weights(kind, load_file(file)), file)
    options = {} if num_classes is None else dict(num_classes=num_classes)
    with pytest.raises(ValueError, match=r"fit nowhere|lacks keys|NaN or infinite|too few|(Missing|Unexpected) key"):
        load_model(folder, **options)
    if "s3n" in (folder / "config.json").read_text():
        with pytest.raises((RuntimeError, ValueError)):
            timm.create_model(f"local-dir:{folder}", pretrained=True, **options)


def test_plain_weights_in_a_folder_of_s3n_are_no_model(tmp_path):
    folder = s3n_timm.save(build("resnet18", num_classes=5), tmp_path)
    save_file(timm.create_model("resnet18", num_classes=5).state_dict(), folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="keys that fit nowhere"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("classes", [1000, 5])
def test_plain_weights_may_lack_their_classifier_alone(classes):
    state = timm.create_model("test_resnet", num_classes=classes).state_dict()
    bare = {name: value for name, value in state.items() if not name.startswith("fc.")}

    def load(state_dict, num_classes):
        overlay = dict(state_dict=state_dict, num_classes=classes)
        return timm.create_model("s3n", backbone="test_resnet", pretrained=True, pretrained_cfg_overlay=overlay,
                                 num_classes=num_classes)

    for num_classes in (classes, 7, 0):
        own = load(bare, num_classes).backbone.state_dict()
        assert all(torch.equal(own[name], value) for name, value in bare.items())
        for fault in ({name: value for name, value in bare.items() if "layer3" not in name}, {"x": torch.ones(1)},
                      {}, {f"model.{name}": value for name, value in bare.items()}):
            with pytest.raises(RuntimeError):
                load(fault, num_classes)


# another image size than the one that was saved

SWIN = dict(backbone="swin_tiny_patch4_window7_224", backbone_args=dict(depths=(1, 1, 1, 1), embed_dim=24))
VIT = dict(backbone="test_vit2")
RESAMPLED = [
    (VIT, 160, 224),
    (VIT, (64, 128), (128, 64)),  # as many tokens
    (SWIN, 224, 96),
    (dict(backbone="test_coatnet"), 64, (64, 96)),
]


def create_sized(path, options, img_size):
    torch.manual_seed(3)
    model = timm.create_model("s3n", num_classes=5, img_size=img_size, **options)
    return model, s3n_timm.save(model, path)


@pytest.mark.parametrize(("options", "saved", "wanted"), RESAMPLED)
def test_another_image_size_is_timms_resampling(tmp_path, options, saved, wanted):
    model, folder = create_sized(tmp_path / "m", options, saved)
    plain = load_model(s3n_timm.save(s3n_timm.extract_backbone(model), tmp_path / "plain"), img_size=wanted)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=wanted)
    own, before = again.state_dict(), model.state_dict()
    expected = {f"backbone.{name}": value for name, value in plain.state_dict().items()}
    expected |= {name: value for name, value in before.items() if not name.startswith("backbone.")}
    assert own.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(own[name], value)]
    assert not different, f"not as timm loads the backbone alone: {different}"
    changed = [name for name, value in before.items() if value.shape != own[name].shape or (value != own[name]).any()]
    assert changed, "nothing depends on the size: choose another model"
    size = (wanted, wanted) if isinstance(wanted, int) else wanted
    with torch.no_grad():
        assert again.eval()(images(size=size)).isfinite().all()
    # what is saved again is of the new size
    twice = load_model(s3n_timm.save(again, tmp_path / "again"))
    assert all(torch.equal(value, own[name]) for name, value in twice.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_image_size_changes_no_bit(tmp_path, dtype):
    model, _ = create_sized(tmp_path / "m", SWIN, 96)
    folder = s3n_timm.save(model.to(dtype), tmp_path / "m")
    for options in ({}, dict(img_size=96), dict(img_size=(96, 96))):
        own = load_model(folder, **options).state_dict()
        assert all(torch.equal(own[name], value.to(own[name].dtype)) for name, value in model.state_dict().items())
        assert own["backbone.head.fc.weight"].dtype == torch.float32


def test_another_image_size_with_other_classes_and_channels(tmp_path):
    _, folder = create_sized(tmp_path / "m", VIT, 64)
    expected = load_model(folder, img_size=96).state_dict()
    for options in (dict(num_classes=3), dict(num_classes=0), dict(in_chans=1), dict(num_classes=7, in_chans=4)):
        model = load_model(folder, img_size=96, **options)
        own = model.state_dict()
        new = {name for name in own if own[name].shape != expected[name].shape}
        adapted = {"backbone.patch_embed.proj", *model.pretrained_cfg["classifier"]}
        assert {name.rpartition(".")[0] for name in new} <= adapted
        assert all(torch.equal(value, expected[name]) for name, value in own.items() if name not in new)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s | {"backbone.fc_norm.bias": torch.ones(3)}, r"wrong shape: backbone\.fc_norm\.bias \(3, not 64\)"),
        (lambda s: s | {"backbone.pos_embed": torch.ones(1, 26, 64)}, r"wrong shape: backbone\.pos_embed \(1×26×64"),
        (lambda s: s | {"beta.complementary": torch.ones(2)}, r"wrong shape: beta\.complementary \(2, not 1\)"),
        (lambda s: s | {"backbone.pos_embed": s["backbone.pos_embed"] * torch.nan}, "NaN or infinite"),
        (lambda s: s | {"backbone.pos_embed": s["backbone.pos_embed"].long()}, r"cannot hold: backbone\.pos_embed"),
        (lambda s: {name: value for name, value in s.items() if "head." not in name}, "lacks keys.*head"),
        (lambda s: s | {"backbone.x": torch.ones(1)}, "fit nowhere"),
    ],
)
def test_another_image_size_excuses_no_other_fault(tmp_path, change, said):
    _, folder = create_sized(tmp_path / "m", VIT, 64)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)
    for options in ({}, dict(img_size=96)):
        with pytest.raises(ValueError, match=said):
            load_model(folder, **options)


def test_a_family_that_timm_does_not_resample_is_refused(tmp_path):
    options = dict(backbone="hiera_tiny_224", backbone_args=dict(stages=(1, 1, 1, 1), embed_dim=32))
    _, folder = create_sized(tmp_path / "m", options, 128)
    with pytest.raises(ValueError, match=r"wrong shape: backbone\.pos_embed \(1×1024×32, not 1×4096×32\)\.$"):
        load_model(folder, img_size=256)


def test_a_module_of_one_image_size_comes_back(tmp_path):
    backbone = timm.create_model("test_vit2", num_classes=5, img_size=96)
    model = s3n_timm.S3N(backbone, num_classes=5)
    folder = s3n_timm.save(model, tmp_path)
    assert torch.equal(load_model(folder).backbone.pos_embed, backbone.pos_embed)
    assert load_model(folder, img_size=64).backbone.pos_embed.shape[1] == 4 * 4 + 1


# files that hang, and configs that fill the memory


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pipes_and_devices_are_not_read(folder, name):
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(ValueError, match="not a regular file"):
            Classifier.from_pretrained(folder)
        if name == "model.safetensors" and "s3n" in (folder / "config.json").read_text():
            with pytest.raises(OSError, match="not a regular file"):
                timm.create_model(f"local-dir:{folder}", pretrained=True)
        (folder / name).unlink()
        (folder / name).write_bytes(content)


def test_pipes_are_no_weight_files_elsewhere(tmp_path):
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(OSError, match="not a regular file"):
        timm.create_model("s3n", backbone="test_resnet", pretrained=True,
                          pretrained_cfg_overlay=dict(file=str(tmp_path / "w.safetensors")))
    with pytest.raises(OSError, match="not a regular file"):
        s3n_timm.load_original_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("architecture", [None, 5, "", "resnet19", ["s3n"]])
def test_architecture_of_no_model(folder, architecture):
    change_config(folder, architecture=architecture)
    with pytest.raises(ValueError, match="architecture"):
        load_model(folder)


@pytest.mark.parametrize(
    ("plain", "changes", "said"),
    [
        (False, dict(model_args__backbone_args=dict(layers=[1, 1, 1, 100_000])), "layers must be at most"),
        (False, dict(model_args__backbone_args=dict(layers=[1, 1, 1, 60_000])), "parameters|tensors"),
        (False, dict(model_args__backbone_args=dict(layers=[1, 1, 1, 9])), "lacks keys"),
        (False, dict(model_args__backbone_args=dict(channels=[60_000, 60_000, 60_000, 60_000])), "parameters|tensors"),
        (False, dict(pretrained_cfg__input_size=[3, 8192, 8192]), "input_size has more than"),
        (False, dict(pretrained_cfg__crop_pct=0.003), "crop_pct"),
        (True, dict(model_args__layers=[1, 1, 1, 100_000]), "layers must be at most"),
        (True, dict(model_args__layers=[1, 1, 1, 60_000]), "parameters|tensors"),
        (True, dict(model_args__layers=[1, 1, 1, 300]), "too few"),
        (True, dict(pretrained_cfg__input_size=[3, 8192, 8192]), "input_size has more than"),
        (True, dict(pretrained_cfg__crop_pct=0.003), "crop_pct"),
        (True, dict(model_args__pretrained_strict=False), "must not have pretrained_strict"),
        (True, dict(model_args__num_classes=7), "states 5 classes"),
        (True, dict(pretrained_cfg__custom_load=True), "custom_load"),
    ],
)
def test_configs_that_fill_the_memory(tmp_path, plain, changes, said):
    folder = s3n_timm.save(create(plain), tmp_path)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=said):
        load_model(folder)


# names of classes


@pytest.mark.parametrize(
    ("names", "stated", "classes", "wanted"),
    [
        (None, 3, 3, ["0", "1", "2"]),
        (["a", "b", "c"], 3, 3, ["a", "b", "c"]),
        (["a", "a", "c"], 3, 3, ["a", "a", "c"]),
        ({"0": "a", "2": "c"}, 3, 3, ["a", "1", "c"]),
        ({2: "c", 0: "a", 7: "h"}, 3, 3, ["a", "1", "c"]),
        (["a", "b", "c"], 1000, 3, ["a", "b", "c"]),  # named by its training, the config that of its first weights
        (["a", "b", "c", "d", "e"], 5, 3, ["0", "1", "2"]),
        ({"0": "a", "2": "c"}, 5, 3, ["0", "1", "2"]),
        (["a", "b"], 2, 3, ["0", "1", "2"]),
        (["a", "b", "c"], 3, 0, []),
    ],
)
def test_label_names(names, stated, classes, wanted):
    model = timm.create_model("test_resnet", num_classes=classes)
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names=names, num_classes=stated)
    assert label_names(model) == wanted
    if classes:
        assert Classifier(model).label_names == wanted


def test_label_names_of_other_classifiers(folder):
    assert label_names(load_model(folder)) == NAMES
    assert label_names(load_model(folder, num_classes=5)) == NAMES
    assert label_names(load_model(folder, num_classes=3)) == ["0", "1", "2"]
    model = load_model(folder)
    model.reset_classifier(7)
    assert label_names(model) == list("0123456")
    change_config(folder, label_names={"1": "b", "4": "e"})
    model = load_model(folder)
    assert label_names(model) == ["0", "b", "2", "3", "e"]
    # a folder of it lists all, as transformers wants it
    again = s3n_timm.save(model, folder.parent / "again")
    assert json.loads((again / "config.json").read_text())["label_names"] == ["0", "b", "2", "3", "e"]


def test_names_of_save_are_a_list(tmp_path):
    with pytest.raises(ValueError, match="list of 5 names"):
        s3n_timm.save(create(), tmp_path / "m", label_names=dict(enumerate(NAMES)))
    assert not (tmp_path / "m").exists()


# files that are there whole or not at all


def test_a_reader_never_meets_a_torn_file(tmp_path):
    models = [create(), create()]
    with torch.no_grad():
        models[1].fusion.weight.zero_()
    s3n_timm.save(models[0], tmp_path, label_names=NAMES)
    writers = [threading.Thread(target=lambda m=m: [s3n_timm.save(m, tmp_path, label_names=NAMES) for _ in range(15)])
               for m in models]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert len(load_file(tmp_path / "model.safetensors")) == len(models[0].state_dict())
        assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 5
        reads += 1
    assert reads
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    s3n_timm.save(create(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s3n_timm.hub.saving.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        s3n_timm.save(create(), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_mode_of_files_is_the_users(tmp_path):
    umask = os.umask(0o022)
    try:
        folder = s3n_timm.save(create(), tmp_path)
    finally:
        os.umask(umask)
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
