"""The `Engine` role: everything that sampling asks of a model; and `Capabilities`, what an engine can do besides.

The sampler knows no architecture, no packing, no latent scaling and no prediction type. An engine hides all of that
behind float32 tensors: latents are normalised (the scale at which noise has standard deviation 1), images are RGB in
[0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mrflow_sched.plan.families import Family
    from mrflow_sched.sampling.network import Around

__all__ = ["Capabilities", "Engine", "Guidance", "StageEngine", "TilingEngine", "capabilities_of"]

Guidance = Callable[[float], float]
"""The guidance scale in force at a flow sigma: 1 turns CFG off."""


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do beyond the `Engine` role. Everything is off unless the engine says otherwise.

    Attributes:
        whole_stages: It runs a whole stage itself (`StageEngine.sample_stage`), as a pipeline's own loop does.
        guidance_per_step: `sample_stage` takes a function of sigma in place of one guidance scale.
        network_seam: `sample_stage` takes `around`, a function between its loop and its network.
        token_subsets: Its network calls can be restricted to some of the image tokens (`NetworkCall.subset`).
        tiles: `TilingEngine.in_tiles` gives the same engine with a VAE that works in tiles.
        places: `denoise` takes `place`, the (row, column) that a tile's first token has in the whole image.
        gradients: `denoise` keeps a graph where gradients are recorded.
        precisions: `in_precision` gives the same engine with its network in another precision.
        few_step: `in_few_steps` gives the same engine with its model's few-step LoRA on.
        lora_scale: `encode_text` takes `lora_scale`, which holds wherever the text it returns is used.
        text_size: `encode_text` takes `size`, (width, height) of the final image, for which it rewrites prompts.
        alpha: Images have a fourth channel: (B, 4, H, W) wherever an engine without it has (B, 3, H, W).
        counts_on: `sample_stage` takes `first`, from which it counts the steps of a stage that is walked in parts.
    """

    whole_stages: bool = False
    guidance_per_step: bool = False
    network_seam: bool = False
    token_subsets: bool = False
    tiles: bool = False
    places: bool = False
    gradients: bool = False
    precisions: bool = False
    few_step: bool = False
    lora_scale: bool = False
    text_size: bool = False
    alpha: bool = False
    counts_on: bool = False


def capabilities_of(engine: Any) -> Capabilities:
    """What an engine says it can do.

    Only the engine's own class and attributes count. A wrapper that forwards unknown attributes to the engine inside
    has not said that its `denoise` may be skipped, so it is called at every step.

    Args:
        engine: An `Engine`; its attribute `capabilities` is read.

    Returns:
        Its capabilities; all off where it declares none.
    """
    said = any("capabilities" in vars(base) for base in type(engine).__mro__) or "capabilities" in _own_attributes(
        engine
    )
    return engine.capabilities if said else Capabilities()


def _own_attributes(thing: Any) -> dict[str, Any]:
    """The attributes of an object itself; empty where it has no dictionary."""
    return getattr(thing, "__dict__", {})


@runtime_checkable
class Engine(Protocol):
    """One model in one library, as the sampler sees it.

    An engine must treat every sample of a batch independently: image i of a batch of N is what a batch of 1 would give.
    What it can do beyond these methods it declares by an attribute `capabilities` (`Capabilities`); an engine without
    one is called step by step.
    """

    @property
    def family(self) -> Family:
        """What is known of this kind of model: prediction type, grid, shift rule, presets."""
        ...

    @property
    def device(self) -> torch.device:
        """Where latents and images live, from the first noise to the final image."""
        ...

    def encode_text(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> Any:
        """Conditioning for a batch of images, opaque to the sampler; called once per run and set of texts.

        Args:
            prompts: One text per image.
            negative_prompts: As many as `prompts`, or None; engines without CFG ignore them.

        Returns:
            Whatever the engine's own `denoise` takes as `text`. Where it has an attribute `notes`, sentences for the
            user, the run's warnings begin with them.
        """
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Shape of one sample's latents.

        Args:
            width: Of the image in pixels, a multiple of `family.grid`.
            height: Likewise.

        Returns:
            The shape without the batch dimension, usually (C, h, w).
        """
        ...

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        """Clean estimate of noisy latents.

        Args:
            x: Noisy latents (B, *latent_shape), float32.
            sigma: Of each sample, (B,): the flow sigma in (0, 1] where `family.prediction` is "flow", sigma_ve
                otherwise.
            text: What `encode_text` returned.
            guidance: The scale in force (CFG scale or embedded guidance, as the family defines).

        Returns:
            Clean latents, float32, in the shape of `x`; the network inside may run in its own dtype.
        """
        ...

    def encode(self, images: Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None) -> Tensor:
        """Normalised latents of images.

        Args:
            images: (B, 3, H, W), float32 in [0, 1].
            posterior: "mode" (deterministic) or "sample" (drawn from the encoder's distribution).
            seeds: One per image; needed for "sample", which draws with one generator per image.

        Returns:
            Latents (B, *latent_shape), float32.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images of normalised latents.

        Args:
            latents: (B, *latent_shape), float32.

        Returns:
            (B, 3, H, W), float32 in [0, 1], on `device`.
        """
        ...


class StageEngine(Engine, Protocol):
    """An engine that runs a whole stage itself: `Capabilities.whole_stages`."""

    def sample_stage(
        self,
        solver: str,
        latents: Tensor,
        sigmas: Sequence[float],
        text: Any,
        *,
        guidance: float | Guidance,
        progress: Sequence[float] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        around: Around | None = None,
        first: int = 0,
    ) -> Tensor:
        """Run one stage: the state at the end of its schedule.

        Args:
            solver: A name in `mrflow_sched.sampling.solvers.SOLVERS`.
            latents: (B, *latent_shape), float32, at `sigmas[0]`.
            sigmas: Walked exactly, in the units of `Engine.denoise`; falls to 0, or is a part of such a schedule.
            text: What `encode_text` returned.
            guidance: One scale, or a scale for each flow sigma (`Capabilities.guidance_per_step`).
            progress: For each of `sigmas`, the fraction of the whole run done when it is reached, from 0 to 1; what is
                switched on and off within a run (a ControlNet) follows it. If None, the stage is the whole run.
            callback: Called after every evaluation of the network with a dict: `i` (the step), `sigma`, `x` and
                `denoised` as latents, `images` (how many images of the batch were evaluated). It may raise `Cancelled`.
            around: Called in place of every call of the network (`Capabilities.network_seam`).
            first: Evaluations of the stage that came before, where its sigmas are walked in several calls: what is told
                of steps counts on from there (`Capabilities.counts_on`).

        Returns:
            Latents in the shape of `latents`, float32.

        Raises:
            MemoryError: Even one image at a time does not fit.
        """
        ...


class TilingEngine(Engine, Protocol):
    """An engine that can encode and decode in tiles where a whole image does not fit: `Capabilities.tiles`."""

    def in_tiles(self) -> Engine | None:
        """The same engine with a VAE that works in tiles.

        Returns:
            The tiling engine; None where it cannot tile, or already does.
        """
        ...
