"""What several files of this folder share: sources, presets and the arithmetic of costs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mrflow_sched.plan.families.base import Preset

ASSUMED = "not measured; the values of FLUX.1-dev"
OFFICIAL = "official MrFlow scripts (docs/method.md, section 1.5)"
COMFY = "official ComfyUI preset (docs/method.md, section 1.5); the official scripts went from 0.15 to 0.12 here"
FEWER = (
    "not measured on this family; on a small FLUX-layout network 6 steps of multistep are as accurate as 10 of Euler"
)
FEWER_CFG = (
    "not measured on this family; on Gaussian mixtures with CFG 8 steps of careful are more accurate than 20 of Euler"
)
DIFFUSERS = "default of the diffusers 0.42 pipeline"
CARD = "example on the model card; recalled, not read again"
SCHEDULER = "scheduler_config.json of the released model"

# What `encode_prompt` returns where both branches of CFG have an attention mask (`PipelineInfo.text_outputs`).
MASKED_CFG_TEXT = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)

# Likewise where both have a pooled embedding.
POOLED_CFG_TEXT = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)

OFFICIAL_PRESETS = (
    Preset("12+1", 12, 1, 0.12, OFFICIAL),
    Preset("20+1", 20, 1, 0.15, COMFY),
)
FEWER_PRESETS = (Preset("8+1", 8, 1, 0.12, FEWER), Preset("6+1", 6, 1, 0.12, FEWER))
FEWER_CFG_PRESETS = (Preset("8+1", 8, 1, 0.12, FEWER_CFG),)
ASSUMED_PRESETS = (Preset("12+1", 12, 1, 0.12, ASSUMED), Preset("20+1", 20, 1, 0.15, ASSUMED))

SHARED_SOURCES = {
    "prediction": "the family's paper or card",
    "rescaled_flow": "the family's pipeline",
    "renoise": "0, unless the pipeline's scheduler says otherwise",
    "grid": "vae_factor x patch",
    "vae_factor": "diffusers VAE configuration",
    "patch": "diffusers pipeline (2x2 packing)",
    "latent_channels": "diffusers VAE configuration",
    "native_size": "diffusers pipeline default",
    "default_size": "native_size",
    "factor": "paper: 512 to 1024 (docs/method.md, section 1.1)",
    "min_low_side": "docs/method.md, section 5.1: about 512 px for models of one megapixel; not measured",
    "presets": "each preset carries its own source",
    "linear_cost": "matrix sizes in the diffusers configuration",
    "attention_cost": "matrix sizes in the diffusers configuration",
    "network_cost": "bench/speed/count.py on the class in its real size; None: not counted",
    "vae_cost": "bench/speed/count.py on the class in its real size; None: not counted",
    "usual_upscaler": "RealESRGAN x2plus, the advice of the documentation",
}
COUNTED = "matrix sizes in the diffusers configuration; agrees with a FLOP count of the class at 1024 and 4096 tokens"
SOLVER_SOURCES = {
    "multistep": "second order at no extra forward; 10 steps beat 20 of Euler on a small FLUX-layout network",
    "careful": "multistep guarded by its own error estimate: with CFG the first steps are too curved to extrapolate",
    "euler": "distilled for steps of Euler; higher order not measured",
}


def sources(solver: str, /, **own: str) -> Mapping[str, str]:
    """The sources of one family: its own on top of the shared ones.

    Args:
        solver: Its solver, a key of `SOLVER_SOURCES`.
        **own: Field of `Family` -> source.

    Returns:
        Field -> source, read-only.
    """
    return MappingProxyType({**SHARED_SOURCES, "solver": SOLVER_SOURCES[solver], **own})


def transformer_flop(width: int, layers: int, matrices: float = 12.0) -> tuple[float, float]:
    """The cost of a stack of transformer blocks.

    Each token meets matrices * width^2 weights per block (12 in a plain block: 4 of attention, 8 of a 4x MLP), two FLOP
    per weight; each pair of tokens costs 4 * width FLOP per block (scores and weighted sum).

    Args:
        width: Channels of a token.
        layers: Number of blocks.
        matrices: Weights of a block in units of width^2.

    Returns:
        (linear_cost, attention_cost) of a `Family`.
    """
    return 2.0 * matrices * layers * width**2, 4.0 * layers * width
