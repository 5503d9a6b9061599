"""Stage 1 from the noise that a job without MrFlow starts from, shrunk: on doubles of A1111, Forge and Neo."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import doubles
import pytest
import torch
from doubles import Flux, Flux2, LdmModel, QwenImage, Sd3Model, StableDiffusion, StableDiffusionXL, WebUI, attributes
from test_drafts import as_file, equal, run_of
from test_run import EVERY_HOOK, untouched, webui
from torch import Tensor

from mrflow_sched.apps.webui import axes, infotext
from mrflow_sched.sampling.shrink import shrink_noise

KEEP = {"preset": "12+1", "keep_composition": True}
HOSTS: dict[str, tuple[str, Any]] = {
    "a1111 sd3": ("a1111", Sd3Model),
    "a1111 sd15": ("a1111", LdmModel),
    "forge flux": ("forge", Flux),
    "forge sdxl": ("forge", StableDiffusionXL),
    "neo sd15": ("neo", lambda: StableDiffusion(neo=True)),
    "neo qwen, five dimensions": ("neo", lambda: QwenImage(neo=True)),
    "neo klein, 128 channels": ("neo", lambda: Flux2(name="flux-2-klein-base-4b", neo=True)),
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The noise that each first pass starts from, as its sampler gets it."""
    seen: list[Tensor] = []
    host = doubles.Sampler.sample

    def sample(self: Any, p: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(x.clone())
        return host(self, p, x, *args, **kwargs)

    monkeypatch.setattr(doubles.Sampler, "sample", sample)
    return seen


def flat(noise: Tensor) -> Tensor:
    """(B, C, h, w), also of latents with a place for frames."""
    return noise[:, :, 0] if noise.ndim == 5 else noise


@pytest.mark.parametrize("factor", [2.0, 1.5], ids=["whole ratio", "other ratio"])
@pytest.mark.parametrize("name", HOSTS)
def test_stage_1_starts_from_the_hosts_own_noise_shrunk(name: str, factor: float, started: list[Tensor]) -> None:
    kind, model = HOSTS[name]
    job: dict[str, Any] = {
        "width": 512,
        "height": 768,
        "seed": 70,
        "batch_size": 2,
        "n_iter": 2,
        "subseed": 7,
        "subseed_strength": 0.3,
    }
    plain, ui = WebUI(kind, model()), WebUI(kind, model())
    plain.generate(plain.job(**job), False)
    native = started[:]
    started.clear()
    ui.generate(ui.job(**job), {**KEEP, "factor": factor})
    assert len(native) == len(started) == 2
    for full, low in zip(native, started, strict=True):
        assert low.shape[-1] < full.shape[-1]
        assert torch.equal(flat(low), shrink_noise(flat(full), *low.shape[-2:]))
    assert not ui.errors


def test_without_it_stage_1_starts_as_ever(started: list[Tensor]) -> None:
    ui = webui("forge")
    ui.generate(ui.job(width=512, height=512, seed=41), {"preset": "12+1"})
    assert torch.equal(started[0][0], torch.randn((16, 32, 32), generator=torch.Generator().manual_seed(41)))


def test_what_comes_after_the_first_noise_is_drawn_as_ever() -> None:
    """The hook may come twice; the host's generator, torch's own and the refine noise stay as they are."""

    def draws(**choice: Any) -> list[Tensor]:
        ui, seen = webui("forge"), list[Tensor]()
        ui.twice = True

        def look(p: Any) -> None:
            if not p.is_hr_pass:
                seen.extend([p.rng.next(), torch.random.get_rng_state()])

        ui.at["process_before_every_sampling"] = look
        ui.generate(ui.job(width=512, height=512), {"preset": "12+1", **choice})
        return [*seen, ui.mixed[0][1]]

    ours, usual = draws(keep_composition=True), draws()
    assert len(ours) == 3
    assert all(torch.equal(one, other) for one, other in zip(ours, usual, strict=True))


@pytest.mark.parametrize("kind", ["a1111", "forge", "neo"])
@pytest.mark.parametrize("ends", ["done", "error", "interrupt"])
def test_nothing_is_left(kind: str, ends: str) -> None:
    ui = webui(kind)
    ui.fail_at = 3 if ends == "error" else -1
    ui.interrupt_at = 3 if ends == "interrupt" else -1
    p = ui.job(width=416, height=608)
    before = attributes(p)
    if ends == "error":
        with pytest.raises(RuntimeError, match="out of memory"):
            ui.generate(p, KEEP)
    else:
        ui.generate(p, KEEP)
    untouched(p, before)
    assert isinstance(p.rng, doubles.ImageRNG)
    assert not ui.errors


# ---------------------------------------------------------------------------------------------- metadata, drafts, plots


def test_the_metadata_say_it_and_paste_it() -> None:
    ui, _, made = run_of("forge", KEEP)
    assert ui.infotexts[0]["MrFlow noise"] == "nested"
    assert "MrFlow noise" not in run_of("forge", {"preset": "12+1"})[0].infotexts[0]
    text = made.pictures[0].info["parameters"]
    pasted = doubles.parse_generation_parameters(text)
    assert infotext.read(pasted).keep_composition is True


@pytest.mark.parametrize("kind", ["a1111", "forge", "neo"])
def test_a_finished_draft_is_the_whole_run_with_it_too(kind: str) -> None:
    whole = run_of(kind, KEEP)[2]
    draft = run_of(kind, {**KEEP, "draft": True})[2].pictures[0]
    assert not equal(draft, run_of(kind, {"preset": "12+1", "draft": True})[2].pictures[0])
    for source in (as_file(draft), draft.info["parameters"]):  # the text alone runs stage 1 again
        ui, p, finished = run_of(kind, {"finish": source}, seed=5, prompt="other")
        assert equal(finished.pictures[0], whole.pictures[0])
        assert finished.pictures[0].info["parameters"] == whole.pictures[0].info["parameters"]
        assert not ui.errors
        assert not hasattr(p, "_mrflow")


def test_it_is_an_axis_of_the_plot(started: list[Tensor]) -> None:
    option: Any = SimpleNamespace(label="")
    module = SimpleNamespace(
        axis_options=[], AxisOption=lambda label, kind, apply, **more: SimpleNamespace(label=label, apply=apply)
    )
    axes.add_axes([SimpleNamespace(path="/scripts/xyz_grid.py", module=module)], list)
    option = next(each for each in module.axis_options if each.label == "[MrFlow] Keep composition")
    ui = webui("forge")
    for value in ("True", "False"):
        p = ui.job(width=512, height=512, seed=41)
        option.apply(p, value, [])
        ui.generate(p, True)
    drawn = (torch.randn((16, side, side), generator=torch.Generator().manual_seed(41)) for side in (64, 32))
    full, own = (noise[None] for noise in drawn)
    assert torch.equal(started[0], shrink_noise(full, 32, 32))
    assert torch.equal(started[1], own)


# --------------------------------------------------------------------------------------------------- where it cannot be


def older_host() -> WebUI:
    """A1111 before 1.9, without the hook before sampling."""
    ui = webui("a1111")
    ui.script = SimpleNamespace(
        **{name: getattr(ui.script, name) for name in EVERY_HOOK if name != "process_before_every_sampling"}
    )
    return ui


def test_a_host_without_the_hook_says_so_and_goes_on() -> None:
    ui = older_host()
    p = ui.job(width=384, height=256)
    ui.generate(p, KEEP)
    assert "This WebUI has no hook before sampling, so the composition is not kept." in p.comments
    assert "MrFlow noise" not in ui.infotexts[0]
    assert len(ui.calls) == 13


def test_a_host_without_the_hook_still_finishes_a_draft_of_another_host() -> None:
    draft = run_of("a1111", {**KEEP, "draft": True})[2].pictures[0]
    ui = older_host()
    p = ui.job(width=64, height=64)
    ui.generate(p, {"finish": as_file(draft)})
    assert ui.infotexts[0]["MrFlow noise"] == "nested"
    assert not any("composition is not kept" in said for said in p.comments)


def test_noise_that_cannot_be_shrunk_is_told_and_stage_1_has_its_own(started: list[Tensor]) -> None:
    ui = webui("forge")
    # Another extension makes the first pass larger than the final image.
    larger = torch.randn((1, 16, 80, 80))
    ui.at["process_batch"] = lambda p: setattr(p, "rng", SimpleNamespace(next=lambda: larger.clone()))
    p = ui.job(width=512, height=512)
    ui.generate(p, KEEP)
    assert torch.equal(started[0], larger)
    assert any(
        "The composition is not kept, as the noise cannot be shrunk (height must be" in said for said in p.comments
    )
    assert "MrFlow noise" not in ui.infotexts[0]
    assert not ui.errors
