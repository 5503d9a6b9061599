"""Half precision is tried and not believed, grey networks enlarge the luminance, and a failing upscaler is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched._runtime.torchvision_ops import ensure_ops
from mrflow_sched.upscaling import load
from mrflow_sched.upscaling.fit import upscale_to
from mrflow_sched.upscaling.load import load_upscaler
from mrflow_sched.upscaling.model import LUMINANCE, ModelUpscaler
from mrflow_sched.upscaling.role import check_upscaler


def picture(height: int = 12, width: int = 20) -> Tensor:
    return torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(2))


def loaded(path: Path, **options: Any) -> ModelUpscaler:
    upscaler = load_upscaler(path, device="cpu", **options)
    assert isinstance(upscaler, ModelUpscaler)
    return upscaler


@pytest.fixture(scope="module")
def swinir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SwinIR whose mask is for images of 16x16, to which smaller ones are padded: in bfloat16 it works there only."""
    ensure_ops()
    from spandrel.architectures.SwinIR import SwinIR

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SwinIR(
            img_size=16, window_size=4, upscale=2, upsampler="pixelshuffle", embed_dim=8, depths=(2,), num_heads=(2,)
        )
    path = tmp_path_factory.mktemp("swinir") / "swinir.safetensors"
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small convolutional network, which works in half precision."""
    ensure_ops()
    from spandrel.architectures.Compact import Compact

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Compact(num_feat=8, num_conv=1, upscale=2)
    path = tmp_path_factory.mktemp("compact") / "compact.safetensors"
    save_file(net.state_dict(), path)
    return path


# ----------------------------------------------------------------------------------------------------------- at loading


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "has_bfloat16", lambda device: True)


@pytest.mark.usefixtures("bfloat16")
def test_a_network_that_only_claims_half_precision_runs_in_float32(swinir: Path) -> None:
    upscaler = loaded(swinir)
    assert upscaler.model.supports_bfloat16
    assert upscaler.dtype == torch.float32
    assert torch.equal(upscaler(picture()), loaded(swinir, dtype="float32")(picture()))


def test_one_size_would_not_have_told(swinir: Path) -> None:
    upscaler = loaded(swinir, dtype="float32")
    upscaler.model.bfloat16()
    assert upscaler.failure([(8, 8)]) is None
    assert "dtype" in str(upscaler.failure([(8, 8), (8, 24)]))


def test_half_precision_that_was_asked_for_is_refused_where_it_fails(swinir: Path) -> None:
    with pytest.raises(
        MrFlowError, match=r"dtype is 'bfloat16', in which .*swinir.* fails \(.*use 'auto' or 'float32'"
    ):
        loaded(swinir, dtype="bfloat16")


@pytest.mark.usefixtures("bfloat16")
def test_half_precision_is_kept_where_it_works(compact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, int]] = []
    original = ModelUpscaler.failure

    def note(self: ModelUpscaler, sizes: Any) -> str | None:
        tried.extend(sizes)
        return original(self, sizes)

    monkeypatch.setattr(ModelUpscaler, "failure", note)
    assert loaded(compact).dtype == torch.bfloat16
    assert tried == [(4, 4)]  # convolutions are the same at every size
    assert loaded(compact, dtype="float32").dtype == torch.float32
    assert tried == [(4, 4)]


def test_a_trial_without_memory_says_nothing_about_the_dtype(compact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ModelUpscaler, image: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ModelUpscaler, "_piece", full)
    assert loaded(compact, dtype="bfloat16").dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------------- while running


def test_a_failure_in_half_precision_is_repeated_in_float32_once(swinir: Path) -> None:
    upscaler = loaded(swinir, dtype="float32")
    expected = upscaler(picture())
    upscaler.model.bfloat16()
    heard: list[str] = []
    assert torch.equal(upscaler.run(picture(), warn=heard.append), expected)  # the file's weights, not rounded ones
    assert upscaler.dtype == torch.float32
    upscaler.run(picture(), warn=heard.append)
    [sentence] = heard
    assert sentence.startswith("the upscaler swinir failed in bfloat16 (")
    assert sentence.endswith("so it runs in float32.")


@pytest.mark.parametrize("tile", [None, 16])
def test_values_that_overflow_in_half_precision(compact: Path, tmp_path: Path, tile: int | None) -> None:
    from safetensors.torch import load_file

    table = load_file(compact)
    table["body.0.weight"] *= 3e5
    table["body.2.weight"] *= 3e-6
    save_file(table, tmp_path / "loud.safetensors")
    upscaler = loaded(tmp_path / "loud.safetensors", dtype="float32", tile=tile, overlap=4)
    expected = upscaler(picture())
    upscaler.model.half()
    heard: list[str] = []
    assert torch.equal(upscaler.run(picture(), warn=heard.append), expected)
    assert len(heard) == 1
    assert "failed in float16 (the upscaler loud returned NaN or infinity in float16)" in heard[0]


def test_a_failure_in_float32_is_final(compact: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    table = load_file(compact)
    table["body.0.weight"][0, 0, 0, 0] = float("nan")
    save_file(table, tmp_path / "nan.safetensors")
    upscaler = loaded(tmp_path / "nan.safetensors")
    assert upscaler.dtype == torch.float32
    with pytest.raises(MrFlowError, match=r"the upscaler nan returned NaN or infinity in float32\."):
        upscaler(picture())


# ------------------------------------------------------------------------------------------------------------- grey, x1


def test_a_grey_network_enlarges_the_luminance(tmp_path: Path) -> None:
    ensure_ops()
    from spandrel.architectures.ESRGAN import ESRGAN

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ESRGAN(in_nc=1, out_nc=1, num_filters=4, num_blocks=1, scale=2).eval()
    save_file(net.state_dict(), tmp_path / "grey.safetensors")
    upscaler = loaded(tmp_path / "grey.safetensors", dtype="float32")
    image = picture() * 0.2 + 0.4
    weights = torch.tensor(LUMINANCE).view(1, 3, 1, 1)
    grey = (image * weights).sum(1, keepdim=True)
    with torch.no_grad():
        luminance = net(grey).clamp(0, 1)
    result = upscaler(image)
    assert result.shape == (1, 3, 24, 40)
    colours = functional.interpolate(image - grey, scale_factor=2, mode="bicubic", align_corners=False)
    assert torch.allclose(result, (luminance + colours).clamp(0, 1), atol=1e-5)
    drawn = grey.expand(1, 3, -1, -1)
    assert torch.allclose(upscaler(drawn), luminance.expand(1, 3, -1, -1), atol=1e-5)


def test_a_model_that_does_not_enlarge_is_told(tmp_path: Path) -> None:
    ensure_ops()
    from spandrel.architectures.Compact import Compact

    save_file(Compact(num_feat=4, num_conv=1, upscale=1).state_dict(), tmp_path / "x1.safetensors")
    heard: list[str] = []
    upscaler = loaded(tmp_path / "x1.safetensors", dtype="float32")
    assert upscale_to(picture(), 40, 24, upscaler, warn=heard.append).shape == (1, 3, 24, 40)
    [sentence] = heard
    assert "the upscaler x1 does not enlarge (x1): it cleaned the image" in sentence
    upscale_to(picture(), 20, 12, upscaler, warn=heard.append)
    assert len(heard) == 1


# ------------------------------------------------------------------------------------------------------ somebody else's


class Own:
    """An upscaler of a user's, which returns whatever it is told to."""

    name = "own"

    def __init__(self, returned: Any = None, scale: Any = 2) -> None:
        self.returned, self.scale = returned, scale

    def __call__(self, images: Tensor) -> Any:
        return self.returned(images) if callable(self.returned) else self.returned


def doubled(images: Tensor) -> Tensor:
    return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned NoneType instead of a float tensor"),
        (lambda images: doubled(images).numpy(), "returned ndarray instead of a float tensor"),
        (lambda images: (doubled(images) * 255).to(torch.uint8), "returned torch.uint8 instead"),
        (lambda images: doubled(images) * 255, "returned values from"),
        (lambda images: doubled(images) - 5, "returned values from"),
        (lambda images: doubled(images) * 0, "returned another image: its mean is 0.00, not 0."),
        (lambda images: doubled(images) * 0 + images.mean(), "returned another image: its mean is 0."),
        (lambda images: images, "gave shape (1, 3, 12, 20) where its scale 2 asks for (1, 3, 24, 40)"),
        (lambda images: doubled(images)[0], "gave shape (3, 24, 40)"),
        (lambda images: doubled(images) * float("nan"), "returned NaN or infinity"),
    ],
)
def test_results_that_are_no_pictures(returned: Any, said: str) -> None:
    with pytest.raises(MrFlowError) as caught:
        upscale_to(picture(), 40, 24, Own(returned))
    assert f"the upscaler own {said}" in str(caught.value)


def test_an_upscaler_cannot_change_the_picture_it_is_given() -> None:
    image = picture()
    before = image.clone()
    upscale_to(image, 40, 24, Own(lambda images: doubled(images.mul_(0.8))))
    assert torch.equal(image, before)


def test_a_little_overshoot_is_cut_off() -> None:
    result = upscale_to(picture(), 40, 24, Own(lambda images: doubled(images) * 1.4 - 0.2))
    assert (float(result.min()), float(result.max())) == (0, 1)


def test_a_picture_that_is_not_finite_is_not_the_upscalers_fault() -> None:
    image = picture()
    image[..., 0, 0] = float("nan")
    assert bool(upscale_to(image, 40, 24, Own(doubled)).isnan().any())


@pytest.mark.parametrize("scale", [0, -1, "2", 2.0, True, None, float("nan")])
def test_scales_that_are_none(scale: Any) -> None:
    with pytest.raises(MrFlowError, match="scale"):
        check_upscaler(Own(doubled, scale))


@pytest.mark.parametrize("wrong", [torch.nn.Conv2d(3, 3, 1), 7, doubled, object(), Own])
def test_what_is_no_upscaler(wrong: Any) -> None:
    with pytest.raises(MrFlowError, match="upscaler"):
        check_upscaler(wrong)


@pytest.mark.parametrize("path", ["x2.pth", b"x2.pth", Path("x2.pth"), "\x1b[31m"])
def test_a_path_is_to_be_loaded_first(path: Any) -> None:
    with pytest.raises(MrFlowError, match="load it first") as caught:
        check_upscaler(path)
    assert str(caught.value).isprintable()


def test_what_is_an_upscaler(compact: Path) -> None:
    for good in (None, load_upscaler(None), loaded(compact), Own(doubled), Own(doubled, np.int64(2))):
        check_upscaler(good)
    assert upscale_to(picture(), 40, 24, Own(doubled, np.int64(2))).shape == (1, 3, 24, 40)
