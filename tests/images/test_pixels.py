"""The one reader: every mode, profile, orientation and depth becomes the same float RGB, or one sentence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.images.alpha import split_alpha
from mrflow_sched.images.convert import from_pictures
from mrflow_sched.images.files import load_image

RAMP = np.stack(np.broadcast_arrays(np.arange(48)[None] * 5, np.arange(32)[:, None] * 7, 90), -1).astype(np.uint8)
GREY = (RAMP[..., 0]).astype(np.int64)
BASE = Image.fromarray(RAMP)


def wanted(values: Any, top: float) -> torch.Tensor:
    tensor = torch.from_numpy(np.asarray(values, dtype=np.float32) / top)
    return tensor.expand(3, -1, -1) if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def read_both(path: Path, **save: Any) -> tuple[torch.Tensor, list[str]]:
    """The image as a file and as an open Pillow image, which must agree."""
    said: tuple[list[str], list[str]] = ([], [])
    file = load_image(path, said[0].append, alpha=True)
    with Image.open(path) as image:
        given = from_pictures(image, said[1].append)[0]
    torch.testing.assert_close(given, file, rtol=0, atol=1.01 / 256)  # Pillow's 8 bits of 16
    assert said[0] == said[1]
    return file, said[0]


def test_depths_and_modes(tmp_path: Path) -> None:
    images = {
        "rgb.png": (BASE, wanted(RAMP, 255)),
        "grey.png": (Image.fromarray(GREY.astype(np.uint8)), wanted(GREY, 255)),
        "grey16.png": (Image.fromarray((GREY * 257 + 3).astype(np.uint16)), wanted(GREY * 257 + 3, 65535)),
        "grey16.tif": (Image.fromarray((GREY * 257 + 3).astype(np.uint16)), wanted(GREY * 257 + 3, 65535)),
        "one.tif": (Image.fromarray((GREY / 255).astype(np.float32)), wanted(GREY, 255)),
        "bits.png": (Image.fromarray(GREY > 100), wanted(GREY > 100, 1)),
        "cmyk.tif": (BASE.convert("CMYK"), wanted(RAMP, 255)),
        "rgb.bmp": (BASE, wanted(RAMP, 255)),
    }
    for name, (image, want) in images.items():
        image.save(tmp_path / name)
        found, said = read_both(tmp_path / name)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
        assert said == []


@pytest.mark.parametrize(
    ("values", "top"),
    [
        (GREY * 257, 65535),
        (GREY, 255),
        ((GREY * 1.0).astype(np.float32), 255),
        ((GREY * 257.0).astype(np.float32), 65535),
    ],
)
def test_a_range_that_the_values_tell_is_used_and_told(tmp_path: Path, values: Any, top: int) -> None:
    Image.fromarray(values if values.dtype == np.float32 else values.astype(np.int32)).save(tmp_path / "a.tif")
    found, said = read_both(tmp_path / "a.tif")
    torch.testing.assert_close(found, wanted(values, top), rtol=0, atol=1e-6)
    assert len(said) == 1
    assert said[0].endswith(f"read as 0 (black) to {top} (white).")


@pytest.mark.parametrize("values", [GREY - 5, GREY * 70000, GREY / 160.0, (GREY + 1) * np.nan, (GREY + 1) * np.inf])
def test_a_range_that_nothing_tells_is_refused(tmp_path: Path, values: Any) -> None:
    Image.fromarray(values.astype(np.int32 if values.dtype == np.int64 else np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(MrFlowError, match=r"image has mode . with values from .*; scale them"):
        load_image(tmp_path / "a.tif")


def png_of_16_bits(path: Path, values: Any) -> None:
    height, width, channels = values.shape
    rows = b"".join(b"\0" + values[row].astype(">u2").tobytes() for row in range(height))
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0),
        b"eXIf": b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",  # orientation 6
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_of_colour_are_kept_and_turned(tmp_path: Path, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (8, 12, channels))
    png_of_16_bits(tmp_path / "a.png", values)
    found = load_image(tmp_path / "a.png", alpha=True)
    torch.testing.assert_close(found, wanted(np.rot90(values, -1).copy(), 65535), rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_of_colour_in_a_tiff(tmp_path: Path, order: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (8, 12, 3))
    data, start, tags = values.astype(f"{order}u2").tobytes(), 8 + 2 + 9 * 12 + 4, b""
    for tag, kind, count, value in (
        *((256, 4, 1, 12), (257, 4, 1, 8), (258, 3, 3, start), (259, 4, 1, 1), (262, 4, 1, 2), (273, 4, 1, start + 6)),
        *((277, 4, 1, 3), (278, 4, 1, 8), (279, 4, 1, len(data))),
    ):
        tags += struct.pack(f"{order}HHII", tag, kind, count, value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 9)
    (tmp_path / "a.tif").write_bytes(head + tags + struct.pack(f"{order}IHHH", 0, 16, 16, 16) + data)
    torch.testing.assert_close(load_image(tmp_path / "a.tif"), wanted(values, 65535), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_once(tmp_path: Path, orientation: int, kind: str) -> None:
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = BASE if turn is None else BASE.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    more: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    stored.save(tmp_path / f"a.{kind}", exif=exif, **more)
    found, said = read_both(tmp_path / f"a.{kind}")
    torch.testing.assert_close(found, wanted(RAMP, 255), rtol=0, atol=1e-6)
    assert said == []


def swapped_profile() -> bytes:
    """SRGB with the primaries of red and green exchanged: what it calls red is green."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    head, tags = data[:132], data[132 : 132 + 12 * struct.unpack(">I", data[128:132])[0]]
    swapped = tags.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    return head + swapped + data[len(head) + len(tags) :]


def test_a_colour_profile_is_applied(tmp_path: Path) -> None:
    rgba = BASE.convert("RGBA")
    rgba.putalpha(Image.fromarray(GREY.astype(np.uint8)))
    for name, image in (("a.png", BASE), ("b.png", rgba), ("c.webp", BASE)):
        more: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
        image.save(tmp_path / name, icc_profile=swapped_profile(), **more)
        found, said = read_both(tmp_path / name)
        torch.testing.assert_close(found[:3], wanted(RAMP[..., [1, 0, 2]], 255), rtol=0, atol=2.01 / 255)
        assert said == []
        if image is rgba:
            torch.testing.assert_close(found[3:], wanted(GREY, 255)[:1], rtol=0, atol=1e-6)


def test_an_srgb_profile_changes_nothing_and_a_broken_one_is_told(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile, told in ((srgb, False), (b"rubbish" * 30, True), (srgb[:200], True), (lab, True)):
        BASE.save(tmp_path / "a.png", icc_profile=profile)
        found, said = read_both(tmp_path / "a.png")
        torch.testing.assert_close(found, wanted(RAMP, 255), rtol=0, atol=1e-6)
        assert [sentence.startswith("The image's colour profile is damaged") for sentence in said] == [True] * told


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_taken_and_told(tmp_path: Path, kind: str) -> None:
    more: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    BASE.save(tmp_path / f"a.{kind}", save_all=True, append_images=[BASE.rotate(180)], **more)
    found, said = read_both(tmp_path / f"a.{kind}")
    assert float((found - wanted(RAMP, 255)).abs().max()) < 0.12  # a GIF has 256 colours
    assert said == ["The image has several frames or pages; number 1 is used."]


def test_no_format_that_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with pytest.raises(
        MrFlowError, match="not an image file of a known format; give a PNG, JPEG, WebP, TIFF, BMP or GIF"
    ):
        load_image(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image, pytest.raises(MrFlowError, match="the image is an EPS file"):
        from_pictures(image)


def test_large_images_are_converted_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (40, 12, 3))
    png_of_16_bits(tmp_path / "a.png", values)
    BASE.save(tmp_path / "b.png", icc_profile=swapped_profile())
    Image.fromarray((GREY * 257).astype(np.uint16)).save(tmp_path / "c.png")
    whole = [load_image(tmp_path / f"{name}.png") for name in "abc"]
    monkeypatch.setattr("mrflow_sched.images.pixels._STRIP", 100)
    for name, image in zip("abc", whole, strict=True):
        assert torch.equal(load_image(tmp_path / f"{name}.png"), image)


def test_colour_is_filled_only_where_it_is_not_seen() -> None:
    images = torch.rand((2, 4, 20, 30), generator=torch.Generator().manual_seed(0))
    images[:, 3, :, :10] = 0.0
    images[:, :3, :, 9:16] = 0.75
    images[:, :3, :, :9] = 0.0
    colour, alpha = split_alpha(images)
    assert alpha is not None
    assert torch.equal(alpha, images[:, 3:])
    seen = (alpha >= 1 / 32).expand_as(colour)
    assert torch.equal(colour[seen], images[:, :3][seen])
    torch.testing.assert_close(colour[..., 8], torch.full((2, 3, 20), 0.75), rtol=0, atol=0.02)
    assert float(colour[..., :8].min()) > 0.3  # nothing of the black is left
    nothing = torch.zeros((1, 4, 5, 5))
    assert torch.equal(split_alpha(nothing)[0], nothing[:, :3])
    grey = torch.rand(1, 2, 3, 3)
    assert split_alpha(grey)[0].shape == (1, 3, 3, 3)


@settings(max_examples=150)
@given(
    mode=st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "HSV", "YCbCr", "LAB", "I", "F", "I;16"]),
    size=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    fill=st.binary(min_size=0, max_size=100),
    info=st.fixed_dictionaries(
        {},
        optional={
            "icc_profile": st.binary(max_size=200),
            "transparency": st.one_of(st.integers(-5, 300), st.binary(max_size=9), st.tuples(st.integers(0, 255))),
            "exif": st.binary(max_size=60),
        },
    ),
)
def test_any_image_is_read_or_refused(mode: str, size: tuple[int, int], fill: bytes, info: dict[str, Any]) -> None:
    image = Image.new(mode, size)
    data = image.tobytes()
    if fill and data:
        image.frombytes((fill * len(data))[: len(data)])
    image.info.update(info)
    said = ""
    try:
        found = from_pictures(image)
        assert found.dtype == torch.float32
        assert bool(((found >= 0) & (found <= 1)).all())
    except MrFlowError as error:
        said = str(error)
    assert said.isprintable()


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150)
@given(st.data())
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]))
    stream = io.BytesIO()
    BASE.resize((7, 5)).save(stream, kind)
    whole = bytearray(stream.getvalue())
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=8)):
        whole[place] = byte
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    said = ""
    try:
        load_image(path)
    except MrFlowError as error:
        said = str(error)
    assert said.isprintable()
