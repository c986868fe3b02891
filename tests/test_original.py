"""Checkpoints of the original implementation: what they compute here, in every form in which they come."""

import json
import logging
import math
import re
import zipfile
import zlib

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_model import GOLDEN, build, images
from torch import nn

import s3n_timm
from s3n_timm import S3N, load_original_checkpoint, warp_grid
from s3n_timm.original import is_fixed_gaussian
from s3n_timm.sampling import gaussian_kernel

CLASSES = 7
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
GAUSSIAN = gaussian_kernel((31, 31), 13)


def original_shapes(depth=50, classes=CLASSES):
    """Names and shapes of an original checkpoint, written down apart from the code that reads it."""
    shapes = {"radius.scale": [1], "radius_inv.scale": [1], "filter.weight": [1, 1, 61, 61]}

    def norm(name, width):
        shapes.update({f"{name}.{part}": [width] for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = []

    def linear(name, width):
        shapes.update({f"{name}.weight": [classes, width], f"{name}.bias": [classes]})

    shapes["features.0.weight"] = [64, 3, 7, 7]
    norm("features.1", 64)
    width = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        inner = 64 * 2**stage
        for block in range(blocks):
            name = f"features.{stage + 4}.{block}"
            for n, (wide, narrow, side) in enumerate([(inner, width, 1), (inner, inner, 3), (4 * inner, inner, 1)], 1):
                shapes[f"{name}.conv{n}.weight"] = [wide, narrow, side, side]
                norm(f"{name}.bn{n}", wide)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = [4 * inner, width, 1, 1]
                norm(f"{name}.downsample.1", 4 * inner)
            width = 4 * inner
    linear("raw_classifier", width)
    for suffix in ("", "1"):
        shapes[f"sampler_buffer{suffix}.0.weight"] = [width, width, 3, 3]
        norm(f"sampler_buffer{suffix}.1", width)
        linear(f"sampler_classifier{suffix}", width)
    linear("con_classifier", 3 * width)
    shapes |= {"map_origin.weight": [classes, width, 1, 1], "map_origin.bias": [classes]}
    return shapes


def tensor_by_rule(key, shape):
    """A weight of the golden network, by the rule that its weights were made with."""
    if key in ("radius.scale", "radius_inv.scale"):
        return torch.tensor([0.09 if key == "radius.scale" else 0.3])
    if key == "filter.weight":
        return GAUSSIAN[None, None].clone()
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith(("running_mean", "bias")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.full(shape, 0.2 if key.endswith("bn3.weight") else 1.0)
    if key == "map_origin.weight":
        return tensor_by_rule("raw_classifier.weight", shape[:2])[..., None, None]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    return weight * math.sqrt(2 / weight[0].numel())


@pytest.fixture(scope="module")
def whole():
    """A checkpoint by the rule: 63 M parameters in the ResNet and heads, 75 M in the necks."""
    return {key: tensor_by_rule(key, shape) for key, shape in original_shapes().items()}


def hollow(depth=50, classes=CLASSES, **changed):
    """A checkpoint of full shapes whose tensors are one number each, so that its file is small."""
    state = {}
    for n, (key, shape) in enumerate(original_shapes(depth, classes).items()):
        exact = key in ("radius.scale", "radius_inv.scale", "filter.weight") or not shape
        state[key] = tensor_by_rule(key, shape) if exact else torch.tensor(1e-3 * (n + 1)).expand(shape)
    state["map_origin.weight"] = state["raw_classifier.weight"][..., None, None]
    state["map_origin.bias"] = state["raw_classifier.bias"]
    return state | changed


def write(path, state):
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def loaded(whole, tmp_path_factory):
    """The whole checkpoint as it was released: names with `module.`."""
    path = tmp_path_factory.mktemp("whole") / "original.pth"
    model = load_original_checkpoint(write(path, {f"module.{key}": value for key, value in whole.items()}))
    path.unlink()
    return model


def drop(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


# what it computes


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the original network's outputs are not here: {GOLDEN} is absent")
@pytest.mark.parametrize("kernel", ["gaussian", "learned"])
@pytest.mark.parametrize("mode", ["all", "extreme"])
def test_golden_logits(loaded, mode, kernel):
    golden = load_file(GOLDEN / "original_logits.safetensors")
    if kernel == "learned":  # the dense form of the same k
        loaded.register_buffer("kernel", GAUSSIAN.clone())
    loaded.eval().set_branch_logits(True)
    loaded.configure(partition_eval=mode)
    try:
        with torch.no_grad():
            outputs = loaded(golden["input"])
    finally:
        loaded.configure(partition_eval="extreme")
        loaded.train().set_branch_logits(None)
        if kernel == "learned":
            del loaded.kernel
    for name, output in outputs._asdict().items():
        expected = golden[f"{mode}.{name}"]
        error = (output - expected).abs().max() / expected.abs().max()
        assert error < 1e-3, f"{name} logits differ by {error:.1e}"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the original's names are not here: {GOLDEN} is absent")
def test_names_are_those_of_the_golden_checkpoint():
    shapes = json.loads((GOLDEN / "original_checkpoint_keys.json").read_text())
    assert {key.removeprefix("module."): shape for key, shape in shapes.items()} == original_shapes()


def test_every_tensor_is_where_it_belongs(whole, loaded):
    own = loaded.state_dict()
    pairs = {
        "backbone.conv1.weight": "features.0.weight",
        "backbone.bn1.running_var": "features.1.running_var",
        "backbone.layer1.0.downsample.0.weight": "features.4.0.downsample.0.weight",
        "backbone.layer2.3.conv2.weight": "features.5.3.conv2.weight",
        "backbone.layer3.5.conv3.weight": "features.6.5.conv3.weight",
        "backbone.layer4.2.bn3.weight": "features.7.2.bn3.weight",
        "backbone.fc.weight": "raw_classifier.weight",
        "neck.discriminative.0.weight": "sampler_buffer.0.weight",
        "neck.complementary.0.weight": "sampler_buffer1.0.weight",
        "classifier.discriminative.weight": "sampler_classifier.weight",
        "classifier.complementary.weight": "sampler_classifier1.weight",
        "fusion.weight": "con_classifier.weight",
    }
    for ours, original in pairs.items():
        assert torch.equal(own[ours], whole[original]), f"{original} is not in {ours}"
    # each once: three scalars and k became β and the schedule's flag, map_origin is a copy
    assert len(own) == len(whole) - 5 + 3
    assert loaded.beta["discriminative"].item() == pytest.approx(math.sqrt(2) * 0.09 * 31)
    assert loaded.beta["complementary"].item() == pytest.approx(math.sqrt(2) * 0.3 * 31)


def test_what_comes_is_the_original_preset(loaded):
    assert isinstance(loaded, S3N)
    assert loaded.config == timm.create_model("s3n_resnet50", preset="original", num_classes=CLASSES).config
    assert loaded.training, "as timm's models are"
    assert loaded.eval().partition == "extreme"
    assert loaded.num_classes == loaded.pretrained_cfg["num_classes"] == CLASSES
    assert not hasattr(loaded, "kernel")
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    config = timm.data.resolve_model_data_config(loaded)
    assert (config["input_size"], config["crop_mode"]) == ((3, 448, 448), "squash")
    assert int(448 / config["crop_pct"]) == 600


@pytest.mark.parametrize("depth", BLOCKS)
def test_depth_is_found(tmp_path, depth):
    model = load_original_checkpoint(write(tmp_path / "w.pth", hollow(depth, classes=3)))
    assert model.config.backbone.startswith(f"resnet{depth}.")
    assert tuple(len(getattr(model.backbone, f"layer{n}")) for n in (1, 2, 3, 4)) == BLOCKS[depth]
    assert model.num_classes == 3


def test_learned_scales(tmp_path):
    scales = {"radius.scale": torch.tensor([0.05]), "radius_inv.scale": torch.tensor([0.4])}
    model = load_original_checkpoint(write(tmp_path / "w.pth", hollow(**scales)))
    assert model.beta["discriminative"].item() == pytest.approx(math.sqrt(2) * 0.05 * 31)
    assert model.beta["complementary"].item() == pytest.approx(math.sqrt(2) * 0.4 * 31)


# forms of a file


@pytest.mark.parametrize(
    ("prefix", "wrapped", "zipped"), [("module.", True, True), ("", False, True), ("", True, False)])
def test_forms(tmp_path, prefix, wrapped, zipped):
    state = {f"{prefix}{key}": value for key, value in hollow().items()}
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9).state_dict()
    content = dict(model=state, optimizer=optimizer, epoch=3, best=0.8) if wrapped else state
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    model = load_original_checkpoint(str(tmp_path / "w.pth"))
    for ours, original in (("backbone.fc.weight", "raw_classifier.weight"), ("fusion.bias", "con_classifier.bias")):
        assert torch.equal(model.state_dict()[ours], hollow()[original])
    assert model.fusion.weight.is_contiguous(), "parameters share memory with one another"


def test_half_precision_becomes_float32(tmp_path):
    state = {key: x.half() if x.is_floating_point() else x for key, x in hollow().items()}
    model = load_original_checkpoint(write(tmp_path / "w.pth", state))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.kernel == "learned", "a rounded k is not the Gaussian any more"


@pytest.mark.parametrize("num_classes", [0, 4])
def test_other_classes(tmp_path, caplog, num_classes):
    path = write(tmp_path / "w.pth", hollow())
    with caplog.at_level(logging.INFO, logger="s3n_timm.original"):
        model = load_original_checkpoint(path, num_classes=num_classes)
    assert model.num_classes == num_classes
    (line,) = [record.getMessage() for record in caplog.records if record.name == "s3n_timm.original"]
    assert f"has {CLASSES} classes, not {num_classes}; newly initialized: backbone.fc, classifier.disc" in line
    assert model.pretrained_cfg["num_classes"] == CLASSES, "the cfg tells of the weights, as timm's do"
    if num_classes:
        heads = [model.backbone.fc, model.fusion, model.classifier["discriminative"], model.classifier["complementary"]]
        assert {head.out_features for head in heads} == {num_classes}
        assert all(len(head.weight.unique()) > 100 for head in heads), "an old value is left"


def test_the_same_classes_are_kept(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="s3n_timm.original"):
        model = load_original_checkpoint(write(tmp_path / "w.pth", hollow()), num_classes=CLASSES)
    assert torch.equal(model.fusion.weight, hollow()["con_classifier.weight"])
    assert not [record for record in caplog.records if record.name == "s3n_timm.original"]


@pytest.mark.parametrize("num_classes", [-1, 2.5, 10**9])
def test_impossible_classes(tmp_path, num_classes):
    with pytest.raises(ValueError, match="num_classes must be a whole number"):
        load_original_checkpoint(tmp_path / "absent.pth", num_classes=num_classes)


def test_second_copy_of_the_classifier(tmp_path, caplog):
    """The original writes raw_classifier over map_origin whenever it runs, so a stored one that differs is not read."""
    state = hollow(**{"map_origin.bias": torch.ones(CLASSES)})
    with caplog.at_level(logging.WARNING, logger="s3n_timm.original"):
        model = load_original_checkpoint(write(tmp_path / "w.pth", state))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "s3n_timm.original"]
    assert line.startswith("map_origin.bias differs from raw_classifier.bias")
    assert torch.equal(model.backbone.fc.bias, state["raw_classifier.bias"])


# the kernel


def rotated():
    """A Gaussian along a diagonal: not separable."""
    y, x = torch.meshgrid(torch.arange(-30.0, 31), torch.arange(-30.0, 31), indexing="ij")
    return torch.exp(-((x + y).square() / 200 + (x - y).square() / 50))


def noisy(strength):
    return GAUSSIAN + strength * torch.randn(61, 61, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kernel", "same"),
    [
        (GAUSSIAN, True),
        (5 * GAUSSIAN, True),  # the warp is a quotient
        (GAUSSIAN.double().float() * (1 + 1e-7), True),
        (gaussian_kernel((31, 31), 12.9), False),  # separable, but of another width
        (gaussian_kernel((31, 31), 13) + 1e-4, False),
        (rotated(), False),
        (noisy(1e-3), False),
        (noisy(1e-9), True),
    ],
)
def test_which_kernels_are_the_gaussian(kernel, same):
    assert is_fixed_gaussian(kernel) is same


def test_a_kernel_just_beyond_the_separable():
    """Two entries far out, one up and one down, are almost nothing in sum, but no longer separable."""
    kernel = GAUSSIAN.clone()
    kernel[0, 0] += 0.94e-3
    kernel[0, 60] -= 0.94e-3
    first, second = torch.linalg.svdvals(kernel.double())[:2]
    assert 1e-4 < second / first < 2e-4
    assert (kernel - GAUSSIAN).abs().sum() < 1e-5 * GAUSSIAN.sum()
    assert not is_fixed_gaussian(kernel)


@pytest.mark.parametrize("kernel", [gaussian_kernel((31, 31), 9), rotated()], ids=["narrow", "rotated"])
def test_learned_kernel(tmp_path, caplog, kernel):
    """The model computes with the checkpoint's k, and still does when it was saved and loaded as timm does."""
    with caplog.at_level(logging.INFO, logger="s3n_timm.original"):
        path = write(tmp_path / "w.pth", hollow(**{"filter.weight": kernel[None, None]}))
        model = load_original_checkpoint(path).eval()
    assert "kept in its dense form" in caplog.text
    assert model.config.kernel == "learned"
    assert torch.equal(model.kernel, kernel)
    assert "kernel" in dict(model.named_buffers())
    assert "kernel" not in dict(model.named_parameters())
    s3n_timm.save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.config == model.config
    assert torch.equal(again.kernel, kernel)


@pytest.mark.parametrize("compiled", [False, True])
def test_kernel_of_a_model_is_what_warps(compiled):
    model = build(grid_size=31, kernel="learned")
    plain = build(grid_size=31)
    plain.load_state_dict(drop(model.state_dict(), "kernel"))
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)  # k starts as the Gaussian
        model.load_state_dict(model.state_dict() | {"kernel": rotated()})
        if compiled:
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x), model(x))
            return
        sample = model.explain(x).sample
        expected = warp_by_hand(sample.discriminative.sampling_map, rotated())
        torch.testing.assert_close(sample.discriminative.grid, expected, rtol=0, atol=1e-4)
        fixed = warp_grid(sample.discriminative.sampling_map, x.shape[2:])
        assert (sample.discriminative.grid - fixed).abs().max() > 0.01


def warp_by_hand(q, kernel, size=(64, 64)):
    """Section 6 as it is written, by plain convolution of the padded map and of the padded map times u and v."""
    cells = q.shape[1]
    padded = nn.functional.pad(q.double()[:, None], (cells - 1,) * 4, mode="replicate")
    u = torch.linspace(-1, 2, 3 * cells - 2, dtype=torch.float64)
    kernel = kernel.double()[None, None]
    mass, f, g = (nn.functional.conv2d(padded * factor, kernel) for factor in (1, u, u[:, None]))
    grid = torch.cat([2 * f / mass - 1, 2 * g / mass - 1], dim=1).clamp(-1, 1)
    return nn.functional.interpolate(grid, size=size, mode="bilinear", align_corners=True).permute(0, 2, 3, 1).float()


def test_a_model_without_warps_has_no_kernel():
    assert not hasattr(build(branches="O", kernel="learned"), "kernel")


# what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"left.over": torch.ones(1)}, r"keys left over: left\.over\."),
        (lambda s: drop(s, "features.6.5.bn1.bias"), r"keys missing: features\.6\.5\.bn1\.bias\."),
        (lambda s: drop(s, "radius.scale", "filter.weight"), r"keys missing: radius\.scale, filter\.weight\."),
        (lambda s: drop(s, "map_origin.weight"), r"keys missing: map_origin\.weight\."),
        (lambda s: drop(s, "raw_classifier.weight"), r"keys missing: raw_classifier\.weight\."),
        (lambda s: drop(s, "radius.scale") | {"x": torch.ones(1)}, r"left over: x; keys missing: radius\.scale\."),
        (lambda s: s | {f"x.{n:02d}": torch.ones(1) for n in range(20)}, r"x\.00, .*x\.07 and 12 more\."),
        (lambda s: drop(s, *(key for key in s if key.startswith("features.6.5."))), "has 5 blocks in layer3"),
        (lambda s: s | {"features.6.6.bn1.bias": torch.ones(1)}, "has 7 blocks in layer3"),
        (lambda s: {key: x for key, x in s.items() if "features" not in key}, "has 0 blocks in layer3"),
        (lambda s: s | {"filter.weight": torch.ones(1, 1, 59, 59)}, r"filter\.weight \(1×1×59×59, not 1×1×61×61\)"),
        (lambda s: s | {"radius.scale": torch.tensor(0.1)}, r"radius\.scale \(a single number, not 1\)"),
        (lambda s: s | {"con_classifier.bias": torch.ones(8)}, r"wrong shape: con_classifier\.bias \(8, not 7\)"),
        (lambda s: s | {"raw_classifier.weight": torch.ones(8, 2048)}, r"raw_classifier\.bias \(7, not 8\)"),
        (lambda s: s | {"raw_classifier.weight": torch.tensor(1.0)}, "wrong shape: raw_classifier"),
        (lambda s: s | {"raw_classifier.weight": torch.ones(0, 2048)}, "wrong shape: raw_classifier"),
        (lambda s: s | {"map_origin.weight": torch.ones(7, 2048)}, r"map_origin\.weight \(7×2048, not 7×2048×1×1\)"),
        (lambda s: s | {"features.1.bias": torch.full((64,), math.nan)}, r"infinite values in features\.1\.bias"),
        (lambda s: s | {"filter.weight": GAUSSIAN[None, None] * math.inf}, r"infinite values in filter\.weight"),
        (lambda s: s | {"filter.weight": torch.zeros(1, 1, 61, 61)}, r"filter\.weight sums to 0"),
        (lambda s: s | {"radius.scale": torch.zeros(1)}, r"radius\.scale sums to 0"),
        (lambda s: s | {"features.1.bias": torch.ones(64).int()}, r"cannot hold: features\.1\.bias \(int32\)"),
        (lambda s: s | {"features.1.bias": torch.ones(64).to_sparse()}, r"cannot hold: features\.1\.bias"),
        (lambda s: s | {"features.1.bias": torch.ones(64, device="meta")}, r"cannot hold: features\.1\.bias"),
        (lambda s: s | {"module.features.1.bias": torch.ones(64)}, r"with and without 'module\.': module\.features\.1"),
        (lambda s: s | {"features.1.bias": 3}, r"not named tensors: features\.1\.bias\."),
        (lambda s: s | {3: torch.ones(1)}, r"not named tensors: 3\."),
        (lambda s: {"model": {}}, "holds no state dict"),
        (lambda s: [s], "holds no state dict"),
        (lambda s: {"model": 3, "state": s}, "not named tensors: model, state"),
        (lambda s: s | {"raw_classifier.weight": torch.ones(1).expand(10**9, 2048)}, "num_classes must be a whole"),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, change, message):
    path = write(tmp_path / "w.pth", change(hollow()))
    with pytest.raises((RuntimeError, ValueError), match=message) as error:
        load_original_checkpoint(path)
    assert len(str(error.value)) < 1000


def test_damaged_file(tmp_path):
    path = write(tmp_path / "w.pth", hollow())
    data = path.read_bytes()
    for spoilt in (b"", data[:10], data[: len(data) // 2], data[:-1], b"\0" * 100, b"PK\x03\x04" + data[4:50]):
        path.write_bytes(spoilt)
        with pytest.raises(RuntimeError, match=f"^{re.escape(str(path))} cannot be read as tensors .*it is damaged"):
            load_original_checkpoint(path)


def test_absent_file(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(OSError, match=re.escape(str(path))):
            load_original_checkpoint(path)


def test_compressed_file(tmp_path):
    """What unpacks to more than it is could fill the memory; torch.save does not compress."""
    write(tmp_path / "w.pth", {"x": torch.zeros(10**6)})
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as plain,
        zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(RuntimeError, match=r"cannot be read as tensors"):
        load_original_checkpoint(tmp_path / "z.pth")
