"""Measures the parts outside the network: each as a staged run does it, and the alternatives.

All ways of a part run in turn, on the image and latents of a real run. The first way is the one in use.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.reference import Tiles
from bench.speed import networks
from bench.speed.clock import in_turn
from mrflow_sched import load_upscaler
from mrflow_sched._runtime.errors import first_line
from mrflow_sched._runtime.memory import free_memory, is_memory_error
from mrflow_sched.images.convert import to_pil
from mrflow_sched.images.files import save_png
from mrflow_sched.plan.stages import StagedPlan
from mrflow_sched.sampler import sample_staged
from mrflow_sched.sampling.handoff import stage_noise
from mrflow_sched.sampling.noise import add_noise

TOGETHER = 4
ROUNDS = 3
"""Rounds per repeat: parts are short."""

Ways = Mapping[str, Callable[[], object]]


def measure(bench: Any, plan: StagedPlan) -> list[dict[str, Any]]:
    """Seconds of every way of every part outside the network, for one image of `plan`, a plan of two stages.

    `bench` is a `Bench` of one image whose upscaler is a model. Each row: part, way, seconds, used (whether runs do it
    this way).
    """
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for part, ways in _parts(bench, plan, Path(folder)).items():
            found = in_turn(ways, bench.engine.device, ROUNDS * bench.repeats)
            rows += [
                {"part": part, "way": way, "seconds": seconds, "used": number == 0}
                for number, (way, seconds) in enumerate(found.items())
            ]
    return rows


def _parts(bench: Any, plan: StagedPlan, folder: Path) -> dict[str, Ways]:
    engine, upscaler, device = bench.engine, bench.upscaler, bench.engine.device
    done = sample_staged(engine, plan, bench.prompts, upscaler=upscaler, keep_stages=True)
    small, picture, latents = done.stages[0].image, done.images.nan_to_num(), done.latents
    assert latents is not None
    encoded, level = engine.encode(picture), plan.stages[1].start_sigma
    vae, network = getattr(engine, "_vae", None) or engine.pipe.vae, upscaler.model.model
    plain_vae, plain_network = _plain(vae), _plain(network)
    file = folder / "x2.safetensors"
    save_file(networks.make_upscaler().state_dict(), file)
    # In the default memory format, as images and latents are in a run; torch switches to the weights' format itself.
    ready = small.to(upscaler.device, upscaler.dtype).contiguous()
    pixels = (2 * picture - 1).to(vae.device, vae.dtype).contiguous()
    hidden = latents.to(vae.device, vae.dtype).contiguous()

    def decoded(model: Any, values: Tensor) -> Tensor:
        return model.decode(values, return_dict=False)[0]

    def noised() -> Tensor:
        noise = stage_noise(encoded.shape[1:], "mode", (1,), device=encoded.device)
        return add_noise(encoded, noise, level, engine.family.prediction)

    def several(values: Tensor) -> Tensor:
        return torch.cat([values] * TOGETHER)

    parts: dict[str, Ways] = {
        "text": {"once per run": lambda: engine.encode_text(bench.prompts)},
        "upscale": {
            "whole image, channels last": lambda: network(ready.contiguous(memory_format=torch.channels_last)),
            "whole image, default memory format": lambda: plain_network(ready),
            "tiles of 192, margin 24": lambda: Tiles(upscaler)(small.contiguous(memory_format=torch.channels_last)),
        },
        "encode": {
            "channels last": lambda: vae.encode(pixels),
            "default memory format": lambda: plain_vae.encode(pixels),
        },
        "noise": {"one CPU stream per image": noised},
        "decode": {
            "channels last": lambda: decoded(vae, hidden),
            "default memory format": lambda: decoded(plain_vae, hidden),
        },
        f"upscale {TOGETHER} images": {
            "one by one": lambda: upscaler.run(several(small)),
            "together": lambda: network(several(ready).contiguous(memory_format=torch.channels_last)),
        },
        f"encode {TOGETHER} images": {
            "one by one": lambda: engine.encode(several(picture)),
            "together": lambda: vae.encode(several(pixels)),
        },
        f"decode {TOGETHER} images": {
            "one by one": lambda: engine.decode(several(latents)),
            "together": lambda: decoded(vae, several(hidden)),
        },
        "save": {
            "PNG, compression 4": lambda: save_png(folder / "image.png", picture[0]),
            "PNG, compression 6, Pillow's default": lambda: to_pil(picture[0]).save(folder / "other.png"),
        },
        "load an upscaler": {"x2 of 23 blocks, 67 MB, once per session": lambda: load_upscaler(file, device=device)},
    }
    if vae.dtype == torch.float32:
        half_vae = copy.deepcopy(vae).bfloat16()
        parts["encode"] = {**parts["encode"], "bfloat16": lambda: half_vae.encode(pixels.bfloat16())}
        parts["decode"] = {**parts["decode"], "bfloat16": lambda: decoded(half_vae, hidden.bfloat16())}
    if device.type == "cuda":
        exact = copy.deepcopy(network).float()
        parts["upscale"] = {**parts["upscale"], "whole image, float32": lambda: exact(ready.float())}
    return parts


def encoders(name: str, device: torch.device, dtype: torch.dtype, rounds: int, *, small: bool) -> dict[str, float]:
    """Seconds of one prompt in each text encoder of family `name`, built one after the other. Encoders that do not fit
    into memory, or that the installed transformers does not know, are left out."""
    found: dict[str, float] = {}
    for encoder in networks.RECIPES[name].encoders if name in networks.RECIPES else ():
        try:
            model: Any = networks.make_encoder(encoder, device, dtype, small=small)
            ids = torch.arange(1, encoder.tokens + 1, device=device)[None]
            with torch.no_grad():
                found |= in_turn({encoder.title: lambda: model(input_ids=ids)}, device, rounds)  # noqa: B023
        except Exception as error:
            if not isinstance(error, AttributeError) and not is_memory_error(error):
                raise
            print(f"{encoder.title} was not timed: {first_line(error)}", file=sys.stderr)
        finally:
            model = None
            free_memory(device)
    return found


def _plain(module: Any) -> Any:
    return copy.deepcopy(module).to(memory_format=torch.contiguous_format)
