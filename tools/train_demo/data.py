"""The training scenes, rendered once, and the latents that the flow model is trained on.

The encoder of the demo VAE is a principal-component analysis of 4x4 pixel patches. So latents exist as soon as the
images do, and the decoder can be trained in parallel with the flow model.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mrflow_sched.demo import drawing
from mrflow_sched.demo import scenes as S
from mrflow_sched.demo.canvas import Mark
from mrflow_sched.demo.drawing import render
from mrflow_sched.demo.scenes import Face, Scene, Thing, random_scene

HIGH, LOW, TINY = 256, 128, 64
SIZES = (HIGH, LOW, TINY)
TOKEN = 8  # side of one token in pixels: two latents of four pixels
PATCH, CHANNELS = 4, 16
WHITENING = 0.4  # 0 keeps the power of every component, 1 equalises it; between, fine detail has less power than layout
TRAIN_STREAM, TEST_STREAM = 1, 2


def scene_at(index: int, stream: int = TRAIN_STREAM) -> Scene:
    """The scene with this number; streams do not share scenes."""
    return random_scene(np.random.default_rng([stream, index]))


def picture_at(index: int, stream: int = TRAIN_STREAM, size: int = HIGH) -> np.ndarray:
    return render(scene_at(index, stream), size, seed=index * 10 + stream)


def _render_range(args: tuple[str, int, int]) -> int:
    path, first, last = args
    pictures = np.lib.format.open_memmap(path, mode="r+")
    for index in range(first, last):
        pictures[index] = np.rint(picture_at(index) * 255)
    return last - first


def shrink(pictures: np.ndarray) -> np.ndarray:
    """(B, 2h, 2w, 3) → (B, h, w, 3) by averaging 2x2 pixels, in float."""
    b, h, w, c = pictures.shape
    return pictures.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4), dtype=np.float32)


def patches(pictures: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) in [-1, 1] → (B, H/4, W/4, 48), pixels of a patch in row, column, colour order."""
    b, h, w, c = pictures.shape
    split = pictures.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(split).reshape(b, h // PATCH, w // PATCH, PATCH * PATCH * c)


def fit_components(pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Mean (48,) and analysis matrix (48, 16) of patches; latents have mean power 1 over all channels."""
    values = patches(pictures).reshape(-1, 48).astype(np.float64)
    mean = values.mean(0)
    covariance = np.cov((values - mean).T)
    power, basis = np.linalg.eigh(covariance)
    order = np.argsort(power)[::-1][:CHANNELS]
    basis, deviation = basis[:, order], np.sqrt(power[order])
    basis = basis * np.sign(basis.sum(0) + 1e-9)
    gain = deviation**-WHITENING
    gain /= np.sqrt(((deviation * gain) ** 2).mean())
    return {"mean": mean, "analysis": basis * gain, "synthesis": (basis / gain).T, "deviation": deviation * gain}


UNKNOWN = 255
# "print" are small letters at a size that cannot show which.
MEANINGS: dict[str, tuple[str, ...]] = {
    "part": (
        *(*S.GROUNDS, *(f"{sky} sky" for sky in S.SKIES), *S.SHAPES, *S.LETTERS, *S.LIGHTS, *S.DETAILS, "wall"),
        *("face", *S.PATTERNS, "eye", *S.MOODS, "bird", "print"),
    ),
    "colour": tuple(S.COLOURS),
    "texture": (*S.TEXTURES, S.OUTLINED, "two", "three", "four", "six"),
}


def meaning(scene: Scene, seed: int, grid: int) -> np.ndarray:
    """What every token of an image shows: (3, grid, grid) indices into :data:`MEANINGS`, or :data:`UNKNOWN`."""
    out = np.full((len(MEANINGS), grid, grid), UNKNOWN, np.uint8)
    centre = (np.arange(grid) + 0.5) / grid

    def fill(rows: Any, columns: Any, part: str, colour: str = "", texture: str = "") -> None:
        where = np.ix_(rows, columns)
        for index, (kind, value) in enumerate(zip(MEANINGS, (part, colour, texture), strict=True)):
            out[index][where] = MEANINGS[kind].index(value) if value else UNKNOWN

    everywhere = np.ones(grid, bool)
    if scene.ground:
        fill(centre < 0.5, everywhere, f"{scene.sky} sky")
        fill(centre > 0.74, everywhere, scene.ground)
    elif scene.detail:
        fill(everywhere, everywhere, scene.detail, scene.ink)
    elif scene.pattern:
        fill(everywhere, everywhere, scene.pattern, scene.ink, scene.gap)
    else:
        fill(everywhere, everywhere, "wall", scene.wall)
    for mark in drawing.layout(scene, seed):
        rows = (centre > mark.top) & (centre < mark.bottom)
        columns = (centre > mark.left) & (centre < mark.right)
        fill(rows, columns, *_meaning_of(mark, scene, fine=grid * TOKEN >= S.FINE_SIZE))
    return out


def _meaning_of(mark: Mark, scene: Scene, *, fine: bool) -> tuple[str, str, str]:
    """Part, colour and texture of a marked place."""
    if mark.kind == "thing":
        thing = scene.things[mark.index]
        return thing.shape, thing.colour, thing.texture
    if mark.kind == "letter":
        return scene.word[mark.index], scene.ink, ""
    if mark.kind == "small letter":
        return (scene.small_word[mark.index] if fine else "print"), scene.ink, ""
    if mark.kind == "light":
        return scene.light, "", ""
    if mark.kind == "eye":
        return "eye", scene.faces[mark.index].eyes, ""
    return (scene.faces[mark.index].mood if mark.kind == "mouth" else mark.kind), "", ""


def _meaning_range(args: tuple[str, int, int]) -> int:
    work, first, last = args
    for size in SIZES:
        out = np.lib.format.open_memmap(Path(work) / f"meaning{size}.npy", mode="r+")
        for index in range(first, last):
            out[index] = meaning(scene_at(index), index * 10 + TRAIN_STREAM, size // TOKEN)
    return last - first


def build_meanings(work: Path, count: int, workers: int = 2) -> None:
    """Store what every token shows, for every size, as ``meaning<size>.npy``."""
    for size in SIZES:
        shape = (count, len(MEANINGS), size // TOKEN, size // TOKEN)
        np.lib.format.open_memmap(work / f"meaning{size}.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
    edges = np.linspace(0, count, workers * 8 + 1).astype(int)
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_meaning_range, [(str(work), int(a), int(b)) for a, b in pairwise(edges)]))


def build(work: Path, count: int, workers: int = 2) -> None:
    """Render ``count`` training scenes; store images (uint8), components and latents (float16) under ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "pictures.npy"
    if not path.exists() or len(np.load(path, mmap_mode="r")) != count:
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, HIGH, HIGH, 3)).flush()
        edges = np.linspace(0, count, workers * 8 + 1).astype(int)
        jobs = [(str(path), int(a), int(b)) for a, b in pairwise(edges)]
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(_render_range, jobs))
    pictures = np.load(path, mmap_mode="r")
    sample = pictures[:: max(1, count // 600)].astype(np.float32) / 127.5 - 1
    components: dict[str, Any] = fit_components(sample)
    np.savez(work / "components.npz", **components)
    mean, analysis = components["mean"].astype(np.float32), components["analysis"].astype(np.float32)
    for size in SIZES:
        out = np.lib.format.open_memmap(
            work / f"latents{size}.npy",
            mode="w+",
            dtype=np.float16,
            shape=(count, CHANNELS, size // PATCH, size // PATCH),
        )
        for first in range(0, count, 64):
            block = pictures[first : first + 64].astype(np.float32) / 127.5 - 1
            for _ in range(SIZES.index(size)):
                block = shrink(block)
            out[first : first + len(block)] = ((patches(block) - mean) @ analysis).transpose(0, 3, 1, 2)
        out.flush()
    build_meanings(work, count, workers)
    scenes = [asdict(scene_at(index)) for index in range(count)]
    (work / "scenes.json").write_text(json.dumps(scenes))


def load_scenes(work: Path) -> list[Scene]:
    rows = json.loads((work / "scenes.json").read_text())
    return [
        Scene(
            **{
                **row,
                "things": tuple(Thing(**thing) for thing in row["things"]),
                "faces": tuple(Face(**face) for face in row["faces"]),
            }
        )
        for row in rows
    ]
