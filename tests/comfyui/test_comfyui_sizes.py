"""Pictures have the size that was asked for, and are never stretched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from .client import Client
from .graphs import Graph, demo, doubled, plan_in, staged
from .process import INSTALLATION, REASON

if INSTALLATION is None:
    pytest.skip(REASON, allow_module_level=True)


def slopes(picture: Any) -> tuple[float, float]:
    """How much red rises to the right and green downwards, a pixel, by least squares."""
    height, width = picture.shape[:2]
    across, down = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    red = float((picture[..., 0].mean(0) * across).sum() / (across**2).sum())
    return red, float((picture[..., 1].mean(1) * down).sum() / (down**2).sum())


@pytest.mark.parametrize("scale", [0, 1, 2, 4], ids=["Lanczos", "x1", "x2", "x4"])
@pytest.mark.parametrize(
    ("size", "factor"),
    [
        ((250, 170), 2.0),
        ((1000, 616), 2.0),
        ((64, 64), 2.0),
        ((256, 256), 2.0),
        ((616, 1000), 2.0),
        ((400, 264), 1.5),
        ((520, 344), 2.5),
        ((1024, 256), 4.0),
    ],
    ids=str,
)
def test_a_handoff_never_stretches(
    client: Client, graph: Callable[[], Graph], size: tuple[int, int], factor: float, scale: int
) -> None:
    """A ramp of 1 / 2048 a pixel, enlarged by one number in both directions and cut evenly at the edges."""
    made, (low, large) = graph(), (client.name(), client.name())
    parts = doubled(made)
    plan = made.add("MrFlowPlan", model=parts.model, width=size[0], height=size[1], factor=factor, cfg=1.0)
    picture = made.add("RecorderPicture", width=plan[1], height=plan[2], slope=1 / 2048)
    upscaler = made.add("RecorderUpscaler", scale=scale)[0] if scale else None
    given = {"image": picture[0], "vae": parts.vae, "upscale_model": upscaler}
    handed = made.add("MrFlowHandoff", plan=plan[0], **given, stage=2)
    saved = {low: picture[0], large: handed[1], f"{large}-latent": handed[0], f"{large}-said": handed[2]}
    saved |= {f"{large}-width": plan[3], f"{large}-height": plan[4]}
    for name, link in saved.items():
        made.save(link, name)
    run = client.run(made.api).succeeded()
    before, after = run.array(low)[0], run.array(large)[0]
    assert after.shape[:2] == (int(run.text(f"{large}-height")), int(run.text(f"{large}-width")))
    assert run.array(f"{large}-latent").shape[-2:] == (after.shape[0] // 8, after.shape[1] // 8)
    grown = max(after.shape[0] / before.shape[0], after.shape[1] / before.shape[1])
    edge = max(after.shape[0] // 8, 8)  # resampling bends a ramp where it ends
    red, green = slopes(after[edge:-edge, edge:-edge])
    tolerance = 0.5 / min(after.shape[:2]) + 0.001  # sides are whole numbers
    assert abs(red * 2048 * grown - 1) < tolerance
    assert abs(green * 2048 * grown - 1) < tolerance
    rows, columns = after.shape[0] // 2, after.shape[1] // 2
    centre = after[rows - 4 : rows + 4, columns - 4 : columns + 4]
    assert abs(float(centre[..., :2].mean()) - 0.5) < 1 / 2048
    assert ("Lanczos" in run.text(f"{large}-said")) == (scale == 0)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ((250, 170), "demo"),
        ((64, 64), "demo"),
        ((250, 170), "Flux"),
        ((1000, 616), "Flux"),
        ((1000, 616), "QwenImage"),
        ((1000, 616), "HunyuanImage21"),
        ((328, 184), "Flux2"),
        ((64, 64), "Flux"),
        ((72, 1024), "ZImage"),
    ],
    ids=str,
)
def test_the_picture_has_the_size_that_was_asked_for_and_the_text_tells_what_was_rounded(
    client: Client, graph: Callable[[], Graph], seed: int, size: tuple[int, int], kind: str
) -> None:
    made, name = graph(), client.name()
    parts = demo(made) if kind == "demo" else doubled(made, kind)
    staged(made, parts, name, width=size[0], height=size[1], seed=seed, low_steps=2)
    run = client.run(made.api)
    if size[0] % 8 or size[1] % 8:
        # The page's widgets go by 8; ComfyUI itself does not check that.
        assert run.status == "success", run.error
    run.succeeded()
    text = run.text(f"{name}-plan")
    plan = plan_in(text)
    assert run.array(name).shape == (1, size[1], size[0], 3)
    assert run.array(f"{name}-draft").shape == (1, plan.stages[0].height, plan.stages[0].width, 3)
    assert (plan.requested_width, plan.requested_height) == size
    made_size = f"{plan.width}x{plan.height}"
    assert made_size in text
    if made_size != f"{size[0]}x{size[1]}":
        assert f"{size[0]}x{size[1]} is made at {made_size}" in text
    low = plan.stages[0]
    if abs(low.width * plan.height - low.height * plan.width) > 0:
        assert "cropped" in text


@pytest.mark.parametrize(
    ("picture", "asked", "wanted"),
    [
        ((200, 120), {}, (400, 240)),
        ((200, 120), {"factor": 1.5}, (300, 180)),
        ((200, 120), {"width": 512}, (512, 307)),
        ((200, 120), {"height": 320}, (533, 320)),
        ((200, 120), {"width": 256, "height": 256}, (256, 256)),
        ((131, 97), {}, (262, 194)),
    ],
    ids=str,
)
def test_a_refined_picture_is_enlarged_and_not_stretched(
    client: Client,
    graph: Callable[[], Graph],
    seed: int,
    picture: tuple[int, int],
    asked: dict[str, Any],
    wanted: tuple[int, int],
) -> None:
    made, name = graph(), client.name()
    parts = doubled(made, "ChromaRadiance", answer="still")
    ramp = made.add("RecorderPicture", width=picture[0], height=picture[1], slope=1 / 512)
    sockets = replace(parts, upscale_model=None).sockets
    refined = made.add("MrFlowRefine", **sockets, image=ramp[0], sigma=0.01, cfg=1.0, seed=seed, **asked)
    made.save(refined[0], name)
    made.save(refined[1], f"{name}-plan")
    run = client.run(made.api).succeeded()
    after = run.array(name)[0]
    assert after.shape[:2] == (wanted[1], wanted[0])
    assert len(run.times) == 1
    scale = max(wanted[0] / picture[0], wanted[1] / picture[1])
    red, green = slopes(after[8:-8, 8:-8])
    # 0.99 of the picture is kept; the rest is noise, which a still network leaves in.
    assert abs(red * 512 * scale / 0.99 - 1) < 0.03
    assert abs(green * 512 * scale / 0.99 - 1) < 0.03


def test_an_alpha_channel_is_no_obstacle(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    """Some loaders give RGBA; the VAE of most models takes RGB."""
    made, name = graph(), client.name()
    parts = doubled(made, "ZImage")
    ramp = made.add("RecorderPicture", width=128, height=96)
    whole = made.add("SolidMask", value=1.0, width=128, height=96)
    joined = made.add("JoinImageWithAlpha", image=ramp[0], alpha=whole[0])
    refined = made.add("MrFlowRefine", **parts.sockets, image=joined[0], cfg=1.0, seed=seed)
    made.save(refined[0], name)
    assert client.run(made.api).succeeded().array(name).shape == (1, 192, 256, 3)


def test_pictures_are_floats_in_range(client: Client, graph: Callable[[], Graph], seed: int) -> None:
    made, name = graph(), client.name()
    staged(made, doubled(made), name, seed=seed)
    picture = torch.from_numpy(client.run(made.api).succeeded().array(name))
    assert picture.dtype == torch.float32
    assert torch.isfinite(picture).all()
    assert 0.0 <= float(picture.min()) <= float(picture.max()) <= 1.0
