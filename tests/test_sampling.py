import math
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

from s3n_timm import gate_response, project_response, resample, sampling_map, selective_sample, warp_grid
from s3n_timm.peaks import PARTITION_MODES
from s3n_timm.response import gate_weights, resize_maps
from s3n_timm.sampling import BORDERS, sample_response

GOLDEN = Path(__file__).parents[2] / "shared/golden/sampling.safetensors"
BETAS = dict(beta_discriminative=math.sqrt(2) * 0.09 * 31, beta_complementary=math.sqrt(2) * 0.3 * 31)
SMALL = dict(beta_discriminative=1.5, beta_complementary=4.0, grid_size=9, fwhm=4)


def tensors(sample):
    """All of a `SelectiveSample`, one after the other."""
    return [*sample[:2], *sample.discriminative, *sample.complementary]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def smooth_images(batch, size, seed=0):
    coarse = torch.rand(batch, 3, 3, 3, generator=seeded(seed))
    return F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)


def identity(batch, size):
    return torch.as_tensor(oracle.identity_grid(size)).float().expand(batch, *size, 2)


def assert_near(actual, expected, atol):
    torch.testing.assert_close(actual, torch.as_tensor(expected).to(actual.dtype), atol=atol, rtol=0)


# the original implementation's own results


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is absent: the original implementation's results are not part of this repository")
    return load_file(GOLDEN)


@pytest.mark.parametrize("maps", ["maps", "maps31"])
@pytest.mark.parametrize("given_scores", [True, False])
@pytest.mark.parametrize("mode", ["all", "extreme"])
def test_golden_grids_and_images(golden, mode, given_scores, maps):
    scores = golden["maps31"].mean((2, 3)) if given_scores else None
    out = selective_sample(golden["input"], golden[maps], scores, mode=mode, **BETAS)
    assert_near(out.discriminative.grid, golden[f"{mode}.grid_d"], 1e-4)
    assert_near(out.complementary.grid, golden[f"{mode}.grid_c"], 1e-4)
    assert_near(out.discriminative.image, golden[f"{mode}.image_d"], 1e-3)
    assert_near(out.complementary.image, golden[f"{mode}.image_c"], 1e-3)


def test_golden_resize_and_entropy(golden):
    assert_near(resize_maps(golden["maps"], (31, 31)), golden["maps31"], 1e-5)
    scores = golden["maps31"].mean((2, 3))
    for row, entropy in zip(scores, golden["entropy"].tolist()):
        assert oracle.gate(row.tolist(), 0.2, "paper")[0] == pytest.approx(entropy, abs=1e-5)
        # the package keeps H to itself: a threshold on either side of the recorded one must tell
        assert gate_weights(row[None], entropy + 1e-5).sum() == 1
        assert gate_weights(row[None], entropy - 1e-5).sum() == 5


@pytest.mark.parametrize("mode", ["all", "extreme"])
def test_golden_agrees_with_the_oracle(golden, mode):
    """The oracle too is held to the original, at the two kinds of image that the gate tells apart."""
    for i in (0, 1):
        out = oracle.sampling_grids(
            golden["maps"][i].double().numpy(),
            golden["maps31"][i].double().mean((1, 2)).tolist(),
            (64, 64),
            grid_size=(31, 31),
            beta_d=BETAS["beta_discriminative"],
            beta_c=BETAS["beta_complementary"],
            mode=mode,
        )
        for branch in "dc":
            assert_near(golden[f"{mode}.grid_{branch}"][i], out.grid[branch], 1e-4)


# the whole stage against the oracle

cases = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2**16),
        batch=st.integers(1, 3),
        classes=st.integers(1, 7),
        grid=st.tuples(st.integers(2, 10), st.integers(2, 10)),
        image=st.tuples(st.integers(4, 16), st.integers(4, 16)),
        map_size=st.tuples(st.integers(2, 7), st.integers(2, 7)),
        levels=st.sampled_from([None, None, 1, 2, 4]),
        spread=st.sampled_from([0.3, 2.0, 8.0]),
        gate=st.sampled_from(["paper", "renormalized"]),
        threshold=st.sampled_from([0.2, 1.0]),
        window=st.sampled_from([1, 3, 5]),
        peak_floor=st.sampled_from(["mean", "none"]),
        floor=st.sampled_from([0.01, 0.09, 1.0]),
        fwhm=st.sampled_from([2.0, 5.0, 13.0]),
        betas=st.tuples(st.sampled_from([0.5, 1.5, 3.95]), st.sampled_from([1.0, 4.0, 13.15])),
    )
)


def compare_with_oracle(mode, case, demand):
    generator = seeded(case["seed"])
    shape = (case["batch"], case["classes"])
    if case["levels"]:  # few levels, no resizing: plateaus and constants that are exact in float32 as well
        maps = torch.randint(0, case["levels"], (*shape, *case["grid"]), generator=generator) / 4
    else:
        maps = torch.randn(*shape, *case["map_size"], generator=generator)
    scores = torch.randn(*shape, generator=generator) * case["spread"]
    images = smooth_images(case["batch"], case["image"], case["seed"])
    options = {name: case[name] for name in ("window", "peak_floor", "floor", "fwhm")}
    beta_d, beta_c = case["betas"]
    zeta = torch.rand(case["batch"], *case["grid"], generator=seeded(case["seed"] + 1)).double().numpy()
    expected = [
        oracle.sampling_grids(
            maps[i].double().numpy(),
            scores[i].tolist(),
            case["image"],
            grid_size=case["grid"],
            beta_d=beta_d,
            beta_c=beta_c,
            mode=mode,
            zeta=zeta[i],
            gate_kind=case["gate"],
            delta=case["threshold"],
            **options,
        )
        for i in range(case["batch"])
    ]
    demand(min(one.margin for one in expected) > 1e-5)
    out = selective_sample(
        images,
        maps,
        scores,
        mode=mode,
        beta_discriminative=beta_d,
        beta_complementary=beta_c,
        gate=case["gate"],
        threshold=case["threshold"],
        grid_size=case["grid"],
        generator=seeded(case["seed"] + 1),
        **options,
    )
    for i, one in enumerate(expected):
        assert [tuple(cell) for cell in out.peaks[i].nonzero().tolist()] == one.peaks
        assert_near(out.response[i], one.response, 1e-5)
        for branch, weights, grid, warped in (
            ("d", one.weight_d, out.discriminative.grid[i], out.discriminative.image[i]),
            ("c", one.weight_c, out.complementary.grid[i], out.complementary.image[i]),
        ):
            held = (out.discriminative if branch == "d" else out.complementary).weights[i]
            for cell in one.peaks:
                assert held[cell].item() == pytest.approx(weights.get(cell, 0.0), abs=1e-5)
            assert_near(grid, one.grid[branch], 1e-5)
            assert_near(warped, oracle.sample_image(images[i].double().numpy(), one.grid[branch]), 1e-4)


@pytest.mark.parametrize("mode", PARTITION_MODES)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(case=cases)
def test_agrees_with_the_oracle(mode, case):
    compare_with_oracle(mode, case, assume)


@pytest.mark.parametrize("mode", PARTITION_MODES)
@pytest.mark.parametrize(("grid", "image"), [((31, 31), (40, 40)), ((13, 20), (24, 33))])
def test_agrees_with_the_oracle_at_the_papers_settings(mode, grid, image):
    case = dict(seed=3, batch=1, classes=7, grid=grid, image=image, map_size=(14, 14), levels=None, spread=1.0)
    case |= dict(gate="paper", threshold=0.2, window=3, peak_floor="mean", floor=0.09, fwhm=13.0)
    case |= dict(betas=(BETAS["beta_discriminative"], BETAS["beta_complementary"]))

    def demand(clear_cut):
        assert clear_cut

    compare_with_oracle(mode, case, demand)


# each step by itself


def test_attention_by_hand():
    response, weights = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    response[0, 1, 1], weights[0, 1, 1] = 0.5, 1
    for branch, amplitude in (("discriminative", 0.5), ("complementary", 2.0)):
        q = sampling_map(response, weights, 2.0, branch, floor=0.25)[0]
        assert q[1, 1].item() == pytest.approx(0.25 + amplitude)
        assert q[1, 3].item() == pytest.approx(0.25 + amplitude * math.exp(-4 / (0.5 * 4)))
        assert q[0, 2].item() == pytest.approx(0.25 + amplitude * math.exp(-2 / (0.5 * 4)))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-6, 1e-3])
@pytest.mark.parametrize("start", [4.0, 0.0])
@pytest.mark.parametrize("branch", ["discriminative", "complementary"])
def test_attention_of_a_vanishing_peak_is_finite(branch, start, value):
    response, weights = torch.full((1, 5, 5), value), torch.zeros(1, 5, 5)
    weights[0, 2, 2] = 1
    beta = torch.tensor([start], requires_grad=True)
    q = sampling_map(response, weights, beta, branch)
    warp_grid(q, (7, 7)).square().sum().backward()
    assert q.isfinite().all()
    assert beta.grad.isfinite().all()
    assert (q >= 0.09).all()


@pytest.mark.parametrize(("grid", "size"), [((31, 31), (64, 64)), ((2, 2), (5, 9)), ((7, 12), (30, 17))])
@pytest.mark.parametrize("value", [1e-3, 0.09, 7.3, 1e5])
def test_uniform_map_gives_the_identity(grid, size, value):
    assert_near(warp_grid(torch.full((2, *grid), value), size), identity(2, size), 1e-6)


def test_a_narrow_kernel_hardly_moves_anything_and_attention_magnifies():
    q = torch.full((1, 21, 21), 0.09)
    q[0, 10, 10] = 5.0
    size = (21, 21)
    assert_near(warp_grid(q, size, fwhm=0.2), identity(1, size), 1e-6)
    x = warp_grid(q, size)[0, 10, :, 0]
    # around the peak neighbors read from places that lie closer together: the peak grows
    assert (x[11] - x[9]).item() < 0.8 * 2 * 2 / 20
    assert x[10].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("grid", [(9, 9), (6, 11)])
def test_a_given_gaussian_kernel_equals_the_separable_form(grid):
    q = 0.09 + torch.rand(2, *grid, generator=seeded(0))
    kernel = torch.as_tensor(oracle.gaussian(grid, 5.0))
    assert_near(warp_grid(q, (20, 14), kernel=kernel), warp_grid(q, (20, 14), fwhm=5.0), 1e-5)


def test_a_kernel_that_is_not_separable_agrees_with_the_oracle():
    grid = (6, 9)
    q = 0.09 + torch.rand(1, *grid, generator=seeded(0))
    kernel = 0.1 + torch.rand(11, 17, generator=seeded(1))
    expected = oracle.resize_grid(oracle.warp(q[0].double().numpy(), kernel.double().numpy()), (12, 7))
    assert_near(warp_grid(q, (12, 7), kernel=kernel)[0], expected, 1e-5)


def test_resample_reads_the_border_outside_and_corners_at_one():
    image = torch.arange(1.0, 7.0).view(1, 1, 2, 3)
    grid = torch.tensor([[[[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [1.5, 1.0], [3.0, 0.0]]]])
    assert_near(resample(image, grid)[0, 0], [[1.0, 6.0, 3.5, 6.0, 4.5]], 1e-6)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("y", "x"), [(4, 4), (0, 4), (8, 8), (4, 0)])
def test_the_papers_zeros_outside_would_change_nothing(border, y, x):
    """Values and gradients, also where attention pushes the image's border out of the grid.

    A coordinate of 1 may round to 1 + 2⁻²³, of which zeros would take 2⁻²³ · 19 / 2 of the pixel's value away: values
    of 1 agree to 2e-6, and sums over 1,200 pixels with positions in units of half the image to 1e-4.
    """
    images = torch.rand(2, 3, 20, 20, generator=seeded(0), requires_grad=True)
    response = torch.zeros(2, 9, 9)
    response[0, y, x], response[:, 6, 2] = 1.0, 0.6
    (beta,) = betas(1.5)
    grid = warp_grid(sampling_map(response, response, beta), (20, 20), 4, border=border)
    assert grid.abs().max() <= 1 + 2**-22
    zeros = F.grid_sample(images, grid, padding_mode="zeros", align_corners=True)
    ours = resample(images, grid)
    assert_near(ours, zeros, 2e-6)
    per_pixel = torch.rand(ours.shape, generator=seeded(1))
    gradients = [torch.autograd.grad((out * per_pixel).sum(), (beta, images), retain_graph=True)
                 for out in (ours, zeros)]
    assert gradients[0][0].abs() > 0.1
    for ours, theirs in zip(*gradients):
        assert_near(ours, theirs, 1e-4)


@pytest.mark.parametrize("size", [None, (10, 10)])
def test_a_width_that_is_no_number_is_seen_in_the_images(size):
    """A run that has diverged must not train on what the samplers read at coordinates that are no numbers.

    Nor may their backward pass end the process, as torch's does on a CPU.
    """
    beta = torch.tensor([math.nan], requires_grad=True)
    out = sample_response(
        smooth_images(2, (20, 20)), torch.rand(2, 9, 9, generator=seeded(0)), mode="expected", grid_size=9, size=size,
        beta_discriminative=beta, beta_complementary=torch.tensor([4.0]),
    )
    out.discriminative.image.sum().backward()
    assert out.discriminative.image.isnan().all()
    assert out.complementary.image.isfinite().all()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [None, (10, 10)])
def test_warped_images_keep_the_memory_format(layout, size):
    images = smooth_images(2, (20, 20)).contiguous(memory_format=layout)
    maps, scores = torch.randn(2, 6, 7, 7, generator=seeded(0)), torch.randn(2, 6, generator=seeded(1))
    out = selective_sample(images, maps, scores, mode="expected", size=size, **BETAS)
    for branch in (out.discriminative, out.complementary):
        assert branch.image.is_contiguous(memory_format=layout)


# what a batch may hold


@pytest.mark.parametrize("mode", PARTITION_MODES)
def test_an_image_without_peaks_is_left_alone(mode):
    maps = torch.randn(2, 5, 9, 9, generator=seeded(0))
    maps[1] = torch.arange(5.0)[:, None, None]
    images = torch.rand(2, 3, 16, 21, generator=seeded(1))
    out = selective_sample(images, maps, torch.zeros(2, 5), mode=mode, **SMALL)
    assert out.peaks[0].any()
    assert not out.peaks[1].any()
    for grid, warped in (
        (out.discriminative.grid, out.discriminative.image),
        (out.complementary.grid, out.complementary.image),
    ):
        assert_near(grid[1:], identity(1, (16, 21)), 1e-6)
        assert_near(warped[1], images[1], 1e-5)


@pytest.mark.parametrize("grid_size", [9, 31])
@pytest.mark.parametrize("value", [0.3, -4.7, 1e-3, 123.456])
def test_a_constant_map_stays_without_peaks_when_it_is_resized(value, grid_size):
    """Interpolation in float32 turns a constant into a constant plus rounding, which is no response."""
    maps = torch.full((1, 7, 14, 14), value) * torch.linspace(0.5, 1.5, 7)[:, None, None]
    out = selective_sample(
        torch.rand(1, 3, 8, 8), maps, torch.zeros(1, 7), mode="all", **BETAS, grid_size=grid_size
    )
    assert not out.peaks.any()
    assert_near(out.complementary.grid, identity(1, (8, 8)), 1e-6)


@pytest.mark.parametrize("kept", ["discriminative", "complementary"])
def test_a_branch_left_out_is_none(kept):
    maps, images = torch.randn(1, 6, 7, 7, generator=seeded(0)), smooth_images(1, (12, 12))
    both = selective_sample(images, maps, None, mode="all", **SMALL)
    left_out = "complementary" if kept == "discriminative" else "discriminative"
    options = {**SMALL, f"beta_{left_out}": None}
    one = selective_sample(images, maps, None, mode="all", branches=(kept,), **options)
    assert getattr(one, left_out) is None
    for ours, theirs in zip((one.response, one.peaks, *getattr(one, kept)), (*both[:2], *getattr(both, kept))):
        assert torch.equal(ours, theirs)


def test_response_attention_takes_the_response_for_density():
    maps, images = torch.randn(1, 6, 5, 5, generator=seeded(0)), smooth_images(1, (12, 10))
    sure = 20 * F.one_hot(torch.tensor([2]), 6).float()
    out = selective_sample(images, maps, sure, mode="all", attention="response", **SMALL)
    density = 0.09 + oracle.normalize(oracle.resize(maps[0, 2].double().numpy(), (9, 9)))
    grid = oracle.resize_grid(oracle.warp(density, oracle.gaussian((9, 9), 4)), (12, 10))
    assert_near(out.discriminative.sampling_map[0], density, 1e-5)
    assert_near(out.discriminative.grid[0], grid, 1e-4)
    assert torch.equal(out.discriminative.grid, out.complementary.grid)
    assert not out.peaks.any()
    assert out.discriminative.weights is None


def test_saliency_attention_samples_by_the_response_as_it_is_and_teaches_it():
    saliency = torch.randn(1, 5, 5, generator=seeded(0)).flatten(1).softmax(1).view(1, 5, 5).requires_grad_()
    images = smooth_images(1, (12, 10))
    betas = dict(beta_discriminative=None, beta_complementary=None)
    out = sample_response(images, saliency, mode="all", attention="saliency", grid_size=9, fwhm=4, **betas)
    density = 0.09 + oracle.resize(saliency[0].detach().double().numpy(), (9, 9))
    grid = oracle.resize_grid(oracle.warp(density, oracle.gaussian((9, 9), 4)), (12, 10))
    assert_near(out.discriminative.grid[0].detach(), grid, 1e-4)
    assert torch.equal(out.discriminative.grid, out.complementary.grid)
    out.discriminative.grid.square().sum().backward()
    assert saliency.grad.isfinite().all()
    assert saliency.grad.any()


# gradients


def betas(*values):
    return [nn.Parameter(torch.tensor([float(value)])) for value in values]


@pytest.mark.parametrize("mode", ["all", "extreme", "expected"])
@pytest.mark.parametrize("start", [(1.5, 4.0), (3.95, 13.15)])
def test_beta_gradients_match_finite_differences_of_the_oracle_at_the_grid(mode, start):
    maps, scores = torch.randn(1, 6, 7, 7, generator=seeded(5)), torch.linspace(0, 1, 6)[None]
    size = (11, 14)
    cotangent = torch.randn(*size, 2, generator=seeded(6), dtype=torch.float64)
    beta_d, beta_c = betas(*start)
    out = selective_sample(
        smooth_images(1, size),
        maps,
        scores,
        mode=mode,
        beta_discriminative=beta_d,
        beta_complementary=beta_c,
        grid_size=9,
        fwhm=4,
    )
    for grid in (out.discriminative.grid, out.complementary.grid):
        (grid[0] * cotangent.float()).sum().backward()

    def loss(branch, beta):
        one = oracle.sampling_grids(
            maps[0].double().numpy(),
            scores[0].tolist(),
            size,
            grid_size=(9, 9),
            beta_d=beta,
            beta_c=beta,
            mode=mode,
            fwhm=4,
        )
        assert one.margin > 1e-4
        return (one.grid[branch] * cotangent.numpy()).sum()

    for branch, beta in (("d", beta_d), ("c", beta_c)):
        value = beta.item()
        slope = (loss(branch, value + 1e-4) - loss(branch, value - 1e-4)) / 2e-4
        assert abs(slope) > 1e-3
        assert beta.grad.item() == pytest.approx(slope, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("mode", PARTITION_MODES)
def test_beta_gradients_are_zero_without_peaks(mode):
    beta_d, beta_c = betas(1.5, 4)
    out = selective_sample(
        torch.rand(2, 3, 8, 8),
        torch.ones(2, 5, 9, 9),
        torch.zeros(2, 5),
        mode=mode,
        beta_discriminative=beta_d,
        beta_complementary=beta_c,
        grid_size=9,
    )
    (out.discriminative.image.square().sum() + out.complementary.image.square().sum()).backward()
    assert beta_d.grad.tolist() == [0]
    assert beta_c.grad.tolist() == [0]


def test_a_branch_that_drew_no_peak_gives_its_beta_zero():
    maps = torch.zeros(1, 1, 9, 9)
    maps[0, 0, 4, 4] = 1  # R = 1 exceeds every draw: T_c is empty
    beta_d, beta_c = betas(1.5, 4)
    out = selective_sample(
        torch.rand(1, 3, 8, 8),
        maps,
        torch.zeros(1, 1),
        mode="probability",
        beta_discriminative=beta_d,
        beta_complementary=beta_c,
        grid_size=9,
    )
    (out.discriminative.grid.square().sum() + out.complementary.grid.square().sum()).backward()
    assert beta_d.grad.abs().item() > 1e-3
    assert beta_c.grad.tolist() == [0]
    assert_near(out.complementary.grid.detach(), identity(1, (8, 8)), 1e-6)


@pytest.mark.parametrize("attention", ["sparse", "response"])
@pytest.mark.parametrize("image_learns", [True, False])
def test_gradients_reach_the_image_and_neither_maps_nor_scores(attention, image_learns):
    images = smooth_images(2, (12, 12)).requires_grad_(image_learns)
    maps = torch.randn(2, 6, 7, 7, generator=seeded(0), requires_grad=True)
    scores = torch.randn(2, 6, generator=seeded(1), requires_grad=True)
    beta_d, beta_c = betas(1.5, 4)
    out = selective_sample(
        images,
        maps,
        scores,
        mode="expected",
        attention=attention,
        beta_discriminative=beta_d,
        beta_complementary=beta_c,
        grid_size=9,
    )
    learns = out.discriminative.image.square().sum() + out.complementary.image.square().sum()
    assert not out.response.requires_grad
    if attention == "sparse" or image_learns:
        learns.backward()
    assert learns.requires_grad == (attention == "sparse" or image_learns)
    assert maps.grad is None
    assert scores.grad is None
    if image_learns:
        assert images.grad.isfinite().all()
        assert images.grad.any()
    for beta in (beta_d, beta_c):
        assert (beta.grad is not None and beta.grad.isfinite().all()) == (attention == "sparse")


@pytest.mark.parametrize("branch", ["discriminative", "complementary"])
def test_attention_sends_no_gradient_to_response_and_weights(branch):
    response = torch.rand(1, 5, 5, generator=seeded(0)).requires_grad_()
    weights = torch.rand(1, 5, 5, generator=seeded(1)).requires_grad_()
    (beta,) = betas(2.0)
    sampling_map(response, weights, beta, branch).square().sum().backward()
    assert response.grad is None
    assert weights.grad is None
    assert beta.grad.any()


# dtypes, compilation, export


@pytest.mark.parametrize("mode", PARTITION_MODES)
def test_autocast_changes_nothing(mode):
    images, maps = smooth_images(2, (20, 20)), torch.randn(2, 6, 7, 7, generator=seeded(0))
    scores = torch.randn(2, 6, generator=seeded(1))

    def run():
        return selective_sample(images, maps, scores, mode=mode, generator=seeded(2), **BETAS)

    outside = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    for value, expected in zip(tensors(inside), tensors(outside), strict=True):
        assert value.dtype == (torch.bool if value is inside.peaks else torch.float32)
        assert torch.equal(value, expected)


@pytest.mark.parametrize("function", [
    lambda maps, scores: gate_response(maps, scores, threshold=0),
    lambda maps, scores: project_response(maps, torch.eye(6) + 0.01 * maps[:1, 0, :6, :6].sum(0), scores, threshold=0),
    lambda maps, scores: sampling_map(maps[:, 0].sigmoid(), maps[:, 1].relu(), beta=2.0),
    lambda maps, scores: warp_grid(maps[:, 0].sigmoid(), (20, 20)),
], ids=["gate_response", "project_response", "sampling_map", "warp_grid"])
def test_autocast_changes_no_function(function):
    maps, scores = torch.randn(2, 6, 7, 7, generator=seeded(0)), torch.randn(2, 6, generator=seeded(1))
    expected = function(maps, scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(maps, scores), expected)


class RoundedProducts(TorchFunctionMode):
    """Matrix products of operands with 10 bits of mantissa, as GPUs have them where TF32 is allowed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("matmul", "__matmul__"):
            args = [((each.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for each in args]
        return func(*args, **(kwargs or {}))


def test_rounded_products_hardly_move_the_grid():
    size = 448
    response = torch.rand(4, 31, 31, generator=seeded(0))
    peaks = (torch.rand(4, 31, 31, generator=seeded(1)) > 0.998).float()
    q = sampling_map(response, peaks, beta=3.9)
    exact = warp_grid(q, (size, size))
    with RoundedProducts():
        rounded = warp_grid(q, (size, size))
    pixels = (rounded - exact).abs() * (size - 1) / 2
    assert 0 < pixels.max() < 0.1
    assert pixels.mean() < 0.015


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_image_comes_back_in_its_own_dtype(dtype):
    images, maps = smooth_images(1, (20, 20)), torch.randn(1, 6, 7, 7, generator=seeded(0)).to(dtype)
    scores = torch.randn(1, 6, generator=seeded(1)).to(dtype)
    out = selective_sample(images.to(dtype), maps, scores, mode="expected", **BETAS)
    full = selective_sample(images, maps.float(), scores.float(), mode="expected", **BETAS)
    assert out.discriminative.image.dtype == out.complementary.image.dtype == dtype
    assert torch.equal(out.discriminative.grid, full.discriminative.grid)
    assert_near(out.discriminative.image.float(), full.discriminative.image, 1e-2)


@pytest.mark.parametrize("mode", PARTITION_MODES)
def test_compiles_once_whatever_the_number_of_peaks(mode):
    torch._dynamo.reset()
    images, scores = smooth_images(2, (10, 12)), torch.zeros(2, 5)
    few, many = torch.zeros(2, 5, 9, 9), torch.rand(2, 5, 9, 9, generator=seeded(0))
    few[:, :, 4, 4] = 1
    counter = CompileCounter()  # counts graphs and runs them as they are

    def run(maps):
        return selective_sample(images, maps, scores, mode=mode, **SMALL)

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=False)
    counts = []
    for maps in (few, many, torch.zeros(2, 5, 9, 9)):
        torch.manual_seed(0)
        plain = run(maps)
        torch.manual_seed(0)
        out = compiled(maps)
        counts.append(out.peaks[0].sum().item())
        for ours, theirs in zip(tensors(out), tensors(plain), strict=True):
            assert_near(ours.float(), theirs.float(), 1e-6)
    assert counts[0] == 1
    assert counts[1] > 3
    assert counts[2] == 0
    assert counter.frame_count == 1


class Wrapper(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.beta_d, self.beta_c = betas(1.5, 4)

    def forward(self, images, maps, scores):
        out = selective_sample(
            images,
            maps,
            scores,
            mode=self.mode,
            beta_discriminative=self.beta_d,
            beta_complementary=self.beta_c,
            grid_size=9,
        )
        return out.discriminative.image, out.complementary.image


@pytest.mark.parametrize("mode", ["expected", "extreme"])  # what the presets evaluate with
def test_exports_with_a_dynamic_batch(mode):
    model = Wrapper(mode)
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (smooth_images(3, (10, 12)), torch.rand(3, 6, 5, 5), torch.rand(3, 6))
    program = torch.export.export(model, example, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    inputs = (smooth_images(5, (10, 12), 1), torch.rand(5, 6, 5, 5, generator=seeded(1)), torch.rand(5, 6))
    torch.manual_seed(0)
    plain = model(*inputs)
    torch.manual_seed(0)
    for ours, theirs in zip(program.module()(*inputs), plain):
        assert_near(ours, theirs, 1e-5)


# errors


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(image=torch.zeros(3, 8, 8)), "image"),
        (dict(image=torch.zeros(2, 3, 8, 8)), "image .* maps"),
        (dict(maps=torch.zeros(1, 6, 5)), "maps"),
        (dict(scores=torch.zeros(1, 5)), "maps .* scores"),
        (dict(mode="best"), "mode"),
        (dict(gate="entropy"), "gate"),
        (dict(attention="dense"), "attention"),
        (dict(grid_size=1), "grid_size"),
        (dict(grid_size=(9, 1)), "grid_size"),
        (dict(grid_size=(9, 9, 9)), "grid_size"),
        (dict(window=4), "window"),
        (dict(floor=float("nan"), attention="response"), "floor"),
        (dict(peak_floor="median"), "peak_floor"),
        (dict(branches=("original",)), "branch"),
        (dict(branches=("original",), attention="response"), "branch"),
        (dict(beta_discriminative=None), "beta_discriminative"),
        (dict(beta_complementary=None), "beta_complementary"),
        (dict(kernel=torch.ones(5, 5)), "kernel"),
    ],
)
def test_errors_name_the_argument(changes, name):
    arguments = dict(image=torch.zeros(1, 3, 8, 8), maps=torch.zeros(1, 6, 5, 5), scores=torch.zeros(1, 6), mode="all")
    with pytest.raises(ValueError, match=name):
        selective_sample(**{**arguments, **SMALL, **changes})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda q: sampling_map(q, q, 1.0, "original"), "branch"),
        (lambda q: sampling_map(q[0], q[0], 1.0), "response and weights"),
        (lambda q: sampling_map(q, q[:, :2], 1.0), "response and weights"),
        (lambda q: warp_grid(q[0], (4, 4)), "sampling_map"),
        (lambda q: warp_grid(q[:, :1], (4, 4)), "sampling_map"),
        (lambda q: warp_grid(q, (4, 4), kernel=torch.ones(4, 5)), "kernel"),
    ],
)
def test_errors_of_the_steps_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call(torch.ones(1, 3, 3))
