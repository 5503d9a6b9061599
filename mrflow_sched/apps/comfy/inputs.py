"""Every input of the nodes, defined once: its kind, its range, its words. Importing this module needs ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mrflow_sched.apps.comfy.family import AUTO, UNKNOWN
from mrflow_sched.apps.comfy.host import module
from mrflow_sched.plan.checks import MAX_GUIDANCE, MAX_SEED
from mrflow_sched.plan.families import FAMILIES
from mrflow_sched.plan.solver_table import SOLVER_NAMES

__all__ = ["PLAN", "inputs"]

io: Any = module("comfy_api.latest").io

PLAN: Any = io.Custom("MRFLOW_PLAN")
PRESETS = ("balanced", "fast", "best", "text", "detail", "12+1", "20+1", "8+1", "6+1")
_OWN = "0: the preset's"

_SCALE = {"default": 0.0, "min": 0.0, "max": float(MAX_GUIDANCE), "step": 0.1}
_SIDE = {"default": 1024, "min": 64, "max": 16384, "step": 1}
_STEPS = {"default": 0, "min": 0, "max": 100}

# What ComfyUI folds away until the user asks for it.
_ADVANCED = frozenset(
    (
        "family",
        "factor",
        "stages",
        "low_steps",
        "refine_steps",
        "refine_cfg",
        "solver",
        "shift",
        "noise",
        "upscaler_kind",
    )
)

# Passed on to later stages as they come, a link too: a slider in front of sigma is to run no more than sigma itself.
_LATER = frozenset(("sigma", "refine_steps"))

_INPUTS: Mapping[str, tuple[Any, Mapping[str, Any]]] = MappingProxyType(
    {
        "model": (io.Model, {"tooltip": "The model as your workflow has it: with LoRAs, quantised, patched."}),
        "positive": (io.Conditioning, {"tooltip": "What the image shows, with Flux guidance if the model takes it."}),
        "negative": (
            io.Conditioning,
            {"tooltip": "What it should not show. Not needed where cfg is 1: distilled, Turbo and Flux models."},
        ),
        "vae": (io.Vae, {"tooltip": "The VAE of the model: decodes every stage and encodes the enlarged image."}),
        "upscale_model": (
            io.UpscaleModel,
            {
                "tooltip": "Super-resolution between stages. A x2 model fits best; without one, "
                "Lanczos enlarges and fine detail stays soft."
            },
        ),
        "image": (io.Image, {"tooltip": "A finished image, which takes the place of stage 1."}),
        "drafts": (io.Image, {"tooltip": "The images of MrFlow Draft, all of them."}),
        "samples": (io.Latent, {"tooltip": "What the stage's sampler made."}),
        "plan": (PLAN, {"tooltip": "All numbers of the run, from MrFlow Plan or MrFlow Draft."}),
        "low_sigmas": (
            io.Sigmas,
            {"tooltip": "Stage 1's own list of sigmas, such as a Turbo model's, from pure noise to 0."},
        ),
        "said": (
            io.String,
            {"tooltip": "What a handoff said; it is put under the plan's notes.", "force_input": True},
        ),
        "text": (io.String, {"tooltip": "Texts, from a list or not.", "force_input": True}),
        "width": (
            io.Int,
            {**_SIDE, "tooltip": "Width of the finished image; stage 1 runs smaller, mostly at half."},
        ),
        "height": (
            io.Int,
            {**_SIDE, "tooltip": "Height of the finished image; stage 1 runs smaller, mostly at half."},
        ),
        "batch_size": (
            io.Int,
            {"default": 1, "min": 1, "max": 64, "tooltip": "Images; each is what its seed makes alone."},
        ),
        "seed": (
            io.Int,
            {
                "default": 0,
                "min": 0,
                "max": MAX_SEED,
                "control_after_generate": True,
                "tooltip": "Of the first image; image k has seed + k, and every later stage the seed after it.",
            },
        ),
        "preset": (
            io.Combo,
            {
                "options": list(PRESETS),
                "default": PRESETS[0],
                "tooltip": "12+1: twelve steps at low resolution, one at full size. balanced, fast and best are the "
                "model family's own, and text, for lettering, where it has one; the text says what they became.",
            },
        ),
        "sigma": (
            io.Float,
            {
                "default": 0.0,
                "min": 0.0,
                "max": 0.9,
                "step": 0.01,
                "round": 0.001,
                "tooltip": "Share of noise at which the full-size step starts: .12 keeps the image, .16 to .2 redraws "
                f"lettering. {_OWN}. This is no denoise: nothing shifts it.",
            },
        ),
        "cfg": (io.Float, {**_SCALE, "tooltip": "Scale of CFG; 1 turns it off. 0: the model family's."}),
        "family": (
            io.Combo,
            {
                "options": [AUTO, UNKNOWN, *FAMILIES],
                "default": AUTO,
                "tooltip": "Kind of model. Choose it where nothing in the model tells: FLUX.1 Krea, base or Turbo. "
                "flow: any flow model.",
            },
        ),
        "factor": (
            io.Float,
            {
                "default": 0.0,
                "min": 0.0,
                "max": 4.0,
                "step": 0.25,
                "tooltip": "Size step between two stages, 1.25 to 4. 0: the family's, mostly 2.",
            },
        ),
        "stages": (
            io.Int,
            {"default": 2, "min": 2, "max": 4, "tooltip": "3 makes 2048 from 512 in two hops, by way of 1024."},
        ),
        "low_steps": (io.Int, {**_STEPS, "tooltip": f"Steps of stage 1. {_OWN}."}),
        "refine_steps": (io.Int, {**_STEPS, "tooltip": f"Steps of every later stage. {_OWN}."}),
        "refine_cfg": (io.Float, {**_SCALE, "tooltip": "CFG of the later stages; 1 turns it off. 0: the same as cfg."}),
        "solver": (
            io.Combo,
            {
                "options": ["family", *SOLVER_NAMES],
                "default": "family",
                "tooltip": "How steps are taken; family: as the plan has it.",
            },
        ),
        "shift": (
            io.Combo,
            {
                "options": ["low", "final", "model"],
                "default": "low",
                "tooltip": "Which size shifts stage 1's sigmas: its own (low), the finished image's (final), or as the "
                "MODEL has it, with your ModelSampling nodes (model).",
            },
        ),
        "noise": (
            io.Combo,
            {
                "options": ["own", "nested"],
                "default": "own",
                "tooltip": "nested starts stage 1 from the finished size's noise, shrunk: the layout of a plain run of "
                "that seed.",
            },
        ),
        "upscaler_kind": (
            io.Combo,
            {
                "options": ["network", "interpolation"],
                "default": "network",
                "tooltip": "What enlarges the image. Choose interpolation where MrFlow Handoff has no upscale model: "
                "the presets then refine more, in 2 steps from sigma .45.",
            },
        ),
        "stage": (io.Int, {"default": 1, "min": 1, "max": 8, "tooltip": "1: low resolution; 2 and on: refining."}),
        "steps": (io.Int, {**_STEPS, "tooltip": f"Steps of this stage. {_OWN}."}),
        "curve": (
            io.Combo,
            {
                "options": ["linear", "shifted"],
                "default": "linear",
                "tooltip": "Spacing of a later stage's sigmas; matters from two steps on.",
            },
        ),
        "index": (io.Int, {"default": 0, "min": 0, "max": 4095, "tooltip": "Which image of the batch, from 0."}),
        "count": (io.Int, {"default": 0, "min": 0, "max": 4096, "tooltip": "How many from there; 0: all."}),
    }
)


def inputs(*names: str, raw: bool = False, **changes: Mapping[str, Any]) -> list[Any]:
    """Inputs for a node's schema.

    Args:
        *names: Of the inputs; "negative?" is an input that may be left out.
        raw: Sockets give links instead of objects, for nodes that expand into others.
        **changes: Other words or ranges of an input, by its name; `raw_link` and `advanced` are flags.

    Returns:
        As many inputs of ComfyUI's.
    """
    made: list[Any] = []
    for each in names:
        name = each.rstrip("?")
        kind, words = _INPUTS[name]
        words = {**words, **changes.get(name, {})}
        raw_link = raw and ("default" not in words or name in _LATER) and words.pop("raw_link", True)
        marks = {"advanced": words.pop("advanced", name in _ADVANCED), "rawLink": raw_link}
        more: dict[str, Any] = {"optional": True} if each.endswith("?") else {}
        if raw_link:
            # Lazy, so that the node expands before its inputs run: ComfyUI's cache drops outputs that the prompt has
            # not asked for yet, and would drop the last expansion.
            more["lazy"] = True
        made.append(kind.Input(name, **words, **more))
        # Set here, as older releases have no arguments for them.
        made[-1].extra_dict.update({mark: True for mark, on in marks.items() if on})
    return made
