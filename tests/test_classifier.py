"""Labels for images of every kind."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageCms
from timm.data import create_transform, resolve_data_config

import s3n_timm
from s3n_timm import S3N, Classifier, save
from s3n_timm.data import drawn_birds
from s3n_timm.images import read_image

NAMES = ["robin", "wren", "jay", "crow", "swift", "owl"]


def build():
    torch.manual_seed(0)
    model = S3N("test_resnet", len(NAMES)).eval()
    torch.nn.init.normal_(model.fusion.weight, std=2)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    save(build(), path, label_names=NAMES)
    return path


@pytest.fixture(scope="module")
def classifier(folder):
    return Classifier.from_pretrained(folder, batch_size=4)


@pytest.fixture(scope="module")
def birds():
    return drawn_birds("test", 6, 6, 120)["image"][:]


def test_answers_are_those_of_the_model(folder, classifier, birds):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    with torch.no_grad():
        expected = model(torch.stack([transform(image) for image in birds])).softmax(1)
    answers = classifier(birds, top_k=3)
    assert [len(answer) for answer in answers] == [3] * len(birds)
    for answer, row in zip(answers, expected):
        best = row.topk(3)
        assert [each["label"] for each in answer] == [NAMES[i] for i in best.indices]
        assert [each["score"] for each in answer] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert len({answer[0]["score"] for answer in answers}) == len(birds), "the case tells nothing"


def test_one_image_and_many_and_none(classifier, birds):
    one = classifier(birds[0])
    assert [each["label"] for each in one] == [each["label"] for each in classifier(birds)[0]][:5]
    assert len(classifier(birds[0], top_k=99)) == len(NAMES)
    assert classifier([]) == []
    assert [answer[0]["score"] for answer in classifier(tuple(birds))] == pytest.approx(
        [classifier(image)[0]["score"] for image in birds], rel=1e-4)


def test_kinds_of_images_agree(classifier, birds, tmp_path):
    image = birds[1]
    image.save(tmp_path / "bird.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [tmp_path / "bird.png", str(tmp_path / "bird.png"), array, array / 255, array.astype(np.float32) / 255,
             tensor, tensor.float() / 255, np.asarray(image.convert("RGBA")), tensor[None][0], array[::-1][::-1]]
    for kind in kinds:
        assert torch.equal(classifier.prepare(kind), classifier.prepare(image))
    batch = torch.stack([tensor, tensor])
    assert classifier(batch)[1] == classifier(batch)[0]
    assert torch.equal(classifier.prepare((tmp_path / "bird.png").read_bytes()), classifier.prepare(image))
    gray = image.convert("L")
    for kind in (np.asarray(gray), torch.from_numpy(np.asarray(gray).copy())[None]):
        assert torch.equal(classifier.prepare(kind), classifier.prepare(gray))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B"])
def test_every_mode_shows_the_same_picture(mode):
    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (96, 1))
    if mode.startswith("I"):
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
        if mode == "I;16B":
            image = Image.frombytes(mode, image.size, (ramp.astype(">u2") * 257).tobytes())
    elif mode == "F":
        image = Image.fromarray(ramp.astype(np.float32) / 255)
    else:
        image = Image.fromarray(ramp)
        image = image.convert("RGB").convert(mode) if mode in ("LAB", "HSV", "YCbCr", "CMYK", "RGBA") else (
            image.convert("RGBA").convert(mode) if mode in ("PA", "LA") else image.convert(mode))
    if mode == "LAB":
        change = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(Image.fromarray(ramp).convert("RGB"), change)
    seen = np.asarray(read_image(image)).astype(float)
    assert seen.shape == (96, 128, 3)
    error = np.abs(seen.mean((0, 2)) - ramp[0])
    assert error.mean() < (70 if mode == "1" else 6), "dithered to two values" if mode == "1" else mode
    assert seen[:, :20].mean() < 60 < 180 < seen[:, -20:].mean()


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert np.asarray(read_image(clear)).min() == 255
    palette = Image.new("P", (8, 8), 0)
    palette.info["transparency"] = 0
    assert np.asarray(read_image(palette)).min() == 255


def test_what_was_turned_is_not_turned_again(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for name in ("a.png", "a.jpg", "a.webp", "a.tif", "xmp.jpg", "xmp.webp"):
        Image.new("RGB", (40, 80)).save(tmp_path / name, **dict(xmp=xmp) if name[0] == "x" else dict(exif=exif))
        once = read_image(tmp_path / name)
        assert once.size == read_image(once).size == (80, 40), name


def test_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "two.gif").getpixel((5, 5)) == (255, 0, 0)


def write(path, content):
    path.write_bytes(content)
    return path


BAD = {
    "missing": (lambda p: p / "none.jpg", ValueError, "does not exist"),
    "directory": (lambda p: p, ValueError, "cannot be read"),
    "text": (lambda p: write(p / "a.jpg", b"hello"), ValueError, "is not an image"),
    "empty": (lambda p: write(p / "a.jpg", b""), ValueError, "is not an image"),
    "none": (lambda p: None, TypeError, "must be a path"),
    "number": (lambda p: 3.0, TypeError, "got float"),
    "rank": (lambda p: np.zeros((2, 3, 4, 5), np.uint8), ValueError, "must be H×W"),
    "channels": (lambda p: torch.zeros(5, 8, 8), ValueError, "must be 3×H×W"),
    "no pixel": (lambda p: np.zeros((0, 4, 3), np.uint8), ValueError, "no pixel"),
    "NaN": (lambda p: np.full((4, 4, 3), np.nan), ValueError, r"must lie in \[0, 1\]"),
    "bytes as floats": (lambda p: torch.full((3, 4, 4), 200.0), ValueError, r"must lie in \[0, 1\]"),
    "integers": (lambda p: torch.zeros(3, 4, 4, dtype=torch.long), TypeError, "must be bytes"),
    "a line": (lambda p: np.zeros((1, 50_000, 3), np.uint8), ValueError, "too long and thin, 50000×1 pixels"),
    "negative": (lambda p: Image.fromarray(np.full((4, 4), -1, np.int32)), ValueError, "must lie in"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused(name, classifier, tmp_path):
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        classifier(make(tmp_path))


def test_a_truncated_file_is_named(classifier, birds, tmp_path):
    birds[0].save(tmp_path / "whole.jpg")
    cut = write(tmp_path / "cut.jpg", (tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"image 1: .*cut.jpg cannot be read as an image"):
        classifier([tmp_path / "whole.jpg", cut])


def test_models(folder, tmp_path):
    plain = Classifier(timm.create_model("test_resnet", num_classes=3))
    assert not plain.model.training
    assert sorted(each["label"] for each in plain(Image.new("RGB", (50, 40)))) == ["0", "1", "2"]
    assert Classifier.from_pretrained(str(folder)).label_names == NAMES
    with pytest.raises(ValueError, match="no classifier"):
        Classifier(timm.create_model("test_resnet", num_classes=0))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Classifier(build(), batch_size=0)
    with pytest.raises(ValueError, match="no such folder"):
        Classifier.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json"):
        Classifier.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Classifier.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        s3n_timm.Classifier(build())([], top_k=0)


# models that read otherwise


@pytest.mark.parametrize("make", [
    lambda **options: S3N("test_resnet", 4, **options),
    lambda **options: timm.create_model("test_resnet", num_classes=4, **options),
])
def test_models_of_one_channel_read_grey(make, birds):
    torch.manual_seed(0)
    classifier = Classifier(make(in_chans=1))
    image = classifier.prepare(birds[0])
    assert image.shape[0] == 1
    assert torch.equal(image, classifier.prepare(birds[0].convert("L")))
    assert abs(image.mean()) < 2, "not normalized"
    assert len(classifier(birds[:2])) == 2
    assert classifier.data_config["input_size"][0] == 1
    for channels in (2, 4):
        with pytest.raises(ValueError, match=f"{channels} channels"):
            Classifier(make(in_chans=channels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_get_the_precision_of_the_model(dtype, birds):
    birds = birds[:2]
    expected = Classifier(build()).probabilities(birds)
    found = Classifier(build().to(dtype))
    assert found.probabilities(birds).dtype == torch.float32
    with pytest.raises(TypeError, match="sequence"):
        found.probabilities("bird.png")
    if dtype == torch.float64:
        torch.testing.assert_close(found.probabilities(birds), expected, atol=1e-4, rtol=0)
    plain = timm.create_model("test_resnet", num_classes=3).to(dtype)
    assert Classifier(plain).probabilities(birds).sum(1).tolist() == pytest.approx([1, 1], abs=0.01)


def test_classes_of_one_name_stay_apart():
    model = timm.create_model("test_resnet", num_classes=3)
    model.pretrained_cfg["label_names"] = ["robin"] * 3
    answer = Classifier(model)(Image.new("RGB", (50, 40)))
    assert [each["label"] for each in answer] == ["robin"] * 3
    assert sum(each["score"] for each in answer) == pytest.approx(1)


# early exit


def spread(birds):
    """The entropies of the O branch and a threshold between them."""
    classifier = Classifier(build())
    with torch.no_grad():
        torch.nn.init.normal_(classifier.model.backbone.get_classifier().weight, std=0.5)
        seen = [classifier.explain(bird) for bird in birds]
    entropy = torch.cat([torch.special.entr(each.logits.original.softmax(1)).sum(1) for each in seen])
    return classifier.model, seen, entropy, entropy.sort().values[2:4].mean().item()


def test_confident_images_are_answered_by_the_original_branch(birds):
    model, seen, entropy, threshold = spread(birds)
    original = torch.cat([each.logits.original for each in seen]).softmax(1)
    joint = torch.cat([each.logits.joint for each in seen]).softmax(1)
    expected = torch.where((entropy < threshold)[:, None], original, joint)
    model.set_branch_logits(True)  # which is no business of the answer
    found = Classifier(model, exit_entropy=threshold, batch_size=4).probabilities(birds)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found - joint).abs().amax(1).gt(1e-3).sum() == 3, "three of six exit"
    torch.testing.assert_close(Classifier(model, exit_entropy=0).probabilities(birds), joint, atol=1e-5, rtol=1e-4)


def test_threshold_of_the_model_is_the_default(birds, tmp_path):
    model, _, _, threshold = spread(birds)
    model.configure(exit_entropy=threshold)
    expected = Classifier(model, exit_entropy=threshold).probabilities(birds)
    torch.testing.assert_close(Classifier(model).probabilities(birds), expected)
    save(model, tmp_path, label_names=NAMES)
    assert Classifier.from_pretrained(tmp_path).exit_entropy == threshold
    assert Classifier.from_pretrained(tmp_path, exit_entropy=0).exit_entropy == 0
    assert Classifier(build()).exit_entropy == 0
    for wrong in ("much", -1, float("nan"), True):
        with pytest.raises(ValueError, match="exit_entropy must be at least 0"):
            Classifier(model, exit_entropy=wrong)


def test_early_exit_needs_the_original_branch():
    for model in (timm.create_model("test_resnet", num_classes=3), S3N("test_resnet", 3, branches="D+C")):
        with pytest.raises(ValueError, match="O branch"):
            Classifier(model, exit_entropy=0.5)
        assert Classifier(model).exit_entropy == 0


# what it sees


def test_explanation_and_drawing(classifier, birds):
    pytest.importorskip("matplotlib")
    seen = classifier.explain(birds[0])
    expected = classifier.model.explain(classifier.prepare(birds[0])[None])
    torch.testing.assert_close(seen.logits.joint, expected.logits.joint)
    assert seen.sample.peaks.shape[0] == 1
    figure = classifier.draw(birds[0], seen)
    said = " ".join(text.get_text() for text in figure.texts)
    assert classifier(birds[0])[0]["label"] in said
    other = classifier.draw(birds[0], classifier.explain(birds[1]))
    assert " ".join(text.get_text() for text in other.texts) != said, "the explanation that is given is drawn"
    plain = Classifier(timm.create_model("test_resnet", num_classes=3))
    for ask in (plain.explain, plain.draw):
        with pytest.raises(ValueError, match="S3N"):
            ask(birds[0])
