"""Anything that shows an image, as an RGB image."""

import io
import math
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ImageLike: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray | Tensor"
MAX_ASPECT = 20  # long to short side: a line of pixels, resized to the height of the input, would fill any memory
KINDS = "a path, a file's bytes, a PIL image, an H×W or H×W×3 array, or a 3×H×W tensor"


def read_image(image: ImageLike) -> Image.Image:
    """A PIL image in RGB of an image of any kind, see `Classifier.prepare`."""
    if isinstance(image, (str, Path, bytes)):
        name, file = ("the file", io.BytesIO(image)) if isinstance(image, bytes) else (image, image)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as opened:
                    return _as_rgb(opened)
        except FileNotFoundError:
            raise ValueError(f"{name} does not exist.") from None
        except UnidentifiedImageError:
            raise ValueError(f"{name} is not an image.") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ValueError(f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller.") from None
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise ValueError(f"{name} cannot be read as an image ({error}).") from error
    if isinstance(image, Image.Image):
        try:
            return _as_rgb(image)
        except (OSError, SyntaxError, EOFError) as error:
            raise ValueError(f"the PIL image cannot be read ({error}).") from error
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"a tensor must be 3×H×W or 1×H×W, got {tuple(image.shape)}.")
        image = image.detach().cpu()
        array = (image.float() if image.is_floating_point() else image).movedim(0, -1).numpy()
        return _from_array(array[..., 0] if array.shape[-1] == 1 else array)
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ValueError(f"an array must be H×W, H×W×3 or H×W×4, got {image.shape}.")
        return _from_array(image)
    raise TypeError(f"an image must be {KINDS}, got {type(image).__name__}.")


def _from_array(array: np.ndarray) -> Image.Image:
    if 0 in array.shape:
        raise ValueError(f"it has no pixel: its shape is {array.shape}.")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("its floats must lie in [0, 1]: divide by the largest brightness, or give bytes.")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"its values must be bytes (uint8) or floats, got {array.dtype}.")
    return _as_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _as_rgb(image: Image.Image) -> Image.Image:
    if math.prod(image.size) == 0:
        raise ValueError(f"it has no pixel: its size is {image.size}.")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"it is too long and thin, {image.width}×{image.height} pixels: crop it first.")
    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("I", "F") or turned.mode.startswith("I;16"):
        values = np.asarray(turned, dtype=np.float64)
        # a brightness in 32 bits has no fixed top: 16-bit files are opened so, and floats lie in [0, 1]
        top = 1.0 if turned.mode == "F" and values.max() <= 1 else 65535.0
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
            raise ValueError(f"its values must lie in [0, {top:.0f}] for mode {turned.mode}.")
        return Image.fromarray((values * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if turned.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in turned.info:
        turned = turned.convert("RGBA")
        white = Image.new("RGBA", turned.size, "white")
        turned = Image.alpha_composite(white, turned)
    return turned.convert("RGB")
