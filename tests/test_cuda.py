"""On a GPU as on a CPU. S3N_TEST_DEVICE=cpu runs the tests' bodies without one, which shows that they are sound.

Numbers are compared in float32 with TF32 off. Devices sum in other orders: a sum of n terms differs by some √n · 2⁻²⁴
of its size, 1e-5 for the thousands of terms of a layer, and a few layers make it 1e-4 of the largest logit. Peaks are
places, which rounding moves only where two cells are equal within 1e-5; the seeds here give no such cells.
"""

import csv
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import EXAMPLES, SMALL, command, largest_difference, run, weights
from PIL import Image
from safetensors.torch import load_file
from test_original import loaded, whole  # noqa: F401 (fixtures)
from torch import nn

from s3n_timm import S3N, S3NLoss
from s3n_timm.data import drawn_birds
from s3n_timm.sampling import sample_response, selective_sample

DEVICE = torch.device(os.environ.get("S3N_TEST_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
if CUDA and not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
# TF32 off in scripts, too: its rounding moves peaks, and a moved peak is another image
HERE = dict(ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
            NVIDIA_TF32_OVERRIDE="0")
SCRIPTS = HERE if CUDA else {}  # environment of scripts, which other tests keep on the CPU
MODELS = {
    "paper": {},
    "original": dict(preset="original"),
    "saliency": dict(attention="saliency"),
    "learned kernel": dict(kernel="learned", border="reflect"),
    "zoom": dict(scan_size=128, zoom_size=96),
    "tokens": dict(backbone="test_vit", img_size=160, backbone_args=dict(global_pool="avg")),
}
needs_cuda = pytest.mark.skipif(not CUDA, reason="a GPU's own feature")


@pytest.fixture(autouse=True)
def exact():
    """TF32 off, also in cuDNN, where it is on by default."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch._dynamo.reset()


def photographs(count=4, side=160):
    pictures = drawn_birds("test", count, num_classes=7, size=side)["image"]
    x = torch.stack([torch.from_numpy(np.array(picture.convert("RGB").resize((side, side)))) for picture in pictures])
    return x.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def build(name="paper", **options):
    """Random weights whose responses have several peaks and whose logits depend on them."""
    torch.manual_seed(0)
    model = S3N(**{**dict(backbone="test_resnet", num_classes=7), **MODELS[name], **options}).eval()
    with torch.no_grad():
        for module in model.modules():  # timm starts the last norm of a residual branch at 0
            if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
                module.weight.fill_(0.5)
        nn.init.normal_(model.backbone.get_classifier().weight)
        nn.init.normal_(model.fusion.weight)
    return model


def assert_near(actual, expected, tolerance, what):
    """Within a part of the largest value."""
    error = (actual.detach().cpu().float() - expected.detach().float()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), f"{what} differ by {error:.2g}"


# the numbers of a CPU


@pytest.mark.parametrize("name", MODELS)
def test_logits_peaks_and_grids(name):
    model, x = build(name), photographs()
    expected = model.explain(x)
    seen = model.to(DEVICE).explain(x.to(DEVICE))
    if name != "saliency":
        assert expected.sample.peaks.sum((1, 2)).float().mean() >= 2
        assert torch.equal(seen.sample.peaks.cpu(), expected.sample.peaks)
    assert_near(seen.sample.response, expected.sample.response, 1e-4, "responses")
    for branch in ("discriminative", "complementary"):
        ours, theirs = getattr(seen.sample, branch), getattr(expected.sample, branch)
        # half an image is 1, so this is a hundredth of a pixel
        assert_near(ours.grid, theirs.grid, 1e-4, f"{branch} grids")
        assert_near(ours.image, theirs.image, 1e-2, f"{branch} images")  # a hundredth of the steepest edge
    for field, logits in expected.logits._asdict().items():
        assert_near(getattr(seen.logits, field), logits, 1e-3, f"{field} logits")


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    """Of all parameters together 1e-3 of their norm, and of each β a tenth.

    β's own are small sums over all pixels, behind ReLUs and max pools that switch: on a CPU alone, noise of 2e-6 of the
    images changes them by up to 8 %. The next test holds them to less, where nothing switches.
    """
    model, x, target = build(name), photographs(), torch.arange(4)
    gradients = []
    for device in ("cpu", DEVICE):
        model.to(device).set_branch_logits(True)
        loss = S3NLoss()(model(x.to(device)), target.to(device))
        model.zero_grad()
        loss.backward()
        gradients.append({key: p.grad.cpu().clone() for key, p in model.named_parameters() if p.grad is not None})
    theirs, ours = gradients
    assert theirs.keys() == ours.keys()
    difference = sum((ours[key] - theirs[key]).square().sum() for key in ours).sqrt()
    assert difference <= 1e-3 * sum(value.square().sum() for value in theirs.values()).sqrt()
    for key in (key for key in ours if key.startswith("beta.")):
        assert_near(ours[key], theirs[key], 0.1, key)


def test_gradients_of_the_widths():
    """On images without edges, in which a neighboring pixel has the same slope."""
    x = nn.functional.interpolate(nn.functional.avg_pool2d(photographs(), 10), 160, mode="bicubic")
    response = nn.functional.interpolate(torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)), 31)[:, 0]
    gradients = []
    for device in ("cpu", DEVICE):
        betas = [torch.tensor([value], device=device, requires_grad=True) for value in (3.9, 13.2)]
        seen = sample_response(x.to(device), response.to(device), mode="expected", beta_discriminative=betas[0],
                               beta_complementary=betas[1])
        loss = sum(branch.image.square().sum() for branch in (seen.discriminative, seen.complementary))
        gradients.append(torch.stack(torch.autograd.grad(loss, betas, materialize_grads=True)).cpu())
    assert_near(gradients[1][0], gradients[0][0], 1e-3, "gradients of β₁")
    assert_near(gradients[1][1], gradients[0][1], 1e-3, "gradients of β₂")


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the original implementation's results are not here")
@pytest.mark.parametrize("mode", ["all", "extreme"])
def test_golden_grids_and_images(mode):
    """Tolerances of tests/test_sampling.py."""
    golden = load_file(GOLDEN / "sampling.safetensors", device=str(DEVICE))
    cells = math.sqrt(2) * 31
    out = selective_sample(golden["input"], golden["maps"], None, mode=mode, beta_discriminative=0.09 * cells,
                           beta_complementary=0.3 * cells)
    for branch, letter in ((out.discriminative, "d"), (out.complementary, "c")):
        torch.testing.assert_close(branch.grid, golden[f"{mode}.grid_{letter}"], atol=1e-4, rtol=0)
        torch.testing.assert_close(branch.image, golden[f"{mode}.image_{letter}"], atol=1e-3, rtol=0)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the original network's outputs are not here")
@pytest.mark.parametrize("mode", ["all", "extreme"])
def test_golden_logits(loaded, mode):  # noqa: F811
    golden = load_file(GOLDEN / "original_logits.safetensors")
    model = loaded.to(DEVICE).eval()
    model.set_branch_logits(True)
    model.configure(partition_eval=mode)
    with torch.no_grad():
        outputs = model(golden["input"].to(DEVICE))
    for name, output in outputs._asdict().items():
        assert_near(output, golden[f"{mode}.{name}"], 1e-3, f"{name} logits")


def test_samplers_agree():
    """The sampler in use against the one that zeros outside would take, cuDNN's on a GPU."""
    x, response = photographs().to(DEVICE), torch.rand(4, 31, 31, device=DEVICE)
    beta = torch.tensor([3.9], device=DEVICE, requires_grad=True)
    seen = sample_response(x, response, mode="expected", beta_discriminative=beta, beta_complementary=beta)
    zeros = nn.functional.grid_sample(x, seen.discriminative.grid, align_corners=True)
    assert_near(seen.discriminative.image, zeros.cpu(), 1e-5, "images")
    ours, theirs = (torch.autograd.grad(out.square().sum(), beta, retain_graph=True)[0]
                    for out in (seen.discriminative.image, zeros))
    assert_near(ours, theirs.cpu(), 1e-3, "gradients of β")


def test_a_width_that_is_no_number_is_seen():
    x, response = photographs().to(DEVICE), torch.rand(4, 31, 31, device=DEVICE)
    beta = torch.tensor([math.nan], device=DEVICE)
    seen = sample_response(x, response, mode="expected", beta_discriminative=beta, beta_complementary=4.0)
    assert seen.discriminative.image.isnan().all()
    assert seen.complementary.image.isfinite().all()


# layouts and precisions


def test_channels_last():
    model, x = build().to(DEVICE), photographs().to(DEVICE)
    with torch.no_grad():
        expected = model(x).cpu()
        seen = []
        read = model.read
        model.read = lambda images: seen.append(images.stride(1)) or read(images)
        logits = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert seen == [1, 1]
    assert_near(logits, expected, 1e-3, "logits")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_sampling_in_float32(dtype):
    """The features are of low precision, what is made of them is not; Y_O, which no peak changes, agrees to 5 %."""
    model, x = build().to(DEVICE), photographs().to(DEVICE)
    expected = model.explain(x)
    with torch.autocast(DEVICE.type, dtype):
        seen = model.explain(x)
    assert seen.logits.joint.dtype == dtype
    assert seen.sample.response.dtype == torch.float32
    for branch in (seen.sample.discriminative, seen.sample.complementary):
        assert branch.grid.dtype == branch.image.dtype == branch.sampling_map.dtype == torch.float32
    again = sample_response(x, seen.sample.response, mode="expected", beta_discriminative=model.beta["discriminative"],
                            beta_complementary=model.beta["complementary"])
    assert_near(again.discriminative.grid, seen.sample.discriminative.grid.cpu(), 1e-4, "grids")
    assert_near(seen.logits.original, expected.logits.original.cpu(), 0.05, "logits")
    assert all(logits.isfinite().all() for logits in seen.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models(dtype):
    model, x = build().to(DEVICE), photographs().to(DEVICE)
    expected = model.explain(x).logits.original.cpu()
    seen = model.to(dtype).explain(x.to(dtype))
    assert seen.sample.discriminative.grid.dtype == torch.float32
    assert_near(seen.logits.original, expected, 0.05, "logits")
    assert seen.logits.joint.isfinite().all()


def test_peaks_of_tf32_features_are_those_of_float32():
    """Eleven bits of mantissa: a value is off by 5e-4, so the strongest peak stays, and of all peaks 95 % do."""
    model, x = build().to(DEVICE), photographs(16).to(DEVICE)
    exact = model.explain(x).sample
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rounded = model.explain(x).sample
    assert torch.equal(*(each.response.flatten(1).argmax(1) for each in (exact, rounded)))
    both, either = (exact.peaks & rounded.peaks).sum(), (exact.peaks | rounded.peaks).sum()
    assert both >= 0.95 * either


# graphs


@pytest.mark.parametrize("name", ["paper", "original"])
def test_compiles_to_one_graph_forward_and_backward(name):
    model, x, target = build(name).to(DEVICE), photographs().to(DEVICE), torch.arange(4, device=DEVICE)
    model.set_branch_logits(True)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    results = []
    for call in (model, compiled):
        model.zero_grad()
        out = call(x)
        S3NLoss()(out, target).backward()
        results.append((out.joint.detach().cpu(), model.beta["discriminative"].grad.cpu().clone()))
    assert_near(results[1][0], results[0][0], 1e-3, "logits")
    assert_near(results[1][1], results[0][1], 1e-2, "gradients of β")


@needs_cuda
def test_cuda_graphs_at_inference():
    model, x = build().to(DEVICE), photographs().to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.inference_mode():
        for images in (x, x.flip(0), x.flip(3)):  # warm-up, recording, replay
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled(images).clone()
            assert_near(logits, model(images).cpu(), 1e-3, "logits")


@needs_cuda
def test_a_captured_graph_replays_the_forward():
    """Capture fails where the host copies to the device or waits for it."""
    model, static = build().to(DEVICE), photographs().to(DEVICE)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(static)
        other = photographs().flip(3).to(DEVICE)
        expected = model(other).cpu()
        static.copy_(other)
        graph.replay()
        assert_near(logits, expected, 1e-3, "logits")


@needs_cuda
def test_the_forward_and_the_loss_never_wait():
    model, x, target = build().to(DEVICE).train(), photographs().to(DEVICE), torch.arange(4, device=DEVICE)
    S3NLoss()(model(x), target).backward()  # libraries start
    torch.cuda.set_sync_debug_mode("error")
    try:
        S3NLoss()(model(x), target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradient_checkpointing():
    model, x, target = build().to(DEVICE), photographs().to(DEVICE), torch.arange(4, device=DEVICE)
    model.set_branch_logits(True)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        S3NLoss()(model(x), target).backward()
        gradients.append([parameter.grad.cpu().clone() for parameter in model.parameters()])
    for ours, theirs in zip(gradients[1], gradients[0]):
        assert_near(ours, theirs, 1e-3, "gradients")


# scripts


def train(output, *args, deterministic=False, launch=()):
    """train.py in processes of its own; with deterministic algorithms where torch has them."""
    words = command("train.py", *SMALL, *args, "--output", output)
    scripts = [Path(__file__).with_name("deterministic.py"), *words[1:]] if deterministic else words[1:]
    words = [*map(str, launch or words[:1]), *map(str, scripts)]
    return run(words, CUBLAS_WORKSPACE_CONFIG=":4096:8", **SCRIPTS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    train(output, "--epochs", 2, "--model-ema", "--no-channels-last", deterministic=True)
    return output


def losses(output):
    with (output / "summary.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_resumes_bit_for_bit_with_averaged_weights(trained, tmp_path):
    """Without channels-last: there max pooling adds atomically, in an order that no setting fixes."""
    output = tmp_path / "run"
    args = ("--epochs", 2, "--model-ema", "--no-channels-last")
    train(output, *args, deterministic=True)
    assert largest_difference(output, trained) == 0, "two runs differ"
    last = max((output / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in last.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert "Resumed from" in train(output, *args, "--resume", deterministic=True)
    assert largest_difference(output, trained) == 0
    assert largest_difference(output, trained, kind="ema") == 0
    averaged, live = weights(output, "ema"), weights(output)
    assert any((averaged[name] != live[name]).any() for name in live)


def test_one_process_of_ddp(trained, tmp_path):
    """NCCL on a GPU. The same weights as without it, but for rounding.

    Deterministic, as the run that it is compared with: other algorithms round otherwise, and a peak that moves is worth
    0.01 after 12 updates.
    """
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1)
    train(tmp_path / "run", "--epochs", 2, "--no-channels-last", deterministic=True, launch=launch)
    assert largest_difference(tmp_path / "run", trained) < 1e-3


def test_one_process_of_fsdp(trained, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "configs" / "fsdp.yaml",
              "--num_processes", 1, "--mixed_precision", "no"]
    if not CUDA:
        launch.append(Path(__file__).with_name("fsdp_on_cpu.py"))
    text = train(tmp_path / "run", "--epochs", 2, "--no-channels-last", deterministic=True, launch=launch)
    assert "1 process(es)" in text
    assert largest_difference(tmp_path / "run", trained) < 1e-3


def test_low_precision_trains_finite(tmp_path):
    """fp16 with the scaler for 200 updates: it learns and nothing overflows. On a CPU some in bf16."""
    precision, epochs = ("fp16", 50) if CUDA else ("bf16", 4)
    train(tmp_path / "run", "--epochs", epochs, "--mixed-precision", precision, "--val-interval", epochs)
    values = losses(tmp_path / "run")
    assert all(math.isfinite(value) for value in values)
    assert values[-1] < values[0]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_compiled_training(tmp_path):
    train(tmp_path / "run", "--epochs", 2, "--torchcompile", "inductor" if CUDA else "aot_eager")
    assert all(math.isfinite(value) for value in losses(tmp_path / "run"))


def test_predicts_as_a_cpu_does(trained, tmp_path):
    import pyarrow.parquet

    for i, picture in enumerate(drawn_birds("test", 5, num_classes=4, size=80)["image"]):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.array(picture)).save(tmp_path / "images" / f"{i}.png")
    rows = []
    for name, environment in (("cpu", {}), ("device", SCRIPTS)):
        words = command("predict.py", trained / "last", tmp_path / "images", "--output", tmp_path / name, "-j", 1)
        run(words, **environment)
        (shard,) = (tmp_path / name).glob("*.parquet")
        rows.append(pyarrow.parquet.read_table(shard).to_pylist())
    assert len(rows[0]) == len(rows[1]) == 5
    for ours, theirs in zip(rows[1], rows[0]):
        assert ours["label"] == theirs["label"]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-3)


@pytest.mark.skipif(CUDA and torch.__version__ < "2.13", reason="torch before 2.13 fails to export where() of a CUDA "
                    "model's tensor and a number, of which torch.special.entr consists: export on the CPU")
def test_a_model_on_the_device_exports_to_onnx(tmp_path):
    pytest.importorskip("onnxscript", reason="the export extra is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    model, x = build().to(DEVICE), photographs()
    exported = torch.onnx.export(model, (x.to(DEVICE),), dynamo=True, opset_version=18, verbose=False,
                                 input_names=["image"], output_names=["logits"])
    exported.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, dict(image=x.numpy()))
    with torch.no_grad():
        assert_near(torch.from_numpy(logits), model.cpu()(x), 1e-3, "logits")


def test_saved_weights_load_onto_the_device(trained):
    model = timm.create_model(f"local-dir:{trained / 'last'}", pretrained=True).eval()
    x = photographs(2, 64)
    with torch.no_grad():
        assert_near(model.to(DEVICE)(x.to(DEVICE)), model.cpu()(x), 1e-3, "logits")
