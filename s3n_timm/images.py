"""Images: anything that shows one becomes a PIL image with 8 bits per channel, in one way for every use.

Training, evaluation, quantization, prediction and drawing all read images by `read_image`, so that a model sees the
same pixels of the same file everywhere.
"""

import io
import logging
import math
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.data import resolve_data_config
from torch import Tensor, nn

ImageLike: TypeAlias = "str | Path | bytes | Mapping[str, Any] | Image.Image | np.ndarray | Tensor"
KINDS = "a path, a file's bytes, a PIL image, an H×W or H×W×3 array, or a 3×H×W tensor"
MAX_ASPECT = 20  # long to short side: resized to the height of the input, a line of pixels would fill any memory
# Formats that Pillow decodes itself. Others start a program of the system (EPS starts Ghostscript, WMF a part of
# Windows), open what they contain as any format (IPTC), or are only identified (MPEG, BUFR, GRIB, HDF5).
FORMATS = (
    "PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "MPO", "PPM", "TGA", "ICO", "ICNS", "CUR", "DIB",
    "DDS", "PSD", "QOI", "SGI", "SUN", "PCX", "DCX", "XBM", "XPM", "BLP", "FITS", "FLI", "FTEX", "GBR", "IM", "MSP",
    "PCD", "PIXAR",
)
SYSTEM_FILES = (".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# where Pillow looks for an orientation, in an image's `info`
_ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")

_logger = logging.getLogger(__name__)


class _Refused(ValueError):
    """This module's own errors, among those that Pillow raises."""


def read_image(image: ImageLike, mode: str = "RGB") -> Image.Image:
    """Read an image.

    Only the orientation of the EXIF block is applied, transparent pixels are laid on white, 16 bits are scaled to 8,
    and of several frames the first is read.

    Args:
        image: a path; the bytes of an image file; what a data set stores, a mapping with path and bytes, one of which
            may be None; a PIL image of any mode; an H×W, H×W×3 or H×W×4 array; or a 1×H×W or 3×H×W tensor. Arrays and
            tensors hold bytes (uint8), or floats in [0, 1]. Files have one of `FORMATS`.
        mode: 'RGB', or 'L' for a model of one channel, see `image_mode`.

    Returns:
        PIL image of that mode.

    Raises:
        TypeError: it is none of these.
        ValueError: it cannot be read, has no pixels, more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, a
            side more than 20 times as long as the other, or pixel values out of range.
    """
    if isinstance(image, Mapping) and {"path", "bytes"} <= image.keys():
        if isinstance(image["bytes"], bytes):
            return _decode(image["bytes"], mode, image["path"] or None)
        image = image["path"]
    if isinstance(image, (str, Path, bytes)):
        return _decode(image, mode)
    if isinstance(image, Image.Image):
        try:
            return _convert(image, mode)
        except _Refused:
            raise
        except Exception as error:
            raise _Refused(f"the PIL image cannot be read ({_describe(error)}).") from error
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise _Refused(f"a tensor must be 3×H×W or 1×H×W, got {tuple(image.shape)}.")
        image = image.detach().cpu()
        array = (image.float() if image.is_floating_point() else image).movedim(0, -1).numpy()
        return _from_array(array[..., 0] if array.shape[-1] == 1 else array, mode)
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise _Refused(f"an array must be H×W, H×W×3 or H×W×4, got {image.shape}.")
        return _from_array(image, mode)
    raise TypeError(f"an image must be {KINDS}, got {type(image).__name__}.")


def image_size(file: str | Path | bytes, *, name: str | None = None, verify: bool = False) -> tuple[int, int]:
    """Width and height in pixels that `read_image` gives an image file.

    Args:
        file: a path or the bytes of an image file.
        name: what an error calls it; its path by default.
        verify: decode the pixels too, not the header alone.

    Raises:
        ValueError: `read_image` would refuse it, as far as has been read.
    """
    if verify:
        return _decode(file, "RGB", name).size
    with _Opened(file, name) as image:
        turned = (
            image.format != "TIFF"  # Pillow has swapped the sides already
            and not (image.format == "PNG" and "exif" not in image.info)  # asked for EXIF, Pillow decodes the pixels
            and _orientation(image) >= 5
        )
        return (image.height, image.width) if turned else image.size


def input_config(model: nn.Module, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The preprocessing of a model, as `timm.data.resolve_data_config` gives it, with the channels that it reads.

    timm keeps the channels of the pretrained config where `create_model` was given others by `in_chans`.

    Args:
        model: any timm model.
        given: what takes the place of the model's own, such as `dict(img_size=448, crop_mode="squash")`.
    """
    config = resolve_data_config(dict(given or {}), model=model)
    stated, *size = config["input_size"]
    channels = getattr(model, "in_chans", None)
    if channels is None:
        first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
        names = [first] if isinstance(first, str) else list(first or ())
        modules = dict(model.named_modules())
        known = (getattr(modules.get(name), "in_channels", None) for name in names)
        channels = next(filter(None, known), stated)
        if channels == 16 * stated:  # stems that bring 4×4 pixels into the channels
            channels = stated
    config["input_size"] = (channels, *size)
    if channels == 1:  # the normalization of colors, of their mean
        config |= {name: (math.fsum(config[name]) / len(config[name]),) for name in ("mean", "std")}
    return config


def image_mode(channels: int) -> str:
    """The mode in which a model of so many input channels reads images.

    Raises:
        ValueError: images are not read with so many channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"The model reads images of {channels} channels; only 1 (grayscale) and 3 (RGB) can be read.")
    return "L" if channels == 1 else "RGB"


def expand_path(path: str | Path) -> Path:
    """A path with ~ expanded, unless something is really called so."""
    return Path(path) if os.path.lexists(path) else Path(os.path.expanduser(path))


def printable(name: str | Path) -> str:
    """A name that can be printed and stored as UTF-8; bytes that are not UTF-8 are escaped as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# folders


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes of the files that `read_image` opens."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())


def is_of_system(name: str) -> bool:
    """Whether an operating system puts files and folders of this name beside what its users look at."""
    return name.startswith("._") or name.lower() in SYSTEM_FILES


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or kept by an operating system for itself, and so is never data."""
    return name.startswith(".") or is_of_system(name)


def existing_folder(folder: str | Path) -> Path:
    """A folder, with ~ expanded.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    path = expand_path(folder)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{printable(path)} {what}: name a folder of images.")
    return path


def find_images(folder: str | Path, beside: Collection[str] = ()) -> Iterator[Path]:
    """Find the image files in a folder and the folders below it, by their suffixes.

    Links are followed unless they lead back to a folder above them. Hidden files and folders are passed over; how many
    other files are passed over is logged in one line once the search ends.

    Args:
        folder: ~ is expanded.
        beside: names of files that belong to the images and are not logged.

    Returns:
        Iterator over paths that begin with the folder, in a fixed order: sorted by name, the files of a folder before
        its subfolders. The names of one folder at a time are held in memory.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: (while iterating) a folder cannot be read.
    """
    return _search(existing_folder(folder), beside)


def _search(folder: Path, beside: Collection[str]) -> Iterator[Path]:
    others: Counter[str] = Counter()
    yield from _walk(folder, (), beside, others)
    if others:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(5))
        more = ", …" if len(others) > 5 else ""
        _logger.warning(
            "%s: %d files that are not images were passed over (%s%s).", printable(folder), others.total(), kinds, more)


def _walk(
        folder: Path, above: tuple[tuple[int, int], ...], beside: Collection[str], others: Counter[str],
) -> Iterator[Path]:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if status.st_ino and here in above:  # drives without numbers give 0
        return
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    folders = []
    for entry in found:
        path = folder / entry.name
        # an entry knows what it is without asking the disk; a path knows links that lead in circles
        asked = path if entry.is_symlink() else entry
        if asked.is_dir():
            folders.append(path)
        elif path.suffix.lower() in image_suffixes() and asked.is_file():  # no pipe, device or broken link
            yield path
        elif entry.name not in beside:
            others[printable(path.suffix.lower())] += 1
    for path in folders:
        yield from _walk(path, (*above, here), beside, others)


# one image


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__


class _Opened:
    """An opened image file, whatever goes wrong with which is a ValueError."""

    def __init__(self, file: str | Path | bytes, name: str | None = None) -> None:
        self.name = name or ("the file" if isinstance(file, bytes) else printable(file))
        self.file = file
        self.image: Image.Image | None = None

    def __enter__(self) -> Image.Image:
        try:
            self.image = Image.open(self._source(), formats=_formats())
            _check_size(self.image, self.name)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self.image

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.image is not None:
            self.image.close()
        if error is None or isinstance(error, _Refused) or not isinstance(error, Exception):
            return
        if isinstance(error, UnidentifiedImageError):
            raise _Refused(f"{self.name} is not an image.") from None
        if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
            raise _Refused(f"{self.name} {_too_large()}") from None
        # damaged files make Pillow raise nearly everything, struct.error and AttributeError among it
        raise _Refused(f"{self.name} cannot be read as an image ({_describe(error)}).") from error

    def _source(self) -> Path | io.BytesIO:
        if isinstance(self.file, bytes):
            return io.BytesIO(self.file)
        path = expand_path(self.file)
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            web = "://" in str(self.file)
            why = "is an address, which is not fetched: download it first" if web else "does not exist"
            raise _Refused(f"{self.name} {why}.") from None
        if not stat.S_ISREG(mode):  # to open a pipe or a terminal can block for ever
            what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise _Refused(f"{self.name} cannot be read as an image: it is {what}.")
        return path


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF and JPEG2000 are not in every build


def _too_large() -> str:
    return f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller."


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if not width * height:
        raise _Refused(f"{name} has no pixels: its size is {width}×{height}.")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise _Refused(f"{name} {_too_large()}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _Refused(f"{name} is too long and thin, {width}×{height} pixels: crop it first.")


def _decode(file: str | Path | bytes, mode: str, name: str | None = None) -> Image.Image:
    opened = _Opened(file, name)
    with opened as image:
        return _convert(image, mode, opened.name)


def _from_array(array: np.ndarray, mode: str) -> Image.Image:
    if 0 in array.shape:
        raise _Refused(f"the array has no pixels: its shape is {array.shape}.")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise _Refused("the array has pixel values out of range: floats must lie in [0, 1].")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"Pixel values must be bytes (uint8) or floats in [0, 1], got {array.dtype}.")
    return _convert(Image.fromarray(np.ascontiguousarray(array)), mode, "the array")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) where there is none or the EXIF block is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return int(value) if value in _TURNS else 1
    except Exception:  # the block is not needed to read the pixels
        return 1


def _convert(image: Image.Image, mode: str, name: str = "the PIL image") -> Image.Image:
    _check_size(image, name)
    image.load()  # turns a TIFF file, whose EXIF then has no orientation
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
        for key in _ORIENTED:  # or reading the result again would turn it again
            image.info.pop(key, None)
    transparent = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        # 32 bits have no fixed white: integers are taken for 16 bits, as Pillow opens some of these files so
        top = 1.0 if image.mode == "F" else 65535.0
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
            raise _Refused(f"{name} has pixel values out of range: they must lie in [0, {top:.0f}].")
        if image.mode == "I" and 0 < values.max() <= 255:
            raise _Refused(f"{name} holds 32-bit integers of at most 255, nearly black as 16 bits: store it as 8 bits.")
        scaled = (values * (255 / top)).round().astype(np.uint8)
        if isinstance(transparent, int):
            scaled[values == transparent] = 255
        return Image.fromarray(scaled).convert(mode)
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or transparent is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode) if image.mode == "L" else image.convert("RGB").convert(mode)
