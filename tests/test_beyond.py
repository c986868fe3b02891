"""What the paper does not have: zooming from a larger source, other answers, other complementary images."""

import warnings

import pytest
import timm
import torch
from accelerate import cpu_offload, init_empty_weights
from torch import nn

import s3n_timm
from s3n_timm import S3N, resample, sampling_map, warp_grid
from s3n_timm.evaluation import measure_batch
from s3n_timm.multiscale import grid_steps, identity_grid, read_border, scan, zoom
from s3n_timm.outputs import mean_answer
from s3n_timm.sampling import gaussian_kernel

CLASSES = 7


def build(seed=0, **options):
    torch.manual_seed(seed)
    return S3N("test_resnet", CLASSES, **options)


def images(count=3, side=128, seed=1):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def bump(side=31):
    """A sampling map with one strong place."""
    x = torch.arange(side).float()
    return 0.09 + torch.exp(-((x - 9).square()[:, None] + (x - 20).square()) / 18)[None]


# zoom


def test_zoom_without_warp_or_reduction_is_the_source():
    source = images(side=48)
    torch.testing.assert_close(zoom(source, identity_grid((48, 48))), source, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [(48, 64), (20, 64), (17, 23), (96, 130)])
def test_zoom_keeps_a_constant_and_a_ramp(size):
    torch.testing.assert_close(zoom(torch.full((2, 3, 64, 64), 0.7), warp_grid(bump().expand(2, -1, -1), size)),
                               torch.full((2, 3, *size), 0.7))
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    grid = warp_grid(bump(), size)
    inside = (grid.abs() < 0.85).all(-1)  # the filter reaches over the border otherwise
    expected = (grid[..., 0] + 1) / 2
    torch.testing.assert_close(zoom(ramp, grid)[:, 0][inside], expected[inside], rtol=0, atol=1e-3)


def test_zoom_shows_detail_where_it_magnifies_and_filters_where_it_shrinks():
    """Of a pattern finer than the warped image can hold, a place that shrinks shows the mean."""
    checks = (torch.arange(128)[:, None] + torch.arange(128)).remainder(2).float().expand(1, 1, 128, 128)
    grid = warp_grid(bump(), (64, 64))
    steps = grid_steps(grid, (128, 128))
    assert steps.min() < 1 < 1.8 < steps.max()
    zoomed, aliased = zoom(checks, grid)[0, 0], resample(checks, grid)[0, 0]
    shrunk, magnified = steps[0] > 2, steps[0] < 1
    assert (zoomed[shrunk] - 0.5).abs().max() < 0.01
    assert aliased[shrunk].std() > 0.1, "what the plain reading makes of it"
    torch.testing.assert_close(zoomed[magnified], aliased[magnified], rtol=0, atol=1e-4)
    assert zoomed[magnified].std() > 0.1


def test_steps_are_pixels_of_the_source():
    torch.testing.assert_close(grid_steps(identity_grid((9, 17)), (25, 49)), torch.full((1, 9, 17), 3.0))


def test_zoom_has_gradients():
    source, q = images(2, 40).requires_grad_(), bump().expand(2, -1, -1).clone().requires_grad_()
    zoom(source, warp_grid(q, (24, 24))).square().sum().backward()
    assert all(each.grad.isfinite().all() and each.grad.any() for each in (source, q))


@pytest.mark.parametrize("align_corners", [True, False])
def test_the_sampler_of_compiled_graphs_is_torch_s_own(align_corners):
    image = torch.rand(2, 3, 9, 8, requires_grad=True)
    grid = (2.2 * torch.rand(2, 5, 6, 2) - 1.1).requires_grad_()
    torch.library.opcheck(torch.ops.s3n_timm.sample_border, (image, grid, align_corners))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    results = []
    for read in (read_border, torch.compile(read_border, backend=keep, fullgraph=True)):
        out = read(image, grid, align_corners)
        results.append((out, *torch.autograd.grad(out.square().sum(), (image, grid))))
    for ours, expected in zip(results[1], results[0]):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert "s3n_timm.sample_border" in graphs[0]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_graphs_hold_operators_of_torch_alone(strict):
    class Read(torch.nn.Module):
        def forward(self, image, grid):
            return read_border(image, grid)

    exported = torch.export.export(Read(), (torch.rand(2, 3, 9, 8), torch.rand(2, 5, 6, 2)), strict=strict)
    assert "grid_sampler" in exported.graph_module.code
    assert "s3n_timm" not in exported.graph_module.code


def test_branches_read_what_was_asked_for():
    model = build(scan_size=64, zoom_size=(96, 80)).eval()
    seen = model.explain(images(side=128))
    assert seen.sample.discriminative.image.shape == seen.sample.complementary.image.shape == (3, 3, 96, 80)
    assert seen.sample.complementary.grid.shape == (3, 96, 80, 2)
    assert seen.maps["original"].shape[-2:] == (2, 2)
    assert seen.maps["discriminative"].shape[-2:] == (3, 3)
    warped = seen.sample.discriminative
    torch.testing.assert_close(warped.image, zoom(images(side=128), warped.grid))
    torch.testing.assert_close(
        seen.maps["original"],
        build(branches="O").eval().explain(scan(images(side=128), (64, 64))).maps["original"],
    )


def test_sizes_of_the_input_change_nothing():
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(build(scan_size=128, zoom_size=128).eval()(x), build().eval()(x), rtol=0, atol=2e-3)


def test_measures_do_not_depend_on_the_size_of_the_warped_images():
    """Scales and maps refer to the input, in which the same warp magnifies the same places."""
    boxes, parts = torch.tensor([[20.0, 30.0, 100.0, 90.0]] * 3), torch.tensor([[[60.0, 60.0, 1.0]]] * 3)
    batch = dict(image=images(), label=torch.zeros(3).long(), index=torch.arange(3), box=boxes, parts=parts)
    same, half = (measure_batch(build(zoom_size=size).eval(), batch) for size in (None, 64))
    for branch in ("discriminative", "complementary"):
        for name in (f"object_{branch}", f"background_{branch}", f"part_magnification_{branch}"):
            torch.testing.assert_close(half[name], same[name], rtol=0.05, atol=0)
        assert half[f"iou_{branch}"].shape == (3,)


def test_an_image_without_peaks_is_not_warped():
    """All branches then read one image, so that the head on its features alone says the same."""
    model = build(scan_size=64, zoom_size=64).eval()
    x = torch.linspace(-1, 1, 128).expand(2, 3, 128, 128).clone()
    nn.init.zeros_(model.backbone.get_classifier().weight)  # a response that is flat
    with torch.no_grad():
        assert not model.explain(x).sample.peaks.any()
        torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)), rtol=1e-4, atol=1e-4)


# which output answers


def test_mean_answer_is_the_geometric_mean_of_probabilities():
    model = build(answer="mean")
    x = images()
    assert isinstance(model(x), s3n_timm.S3NLogits), "training is not concerned"
    model.eval()
    with torch.no_grad():
        answer = model(x)
        model.set_branch_logits(True)
        outputs = model(x)
    product = torch.stack([each.softmax(1) for each in outputs]).prod(0) ** (1 / 4)
    torch.testing.assert_close(answer.exp(), product / product.sum(1, keepdim=True))
    two = outputs._replace(discriminative=None, complementary=None)
    product = (outputs.joint.softmax(1) * outputs.original.softmax(1)).sqrt()
    torch.testing.assert_close(mean_answer(two).exp(), product / product.sum(1, keepdim=True))


@pytest.mark.parametrize("branch", ["original", "discriminative", "complementary"])
def test_a_branch_answers(branch):
    model = build(answer=branch).eval()
    x = images()
    with torch.no_grad():
        answer = model(x)
        model.set_branch_logits(True)
        outputs = model(x)._asdict()
        records = measure_batch(model, dict(image=x, label=torch.tensor([0, 1, 2]), index=torch.arange(3)))
    assert torch.equal(answer, outputs.pop(branch))
    assert not any(torch.equal(answer, other) for other in outputs.values())
    assert torch.equal(records["prediction_answer"], answer.argmax(1))


@pytest.mark.parametrize(
    ("branches", "answer", "read"),
    [("O+D+C", "original", 3), ("O+D+C", "discriminative", 6), ("O+D+C", "complementary", 6), ("O+D+C", "joint", 9),
     ("O+D+C", "mean", 9), ("O+D", "original", 3), ("D+C", "discriminative", 6)],
)
def test_a_branch_is_read_only_if_the_answer_needs_it(branches, answer, read):
    model, x = build(branches=branches, answer=answer).eval(), images()
    sizes = []
    model.backbone.forward_features = lambda x, forward=model.backbone.forward_features: (
        sizes.append(len(x)) or forward(x))
    with torch.no_grad():
        logits = model(x)
        assert sum(sizes) == read
        model.set_branch_logits(True)
        torch.testing.assert_close(logits, model.decide(model(x)))


def test_one_pass_is_one_graph_compiled_and_exported():
    model, x = build(answer="original").eval(), images()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        torch.testing.assert_close(program.module()(x[:2]), expected[:2])


# the border


@pytest.mark.parametrize("dense", [False, True])
def test_a_reflected_border_crops_nothing(dense):
    response = torch.zeros(1, 31, 31)
    response[0, 9, 15] = 1.0
    q = sampling_map(response, response, beta=3.9)
    kernel = gaussian_kernel((31, 31), 13) if dense else None
    copied, mirrored = (warp_grid(q, (64, 64), kernel=kernel, border=border) for border in ("replicate", "reflect"))
    assert (mirrored[0, 0, :, 1] + 1).abs().max() < 1e-5
    assert copied[0, 0, :, 1].max() > -0.95
    step = (mirrored[0, 1:, 32, 1] - mirrored[0, :-1, 32, 1]) * 63 / 2
    assert step.min() < 0.8


# other places to be built in


def test_models_are_built_in_other_precisions_and_on_no_device():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = S3N("test_resnet", CLASSES).eval()
        with torch.no_grad():
            assert model(images().bfloat16()).isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)
    with init_empty_weights():
        empty = S3N("test_resnet", CLASSES)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.head == build().head


def test_classifiers_that_are_more_than_a_weight_keep_their_maps():
    """An adapter, an offloaded layer and a quantized one: the maps' means are the logits that the layer gives."""

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + x @ torch.ones(x.shape[-1], self.out_features) / 10

    x = images()
    for change in ("adapter", "offloaded", "quantized"):
        model = build().eval()
        if change == "adapter":
            model.backbone.get_classifier().__class__ = Adapter
        elif change == "offloaded":
            cpu_offload(model.backbone.get_classifier(), execution_device="cpu")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.backbone = torch.ao.quantization.quantize_dynamic(model.backbone, {torch.nn.Linear})
        seen = model.explain(x)
        torch.testing.assert_close(seen.maps["original"].mean((2, 3)), seen.logits.original, rtol=0.05, atol=0.05)


# all of them

EVERY = dict(scan_size=64, zoom_size=96, answer="mean")


@pytest.mark.parametrize("options", [dict(answer="discriminative"), EVERY], ids=str)
def test_options_travel_compile_and_export(options, tmp_path):
    model = build(**options).eval()
    folder = s3n_timm.save(model, tmp_path / "weights")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images()
    torch._dynamo.reset()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(loaded(x), expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(program(x[:2]), model(x[:2]), rtol=1e-4, atol=1e-4)
        model.set_branch_logits(True)  # a branch's answer alone does not run the fusion layer
        features = timm.models.create_feature_extractor(model, {"fusion": "joint"})
        torch.testing.assert_close(features(x)["joint"], model(x).joint)


def test_all_options_train():
    model = build(**EVERY).train()
    s3n_timm.S3NLoss()(model(images()), torch.tensor([0, 3, 6])).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(scan_size=0), "scan_size must be pixels"),
        (dict(zoom_size=(96, 96, 96)), "zoom_size must be pixels"),
        (dict(zoom_size="large"), "zoom_size must be pixels"),
        (dict(scan_size=10**6), "scan_size must be pixels"),
        (dict(answer="best"), "answer must be one of 'joint', 'mean'"),
        (dict(answer="complementary", branches="O+D"), "answer='complementary' needs that branch"),
        (dict(answer="original", branches="D+C"), "answer='original' needs that branch"),
    ],
)
def test_wrong_options_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**options)
