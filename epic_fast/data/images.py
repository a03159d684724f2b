"""Any picture file to upright 8-bit RGB."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from epic_fast.errors import DataError

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Formats that lose something, or may.
INEXACT = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


def load_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """A picture as upright RGB, 8 bits a channel, whatever it is stored as.

    Turned as its EXIF orientation says; transparency (alpha or a transparent colour) put on white; 16-bit samples
    reduced to their high byte; CMYK, palette, grey and black-and-white converted; of an animation the first frame.

    Args:
        source: a file's path, a file's contents, or a PIL picture (which is not changed).

    Raises:
        DataError: no such file, not a picture, a damaged or truncated one, or one of so many pixels that decoding
            it could exhaust the memory (Pillow's decompression-bomb limit).
    """
    if isinstance(source, Image.Image):
        return _decode(source, _name_of(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(source), f"of {len(source)} bytes given in memory")
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(
            f"a picture was given as {type(source).__module__}.{type(source).__name__}; wanted a path, the bytes of a "
            "picture file, or a PIL picture (of an array: PIL.Image.fromarray(array))"
        )
    path = Path(source)
    if not path.exists():
        raise DataError(f"the picture {str(path)!r} does not exist; check the path, or put the file there")
    if path.is_dir():
        raise DataError(f"the picture {str(path)!r} is a folder; wanted a picture file")
    return _open(path, repr(str(path)))


def load_mask(source: str | os.PathLike[str]) -> np.ndarray:
    """A mask as booleans ``(H, W)``: True where a pixel is not 0 (in a palette: not entry 0).

    Args:
        source: a file without loss (PNG, say) of one channel of any depth, of a palette, or of black and white; or of
            three channels, which are 0 together where the object is not.

    Raises:
        DataError: no such file, none that can be read, a JPEG or WebP (whose zeros are not zeros), or one with
            transparency.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"the mask {str(path)!r} does not exist; check the path, or put the file there")
    try:
        with Image.open(path) as image:
            image.load()
            kind, mode, pixels = image.format, image.mode, np.asarray(image)
    except Exception as error:
        raise _unreadable(repr(str(path)), error) from error
    if kind in INEXACT or mode not in ("1", "L", "P", "I", "RGB", *SIXTEEN_BIT):
        what = f"a {kind}, which need not keep exact values" if kind in INEXACT else f"of mode {mode}"
        raise DataError(f"the mask {str(path)!r} is {what}; wanted a PNG of one channel, 0 where the object is not")
    return np.asarray(pixels.any(axis=2) if pixels.ndim == 3 else pixels != 0)


def _open(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        image = Image.open(file)
    except Exception as error:
        raise _unreadable(name, error) from error
    with image:
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    # Decoders raise nearly anything on damaged bytes (OSError, SyntaxError, ValueError, struct.error, zlib.error).
    try:
        image.load()
        orientation = exif_orientation(image)
        image = _to_rgb(image)
    except Exception as error:
        raise _unreadable(name, error) from error
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
        image.info = {}  # it still said how to turn the picture, which is done
    return image


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the EXIF block is damaged."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in SIXTEEN_BIT or image.mode in ("I", "F"):
        return _reduce(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _reduce(image: Image.Image) -> Image.Image:
    """One channel of more than 8 bits to RGB; Pillow's own conversion would clip at 255, so to white."""
    pixels = np.asarray(image)
    if image.mode == "F":
        pixels = np.nan_to_num(pixels, nan=0.0)
        grey = pixels * 255.0 if pixels.max() <= 1.0 else pixels
        grey = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    elif image.mode == "I" and image.format != "PNG" and pixels.max() < 256:
        grey = np.clip(pixels, 0, 255).astype(np.uint8)
    else:
        # A 32-bit TIFF may use more than 16 bits: bring its largest value down to 16 first.
        excess = max(int(pixels.max()).bit_length() - 16, 0)
        grey = (np.clip(pixels, 0, None) >> (8 + excess)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(pixels == transparent, 255, grey).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _name_of(image: Image.Image) -> str:
    filename = getattr(image, "filename", "")
    return repr(str(filename)) if filename else f"of mode {image.mode} given in memory"


def _unreadable(name: str, error: Exception) -> DataError:
    if isinstance(error, Image.DecompressionBombError):
        return DataError(
            f"the picture {name} has too many pixels to be decoded safely: {error}. Make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )
    reason = str(error).replace(f" {name}", "") or type(error).__name__
    return DataError(
        f"the picture {name} cannot be read: {reason}. Wanted a whole JPEG, PNG, WebP, GIF, BMP or TIFF file: fetch it "
        "again or leave it out"
    )
