"""S3N under torch.compile, torch.export, ONNX Runtime and FX, and examples/export.py as its users run it."""

import copy
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import EXAMPLES, call, command, run
from PIL import Image
from test_model import Plain
from timm.data import create_transform
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import s3n_timm
from s3n_timm import S3N, S3NLoss
from s3n_timm.data import class_names, drawn_birds, load
from s3n_timm.peaks import PARTITION_MODES, find_peaks, partition_peaks

onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
pytest.importorskip("onnxscript", reason="the export extra is not installed")

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "cub50" / "images"
CLASSES = 7
SIDE = 160
# a small model of each family, and the input that gives several peaks
FAMILIES = {
    "test_resnet": dict(side=SIDE),
    "test_efficientnet": dict(side=SIDE),
    "test_convnext": dict(side=SIDE, backbone_args=dict(depths=(1, 1, 1, 1))),
    "swin_tiny_patch4_window7_224": dict(
        side=128, img_size=128, backbone_args=dict(depths=(1,), embed_dim=24, num_heads=(1,))),
}


def preprocess(images, side):
    transform = create_transform((3, side, side), crop_pct=1.0, crop_mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    return torch.stack([transform(image.convert("RGB")) for image in images])


def birds(count=5, side=SIDE):
    return preprocess(drawn_birds("test", count, num_classes=CLASSES, size=128)["image"], side)


def photographs(count=5, side=SIDE):
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"the real photographs are not here: {PHOTOGRAPHS} is absent")
    paths = sorted(PHOTOGRAPHS.glob("*/*.jpg"))
    return preprocess([Image.open(path) for path in paths[::len(paths) // count][:count]], side)


def build(backbone="test_resnet", **options):
    """A model whose random weights give logits of about 3 and several peaks: rounding errors show in its logits."""
    torch.manual_seed(0)
    options = FAMILIES[backbone] | options
    side = options.pop("side")
    model = S3N(backbone, CLASSES, **options).eval()
    with torch.no_grad():
        for module in model.modules():  # timm starts the last norm of a residual branch, or its scale, at about 0
            if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
                module.weight.fill_(0.5)
            if isinstance(getattr(module, "gamma", None), nn.Parameter):
                module.gamma.fill_(0.5)
        nn.init.normal_(model.backbone.get_classifier().weight)
        nn.init.normal_(model.fusion.weight)
        nn.init.zeros_(model.fusion.bias)
        model.fusion.weight.mul_(3 / model(birds(side=side)).std())
    return model


def count_peaks(model, images):
    return model.explain(images).sample.peaks.sum((1, 2)).tolist()


def check_telling(model, images):
    """What is compared must depend on where the peaks are: several of them, and warps that matter."""
    sample, logits, _ = model.explain(images)
    assert sample.peaks.sum((1, 2)).float().mean() >= 2, "these images give hardly a peak"
    unwarped = model.forward_head(model.forward_features(images))
    assert (logits.joint - unwarped).abs().max() > 0.01, "the warps hardly change the logits"
    assert logits.joint.abs().max() > 1


# torch.compile


@pytest.fixture
def counter():
    """A backend that counts the graphs it compiles."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def dynamic(images):
    images = images.clone()
    torch._dynamo.mark_dynamic(images, 0)
    return images


def test_one_graph_trains_on_any_batch_and_number_of_peaks(counter):
    """With the original's preset, and a backbone of one layer; test_train.py compiles a whole network's training."""
    torch.manual_seed(0)
    model = S3N(Plain(CLASSES), preset="original", partition_train="expected", partition_warmup_epochs=0).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(3)
    smooth, rough = (torch.randn(3, 3, n, n, generator=generator) for n in (3, SIDE))
    smooth = nn.functional.interpolate(smooth, SIDE, mode="bicubic")
    batches = [birds(4), birds(2), torch.zeros(5, 3, SIDE, SIDE), smooth, rough]
    numbers = [tuple(count_peaks(model, images)) for images in batches]
    assert len(set(numbers)) == len(batches)
    assert 0 in numbers[2]
    for images in batches:
        labels = torch.arange(len(images)) % CLASSES
        outputs, expected = compiled(dynamic(images)), model(images)
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
        for each in (compiled, model):
            each.zero_grad()
        S3NLoss()(outputs, labels).backward()
        S3NLoss()(expected, labels).backward()
        # a compiled graph rounds otherwise, which takes a sample over a pixel's border now and then: an input changed
        # by 1e-7 of itself moves the largest of these gradients by up to 2 %
        for (name, ours), theirs in zip(model.named_parameters(), compiled.parameters()):
            assert (theirs.grad - ours.grad).norm() <= 0.1 * ours.grad.norm(), name
        ours, theirs = (torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (model, compiled))
        assert (theirs - ours).norm() <= 0.01 * ours.norm()
        if images.any():  # the zeros have no peak, and so no gradient of β
            assert all(beta.grad.isfinite() and beta.grad != 0 for beta in compiled.beta.values())
        assert counter.frame_count == 1, f"compiled again for {len(images)} images with {count_peaks(model, images)}"


@pytest.mark.parametrize("mode", PARTITION_MODES)
def test_every_partition_compiles_once(counter, mode):
    """What follows a partition is one for all, and compiled below."""
    compiled = torch.compile(partition_peaks, fullgraph=True, backend=counter)
    for count in (4, 3):
        response = torch.rand(count, 9, 9, generator=torch.Generator().manual_seed(count))
        peaks = find_peaks(response)
        torch.manual_seed(count)
        weights = compiled(dynamic(response), dynamic(peaks), mode)
        torch.manual_seed(count)
        assert all(map(torch.equal, weights, partition_peaks(response, peaks, mode)))
    assert counter.frame_count == 1


def test_inductor_gives_the_same_logits():
    """A backbone of one layer: inductor takes seconds a kernel, and export.py, below, compiles a whole network."""
    torch.manual_seed(0)
    model = S3N(Plain(CLASSES)).eval()
    nn.init.normal_(model.fusion.weight, std=3)
    check_telling(model, birds(4))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        try:
            first = compiled(dynamic(birds(4)))
        except torch._inductor.exc.InductorError as error:
            if "compiler" not in str(error).lower():
                raise
            pytest.skip("no C++ compiler for inductor")
        torch.testing.assert_close(first, model(birds(4)), rtol=0, atol=1e-4)
        torch.testing.assert_close(compiled(dynamic(birds(3))), model(birds(3)), rtol=0, atol=1e-4)


# torch.export


def test_exported_program_survives_saving(tmp_path):
    """With the original's preset; export.py, below, exports the paper's, and ONNX the other families."""
    model, images = build(preset="original"), birds()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(model, (images[:3],), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        check_telling(model, images)
        for count in (1, 2, 5):
            torch.testing.assert_close(loaded(images[:count]), model(images[:count]), rtol=0, atol=1e-4)


# ONNX Runtime


def start(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])


@pytest.fixture(scope="module")
def export_onnx(tmp_path_factory):
    """Makes a model of a family and its ONNX file, once."""
    @functools.cache
    def create(backbone):
        side = FAMILIES[backbone]["side"]
        model, path = build(backbone), tmp_path_factory.mktemp("onnx") / "model.onnx"
        torch.onnx.export(
            model,
            (birds(3, side),),
            path,
            dynamo=True,
            opset_version=18,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
        return model, path, side

    return create


# heads with a norm, of NCHW and of NHWC features; export.py, below, exports one without
@pytest.fixture(params=["test_convnext", "swin_tiny_patch4_window7_224"])
def exported(request, export_onnx):
    return export_onnx(request.param)


@pytest.mark.parametrize("source", [birds, photographs])
def test_onnx_runtime_gives_the_same_logits(exported, source):
    model, path, side = exported
    images = source(6, side)
    check_telling(model, images)
    infer = start(path)
    with torch.no_grad():
        for batch in (images[:1], images[1:4], images):
            difference = (infer(batch) - model(batch)).abs().amax(1)
            assert (difference <= 1e-4).all(), f"differences by image: {difference.tolist()}"


def test_onnx_graph(exported):
    graph = onnx.load(exported[1])
    assert next(entry.version for entry in graph.opset_import if entry.domain == "") >= 16
    for value in (*graph.graph.input, *graph.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param, f"{value.name} has a fixed batch size"
    operations = [node.op_type for node in graph.graph.node]
    assert operations.count("GridSample") == 2, "a warp each for D and C"


def test_onnx_runtime_finds_the_peaks_of_plateaus(tmp_path):
    """Of equal values both runtimes take the first as a peak; an image without peaks is not warped."""

    class Peaks(nn.Module):
        def forward(self, response):
            return find_peaks(response)

    response = torch.randint(0, 4, (3, 31, 31), generator=torch.Generator().manual_seed(0)).float()
    response[2] = 1
    batch = torch.export.Dim("batch", min=1)
    arguments = dict(dynamo=True, dynamic_shapes=({0: batch},), input_names=["image"], output_names=["logits"])
    torch.onnx.export(Peaks().eval(), (response,), tmp_path / "peaks.onnx", verbose=False, **arguments)
    expected = find_peaks(response)
    assert expected.sum((1, 2)).bool().tolist() == [True, True, False]
    assert torch.equal(start(tmp_path / "peaks.onnx")(response), expected)


# the script

NAMES = class_names(load("birds", split="test", num_images=CLASSES, num_classes=CLASSES))[::-1]


def export_script(*args, ok=True):
    return call("export.py", *args, "--cpu-threads", "1", ok=ok)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "weights"
    model = build()
    config = dict(input_size=(3, SIDE, SIDE), crop_pct=1.0, crop_mode="squash", interpolation="bicubic",
                  mean=(0.4, 0.5, 0.6), std=(0.5, 0.4, 0.3))
    return s3n_timm.save(model, folder, label_names=NAMES, data_config=config)


@pytest.fixture(scope="module")
def finished(saved, tmp_path_factory):
    """What the script printed and wrote, int8 and all, in a process of its own."""
    output = tmp_path_factory.mktemp("exported")
    words = (saved, "--output", output, "--num-images", 5, "--batch-sizes", 1, 3, "--repetitions", 2, "--no-compile",
             "--int8", "static", "--dataset", "birds", "--num-calibration", 7, "--num-test", 21, "--cpu-threads", 1)
    return run(command("export.py", *words)), output


def test_script_compares_every_runtime(finished):
    text, output = finished
    result = json.loads((output / "export.json").read_text())
    runtimes = ["eager", "torch.export", "ONNX Runtime", "ONNX Runtime int8"]
    compared = [(row["runtime"], row["batch"]) for row in result["rows"]]
    assert compared == [(name, batch) for batch in (1, 3) for name in runtimes]
    for row in result["rows"]:
        assert row["latency_ms"] > 0
        assert row["difference"] <= 1e-4 or row["runtime"] == "ONNX Runtime int8"
        assert row["runtime"] in text
    assert [row["ratio"] for row in result["rows"] if row["runtime"] == "eager"] == [1, 1]
    assert all(row["difference"] > 0 for row in result["rows"] if row["runtime"] == "ONNX Runtime int8")
    files = {"export.json", "model.int8.onnx", "model.onnx", "model.pt2", "preprocessing.json"}
    assert {path.name for path in output.iterdir()} == files, "a partial file is left, or one is missing"


def test_exported_files_serve_without_the_script(finished, saved):
    output = finished[1]
    model = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    preprocessing = json.loads((output / "preprocessing.json").read_text())
    names = preprocessing.pop("label_names")
    assert names == NAMES
    assert preprocessing == dict(input_size=[3, SIDE, SIDE], crop_pct=1.0, crop_mode="squash", interpolation="bicubic",
                                 mean=[0.4, 0.5, 0.6], std=[0.5, 0.4, 0.3])
    images = birds()
    program = torch.export.load(output / "model.pt2").module()
    with torch.no_grad():
        for infer in (start(output / "model.onnx"), program):
            torch.testing.assert_close(infer(images), model(images), rtol=0, atol=1e-4)


def test_int8_keeps_sampling_in_float32(finished):
    text, output = finished
    graph = onnx.load(output / "model.int8.onnx").graph
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}

    def integer(node):
        image, weight = (makers.get(name) for name in node.input[:2])
        both = all(maker is not None and maker.op_type == "DequantizeLinear" for maker in (image, weight))
        return both and weights[weight.input[0]] == 3  # INT8

    kinds = {kind: [integer(node) for node in graph.node if node.op_type == kind]
             for kind in ("Conv", "Gemm", "MatMul")}
    assert kinds["Conv"]
    assert all(kinds["Conv"])
    # the original's classifier and the fusion layer; the products on the grid are none
    assert sum(kinds["Gemm"] + kinds["MatMul"]) == 2 < len(kinds["Gemm"] + kinds["MatMul"])
    assert not any(node.op_type == "BatchNormalization" for node in graph.node)
    grids = [makers[node.input[1]].op_type for node in graph.node if node.op_type == "GridSample"]
    assert len(grids) == 2
    assert "DequantizeLinear" not in grids, "the image, of 8 bits anyway, may be rounded, but not the grid"
    result = json.loads((output / "export.json").read_text())["int8"]
    assert result["images"] == 21
    assert (output / "model.int8.onnx").stat().st_size < 0.75 * (output / "model.onnx").stat().st_size
    assert "the sampling stage stays in float32" in re.sub(r"\s+", " ", text)


def test_int8_accuracy_is_that_of_the_labelled_images(finished, saved):
    output = finished[1]
    result = json.loads((output / "export.json").read_text())["int8"]
    dataset = load("birds", split="test", num_images=21, num_classes=CLASSES).shuffle(seed=0)
    config = json.loads((output / "preprocessing.json").read_text())
    config.pop("label_names")
    transform = create_transform(**config)
    images = torch.stack([transform(row["image"].convert("RGB")) for row in dataset])
    for name, file in (("float32", "model.onnx"), ("int8", "model.int8.onnx")):
        # the model has the classes in the reverse order
        labels = CLASSES - 1 - torch.tensor(dataset["label"][:])
        correct = (start(output / file)(images).argmax(1) == labels).double().mean().item()
        assert result[name]["top1"] == pytest.approx(100 * correct)
        assert result[name]["megabytes"] == pytest.approx((output / file).stat().st_size / 1e6)


def test_int8_of_linear_layers(export_onnx, tmp_path):
    """dynamic: a model of convolutions and linear layers has the linear ones quantized alone."""
    from support import quantization

    model, path, side = export_onnx("test_convnext")
    images = birds(3, side)
    if quantization.OLD_RUNTIME:
        with pytest.raises(ValueError, match="needs a newer onnxruntime"):
            quantization.quantize(path, tmp_path / "int8.onnx", "dynamic", None)
        return
    sentence = quantization.quantize(path, tmp_path / "int8.onnx", "dynamic", None)
    operations = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert "ConvInteger" not in operations
    done, total = map(int, re.search(r"(\d+) of (\d+) layers", sentence).groups())
    assert 0 < operations.count("MatMulInteger") == done < total
    difference = (start(tmp_path / "int8.onnx")(images) - model(images)).abs()
    assert 0 < difference.median() < 0.1, "peaks of an image may move with a rounded response, not most logits"


@pytest.mark.parametrize("bias", [False, True])
def test_folding_shares_weights_of_both_passes(bias, tmp_path):
    from support import quantization

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5, eps=0.1)
            for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
                nn.init.uniform_(tensor, 0.5, 2)

        def forward(self, x):
            return self.norm(self.conv(x)).mean((2, 3)) - self.norm(self.conv(x.flip(3).square())).amax((2, 3))

    torch.manual_seed(0)
    model, images = Twice().eval(), birds(2)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, input_names=["image"],
                      output_names=["logits"], verbose=False)
    graph = onnx.load(tmp_path / "model.onnx")
    quantization.fold_batch_norms(graph)
    onnx.save(graph, tmp_path / "folded.onnx")
    assert not any(node.op_type == "BatchNormalization" for node in graph.graph.node)
    assert sum(tuple(tensor.dims) == (5, 3, 3, 3) for tensor in graph.graph.initializer) == 1, "weights stored twice"
    with torch.no_grad():
        torch.testing.assert_close(start(tmp_path / "folded.onnx")(images), model(images), rtol=1e-5, atol=1e-5)


def test_script_compiles_an_untrained_name(tmp_path):
    text = export_script("test_resnet", "--output", tmp_path / "out", "--formats", "pt2", "--num-images", 2,
                         "--batch-sizes", 2, "--repetitions", 1)
    assert "untrained" in text
    rows = json.loads((tmp_path / "out" / "export.json").read_text())["rows"]
    assert [row["runtime"] for row in rows] == ["eager", "torch.compile", "torch.export"]
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_script_fails_where_a_runtime_differs(tmp_path):
    text = export_script("test_resnet", "--output", tmp_path, "--num-images", 3, "--batch-sizes", 3, "--repetitions", 1,
                         "--no-compile", "--formats", "onnx", "--tolerance", "1e-12", "--images",
                         _photograph(tmp_path), ok=False)
    last = text.strip().splitlines()[-1]
    assert re.fullmatch(r"export\.py: ONNX Runtime differs from eager by .* at batch size 3 \(.*"
                        r"bird\.png\), more than --tolerance 1e-12\.", last)
    assert "Traceback" not in text


def _photograph(folder):
    folder = folder / "pictures"
    folder.mkdir()
    drawn_birds("test", 1, num_classes=CLASSES, size=128)[0]["image"].save(folder / "bird.png")
    return folder


def test_random_partition_is_refused_or_replaced(tmp_path):
    folder = s3n_timm.save(build(branches="O+D", partition_eval="probability"), tmp_path / "weights",
                           data_config=dict(input_size=(3, SIDE, SIDE)))
    arguments = (folder, "--output", tmp_path / "out", "--no-compile", "--num-images", 2, "--batch-sizes", 2,
                 "--repetitions", 1)
    text = export_script(*arguments, ok=False)
    assert text.strip().splitlines()[-1].startswith("export.py: WEIGHTS")
    assert "--partition-eval expected" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
    export_script(*arguments, "--formats", "pt2", "--partition-eval", "extreme")
    expected = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    expected.configure(partition_eval="extreme")
    images = birds()
    with torch.no_grad():
        exported = torch.export.load(tmp_path / "out" / "model.pt2").module()
        torch.testing.assert_close(exported(images), expected(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere",), "WEIGHTS nowhere cannot be loaded: there is no such folder"),
        (("test_resnet", "--opset", "15"), "--opset must be 18 or later"),
        (("test_resnet", "--opset", "17"), "--opset must be 18 or later"),
        (("test_resnet", "--batch-sizes", "0"), "--batch-sizes must be positive"),
        (("test_resnet", "--int8", "static"), "--int8 and --dataset belong together"),
        (("test_resnet", "--int8", "static", "--dataset", "birds", "--formats", "pt2"), "add onnx to --formats"),
        (("test_resnet", "--partition-eval", "all"), "needs a model with peaks"),
        (("test_resnet", "--images", "absent.jpg"), "absent.jpg"),
        (("test_resnet", "--images", str(EXAMPLES / "recipes")), "holds no image"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, sentence, tmp_path, capsys):
    """In this process: starting one for each would take most of the time."""
    import export as script

    with pytest.raises(SystemExit) as exit_:
        script.main([*arguments, "--output", str(tmp_path / "out")])
    said = str(exit_.value.code) + capsys.readouterr().err
    assert exit_.value.code not in (0, None)
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_plain_folder_and_a_late_opset(tmp_path, capsys):
    import export as script

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    model.pretrained_cfg.update(input_size=(1, 64, 64), num_classes=3)
    s3n_timm.save(model, tmp_path / "plain", label_names=["a", "b", "c"])
    arguments = [tmp_path / "plain", "--output", tmp_path / "out", "--opset", 20, "--formats", "onnx", "--no-compile",
                 "--num-images", 2, "--batch-sizes", 2, "--repetitions", 1, "--cpu-threads", 1]
    script.main(list(map(str, arguments)))
    assert "TensorRT" in capsys.readouterr().out
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    assert next(entry.version for entry in graph.opset_import if entry.domain == "") == 20
    preprocessing = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert preprocessing["label_names"] == ["a", "b", "c"]
    assert preprocessing["input_size"] == [1, 64, 64]
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(start(tmp_path / "out" / "model.onnx")(images), model(images), rtol=0, atol=1e-4)


def test_int8_wants_the_models_classes(saved, tmp_path):
    for label in ("a", "b"):
        for split in ("train", "test"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            pixels = np.random.default_rng(len(label + split)).integers(0, 255, (70, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / label / "0.png")
    text = export_script(saved, "--output", tmp_path / "out", "--int8", "static", "--dataset", "folder", "--data-dir",
                         tmp_path / "data", "--formats", "onnx", ok=False)
    assert f"--dataset folder has 2 classes and WEIGHTS {saved} has {CLASSES}" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists(), "said before anything is exported"
    (tmp_path / "parquet").mkdir()
    for split in ("train", "test"):
        renamed = load("folder", tmp_path / "data", split).rename_columns(dict(image="photo", label="kind"))
        renamed.to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    words = (saved, "--output", tmp_path / "out", "--int8", "static", "--data-dir", tmp_path / "parquet", "--formats",
             "onnx", "--image-column", "photo", "--label-column", "kind")
    assert "parquet has 2 classes" in export_script(*words, "--dataset", "parquet", ok=False)
    assert "--image-column is for parquet" in export_script(*words, "--dataset", "folder", ok=False)
