"""Pixel super-resolution: exact sizes, tiles, precision, memory, and files that are not what they should be."""

from __future__ import annotations

import os
import pickle
import re
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched._runtime.memory import free_memory, is_memory_error
from mrflow_sched._runtime.torchvision_ops import ensure_ops
from mrflow_sched.plan import tiles
from mrflow_sched.upscaling import blend, build, fit, load
from mrflow_sched.upscaling import model as upscale
from mrflow_sched.upscaling.fit import upscale_to
from mrflow_sched.upscaling.lanczos import LanczosUpscaler, resize_lanczos
from mrflow_sched.upscaling.load import choose_dtype, load_upscaler
from mrflow_sched.upscaling.model import ModelUpscaler
from mrflow_sched.upscaling.role import kind_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


def rrdbnet(scale: int, shuffle: int | None = None, channels: int = 3) -> torch.nn.Module:
    """spandrel's own ESRGAN network, tiny, with random weights that answer in the middle of [0, 1]."""
    ensure_ops()
    from spandrel.architectures.ESRGAN import ESRGAN

    with torch.random.fork_rng():
        torch.manual_seed(scale)
        net = ESRGAN(
            in_nc=channels * (shuffle or 1) ** 2,
            out_nc=channels,
            num_filters=4,
            num_blocks=1,
            scale=scale * (shuffle or 1),
            shuffle_factor=shuffle,
        )
    last: Any = list(net.modules())[-1]
    assert isinstance(last, torch.nn.Conv2d)
    assert last.bias is not None
    with torch.no_grad():
        last.weight.mul_(4)
        last.bias.add_(0.5)
    return net.eval()


def save(net: torch.nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def x2(tmp_path_factory: pytest.TempPathFactory) -> ModelUpscaler:
    """A x2 model file, loaded in float32."""
    loaded = load_upscaler(save(rrdbnet(2), tmp_path_factory.mktemp("x2") / "x2.safetensors"), dtype="float32")
    assert isinstance(loaded, ModelUpscaler)
    return loaded


class Nearest:
    """Stands for a spandrel model: repeats pixels, and runs out of memory above `largest` pixels a side."""

    def __init__(self, scale: int = 2, largest: int = 10_000, tiling: str = "SUPPORTED", multiple: int = 1) -> None:
        self.scale, self.largest = scale, largest
        self.device, self.dtype = CPU, torch.float32
        self.tiling = SimpleNamespace(name=tiling)
        self.size_requirements = SimpleNamespace(multiple_of=multiple)
        self.architecture = SimpleNamespace(id="Nearest")
        self.input_channels = 3
        self.error: BaseException = torch.cuda.OutOfMemoryError("CUDA out of memory.")
        self.seen: list[tuple[int, int]] = []

    def __call__(self, image: Tensor) -> Tensor:
        assert image.shape[0] == 1, "spandrel's contract is one image at a time"
        height, width = image.shape[-2:]
        self.seen.append((height, width))
        if max(height, width) > self.largest:
            raise self.error
        return functional.interpolate(image, scale_factor=self.scale, mode="nearest")


def nearest(tile: int | None = None, overlap: int = 4, **model: Any) -> tuple[ModelUpscaler, Nearest]:
    double: Any = Nearest(**model)
    return ModelUpscaler("double", double, tile, overlap), double


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("scale", "shuffle"), [(1, None), (1, 4), (2, None), (2, 2), (4, None), (8, None)])
def test_every_scale_and_format_runs(tmp_path: Path, scale: int, shuffle: int | None, suffix: str) -> None:
    net = rrdbnet(scale, shuffle)
    upscaler = load_upscaler(save(net, tmp_path / f"some{suffix}"), device="cpu", dtype="float32")
    picture = images(1, 8, 12)
    assert (upscaler.name, upscaler.scale) == ("some", scale)
    result = upscaler(picture)
    assert result.shape == (1, 3, 8 * scale, 12 * scale)
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.allclose(result, net(picture).clamp(0, 1), atol=1e-5)
    assert result.std() > 0.01


def test_the_result_is_an_ordinary_tensor(x2: ModelUpscaler) -> None:
    result = x2(images(1, 4, 4))
    assert not result.is_inference()
    assert not result.requires_grad
    result.mul_(0.5)


def test_a_batch_equals_its_images_one_by_one(x2: ModelUpscaler) -> None:
    batch = images(3, 7, 5)
    assert torch.equal(x2(batch), torch.cat([x2(one) for one in batch.split(1)]))


def test_bfloat16_stays_near_float32(tmp_path: Path, x2: ModelUpscaler) -> None:
    upscaler = load_upscaler(save(rrdbnet(2), tmp_path / "x2.pth"), device="cpu", dtype="bfloat16")
    assert isinstance(upscaler, ModelUpscaler)
    assert upscaler.dtype == torch.bfloat16
    picture = images(1, 16, 16)
    result = upscaler(picture)
    assert result.dtype == torch.float32
    assert 0 < (result - x2(picture)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("device", "half", "bfloat16", "hardware", "expected"),
    [
        (CUDA, True, True, True, torch.float16),
        (CUDA, False, True, True, torch.bfloat16),
        (CUDA, False, True, False, torch.float32),
        (CUDA, False, False, True, torch.float32),
        (CPU, True, True, True, torch.bfloat16),
        (CPU, True, True, False, torch.float32),
        (CPU, True, False, True, torch.float32),
        (torch.device("mps"), True, True, True, torch.float32),
    ],
)
def test_half_precision_where_model_and_hardware_profit(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    half: bool,
    bfloat16: bool,
    hardware: bool,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(load, "has_bfloat16", lambda where: hardware and where.type != "mps")
    assert choose_dtype(device, half, bfloat16) == expected


def test_a_precision_that_is_asked_for() -> None:
    assert choose_dtype(CPU, True, True, "float16") == torch.float16
    assert choose_dtype(CPU, True, True, torch.bfloat16) == torch.bfloat16
    for dtype in ("float64", torch.float64, "half"):
        with pytest.raises(ValueError, match="dtype must be"):
            choose_dtype(CPU, True, True, dtype)
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match="does not support"):
            choose_dtype(CPU, False, False, dtype)


class Overflowing(Nearest):
    """Returns infinity in one value of every result."""

    def __call__(self, image: Tensor) -> Tensor:
        result = super().__call__(image)
        result[..., 0, 0] = float("inf")
        return result


def test_a_model_that_overflows_is_named() -> None:
    model: Any = Overflowing()
    with pytest.raises(MrFlowError, match=r"double returned NaN or infinity in float32"):
        ModelUpscaler("double", model)(images(1, 4, 4))
    assert model.seen == [(4, 4)]


def test_a_picture_that_is_not_finite_is_not_the_models_fault() -> None:
    upscaler, model = nearest()
    picture = images(2, 4, 4)
    picture[1, 0, 0, 0] = float("nan")
    result = upscaler(picture)
    assert bool(result[0].isfinite().all())
    assert bool(result[1].isnan().any())
    assert len(model.seen) == 2


def test_transparency_is_upscaled_by_itself(x2: ModelUpscaler) -> None:
    images = torch.rand(2, 4, 6, 8, generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    for model in (None, x2):
        made = upscale_to(images, 16, 12, model)
        torch.testing.assert_close(made[:, :3], upscale_to(images[:, :3], 16, 12, model), atol=0, rtol=0)
        torch.testing.assert_close(made[:, 3:], resize_lanczos(images[:, 3:], 16, 12).clamp(0, 1), atol=0, rtol=0)
    hidden = images.clone()
    hidden[0, 3, :, 4:] = 0
    hidden[0, :3, :, 4:] = 0
    edge = upscale_to(hidden, 16, 12)[0, :3, :, :8]
    assert float(edge.min()) > 0.4  # nothing of the hidden black
    torch.testing.assert_close(upscale_to(hidden, 16, 12)[1], upscale_to(images, 16, 12)[1], atol=0, rtol=0)
    for bad in (images[:0], (images * 255).to(torch.uint8)):
        with pytest.raises(ValueError, match="images must be a float tensor"):
            upscale_to(bad, 16, 12)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 5, 4, 4), (1, 1, 4, 4), (1, 3, 0, 4), (0, 3, 4, 4)])
def test_wrong_channels_and_shapes(x2: ModelUpscaler, shape: tuple[int, ...]) -> None:
    calls: list[Callable[[Tensor], Tensor]] = [x2, LanczosUpscaler(), lambda x: upscale_to(x, 8, 8)]
    for call in calls:
        with pytest.raises(ValueError, match="images must be a float tensor"):
            call(torch.zeros(shape))
    with pytest.raises(ValueError, match="uint8"):
        x2(torch.zeros((1, 3, 4, 4), dtype=torch.uint8))


# ---------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("size", [(40, 40), (33, 70), (24, 25)])
def test_tiles_agree_with_the_full_frame(x2: ModelUpscaler, size: tuple[int, int]) -> None:
    picture = images(2, *size)
    tiled = ModelUpscaler("x2", x2.model, tile=24, overlap=12)
    whole = x2(picture)
    assert (tiled(picture) - whole).abs().max() < 0.02 * whole.std() + 1e-4


def test_tiles_leave_no_seam() -> None:
    upscaler, model = nearest(tile=16)
    picture = images(1, 50, 37)
    assert torch.allclose(upscaler(picture), functional.interpolate(picture, scale_factor=2), atol=1e-6)
    assert max(map(max, model.seen)) <= 16
    assert len(model.seen) > 4


def test_a_tile_larger_than_the_picture_changes_nothing() -> None:
    upscaler, model = nearest(tile=64)
    upscaler(images(1, 50, 64))
    assert model.seen == [(50, 64)]


@settings(max_examples=200)
@given(st.integers(1, 500), st.integers(1, 200), st.integers(0, 300), st.integers(1, 130))
@example(100, 64, 32, 128)
def test_spans_cover_the_length(length: int, side: int, overlap: int, multiple: int) -> None:
    spans = tiles.spans(length, side, overlap, multiple)
    assert (spans[0][0], spans[-1][1]) == (0, length)
    assert all(0 < stop - start <= max(side, multiple) for start, stop in spans)
    if len(spans) > 1:
        assert all(start % multiple == 0 for start, _ in spans)
    longest = max(side // multiple, 1) * multiple
    wanted = min(overlap, longest // 2, longest - multiple)
    for (start, stop), (after, _) in pairwise(spans):
        assert start < after <= stop
        assert stop - after > wanted - multiple
    total = torch.zeros(length)
    for (start, stop), weight in blend.feathered(spans):
        assert weight.min() >= 0
        total[start:stop] += weight
    assert total.min() > 0


@pytest.mark.parametrize("wrong", [(-1, 8, 0, 1), (8, 0, 0, 1), (8, 4, -1, 1), (8, 4, 0, 0)])
def test_spans_that_make_no_sense(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(MrFlowError, match="must be 1 or more"):
        tiles.spans(*wrong)


def test_ramps_sum_to_one_and_ignore_the_edge() -> None:
    ramp = blend._ramp(32)
    assert torch.allclose(ramp + ramp.flip(0), torch.ones(32))
    assert ramp[:8].max() == 0
    assert len(blend._ramp(0)) == 0


def test_a_model_that_discourages_tiles_gets_them_with_a_warning() -> None:
    upscaler, model = nearest(tile=16, tiling="DISCOURAGED")
    heard: list[str] = []
    upscaler.run(images(1, 20, 20), warn=heard.append)
    assert len(model.seen) == 4
    assert "may show" in heard[0]


def test_a_model_that_tiles_by_itself_gets_the_full_frame() -> None:
    upscaler, model = nearest(tile=16, tiling="INTERNAL")
    heard: list[str] = []
    upscaler.run(images(1, 20, 20), warn=heard.append)
    assert model.seen == [(20, 20)]
    assert "was not applied" in heard[0]


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        MemoryError(),
    ],
)
def test_where_memory_runs_out_tiles_take_over(error: BaseException) -> None:
    assert is_memory_error(error)
    upscaler, model = nearest(largest=64, overlap=8)
    model.error = error
    heard: list[str] = []
    picture = images(2, 20, 200)
    result = upscaler.run(picture, warn=heard.append)
    assert torch.allclose(result, functional.interpolate(picture, scale_factor=2), atol=1e-6)
    # Full frame, tiles of 128, then 64; the second image begins with what worked.
    assert [max(size) for size in model.seen].count(200) == 1
    assert [max(size) for size in model.seen].count(128) == 1
    assert ["128" in heard[0], "64" in heard[1], len(heard)] == [True, True, 2]


def test_a_real_allocator_failure_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_memory_error(caught.value)


def test_other_errors_pass_through() -> None:
    upscaler, model = nearest(largest=4)
    model.error = RuntimeError("a shape does not fit")
    assert not is_memory_error(model.error)
    assert not is_memory_error(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="a shape does not fit"):
        upscaler(images(1, 8, 8))
    assert model.seen == [(8, 8)]


def test_memory_that_does_not_suffice_for_the_smallest_tile() -> None:
    upscaler, _ = nearest(largest=4)
    with pytest.raises(MemoryError, match="upscaled 64x64 pixels at once"):
        upscaler(images(1, 70, 70))


def test_a_model_that_tiles_by_itself_is_not_tiled_for_memory() -> None:
    upscaler, model = nearest(largest=64, tiling="INTERNAL")
    with pytest.raises(MemoryError, match="memory ran out"):
        upscaler(images(1, 200, 20))
    assert model.seen == [(200, 20)]


def test_cached_blocks_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("cuda"))
    free_memory(CPU)
    free_memory(CUDA)
    assert called == ["cuda"]


# --------------------------------------------------------------------------------------------------------------- cancel


def test_cancel_is_polled_between_tiles() -> None:
    upscaler, model = nearest(tile=16)
    with pytest.raises(Cancelled):
        upscaler.run(images(1, 40, 40), cancel=lambda: len(model.seen) == 3)
    assert len(model.seen) == 3


def test_cancel_is_polled_between_images_passes_and_at_the_start() -> None:
    upscaler, model = nearest()
    for done, call in (
        (0, lambda cancel: upscale_to(images(1, 8, 8), 16, 16, upscaler, cancel=cancel)),
        (1, lambda cancel: upscaler.run(images(2, 8, 8), cancel=cancel)),
        (1, lambda cancel: upscale_to(images(1, 8, 8), 32, 32, upscaler, cancel=cancel)),
    ):
        model.seen.clear()
        with pytest.raises(Cancelled):
            call(lambda done=done: len(model.seen) >= done)
        assert len(model.seen) == done


def test_an_upscaler_may_carry_its_own_cancel() -> None:
    model: Any = Nearest()
    with pytest.raises(Cancelled):
        ModelUpscaler("double", model, cancel=lambda: True)(images(1, 8, 8))


# ---------------------------------------------------------------------------------------------------------- exact size


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.sampled_from([None, 1, 2, 4]),
)
def test_the_target_is_met_exactly_whatever_the_sizes(
    source: tuple[int, int], target: tuple[int, int], scale: int | None
) -> None:
    upscaler = None if scale is None else nearest(scale=scale)[0]
    result = upscale_to(torch.full((1, 3, *source), 0.3), target[1], target[0], upscaler)
    assert result.shape == (1, 3, *target)
    assert result.is_contiguous()
    assert torch.allclose(result, torch.full_like(result, 0.3), atol=1e-5)


@pytest.mark.parametrize("scale", [None, 1, 2, 4])
@pytest.mark.parametrize("factor", [1.5, 2, 3, 4])
@pytest.mark.parametrize("aspect", [(1.0, 1.0), (1.3, 1.0), (1.0, 1.3)])
def test_nothing_is_stretched_or_moved(scale: int | None, factor: float, aspect: tuple[float, float]) -> None:
    """A picture of its own coordinates keeps one slope in both directions and its centre in the centre."""
    upscaler = None if scale is None else nearest(scale=scale)[0]
    side = 32
    line = (torch.arange(side) + 0.5) / side
    x, y = line.expand(side, side), line[:, None].expand(side, side)
    picture = torch.stack([x, y, torch.zeros(side, side)])[None]
    width, height = (round(side * factor * stretch) for stretch in aspect)
    result = upscale_to(picture, width, height, upscaler)[0]
    # Away from the borders, where kernels meet the edge; averaged, since repeated pixels make steps.
    inner = result[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
    x, y = inner[0].mean(0), inner[1].mean(1)
    slope_x, slope_y = (float(values[-1] - values[0]) / (len(values) - 1) for values in (x, y))
    assert slope_x == pytest.approx(slope_y, rel=0.08)
    assert slope_x == pytest.approx(1 / max(width, height), rel=0.08)
    assert float(x.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(y.mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("factor", "scale", "passes"),
    [
        (2, 2, 1),
        (1.25, 2, 1),
        (2.5, 2, 1),
        (3, 2, 2),
        (4, 2, 2),
        (8, 2, 3),
        (2, 4, 1),
        (4, 4, 1),
        (8, 4, 1),
        (16, 4, 2),
        (2, 1, 1),
        (0.5, 1, 1),
        (1, 2, 0),
        (0.5, 4, 0),
        (4, 8, 1),
    ],
)
def test_how_often_a_model_runs(factor: float, scale: int, passes: int) -> None:
    assert fit._passes(factor, scale) == passes
    upscaler, model = nearest(scale=scale)
    result = upscale_to(images(1, 8, 8), int(8 * factor), int(8 * factor), upscaler)
    assert len(model.seen) == passes
    assert result.shape[-1] == int(8 * factor)


def test_the_models_own_pixels_are_kept_where_its_scale_fits(x2: ModelUpscaler) -> None:
    picture = images(2, 6, 8)
    assert torch.equal(upscale_to(picture, 16, 12, x2), x2(picture))


def test_too_large_a_result_is_averaged_down_not_sampled() -> None:
    """Shrinking a fine checkerboard gives grey; picking pixels would give noise."""

    class Checkerboard(Nearest):
        def __call__(self, image: Tensor) -> Tensor:
            height, width = (side * self.scale for side in image.shape[-2:])
            return ((torch.arange(height)[:, None] + torch.arange(width)) % 2).float().expand(1, 3, -1, -1)

    model: Any = Checkerboard(4)
    result = upscale_to(images(1, 16, 16), 32, 32, ModelUpscaler("board", model))
    assert result[..., 4:-4, 4:-4].sub(0.5).abs().max() < 0.02


@pytest.mark.parametrize(("waves", "seen", "low", "high"), [(6, 6, 0.95, 1.0), (51, 13, 0.0, 0.15)])
def test_a_x4_model_for_a_factor_of_2_does_not_alias(waves: int, seen: int, low: float, high: float) -> None:
    """Of 51 waves on the model's 128 pixels, 64 pixels can show none: unfiltered, half of them would come as 13."""

    class Waves(Nearest):
        def __call__(self, image: Tensor) -> Tensor:
            side = image.shape[-1] * self.scale
            wave = 0.5 + 0.4 * torch.cos(2 * torch.pi * waves * (torch.arange(side) + 0.5) / side)
            return wave.expand(1, 3, side, side)

    model: Any = Waves(4)
    result = upscale_to(images(1, 32, 32), 64, 64, ModelUpscaler("waves", model))
    spectrum = torch.fft.rfft(result[0, 0, 32]).abs() * 2 / 64
    assert low <= float(spectrum[seen]) / 0.4 <= high


def test_floats_are_not_rounded_to_8_bits() -> None:
    line = torch.linspace(0.4, 0.41, 64).expand(1, 3, 64, 64)
    result = upscale_to(line, 96, 96, nearest()[0])
    assert len(result[0, 0, 0].unique()) > 40


def test_the_result_stays_in_range() -> None:
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    for upscaler in (None, nearest()[0], LanczosUpscaler()):
        result = upscale_to(edge, 20, 20, upscaler)
        assert result.min() >= 0
        assert result.max() <= 1


def test_lanczos_is_said_aloud() -> None:
    heard: list[str] = []
    for upscaler in (None, LanczosUpscaler()):
        upscale_to(images(1, 4, 4), 8, 8, upscaler, warn=heard.append)
    assert heard == [fit.NO_MODEL] * 2
    upscale_to(images(1, 8, 8), 4, 4, warn=heard.append)
    upscale_to(images(1, 8, 8), 16, 16, nearest()[0], warn=heard.append)
    assert len(heard) == 2


def test_lanczos_reaches_any_size_in_one_resize() -> None:
    picture = images(1, 8, 8)
    assert torch.equal(upscale_to(picture, 20, 20, LanczosUpscaler()), resize_lanczos(picture, 20, 20).clamp(0, 1))
    assert LanczosUpscaler(3)(picture).shape == (1, 3, 24, 24)


def test_an_upscaler_from_elsewhere_is_held_to_its_scale() -> None:
    class Elsewhere:
        name, scale = "elsewhere", 2

        def __init__(self, real: int) -> None:
            self.real = real

        def __call__(self, images: Tensor) -> Tensor:
            return functional.interpolate(images, scale_factor=self.real).double()

    assert upscale_to(images(1, 4, 4), 8, 8, Elsewhere(2)).dtype == torch.float32
    with pytest.raises(ValueError, match="elsewhere gave shape"):
        upscale_to(images(1, 4, 4), 8, 8, Elsewhere(3))


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (-1, 8)])
def test_sizes_below_one(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError):
        upscale_to(images(1, 4, 4), *size)
    with pytest.raises(ValueError, match="1 or more"):
        resize_lanczos(images(1, 4, 4), *size)


# -------------------------------------------------------------------------------------------------------------- Lanczos


@pytest.mark.parametrize("size", [(32, 24), (17, 23), (9, 50), (64, 5), (3, 2), (1, 1), (12, 16)])
def test_lanczos_is_pillows_lanczos(size: tuple[int, int]) -> None:
    picture = images(1, 12, 16)
    height, width = size
    ours = resize_lanczos(picture, width, height)
    for channel in range(3):
        plane = Image.frombytes("F", (16, 12), picture[0, channel].contiguous().numpy().tobytes())
        resized = plane.resize((width, height), Image.Resampling.LANCZOS)
        theirs = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.float32)
        assert torch.allclose(ours[0, channel].flatten(), theirs, atol=2e-6)


def test_lanczos_is_within_rounding_of_pillows_8_bits() -> None:
    # Away from black and white: between its two directions Pillow also clips.
    levels = (images(1, 12, 16) * 100 + 80).round()
    image = Image.frombytes("RGB", (16, 12), levels[0].to(torch.uint8).permute(1, 2, 0).contiguous().numpy().tobytes())
    theirs = torch.frombuffer(bytearray(image.resize((40, 30), Image.Resampling.LANCZOS).tobytes()), dtype=torch.uint8)
    ours = resize_lanczos(levels, 40, 30).clamp(0, 255)[0].permute(1, 2, 0).flatten()
    assert (ours - theirs).abs().max() <= 1.5


def test_lanczos_on_a_single_row_and_same_size() -> None:
    picture = images(1, 1, 5)
    assert torch.equal(resize_lanczos(picture, 5, 1), picture)
    assert torch.allclose(resize_lanczos(picture, 5, 4), picture.expand(1, 3, 4, 5), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- files


def refused(path: Path, kind: type[Exception] = ValueError) -> str:
    """The sentence with which `path` is refused; it names the file."""
    with pytest.raises(kind) as caught:
        load_upscaler(path)
    sentence = str(caught.value)
    assert path.name in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert len(sentence) < 600
    return sentence


def test_no_file_means_lanczos() -> None:
    assert load_upscaler(None) == LanczosUpscaler()


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "check the path" in refused(tmp_path / "none.pth", FileNotFoundError)
    (tmp_path / "folder.pth").mkdir()
    assert "not a file" in refused(tmp_path / "folder.pth")


def test_a_wrong_suffix(tmp_path: Path) -> None:
    save(rrdbnet(2), tmp_path / "model.pth").rename(tmp_path / "model.onnx")
    assert ".safetensors" in refused(tmp_path / "model.onnx")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02.", b"PK\x03\x04" + bytes(40), bytes(100), b"junk\n"])
def test_empty_files_and_files_of_something_else(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"bad{suffix}").write_bytes(content)
    said = refused(tmp_path / f"bad{suffix}")
    assert re.search(r"cannot be used: it (is|holds) [a-z ,]{4,}; download it again", said)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, suffix: str, kept: float) -> None:
    path = save(rrdbnet(2), tmp_path / f"short{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert "cut short" in refused(path)


class Hostile:
    """A pickle that, read without care, makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


def write_zip(value: object, path: Path) -> None:
    torch.save(value, path)


def write_old(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_plain(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def write_tar(value: object, path: Path) -> None:
    inside = path.with_name("pickle")
    write_plain(value, inside)
    with tarfile.open(path, "w") as archive:
        archive.add(inside, "pickle")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("write", [write_zip, write_old, write_plain, write_tar])
def test_hostile_pickles_are_not_executed(tmp_path: Path, write: Callable[[object, Path], None], suffix: str) -> None:
    target = tmp_path / "executed"
    path = tmp_path / f"hostile{suffix}"
    write({"model.0.weight": Hostile(target)}, path)
    sentence = refused(path)
    assert not target.exists()
    if write is not write_tar:
        assert f"asks to run {os.mkdir.__module__}.mkdir, which was refused" in sentence
    if write is write_plain:  # the trap works: whoever reads it without care springs it
        pickle.loads(path.read_bytes())
        assert target.exists()


def test_tables_of_anything_but_weights(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    assert "no table of weights" in refused(tmp_path / "list.pth")
    for name, table in {
        "other": {"encoder.weight": torch.zeros(2, 2)},
        "empty": {},
        "numbers": {"step": 3},
    }.items():
        torch.save(table, tmp_path / f"{name}.pth")
        assert "no known super-resolution model" in refused(tmp_path / f"{name}.pth")
    torch.save({3: torch.zeros(2)}, tmp_path / "keys.pth")
    refused(tmp_path / "keys.pth")
    save_file({"lora_down.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    assert "no known super-resolution model" in refused(tmp_path / "lora.safetensors")


def test_weights_inside_the_usual_wrappings(tmp_path: Path) -> None:
    for key in ("params_ema", "params", "state_dict"):
        torch.save({key: rrdbnet(2).state_dict()}, tmp_path / f"{key}.pth")
        assert load_upscaler(tmp_path / f"{key}.pth").scale == 2


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_together(tmp_path: Path, damage: str) -> None:
    table: dict[str, Any] = dict(rrdbnet(2).state_dict())
    if damage == "missing":
        del table["model.1.sub.0.RDB2.conv3.0.weight"]
    elif damage == "extra":
        table["model.1.sub.0.RDB2.conv3.0.scale"] = torch.zeros(1)
    else:
        table["model.1.sub.0.RDB2.conv3.0.weight"] = torch.zeros(5, 5, 3, 3)
    torch.save(table, tmp_path / "unfit.pth")
    assert "do not fit together" in refused(tmp_path / "unfit.pth")


@pytest.mark.parametrize("layer", ["1000000000", "9" * 400, "5000"])
def test_layer_numbers_that_would_build_without_end(tmp_path: Path, layer: str) -> None:
    table = dict(rrdbnet(2).state_dict())
    table[f"model.1.sub.{layer}.RDB1.conv1.0.weight"] = torch.zeros(1)
    save_file(table, tmp_path / "deep.safetensors")
    assert "names no layer" in refused(tmp_path / "deep.safetensors")


def test_models_of_another_kind(tmp_path: Path) -> None:
    assert "takes 4 and returns 4 channels" in refused(save(rrdbnet(2, channels=4), tmp_path / "alpha.pth"))
    inpainting: Any = SimpleNamespace(architecture=SimpleNamespace(name="LaMa"), purpose="Inpainting")
    with pytest.raises(MrFlowError, match="LaMa model for Inpainting"):
        build._checked(inpainting)


@pytest.mark.parametrize("settings", [{"tile": 0}, {"tile": 15}, {"tile": -3}, {"overlap": -1}])
def test_limits_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        load_upscaler(None, **settings)


def test_settings_arrive(tmp_path: Path) -> None:
    path = save(rrdbnet(2), tmp_path / "x2.pth")
    upscaler = load_upscaler(str(path), device="cpu", dtype=torch.float32, tile=32, overlap=8)
    assert isinstance(upscaler, ModelUpscaler)
    assert not any(weight.requires_grad for weight in upscaler.model.model.parameters())
    assert (upscaler.tile, upscaler.overlap, upscaler.device, upscaler.dtype) == (32, 8, CPU, torch.float32)


def test_channels_come_last_only_where_that_is_known_to_be_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(rrdbnet(2), tmp_path / "x2.pth")

    def results() -> tuple[bool, Tensor]:
        upscaler = load_upscaler(path, device="cpu", dtype="float32")
        assert isinstance(upscaler, ModelUpscaler)
        weights = [weight for weight in upscaler.model.model.parameters() if weight.ndim == 4]
        return all(weight.is_contiguous() for weight in weights), upscaler(images(1, 8, 8))

    last, one = results()
    monkeypatch.setattr(upscale, "CHANNELS_LAST", frozenset())
    plain, other = results()
    assert (last, plain) == (False, True)
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("fits", [2, 1, 0])
def test_somebody_elses_upscaler_takes_image_by_image_what_it_cannot_take_at_once(fits: int) -> None:
    asked: list[int] = []

    class Small:
        name, scale = "small", 2

        def __call__(self, images: Tensor) -> Tensor:
            asked.append(len(images))
            if len(images) > fits:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return images.repeat_interleave(2, -1).repeat_interleave(2, -2)

    images = torch.rand((2, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    if fits:
        expected = images.repeat_interleave(2, -1).repeat_interleave(2, -2)
        assert torch.equal(upscale_to(images, 12, 8, Small()), expected)
        assert asked == ([2] if fits == 2 else [2, 1, 1])
    else:
        with pytest.raises(MemoryError, match="the upscaler small upscaled 6x4 pixels; free memory, or choose"):
            upscale_to(images, 12, 8, Small())
        assert asked == [2, 1]


def test_the_kind_of_an_upscaler(x2: ModelUpscaler) -> None:
    for plain in (None, LanczosUpscaler(), SimpleNamespace(scale=2, kind="interpolation"), SimpleNamespace(scale=1)):
        assert kind_of(plain) == "interpolation"
    for network in (x2, SimpleNamespace(scale=2), SimpleNamespace(scale=4, kind="esrgan")):
        assert kind_of(network) == "network"
