"""Drawn birds: a fine-grained data set of any size that is drawn, not downloaded.

Pose, scale, place, plumage and background are drawn at random whatever the class. Only a few small parts tell it: class
k gives two or three parts a fixed look each, and these looks together spell k. The other parts, and the berries strewn
over the background, take their looks from the same list at random, so the colors in an image tell nothing: what counts
is which part wears them.
"""

import colorsys
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image, ImageDraw

from .schema import SPLITS, check_split, recognition_features

Color = tuple[int, ...]

PARTS = ("beak", "crown", "eye", "nape", "throat", "wing bar", "tail", "legs")
DIAGNOSTIC_PARTS = ("beak", "wing bar", "crown")

_BLACK = (34, 30, 32)
_COLORS = {"yellow": (246, 200, 34), "red": (214, 44, 36), "blue": (44, 98, 214), "white": (242, 240, 232)}
# The colors of a part's two halves, such as the base and the tip of the beak.
LOOKS = {name: (color, color) for name, color in _COLORS.items()} | {
    f"{name}-black": (color, _BLACK) for name, color in _COLORS.items()
}
MAX_BIRD_CLASSES = len(LOOKS) ** len(DIAGNOSTIC_PARTS)
MIN_SIZE = 64

_VERSION = "1.0.0"  # part of the cache path: raise it with every change that alters the pixels
_SUPERSAMPLING = 2
_SHARD = 256  # images that one process draws in a row


class Bird(NamedTuple):
    """One drawn bird; coordinates are in pixels from the image's top left corner, x to the right and y down."""

    image: Image.Image  # RGB, size × size
    label: int
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 around the whole bird
    parts: dict[str, tuple[float, float, float]]  # x, y of the part's center and visible, always 1; in PARTS order


class _Shape(NamedTuple):
    points: np.ndarray  # N×2
    fill: Color
    part: str = ""


def class_looks(label: int, num_classes: int) -> dict[str, str]:
    """Tell by what a class is told from the others.

    Two parts spell the class up to 64 classes, three beyond; each takes as few looks as the number of classes allows.

    Args:
        label: Class index, 0 to num_classes - 1.
        num_classes: Number of classes, 2 to `MAX_BIRD_CLASSES`.

    Returns:
        Part name to look name (a key of `LOOKS`), different for every class.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not 2 <= num_classes <= MAX_BIRD_CLASSES:
        raise ValueError(f"num_classes must be 2 to {MAX_BIRD_CLASSES}, got {num_classes}.")
    if not 0 <= label < num_classes:
        raise ValueError(f"label must be 0 to {num_classes - 1} for {num_classes} classes, got {label}.")
    looks = tuple(LOOKS)
    parts = DIAGNOSTIC_PARTS[:2] if num_classes <= len(looks) ** 2 else DIAGNOSTIC_PARTS
    base = next(base for base in range(2, len(looks) + 1) if base ** len(parts) >= num_classes)
    return {part: looks[label // base**digit % base] for digit, part in enumerate(parts)}


def _check_size(size: int) -> None:
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} pixels for the parts to show, got {size}.")


def _direction(angle: float | np.ndarray) -> np.ndarray:
    """Unit vectors (…×2) at angles in radians, clockwise from the right."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _normal(vector: np.ndarray) -> np.ndarray:
    """Unit vectors (…×2) at right angles to the given ones."""
    return np.stack([-vector[..., 1], vector[..., 0]], axis=-1) / np.hypot(vector[..., 0], vector[..., 1])[..., None]


def _strip(start: np.ndarray, end: np.ndarray, start_width: float, end_width: float) -> np.ndarray:
    """4×2 corners of a straight strip that changes its width from start to end."""
    side = _normal(end - start) / 2
    return np.stack([
        start + side * start_width, end + side * end_width, end - side * end_width, start - side * start_width,
    ])


def _strip_halves(start: np.ndarray, end: np.ndarray, start_width: float, end_width: float) -> list[np.ndarray]:
    middle, width = (start + end) / 2, (start_width + end_width) / 2
    return [_strip(start, middle, start_width, width), _strip(middle, end, width, end_width)]


def _disc(center: np.ndarray, radius: float) -> np.ndarray:
    """24×2 outline of a disc."""
    return center + radius * _direction(np.linspace(0, 2 * np.pi, 24, endpoint=False))


def _ring(center: np.ndarray, inner: float, outer: float, first: float, last: float) -> np.ndarray:
    """N×2 outline of the piece of a ring between two radii and two angles."""
    rim = _direction(np.linspace(first, last, 6 + int(abs(last - first) * 3)))
    return center + np.concatenate([outer * rim, inner * rim[::-1]])


def _ring_halves(center: np.ndarray, inner: float, outer: float, first: float, last: float) -> list[np.ndarray]:
    middle = (first + last) / 2
    return [_ring(center, inner, outer, first, middle), _ring(center, inner, outer, middle, last)]


def _lens(start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
    """20×2 outline of a leaf or a folded wing from tip to tip."""
    t = np.linspace(0, 1, 11)[:, None]
    spine, bulge = start + (end - start) * t, _normal(end - start) * width * 2 * t * (1 - t)
    return np.concatenate([spine + bulge, (spine - bulge)[-2:0:-1]])


def _random_color(rng: np.random.Generator, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """RGB color (0 to 255, float) from uniform hue, saturation and value in [low, high)."""
    return np.array(colorsys.hsv_to_rgb(*rng.uniform(low, high))) * 255


def _rgb(color: np.ndarray) -> Color:
    return tuple(color.clip(0, 255).astype(int).tolist())


def _bird_shapes(rng: np.random.Generator, looks: dict[str, tuple[Color, Color]]) -> list[_Shape]:
    """A bird that faces right, about 1 long, in the order to paint it; y points down."""
    plumage = _random_color(rng, (0, 0.1, 0.45), (1, 0.45, 0.75))
    dark, light = _rgb(plumage * 0.7), _rgb(plumage * 0.45 + 140)
    shapes: list[_Shape] = []

    def part(name: str, halves: list[np.ndarray]) -> None:
        center = np.concatenate(halves).mean(axis=0)
        shapes.extend(_Shape(center + (half - center) * 1.15, _rgb(plumage * 0.45), name) for half in halves)
        shapes.extend(_Shape(half, color, name) for half, color in zip(halves, looks[name]))

    head = np.array([0.24, -0.2]) + rng.uniform((-0.05, -0.05), (0.04, 0.07))
    head_radius = rng.uniform(0.105, 0.12)
    gaze = rng.uniform(-0.45, 0.35)
    belly_radius = rng.uniform(0.14, 0.18)
    rump, hip = np.array([-0.24, 0.04]), np.array([-0.02, belly_radius - 0.02])

    # Tail
    tail = rng.uniform(0.2, 0.28) * _direction(np.pi + rng.uniform(-0.5, 0.25))
    shapes.append(_Shape(_strip(rump, rump + tail, 0.07, rng.uniform(0.08, 0.13)), dark))
    part("tail", _strip_halves(rump + tail * 0.6, rump + tail * 0.85, 0.075, 0.085))

    # Legs
    feet = hip + rng.uniform((-0.05, 0.11), (0.05, 0.15))
    forward = np.array([1, 0])
    for step in (-0.03 * forward, 0.04 * forward):
        leg = _strip(hip + step, feet + step, 0.018, 0.014)
        toes = _strip(feet + step - 0.025 * forward, feet + step + 0.035 * forward, 0.022, 0.012)
        shapes.extend(_Shape(half, color, "legs") for half, color in zip((leg, toes), looks["legs"]))

    # Body: a curved spine from the rump over the belly to the head that is as thick as radii say; a lighter underside
    t = np.linspace(0, 1, 13)
    spine = np.outer((1 - t) ** 2, rump) + np.outer(2 * t * (1 - t), (0.12, 0.14)) + np.outer(t**2, head)
    radii = np.interp(t, (0, 0.4, 0.75, 1), (0.05, belly_radius, 0.125, head_radius))
    for points, radius, color in (
            (spine, radii, _rgb(plumage)), (spine[2:9] + np.array([0.03, 0.045]), radii[2:9] * 0.65, light),
    ):
        side = _normal(np.gradient(points, axis=0)) * radius[:, None]
        shapes.append(_Shape(np.concatenate([points + side, (points - side)[::-1]]), color))
        shapes.extend(_Shape(_disc(points[end], radius[end]), color) for end in (0, -1))

    # Wing
    shoulder = np.array([0.14, -0.03])
    tip = rump + rng.uniform((-0.12, -0.05), (-0.02, 0.05))
    shapes.append(_Shape(_lens(shoulder, tip, 0.2), dark))
    for feather in np.array([[0, 0.02], [0, 0.05]]):
        shapes.append(_Shape(_lens(shoulder * 0.4 + tip * 0.6 + feather, tip, 0.03), _rgb(plumage * 0.5)))
    bar, slant = shoulder + (tip - shoulder) * rng.uniform(0.3, 0.42), np.array([-0.01, 0.036])
    part("wing bar", _strip_halves(bar - slant, bar + slant, 0.04, 0.04))

    # Head; the parts that tell the class come last so that nothing covers them
    eye = head + head_radius * 0.4 * _direction(gaze - 0.5)
    part("eye", _ring_halves(eye, 0, 0.03, 0, 2 * np.pi))
    shapes.append(_Shape(_disc(eye, 0.016), _BLACK))
    part("nape", _ring_halves(head, head_radius * 0.64, head_radius, gaze - 2.75, gaze - 3.35))
    part("throat", _ring_halves(head, head_radius * 0.64, head_radius, gaze + 0.7, gaze + 1.3))
    face = head + head_radius * 0.9 * _direction(gaze)
    part("beak", _strip_halves(face, face + 0.085 * _direction(gaze), 0.055, 0.01))
    part("crown", _ring_halves(head, head_radius * 0.64, head_radius, gaze - 1.2, gaze - 1.95))
    return shapes


def _place(rng: np.random.Generator, shapes: list[_Shape], canvas: int) -> list[_Shape]:
    """Tilt, flip, scale and move a bird so that all of it lies within the canvas, 2 pixels or more from its edge."""
    tilt = rng.uniform(-0.5, 0.5)
    turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    turn[:, 0] *= rng.choice((-1, 1))
    points = np.concatenate([shape.points for shape in shapes]) @ turn
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    scale = rng.uniform(0.65, 0.95) * (canvas - 4) / extent.max()
    points = (points - low) * scale + rng.uniform(2, canvas - 2 - extent * scale)
    ends = np.cumsum([len(shape.points) for shape in shapes])[:-1]
    return [shape._replace(points=moved) for shape, moved in zip(shapes, np.split(points, ends))]


def _background(rng: np.random.Generator, canvas: int) -> Image.Image:
    """A blurred landscape: a vertical gradient with soft blobs."""
    top = _random_color(rng, (0.1, 0.05, 0.55), (0.65, 0.4, 1))
    bottom = _random_color(rng, (0.1, 0.1, 0.3), (0.5, 0.5, 0.9))
    coarse = np.linspace(top, bottom, 10)[:, None] + rng.normal(0, 12, (10, 10, 1)) + rng.normal(0, 6, (10, 10, 3))
    return Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((canvas, canvas), Image.Resampling.BICUBIC)


def _clutter(rng: np.random.Generator, canvas: int, feet: np.ndarray) -> list[_Shape]:
    """Branches, leaves and berries behind the bird, the last branch running below its feet."""
    shapes = []
    bark = _random_color(rng, (0.04, 0.2, 0.2), (0.1, 0.5, 0.5))
    for knot in (*rng.uniform(0, canvas, (3, 2)), feet):
        angle = rng.uniform(-0.35, 0.35) if knot is feet else rng.uniform(0, np.pi)
        along = 1.5 * canvas * _direction(angle)
        width = canvas * rng.uniform(0.015, 0.035, 2)
        shapes.append(_Shape(_strip(knot - along, knot + along, *width), _rgb(bark * rng.uniform(0.8, 1.3))))
    foliage = _random_color(rng, (0.15, 0.3, 0.3), (0.4, 0.7, 0.7))
    for _ in range(14):
        stem, length = rng.uniform(0, canvas, 2), canvas * rng.uniform(0.06, 0.14)
        leaf = _lens(stem, stem + length * _direction(rng.uniform(0, 2 * np.pi)), length * 0.8)
        shapes.append(_Shape(leaf, _rgb(foliage * rng.uniform(0.7, 1.3))))
    looks = list(LOOKS.values())
    for _ in range(8):
        center, radius, angle = rng.uniform(0, canvas, 2), canvas * rng.uniform(0.02, 0.035), rng.uniform(0, 2 * np.pi)
        shapes.append(_Shape(_disc(center, radius * 1.2), _BLACK))
        halves = _ring_halves(center, 0, radius, angle, angle + 2 * np.pi)
        shapes.extend(_Shape(half, color) for half, color in zip(halves, looks[rng.integers(len(looks))]))
    return shapes


def draw_bird(rng: np.random.Generator, label: int, num_classes: int, size: int = 128) -> Bird:
    """Draw one bird of the given class.

    What is taken from rng does not depend on the class: the same rng state with another label gives the same picture
    but for the parts that tell the class.

    Args:
        rng: Source of all that is random.
        label: Class index, 0 to num_classes - 1.
        num_classes: Number of classes, 2 to `MAX_BIRD_CLASSES`.
        size: Height and width of the image in pixels, at least `MIN_SIZE`.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_size(size)
    looks = dict(zip(PARTS, rng.choice(list(LOOKS), len(PARTS)).tolist())) | class_looks(label, num_classes)
    canvas = size * _SUPERSAMPLING
    bird = _place(rng, _bird_shapes(rng, {part: LOOKS[look] for part, look in looks.items()}), canvas)
    outlines = {part: np.concatenate([s.points for s in bird if s.part == part]) for part in PARTS}
    feet = outlines["legs"][np.argmax(outlines["legs"][:, 1])]

    image = _background(rng, canvas)
    draw = ImageDraw.Draw(image)
    for shape in _clutter(rng, canvas, feet) + bird:
        draw.polygon(shape.points.ravel().tolist(), shape.fill)

    def bounds(points: np.ndarray) -> np.ndarray:
        return np.stack([points.min(axis=0), points.max(axis=0)]) / _SUPERSAMPLING

    (x0, y0), (x1, y1) = bounds(np.concatenate([shape.points for shape in bird])).tolist()
    centers = {part: bounds(outline).mean(axis=0).tolist() for part, outline in outlines.items()}
    parts = {part: (x, y, 1.0) for part, (x, y) in centers.items()}
    return Bird(image.reduce(_SUPERSAMPLING), label, (x0, y0, x1, y1), parts)


def _examples(
        starts: list[int], num_images: int, num_classes: int, size: int, seed: int, stream: int,
) -> Iterator[dict[str, Any]]:
    for index in (index for start in starts for index in range(start, min(start + _SHARD, num_images))):
        bird = draw_bird(np.random.default_rng((seed, stream, index)), index % num_classes, num_classes, size)
        file = io.BytesIO()
        bird.image.save(file, "JPEG", quality=92, subsampling=0)  # full color resolution: the parts are small
        image = {"bytes": file.getvalue(), "path": None}
        yield {"image": image, "label": bird.label, "box": bird.box, "parts": bird.parts}


def drawn_birds(
        split: str = "train",
        num_images: int = 2000,
        num_classes: int = 20,
        size: int = 128,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        num_proc: int | None = None,
) -> datasets.Dataset:
    """Draw a split of the drawn birds, or take it from the cache if it has been drawn before.

    Image i has label i % num_classes and depends on split, num_classes, size, seed and i alone, so a smaller data set
    is the beginning of a larger one.

    Args:
        split: 'train' or 'test', two independent streams of the seed.
        num_images: Number of images, at least 1.
        num_classes: Number of classes, 2 to `MAX_BIRD_CLASSES`.
        size: Height and width of the images in pixels, at least `MIN_SIZE`.
        seed: Seed, at least 0.
        cache_dir: Folder to cache in, by default that of the datasets library.
        num_proc: Number of processes to draw with, by default this one alone.

    Returns:
        Dataset with the columns of `recognition_features`.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_split(split)
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}.")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    _check_size(size)
    # At least one call, so that num_classes below 1 is rejected, too
    looks = [class_looks(label, num_classes) for label in range(max(num_classes, 1))]
    return datasets.Dataset.from_generator(
        _examples,
        features=recognition_features([", ".join(f"{look[p]} {p}" for p in look) for look in looks], PARTS),
        cache_dir=None if cache_dir is None else str(cache_dir),
        gen_kwargs={
            "starts": list(range(0, num_images, _SHARD)),
            "num_images": num_images,
            "num_classes": num_classes,
            "size": size,
            "seed": seed,
            "stream": SPLITS.index(split),
        },
        num_proc=num_proc,
        split=datasets.NamedSplit(split),
        version=_VERSION,
    )
