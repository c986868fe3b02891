"""The sampling stage written a second time, as plainly as it can be: float64, one image, peak, cell and tap at a time.

Nothing here is shared with the package and nothing is factorized: k is a full two-dimensional kernel and every
interpolation is written out. Beside its results the oracle returns how close its closest yes/no decision was
(`margin`), so that a test can leave out inputs on which float32 may rightly decide otherwise.
"""

import math
from dataclasses import dataclass, field

import numpy as np

TINY_RESPONSE = 1e-6  # below this a peak's value is raised to it: 1/R and the width of its attention stay finite


@dataclass
class Result:
    """What the oracle finds on the way from one image's maps to its sampling grids."""

    entropy: float
    response: np.ndarray
    peaks: list[tuple[int, int]]
    weight_d: dict[tuple[int, int], float]
    weight_c: dict[tuple[int, int], float]
    margin: float
    density: dict[str, np.ndarray] = field(default_factory=dict)
    cell_grid: dict[str, np.ndarray] = field(default_factory=dict)
    grid: dict[str, np.ndarray] = field(default_factory=dict)


def resize(plane, size):
    """Bilinear with corners aligned: cell 0 falls on cell 0 and the last on the last."""
    height, width = plane.shape
    out = np.zeros(size)
    for i in range(size[0]):
        y = i * (height - 1) / (size[0] - 1) if size[0] > 1 else 0.0
        top = min(math.floor(y), height - 1)
        bottom = min(top + 1, height - 1)
        for j in range(size[1]):
            x = j * (width - 1) / (size[1] - 1) if size[1] > 1 else 0.0
            left = min(math.floor(x), width - 1)
            right = min(left + 1, width - 1)
            upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
            lower = plane[bottom, left] * (1 - (x - left)) + plane[bottom, right] * (x - left)
            out[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


def gate(scores, delta, kind):
    """H of the five largest probabilities, the classes whose maps are summed, and the decision's margin."""
    exponentials = [math.exp(s - max(scores)) for s in scores]
    order = sorted(range(len(scores)), key=lambda c: -exponentials[c])
    top = order[: min(5, len(scores))]
    chosen = [exponentials[c] / sum(exponentials) for c in top]
    if kind == "renormalized":
        chosen = [p / sum(chosen) for p in chosen]
    entropy = -sum(p * math.log(p) for p in chosen if p > 0)
    if entropy <= delta:
        runner_up = scores[order[1]] if len(scores) > 1 else -math.inf
        return entropy, top[:1], min(abs(entropy - delta), scores[order[0]] - runner_up)
    left_out = scores[order[5]] if len(scores) > 5 else -math.inf
    return entropy, top, min(abs(entropy - delta), scores[top[-1]] - left_out)


def normalize(response):
    """Least value to 0, greatest to 1; None where the two are the same but for the rounding of float64."""
    low, high = response.min(), response.max()
    return None if high - low <= 1e-13 * max(abs(low), abs(high)) else (response - low) / (high - low)


def find_peaks(response, window, floor):
    """Cells that no cell of their window exceeds and no earlier one (row by row) equals; with the margin."""
    height, width = response.shape
    reach = window // 2
    mean = sum(response[y, x] for y in range(height) for x in range(width)) / (height * width)
    peaks, margin = [], math.inf
    for y in range(height):
        for x in range(width):
            is_peak = True
            closest = math.inf
            for yy in range(max(0, y - reach), min(height, y + reach + 1)):
                for xx in range(max(0, x - reach), min(width, x + reach + 1)):
                    if (yy, xx) == (y, x):
                        continue
                    difference = response[y, x] - response[yy, xx]
                    if difference < 0 or (difference == 0 and (yy, xx) < (y, x)):
                        is_peak = False
                    if difference != 0:
                        closest = min(closest, abs(difference))
            if not is_peak:
                # only the cells that a rounding could make a peak: those within a hair of their window's greatest
                around = response[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].max()
                if around > response[y, x]:
                    margin = min(margin, around - response[y, x])
                continue
            margin = min(margin, closest)
            if floor == "mean":
                margin = min(margin, abs(response[y, x] - mean))
                if response[y, x] < mean:
                    continue
            peaks.append((y, x))
    return peaks, margin


def partition(response, peaks, mode, zeta):
    """The weight of each peak's attention in either branch, by cell, and the margin."""
    weight_d, weight_c, margin = {}, {}, math.inf
    if not peaks:
        return weight_d, weight_c, margin
    if mode == "extreme":
        strongest = weakest = peaks[0]
        for peak in peaks[1:]:
            if response[peak] > response[strongest]:
                strongest = peak
            if response[peak] < response[weakest]:
                weakest = peak
        for end in (strongest, weakest):
            gaps = [abs(response[p] - response[end]) for p in peaks if response[p] != response[end]]
            margin = min([margin, *gaps])
        return {strongest: 1.0}, {weakest: 1.0}, margin
    for peak in peaks:
        value = response[peak]
        if mode == "all":
            weight_d[peak] = weight_c[peak] = 1.0
        elif mode == "expected":
            weight_d[peak], weight_c[peak] = value, 1.0 - value
        else:
            threshold = value if mode == "probability" else 0.5
            margin = min(margin, abs(threshold - zeta[peak]))
            if zeta[peak] < threshold:
                weight_d[peak] = 1.0
            else:
                weight_c[peak] = 1.0
    return weight_d, weight_c, margin


def attention(response, weights, beta, complementary):
    """Eq. 5 summed over a branch's peaks."""
    height, width = response.shape
    total = np.zeros((height, width))
    for (py, px), weight in weights.items():
        value = max(response[py, px], TINY_RESPONSE)
        amplitude = 1.0 / value if complementary else value
        for y in range(height):
            for x in range(width):
                squared = (y - py) ** 2 + (x - px) ** 2
                total[y, x] += weight * amplitude * math.exp(-squared / (value * beta * beta))
    return total


def gaussian(size, fwhm):
    """k, cut at ±(G−1) cells."""
    height, width = size
    k = np.zeros((2 * height - 1, 2 * width - 1))
    for i in range(2 * height - 1):
        for j in range(2 * width - 1):
            squared = (i - (height - 1)) ** 2 + (j - (width - 1)) ** 2
            k[i, j] = math.exp(-4 * math.log(2) * squared / fwhm**2)
    return k


def warp(density, k):
    """Q to the grid of 2f−1 and 2g−1 at its own cells, clamped; x first, as grid_sample wants it."""
    height, width = density.shape
    rows, columns = 3 * height - 2, 3 * width - 2
    padded, with_u, with_v = (np.zeros((rows, columns)) for _ in range(3))
    for i in range(rows):
        for j in range(columns):
            y, x = i - (height - 1), j - (width - 1)
            padded[i, j] = density[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]
            with_u[i, j] = padded[i, j] * x / (width - 1)
            with_v[i, j] = padded[i, j] * y / (height - 1)
    out = np.zeros((height, width, 2))
    for y in range(height):
        for x in range(width):
            window = (slice(y, y + 2 * height - 1), slice(x, x + 2 * width - 1))
            mass = (k * padded[window]).sum()
            f = (k * with_u[window]).sum() / mass
            g = (k * with_v[window]).sum() / mass
            out[y, x] = min(max(2 * f - 1, -1.0), 1.0), min(max(2 * g - 1, -1.0), 1.0)
    return out


def identity_grid(size):
    """The grid that leaves an image as it is."""
    out = np.zeros((*size, 2))
    for i in range(size[0]):
        for j in range(size[1]):
            out[i, j] = 2 * j / (size[1] - 1) - 1, 2 * i / (size[0] - 1) - 1
    return out


def resize_grid(grid, size):
    """Both coordinates of a grid, resized one after the other."""
    return np.stack([resize(grid[..., 0], size), resize(grid[..., 1], size)], axis=-1)


def sample_image(image, grid):
    """Bilinear look-ups, corners aligned, nothing but zeros outside; image is (channels, H, W)."""
    channels, height, width = image.shape
    out = np.zeros((channels, *grid.shape[:2]))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            x = (grid[i, j, 0] + 1) / 2 * (width - 1)
            y = (grid[i, j, 1] + 1) / 2 * (height - 1)
            for yy in (math.floor(y), math.floor(y) + 1):
                for xx in (math.floor(x), math.floor(x) + 1):
                    if 0 <= yy < height and 0 <= xx < width:
                        out[:, i, j] += (1 - abs(y - yy)) * (1 - abs(x - xx)) * image[:, yy, xx]
    return out


def sampling_grids(
    maps,
    scores,
    image_size,
    *,
    grid_size,
    beta_d,
    beta_c,
    mode,
    zeta=None,
    gate_kind="paper",
    delta=0.2,
    window=3,
    peak_floor="mean",
    floor=0.09,
    fwhm=13.0,
):
    """One image's maps (C, h, w) and scores (C,) to the grids of both branches at the image's size."""
    entropy, classes, margin = gate([float(s) for s in scores], delta, gate_kind)
    summed = np.zeros(grid_size)
    for c in classes:
        summed += resize(np.asarray(maps[c], dtype=np.float64), grid_size)
    response = normalize(summed)
    peaks, weight_d, weight_c = [], {}, {}
    if response is None:
        response = np.zeros(grid_size)
    else:
        peaks, peak_margin = find_peaks(response, window, peak_floor)
        weight_d, weight_c, split_margin = partition(response, peaks, mode, zeta)
        margin = min(margin, peak_margin, split_margin)
    result = Result(entropy, response, peaks, weight_d, weight_c, margin)
    k = gaussian(grid_size, fwhm)
    for branch, weights, beta in (("d", weight_d, beta_d), ("c", weight_c, beta_c)):
        if not peaks:
            result.cell_grid[branch] = identity_grid(grid_size)
            result.grid[branch] = identity_grid(image_size)
            continue
        result.density[branch] = floor + attention(response, weights, beta, complementary=branch == "c")
        result.cell_grid[branch] = warp(result.density[branch], k)
        result.grid[branch] = resize_grid(result.cell_grid[branch], image_size)
    return result
