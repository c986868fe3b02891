"""Pictures of what a model sees."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import visualize
from helpers import command, run, train
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.patches import Circle, Wedge
from PIL import Image

from s3n_timm import S3N, save
from s3n_timm.classifier import Classifier
from s3n_timm.data import draw_bird
from s3n_timm.draw import COLORS, GREY, RIGHT, WRONG, draw_contact_sheet, draw_epochs, draw_explanation, overlay

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ("wren", "robin", "dunnock")
LONG = ("a $very$ long name of a class that nobody could ever read " * 3, "W" * 100, "two\nlines of \\frac{1}{2} $")
BRANCHES = ("discriminative", "complementary")


def create_model(**options):
    torch.manual_seed(0)
    return S3N("test_resnet", num_classes=3, backbone_args=dict(output_stride=16), **options).eval()


@pytest.fixture(scope="module")
def model():
    return create_model()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def pixels(image):
    return (image.permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)).clamp(0, 1)


def shown(axes):
    (image,) = axes.images
    return torch.tensor(image.get_array())


def assert_overlaid(axes, image, heat):
    """The axes show h×w heat over a C×H×W image, half and half, to a rounded byte."""
    heat = torch.nn.functional.interpolate(heat[None, None], image.shape[1:], mode="bilinear", align_corners=True)[0, 0]
    colors = colormaps["inferno"](((heat - heat.min()) / (heat.max() - heat.min())).numpy())[..., :3]
    expected = 255 * (pixels(image) + torch.tensor(colors)) / 2
    torch.testing.assert_close(shown(axes).double(), expected.double(), atol=1.1, rtol=0)


def texts_of(figure):
    return [text.get_text() for text in figure.texts]


def row_names(figure):
    return [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]


def test_every_panel_shows_what_explain_gives(model, images):
    seen = model.explain(images[:1])
    model.train()
    figure = draw_explanation(model, images[0], MEAN, STD, NAMES)
    assert model.training, "drawing leaves the mode as it was"
    model.eval()
    assert len(figure.axes) == 9
    original, response, own_map = figure.axes[:3]
    torch.testing.assert_close(shown(original), pixels(images[0]))
    assert original.get_title() == f"input, {int(seen.sample.peaks.sum())} peaks"
    assert_overlaid(response, images[0], seen.sample.response[0])
    for i, branch in enumerate(BRANCHES):
        torch.testing.assert_close(shown(figure.axes[3 * i + 4]), pixels(getattr(seen.sample, branch).image[0]))
    for axes, branch in zip((own_map, figure.axes[5], figure.axes[8]), ("original", *BRANCHES)):
        chances = getattr(seen.logits, branch)[0].softmax(0)
        label = int(chances.argmax())
        assert axes.get_title() == f"map: {NAMES[label]} {100 * float(chances[label]):.0f} %"
        image = images[0] if branch == "original" else getattr(seen.sample, branch).image[0]
        assert_overlaid(axes, image, seen.maps[branch][0, label])
    assert row_names(figure) == ["original", *BRANCHES]


@pytest.mark.parametrize("answer", ["joint", "mean", "discriminative"])
def test_heading_is_the_prediction(images, answer):
    model = create_model(answer=answer)
    chances = model(images[:1])[0].softmax(0).tolist()
    ranks = sorted(range(3), key=lambda label: -chances[label])
    first, *others = (f"{NAMES[label]} {100 * chances[label]:.0f} %" for label in ranks)
    heading, line, *_ = texts_of(draw_explanation(model, images[0], MEAN, STD, NAMES))
    assert heading == first
    assert line.endswith(" and ".join(others))
    assert ("joint" in line) == (answer == "joint")


def discs(axes):
    """Radii, and shares of the full circle by color, by center."""
    radii, shares = {}, {}
    for patch in axes.patches:
        place = tuple(round(float(x), 3) for x in patch.center)
        if isinstance(patch, Circle):
            radii[place] = patch.radius
        elif isinstance(patch, Wedge):
            shares.setdefault(place, {})[patch.get_facecolor()] = (patch.theta2 - patch.theta1) / 360
    return radii, shares


def test_peaks_are_drawn_where_they_are(images):
    model = create_model(peak_floor="none")
    sample = model.explain(images[:1]).sample
    peaks = sample.peaks[0].nonzero().tolist()
    assert len(peaks) > 2, "the case tells nothing"
    figure = draw_explanation(model, images[0], MEAN, STD)
    radii, shares = discs(figure.axes[0])
    places = {(row, column): (round(column * 95 / 30, 3), round(row * 63 / 30, 3)) for row, column in peaks}
    assert set(radii) == set(places.values())
    values = {places[row, column]: float(sample.response[0, row, column]) for row, column in peaks}
    ranks = sorted(values, key=values.get)
    assert all(radii[a] < radii[b] for a, b in itertools.pairwise(ranks)), "the larger, the stronger"
    for place, value in values.items():  # "expected" gives R to D, the rest to C
        assert shares[place].get(to_rgba(COLORS["discriminative"]), 0) == pytest.approx(value)
        assert shares[place].get(to_rgba(COLORS["complementary"]), 0) == pytest.approx(1 - value)
    for row, branch in enumerate(BRANCHES, 1):
        weights = getattr(sample, branch).weights[0]
        radii, shares = discs(figure.axes[3 * row])
        weights = {places[row, column]: float(weights[row, column]) for row, column in weights.nonzero().tolist()}
        assert set(radii) == set(weights)
        assert sorted(weights, key=weights.get) == sorted(radii, key=radii.get)
        assert all(share == {to_rgba(COLORS[branch]): 1} for share in shares.values())


def test_peaks_of_no_branch_are_grey(images):
    model = create_model(partition_eval="extreme", peak_floor="none", branches="O+D")
    _, shares = discs(draw_explanation(model, images[0], MEAN, STD).axes[0])
    colors = [dict(share) for share in shares.values()]
    assert colors.count({to_rgba(COLORS["discriminative"]): 1}) == 1
    assert all(share in ({to_rgba(COLORS["discriminative"]): 1}, {to_rgba(GREY): 1}) for share in colors)


def test_warp_is_drawn_where_it_reads(images):
    model = create_model(zoom_size=(48, 32))
    grid = model.explain(images[:1]).sample.discriminative.grid[0]
    axes = draw_explanation(model, images[0], MEAN, STD).axes[3]
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 95.5), (63.5, -0.5)), "the lines don't shrink the image"
    lines = [torch.tensor(line.get_xydata()) for line in axes.lines]
    drawn = (grid + 1) / 2 * torch.tensor([95, 63])
    expected = [*drawn.unbind(0), *drawn.unbind(1)]
    for line in lines:
        assert any(len(line) == len(each) and torch.allclose(line.float(), each) for each in expected)
    for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]):
        assert any(len(line) == len(edge) and torch.allclose(line.float(), edge) for line in lines)


@pytest.mark.parametrize(
    ("options", "panels"),
    [
        (dict(branches="O"), 2),
        (dict(branches="O+D"), 6),
        (dict(branches="O+C"), 6),
        (dict(branches="D+C"), 8),
        (dict(attention="response"), 9),
        (dict(attention="saliency"), 9),
        (dict(partition_eval="all"), 9),
        (dict(partition_eval="probability"), 9),
        (dict(preset="original"), 9),
        (dict(scan_size=32, zoom_size=(64, 48)), 9),
    ],
)
def test_every_kind_of_model(images, options, panels):
    model = create_model(**options)
    assert len(draw_explanation(model, images[0], MEAN, STD).axes) == panels
    tiles = 1 + len(model.warped)
    assert len(draw_contact_sheet(model, images, MEAN, STD).axes) == 3 * tiles
    assert len(draw_epochs([model, model], "12", images, MEAN, STD).axes) == 2 * 3 * tiles


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels_than_three(channels):
    image = torch.rand(channels, 64, 64)
    picture = shown(draw_explanation(create_model(in_chans=channels), image, (0.0,), (1.0,)).axes[0])
    torch.testing.assert_close(picture, (image[:3] if channels > 2 else image[:1].expand(3, -1, -1)).permute(1, 2, 0))


def test_what_does_not_differ_has_no_colors():
    figure = draw_explanation(create_model(), torch.zeros(3, 64, 64), MEAN, STD)
    assert figure.axes[0].get_title() == "input, no peaks"
    colors = shown(figure.axes[2]).numpy().astype(int)
    assert np.ptp(colors[8:-8, 8:-8], axis=(0, 1)).max() < 3, "rounding is not an answer"


def test_overlay_of_images_and_arrays():
    array = np.zeros((40, 60, 3), np.uint8)
    array[:, 30:] = 255
    heat = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    result = overlay(Image.fromarray(array), heat)
    assert (result.mode, result.size) == ("RGB", (60, 40))
    black, yellow = (np.array(colormaps["inferno"](end)[:3]) for end in (0.0, 1.0))
    for (x, y), brightness, color in (((0, 0), 0, black), ((59, 0), 1, black), ((0, 39), 0, yellow)):
        assert np.allclose(result.getpixel((x, y)), 255 * (brightness + color) / 2, atol=1)
    for same in (array, array / 255, (array / 255).astype(np.float32)):
        assert np.array_equal(overlay(same, heat), result)
    assert np.array_equal(overlay(array, heat, alpha=0), array)
    with pytest.raises(ValueError, match="alpha"):
        overlay(array, heat, alpha=2)
    assert overlay(array, torch.zeros(2, 2)).getpixel((0, 0)) == overlay(array, torch.ones(2, 2)).getpixel((0, 0))
    for image, wrong in ((array[..., 0], heat), (array, heat[None])):
        with pytest.raises(ValueError, match="image must be H×W×3 and heat h×w"):
            overlay(image, wrong)


def texts_on(figure):
    on_tiles = (text for axes in figure.axes for text in (axes.title, axes.yaxis.label))
    return [text for text in (*figure.texts, *on_tiles) if text.get_text()]


@pytest.mark.parametrize("size", [(64, 64), (192, 64), (32, 192)])
def test_text_fits(model, size):
    images = torch.rand(2, 3, *size)
    figures = (
        draw_explanation(model, images[0], MEAN, STD, LONG),
        draw_contact_sheet(model, images, MEAN, STD, LONG, (0, 1), LONG[:2]),
        draw_epochs([model] * 7, LONG * 2 + ("1",), images, MEAN, STD, LONG, (0, 1), LONG[:2]),
        draw_epochs([model] * 2, LONG[:2], images, MEAN, STD, LONG),
    )
    for figure in figures:
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)  # it places the names of rows
        boxes = [text.get_window_extent(renderer) for text in texts_on(figure)]
        for text, box in zip(texts_on(figure), boxes):
            assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) >= 0, text
        for (a, one), (b, other) in itertools.combinations(zip(texts_on(figure), boxes), 2):
            assert not one.padded(-1).overlaps(other.padded(-1)), f"{a} overlaps {b}"


def test_names_are_not_formulas(model, images):
    name = "$\\alpha$ for $5"
    formula, plain = (draw_explanation(model, images[0], MEAN, STD, [each] * 3).texts[0] for each in (name, "aa"))
    assert formula.get_text().replace("\\$", "$").startswith(name)
    figure = formula.get_figure()
    wide = formula.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width
    short = plain.get_window_extent(FigureCanvasAgg(plain.get_figure()).get_renderer()).width
    assert wide > short + 80, "a formula would be two letters"


def test_drawing_leaves_frozen_modules_frozen(images):
    model = S3N("test_resnet", num_classes=3).train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    draw_explanation(model, images[0], MEAN, STD)
    assert [module.training for module in model.modules()] == modes


def test_contact_sheet_shows_every_image(model, images):
    predictions = model(images).argmax(1).tolist()
    wrong = (predictions[1] + 1) % 3
    labels = (predictions[0], wrong, None)
    figure = draw_contact_sheet(model, images, MEAN, STD, NAMES, labels, ("a.jpg", "b.jpg", "c.jpg"))
    for i, image in enumerate(images):
        sample = model.explain(image[None]).sample
        for axes, expected in zip(figure.axes[3 * i:], (image, *(each.image[0] for each in sample[2:]))):
            torch.testing.assert_close(shown(axes), pixels(expected))
        assert set(discs(figure.axes[3 * i])[0]) == {
            (round(x * 95 / 30, 3), round(y * 63 / 30, 3)) for y, x in sample.peaks[0].nonzero().tolist()}
    chances = model(images).softmax(1).max(1).values.tolist()
    lines = {text.get_text(): text.get_color() for text in figure.texts}
    names = [f"{NAMES[label]} {100 * chance:.0f} %" for label, chance in zip(predictions, chances)]
    assert lines[f"✓ {names[0]}"] == RIGHT
    assert lines[f"✗ {names[1]}"] == WRONG
    assert lines[names[2]] == "black"
    assert {f"a.jpg, label {NAMES[labels[0]]}", f"b.jpg, label {NAMES[wrong]}", "c.jpg"} <= set(lines)


def test_images_of_a_sheet_differ_in_size(model, images):
    figure = draw_contact_sheet(model, [images[0], images[1, :, :, :64]], MEAN, STD)
    assert [tuple(shown(figure.axes[i]).shape) for i in (0, 3)] == [(64, 96, 3), (64, 64, 3)]


def test_strip_has_a_column_for_each_model(images):
    models = [create_model(), create_model(beta_discriminative=9.0)]
    models[1].backbone.fc.weight.data.neg_()
    figure = draw_epochs(models, ["first", "second"], images[:2], MEAN, STD, NAMES, titles=["a.jpg", "b.jpg"])
    assert texts_of(figure)[:2] == ["first", "second"]
    assert {"a.jpg", "b.jpg"} <= set(texts_of(figure))
    assert row_names(figure) == ["response", *BRANCHES] * 2
    for i, image in enumerate(images[:2]):
        for column, each in enumerate(models):
            seen = each.explain(image[None])
            response, *warped = figure.axes[6 * i + column:6 * (i + 1):2]
            assert_overlaid(response, image, seen.sample.response[0])
            assert len(discs(response)[0]) == int(seen.sample.peaks.sum())
            for axes, branch in zip(warped, BRANCHES):
                torch.testing.assert_close(shown(axes), pixels(getattr(seen.sample, branch).image[0]))
            label = int(seen.logits.joint.argmax())
            assert any(line.startswith(NAMES[label]) for line in texts_of(figure))


def test_errors(model, images):
    other = create_model(branches="O+D")
    for message, draw in (
        ("must be 3×H×W", lambda: draw_explanation(model, images[:1], MEAN, STD)),
        ("must be 3×H×W", lambda: draw_explanation(model, images[0, :2], MEAN, STD)),
        ("mean must have a number for each of 3", lambda: draw_explanation(model, images[0], (0.5, 0.5), STD)),
        ("std must have a number for each of 3", lambda: draw_contact_sheet(model, images, MEAN, (1.0,) * 4)),
        ("2 names for 3 classes", lambda: draw_explanation(model, images[0], MEAN, STD, ["a", "b"])),
        ("S3N model, got ResNet", lambda: draw_explanation(timm.create_model("test_resnet"), images[0], MEAN, STD)),
        ("num_classes=0", lambda: draw_explanation(S3N("test_resnet", num_classes=0), images[0], MEAN, STD)),
        ("no image", lambda: draw_contact_sheet(model, images[:0], MEAN, STD)),
        ("as many labels", lambda: draw_contact_sheet(model, images, MEAN, STD, labels=(0, 1))),
        ("as many labels", lambda: draw_contact_sheet(model, images, MEAN, STD, titles=("a", "b"))),
        ("in 0 to 2, got 3", lambda: draw_contact_sheet(model, images, MEAN, STD, labels=(0, 1, 3))),
        ("got 1 and 2", lambda: draw_epochs([model], ["1", "2"], images, MEAN, STD)),
        ("got 0 and 0", lambda: draw_epochs([], [], images, MEAN, STD)),
        (r"same branches, got O\+D\+C, O\+D", lambda: draw_epochs([model, other], ["1", "2"], images, MEAN, STD)),
    ):
        with pytest.raises(ValueError, match=message):
            draw()


# examples/visualize.py


def save_bird(path, number=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_bird(np.random.default_rng(number), number % 3, 3, 64).image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    config = dict(input_size=(3, 64, 64), mean=MEAN, std=STD, crop_pct=1.0)
    return save(model, tmp_path_factory.mktemp("weights"), label_names=NAMES, data_config=config)


@pytest.fixture
def draw_files(tmp_path):
    """Run the script in this process, and list what it wrote below its output."""
    def call(*words):
        output = tmp_path / "out"
        visualize.main(["--output", str(output), *map(str, words)])
        return sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    return call


def test_an_image_is_not_overwritten_where_upper_and_lower_case_are_the_same(weights, tmp_path):
    """On a Mac wren.png is another name of WREN.PNG."""
    birds = tmp_path / "birds"
    images = [save_bird(birds / "WREN.PNG"), save_bird(tmp_path / "more" / "Kiwi.png"), save_bird(birds / "kiwi.jpg")]
    visualize.main([*map(str, images), "--weights", str(weights), "--output", str(birds)])
    assert sorted(path.name for path in birds.iterdir()) == [
        "Kiwi.png", "WREN-2.png", "WREN.PNG", "kiwi-2.png", "kiwi.jpg"]


def test_script_draws_what_it_can_and_tells_the_rest(weights, tmp_path):
    birds = tmp_path / "birds"
    save_bird(birds / "wren" / "1.png")
    save_bird(birds / "1.jpg")
    save_bird(birds / "1.png", 1)
    (birds / "broken.jpg").write_bytes(b"not a picture")
    (birds / "notes.txt").write_text("no image")
    words = command("visualize.py", birds, "--weights", weights, "--output", birds / "pictures")
    printed = run(words, ok=False)
    assert "broken.jpg" in printed
    assert printed.strip().endswith("visualize.py: 1 of 4 images could not be read; the others are drawn.")
    assert "Traceback" not in printed
    written = sorted(path.relative_to(birds / "pictures") for path in (birds / "pictures").rglob("*.*"))
    assert [str(path) for path in written] == ["1-2.png", "1.png", "wren/1.png"]
    assert all(Image.open(birds / "pictures" / path).size[0] == 900 for path in written)
    (birds / "broken.jpg").unlink()
    visualize.main(list(map(str, words[2:])))  # it does not draw its own pictures
    assert len(list((birds / "pictures").rglob("*.*"))) == 3


def test_no_error_of_a_file_ends_the_others(weights, draw_files, tmp_path, monkeypatch, capsys):
    birds = [save_bird(tmp_path / f"{i}.png", i) for i in range(3)]
    prepare = Classifier.prepare

    def fail(self, image):  # as Pillow does on odd EXIF blocks
        if image == birds[1]:
            raise AttributeError("'str' object has no attribute 'numerator'")
        return prepare(self, image)

    monkeypatch.setattr(Classifier, "prepare", fail)
    with pytest.raises(ValueError, match="1 of 3 images"):
        draw_files(*birds, "--weights", weights)
    assert str(birds[1]) in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "2.png"]


def test_images_are_not_overwritten(weights, draw_files, tmp_path):
    bird = save_bird(tmp_path / "out" / "bird.png")
    before = bird.read_bytes()
    assert draw_files(bird, "--weights", weights) == ["bird-2.png", "bird.png"]
    assert bird.read_bytes() == before


def test_sheet_knows_labels_by_folders(draw_files, weights, monkeypatch, tmp_path):
    for i, name in enumerate(("robin", "wren", "others")):
        save_bird(tmp_path / "birds" / name / "a.png", i)
    calls = []
    draw = visualize.draw_contact_sheet
    monkeypatch.setattr(visualize, "draw_contact_sheet", lambda *args: calls.append(args) or draw(*args))
    monkeypatch.setattr(visualize, "PER_SHEET", 2)
    written = draw_files(tmp_path / "birds", "--weights", weights, "--sheet", "--format", "pdf")
    assert written == ["sheet-2.pdf", "sheet.pdf"]
    assert (tmp_path / "out" / "sheet.pdf").read_bytes().startswith(b"%PDF")
    assert [args[5:] for args in calls] == [([None, 1], ["others/a.png", "robin/a.png"]), ([0], ["wren/a.png"])]


def test_a_title_of_bytes_that_are_no_text(draw_files, weights, tmp_path):
    save_bird(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")))
    assert draw_files(tmp_path, "--weights", weights, "--sheet") == ["sheet.png"]


def test_several_weights_are_a_strip(draw_files, weights, monkeypatch, tmp_path):
    folders = [tmp_path / "run" / f"epoch-{i}" / "last" for i in (1, 2, 10)]
    for i, folder in enumerate(folders):
        save(create_model(beta_discriminative=2.0 + i), folder, label_names=NAMES)
    birds = [save_bird(tmp_path / f"{i}.png", i) for i in range(3)]
    calls = []
    draw = visualize.draw_epochs
    monkeypatch.setattr(visualize, "draw_epochs", lambda *args: calls.append(args) or draw(*args))
    assert draw_files(*birds, "--max-images", 2, "--weights", *folders) == ["0.png", "1.png"]
    assert [model.beta["discriminative"].item() for model in calls[0][0]] == [2, 3, 4]
    assert calls[0][1] == ["epoch-1", "epoch-2", "epoch-10"]
    assert "strip.png" in draw_files(*birds, "--sheet", "--weights", *folders)
    assert len(calls[-1][2]) == 3
    with pytest.raises(ValueError, match="differ in their data_config"):
        draw_files(birds[0], "--weights", folders[0], weights)


def test_a_checkpoint_is_drawn_with_the_config_of_its_run(draw_files, tmp_path):
    train("--epochs", 2, "--output", tmp_path / "run")
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(folders) == 2
    for folder in folders:
        shutil.copy(tmp_path / "run" / "last" / "config.json", folder)
    assert draw_files(save_bird(tmp_path / "bird.png"), "--weights", *folders) == ["bird.png"]


def test_orientation_of_photographs(draw_files, weights, tmp_path):
    upright = save_bird(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter clockwise to show it
    with Image.open(upright) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    draw_files(upright, tmp_path / "turned.png", "--weights", weights)
    pictures = [np.asarray(Image.open(tmp_path / "out" / name)) for name in ("upright.png", "turned.png")]
    assert np.array_equal(*pictures)


def test_bad_arguments_are_told_before_anything_is_drawn(draw_files, weights, tmp_path):
    bird = save_bird(tmp_path / "birds" / "bird.png")
    (tmp_path / "empty").mkdir()
    plain = save(timm.create_model("test_resnet", num_classes=3), tmp_path / "plain")
    other = save(create_model(), tmp_path / "other", label_names=("a", "b", "c"))
    for message, words in (
        ("empty holds no image", (bird, tmp_path / "empty", "--weights", weights)),
        ("nowhere.jpg does not exist", (bird, tmp_path / "nowhere.jpg", "--weights", weights)),
        ("nowhere", (bird, "--weights", tmp_path / "nowhere")),
        ("S3N", (bird, "--weights", plain)),
        ("differ in their label_names", (bird, "--weights", weights, other)),
        ("choose another", (bird.parent, "--weights", weights, "--output", bird.parent)),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            draw_files(*words)
    assert not list((tmp_path / "out").rglob("*.*"))
