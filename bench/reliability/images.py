"""Hostile images and records: other formats under an image's name, bombs, every mode of Pillow, numbers gone wild."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from bench.reliability.runner import EXECUTED, MEMORY, MIB, WRONG, Bench, Case, Tally, common_faults, found_bad
from bench.reliability.upscalers import ESCAPE

TITLE = "hostile images and records"
_RUN = 200 * MIB
"""Bytes that the embedded model may take to run at 64 pixels."""
_BUDGET = 1024 * MIB
"""Bytes beyond which an image has to be refused, whatever it declares."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path: Path, wide: int, high: int, *more: bytes, bits: int = 8, colour: int = 2) -> Path:
    """A black PNG of any size, packed row by row."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + (wide * channels * bits + 7) // 8)
    packer = zlib.compressobj(9)
    parts = [packer.compress(row * 64) for _ in range(high // 64)]
    parts += [packer.compress(row * (high % 64)), packer.flush()]
    palette = [chunk(b"PLTE", bytes(3))] if colour == 3 else []
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", b"".join(parts))
    path.write_bytes(b"".join([_SIGNATURE, header, *palette, *more, pixels, chunk(b"IEND", b"")]))
    return path


# --- images that are decoded -------------------------------------------------------------------


def programs(folder: Path, mark: Path) -> Iterator[tuple[str, Path]]:
    """Formats whose reading starts a program, and a program of that name that writes the mark."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("gs", "gswin64c", "gswin32c"):
        tool = tools / name
        tool.write_text(f"#!/bin/sh\necho executed > {mark}\n")
        tool.chmod(0o755)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    for ending in ("png", "jpg", "webp", "eps", "tif"):
        path = folder / f"page.{ending}"
        path.write_bytes(page)
        yield f"EPS as .{ending}", path
    path = folder / "page-binary.png"
    path.write_bytes(struct.pack("<LLLLLLLH", 0xC6D3D0C5, 32, len(page), 0, 0, 0, 0, 0xFFFF).ljust(32, b"\0") + page)
    yield "EPS with a preview as .png", path


def bombs(folder: Path, *, quick: bool) -> Iterator[tuple[str, Path, int]]:
    """Images of many pixels in few bytes, with the pixels that they declare."""
    sides = ((12_000, 12_000, 8, 2), (32_768, 32_768, 1, 0), (65_535, 65_535, 1, 0), (20_000, 20_000, 8, 3))
    for wide, high, bits, colour in sides[: 2 if quick else 4]:
        yield (
            f"PNG of {wide}x{high}, {bits} bits, colour {colour}",
            png(folder / f"bomb-{wide}-{colour}.png", wide, high, bits=bits, colour=colour),
            wide * high,
        )
    for wide, high in ((40_000, 1), (1, 40_000), (2**31 - 1, 1)):
        if wide * high < 2**20:
            yield f"PNG of {wide}x{high}", png(folder / f"thin-{wide}.png", wide, high), wide * high
    lying = folder / "lying.png"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
    lying.write_bytes(_SIGNATURE + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))
    yield "PNG that declares 2^62 pixels", lying, 2**62
    for form in ("JPEG", "WEBP"):
        path = folder / f"bomb.{form.lower()}"
        Image.new("L", (10_000, 10_000)).convert("RGB").save(path, form)
        yield f"{form} of 10000x10000", path, 10**8


def damaged(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files that are no image, or half of one."""
    good = folder / "good.png"
    Image.new("RGB", (64, 64), "red").save(good)
    whole = good.read_bytes()
    for name, data in {
        "cut": whole[: len(whole) // 2],
        "head only": whole[:33],
        "signature only": _SIGNATURE,
        "empty": b"",
        "text": ESCAPE.encode() * 9,
        "chunk of 2^31 bytes": whole[:33] + struct.pack(">I", 2**31) + b"IDAT",
        "wrong sum": whole[:29] + b"abcd" + whole[33:],
        "no size": whole[:16] + bytes(8) + whole[24:],
    }.items():
        path = folder / f"damaged-{name.replace(' ', '-')}.png"
        path.write_bytes(data)
        yield name, path
    for form in ("TIFF", "GIF", "BMP", "ICO", "PCX", "TGA", "PPM", "SGI", "DDS", "JPEG2000"):
        path = folder / f"{form}.png"
        try:
            Image.new("RGB", (16, 16), "red").save(path, form)
        except (KeyError, OSError):  # this Pillow cannot write it
            continue
        yield f"{form} as .png", path
    for name, data in {
        "garbage": b"Exif\0\0MM\0*" + b"\xff" * 200,
        "empty": b"",
        "long": b"Exif\0\0" + bytes(60_000),
    }.items():
        path = folder / f"exif-{name}.jpg"
        Image.new("RGB", (16, 16), "red").save(path, exif=data)
        yield f"EXIF {name}", path
    for name, data in {"garbage": b"\xff" * 200, "empty": b"", "huge": bytes(2**20)}.items():
        path = folder / f"profile-{name}.png"
        Image.new("RGB", (16, 16), "red").save(path, icc_profile=data)
        yield f"ICC profile {name}", path
    for name in ("/dev/zero", "/dev/null", "/proc/self/mem", "missing.png", "\udcff.png"):
        yield ascii(name), Path(name)


def modes(folder: Path) -> Iterator[tuple[str, Path, float]]:
    """A grey ramp in every mode that a file can have, with the mean that a viewer shows, 0 to 1."""
    grey = Image.linear_gradient("L").resize((64, 64))
    deep = Image.frombytes("I;16", (64, 64), b"".join(struct.pack("<H", 257 * value) for value in grey.tobytes()))
    images = {mode: grey.convert(mode) for mode in ("L", "RGB", "LA", "RGBA", "P", "CMYK", "1", "YCbCr")}
    images["I;16"] = deep
    for mode, image in images.items():
        for form in ("png", "tiff", "jpg"):
            path = folder / f"mode-{mode.replace(';', '')}.{form}"
            try:
                image.save(path)
            except OSError:  # the format has no such mode
                continue
            yield f"{mode} as {form}", path, 0.5
    tilted = folder / "orientation.jpg"
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (64, 32), "white").save(tilted, exif=exif)
    yield "EXIF orientation", tilted, 1.0
    profiled = folder / "profile.png"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey.convert("RGB").save(profiled, icc_profile=profile)
    yield "ICC profile of sRGB", profiled, 0.5


# --- records -----------------------------------------------------------------------------------


def records(folder: Path, made: Path) -> Iterator[tuple[str, Path]]:
    """Images whose record is wild, made from one that the package wrote."""
    with Image.open(made) as opened:
        text: str = opened.info["mrflow"]  # pyright: ignore[reportAssignmentType]
    record: dict[str, Any] = json.loads(text)

    def put(name: str, raw: str, *, packed: bool = False) -> tuple[str, Path]:
        information = PngInfo()
        information.add_text("mrflow", raw, zip=packed)
        path = folder / f"record-{zlib.crc32(name.encode('utf-8', 'backslashreplace'))}.png"
        Image.new("RGB", (8, 8)).save(path, pnginfo=information)
        return f"record: {name}", path

    long = "9" * 400
    wild: list[Any] = [None, True, -1, 0, 1.5, "", ESCAPE, [], {}, 10**400, "9" * 400, "x" * 100_000, [ESCAPE]]
    for key in record:
        for value in wild:
            yield put(f"{key} = {ascii(value)[:40]}", json.dumps({**record, key: value}))
    for device in ("hpu", "privateuseone", "cuda:99", "meta", "mps", "lazy", ESCAPE):
        yield put(f"device {device!a}", json.dumps({**record, "device": device}))
    plan: str = record["plan"]
    for number, part in enumerate(plan.split(";")):
        for value in ("0", "-1", long, "nan", "inf", "1e308", ESCAPE, "99999999", ""):
            fields = part.split(" ")
            for place in range(1, len(fields)):
                changed = " ".join([*fields[:place], value, *fields[place + 1 :]])
                parts = plan.split(";")
                parts[number] = changed
                yield put(f"plan: {changed[:50]!a}", json.dumps({**record, "plan": ";".join(parts)}))
    for name, raw in {
        "no JSON": "{",
        "a list": "[]",
        "deep": "[" * 500_000,
        "NaN": '{"plan": NaN}',
        "a key twice": '{"plan":1,"plan":2}',
        "escape codes": ESCAPE,
        "empty": "",
    }.items():
        yield put(name, raw)
    yield put("100 MB packed", "x" * 100 * MIB, packed=True)
    for name, data in {
        "iTXt of 1 GB": b"mrflow\0\1\0\0\0" + zlib.compress(bytes(2**30), 9),
        "zTXt of 1 GB": b"mrflow\0\0" + zlib.compress(bytes(2**30), 9),
        "100,000 texts": b"",
    }.items():
        more = [chunk(name[:4].encode() if data else b"tEXt", data or b"a\0b")] * (1 if data else 100_000)
        yield f"record: {name}", png(folder / f"{name.replace(' ', '-')}.png", 8, 8, *more)


# --- the group ---------------------------------------------------------------------------------


def run(bench: Bench) -> Tally:
    """Try every image and every record."""
    folder = bench.folder / "images"
    folder.mkdir()
    tally = Tally()
    step = 6 if bench.quick else 1

    def attempt(case: Case, *, expected: float | None = None) -> None:
        outcome = bench.one(case)
        kinds = common_faults(case, outcome)
        if case.subject == "command" and outcome.killed is None and outcome.value not in (0, 2):
            kinds.append(WRONG)
        if "orientation" in case.name and isinstance(outcome.value, list) and outcome.value[-2] <= outcome.value[-1]:
            kinds.append(WRONG)  # stored wide, seen high
        if expected is not None and isinstance(outcome.value, list) and abs(outcome.value[0] - expected) > 0.05:
            kinds.append(WRONG)
        tally.add(case.name, kinds, outcome.said)

    tools = {"PATH": f"{folder / 'tools'}:{os.environ['PATH']}"}
    for name, path in [*programs(folder, bench.mark), *damaged(folder)][::step]:
        attempt(Case(name, "reader", {"path": str(path)}, environment=tools))
        calibrate = ["calibrate", "--images", str(path), "--out", str(folder / "out"), "--size", "64x64"]
        attempt(Case(f"{name}: calibrate", "command", {"arguments": calibrate}, need=_RUN, environment=tools))
    for name, path, pixels in bombs(folder, quick=bench.quick):
        attempt(Case(name, "reader", {"path": str(path)}, need=min(_BUDGET, 15 * pixels), seconds=20))
    for name, path, mean in modes(folder):
        attempt(Case(name, "reader", {"path": str(path)}), expected=mean)
        attempt(Case(f"{name}: MrFlow", "pillow_image", {"path": str(path)}, need=_RUN), expected=mean)
    short = ["--size", "64x64", "--low-steps", "1", "--no-progress"]
    made = folder / "mrflow-0.png"
    bench.one(Case("", "command", {"arguments": ["generate", "a blue star", *short, "--out", str(folder)]}))
    for name, path in list(records(folder, made))[::step]:
        again = ["generate", "--from", str(path), "--out", str(folder / "again"), "--no-progress"]
        attempt(Case(name, "command", {"arguments": again}, need=_RUN, seconds=20))
    page, bomb = folder / "page.png", folder / "bomb-12000-2.png"
    good = Case("a good image", "reader", {"path": str(folder / "good.png")})
    tally.checked = not common_faults(good, bench.one(good)) and found_bad(
        bench,
        (Case("any format", "bad_reader", {"path": str(page)}, environment=tools), EXECUTED),
        (Case("any size", "bad_reader", {"path": str(bomb)}), MEMORY),
    )
    return tally
