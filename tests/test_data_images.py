"""Every way a picture can be stored comes out as upright 8-bit RGB, or as an error that names the file."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from epic_fast.data import load_image
from epic_fast.errors import DataError

RED = (200, 30, 10)


def png(samples: np.ndarray, colour_type: int, depth: int = 16, extra: bytes = b"") -> bytes:
    """A PNG file of big-endian 16-bit samples ``(H, W, C)``, which Pillow cannot write in colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def saved(folder: Path, image: Image.Image, name: str, **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


def pixel(image: Image.Image, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    assert image.mode == "RGB"
    found = image.getpixel(at)
    assert isinstance(found, tuple)
    return found


def test_rgb_file_is_read_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels), "a.png")
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), pixels)


def test_alpha_is_put_on_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    found = load_image(saved(tmp_path, image, "a.png"))
    assert pixel(found) == RED
    assert pixel(found, (1, 0)) == (255, 255, 255)


def test_half_transparent_is_mixed_with_white(tmp_path):
    found = load_image(saved(tmp_path, Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "a.png"))
    assert pixel(found) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["LA", "RGBa", "La", "PA"])
def test_other_alpha_modes(mode):
    image = Image.new("LA", (2, 1), (40, 255))
    image.putpixel((1, 0), (40, 0))
    if mode == "RGBa":
        image = image.convert("RGBA").convert("RGBa")
    elif mode == "La":
        image = image.convert("La")
    elif mode == "PA":
        palette = Image.new("P", (2, 1))
        palette.putpalette([40, 40, 40])
        image = palette.convert("PA")
        image.putpixel((1, 0), (0, 0))
    found = load_image(image)
    assert pixel(found) == (40, 40, 40)
    assert pixel(found, (1, 0)) == (255, 255, 255)


def test_palette_with_and_without_transparent_entry(tmp_path):
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 255, *RED])
    image.putpixel((1, 0), 0)
    plain = load_image(saved(tmp_path, image, "plain.png"))
    assert [pixel(plain), pixel(plain, (1, 0))] == [RED, (0, 0, 255)]
    for name in ("a.png", "a.gif"):
        found = load_image(saved(tmp_path, image, name, transparency=0))
        assert [pixel(found), pixel(found, (1, 0))] == [RED, (255, 255, 255)], name


@pytest.mark.parametrize(("mode", "clear", "ink"), [("RGB", (1, 2, 3), RED), ("L", 7, 90), ("1", 0, 255)])
def test_transparent_colour_without_alpha(tmp_path, mode, clear, ink):
    image = Image.new(mode, (2, 1), ink)
    image.putpixel((1, 0), clear)
    found = load_image(saved(tmp_path, image, "a.png", transparency=clear))
    assert pixel(found) == (ink if mode == "RGB" else (ink, ink, ink))
    assert pixel(found, (1, 0)) == (255, 255, 255)


def test_grey_and_black_and_white(tmp_path):
    assert pixel(load_image(saved(tmp_path, Image.new("L", (1, 1), 90), "grey.png"))) == (90, 90, 90)
    assert pixel(load_image(saved(tmp_path, Image.new("1", (1, 1), 1), "one.png"))) == (255, 255, 255)


def test_cmyk_jpeg_and_tiff(tmp_path):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for name in ("a.jpg", "a.tif"):
        red, green, blue = pixel(load_image(saved(tmp_path, cyan, name)))
        assert red < 5, name
        assert min(green, blue) > 250, name


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_keeps_its_shades(tmp_path, name):
    shades = np.array([[0, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = Image.fromarray(shades)
    assert image.mode == "I;16"
    found = load_image(saved(tmp_path, image, name))
    assert [pixel(found, (x, 0))[0] for x in range(4)] == [0, 0x40, 0x80, 0xFF]


def test_sixteen_bit_grey_with_transparent_shade():
    samples = np.array([[[0x4000], [0x8000]]])
    clear = struct.pack(">I", 2) + b"tRNS" + b"\x80\x00" + struct.pack(">I", zlib.crc32(b"tRNS\x80\x00"))
    found = load_image(png(samples, 0, extra=clear))
    assert [pixel(found), pixel(found, (1, 0))] == [(0x40,) * 3, (255,) * 3]


def test_sixteen_bit_colour_and_alpha():
    samples = np.array([[[0x8000, 0xFFFF, 0x0100], [0, 0, 0]]])
    assert pixel(load_image(png(samples, 2))) == (0x80, 0xFF, 0x01)
    opacity = np.array([[[0xFFFF], [0]]])
    found = load_image(png(np.concatenate([samples, opacity], axis=2), 6))
    assert [pixel(found), pixel(found, (1, 0))] == [(0x80, 0xFF, 0x01), (255, 255, 255)]
    grey = load_image(png(np.concatenate([samples[..., :1], opacity], axis=2), 4))
    assert [pixel(grey), pixel(grey, (1, 0))] == [(0x80,) * 3, (255,) * 3]


def test_wide_integers_and_floats():
    assert pixel(load_image(Image.fromarray(np.full((1, 1), 90, dtype=np.int32)))) == (90, 90, 90)
    assert pixel(load_image(Image.fromarray(np.full((1, 1), 0x8000, dtype=np.int32)))) == (0x80,) * 3
    wide = load_image(Image.fromarray(np.array([[0, 1 << 29, (1 << 30) - 1]], dtype=np.int32)))
    assert [pixel(wide, (x, 0))[0] for x in range(3)] == [0, 0x80, 0xFF]
    assert pixel(load_image(Image.fromarray(np.full((1, 1), 0.5, dtype=np.float32)))) == (128,) * 3
    assert pixel(load_image(Image.fromarray(np.full((1, 1), 90.0, dtype=np.float32)))) == (90,) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), f"a.{suffix}", exif=exif)
    found = load_image(path)
    assert np.abs(np.asarray(found).astype(int) - upright).mean() < 4
    again = load_image(found)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(found), err_msg="turned a second time")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("exif", [b"MM\0*\0\0", b"MM\0*\xff\xff\xff\xff\0\0", b"no exif at all"])
def test_damaged_exif_does_not_spoil_the_picture(tmp_path, exif):
    for name in ("a.jpg", "a.png", "a.webp"):
        path = saved(tmp_path, Image.new("RGB", (16, 16), RED), name, exif=b"Exif\0\0" + exif)
        assert load_image(path).size == (16, 16), name


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    path = saved(tmp_path, frames[0], f"a.{suffix}", save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 2
    red, green, _ = pixel(load_image(path))
    assert red > 245
    assert green < 10


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_truncated_file_names_the_file(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"cut\.{suffix}.*cannot be read.*leave it out"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture_names_the_file(tmp_path, content):
    (tmp_path / "no.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"no\.jpg.*cannot be read"):
        load_image(tmp_path / "no.jpg")
    with pytest.raises(DataError, match=rf"{len(content)} bytes"):
        load_image(content)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_flipped_bytes_never_escape_as_another_error(tmp_path):
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for suffix in ("jpeg", "png", "gif", "webp", "tiff"):
        buffer = io.BytesIO()
        noise.save(buffer, suffix)
        for _ in range(40):
            damaged = bytearray(buffer.getvalue())
            for at in random.integers(0, len(damaged), size=6):
                damaged[at] = random.integers(256)
            with suppress(DataError):
                assert load_image(bytes(damaged)).mode == "RGB"


def test_missing_file_folder_and_wrong_type(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg.*does not exist"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(DataError, match=r"numpy\.ndarray.*fromarray"):
        load_image(np.zeros((2, 2, 3)))  # pyright: ignore[reportArgumentType]


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("RGB", (40, 40)), "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb\.png.*too many pixels"):
        load_image(path)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "text.png", pnginfo=text)
    with pytest.raises(DataError, match=r"text\.png.*cannot be read"):
        load_image(tmp_path / "text.png")


def test_the_given_picture_is_not_changed():
    image = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    load_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (0, 0, 0, 0)
