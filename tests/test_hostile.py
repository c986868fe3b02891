"""Files made to do harm, or damaged: one clear error each, and nothing run, hung or filled.

A flipped byte in the body of a weight file that gives another finite number cannot be noticed by any loader: there is
no checksum in a safetensors file. Such a file loads, and the model then holds exactly what it says.
"""

import json
import math
import os
import random
import re
import resource
import struct

import pytest
import timm
import torch
from safetensors.torch import load as read
from safetensors.torch import load_file, save_file
from safetensors.torch import save as write
from test_model import build

import s3n_timm

CLEAR = (ValueError, RuntimeError, OSError, TypeError)
CLASSES = 5
WEIGHTS_FILES = 10  # of each kind of mutation
CONFIG_FILES = 200


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small model with every kind of tensor: floats, counters, a flag and a kernel."""
    folder = tmp_path_factory.mktemp("source")
    model = build(num_classes=CLASSES, preset="original", grid_size=9, kernel="learned")
    s3n_timm.save(model, folder, label_names=list("abcde"))
    return folder


@pytest.fixture
def folder(source, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    return tmp_path


def from_folder(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


def from_file(file):
    overlay = dict(file=str(file), num_classes=CLASSES)
    options = dict(backbone="test_resnet", num_classes=CLASSES, preset="original", grid_size=9, kernel="learned")
    return timm.create_model("s3n", pretrained=True, pretrained_cfg_overlay=overlay, **options)


def refusal(load, *args):
    """The sentence by which a file is refused; None where it loads, as a model that holds what the file says."""
    message = None
    try:
        model = load(*args)
    except CLEAR as error:
        message = str(error)
    if message is not None:
        assert 10 < len(message) < 20_000, f"no sentence: {message!r:.200}"
        return message
    path = args[0] / "model.safetensors" if args[0].is_dir() else args[0]
    stored, own = load_file(path), model.state_dict()
    for name, value in own.items():
        assert value.isfinite().all(), f"{name} is not finite"
        if name in stored and stored[name].shape == value.shape:
            assert torch.equal(value, stored[name].to(value.dtype)), f"{name} is not what the file says"
        else:  # classifiers of another number of classes
            assert name.startswith(("backbone.fc.", "fusion.", "classifier.")), f"{name} was made up"
    return None


# weights, mutated


def split(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def pick(rng, header):
    return rng.choice([name for name in header if name != "__metadata__"])


def flip(rng, data, start, stop):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(data)


def flip_header(rng, data):
    return flip(rng, data, 0, 8 + struct.unpack("<Q", data[:8])[0])


def flip_body(rng, data):
    return flip(rng, data, 8 + struct.unpack("<Q", data[:8])[0], len(data))


def truncate(rng, data):
    return data[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1])]


def extend(rng, data):
    return data + rng.randbytes(rng.randint(1, 999))


def lie_about_length(rng, data):
    return struct.pack("<Q", rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(len(data))])) + data[8:]


def spoil_json(rng, data):
    _, body = split(data)
    texts = [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 5000, b'{"a": 1}', b'{"__metadata__": 3}', b"{}", b'"x"']
    return join(rng.choice(texts), body)


def rename(rng, data):
    header, body = split(data)
    name = pick(rng, header)
    new = rng.choice([name + "x", "backbone." + name, "prefix." + name, "", "x" * 5000, "é.ü"])
    return join({new if key == name else key: value for key, value in header.items()}, body)


def drop(rng, data):
    tensors = read(data)
    name = rng.choice(sorted(tensors))
    return write({key: value for key, value in tensors.items() if key != name})


def add(rng, data):
    tensors = read(data)
    return write(tensors | {rng.choice(["left.over", "backbone.extra", "kernel2"]): torch.ones(2)})


def change_dtype(rng, data):
    header, body = split(data)
    header[pick(rng, header)]["dtype"] = rng.choice(
        ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X", 3, None, ""]
    )
    return join(header, body)


def cast(rng, data):
    """Another dtype with a body that fits it."""
    tensors = read(data)
    name = rng.choice(sorted(tensors))
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn]
    return write(tensors | {name: tensors[name].to(rng.choice(kinds))})


def change_shape(rng, data):
    header, body = split(data)
    entry = header[pick(rng, header)]
    shape = entry["shape"]
    others = [[], [0], [-1], shape[::-1], [*shape, 1], [math.prod(shape)], [2**40, 2**40], "x", None, [1.5], shape[:1]]
    entry["shape"] = rng.choice(others)
    return join(header, body)


def reshape(rng, data):
    """Another shape with a body that fits it."""
    tensors = read(data)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    others = [value.flatten()[:-1], value.flatten().repeat(2), value[None], value.flatten()[:0], value.flatten()[:1]]
    return write(tensors | {name: rng.choice(others).contiguous()})


def change_offsets(rng, data):
    header, body = split(data)
    entry, other = header[pick(rng, header)], header[pick(rng, header)]
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        [other["data_offsets"], [stop, start], [start, stop + 4], [-4, stop], [start, 2**63], [start], "x", None]
    )
    return join(header, body)


def drop_field(rng, data):
    header, body = split(data)
    entry = header[pick(rng, header)]
    del entry[rng.choice(sorted(entry))]
    return join(header, body)


def poison(rng, data):
    """NaN or infinity in one tensor."""
    tensors = read(data)
    name = rng.choice([name for name, value in tensors.items() if value.is_floating_point() and value.numel()])
    value = tensors[name].clone()
    value.view(-1)[rng.randrange(value.numel())] = rng.choice([math.nan, math.inf, -math.inf])
    return write(tensors | {name: value})


MUTATIONS = (
    flip_header, flip_body, truncate, extend, lie_about_length, spoil_json, rename, drop, add, change_dtype, cast,
    change_shape, reshape, change_offsets, drop_field, poison,
)
# what must be refused, whatever the seed
FATAL = (truncate, extend, lie_about_length, spoil_json, rename, drop, add, reshape, drop_field, poison)


def memory():
    """The most that this process has ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_mutated_weights(source, folder, mutate):
    data = (source / "model.safetensors").read_bytes()
    rng = random.Random(mutate.__name__)
    file = folder / "model.safetensors"
    before = memory()
    outcomes = []
    for n in range(WEIGHTS_FILES):
        file.write_bytes(mutate(rng, data))
        outcomes.append(refusal(from_folder, folder) if n % 2 else refusal(from_file, file))
    assert memory() - before < 300, "a file fills the memory"
    if mutate in FATAL:
        assert None not in outcomes, f"{outcomes.count(None)} files were taken as if nothing was wrong"


def test_poison_is_named(source, folder):
    tensors = load_file(source / "model.safetensors")
    for name in ("backbone.conv1.0.weight", "beta.complementary", "fusion.bias", "kernel"):
        value = tensors[name].clone()
        value.view(-1)[0] = math.nan
        save_file(tensors | {name: value}, folder / "model.safetensors")
        with pytest.raises(RuntimeError, match=rf"NaN or infinite values in {re.escape(name)}: the file is damaged"):
            from_folder(folder)


def test_values_that_overflow_in_the_models_dtype_are_infinite(source, folder):
    tensors = load_file(source / "model.safetensors")
    large = torch.full_like(tensors["fusion.bias"], 1e300, dtype=torch.float64)
    save_file(tensors | {"fusion.bias": large}, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"infinite values in fusion\.bias"):
        from_folder(folder)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fusion.weight", torch.int32), ("fusion.weight", torch.bool), ("backbone.bn1.num_batches_tracked", torch.float32),
     ("partition_warm", torch.uint8), ("kernel", torch.float8_e4m3fn)],
)
def test_wrong_dtype_is_named(source, folder, name, dtype):
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(RuntimeError, match=rf"cannot hold: {re.escape(name)} \({kind}\)"):
        from_folder(folder)


def test_half_precision_is_no_fault(source, folder):
    tensors = load_file(source / "model.safetensors")
    halved = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(halved, folder / "model.safetensors")
    assert refusal(from_folder, folder) is None


def test_poisoned_weights_of_a_plain_backbone(tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    state["layer1.0.conv1.weight"][0] = math.inf
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(RuntimeError, match=r"infinite values in backbone\.layer1\.0\.conv1\.weight"):
        timm.create_model(
            "s3n",
            backbone="test_resnet",
            pretrained=True,
            pretrained_cfg_overlay=dict(file=str(tmp_path / "w.safetensors")),
        )


def test_a_file_that_is_no_safetensors_is_said_to_be_unreadable(folder):
    (folder / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(RuntimeError, match=r"weights of .* cannot be read \(SafetensorError: .*is the file whole\?"):
        from_folder(folder)


# pickles


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("place", "name"), [
    ("alone", "original.pth"),
    ("among tensors", "pytorch_model.bin"),
    ("beside the model", "model.pth"),
    ("as a key", "model.safetensors"),
    ("among tensors", "model.safetensors"),
])
def test_payload_is_not_run(folder, name, place, zipped):
    mark, payload = folder / "executed", Payload(folder / "executed")
    state = load_file(folder / "model.safetensors")
    content = {
        "alone": payload,
        "among tensors": state | {"fusion.bias": payload},
        "beside the model": {"model": state, "optimizer": payload},
        "as a key": {"model": state, "x": [payload]},
    }[place]
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RuntimeError) as error:
        s3n_timm.load_original_checkpoint(folder / name)
    assert "nothing in it was run" in str(error.value)
    with pytest.raises(CLEAR):
        from_folder(folder)
    with pytest.raises(CLEAR):
        from_file(folder / name)
    assert not mark.exists(), "the payload ran"
    (folder / name).rename(folder / "trusted.pth")
    torch.load(folder / "trusted.pth", weights_only=False)
    assert mark.is_dir(), "this payload would not have run anyway: the test shows nothing"


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"garbage", b"\x80\x02}q\x00.", b"\x80\x02]q\x00."])
def test_a_pickle_that_is_none(folder, content):
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(content)
    for load, path in ((from_folder, folder), (from_file, file), (s3n_timm.load_original_checkpoint, file)):
        with pytest.raises(CLEAR) as error:
            load(path)
        assert len(str(error.value)) > 10


def test_a_pickle_of_other_things(folder):
    (folder / "model.safetensors").unlink()
    for content in ([1], {"a": 1}, {1: torch.ones(2)}, torch.ones(3), 5, {"model": [1]}, {"state_dict": None}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(CLEAR) as error:
            from_folder(folder)
        assert len(str(error.value)) > 10


# config.json, mutated

VALUES = (
    None, True, False, -1, 0, 1, 2, 3.5, 10**9, 10**30, -(10**9), 1e300, math.nan, math.inf, "31", "", "x" * 10_000,
    "hf-hub:nobody/nothing", "local-dir:/nowhere", "s3n", [], [1], [10**9, 10**9], [31, 31, 31], ["a"], [[[]]], {},
    {"a": 1}, {"num_classes": 3}, {"checkpoint_path": "/etc/passwd"},
)
def places(config, prefix=()):
    for key, value in config.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from places(value, (*prefix, key))


def put(config, place, value):
    config = json.loads(json.dumps(config))
    parent = config
    for key in place[:-1]:
        parent = parent[key]
    if value is KeyError:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return config


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


# timm looks into these before anything of this package is called
TIMM_READS = ("architecture", "model_args", "pretrained_cfg")


def test_mutated_config(source, folder):
    """Values of the file replaced by values of every type, or left out."""
    config = json.loads((source / "config.json").read_text())
    every = [
        (place, value)
        for place in places(config)
        if place not in [(key,) for key in TIMM_READS]
        for value in (*VALUES, KeyError)
    ]
    before = memory()
    refused = 0
    for place, value in random.Random(3).sample(every, CONFIG_FILES):
        write_config(folder, put(config, place, value))
        try:
            refused += refusal(from_folder, folder) is not None
        except Exception as error:
            pytest.fail(f"{'.'.join(place)} = {value!r:.60}: {type(error).__name__}: {error}")
    assert memory() - before < 300, "an argument fills the memory"
    assert refused > CONFIG_FILES / 3


@pytest.mark.parametrize("key", TIMM_READS)
@pytest.mark.parametrize("value", [*VALUES[:14], [], ["a"], KeyError])
def test_config_that_timm_itself_cannot_read(source, folder, key, value):
    """Here the exception is timm's own, and of its choice: but it is one, and no model comes of it."""
    config = json.loads((source / "config.json").read_text())
    write_config(folder, put(config, (key,), value))
    if value is KeyError and key != "architecture":
        refusal(from_folder, folder)  # without these timm takes the file for another, legitimate, layout
        return
    with pytest.raises((*CLEAR, AttributeError, KeyError)) as error:
        from_folder(folder)
    assert str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100_000, '{"architecture": "s3n"'])
def test_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises((*CLEAR, AttributeError, KeyError)) as error:
        from_folder(folder)
    assert str(error.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model_args.color", "red", "s3n has no argument color: see help"),
        ("model_args.pretrained_strict", False, "no argument pretrained_strict"),
        ("model_args.pretrained_filter_fn", "x", "no argument pretrained_filter_fn"),
        ("model_args.checkpoint_path", "/etc/passwd", "no argument checkpoint_path|multiple values"),
        ("model_args.grid_size", "31", "grid_size must be one number or .*from 2 to 255, got '31'"),
        ("model_args.grid_size", -1, "grid_size must"),
        ("model_args.grid_size", 10**9, "grid_size must"),
        ("model_args.grid_size", [9, True], "grid_size must"),
        ("model_args.window", 10**9 + 1, "window must be an odd whole number from 1 to 255"),
        ("model_args.window", "3", "window must"),
        ("model_args.fwhm", math.inf, "fwhm must be a number from 1e-06 to 1e"),
        ("model_args.fwhm", 1e-200, "fwhm must"),
        ("model_args.fwhm", True, "fwhm must"),
        ("model_args.floor", 1e-50, "floor must"),
        ("model_args.beta_discriminative", 1e30, "beta_discriminative must"),
        ("model_args.threshold", math.nan, "threshold must"),
        ("model_args.threshold", "0.2", "threshold must"),
        ("model_args.topk", 2.5, "topk must be a whole number"),
        ("model_args.topk", 10**30, "topk must be a whole number"),
        ("model_args.num_classes", 7, "config.json states 5 classes, and 7 in its model_args"),
        ("model_args.in_chans", 10**9, "input_size must be a whole number from 1 to 1024"),
        ("model_args.img_size", 10**9, "img_size must be a whole number from 1 to 2048"),
        ("model_args.img_size", [64, "64"], "img_size must"),
        ("model_args.drop_rate", 7, "drop_rate must be a number from 0 to 1"),
        ("model_args.drop_path_rate", "a", "drop_path_rate must"),
        ("model_args.partition_warmup_epochs", "21", "partition_warmup_epochs must be a whole number"),
        ("model_args.kernel", "dense", "kernel must be one of 'gaussian', 'learned'"),
        ("model_args.preset", ["paper"], "preset must be one of"),
        ("model_args.backbone", 5, "backbone must be the name of a timm model or a module, got 5"),
        ("model_args.backbone", "hf-hub:a/b", "backbone 'hf-hub:a/b' is not a timm model"),
        ("model_args.backbone_args", [1], "backbone_args must map names to values"),
        ("model_args.backbone_args", {"checkpoint_path": "x"}, "backbone_args must not have checkpoint_path"),
        ("model_args.backbone_args", {"pretrained": True}, "backbone_args must not have pretrained"),
        ("model_args.backbone_args", {"hue": 1}, "backbone 'test_resnet' cannot be built with {'hue': 1}: TypeError"),
        ("model_args.backbone_args", {"output_stride": "x"}, "cannot be built with {'output_stride': 'x'}"),
        ("num_classes", "5", "num_classes must be a whole number from 0 to 65536, got '5'"),
        ("num_classes", 10**9, "num_classes must be a whole number"),
        ("num_classes", 6, "6 classes"),
        ("label_names", ["a"], "label_names has 1 names for 5 classes"),
        ("label_names", list("abcdef"), "label_names has 6 names for 5 classes"),
        ("label_names", 5, "label_names must be a list of names"),
        ("pretrained_cfg.hue", 1, "unexpected keyword argument 'hue'"),
        ("pretrained_cfg.input_size", [3, "a", 4], "input_size must be a whole number"),
        ("pretrained_cfg.mean", [math.nan], "mean must be a number for each channel"),
        ("pretrained_cfg.std", [0, 1, 1], "std must be a number for each channel, each positive"),
        ("pretrained_cfg.crop_pct", 0, "crop_pct must be a positive number"),
        ("pretrained_cfg.crop_mode", "round", "crop_mode must be one of center"),
        ("pretrained_cfg.interpolation", 3, "interpolation must be one of"),
        ("pretrained_cfg.classifier", [1], "classifier must be a module's name"),
        ("pretrained_cfg.custom_load", True, "custom_load must be left out"),
        ("pretrained_cfg.label_offset", 1, "label_offset must be left out"),
        ("pretrained_cfg.fixed_input_size", True, "unexpected keyword argument 'img_size'"),
        ("architecture", "resnet19", "Unknown model"),
        ("architecture", "test_resnet", "unexpected keyword argument"),
        ("architecture", "s3n_resnet18", r"s3n_resnet18 is built on resnet18\.tv_in1k"),
    ],
)
def test_wrong_argument_is_named(source, folder, place, value, message):
    config = json.loads((source / "config.json").read_text())
    write_config(folder, put(config, tuple(place.split(".")), value))
    with pytest.raises(CLEAR, match=message):
        from_folder(folder)


def test_the_untouched_files_load(folder):
    assert refusal(from_folder, folder) is None
    assert refusal(from_file, folder / "model.safetensors") is None
