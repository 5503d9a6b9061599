"""Pictures on disk: rounding, text, whole files or none, clear sentences."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from mrflow_sched._runtime.errors import FileError, MissingFileError, MrFlowError
from mrflow_sched.images.files import load_image, open_image, read_text, save_new, save_png


def picture(height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.rand((3, height, width), generator=torch.Generator().manual_seed(0))


def test_round_trip_is_within_half_a_level(tmp_path: Path) -> None:
    image = picture()
    save_png(tmp_path / "a.png", image)
    back = load_image(tmp_path / "a.png")
    assert back.dtype == torch.float32
    assert back.shape == image.shape
    assert (back - image).abs().max() <= 0.5 / 255 + 1e-6


def test_rounds_instead_of_truncating(tmp_path: Path) -> None:
    levels = torch.tensor([0.0, 0.4, 0.6, 1.0, 1.4, 254.6, 255.0]) / 255
    save_png(tmp_path / "a.png", levels.expand(3, 1, -1))
    assert list(Image.open(tmp_path / "a.png").getchannel(0).tobytes()) == [0, 0, 1, 1, 1, 255, 255]


def test_values_outside_the_range_are_clamped(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", torch.tensor([-0.5, 1.5]).expand(3, 1, 2))
    assert list(Image.open(tmp_path / "a.png").getchannel(0).tobytes()) == [0, 255]


def test_half_precision_and_gradients_are_accepted(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", picture().bfloat16().requires_grad_())
    assert load_image(tmp_path / "a.png").shape == (3, 4, 6)


def test_text_round_trip_with_any_letters_and_lines(tmp_path: Path) -> None:
    text = {
        "mrflow": "mrflow1;flux1-dev;12+1",
        "prompt": "ein Bär, 漢字 🎨\nsecond line",
        "long": "x" * 100_000,
        "none": "",
    }
    save_png(tmp_path / "a.png", picture(), text)
    assert read_text(tmp_path / "a.png") == text


def test_no_text_reads_as_empty(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", picture())
    assert read_text(tmp_path / "a.png") == {}


@pytest.mark.parametrize("keyword", ["", "k" * 80, "漢字", "line\nbreak"])
def test_keywords_that_png_does_not_allow(tmp_path: Path, keyword: str) -> None:
    with pytest.raises(ValueError, match="keyword"):
        save_png(tmp_path / "a.png", picture(), {keyword: "value"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(4, 4),
        torch.zeros(1, 3, 4, 4),
        torch.zeros(5, 4, 3),
        torch.zeros(3, 0, 4),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="image must be a float tensor"):
        save_png(tmp_path / "a.png", image)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_transparency_is_written_where_the_format_holds_it(tmp_path: Path, suffix: str) -> None:
    image = torch.linspace(0, 1, 4 * 6 * 5).reshape(4, 6, 5)
    if suffix == ".jpg":
        with pytest.raises(ValueError, match=r"a \.jpg file holds no transparency; use \.png"):
            save_new(tmp_path, "a", image, None, suffix)
        return
    path = save_new(tmp_path, "a", image, None, suffix)
    torch.testing.assert_close(load_image(path, alpha=True), (image * 255).round() / 255)


def test_values_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains NaN or infinity; nothing was saved"):
        save_png(tmp_path / "a.png", torch.full((3, 2, 2), float("nan")))
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """A file that takes some bytes and then finds the disk full."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[:10])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.png"
    save_png(target, picture())
    before = target.read_bytes()
    monkeypatch.setattr("builtins.open", lambda *args, _open=open, **kwargs: FullDisk(_open(*args, **kwargs)))
    with pytest.raises(FileError, match=r"a\.png.*cannot be written: No space left on device") as caught:
        save_png(target, 1 - picture())
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert "the file that was there is unchanged" in str(caught.value)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_told_of_the_name_that_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = (save_new(tmp_path, "a", picture()) for _ in range(2))
    monkeypatch.setattr("builtins.open", lambda *args, _open=open, **kwargs: FullDisk(_open(*args, **kwargs)))
    with pytest.raises(FileError, match=r"a-3\.png' cannot be written: No space left on device; nothing was left"):
        save_new(tmp_path, "a", picture())
    monkeypatch.undo()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a-2.png", first]


def test_a_failed_rename_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(FileError, match=r"a\.png.*cannot be written"):
        save_png(tmp_path / "a.png", picture())
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        save_png(tmp_path / "none" / "a.png", picture())


def test_an_error_without_a_reason_is_named_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FileError, match="cannot be written: PermissionError"):
        save_png(tmp_path / "a.png", picture())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_saved_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_png(tmp_path / "a.png", picture())
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_modes_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 51).save(tmp_path / "grey.png")
    Image.new("RGBA", (2, 2), (255, 0, 51, 7)).save(tmp_path / "alpha.png")
    Image.new("P", (2, 2), 0).save(tmp_path / "palette.png")
    assert torch.allclose(load_image(tmp_path / "grey.png"), torch.full((3, 2, 2), 0.2))
    assert torch.allclose(load_image(tmp_path / "alpha.png")[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    assert load_image(tmp_path / "palette.png").shape == (3, 2, 2)


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    values = torch.tensor([[0, 1000, 65535]], dtype=torch.int32)
    image = Image.frombytes("I;16", (3, 1), values.to(torch.uint16).numpy().tobytes())
    image.save(tmp_path / "deep.png")
    back = load_image(tmp_path / "deep.png")
    assert back.shape == (3, 1, 3)
    assert torch.allclose(back[0], values / 65535, atol=1e-7)


def test_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (3, 4, 2)


@pytest.mark.parametrize("read", [load_image, read_text])
def test_missing_files(tmp_path: Path, read: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no image file .*none\.png"):
        read(tmp_path / "none.png")


@pytest.mark.parametrize("read", [load_image, read_text])
def test_files_that_are_no_images(tmp_path: Path, read: Any) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    for path in (tmp_path / "text.png", tmp_path / "empty.png"):
        with pytest.raises(ValueError, match="not an image file"):
            read(path)
    with pytest.raises(ValueError, match="is a folder; give an image file in it"):
        read(tmp_path)


@pytest.mark.parametrize("read", [load_image, read_text])
def test_truncated_images(tmp_path: Path, read: Any) -> None:
    save_png(tmp_path / "a.png", picture(64, 64))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.png.*cannot be read") as caught:
        read(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def with_header(path: Path, width: int, height: int) -> None:
    """Write that size into the header of the PNG at `path`, with a checksum that fits."""
    data = path.read_bytes()
    header = data[12:16] + struct.pack(">II", width, height) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


def test_sizes_that_are_refused_before_a_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_png(path, picture(8, 8), {"mrflow": "plan"})
    with_header(path, 20000, 20000)
    with pytest.raises(
        MrFlowError, match=r"a\.png' has 20000x20000 pixels, more than 268 million in all; make it smaller"
    ):
        load_image(path)
    with_header(path, 40000, 1)
    for own in (True, False):
        with pytest.raises(MrFlowError, match=r"40000x1 pixels, more than 32768 a side; make it smaller"):
            open_image(path, own=own)
    with_header(path, 16000, 16000)
    free = namedtuple("free", "available")(2 * 2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(MrFlowError, match=r"16000x16000 pixels need 5\.7 GiB of memory and 2\.0 GiB are free"):
        load_image(path)
    assert read_text(path) == {"mrflow": "plan"}


def test_a_file_of_our_own_may_have_any_size_that_a_plan_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_png(tmp_path / "a.png", picture(8, 8))
    monkeypatch.setattr("mrflow_sched.images.files.MAX_PIXELS", 63)
    assert open_image(tmp_path / "a.png", own=True).size == (8, 8)
    with pytest.raises(MrFlowError, match="make it smaller first"):
        open_image(tmp_path / "a.png")


def test_reading_text_decodes_no_pixel(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(path, picture(8, 8), {"mrflow": "plan"})
    with_header(path, 32768, 32768)  # far more pixels than the file has
    assert read_text(path) == {"mrflow": "plan"}
    with pytest.raises(ValueError, match="make it smaller first"):
        load_image(path)


def test_text_behind_the_pixels_and_packed_text_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("packed", "x" * 1000, zip=True)
    chunks.add_itxt("any", "漢字", zip=True)
    Image.new("RGB", (2, 2)).save(path, pnginfo=chunks)
    last = b"tEXtlate\x00after the pixels"
    chunk = struct.pack(">I", len(last) - 4) + last + struct.pack(">I", zlib.crc32(last))
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert read_text(path) == {"packed": "x" * 1000, "any": "漢字", "late": "after the pixels"}
    path.write_bytes(path.read_bytes().replace(b"after", b"AFTER"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_text(path)


@pytest.mark.parametrize("read", [load_image, read_text])
def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "vast.webp"
    with open(path, "wb") as file:
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(2**33)  # a sparse file: it takes no space
    with pytest.raises(MrFlowError, match=r"the image file has 8\.0 GiB, and at most .* GiB are read"):
        read(path)


def test_texts_that_take_a_lot_of_memory_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "wordy.png"
    save_png(path, picture(), {})
    data = path.read_bytes()
    with open(path, "wb") as file:
        file.write(data[:33] + struct.pack(">I4s", 2**31, b"tEXt") + b"a\0")
        file.truncate(2**31)
    with pytest.raises(MrFlowError, match="texts have more than 64 MiB"):
        read_text(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_one_sentence_whatever_the_reader_raises(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrflow_sched.images.files.MAX_PIXELS", 10_000)  # a damaged header may ask for gigabytes
    path = tmp_path / f"a.{kind.lower()}"
    Image.new("RGB", (16, 16), (9, 200, 30)).save(path, kind)
    whole = path.read_bytes()
    chance = random.Random(7)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(bytes(data[: chance.randint(4, len(data))]))
        said = ""
        try:
            load_image(path)
        except MrFlowError as error:
            said = str(error)
        assert "\n" not in said


def test_images_of_one_stem_get_names_of_their_own(tmp_path: Path) -> None:
    images = [torch.full((3, 4, 4), level / 255) for level in range(8)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda image: save_new(tmp_path, "same", image, {"key": "text"}), images))
    assert sorted(path.name for path in paths) == sorted(
        ["same.png", *(f"same-{number}.png" for number in range(2, 9))]
    )
    for level, path in enumerate(paths):  # each was told the name of its own file
        assert Image.open(path).getpixel((0, 0)) == (level, level, level)
        assert read_text(path) == {"key": "text"}
    assert len(list(tmp_path.iterdir())) == 8
    with pytest.raises(MissingFileError, match="the folder does not exist"):
        save_new(tmp_path / "none", "same", images[0])
