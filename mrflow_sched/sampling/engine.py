"""The `Engine` role: everything the sampler asks of a model, in five questions; two further roles an engine may have.

The sampler knows no architecture, no packing, no latent scaling and no prediction type. An engine hides all of that
behind float32 tensors: latents are normalised (the scale at which noise has standard deviation 1), images are RGB in
[0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mrflow_sched.plan.families import Family


@runtime_checkable
class Engine(Protocol):
    """One model in one library, as the sampler sees it.

    An engine must treat every sample of a batch by itself: image i of a batch of N is what a batch of 1 would give.
    """

    @property
    def family(self) -> Family:
        """What is known of this kind of model: prediction type, grid, shift rule, presets."""
        ...

    @property
    def device(self) -> torch.device:
        """Where latents and images live from first noise to final save."""
        ...

    def encode_text(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> Any:
        """Conditioning for a batch of `len(prompts)` images, opaque to the sampler; called once per run.

        `negative_prompts`, where given, is as long as `prompts`; engines without external guidance ignore it.
        """
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Shape of one sample's latents, without the batch dimension, for an image of `width` x `height` pixels."""
        ...

    def denoise(self, x: Tensor, sigma: Tensor, text: Any, *, guidance: float) -> Tensor:
        """Clean estimate of the noisy latents `x` (B, *latent_shape, float32) at noise level `sigma` (B,).

        `sigma` is the flow sigma in (0, 1] where `family.prediction` is "flow", sigma_ve otherwise. `guidance` is the
        scale in force (CFG scale or embedded guidance, as the family defines). Returns float32 in the shape of `x`;
        the network inside may run in its own dtype.
        """
        ...

    def encode(self, images: Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None) -> Tensor:
        """Normalised latents (B, *latent_shape, float32) of `images` (B, 3, H, W, float32 in [0, 1]).

        `posterior` is "mode" (deterministic) or "sample"; "sample" draws with one generator per image from `seeds`.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W, float32 in [0, 1], on the device) of normalised `latents` (B, *latent_shape)."""
        ...


@runtime_checkable
class StageEngine(Protocol):
    """An engine that runs a whole stage itself, as a pipeline's own loop does; the sampler then leaves it to it."""

    def sample_stage(
        self,
        solver: str,
        latents: Tensor,
        sigmas: Sequence[float],
        text: Any,
        *,
        guidance: float,
        callback: Callable[[dict[str, Any]], object] | None = None,
    ) -> Tensor:
        """The state at `sigmas[-1]`, reached from `latents` (B, *latent_shape, float32, at `sigmas[0]`) by `solver`.

        `sigmas` is walked exactly, in the measure of `Engine.denoise`. `callback` hears, after every evaluation of the
        network, a dict with the keys of the solvers' callbacks: i (the step), sigma, x and denoised, the tensors being
        latents as they enter here. It may raise `solvers.Cancelled`, which passes through. Returns float32 latents;
        raises MemoryError where even one image at a time does not fit.
        """
        ...


@runtime_checkable
class TilingEngine(Protocol):
    """An engine that can encode and decode piece by piece where a whole image does not fit into memory."""

    def in_tiles(self) -> Engine | None:
        """The same engine with a VAE that works in tiles; None where it cannot, or does so already."""
        ...
