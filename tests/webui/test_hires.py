"""Hires. fix and MrFlow together: the target of Hires. fix is the final size, on each host as that host computes it."""

from __future__ import annotations

from typing import Any

import pytest
from doubles import Flux, Sd3Model, WebUI, attributes, create_infotext, pasted
from test_run import hires_fields, untouched

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.webui.controls import FIELDS, Controls
from mrflow_sched.apps.webui.hires import hires_target
from mrflow_sched.apps.webui.infotext import field_value


def webui(kind: str) -> WebUI:
    return WebUI(kind, Sd3Model() if kind == "a1111" else Flux(neo=kind == "neo"))


@pytest.mark.parametrize("kind", ["a1111", "forge", "neo"])
@pytest.mark.parametrize(
    ("fields", "final"),
    [
        ({}, (512, 384)),
        ({"hr_scale": 1.5}, (384, 288)),
        ({"hr_resize_x": 384}, (384, 288)),
        ({"hr_resize_y": 384}, (512, 384)),
        ({"hr_resize_x": 512, "hr_resize_y": 512}, (512, 512)),
    ],
)
def test_one_size_everywhere(kind: str, fields: dict[str, Any], final: tuple[int, int]) -> None:
    ui = webui(kind)
    # Forge Neo rounds what it enlarges to 64 pixels.
    width, height = (int(side / 64 + 0.5) * 64 for side in final) if kind == "neo" else final
    p = ui.job(width=256, height=192, **hires_fields(kind), **fields)
    before = attributes(p)
    result = ui.generate(p, True)
    assert not ui.errors
    assert tuple(result.images[0].shape) == (3, height, width)
    assert ui.infotexts[0]["Size"] == f"{width}x{height}"
    assert f"MrFlow replaces Hires. fix; its target {width}x{height} is the final size." in p.comments
    assert any(f"-> {width}x{height} x1 at sigma" in said for said in p.comments)
    first = next(shape for which, _, shape in ui.calls if which == "first")
    assert (first[-1] * 8, first[-2] * 8) == (width // 2, height // 2)
    untouched(p, {**before, "hr_prompt": p.hr_prompt})


@pytest.mark.parametrize("kind", ["a1111", "forge", "neo"])
def test_its_metadata_pastes_to_the_same_image_with_hires_fix_off(kind: str) -> None:
    ui = webui(kind)
    p = ui.job(width=256, height=192, cfg_scale=1.0, **hires_fields(kind))
    first = ui.generate(p, True)
    keys = pasted(create_infotext(p, 0))
    assert not any(key.startswith("Hires") or key == "Denoising strength" for key in keys)
    again = webui(kind)
    size = {"width": int(keys["Size-1"]), "height": int(keys["Size-2"])}
    controls = Controls.from_args([field_value(name)(keys) for name in FIELDS])
    second = again.generate(again.job(cfg_scale=1.0, **size), controls.to_dict())
    assert bool((first.images[0] == second.images[0]).all())


def test_the_old_option_keeps_the_typed_size() -> None:
    class Old:
        """A1111 with "For hires fix, use width/height sliders to set final resolution"."""

        def calculate_target_resolution(self: Any) -> None:
            self.hr_upscale_to_x, self.hr_upscale_to_y = self.width, self.height
            self.hr_resize_x, self.hr_resize_y = self.width, self.height
            self.width, self.height = 512, 512

    job = {"width": 1024, "height": 768, "hr_scale": 2.0, "hr_resize_x": 0, "hr_resize_y": 0}
    assert hires_target(job, Old) == (1024, 768)
    assert job["width"] == 1024


def test_a_host_that_covers_the_size_and_crops_gives_that_size() -> None:
    class Cropping:
        def calculate_target_resolution(self: Any) -> None:
            self.hr_upscale_to_x, self.hr_upscale_to_y = 1365, 1024
            self.truncate_x, self.truncate_y = (1365 - 1024) // 8, 0

    job = {"width": 512, "height": 384, "hr_scale": 2.0, "hr_resize_x": 1024, "hr_resize_y": 1024}
    assert hires_target(job, Cropping) == (1024, 1024)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0, -1, "2", True, 1e6])
def test_a_scale_that_is_none_is_a_refusal_and_the_host_goes_on(scale: Any) -> None:
    with pytest.raises(MrFlowError, match="hr_scale must be a number above 0 to 100"):
        hires_target({"width": 512, "height": 512, "hr_scale": scale})
    ui = webui("forge")
    p = ui.job(width=256, height=256, **{**hires_fields("forge"), "hr_scale": 1e6, "hr_resize_x": 0})
    p.hr_scale = float("nan")
    ui.at["process"] = lambda p: setattr(p, "hr_scale", 1.5)
    ui.generate(p, True)
    assert any("hr_scale must be a number" in said for said in p.comments)
