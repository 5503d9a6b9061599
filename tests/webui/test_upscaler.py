"""Our upscalers in the host's list: which files, which is chosen, what comes back, and what when things go wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mrflow_sched._runtime.torchvision_ops import ensure_ops
from mrflow_sched.apps.webui import upscaler
from mrflow_sched.apps.webui.upscaler import FastScaler, add_fast_upscalers, pick_automatic, scale_in_name
from mrflow_sched.upscaling import load_upscaler
from mrflow_sched.upscaling import model as upscale


def network(scale: int, bias: float = 0.0) -> torch.nn.Module:
    """spandrel's own ESRGAN network, tiny, with random weights."""
    ensure_ops()
    from spandrel.architectures.ESRGAN import ESRGAN

    shuffle = 2 if scale == 2 else None
    with torch.random.fork_rng():
        torch.manual_seed(scale)
        net = ESRGAN(
            in_nc=3 * (shuffle or 1) ** 2,
            out_nc=3,
            num_filters=4,
            num_blocks=1,
            scale=scale * (shuffle or 1),
            shuffle_factor=shuffle,
        )
    last: Any = list(net.modules())[-1]
    torch.nn.init.constant_(last.bias, 0.5 + bias)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ESRGAN folder: a x2 and a x4 model, one whose name tells nothing, and what is no such model."""
    place = tmp_path_factory.mktemp("models") / "ESRGAN"
    place.mkdir()
    for name, scale in (("2x-Tiny", 2), ("RealESRGAN_x4tiny", 4), ("nameless", 2)):
        save_file(network(scale).state_dict(), place / f"{name}.safetensors")
    (place / "notes.txt").write_text("2x")
    (place / "1x-Clean.pth").write_bytes(b"")
    (place / "broken.pth").write_bytes(b"no weights")
    return place


def scaler(**changes: Any) -> FastScaler:
    given: dict[str, Any] = {
        "device": lambda: torch.device("cpu"),
        "cancelled": lambda: False,
        "make_room": lambda: None,
        "tidy": lambda: None,
        "half": False,
        **changes,
    }
    return FastScaler(**given)


def picture(width: int = 24, height: int = 16) -> Image.Image:
    values = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Image.fromarray(values.numpy(), "RGB")


def host_entry(name: str, path: str | None, owner: Any = None, scale: int = 4) -> Any:
    return SimpleNamespace(name=name, data_path=path, local_data_path=path, scaler=owner, scale=scale)


class UpscalerData:
    """The hosts' entry, by its signature."""

    def __init__(self, name: str, path: str, upscaler: Any = None, scale: int = 4, model: Any = None) -> None:
        self.name, self.data_path, self.scaler, self.scale = name, path, upscaler, scale


def host_list(folder: Path) -> list[Any]:
    """A list as Forge builds it: only some of the folder's files, and others that are no ESRGAN."""
    owner = SimpleNamespace(name="ESRGAN", model_path=str(folder), user_path=None)
    other = SimpleNamespace(name="DAT", model_path=None, user_path=None)
    return [
        host_entry("None", None, SimpleNamespace(name="None")),
        host_entry("Lanczos", None, SimpleNamespace(name="Lanczos")),
        host_entry("DAT x2", "https://example.invalid/DAT_x2.pth", other),
        host_entry("My tiny 2x", str(folder / "2x-Tiny.safetensors"), owner),
        host_entry("ESRGAN_4x", "https://example.invalid/ESRGAN.pth", owner),
    ]


# ------------------------------------------------------------------------------------------------------------ choosing


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("4x-UltraSharp", 4),
        ("4x_NMKD-Siax_200k", 4),
        ("RealESRGAN_x2plus", 2),
        ("R-ESRGAN 2x+", 2),
        ("R-ESRGAN General 4xV3", 4),
        ("realesr-general-x4v3", 4),
        ("2xNomosUni", 2),
        ("1x-DeJPG", 1),
        ("8x_NMKD-Typescale", 8),
        ("remacri", None),
        ("trained-512x512", None),
        ("Lanczos", None),
    ],
)
def test_the_scale_in_a_name(name: str, scale: int | None) -> None:
    assert scale_in_name(name) == scale


@pytest.mark.parametrize(
    ("names", "chosen", "hinted"),
    [
        (["None", "Lanczos", "R-ESRGAN 4x+", "R-ESRGAN 2x+", "2x-Tiny (MrFlow)"], "2x-Tiny (MrFlow)", False),
        (["None", "R-ESRGAN 4x+", "R-ESRGAN 2x+"], "R-ESRGAN 2x+", False),
        (["R-ESRGAN 2x+", "4x-UltraSharp (MrFlow)"], "R-ESRGAN 2x+", False),
        (["2x-Anime (MrFlow)", "2x-Photo (MrFlow)"], "2x-Photo (MrFlow)", False),
        (["2x-Photo (MrFlow)", "RealESRGAN_x2plus (MrFlow)"], "RealESRGAN_x2plus (MrFlow)", False),
        (["Lanczos", "R-ESRGAN 4x+ Anime6B", "R-ESRGAN 4x+", "4x-Sharp (MrFlow)"], "4x-Sharp (MrFlow)", True),
        (["None", "Lanczos", "Nearest", "DAT x2", "SwinIR_4x", "LDSR", "4xNomosUniDAT (MrFlow)"], "Lanczos", True),
        (["None"], "None", True),
        ([], "None", True),
    ],
)
def test_automatic_prefers_x2_then_ours(names: list[str], chosen: str, hinted: bool) -> None:
    name, hint = pick_automatic(names)
    assert name == chosen
    assert (hint is not None) == hinted
    if hint is not None:
        assert "models/ESRGAN" in hint
        assert hint.count(".") == hint.count(".pth") + 1
        assert ("four times" in hint) == (chosen not in ("Lanczos", "None"))


# --------------------------------------------------------------------------------------------------------- registering


def test_each_model_of_the_folder_appears_once(folder: Path) -> None:
    entries = host_list(folder)
    before = list(entries)
    ours = scaler()
    names = add_fast_upscalers(entries, ours, UpscalerData)
    assert names == ["My tiny 2x (MrFlow)", "RealESRGAN_x4tiny (MrFlow)", "nameless (MrFlow)"]
    assert entries[: len(before)] == before
    assert [entry.scale for entry in entries[len(before) :]] == [2, 4, 2]
    assert all(entry.scaler is ours and Path(entry.data_path).is_file() for entry in entries[len(before) :])


def test_hosts_can_list_what_every_scaler_tells(folder: Path) -> None:
    """GET /sdapi/v1/upscalers reads these of each entry."""
    entries = host_list(folder)
    add_fast_upscalers(entries, scaler(), UpscalerData)
    ours = entries[-3]
    assert (ours.name, ours.scaler.model_name, ours.scale) == ("My tiny 2x (MrFlow)", None, 2)


def test_a_reload_replaces_instead_of_adding(folder: Path) -> None:
    entries = host_list(folder)
    add_fast_upscalers(entries, scaler(), UpscalerData)
    length, newer = len(entries), scaler()
    add_fast_upscalers(entries, newer, UpscalerData)
    assert len(entries) == length
    assert [entry.scaler for entry in entries if entry.name.endswith("(MrFlow)")] == [newer] * 3


def test_files_whose_names_tell_nothing_are_not_read_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line of the log for each file that is left out, and the start goes on whatever lies in the folder."""
    place = tmp_path / "ESRGAN"
    (place / "more").mkdir(parents=True)
    table = network(2).state_dict()
    save_file(table, place / "fine.pth")  # by another name than its kind
    torch.save(table, place / "more" / "also.pth")
    torch.save(table, place / "also.pth")
    save_file(network(8).state_dict(), place / "eightfold.safetensors")
    (place / "bomb.pth").write_bytes(b"BZh9" + bytes(100))
    (place / "\x1b[31mred.pth").write_bytes(b"<html>")
    (place / "lost.pth").symlink_to(place / "lost.pth")
    (place / "folder.pth").mkdir()
    monkeypatch.setattr(upscaler, "load_upscaler", None)
    with caplog.at_level("INFO", logger="mrflow"):
        names = add_fast_upscalers(host_list(place), scaler(), UpscalerData)
    assert names == ["also (MrFlow)", "fine (MrFlow)"]
    said = {record.getMessage() for record in caplog.records}
    assert len(said) == len(caplog.records) == 4
    assert all(line.isprintable() and line.startswith("No (MrFlow) upscaler for ") for line in said)
    for part in (
        "it is a bzip2 archive",
        "it is a web page",
        "it is x8, and x2 and x4 are listed",
        "its name is that of",
    ):
        assert sum(part in line for line in said) == 1


def test_without_esrgan_files_nothing_is_added(tmp_path: Path) -> None:
    entries = [host_entry("None", None, SimpleNamespace(name="None"))]
    assert add_fast_upscalers(entries, scaler(), UpscalerData) == []
    assert len(entries) == 1


def test_it_is_no_subclass_that_a_host_would_find() -> None:
    assert FastScaler.__mro__ == (FastScaler, object)


# ------------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize(("name", "scale"), [("2x-Tiny", 2), ("RealESRGAN_x4tiny", 4)])
def test_do_upscale_is_the_model_s_own_scale(folder: Path, name: str, scale: int) -> None:
    path = folder / f"{name}.safetensors"
    made = scaler().do_upscale(picture(), str(path))
    assert made.size == (24 * scale, 16 * scale)
    values = torch.frombuffer(bytearray(picture().tobytes()), dtype=torch.uint8).view(1, 16, 24, 3)
    expected = load_upscaler(path, device="cpu", dtype="float32")(values.permute(0, 3, 1, 2).float() / 255)
    got = torch.frombuffer(bytearray(made.tobytes()), dtype=torch.uint8).view(1, 16 * scale, 24 * scale, 3)
    assert torch.equal(got.permute(0, 3, 1, 2), expected.mul(255).round().to(torch.uint8))


@pytest.mark.parametrize(("scale", "size"), [(2.0, (48, 32)), (1.5, (36, 24)), (2.04, (49, 33)), (3.0, (72, 48))])
def test_upscale_gives_exactly_the_rounded_size(folder: Path, scale: float, size: tuple[int, int]) -> None:
    assert scaler().upscale(picture(), scale, str(folder / "2x-Tiny.safetensors")).size == size


def test_any_mode_of_picture_is_taken(folder: Path) -> None:
    made = scaler().do_upscale(picture().convert("RGBA"), str(folder / "2x-Tiny.safetensors"))
    assert (made.mode, made.size) == ("RGB", (48, 32))


def test_inside_and_outside_inference_mode_in_any_order(folder: Path) -> None:
    ours, path = scaler(), str(folder / "2x-Tiny.safetensors")
    with torch.inference_mode():
        first = ours.do_upscale(picture(), path)
    second = ours.do_upscale(picture(), path)
    with torch.inference_mode():
        third = ours.do_upscale(picture(), path)
    assert first.tobytes() == second.tobytes() == third.tobytes()
    assert ours.take_sentences() == []


def test_one_model_is_kept_and_its_weights_leave_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    original = upscaler.load_upscaler

    def count(path: Any, **options: Any) -> Any:
        loaded.append(Path(path).name)
        return original(path, **options)

    monkeypatch.setattr(upscaler, "load_upscaler", count)
    tidied: list[str] = []
    ours = scaler(tidy=lambda: tidied.append(str(ours.load_model(path).device)))
    path = str(folder / "2x-Tiny.safetensors")
    ours.do_upscale(picture(), path)
    ours.do_upscale(picture(), path)
    assert loaded == ["2x-Tiny.safetensors"]
    assert tidied == ["cpu", "cpu"]
    ours.do_upscale(picture(), str(folder / "nameless.safetensors"))
    ours.do_upscale(picture(), path)
    assert loaded == ["2x-Tiny.safetensors", "nameless.safetensors", "2x-Tiny.safetensors"]


def test_interrupt_gives_the_picture_back_as_it_was(folder: Path) -> None:
    tidied: list[int] = []
    ours = scaler(cancelled=lambda: True, tidy=lambda: tidied.append(1))
    small = picture()
    assert ours.upscale(small, 2.0, str(folder / "2x-Tiny.safetensors")) is small
    assert ours.take_sentences() == []
    assert tidied == [1]


def test_interrupt_is_heard_between_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter([False, False, False, False, True])  # before the call, the pass, the frame, tile 1, tile 2
    ours = scaler(cancelled=lambda: next(asked))
    limit_memory(monkeypatch, 64)
    small = picture(100, 80)
    assert ours.do_upscale(small, str(folder / "2x-Tiny.safetensors")) is small
    assert len(ours.take_sentences()) == 1


def limit_memory(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    """Frames larger than `side` run out of memory, as a full device would say it."""
    original: Callable[..., Any] = upscale.ModelUpscaler._piece  # pyright: ignore[reportPrivateUsage]

    def piece(self: Any, image: torch.Tensor) -> torch.Tensor:
        if max(image.shape[-2:]) > side:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return original(self, image)

    monkeypatch.setattr(upscale.ModelUpscaler, "_piece", piece)


def test_tiles_where_memory_runs_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, path = scaler(), str(folder / "2x-Tiny.safetensors")
    whole = ours.do_upscale(picture(100, 80), path)
    limit_memory(monkeypatch, 64)
    tiled = ours.do_upscale(picture(100, 80), path)
    [sentence] = ours.take_sentences()
    assert "tiles of 64 pixels" in sentence
    assert ours.take_sentences() == []
    assert tiled.size == whole.size
    difference = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).int()
    difference -= torch.frombuffer(bytearray(tiled.tobytes()), dtype=torch.uint8).int()
    assert difference.abs().max() <= 1


def test_half_precision_that_overflows_is_made_again_in_float32(folder: Path, tmp_path: Path) -> None:
    net = network(2)
    first: Any = next(module for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    torch.nn.init.constant_(first.weight, 3e4)
    path = tmp_path / "2x-Loud.safetensors"
    save_file(net.state_dict(), path)
    ours = scaler()
    loud = load_upscaler(path, device="cpu", dtype="float32")
    assert isinstance(loud, upscale.ModelUpscaler)
    loud.model.half()  # as the trial at loading leaves it where only larger images overflow
    ours._kept = ((str(path), path.stat().st_mtime_ns, "cpu", "auto"), loud)  # pyright: ignore[reportPrivateUsage]
    ours.half = True
    made = ours.upscale(picture(), 2.0, str(path))
    assert made.size == (48, 32)
    [sentence] = ours.take_sentences()
    assert "failed in float16" in sentence
    assert made.tobytes() == scaler().upscale(picture(), 2.0, str(path)).tobytes()
    ours.upscale(picture(), 2.0, str(path))
    assert ours.take_sentences() == []


@pytest.mark.parametrize("name", ["broken.pth", "gone_x4.safetensors"])
def test_a_file_that_cannot_be_used_costs_detail_and_says_so(folder: Path, name: str) -> None:
    ours = scaler()
    made = ours.upscale(picture(), 2.0, str(folder / name))
    assert made.size == (48, 32)
    assert made.tobytes() == picture().resize((48, 32), Image.Resampling.LANCZOS).tobytes()
    [sentence] = ours.take_sentences()
    assert name in sentence
    assert sentence.endswith("The image was upscaled with Lanczos instead.")


def test_a_fault_costs_detail_and_is_told_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("a tensor is damaged")  # a library's, and so no refusal

    monkeypatch.setattr(upscaler, "load_upscaler", fail)
    ours = scaler()
    assert ours.upscale(picture(), 2.0, str(folder / "gone_x4.safetensors")).size == (48, 32)
    assert ours.take_sentences() == [
        "The upscaler gone_x4 failed (ValueError: a tensor is damaged). The image was upscaled with Lanczos instead."
    ]


def test_a_broken_model_s_own_scale_is_its_name_s(folder: Path) -> None:
    assert scaler().do_upscale(picture(), str(folder / "gone_x4.safetensors")).size == (96, 64)
