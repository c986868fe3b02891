import re

import numpy as np
import pytest

from s3n_timm.data import DIAGNOSTIC_PARTS, MAX_BIRD_CLASSES, PARTS, birds, class_looks, draw_bird, drawn_birds


def draw(seed, label=0, num_classes=20, size=128):
    return draw_bird(np.random.default_rng(seed), label, num_classes, size)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return drawn_birds(num_images=30, num_classes=7, cache_dir=tmp_path_factory.mktemp("birds"))


@pytest.mark.parametrize("num_classes", [2, 3, 10, 64, 65, 200, MAX_BIRD_CLASSES])
def test_class_looks_are_unique(num_classes):
    looks = [class_looks(label, num_classes) for label in range(num_classes)]
    assert len({tuple(look.items()) for look in looks}) == num_classes
    assert {len(look) for look in looks} == {2 if num_classes <= 64 else 3}


def test_same_seed_draws_the_same_bird():
    first, again, other = draw(1), draw(1), draw(2)
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.box, first.parts) == (again.box, again.parts)
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("size", [64, 128, 225])
def test_parts_lie_in_the_box_and_the_box_in_the_image(size):
    for seed in range(40):
        bird = draw(seed, seed % 20, size=size)
        assert (bird.image.size, bird.image.mode) == ((size, size), "RGB")
        x0, y0, x1, y1 = bird.box
        assert 0 < min(x0, y0) < max(x1, y1) < size
        assert max(x1 - x0, y1 - y0) > 0.6 * size
        assert tuple(bird.parts) == PARTS
        for x, y, visible in bird.parts.values():
            assert x0 < x < x1
            assert y0 < y < y1
            assert visible == 1


def test_nothing_is_drawn_outside_the_box(monkeypatch):
    monkeypatch.setattr(birds, "_clutter", lambda *args: [])
    bird = draw(0)
    with monkeypatch.context() as patch:
        patch.setattr(birds.ImageDraw.ImageDraw, "polygon", lambda *args: None)
        empty = draw(0)
    ys, xs = np.nonzero((np.asarray(bird.image) != np.asarray(empty.image)).any(axis=2))
    drawn = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    np.testing.assert_allclose(drawn, bird.box, atol=1.01)


@pytest.mark.parametrize("num_classes", [20, 200])
def test_classes_differ_in_the_class_defining_parts_only(num_classes):
    last = num_classes - 1
    looks, other_looks = class_looks(0, num_classes), class_looks(last, num_classes)
    changed = [part for part in looks if looks[part] != other_looks[part]]
    assert set(changed) == set(looks) <= set(DIAGNOSTIC_PARTS)
    for seed in range(40):
        bird, other = draw(seed, 0, num_classes), draw(seed, last, num_classes)
        assert (bird.box, bird.parts) == (other.box, other.parts)
        difference = np.abs(np.asarray(bird.image, int) - np.asarray(other.image, int)).max(axis=2)
        ys, xs = np.nonzero(difference)
        length = max(bird.box[2] - bird.box[0], bird.box[3] - bird.box[1])
        distance = {part: np.hypot(xs + 0.5 - bird.parts[part][0], ys + 0.5 - bird.parts[part][1]) for part in changed}
        assert (np.min(list(distance.values()), axis=0) < 0.1 * length + 1).all()
        for part in changed:  # each is in plain view and small
            clear = (distance[part] < 0.1 * length + 1) & (difference[ys, xs] > 40)
            assert 10 <= clear.sum() < 0.02 * length**2


@pytest.mark.parametrize("part", DIAGNOSTIC_PARTS)
def test_plain_and_black_tipped_looks_differ_clearly(part):
    label = 4 * 8 ** DIAGNOSTIC_PARTS.index(part)
    looks = [class_looks(k, MAX_BIRD_CLASSES)[part] for k in (0, label)]
    assert looks == ["yellow", "yellow-black"]
    for seed in range(20):
        plain, tipped = (np.asarray(draw(seed, k, MAX_BIRD_CLASSES).image, int) for k in (0, label))
        assert (np.abs(plain - tipped).max(axis=2) > 80).sum() >= 8


def test_other_parts_take_their_looks_at_random(monkeypatch):
    seen = {part: set() for part in PARTS}
    shapes = birds._bird_shapes
    monkeypatch.setattr(
        birds, "_bird_shapes", lambda rng, looks: [seen[p].add(looks[p]) for p in PARTS] and shapes(rng, looks)
    )
    for seed in range(60):
        draw(seed, 3, 20)
    assert {part for part in PARTS if len(seen[part]) == 1} == {"beak", "wing bar"}
    assert all(len(seen[part]) == len(birds.LOOKS) for part in set(PARTS) - {"beak", "wing bar"})


def test_dataset_columns(train):
    assert train.features == birds.recognition_features(train.features["label"].names, PARTS)
    assert train.features["label"].names[:2] == ["yellow beak, yellow wing bar", "red beak, yellow wing bar"]
    assert str(train.split) == "train"
    row, bird = train[9], draw((0, 0, 9), 2, 7)
    assert row["label"] == 2
    assert row["box"] == pytest.approx(bird.box)
    assert {part: pytest.approx(point) for part, point in row["parts"].items()} == bird.parts
    error = np.asarray(row["image"], int) - np.asarray(bird.image, int)
    assert np.abs(error).mean() < 4


def test_labels_are_balanced(train):
    counts = np.bincount(train["label"], minlength=7)
    assert counts.sum() == 30
    assert np.ptp(counts) <= 1


def test_smaller_dataset_is_the_beginning_of_a_larger_one(train, tmp_path, monkeypatch):
    monkeypatch.setattr(birds, "_SHARD", 4)  # a smaller data set may also end within a shard
    small = drawn_birds(num_images=10, num_classes=7, cache_dir=tmp_path)
    assert len(small) == 10
    for row, expected in zip(small.with_format("arrow"), train.select(range(10)).with_format("arrow"), strict=True):
        assert row.equals(expected)


def test_split_and_seed_change_the_images(train, tmp_path):
    boxes = [
        drawn_birds(num_images=3, num_classes=7, cache_dir=tmp_path, **options)["box"][:3]
        for options in ({"split": "test"}, {"seed": 1}, {"split": "test", "seed": 1})
    ] + [train["box"][:3]]
    assert len({tuple(box) for group in boxes for box in group}) == 12


def test_second_call_reads_the_cache(tmp_path, monkeypatch):
    first = drawn_birds("test", 5, 4, cache_dir=tmp_path)
    monkeypatch.setattr(birds, "draw_bird", None)  # drawing again would fail
    second = drawn_birds("test", 5, 4, cache_dir=tmp_path)
    assert first.cache_files == second.cache_files
    assert first.cache_files[0]["filename"].startswith(str(tmp_path))
    assert first["box"][:] == second["box"][:]


def test_processes_draw_the_same_dataset(tmp_path):
    parallel = drawn_birds(num_images=birds._SHARD + 4, num_classes=7, size=64, cache_dir=tmp_path / "2", num_proc=2)
    single = drawn_birds(num_images=birds._SHARD + 4, num_classes=7, size=64, cache_dir=tmp_path / "1")
    assert parallel["box"][:] == single["box"][:]


@pytest.mark.parametrize(("options", "message"), [
    ({"split": "val"}, "split must be 'train' or 'test', got 'val'."),
    ({"num_images": 0}, "num_images must be at least 1, got 0."),
    ({"num_classes": 1}, "num_classes must be 2 to 512, got 1."),
    ({"num_classes": 0}, "num_classes must be 2 to 512, got 0."),
    ({"num_classes": 513}, "num_classes must be 2 to 512, got 513."),
    ({"size": 63}, "size must be at least 64 pixels for the parts to show, got 63."),
    ({"seed": -1}, "seed must be at least 0, got -1."),
])
def test_bad_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        drawn_birds(cache_dir=tmp_path, **options)


@pytest.mark.parametrize("label", [-1, 20])
def test_bad_label(label):
    with pytest.raises(ValueError, match=f"label must be 0 to 19 for 20 classes, got {label}"):
        draw(0, label)


def test_bad_size():
    with pytest.raises(ValueError, match="size must be at least 64 pixels for the parts to show, got 32"):
        draw(0, size=32)
