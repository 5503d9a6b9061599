"""`Layout`: how one diffusers pipeline packs, scales, decodes and is called, behind one interface.

Outside a layout latents are float32 (B, C, h, w), normalised to the scale at which noise has standard deviation 1, and
images are float32 (B, 3, H, W) in [0, 1]. The pipeline is not changed: its modules run on the device and in the dtype
that its owner gave them, offloading hooks included.

The base class is the plain kind: latents enter the network unchanged, and (z - shift_factor) * scaling_factor
normalises them (docs/method.md, section 1.6). The others are in `per_family` (a class per family) and `generic`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.layouts.shift import shift_rule
from mrflow_sched.engines.diffusers.quiet import leaving_out, short_lines
from mrflow_sched.engines.diffusers.view import copy_containers
from mrflow_sched.images.alpha import opaque
from mrflow_sched.plan.families import Family, ShiftRule
from mrflow_sched.sampling.faults import LARGEST
from mrflow_sched.sampling.network import TokenInputs, rows_of

__all__ = ["SCALE_ARGUMENTS", "Layout", "network_name", "parameter_defaults", "parameter_names", "parameters"]

# A VAE that overflows in float16 is float32 while it runs, as in diffusers; a second thread must not turn it back.
_UPCAST = threading.Lock()


_FACTORS = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
"""Names under which pipelines have the pixels of a latent pixel's side; the others are those of models of videos."""

SCALE_ARGUMENTS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")
"""Arguments of a pipeline's call whose entry "scale" is that of all its LoRAs."""


def network_name(pipe: Any) -> str:
    """The attribute of a pipeline that holds its network.

    Args:
        pipe: A diffusers pipeline.

    Returns:
        "transformer", or "unet" where there is none.
    """
    return "unet" if getattr(pipe, "transformer", None) is None else "transformer"


def parameter_names(function: Any) -> frozenset[str]:
    """The parameters that a function accepts.

    Args:
        function: Any callable with a signature; a method that passes `**kwargs` on to its parents has theirs too.

    Returns:
        Their names.
    """
    return frozenset(parameters(function))


def parameter_defaults(function: Any) -> dict[str, Any]:
    """The defaults of a function's parameters.

    Args:
        function: As in `parameter_names`.

    Returns:
        Default by name; parameters without one are left out.
    """
    found = parameters(function).items()
    return {name: each.default for name, each in found if each.default is not inspect.Parameter.empty}


def parameters(function: Any, kind: type[Any] | None = None) -> dict[str, inspect.Parameter]:
    """Named parameters of a function; of a method with `**kwargs`, those of the methods that it overrides as well.

    Args:
        function: Any callable with a signature.
        kind: The class whose method it is, where it is not bound to an object.

    Returns:
        Parameter by name.
    """
    layers = [inspect.signature(function).parameters]
    for base in (kind or type(getattr(function, "__self__", None))).__mro__:
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in layers[-1].values()):
            break
        overridden = vars(base).get(getattr(function, "__name__", ""))
        layers += [] if overridden is None else [inspect.signature(overridden).parameters]
    merged = {name: each for layer in reversed(layers) for name, each in layer.items() if name != "self"}
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: each for name, each in merged.items() if each.kind not in unnamed}


@dataclass(frozen=True)
class Layout:
    """One pipeline's conventions; `find_layout` makes it.

    Attributes:
        pipe: The pipeline, or a view of it.
        family: Its family, with the numbers of this very pipeline.
        experimental: Whether the method has not been validated on this family.
        notes: Sentences for whoever runs the pipeline.
        tokens: Which inputs of the network hold image tokens; None where a subset of them cannot be passed.
    """

    pipe: Any
    family: Family
    experimental: bool = False
    notes: tuple[str, ...] = ()

    @property
    def text_outputs(self) -> tuple[str, ...]:
        """What `encode_prompt` returns, in order, by argument names of the pipeline's call; "" is not passed on."""
        return () if self.family.pipeline is None else self.family.pipeline.text_outputs

    @property
    def casts_latents(self) -> bool:
        """Whether the pipeline converts given latents to its network's dtype itself; one of no known class may not."""
        return self.family.pipeline is not None and self.family.pipeline.casts_latents

    # Whether the pipeline runs both branches of CFG even where it is off.
    always_guided: ClassVar[bool] = False

    # Whether the pipeline hands its network the state as it is: of unit variance, as in LCM's loop.
    preserving: ClassVar[bool] = False

    @property
    def gives_state(self) -> bool:
        """Whether a stage starts from what the pipeline's own `prepare_latents` is made to return.

        So it is where the call takes no `latents`, or takes something else than the loop's state.
        """
        return "latents" not in self.call_names

    # Which inputs of the network hold image tokens, where a subset of them can be passed.
    tokens: ClassVar[TokenInputs | None] = None
    # Pixels are the latents: there is no VAE.
    pixels: ClassVar[bool] = False
    # The method of the pipeline that encodes text inside its call, once in a run where stages ask for the same again.
    remembered: ClassVar[str | None] = None
    # Whether the blocks of a modular pipeline read one prompt a call; what they make of several is a list.
    one_prompt_a_call: ClassVar[bool] = False
    # Whether they make one negative text where none is given, however many prompts there are.
    one_negative: ClassVar[bool] = False

    # Arguments of the call under which no call of the network needs what an earlier one of its loop left.
    independent_calls: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    # The argument of the call that says whether the pipeline rewrites prompts; "" where it never does.
    rewrite_switch: ClassVar[str] = ""

    @classmethod
    def stage_one_rule(cls, pipe: Any, family: Family) -> ShiftRule:
        """How this very pipeline makes the sigmas of its own schedule, which stage 1 walks.

        Args:
            pipe: The pipeline.
            family: Its family.

        Returns:
            Mostly what its scheduler's configuration asks for.

        Raises:
            MrFlowError: A configuration that no plan can follow.
        """
        even = family.pipeline is None or family.pipeline.even_list
        return shift_rule(pipe.scheduler, family.shift, even_list=even)

    @classmethod
    def latent_numbers(cls, pipe: Any, family: Family) -> tuple[int, int]:
        """The pixels of a latent pixel's side, and the channels of latents.

        Args:
            pipe: The pipeline.
            family: Its family.

        Returns:
            As the pipeline's own VAE has them.
        """
        config = pipe.vae.config
        # Where the VAE tells by itself: FluxPipeline's number was twice as large up to diffusers 0.31.
        plain = type(pipe.vae).__name__ == "AutoencoderKL"
        said = next((getattr(pipe, word) for word in _FACTORS if getattr(pipe, word, None)), 0)
        channels = getattr(config, "latent_channels", None) or getattr(config, "z_dim", None)
        factor = 2 ** (len(config.block_out_channels) - 1) if plain else int(said)
        return factor, int(channels or family.latent_channels)

    @property
    def keeps_alpha(self) -> bool:
        """Whether images have transparency as a fourth channel: where the VAE decodes it."""
        return getattr(self.pipe.vae.config, "out_channels", None) == 4

    @property
    def network(self) -> Any:
        """The pipeline's network: its transformer, else its U-Net; of two that take turns, that of high noise."""
        return getattr(self.pipe, self.network_names[0])

    @property
    def network_names(self) -> tuple[str, ...]:
        """The attributes that hold the pipeline's networks: one, or two that share the noise levels or the branches."""
        first = network_name(self.pipe)
        return (first,) if getattr(self.pipe, "transformer_2", None) is None else (first, "transformer_2")

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs its networks, and so where latents and images live."""
        return torch.device(self.pipe._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network."""
        return self.network.dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        """Dtype of the VAE; float32 where pixels are the latents."""
        return self.pipe.vae.dtype

    def cut_prompt(self, prompts: Sequence[str], options: Mapping[str, Any]) -> tuple[int, int] | None:
        """Whether the end of a prompt is cut off.

        Args:
            prompts: One text per image.
            options: Keyword arguments of the pipeline's call about text.

        Returns:
            (tokens of the longest prompt, tokens that are read); None where no prompt is cut, or the pipeline itself
            warns.
        """
        return None

    @property
    def text_length(self) -> int | None:
        """The family's `max_sequence_length` for text; None where the pipeline's default is right.

        Fewer where the tokenizer was made for shorter texts.
        """
        said = None if self.family.pipeline is None else self.family.pipeline.max_sequence_length
        longest = getattr(getattr(self.pipe, "tokenizer_2", None), "model_max_length", None)
        return said if said is None or longest is None else min(int(longest), said)

    @property
    def call_names(self) -> frozenset[str]:
        """Names of the keyword arguments of the pipeline's call."""
        return parameter_names(self.pipe.__call__)

    # ----------------------------------------------------------------------------------------------------- latents

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Shape of one image's normalised latents.

        Args:
            width: In pixels, a positive multiple of `family.grid`.
            height: Likewise.

        Returns:
            (C, h, w).

        Raises:
            MrFlowError: A size off the grid.
        """
        self._check_size(width, height)
        factor = self.family.vae_factor
        return (self.family.latent_channels, height // factor, width // factor)

    def pack(self, latents: Tensor) -> Tensor:
        """Latents in the shape in which the pipeline's loop passes its state to the scheduler.

        Args:
            latents: (B, C, h, w).

        Returns:
            (B, C, h, w), or tokens (B, N, D).
        """
        return latents

    def unpack(self, state: Tensor, width: int, height: int) -> Tensor:
        """Inverse of `pack`; exact, as values are only moved.

        Args:
            state: What `pack` returned.
            width: Of the image in pixels.
            height: Likewise.

        Returns:
            (B, C, h, w).
        """
        return state

    def call_latents(self, latents: Tensor) -> Tensor:
        """Latents for the pipeline's argument `latents`.

        Args:
            latents: (B, C, h, w), float32.

        Returns:
            Mostly, but not always, packed; in the network's dtype where the pipeline does not convert them itself.
        """
        packed = self.pack(latents)
        return packed if self.casts_latents else packed.to(self.network.dtype)

    def view_attributes(self, guidance: float, width: int, height: int) -> dict[str, Any]:
        """Attributes that a stage's own copy of the pipeline needs in addition to its scheduler; mostly none.

        Args:
            guidance: The plan's scale.
            width: Of the stage in pixels.
            height: Likewise.

        Returns:
            Values by attribute name.
        """
        return {}

    def stage_sigmas(self, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        """The sigmas of a stage as the model knows them.

        Args:
            sigmas: Of the plan, from 1 or below to 0.

        Returns:
            Mostly the same; another first one where the model's pure noise has another sigma than 1.
        """
        return sigmas

    def _check_size(self, width: int, height: int) -> None:
        grid = self.family.grid
        if width < grid or height < grid or width % grid or height % grid:
            raise MrFlowError(
                f"size is {width}x{height}; {self.family.title} needs positive multiples of {grid} pixels per side."
            )

    # ------------------------------------------------------------------------------------------------------ images

    def encode(self, images: Tensor, posterior: str = "mode", seeds: Sequence[int] | None = None) -> Tensor:
        """Normalised latents of images, one image at a time.

        Args:
            images: (B, 3, H, W) in [0, 1].
            posterior: "mode" takes the mode of the VAE's distribution; "sample" draws from it with one CPU generator
                per image.
            seeds: One per image, for "sample".

        Returns:
            (B, C, h, w), float32, on the device of `images`.

        Raises:
            MrFlowError: Another posterior, or seeds that do not match the batch.
        """
        if posterior not in ("mode", "sample"):
            raise MrFlowError(f"posterior is {posterior!r}; use mode or sample.")
        if posterior == "sample" and (seeds is None or len(seeds) != len(images)):
            raise MrFlowError(
                f"seeds is {seeds!r}; sampling the posterior needs one seed for each of {len(images)} images."
            )
        images = opaque(images) if self.keeps_alpha else images
        drawn = [None] * len(images) if posterior == "mode" or seeds is None else list(seeds)
        latents: list[Tensor] = []
        with _gradient_of(images), self._vae() as (vae, device, dtype):
            for image, seed in zip(images, drawn, strict=True):
                pixels = self._to_vae_image((2 * image[None] - 1).to(device, dtype))
                latents.append(self._normalise(_latents_of(vae.encode(pixels), seed)).to(images.device))
        return torch.cat(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of normalised latents, one at a time.

        Args:
            latents: (B, C, h, w).

        Returns:
            (B, 3, H, W), float32 in [0, 1], on the device of `latents`; NaN where the VAE returned what no
            image holds.
        """
        images: list[Tensor] = []
        with _gradient_of(latents), self._vae() as (vae, device, dtype):
            for latent in latents:
                values = self._denormalise(latent[None].float().to(device)).to(dtype)
                pixels = self._from_vae_image(self._decoded(vae, values))
                values = pixels.float() / 2 + 0.5
                values = values.where(values.abs() <= LARGEST, math.nan)  # clamping alone would make an image of it
                images.append(values.clamp(0, 1).to(latents.device))
        return torch.cat(images)

    def finish(self, images: Tensor) -> tuple[Tensor, tuple[bool, ...] | None]:
        """Apply what the pipeline does to its own final images: safety checker, watermark.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            Images in the same shape and range, and which of them a safety checker rejected (they are black); None where
            there is no checker.
        """
        return images, None

    def _normalise(self, latents: Tensor) -> Tensor:
        """Latents as the VAE returns them (float32) -> as the network takes them."""
        return (latents - _number(self.pipe.vae, "shift_factor", 0.0)) * _number(self.pipe.vae, "scaling_factor", 1.0)

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents / _number(self.pipe.vae, "scaling_factor", 1.0) + _number(self.pipe.vae, "shift_factor", 0.0)

    def for_arguments(self, arguments: Mapping[str, Any]) -> Layout:
        """The layout of a run with a caller's own arguments of the pipeline's call, some of which are about decoding.

        Args:
            arguments: Those arguments.

        Returns:
            Mostly the layout itself.
        """
        return self

    def _decoded(self, vae: Any, latents: Tensor) -> Tensor:
        """What the VAE makes of its latents of one image."""
        return vae.decode(latents, return_dict=False)[0]

    def _to_vae_image(self, pixels: Tensor) -> Tensor:
        """(1, 3, H, W) pixels in the shape that the VAE encodes."""
        return pixels

    def _from_vae_image(self, pixels: Tensor) -> Tensor:
        return pixels

    @contextlib.contextmanager
    def _vae(self) -> Generator[tuple[Any, torch.device, torch.dtype], None, None]:
        """The VAE, the device that its input must be on and the dtype that it runs in."""
        vae: Any = self.pipe.vae
        device = _input_device(self.pipe, vae)
        if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
            yield vae, device, vae.dtype
            return
        with _UPCAST, leaving_out("should be kept in float32: []"):
            vae.to(dtype=torch.float32)
            try:
                yield vae, device, torch.float32
            finally:
                vae.to(dtype=torch.float16)

    # -------------------------------------------------------------------------------------------------------- text

    def rewritten(self, prompts: Sequence[str], options: Mapping[str, Any], size: tuple[int, int]) -> list[str]:
        """Prompts as the pipeline itself would rewrite them before it reads them; the same text always the same way.

        Args:
            prompts: One text per image.
            options: The caller's own arguments of the pipeline's call.
            size: (width, height) of the final image in pixels, which some pipelines write for.

        Returns:
            As many texts; the prompts themselves where the pipeline rewrites none or is told not to.
        """
        return list(prompts)

    def encode_text(
        self,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Conditioning for a batch of images, with embeddings made once.

        Where a family guides by a second branch, the negative prompt is encoded even if none is given.

        Args:
            prompts: One text per image; None where `options` holds embeddings.
            negative_prompts: As many, or None.
            options: The caller's other arguments about text ("prompt_2", "max_sequence_length", "clip_skip",
                "prompt_embeds" in place of prompts, ...); names that `encode_prompt` does not take are left out.

        Returns:
            Keyword arguments of the pipeline's call, for `len(prompts)` images.
        """
        if not hasattr(self.pipe, "encode_prompt"):
            return self._prompts_as_they_are(prompts, negative_prompts, dict(options or {}))
        # An explicit None is an argument: Sana's complex_human_instruction=None switches the instruction off. A text or
        # embedding that is None is one that is not there.
        own = {name: value for name, value in dict(options or {}).items() if value is not None or "prompt" not in name}
        known = parameter_names(self.pipe.encode_prompt)
        given = {name: value for name, value in own.items() if name in known} | _lora_scale(own, known)
        if prompts is None:
            given |= {name: value for name, value in own.items() if name.startswith("prompt_embeds")}
        firsts = None if prompts is None else list(prompts)
        seconds = None if negative_prompts is None else list(negative_prompts)
        rows: list[int] | None = None
        # Several images of one prompt are one row of work; options that are lists belong to the rows as they stand.
        if firsts is not None and not any(isinstance(value, (list, tuple, Tensor)) for value in given.values()):
            pairs = list(zip(firsts, seconds or firsts, strict=True))
            unique = list(dict.fromkeys(pairs))
            rows = [unique.index(pair) for pair in pairs]
            firsts = [first for first, _ in unique]
            seconds = None if seconds is None else [second for _, second in unique]
        # A ready negative branch that encode_prompt does not ask for, as the pipeline's call takes it.
        ready = {name: own[name] for name in (self.call_names - known) & own.keys() if name.startswith("negative_")}
        with torch.no_grad(), short_lines():
            text = self._encode_rows(firsts, seconds, {**given, **ready})
        if rows is not None:
            text = self.select_text(text, rows)
        if ready:
            text = {name: value for name, value in text.items() if not name.startswith("negative_")} | ready
        return text

    def _prompts_as_they_are(
        self, prompts: Sequence[str] | None, negatives: Sequence[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        """`encode_text` of a pipeline that encodes text only inside its call."""
        text = {name: value for name, value in options.items() if name in self.call_names and "prompt" in name}
        text |= {} if prompts is None else {"prompt": list(prompts)}
        if negatives is not None and "negative_prompt" in self.call_names:
            text["negative_prompt"] = list(negatives)
        return text

    def _encode_rows(
        self, prompts: list[str] | None, negatives: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        """`encode_text` without repeats: the pipeline's own `encode_prompt`, its results under the call's names."""
        known = parameter_names(self.pipe.encode_prompt)
        arguments: dict[str, Any] = {
            # What the call would say itself: encode_prompt's own defaults differ from the call's in some pipelines.
            **{name: value for name, value in parameter_defaults(self.pipe.__call__).items() if name in known},
            "prompt": prompts,
            "prompt_2": None,
            "prompt_3": None,
            "device": self.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": self._guided,
            **options,
        }
        if self._guided and negatives is not None:
            arguments["negative_prompt"] = negatives
        asked = {name: value for name, value in arguments.items() if name in known}
        return self._named(self.pipe.encode_prompt(**copy_containers(asked)))

    def _named(self, found: Any) -> dict[str, Any]:
        values = cast("tuple[Any, ...]", found if isinstance(found, tuple) else (found,))
        pairs = zip(self.text_outputs, values, strict=True)
        return {name: value for name, value in pairs if name and value is not None}

    def select_text(self, text: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """Conditioning of other rows of the batch.

        Args:
            text: What `encode_text` returned.
            rows: Numbers of the rows, in order, repeats allowed.

        Returns:
            The same arguments for those rows.
        """
        return {name: _rows_of(value, rows) for name, value in text.items()}

    def runs_together(self, text: Mapping[str, Any]) -> bool:
        """Whether the pipeline draws each image of a batch as it would alone.

        Args:
            text: What `encode_text` returned.

        Returns:
            False where the texts of a batch change each other's images; they are then run one by one.
        """
        return True

    # ---------------------------------------------------------------------------------------------------- guidance

    @property
    def _guided(self) -> bool:
        return self.family.guidance_kind == "cfg"

    def plan_guidance(self, guidance: float) -> float:
        """The plan's scale for a scale as the pipeline takes it.

        Args:
            guidance: As the caller would pass it to the pipeline.

        Returns:
            The plan's scale: 1 is off, whatever value the pipeline uses for that.
        """
        return max(guidance, 1.0) if self._guided else guidance

    @property
    def positive_first(self) -> bool:
        """Whether the positive branch comes first where CFG runs both in one batch."""
        return self.family.pipeline is not None and self.family.pipeline.positive_first

    @property
    def negative_call_first(self) -> bool:
        """Whether the negative branch is called first where CFG makes two calls of an evaluation."""
        return False

    def take_rows(self, inputs: Mapping[str, Any], rows: slice, count: int) -> dict[str, Any]:
        """Some of the samples of a network's inputs.

        Args:
            inputs: Arguments of the network by name.
            rows: Which samples.
            count: How many samples the inputs hold.

        Returns:
            The same arguments for those samples; what is not per sample is kept.
        """
        return {name: rows_of(value, rows, count) for name, value in inputs.items()}

    def guided_by_two(self) -> Layout:
        """The layout for a run whose guidance takes a second branch although the family's does not.

        Returns:
            Mostly the layout itself.
        """
        return self

    def guidance_weight(self, guidance: float) -> float:
        """How far a scale leads from the positive branch: w in p + w (p - n) of the positive and negative branches.

        Args:
            guidance: The plan's scale.

        Returns:
            w, 0 where guidance is off.
        """
        return guidance - 1.0

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call for a guidance scale.

        Args:
            guidance: The plan's scale (CFG: 1 is off).

        Returns:
            Values by name.
        """
        return {"guidance_scale": guidance}

    def drawn_arguments(self, text: Mapping[str, Any], seeds: Sequence[int], width: int, height: int) -> dict[str, Any]:
        """What a pipeline draws from a seed and the size before its loop, besides noise; mostly nothing.

        Args:
            text: What `encode_text` returned.
            seeds: One per image.
            width: Of the stage in pixels.
            height: Likewise.

        Returns:
            Keyword arguments of the pipeline's call.
        """
        return {}

    def stage_arguments(self, text: Mapping[str, Any], guidance: float, width: int, height: int) -> dict[str, Any]:
        """All that a stage passes to the pipeline apart from latents and steps: text, guidance, size, fixed switches.

        The negative branch's embeddings are left out where guidance is off, so that no pipeline warns about them.

        Args:
            text: What `encode_text` returned.
            guidance: The plan's scale.
            width: Of the stage in pixels.
            height: Likewise.

        Returns:
            Keyword arguments of the pipeline's call.
        """
        off = self._guided and guidance == 1.0
        kept = {name: value for name, value in text.items() if not (off and name.startswith("negative_"))}
        fixed: dict[str, Any] = {}
        if "use_resolution_binning" in self.call_names:
            fixed["use_resolution_binning"] = False  # or the pipeline chooses a size of its own
        if "num_frames" in self.call_names:
            fixed["num_frames"] = 1  # of a model of videos
        if "negative_prompt" in self.call_names and "prompt" not in text:
            fixed["negative_prompt"] = None  # where the call's default is text, embeddings beside it are refused
        return {**fixed, **kept, **self.guidance_arguments(guidance), "width": width, "height": height}


# -------------------------------------------------------------------------------------------------------------- helpers


def _number(module: Any, name: str, absent: float) -> float:
    """A number of a module's configuration; `absent` where it has none."""
    value = getattr(module.config, name, None)
    return absent if value is None else float(value)


def _latents_of(answer: Any, seed: int | None) -> Tensor:
    """The latents in what a VAE's `encode` returned, float32: mode of the distribution, or drawn from it."""
    if not hasattr(answer, "latent_dist"):  # an autoencoder without a distribution: Sana's, or a tiny one
        plain: Tensor = answer.latent if hasattr(answer, "latent") else answer.latents
        return plain.float()
    centre: Tensor = answer.latent_dist.mode().float()
    if seed is None:
        return centre
    noise = torch.randn(centre.shape, generator=torch.Generator().manual_seed(seed))
    return centre + answer.latent_dist.std.float() * noise.to(centre)


def _input_device(pipe: Any, module: Any) -> torch.device:
    """Where a module's input must be: its hooks' device where it is offloaded, else its own."""
    try:
        from diffusers.utils import torch_utils

        find: Any = torch_utils.get_module_execution_device  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
    except (ImportError, AttributeError):  # diffusers before 0.42
        return torch.device(pipe._execution_device)
    return torch.device(find(module))


def _lora_scale(options: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """Pipelines take the scale of the text encoders' LoRA from the network's keyword arguments."""
    for name in SCALE_ARGUMENTS:
        said: dict[str, Any] = options.get(name) or {}
        scale = said.get("scale")
        if scale is not None and "lora_scale" in known:
            return {"lora_scale": scale}
    return {}


def _rows_of(value: Any, rows: Sequence[int]) -> Any:
    if isinstance(value, Tensor):
        return value[torch.as_tensor(list(rows), device=value.device)]
    if isinstance(value, list):
        items = cast("list[Any]", value)
        return [items[row] for row in rows]
    return value


def _gradient_of(x: Tensor) -> torch.set_grad_enabled:
    """Keep a graph only where the caller asked for gradients of `x`: weights that require theirs are not a reason."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad)
