"""Pictures of unknown origin: what is read, and what is refused before it is decoded."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from captum_attn.errors import InputError
from captum_attn.insights import Batch, ImageFeature, uploads
from captum_attn.insights.session import Session
from captum_attn.insights.uploads import fitted, read_picture
from tests.insights.models import CLASSES, TinyViT, images, made


def saved(path, mode: str = "RGB", size=(8, 4), **options):
    values = np.arange(size[0] * size[1] * 4, dtype=np.uint8).reshape(size[1], size[0], 4)
    Image.fromarray(values, "RGBA").convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp"])
def test_the_formats_of_the_web_are_read(tmp_path, name):
    assert read_picture(saved(tmp_path / name)).size == (8, 4)


def test_transparency_is_over_white_and_pictures_stand_upright(tmp_path):
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[274] = 6  # a quarter turn
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=turned)
    assert read_picture(tmp_path / "turned.jpg").size == (4, 8)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = [read_picture(tmp_path / "deep.png").getpixel((x, 0))[0] for x in range(3)]
    assert found == [0, 128, 255]


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x80\x04\x95pickle"],
)
def test_what_is_no_picture_is_refused(tmp_path, content):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match="'cat.png' is no picture that can be read; give a PNG"):
        read_picture(path)


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    path = saved(tmp_path / "cut.jpg", size=(64, 64))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="'cut.jpg' is no picture"):
        read_picture(path)


def test_a_format_that_starts_other_programs_is_refused(tmp_path):
    saved(tmp_path / "a.eps")
    with pytest.raises(InputError, match="is no picture that can be read"):
        read_picture(tmp_path / "a.eps")


def test_a_bomb_is_refused_by_its_header(tmp_path):
    """A PNG that says it has ten thousand million pixels, in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 10_000, 6_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(InputError, match="10000 x 6000 pixels: expected at most 40 megapixels"):
        read_picture(path)


def test_a_large_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 2**20)
    path = tmp_path / "large.png"
    path.write_bytes(bytes(2 * 2**20))
    with pytest.raises(InputError, match="2.0 MiB: expected at most 1; give a smaller picture"):
        read_picture(path)


def test_a_picture_is_fitted_to_the_examples():
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (10, 0, 30, 20))  # the middle square is blue
    found = fitted(picture, (3, 16, 16))
    assert found.shape == (3, 16, 16) and found.dtype == torch.float32
    assert found[2].mean() > 0.95 and found[0].mean() < 0.05
    grey = fitted(Image.new("RGB", (5, 5), (255, 255, 255)), (1, 2, 4))
    assert torch.equal(grey, torch.ones(1, 2, 4))
    with pytest.raises(InputError, match="the examples have 5: pass `upload=`"):
        fitted(picture, (5, 16, 16))


def test_an_uploaded_picture_takes_the_place_of_the_examples(tmp_path):
    Image.new("RGB", (32, 32), (255, 255, 255)).save(tmp_path / "white.png")
    batch = Batch(images(1), torch.tensor([2]))
    session = Session(made(TinyViT), CLASSES, ImageFeature("Photo"), [batch])
    own = session.own(session.examples[0], picture=str(tmp_path / "white.png"))
    assert torch.equal(own.inputs[0], torch.ones(1, 3, 16, 16)) and own.label is None
    wrong = ImageFeature("Photo", upload=lambda picture: torch.ones(3, 2, 2))
    session = Session(made(TinyViT), CLASSES, wrong, [batch])
    with pytest.raises(InputError, match=r"`upload` to return \(3, 16, 16\), .* got \(3, 2, 2\)"):
        session.own(session.examples[0], picture=str(tmp_path / "white.png"))
