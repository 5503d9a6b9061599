"""Engines with closed-form answers: the whole chain can be checked against them to float precision, with no network.

* `GaussianFieldEngine`: images are draws of a stationary Gaussian field with any power spectrum, at any size.
* `MixtureEngine`: a Gaussian mixture with labelled components, so that guidance has an effect.

Both rest on one fact. With x = a·x0 + s·noise (a = 1 - sigma and s = sigma for flow models, a = 1 and s = sigma_ve for
variance-exploding ones) and x0 normal with mean m and variance v in some direction, the denoised estimate there is
m + a·v / (a²·v + s²) · (x - a·m). Inside they compute in float64; what they return is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.families import Family, Prediction, get_family
from mrflow_sched.sampling.engine import Capabilities
from mrflow_sched.sampling.noise import draw_noise

__all__ = ["GaussianFieldEngine", "MixtureEngine", "Power", "power_law", "refined_variance"]

Power = Callable[[Tensor, Tensor], Tensor]
"""Variance that the wave with (ky, kx) periods per image height and width adds to a pixel, elementwise."""


def power_law(exponent: float = 3.0, variance: float = 0.1, corner: float = 1.0) -> Power:
    """A power spectrum falling as (corner² + k²)^(-exponent/2) with the wave number k.

    Sizes share their waves: a larger image has finer ones in addition.

    Args:
        exponent: Of the fall at large k; natural images have about 2 to 3 in two dimensions.
        variance: Of the constant wave (k = 0), in squared latent units.
        corner: Wave number at which the fall begins, in periods per image side.

    Returns:
        The spectrum, for `GaussianFieldEngine`.
    """

    def power(ky: Tensor, kx: Tensor) -> Tensor:
        return variance * (1.0 + (ky**2 + kx**2) / corner**2) ** (-exponent / 2)

    return power


def refined_variance(variance: float, sigma: float) -> float:
    """Variance of one mode after noise at flow `sigma` is added and one refine step removes it.

    s²·(1 - sigma² / ((1 - sigma)²·s² + sigma²)) for a mode of variance s²: the mean of a Gaussian posterior has a
    smaller variance than the prior. Modes above the noise keep their variance, modes below it lose it.

    Args:
        variance: s² of the mode before, 0 or more.
        sigma: Flow sigma of the refine step, above 0 and at most 1.

    Returns:
        The variance after, at most `variance`.
    """
    return variance * (1.0 - sigma**2 / ((1.0 - sigma) ** 2 * variance + sigma**2))


def _mixing(sigma: Tensor, prediction: Prediction, ndim: int) -> tuple[Tensor, Tensor]:
    """(a, s) of x = a·x0 + s·noise for sigmas (B,), in float64, shaped to multiply a batch of `ndim` dimensions."""
    s = sigma.double().reshape(-1, *([1] * (ndim - 1)))
    return (1.0 - s if prediction == "flow" else torch.ones_like(s)), s


_CPU = torch.device("cpu")
_POWER = power_law()
# Both families: 8-pixel grid, no text tokens in the cost, guidance of 1 unless a plan sets another.
_FAMILY = replace(get_family("demo"), name="analytic", text_tokens=0, guidance=1.0, min_low_side=8)
_FIELD_FAMILY = replace(_FAMILY, title="Gaussian field", latent_channels=48, guidance_kind="none")
_MIXTURE_FAMILY = replace(_FAMILY, title="Gaussian mixture", latent_channels=64, guidance_kind="cfg")


# --------------------------------------------------------------------------------------------------- Gaussian fields


@dataclass(frozen=True)
class GaussianFieldEngine:
    """A stationary Gaussian field: every wave of the image is an independent normal variable of known power.

    Guidance extrapolates between the means of prompt and negative prompt. The "VAE" is exact both ways: latents are
    (image - 0.5) / `contrast`, and pixels are folded into channels by the VAE factor (an orthonormal transform, so
    noise stays white). Images are clamped to [0, 1]: keep the field's standard deviation below 0.1 / `contrast`.

    Attributes:
        power: Each wave's part of the pixel variance, in squared latent units; `power_law()` by default.
        means: Mean colour of the images by prompt, three latent values; other prompts have mean 0.
        family: Sets the prediction type, the grid and the VAE factor.
        contrast: Pixel value per latent unit.
        device: Where latents and images live.
    """

    power: Power = _POWER
    means: Mapping[str, Sequence[float]] | None = None
    family: Family = _FIELD_FAMILY
    contrast: float = 0.1
    device: torch.device = _CPU

    @property
    def capabilities(self) -> Capabilities:
        """Gradients: every method can be differentiated."""
        return Capabilities(gradients=True)

    def encode_text(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean colours of the prompts and of the negative prompts.

        Args:
            prompts: Keys of `means`; others have mean 0.
            negative_prompts: Likewise, one per prompt; None for empty ones.

        Returns:
            Two tensors (B, 3, 1, 1), float64.
        """
        return self._colours(prompts), self._colours(negative_prompts or [""] * len(prompts))

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Shape of one sample's latents.

        Args:
            width: In pixels, a multiple of the VAE factor.
            height: Likewise.

        Returns:
            (3 · factor², height / factor, width / factor).
        """
        factor = self.family.vae_factor
        return 3 * factor**2, height // factor, width // factor

    def denoise(self, x: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], *, guidance: float) -> Tensor:
        """The exact posterior mean of the clean latents.

        Args:
            x: Noisy latents (B, *latent_shape).
            sigma: (B,), flow sigma or sigma_ve by the family's prediction type.
            text: What `encode_text` returned.
            guidance: n + guidance · (p - n) of the mean colours; 1 is off.

        Returns:
            Clean latents in the shape and dtype of `x`.
        """
        positive, negative = text
        mean = positive if guidance == 1.0 else negative + guidance * (positive - negative)
        a, s = _mixing(sigma, self.family.prediction, x.ndim)
        pixels = self._unfold(x.double())
        variance = self.spectrum(pixels.shape[-1], pixels.shape[-2])
        gain = a * variance / (a**2 * variance + s**2)
        return self._fold(mean + _filtered(pixels - a * mean, gain)).to(x.dtype)

    def encode(self, images: Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None) -> Tensor:
        """Latents of images, exactly.

        Args:
            images: (B, 3, H, W), float32 in [0, 1].
            posterior: "mode", or "sample", which adds white noise of standard deviation 0.001, as a VAE's posterior
                would.
            seeds: One per image, for "sample".

        Returns:
            (B, *latent_shape), float32.

        Raises:
            MrFlowError: "sample" without seeds.
        """
        latents = self._fold((images.double() - 0.5) / self.contrast).float()
        if posterior == "mode":
            return latents
        if seeds is None:
            raise MrFlowError("seeds must be given when posterior is 'sample', got None; pass one per image.")
        return latents + 1e-3 * draw_noise(latents.shape[1:], seeds, device=self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents.

        Args:
            latents: (B, *latent_shape).

        Returns:
            (B, 3, H, W), float32, clamped to [0, 1].
        """
        return (0.5 + self.contrast * self._unfold(latents.double())).clamp(0.0, 1.0).float()

    def spectrum(self, width: int, height: int) -> Tensor:
        """Variance of each coefficient of an image's orthonormal Fourier transform.

        Args:
            width: In pixels.
            height: In pixels.

        Returns:
            (height, width) in FFT order, float64, in squared latent units.
        """
        ky, kx = _waves(height).to(self.device), _waves(width).to(self.device)
        return width * height * self.power(ky[:, None], kx[None, :])

    def sample(self, width: int, height: int, seeds: Sequence[int], mean: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
        """Exact draws from the prior.

        Args:
            width: In pixels, a multiple of the VAE factor.
            height: Likewise.
            seeds: One per draw.
            mean: Mean colour, three latent values.

        Returns:
            Latents (B, *latent_shape), float32.
        """
        white = draw_noise((3, height, width), seeds, device=self.device).double()
        field = _filtered(white, self.spectrum(width, height).sqrt())
        return self._fold(field + _column(mean).to(self.device)).float()

    def _colours(self, prompts: Sequence[str]) -> Tensor:
        means = self.means or {}
        return torch.stack([_column(means.get(prompt, (0.0, 0.0, 0.0))) for prompt in prompts]).to(self.device)

    def _fold(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels, self.family.vae_factor)

    def _unfold(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.family.vae_factor)


def _filtered(pixels: Tensor, gain: Tensor) -> Tensor:
    """`pixels` (B, 3, H, W) with each wave multiplied by its real `gain` (broadcast over batch and colours)."""
    waves = torch.fft.fft2(pixels)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(Tensor, torch.fft.ifft2(waves * gain).real)  # pyright: ignore[reportUnknownMemberType]


def _waves(count: int) -> Tensor:
    """Signed wave numbers of a transform of `count` values, in FFT order: 0, 1, ..., -2, -1."""
    number = torch.arange(count, dtype=torch.float64)
    return torch.where(number < count / 2, number, number - count)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64).reshape(-1, 1, 1)


# ---------------------------------------------------------------------------------------------------------- mixtures


@dataclass(frozen=True)
class MixtureEngine:
    """A mixture of axis-parallel Gaussians, each component with a label that a prompt can ask for.

    Prompts are "label 3" (the mixture of that label's components alone) or "" (all components); all components weigh
    the same. Guidance is classifier-free: D_n + g·(D_p - D_n) over prompt p and negative prompt n; at g = 1 it is D_p.
    There is one size: `latent_shape` is `shape` whatever the image size. `decode` shows the values as a grey image.

    Attributes:
        means: (K, D), float64, with D the number of values in `shape`.
        stds: (K, 1) or (K, D), float64.
        labels: (K,), integers of 0 or more.
        shape: Of one sample's latents.
        family: Sets the prediction type.
        contrast: Pixel value per latent unit.
        device: Where latents and images live.
    """

    means: Tensor
    stds: Tensor
    labels: Tensor
    shape: tuple[int, ...] = (64, 1, 1)
    family: Family = _MIXTURE_FAMILY
    contrast: float = 0.1
    device: torch.device = _CPU

    @classmethod
    def random(
        cls,
        seed: int,
        *,
        dimensions: int = 64,
        components: int = 16,
        labels: int = 4,
        spread: float = 1.0,
        std: float = 0.3,
        decay: float = 0.0,
        prediction: Prediction = "flow",
    ) -> MixtureEngine:
        """A random mixture with overall variance about spread² + std².

        Scales fall over the dimensions as (1 + i)^(-decay), as the spectrum of images does.

        Args:
            seed: Of the component means.
            dimensions: Values of one sample.
            components: Number of Gaussians.
            labels: Number of labels, given to the components in turn.
            spread: How far the component means lie apart, relative to the scale of each dimension.
            std: How wide a component is, relative to the same.
            decay: How fast the scales fall; 0: all dimensions alike.
            prediction: Prediction type of the family.

        Returns:
            An engine with latents of shape (dimensions, 1, 1), on the CPU.
        """
        scale = (1.0 + torch.arange(dimensions, dtype=torch.float64)) ** -decay
        scale = scale / scale.square().mean().sqrt()
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(components, dimensions, generator=generator, dtype=torch.float64) * scale * spread
        family = replace(_MIXTURE_FAMILY, latent_channels=dimensions, prediction=prediction)
        stds = (std * scale).expand(components, dimensions)
        return cls(means, stds, torch.arange(components) % labels, (dimensions, 1, 1), family)

    @property
    def capabilities(self) -> Capabilities:
        """Gradients: every method can be differentiated."""
        return Capabilities(gradients=True)

    def encode_text(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Which components each prompt, and each negative prompt, allows.

        Args:
            prompts: "label N" or "".
            negative_prompts: Likewise, one per prompt; None for empty ones.

        Returns:
            Two boolean tensors (B, K).

        Raises:
            MrFlowError: A prompt that names no label of this mixture.
        """
        return self._allowed(prompts), self._allowed(negative_prompts or [""] * len(prompts))

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Shape of one sample's latents, the same for every size.

        Args:
            width: Not used.
            height: Not used.

        Returns:
            `shape`.
        """
        return self.shape

    def denoise(self, x: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], *, guidance: float) -> Tensor:
        """The exact posterior mean of the clean latents, with guidance.

        Args:
            x: Noisy latents (B, *shape).
            sigma: (B,), flow sigma or sigma_ve by the family's prediction type.
            text: What `encode_text` returned.
            guidance: CFG scale; 1 is off.

        Returns:
            Clean latents in the shape and dtype of `x`.
        """
        positive, negative = text
        asked = self._posterior_mean(x, sigma, positive)
        if guidance != 1.0:
            plain = self._posterior_mean(x, sigma, negative)
            asked = plain + guidance * (asked - plain)
        return asked.reshape(x.shape).to(x.dtype)

    def encode(self, images: Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None) -> Tensor:
        """The inverse of `decode`, up to the clamping.

        Args:
            images: (B, 3, H, W), float32 in [0, 1]; the mean over the colours is taken.
            posterior: Has no effect.
            seeds: Have no effect.

        Returns:
            Latents (B, *shape), float32.
        """
        return ((images.double().mean(1) - 0.5) / self.contrast).reshape(-1, *self.shape).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Grey images of the values, as square as their count allows; 0 is mid grey.

        Args:
            latents: (B, *shape).

        Returns:
            (B, 3, H, W), float32, clamped to [0, 1].
        """
        values = latents.double().flatten(1)
        height = math.gcd(values.shape[1], 2 ** round(math.log2(values.shape[1]) / 2))
        grey = (0.5 + self.contrast * values).reshape(len(values), 1, height, -1)
        return grey.clamp(0.0, 1.0).expand(-1, 3, -1, -1).float()

    def _posterior_mean(self, x: Tensor, sigma: Tensor, allowed: Tensor) -> Tensor:
        """E[x0 | x] (B, D): the components' own estimates, weighted by the probability that each produced `x`."""
        a, s = _mixing(sigma, self.family.prediction, 3)
        variance = a**2 * self.stds**2 + s**2
        offset = x.double().flatten(1)[:, None] - a * self.means
        score = -0.5 * (offset**2 / variance + variance.log()).sum(-1)
        weights = score.masked_fill(~allowed, -math.inf).softmax(1)
        estimates = self.means + a * self.stds**2 / variance * offset
        return (weights[..., None] * estimates).sum(1)

    def _allowed(self, prompts: Sequence[str]) -> Tensor:
        rows = [self.labels == self._label(prompt) if prompt.strip() else self.labels >= 0 for prompt in prompts]
        return torch.stack(rows).to(self.device)

    def _label(self, prompt: str) -> int:
        known = sorted({int(label) for label in self.labels})
        word = prompt.split()[-1]
        if not word.isdigit() or int(word) not in known:
            raise MrFlowError(f"prompt {prompt!r} names no label of this mixture; write 'label N', N one of {known}.")
        return int(word)
