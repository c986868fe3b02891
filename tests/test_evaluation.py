import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import s3n_timm
from s3n_timm import evaluation, find_peaks, partition_peaks, sampling_map, warp_grid
from s3n_timm.data import PARTS, drawn_birds
from s3n_timm.evaluation import Crop

NAN = math.nan


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def identity(size, batch=1):
    y, x = torch.meshgrid(torch.linspace(-1, 1, size[0]), torch.linspace(-1, 1, size[1]), indexing="ij")
    return torch.stack([x, y], -1).expand(batch, *size, 2).clone()


def pixel_error(grid, other):
    """Largest of both distances in pixels, B×H×W."""
    return ((grid - other).abs() * tensor([grid.shape[2] - 1, grid.shape[1] - 1]) / 2).amax(-1)


def read(field, grid):
    return F.grid_sample(field.permute(0, 3, 1, 2), grid, align_corners=True).permute(0, 2, 3, 1)


def real_warps(size, beta, peaks, batch=3, seed=0):
    response = torch.rand(batch, 31, 31, generator=seeded(seed))
    weights = (torch.rand(batch, 31, 31, generator=seeded(seed + 1)) < peaks / 31**2).float()
    return warp_grid(sampling_map(response, weights, beta, "discriminative", 0.09), size)


def assert_close(actual, expected, atol=1e-5):
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=0, equal_nan=True)


# annotations in the model's input


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(40, 160),
    width=st.integers(40, 160),
    x=st.floats(0.1, 0.9),
    y=st.floats(0.1, 0.9),
    img_size=st.one_of(st.integers(48, 128), st.tuples(st.integers(48, 128), st.integers(48, 128))),
    crop_pct=st.sampled_from([None, 0.7467, 0.9, 1.0]),
    crop_mode=st.sampled_from([None, "center", "squash", "border"]),
)
def test_transform_points_finds_a_marked_pixel_again(height, width, x, y, img_size, crop_pct, crop_mode):
    column, row = int(x * width), int(y * height)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[row - 1:row + 2, column - 1:column + 2] = 255
    given = dict(img_size=img_size) if isinstance(img_size, int) else dict(input_size=(3, *img_size))
    given |= dict(crop_pct=crop_pct, crop_mode=crop_mode, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    config = resolve_data_config(given)
    seen = create_transform(**config)(Image.fromarray(pixels))[0].double()
    points, kept = evaluation.transform_points(
        tensor([[[column + 0.5, row + 0.5]]]), tensor([[height, width]]), Crop.from_config(config),
    )
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert seen.shape == size
    px, py = points[0, 0].tolist()
    assert kept.item() == (0 <= px <= size[1] and 0 <= py <= size[0])
    # the mark with its blur must lie within the input whole, else its center of mass is not its center
    reach = 1.5 + 3 * max(size[0] / height, size[1] / width, 1) / 0.7
    if reach <= px <= size[1] - reach and reach <= py <= size[0] - reach:
        ys, xs = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
        assert abs((seen.sum(0) * xs).sum() / seen.sum() - px) < 0.3
        assert abs((seen.sum(1) * ys).sum() / seen.sum() - py) < 0.3
    elif not (-reach <= px <= size[1] + reach and -reach <= py <= size[0] + reach):
        assert seen.sum() == 0


def test_transform_boxes_by_hand():
    # 400 × 200 pixels squashed to 100 × 100, of which the middle 80 × 80 is left: x/4 - 10, y/2 - 10
    sizes = tensor([[200, 400]]).expand(4, 2)
    boxes = tensor([[80.0, 40, 160, 120], [0, 0, 400, 200], [0, 0, 30, 200], [0, 190, 400, 200]])
    moved, kept = evaluation.transform_boxes(boxes, sizes, Crop((80, 80), 0.8, "squash"))
    assert_close(moved[:2], [[10.0, 10, 30, 50], [0, 0, 80, 80]])
    assert kept.tolist() == [True, True, False, False]
    # the short side to 100, the long one to 200: x/2 - 60, y/2 - 10
    moved, kept = evaluation.transform_boxes(boxes, sizes, Crop((80, 80), 0.8))
    assert_close(moved[1], [0.0, 0, 80, 80])
    assert_close(moved[0], [0.0, 10, 20, 50])
    assert kept.tolist() == [True, True, False, False]
    assert ((moved >= 0) & (moved <= 80)).all()
    # the long side to 100, the short one to 50, padded to 80: x/4 - 10, y/4 + 15
    moved, _ = evaluation.transform_boxes(boxes, sizes, Crop((80, 80), 0.8, "border"))
    assert_close(moved[1], [0.0, 15, 80, 65])


def test_transform_takes_each_image_for_itself():
    sizes, boxes = tensor([[50, 100], [100, 50]]), tensor([[50.0, 25, 100, 50], [25, 50, 50, 100]])
    moved, kept = evaluation.transform_boxes(boxes, sizes, Crop((50, 50), 1.0))
    assert_close(moved, [[25.0, 25, 50, 50], [25, 25, 50, 50]])
    assert kept.all()
    points, kept = evaluation.transform_points(tensor([[[10.0, 10]], [[10, 30]]]), sizes, Crop((50, 50), 1.0))
    assert_close(points, [[[-15.0, 10]], [[10, 5]]])
    assert kept.tolist() == [[False], [True]]


def test_transform_rejects_wrong_arguments():
    sizes = tensor([[50, 100]])
    with pytest.raises(ValueError, match=r"mode must be .*'crop'"):
        evaluation.transform_boxes(torch.zeros(1, 4), sizes, Crop((50, 50), mode="crop"))
    with pytest.raises(ValueError, match="sizes must be B×2"):
        evaluation.transform_boxes(torch.zeros(1, 4), torch.ones(1, 3), Crop((50, 50)))
    with pytest.raises(ValueError, match="boxes must be B×4"):
        evaluation.transform_boxes(torch.zeros(2, 4), sizes, Crop((50, 50)))
    with pytest.raises(ValueError, match="points must be B×N×2"):
        evaluation.transform_points(torch.zeros(1, 2), sizes, Crop((50, 50)))


# peaks


def test_peak_pixels_lie_on_pixel_centers():
    pixels = evaluation.peak_pixels((3, 2), (5, 9))
    assert pixels.shape == (3, 2, 2)
    assert pixels[:, 0].tolist() == [[0.5, 0.5], [0.5, 2.5], [0.5, 4.5]]
    assert pixels[0, :].tolist() == [[0.5, 0.5], [8.5, 0.5]]


def test_hits_by_hand():
    # cells of a 3 × 3 grid on 5 × 9 pixels lie at x = 0.5, 4.5, 8.5 and y = 0.5, 2.5, 4.5
    peaks = torch.zeros(4, 3, 3, dtype=torch.bool)
    peaks[0, 0, 0] = peaks[0, 1, 1] = peaks[0, 1, 2] = peaks[0, 2, 1] = True
    peaks[1, 0, 2] = True
    peaks[3] = True
    boxes = tensor([[4.0, 2, 9, 3], [8, 1, 9, 5], [0, 0, 9, 5], [0, 0, 9, 5]])
    hits, total = evaluation.count_hits(peaks, boxes, (5, 9))
    assert hits.tolist() == [2, 0, 0, 9]
    assert total.tolist() == [4, 1, 0, 9]
    assert evaluation.hit_rate(hits, total).item() == pytest.approx((0.5 + 0 + 1) / 3)
    assert evaluation.hit_histogram(hits).tolist() == [2, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert evaluation.hit_rate(tensor([0]), tensor([0])).isnan()
    with pytest.raises(ValueError, match="boxes B×4"):
        evaluation.count_hits(peaks, boxes[:2], (5, 9))


def test_nearest_parts_by_hand():
    response = torch.zeros(4, 5, 5)  # cells at 0.5, 2.5, …, 8.5 of 9 × 9 pixels
    for row, column, value in ((0, 0, 0.9), (4, 4, 0.2), (0, 4, 0.5)):
        response[:2, row, column] = value
    response[2, 4, 0] = 1
    peaks = response > 0
    near, far, low = [1, 1, 1], [8, 7, 1], [0, 8, 1]
    parts = tensor([
        [near, far, low],  # strongest: near, weakest: far
        [[1, 1, 0], far, low],  # near is not visible: (0.5, 0.5) goes to low
        [near, far, low],  # the only peak goes to low twice
        [near, far, low],  # no peak
    ]).float()
    strongest, weakest = evaluation.nearest_parts(response, peaks, parts, (9, 9))
    assert strongest.tolist() == [0, 2, 2, -1]
    assert weakest.tolist() == [1, 1, 2, -1]
    invisible = parts * tensor([1, 1, 0])
    assert evaluation.nearest_parts(response, peaks, invisible, (9, 9))[0].tolist() == [-1] * 4
    with pytest.raises(ValueError, match="parts must be B×P×3"):
        evaluation.nearest_parts(response, peaks, parts[..., :2], (9, 9))


# warps


def test_identity_inverts_to_itself():
    grid = identity((20, 31))
    inverse, shown = evaluation.invert_warp(grid)
    assert_close(inverse, grid)
    assert shown.all()


@settings(max_examples=25, deadline=None)
@given(
    power_x=st.floats(-0.8, 0.8), power_y=st.floats(-0.8, 0.8), height=st.integers(16, 70), width=st.integers(16, 70),
)
def test_separable_warps_with_known_inverse(power_x, power_y, height, width):
    # x -> x + a(1 - x²)/2 keeps ±1 and is monotone for |a| < 1; a quadratic equation inverts it
    grid = identity((height, width))
    a = tensor([power_x, power_y])
    warp = grid + a / 2 * (1 - grid**2)
    exact = torch.where(a.abs() < 1e-3, grid - a / 2 * (1 - grid**2),
                        (1 - (1 + a**2 - 2 * a * grid).clamp_min(0).sqrt()) / a)
    inverse, shown = evaluation.invert_warp(warp)
    assert shown.all()
    # the grid is linear between pixels, the function isn't: worst where the slope 1 - |a| is small
    assert pixel_error(inverse, exact).max() < 0.75
    assert pixel_error(read(warp, inverse), grid).max() < 0.02


@pytest.mark.parametrize("size", [(41, 41), (33, 65)])
def test_zoom_shows_the_middle_alone(size):
    grid = identity(size)
    zoom = grid * 0.5 + tensor([0.25, -0.25])
    inverse, shown = evaluation.invert_warp(zoom)
    exact = (grid - tensor([0.25, -0.25])) * 2
    distance = ((exact.abs() - 1).clamp_min(0) / 2 * tensor([size[1] - 1, size[0] - 1]) / 2).amax(-1)
    assert shown[distance == 0].all()
    assert not shown[distance > 0.51].any()
    inside = (exact.abs() <= 1).all(-1)
    assert pixel_error(inverse, exact)[inside].max() < 0.01


@pytest.mark.parametrize("size", [(64, 64), (50, 90)])
@pytest.mark.parametrize(("beta", "peaks"), [(3.95, 1), (3.95, 12), (1.0, 40), (13.15, 3)])
def test_real_warps_compose_to_the_identity(size, beta, peaks):
    grid = real_warps(size, beta, peaks)
    inverse, shown = evaluation.invert_warp(grid)
    assert inverse.abs().max() <= 1
    error = pixel_error(read(grid, inverse), identity(size, len(grid)))
    assert error[shown].max() <= 0.51
    # half a pixel is for the edge of what is shown alone
    inner = F.max_pool2d(F.pad(1 - shown.float(), (1, 1, 1, 1), value=1), 3, stride=1) == 0
    assert error[inner].max() < 0.02
    assert inner.float().mean() > 0.75
    # the other way round: what each pixel of the warped image shows is a shown pixel
    reached = (evaluation.grid_to_pixels(grid, size)).floor().long().flatten(1, 2)
    columns, rows = reached[..., 0].clamp_max(size[1] - 1), reached[..., 1].clamp_max(size[0] - 1)
    covered = torch.zeros_like(shown)
    for i in range(len(grid)):
        covered[i, rows[i], columns[i]] = True
    assert (covered & ~shown).float().mean() < 0.004
    # and where the warp is not clamped, the inverse leads back to the pixel
    back = read(inverse, grid)
    clear = (grid.abs() < 0.9).all(-1)
    assert pixel_error(back, identity(size, len(grid)))[clear].max() < 1


def test_warps_that_leave_much_out():
    response, weights = torch.full((1, 31, 31), 1.0), torch.zeros(1, 31, 31)
    weights[0, 4, 26] = 1
    grid = warp_grid(sampling_map(response, weights, 3.0, "discriminative", 0.001), (48, 48))
    inverse, shown = evaluation.invert_warp(grid)
    assert shown[0, 6, 41]
    # what lies beyond the peak is drawn in from the border; what lies far from it is left alone
    assert not shown[0, 0, 25:].any()
    assert shown[0, 47, 0]
    assert 0.8 < shown.float().mean() < 0.96
    assert pixel_error(read(grid, inverse), identity((48, 48)))[shown].max() <= 0.51


def test_one_image_does_not_depend_on_the_others():
    grid = real_warps((32, 32), 3.95, 6)
    alone = torch.cat([evaluation.invert_warp(one[None])[0] for one in grid])
    assert pixel_error(alone, evaluation.invert_warp(grid)[0]).max() < 0.05


def test_carry_back_undoes_the_warp():
    size = (64, 64)
    coarse = torch.rand(3, 2, 5, 5, generator=seeded(2))
    full = F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)
    grid = real_warps(size, 3.95, 4)
    warped = F.grid_sample(full, grid, align_corners=True)
    carried = evaluation.carry_back(warped, grid)
    shown = evaluation.invert_warp(grid)[1][:, None].expand_as(full)
    assert carried.shape == full.shape
    assert (carried - full).abs()[shown].max() < 0.05
    assert (carried[~shown] == 0).all()
    assert (~shown).any()
    # a coarse map of the identity is the resized map
    assert_close(evaluation.carry_back(coarse, identity(size, 3)), full)
    with pytest.raises(ValueError, match="maps must be B×C×h×w with B = 3"):
        evaluation.carry_back(coarse[:2], grid)
    with pytest.raises(ValueError, match="grid must be B×H×W×2"):
        evaluation.carry_back(coarse, grid[..., :1])


def test_magnification_of_the_identity_is_one():
    grid = identity((32, 48), 2)
    assert_close(evaluation.magnification(grid), torch.ones(2, 32, 48), atol=1e-3)
    assert_close(evaluation.box_magnification(grid, tensor([[0.0, 0, 48, 32], [3, 4, 20, 10]])), [1.0, 1.0])
    assert_close(evaluation.magnification(grid, tensor([[[0.5, 0.5]], [[20.0, 7]]])), [[1.0], [1.0]], atol=1e-3)
    assert evaluation.box_magnification(grid[:1], tensor([[3.0, 3, 3.2, 9]])).isnan().all()


def test_magnification_of_a_zoom_is_its_area_scale():
    grid = identity((65, 65)) * 0.5
    scale = evaluation.magnification(grid)[0]
    assert_close(scale[17:48, 17:48], torch.full((31, 31), 4.0), atol=0.01)
    assert (scale[:15] == 0).all()
    assert evaluation.box_magnification(grid, tensor([[20.0, 20, 45, 45]])).item() == pytest.approx(4, rel=0.05)
    points = tensor([[[32.5, 32.5], [20, 40], [3, 3]]])
    assert_close(evaluation.magnification(grid, points), [[4.0, 4.0, 0.0]], atol=0.01)
    # one axis alone: twice the area
    assert evaluation.magnification(identity((65, 65)) * tensor([0.5, 1]))[0, 32, 32].item() == pytest.approx(2, 0.01)


def test_magnification_over_a_box_is_the_mean_of_the_map():
    size = (96, 96)
    grid = real_warps(size, 3.95, 5)
    boxes = tensor([[20.0, 20, 76, 76]]).expand(3, 4)
    expected = evaluation.magnification(grid)[:, 20:76, 20:76].mean((1, 2))
    torch.testing.assert_close(evaluation.box_magnification(grid, boxes), expected, rtol=0.03, atol=0)


def test_point_magnification_reads_the_map():
    size = (48, 64)
    grid = real_warps(size, 3.95, 5)
    points = tensor([[[20.5, 20.5], [40.5, 30.5]]]).expand(3, 2, 2)
    expected = evaluation.magnification(grid)[:, [20, 30], [20, 40]]
    torch.testing.assert_close(evaluation.magnification(grid, points), expected, rtol=0.01, atol=1e-3)
    with pytest.raises(ValueError, match="points must be"):
        evaluation.magnification(grid, points[0])
    with pytest.raises(ValueError, match="boxes must be"):
        evaluation.box_magnification(grid, torch.zeros(1, 4))


# localization


def test_largest_region_by_hand():
    maps = torch.zeros(6, 6, 8)
    maps[0, 1:3, 2:5] = 1.0  # 6 pixels
    maps[0, 4:6, 6:8] = 5.0  # 4 pixels, stronger: 20 % of 5 is 1.0, which 1.0 does not exceed
    maps[1, 1:3, 2:5] = 1.1
    maps[1, 4:6, 6:8] = 5.0
    maps[2, 0, 0] = maps[2, 1, 1] = maps[2, 2, 2] = 1  # connected at the corners
    maps[2, 5, 4:6] = 1
    maps[3] = -1
    maps[4] = 7
    maps[5, 0, 0:2] = maps[5, 5, 6:8] = 1  # equally large
    expected = [[6.0, 4, 8, 6], [2, 1, 5, 3], [0, 0, 3, 3], [0, 0, 0, 0], [0, 0, 8, 6], [0, 0, 2, 1]]
    assert_close(evaluation.largest_region_box(maps), expected)
    assert_close(evaluation.largest_region_box(maps[:1], threshold=0.1), [[2.0, 1, 5, 3]])
    with pytest.raises(ValueError, match="maps must be B×H×W"):
        evaluation.largest_region_box(maps[0])
    with pytest.raises(ValueError, match="threshold must"):
        evaluation.largest_region_box(maps, threshold=20)


def test_box_iou_and_localization_by_hand():
    boxes = tensor([[0.0, 0, 4, 2], [0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 0, 0], [0, 0, 2, 2]])
    others = tensor([[2.0, 0, 4, 2], [1, 1, 3, 3], [2, 2, 4, 4], [0, 0, 0, 0], [0, 0, 2, 2]])
    assert_close(evaluation.box_iou(boxes, others), [0.5, 1 / 7, 0, 0, 1])
    correct = tensor([True, True, True, True, False])
    iou = evaluation.box_iou(boxes, others)
    assert evaluation.localization_accuracy(iou, correct).item() == pytest.approx(0.2)
    assert evaluation.localization_accuracy(iou, correct, 0.1).item() == pytest.approx(0.4)
    assert evaluation.localization_accuracy(iou[:0], correct[:0]).isnan()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=2, max_size=8))
def test_box_iou_is_torchvisions(values):
    from torchvision.ops import box_iou

    boxes = tensor(values).view(-1, 2, 2).sort(1).values.flatten(1)
    boxes[:, 2:] += 0.1
    others = boxes.flip(0)
    assert_close(evaluation.box_iou(boxes, others), box_iou(boxes, others).diagonal(), atol=1e-4)


def test_localization_maps_add_the_chosen_class():
    maps = {"original": torch.zeros(2, 3, 4, 4), "discriminative": torch.zeros(2, 3, 4, 4)}
    maps["original"][0, 1], maps["original"][1, 2] = 1.0, 2.0
    maps["discriminative"][0, 1], maps["discriminative"][1, 2] = 10.0, 20.0
    zoom = identity((33, 33), 2) / 2
    located = evaluation.localization_maps(maps, {"discriminative": zoom}, tensor([1, 2]), (33, 33))
    assert_close(located["discriminative"][:, 0, 16, 16], [10.0, 20.0])
    total = located["joint"][:, 0]
    assert_close(total[:, 16, 16], [11.0, 22.0])
    assert_close(total[:, 2, 2], [1.0, 2.0])
    # a normalized constant map is 0
    ramp = torch.linspace(-3, 5, 4).expand(2, 3, 4, 4)
    located = evaluation.localization_maps({"original": ramp}, {}, tensor([0, 0]), (7, 7))
    assert_close(located["joint"][:, 1, 3], torch.linspace(0, 1, 7).expand(2, 7))
    with pytest.raises(ValueError, match="at least one branch"):
        evaluation.localization_maps({}, {}, tensor([0, 0]), (7, 7))
    with pytest.raises(ValueError, match="'discriminative'"):
        evaluation.localization_maps(maps, {"discriminative": zoom}, tensor([1, 2]), (32, 33))


# drawn birds: attention placed at a known part


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    rows = drawn_birds("test", 12, 4, cache_dir=tmp_path_factory.mktemp("birds"))
    parts = tensor([[row["parts"][name] for name in PARTS] for row in rows])
    return tensor([row["box"] for row in rows]), parts


@pytest.mark.parametrize("part", [0, 5, 6])
def test_attention_at_a_part_of_a_bird_is_found_there(birds, part):
    stored_boxes, stored_parts = birds
    sizes = torch.full((len(stored_boxes), 2), 128)
    boxes, kept = evaluation.transform_boxes(stored_boxes, sizes, Crop((96, 96), 1.0, "squash"))
    points, visible = evaluation.transform_points(stored_parts[..., :2], sizes, Crop((96, 96), 1.0, "squash"))
    assert kept.all()
    assert visible.all()
    parts = torch.cat([points, visible[..., None]], dim=-1)
    # a response that falls off from the part; the grid is fine enough to tell neighbors
    grid_size = (47, 47)
    cells = evaluation.peak_pixels(grid_size, (96, 96))
    distance = (cells - points[:, part, None, None]).norm(dim=-1)
    response = torch.exp(-(distance - distance.amin((1, 2), keepdim=True)) / 20)
    peaks = find_peaks(response)
    assert (peaks.sum((1, 2)) == 1).all()
    hits, total = evaluation.count_hits(peaks, boxes, (96, 96))
    assert evaluation.hit_rate(hits, total) == 1
    for nearest in evaluation.nearest_parts(response, peaks, parts, (96, 96)):
        assert nearest.tolist() == [part] * len(boxes)
    grid = warp_grid(sampling_map(response, partition_peaks(response, peaks, "all")[0], 6.0), (96, 96))
    assert (evaluation.magnification(grid, points[:, [part]]) > 1.5).all()
    # a box elsewhere in the image has no hit
    away = torch.where((points[:, part] < 48).repeat(1, 2), 90.0, 2.0) + tensor([-2.0, -2, 2, 2])
    assert evaluation.hit_rate(*evaluation.count_hits(peaks, away, (96, 96))) == 0
    # the region of the response at the part lies around it
    found = evaluation.largest_region_box(response, 0.5) * 96 / 47
    assert ((found[:, :2] <= points[:, part]) & (points[:, part] <= found[:, 2:])).all()


# calibration


def test_nll_and_calibration_error_by_hand():
    logits = tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]).log()
    labels = tensor([0, 0, 0, 1])
    expected = -(2 * math.log(0.9) + math.log(0.6) + math.log(0.4)) / 4
    assert evaluation.nll(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    # two bins of two images: |0.9 - 1| and |0.6 - 0.5|
    assert evaluation.calibration_error(logits, labels).item() == pytest.approx(0.1, abs=1e-5)
    assert evaluation.calibration_error(logits, labels, bins=1).item() == pytest.approx(0.0, abs=1e-5)
    # |0.9 - 1| and |0.6 - 1|
    assert evaluation.calibration_error(logits, labels * 0).item() == pytest.approx(0.25, abs=1e-5)
    # hot enough, all is 0.5: right 3 times of 4
    assert evaluation.calibration_error(logits / 1e6, labels).item() == pytest.approx(0.25, abs=1e-4)
    assert evaluation.nll(logits / 1e6, labels).item() == pytest.approx(math.log(2), rel=1e-4)


def test_temperature_of_labels_drawn_at_a_known_one():
    logits = torch.randn(20_000, 5, generator=seeded(0)) * 3
    labels = torch.multinomial((logits / 2.5).softmax(1), 1, generator=seeded(1))[:, 0]
    temperature = evaluation.fit_temperature(logits, labels)
    assert temperature == pytest.approx(2.5, rel=0.03)
    for other in (temperature * 1.05, temperature / 1.05):
        assert evaluation.nll(logits / temperature, labels) < evaluation.nll(logits / other, labels)
    assert evaluation.calibration_error(logits / temperature, labels) < 0.015
    assert evaluation.calibration_error(logits, labels) > 0.1


def test_temperature_has_the_closed_form_of_two_classes():
    # one logit gap g, right with frequency p: T = g / ln(p / (1 - p))
    logits = tensor([[4.0, 0.0]]).expand(10, 2)
    labels = tensor([0] * 8 + [1] * 2)
    assert evaluation.fit_temperature(logits, labels) == pytest.approx(4 / math.log(4), rel=1e-4)
    with torch.no_grad():
        assert evaluation.fit_temperature(logits / 10, labels) == pytest.approx(0.4 / math.log(4), rel=1e-4)


def test_temperature_stays_in_bounds():
    right = torch.eye(4) * 10
    assert 0.01 <= evaluation.fit_temperature(right, torch.arange(4)) < 1
    wrong = evaluation.fit_temperature(right, tensor([1, 2, 3, 0]))
    assert 10 < wrong <= 100
    with pytest.raises(ValueError, match="at least 1"):
        evaluation.fit_temperature(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))


# confusions


def test_confusions_by_hand():
    labels = tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    predictions = tensor([0, 1, 1, 1, 0, 2, 0, 0, 1])
    expected = [[0, 1, 2], [2, 0, 2], [1, 0, 1], [2, 1, 1]]
    assert evaluation.confused_pairs(labels, predictions, 4).tolist() == expected
    assert evaluation.confused_pairs(labels, predictions, 4, k=2).tolist() == expected[:2]
    assert evaluation.confused_pairs(labels, labels, 4).shape == (0, 3)
    assert_close(evaluation.per_class_accuracy(labels, predictions, 4), [1 / 3, 0.5, 0.25, NAN])
    with pytest.raises(ValueError, match="predictions must lie in 0 to 2"):
        evaluation.per_class_accuracy(labels, labels + 1, 3)
    with pytest.raises(ValueError, match="of one length"):
        evaluation.confused_pairs(labels, labels[:2], 3)
    with pytest.raises(ValueError, match="k must be 0 or more"):
        evaluation.confused_pairs(labels, labels, 3, k=-1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_confusions_add_up(pairs):
    labels, predictions = tensor(pairs).T
    confused = evaluation.confused_pairs(labels, predictions, 5, k=25)
    assert confused[:, 2].sum() == (labels != predictions).sum()
    assert all(pairs.count((i, j)) == count for i, j, count in confused.tolist())
    assert (confused[:-1, 2] >= confused[1:, 2]).all()
    accuracy = evaluation.per_class_accuracy(labels, predictions, 5)
    share = torch.bincount(labels, minlength=5) / len(labels)
    assert (accuracy * share).nansum().item() == pytest.approx((labels == predictions).float().mean().item(), abs=1e-5)


# intervals


def test_interval_is_near_the_normal_one():
    correct = torch.arange(2000) % 10 != 0  # 90 %
    low, high = evaluation.bootstrap_interval(correct)
    width = 1.96 * math.sqrt(0.9 * 0.1 / 2000)
    assert low == pytest.approx(0.9 - width, abs=0.001)
    assert high == pytest.approx(0.9 + width, abs=0.001)
    assert (low, high) == evaluation.bootstrap_interval(correct.flip(0))
    narrow = evaluation.bootstrap_interval(correct, level=0.5)
    assert low < narrow[0] < 0.9 < narrow[1] < high
    assert evaluation.bootstrap_interval(torch.ones(7, dtype=torch.bool)) == (1.0, 1.0)
    assert evaluation.bootstrap_interval(torch.zeros(7, dtype=torch.bool)) == (0.0, 0.0)


def test_intervals_match_a_bootstrap_that_draws_images():
    correct = torch.rand(150, generator=seeded(0)) < 0.7
    baseline = torch.where(torch.rand(150, generator=seeded(1)) < 0.8, correct, ~correct)
    rows = torch.randint(150, (10_000, 150), generator=seeded(2))
    level = tensor([0.025, 0.975])
    single = correct[rows].float().mean(1).quantile(level).tolist()
    assert evaluation.bootstrap_interval(correct) == pytest.approx(single, abs=0.011)
    paired = (correct[rows].float() - baseline[rows].float()).mean(1).quantile(level).tolist()
    assert evaluation.bootstrap_difference(correct, baseline) == pytest.approx(paired, abs=0.011)


def test_runs_of_one_image_are_drawn_together():
    chance = torch.rand(3, 150, generator=seeded(3))
    correct, baseline = chance < 0.7, torch.rand(3, 150, generator=seeded(4)) < 0.5
    correct[1:] = correct[0]  # three runs that say the same are worth one
    baseline[1:] = baseline[0]
    one, three = (evaluation.bootstrap_difference(correct[:n], baseline[:n]) for n in (1, 3))
    assert three == pytest.approx(one, abs=0.011)
    assert one == evaluation.bootstrap_difference(correct[0], baseline[0])
    correct = chance < 0.7
    rows = torch.randint(150, (10_000, 150), generator=seeded(2))
    gains = (correct.float() - baseline.float()).mean(0)
    expected = gains[rows].mean(1).quantile(tensor([0.025, 0.975])).tolist()
    assert evaluation.bootstrap_difference(correct, baseline) == pytest.approx(expected, abs=0.011)


def test_differences_cancel_what_models_share():
    correct = torch.arange(1000) % 2 == 0
    assert evaluation.bootstrap_difference(correct, correct) == (0.0, 0.0)
    assert evaluation.bootstrap_difference(correct | True, correct & False) == (1.0, 1.0)
    # where the models differ on every image, what one does not gain it loses
    third = torch.arange(1000) % 3 == 0
    opposed = [2 * end - 1 for end in evaluation.bootstrap_interval(third)]
    assert evaluation.bootstrap_difference(third, ~third) == pytest.approx(opposed, abs=0.004)
    better = correct.clone()
    better[1:60:2] = True  # 30 gained, none lost
    low, high = evaluation.bootstrap_difference(better, correct)
    assert 0.015 < low < 0.03 < high < 0.045
    mirrored = evaluation.bootstrap_difference(correct, better)
    assert mirrored == pytest.approx((-high, -low), abs=0.0015)


def test_intervals_reject_wrong_arguments():
    correct = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one image"):
        evaluation.bootstrap_interval(correct[:0])
    with pytest.raises(ValueError, match=r"level must .* 95"):
        evaluation.bootstrap_interval(correct, level=95)
    with pytest.raises(ValueError, match="samples must"):
        evaluation.bootstrap_difference(correct, correct, samples=0)
    with pytest.raises(ValueError, match="both be N or S×N"):
        evaluation.bootstrap_difference(correct, correct[:2])


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on Apple's GPUs, as they do; tensors of a FakeTensorMode have a device and no values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.device.type == "mps":
                assert each.dtype != torch.float64, func
        return out


@pytest.mark.parametrize("mode", ["center", "border", "squash"])
def test_no_float64_on_devices_that_have_none(mode):
    crop = Crop((64, 48), mode=mode)
    with FakeTensorMode(), NoFloat64():
        sizes = torch.ones(2, 2, dtype=torch.int64, device="mps")
        boxes, points = torch.rand(2, 4, device="mps"), torch.rand(2, 3, 2, device="mps")
        moved = evaluation.transform_points(points, sizes, crop) + evaluation.transform_boxes(boxes, sizes, crop)
        assert {each.device.type for each in moved} == {"mps"}
        assert evaluation.restore_boxes(boxes, sizes, crop).dtype == torch.float64


def test_importing_the_package_needs_neither_scipy_nor_torchmetrics():
    code = (
        "import sys; sys.modules['torchmetrics'] = None; import s3n_timm.evaluation as e; "
        "assert not {'scipy.ndimage', 'scipy.stats'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(s3n_timm.__file__).parents[1])


def test_a_diverged_model_of_several_labels_has_no_precision():
    records = dict(label=torch.tensor([[1, 0], [0, 1]]), logits_answer=torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="diverged"):
        evaluation.summarize_labels(records, ["a", "b"])
