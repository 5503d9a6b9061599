"""Flow pipelines whose loops count noise in another way: CogView4, GLM-Image, Cosmos-Predict2, OmniGen, SANA-Sprint.

What their networks are told is the scheduler's business; here is how they are called.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.engines.diffusers.layouts.base import Layout
from mrflow_sched.engines.diffusers.layouts.per_family.packed import VideoVaeLayout
from mrflow_sched.engines.diffusers.view import attributes_of

__all__ = ["CogView4Layout", "CosmosLayout", "GlmImageLayout", "OmniGenLayout", "SanaSprintLayout"]


class CogView4Layout(Layout):
    """CogView4, and its variant that is led by an image."""

    @override
    def runs_together(self, text: Mapping[str, Any]) -> bool:
        # Its network sees the padding of the shorter texts of a batch.
        return _alike(text)

    @override
    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        if "control_image" not in self.call_names:
            return {}
        # The pipeline wants both embeddings in one shape, which those that it makes itself need not have; and it would
        # draw the hint's latents from the global generator.
        return {"check_inputs": _nothing, "vae": _without_drawing(self.pipe.vae)}


class GlmImageLayout(Layout):
    """GLM-Image: a language model writes the picture as tokens first, which the network reads beside the text.

    It writes them once for an image, in the size of the first stage that runs. In later stages the same tokens are
    enlarged by repetition, as the pipeline itself enlarges them to the network's grid: another draw would be another
    picture.
    """

    @override
    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        return {"check_inputs": _nothing}  # it wants both embeddings in one shape

    @override
    def encode_text(
        self,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        # Adds "prior_token_ids": what will write each image's tokens.
        text = super().encode_text(prompts, negative_prompts, options)
        if prompts is None:
            if dict(options or {}).get("prior_token_ids") is None:
                raise MrFlowError(
                    "prompt_embeds came without prior_token_ids, which GLM-Image's language model writes from the "
                    "prompt; give the prompt, or both."
                )
            return {**text, "prior_token_ids": dict(options or {})["prior_token_ids"]}
        return {**text, "prior_token_ids": [_PriorTokens(prompt) for prompt in prompts]}

    @override
    def drawn_arguments(self, text: Mapping[str, Any], seeds: Sequence[int], width: int, height: int) -> dict[str, Any]:
        priors = text["prior_token_ids"]
        if isinstance(priors, Tensor):
            return {"prior_token_ids": self._on_grid(priors, width, height)}
        made = (prior.of(self.pipe, seed, width, height) for prior, seed in zip(priors, seeds, strict=True))
        rows, columns = height // self.family.grid, width // self.family.grid
        return {"prior_token_ids": torch.cat([_resized(tokens, rows, columns) for tokens in made])}

    def _on_grid(self, tokens: Tensor, width: int, height: int) -> Tensor:
        """The caller's own tokens (B, N), which are of an image in the shape of this one, in its size."""
        rows, columns = height // self.family.grid, width // self.family.grid
        lines = max(round((tokens.shape[1] * rows / columns) ** 0.5), 1)
        if tokens.shape[1] % lines:
            raise MrFlowError(
                f"prior_token_ids holds {tokens.shape[1]} tokens for an image, which make no {width}x{height} picture; "
                "let the pipeline write them for the size of stage 1."
            )
        return _resized(tokens.reshape(len(tokens), 1, lines, -1), rows, columns)

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (config.latents_mean, config.latents_std)
        )
        return mean, std


@dataclass
class _PriorTokens:
    """The tokens of one prompt's image, for each seed in the size that was asked for first."""

    prompt: str
    written: dict[int, Tensor] = field(default_factory=dict[int, Tensor], compare=False)

    def of(self, pipe: Any, seed: int, width: int, height: int) -> Tensor:
        """The tokens of one seed.

        Args:
            pipe: The pipeline whose language model writes them.
            seed: Of its draws.
            width: Of the image in pixels, where its tokens are not written yet.
            height: Likewise.

        Returns:
            (1, 1, rows, columns).
        """
        if seed not in self.written:
            unit = 32  # pixels of a token as the language model writes it; the pipeline doubles both sides
            rows, columns = (max(side // unit, 1) for side in (height, width))
            with _seeded(pipe):
                found: Tensor = pipe.generate_prior_tokens(
                    prompt=[self.prompt],
                    height=rows * unit,
                    width=columns * unit,
                    device=pipe._execution_device,
                    generator=torch.Generator().manual_seed(seed),
                )[0]
            self.written[seed] = found.view(1, 1, 2 * rows, 2 * columns)
        return self.written[seed]


def _resized(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens (B, 1, h, w), repeated or left out, as (B, rows * columns)."""
    if tuple(tokens.shape[-2:]) != (rows, columns):
        values = torch.nn.functional.interpolate(tokens.double(), size=(rows, columns), mode="nearest")
        tokens = values.to(tokens.dtype)
    return tokens.reshape(len(tokens), -1)


def _seeded(pipe: Any) -> Any:
    """The global generators in a copy that is thrown away: the pipeline seeds them for its language model."""
    device = torch.device(pipe._execution_device)
    forked: Any = torch.random.fork_rng  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return forked(devices=[device] if device.type == "cuda" else [])


class CosmosLayout(VideoVaeLayout):
    """Cosmos-Predict2: its loop holds x0 + s noise, one frame of a video, and turns it into flow for its network.

    Its safety checker reads each prompt once and looks at the finished pictures.
    """

    @override
    def pack(self, latents: Tensor) -> Tensor:
        return latents[:, :, None]

    @override
    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        return state[:, :, 0] if state.ndim == 5 else state  # the pipeline's own result has no axis of frames

    @override
    def call_latents(self, latents: Tensor) -> Tensor:
        # The pipeline multiplies what it is given by the largest s, as if it were noise.
        return super().call_latents(latents / self.family.shift.largest_ve)

    @override
    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        return {"safety_checker": _Satisfied()}  # stages have neither prompts nor pictures to check

    @override
    def guidance_weight(self, guidance: float) -> float:
        # p + g (p - n): one more than the usual weight, where guidance is on.
        return 0.0 if guidance == 1.0 else guidance

    @override
    def encode_text(
        self,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        # Raises MrFlowError where the safety checker is missing or refuses a prompt.
        checker = self.pipe.safety_checker
        if checker is None:
            raise MrFlowError(
                "pipe has no safety_checker, without which this pipeline does not run; load it with the package "
                "cosmos_guardrail installed."
            )
        checker.to(self.device)
        try:
            for prompt in dict.fromkeys(prompts or ()):
                if not checker.check_text_safety(prompt):
                    raise MrFlowError(
                        f"the pipeline's safety checker refuses the prompt {quoted(prompt)}; choose another one."
                    )
        finally:
            checker.to("cpu")
        return super().encode_text(prompts, negative_prompts, options)

    @override
    def finish(self, images: Tensor) -> tuple[Tensor, tuple[bool, ...] | None]:
        checker = self.pipe.safety_checker
        if checker is None:
            return images, None
        rejected: list[bool] = []
        checked: list[Tensor] = []
        checker.to(self.device)
        try:
            for image in images:
                frames = (image.detach().permute(1, 2, 0)[None].float().cpu().numpy() * 255).astype("uint8")
                passed: Any = checker.check_video_safety(frames)
                rejected.append(passed is None)
                pixels = torch.zeros_like(image) if passed is None else torch.as_tensor(passed[0]).permute(2, 0, 1)
                checked.append(pixels if passed is None else pixels.to(images) / 255)
        finally:
            checker.to("cpu")
        return torch.stack(checked), tuple(rejected)


class _Satisfied:
    """Stands in for a safety checker in stages, which it has nothing to say about."""

    def to(self, _device: Any) -> _Satisfied:
        return self

    def check_text_safety(self, _prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


class OmniGenLayout(Layout):
    """OmniGen: the network itself reads the text, and the pipeline has a negative prompt of its own."""

    always_guided: ClassVar[bool] = True

    @override
    def runs_together(self, text: Mapping[str, Any]) -> bool:
        # Likewise: texts of a batch are padded to one length.
        return _alike(text)


class SanaSprintLayout(Layout):
    """SANA-Sprint: times are angles."""

    @override
    def call_latents(self, latents: Tensor) -> Tensor:
        return super().call_latents(latents / float(self.pipe.scheduler.config.sigma_data))  # multiplied by the call

    @override
    def stage_arguments(self, text: Mapping[str, Any], guidance: float, width: int, height: int) -> dict[str, Any]:
        # The angle in the middle of two steps, which the call refuses for any other number of them; the plan has it.
        return {**super().stage_arguments(text, guidance, width, height), "intermediate_timesteps": None}


def _nothing(*_values: Any, **_named: Any) -> None:
    return None


def _without_drawing(vae: Any) -> Any:
    """A VAE around the same weights whose `encode` answers with the mode in place of a draw."""
    other, encode = copy.copy(vae), vae.encode

    def mode(images: Tensor, *values: Any, **named: Any) -> Any:
        centre: Tensor = encode(images, *values, **named).latent_dist.mode()

        def drawn(generator: object = None) -> Tensor:
            return centre

        return SimpleNamespace(latent_dist=SimpleNamespace(sample=drawn, mode=drawn))

    attributes_of(other)["encode"] = mode
    return other


def _alike(text: Mapping[str, Any]) -> bool:
    """Whether all images of a batch have the same text."""
    for value in text.values():
        rows: list[Any] = list(cast("Any", value)) if isinstance(value, (list, Tensor)) else []
        if any(not (torch.equal(row, rows[0]) if isinstance(row, Tensor) else row == rows[0]) for row in rows[1:]):
            return False
    return True
