"""s3n_timm/images.py: files of every kind, and folders of them."""

import contextlib
import io
import logging
import os
import pickle
import random
import subprocess
import warnings

import fsspec
import numpy as np
import pytest
from PIL import Image, ImageOps

from s3n_timm.data import read_stored
from s3n_timm.images import FORMATS, find_images, image_mode, image_size, image_suffixes, printable, read_image

RAMP = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (96, 1))
QUARTERS = np.zeros((40, 80, 3), np.uint8)  # no turn or reflection looks like another
QUARTERS[:20, :40], QUARTERS[20:, :40] = 255, 100


def save(path, size=(30, 20), color="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def as_bytes(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# pixels


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_16_bits_are_scaled(mode):
    seen = np.asarray(read_image(as_bytes(Image.fromarray(RAMP.astype(np.uint16) * 257)), mode))
    expected = RAMP if mode == "L" else np.stack([RAMP] * 3, -1)
    assert np.array_equal(seen, expected)


@pytest.mark.parametrize(
    ("mode", "values"), [("F", [0, 1.01]), ("F", [0, 255]), ("F", [-0.1, 1]), ("I", [0, 255]), ("I", [0, 65536])])
def test_values_of_an_unknown_range_are_refused(mode, values):
    image = Image.fromarray(np.asarray([values], dtype=np.float32 if mode == "F" else np.int32))
    assert image.mode == mode
    with pytest.raises(ValueError, match="PIL image"):
        read_image(image)


def test_black_is_black():
    for mode in ("I", "F", "I;16"):
        assert np.asarray(read_image(Image.new(mode, (4, 4)))).max() == 0


def test_an_address_is_not_said_to_be_missing():
    with pytest.raises(ValueError, match=r"https://example\.com/bird\.png .*download"):
        read_image("https://example.com/bird.png")


def test_transparent_16_bits_lie_on_white():
    values = np.zeros((8, 8), np.uint16)
    values[:, 4:] = 30_000
    image = Image.fromarray(values)
    content = as_bytes(image, transparency=0)
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.info["transparency"] == 0
    seen = np.asarray(read_image(content, "L"))
    assert (seen[:, :4] == 255).all()
    assert (seen[:, 4:] == 117).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_cut_outs_lie_on_white(mode):
    pixels = np.zeros((10, 10, 4), np.uint8)
    pixels[3:6, 3:6, 3] = 255
    seen = np.asarray(read_image(as_bytes(Image.fromarray(pixels)), mode))
    assert seen[4, 4].max() == 0
    assert seen[0, 0].min() == 255


def test_grayscale_keeps_its_values():
    assert np.array_equal(np.asarray(read_image(RAMP, "L")), RAMP)
    red = Image.new("RGB", (4, 4), "red")
    assert read_image(red, "L").getpixel((0, 0)) == red.convert("L").getpixel((0, 0))
    assert (image_mode(1), image_mode(3)) == ("L", "RGB")
    with pytest.raises(ValueError, match="4 channels"):
        image_mode(4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(QUARTERS).save(path, exif=exif)
    seen = read_image(path)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(seen), np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    assert image_size(path) == seen.size == ((40, 80) if orientation > 4 else (80, 40))


def exif_block(resolution_type, count, value):
    """Big-endian EXIF with orientation 6 and a resolution of the given type."""
    entries = [(0x0112, 3, 1, b"\x00\x06\x00\x00"), (0x011A, resolution_type, count, (38).to_bytes(4, "big"))]
    body = b"".join(tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + number.to_bytes(4, "big") + data
                    for tag, kind, number, data in entries)
    return b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02" + body + b"\x00" * 4 + value


@pytest.mark.parametrize("block", [
    exif_block(10, 1, b"\xff\xff\xff\xff\x00\x00\x00\x00"),  # -1/0
    exif_block(5, 1, b"\xff\xff\xff\xff\x00\x00\x00\x00"),
    exif_block(2, 8, b"seventy\x00"),
])
def test_odd_tags_beside_the_orientation_do_no_harm(block):
    seen = read_image(as_bytes(Image.fromarray(QUARTERS), "JPEG", exif=block))
    assert seen.size == (40, 80)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File")
def test_mutated_exif_never_raises_anything_but_a_value_error():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010F] = 6, 72.0, "maker"
    content = as_bytes(Image.new("RGB", (16, 12)), "JPEG", exif=exif)
    start = content.index(b"Exif\x00\x00")
    rng, read = random.Random(0), 0
    for _ in range(1500):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            changed[start + 6 + rng.randrange(len(exif.tobytes()) - 6)] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            read += read_image(bytes(changed)).mode == "RGB"
    assert read > 1400, "a damaged EXIF block is no reason to lose the image"


def test_eps_does_not_start_ghostscript(tmp_path, monkeypatch):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
    (tmp_path / "bird.png").write_bytes(content)
    (tmp_path / "tool").mkdir()
    tool = tmp_path / "tool" / "gs"
    tool.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "tool"), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    with Image.open(tmp_path / "bird.png") as image, pytest.raises((OSError, ValueError, subprocess.SubprocessError)):
        image.load()
    assert (tmp_path / "started").exists(), "Pillow would not have started it anyway: the test shows nothing"
    (tmp_path / "started").unlink()
    for file in (tmp_path / "bird.png", content):
        with pytest.raises(ValueError, match="is not an image"):
            read_image(file)
    assert not (tmp_path / "started").exists()
    assert ".eps" not in image_suffixes()


def test_warning_filters_stay_alone(monkeypatch):
    """catch_warnings changes the filters of all threads."""
    def fail(*args, **options):
        raise AssertionError("warnings.catch_warnings was entered")

    content = as_bytes(Image.new("RGB", (120, 100)))
    monkeypatch.setattr(warnings.catch_warnings, "__enter__", fail)
    assert read_image(content).size == (120, 100)


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_too_many_pixels_are_refused_whatever_the_filters_say(monkeypatch, action):
    content = as_bytes(Image.new("RGB", (120, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        for read in (read_image, image_size):
            with pytest.raises(ValueError, match="more than 10,000 pixels"):
                read(content)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert image_size(content) == (120, 100)


def test_a_pipe_or_device_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/null"):
        with pytest.raises(ValueError, match="not a regular file"):
            read_image(path)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "bird.png")
    assert read_image("~/bird.png").size == (30, 20)
    assert list(find_images("~")) == [tmp_path / "bird.png"]


def test_errors_can_be_sent_between_processes_and_printed(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    with pytest.raises(ValueError, match=r"caf\\xe9\.png does not exist") as error:
        read_image(path)
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value)
    str(again).encode()


def test_stored_images(tmp_path):
    path = save(tmp_path / "bird.png")
    fsspec.filesystem("memory").pipe("bird.png", path.read_bytes())
    for stored in (dict(path=str(path), bytes=None), dict(path=None, bytes=path.read_bytes()),
                   dict(path="elsewhere.png", bytes=path.read_bytes()), dict(path="memory://bird.png", bytes=None)):
        assert read_stored(stored).size == (30, 20)
    with pytest.raises(ValueError, match=r"elsewhere\.png is not an image"):
        read_stored(dict(path="elsewhere.png", bytes=b"text"))
    with pytest.raises(ValueError, match="cannot be fetched"):
        read_stored(dict(path="memory://none.png", bytes=None))
    with pytest.raises(TypeError, match="got NoneType"):
        read_stored(dict(path=None, bytes=None))


# folders


def names(folder):
    return [str(path.relative_to(folder)) for path in find_images(folder)]


def test_every_suffix_of_a_format_that_is_read(tmp_path):
    assert {".jfif", ".jpe", ".jp2", ".tiff", ".webp", ".ppm", ".tga"} <= image_suffixes()
    for name in ("a.JPE", "b.jfif", "c.jp2", "d.Tiff", "e.GIF"):
        save(tmp_path / name)
    assert names(tmp_path) == ["a.JPE", "b.jfif", "c.jp2", "d.Tiff", "e.GIF"]
    assert all(read_image(path).size == (30, 20) for path in find_images(tmp_path))
    assert not {"EPS", "WMF", "IPTC", "MPEG"} & set(FORMATS)


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere" / "b.png")
    save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "pictures")
    (tmp_path / "pictures" / "self").symlink_to(".")
    (tmp_path / "pictures" / "c.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "pictures" / "broken.png").symlink_to(tmp_path / "none.png")
    (tmp_path / "pictures" / "loop.png").symlink_to("loop.png")
    assert names(tmp_path / "pictures") == ["a.png", "c.png", "linked/b.png"]


def test_a_drive_without_file_numbers_has_subfolders_too(tmp_path, monkeypatch):
    save(tmp_path / "sub" / "deeper" / "a.png")
    stat = os.stat

    def stat_without_number(path, **options):
        mode, _, *others = stat(path, **options)
        return os.stat_result((mode, 0, *others))

    monkeypatch.setattr(os, "stat", stat_without_number)
    assert names(tmp_path) == ["sub/deeper/a.png"]


def test_what_is_hidden_is_passed_over_and_what_is_no_image_is_counted(tmp_path, caplog):
    for name in (".hidden.png", ".ipynb_checkpoints/a.png", "__MACOSX/b.png", "sub/c.png"):
        save(tmp_path / name)
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        (tmp_path / name).write_bytes(b"")
    caplog.set_level(logging.INFO)
    assert names(tmp_path) == ["sub/c.png"]
    assert not caplog.messages
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "sub" / "more.txt").write_text("")
    os.mkfifo(tmp_path / "sub" / "pipe.png")
    assert names(tmp_path) == ["sub/c.png"]
    assert len(caplog.messages) == 1
    assert "3 files" in caplog.messages[0]
    assert "2 .txt" in caplog.messages[0]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_images(save(tmp_path / "a.png"))


def test_brackets_are_no_pattern_and_other_bytes_are_escaped(tmp_path):
    folder = tmp_path / "birds [2020]*"
    save(folder / "a[1].png")
    with open(os.fsencode(folder) + b"/\xe9.png", "wb") as file:
        file.write(as_bytes(Image.new("RGB", (5, 5))))
    found = list(find_images(folder))
    assert [printable(path.name) for path in found] == ["a[1].png", "\\xe9.png"]
    assert [read_image(path).size for path in found] == [(30, 20), (5, 5)]
