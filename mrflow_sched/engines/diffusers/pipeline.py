"""Any diffusers text-to-image pipeline as an engine: the pipeline's own loop runs every stage, on our scheduler.

For each stage a *view* of the pipeline is made: a shallow copy, whose modules are the pipeline's own, whose scheduler
is an `MrFlowScheduler` that walks the plan's sigmas and nothing else, and whose network is a shell around the
pipeline's (`seam`). Calling the view handles everything in which families differ: position ids, guidance of either
kind, attention masks, ControlNet, IP adapters, LoRA scales, offloading hooks, callbacks. What the call sets (scales,
the current step, an interrupt) it sets on the view; while it lasts, the pipeline shows the same values (`view.Mirror`),
and after it the pipeline is as it was. Two threads can use one pipeline.

diffusers is imported when a folder is loaded or a stage is run, never when this module is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched._runtime.memory import callers_own
from mrflow_sched.engines.diffusers.blame import told, unread_prompt, unstarted
from mrflow_sched.engines.diffusers.compiled import COMPILE_STEPS, NetworkCompiler
from mrflow_sched.engines.diffusers.editing import Pictures, starting_at, texts_as_given
from mrflow_sched.engines.diffusers.folder import load_pipeline, model_fingerprint
from mrflow_sched.engines.diffusers.layouts import Layout, find_layout
from mrflow_sched.engines.diffusers.layouts.base import SCALE_ARGUMENTS, parameter_names
from mrflow_sched.engines.diffusers.layouts.pictures import picture_arguments
from mrflow_sched.engines.diffusers.layouts.shift import sampler_note, spacing_note
from mrflow_sched.engines.diffusers.modular_view import ModularView, as_pipeline
from mrflow_sched.engines.diffusers.precision import OWN, LoweredNetworks, check_precision
from mrflow_sched.engines.diffusers.seam import POSITIONS, NetworkSeam, guided_per_step, moved_to
from mrflow_sched.engines.diffusers.view import (
    HINT,
    TOKENIZER_LOCK,
    Mirror,
    copy_containers,
    draws_freely,
    follow_last_change,
    hint_for_stage,
    interrupted,
    put_network,
    remembering,
    returning,
    shell_of,
    stage_window,
    steady_vae,
    view_of,
    with_tokenizer_lock,
)
from mrflow_sched.plan.families import Family
from mrflow_sched.sampling.engine import Capabilities, Guidance
from mrflow_sched.sampling.memory import within_memory
from mrflow_sched.sampling.network import Around
from mrflow_sched.sampling.noise import stage_seed, ve_to_sigma
from mrflow_sched.sampling.solvers import evaluation_sigmas, evaluations_per_step

if TYPE_CHECKING:
    from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler
    from mrflow_sched.plan.cost import Offload

__all__ = ["PipelineEngine", "PipelineText", "given_embeddings"]


@dataclass(frozen=True)
class PipelineText:
    """Conditioning of a batch of images.

    Attributes:
        arguments: Keyword arguments of the pipeline's call, with embeddings made once.
        batch: Number of images.
        options: Arguments of the pipeline's call that take the place of the engine's own.
        notes: Sentences for whoever asked: texts without effect, what the engine itself has to say.
        memory: What a pipeline that encodes text inside its call has encoded so far.
    """

    arguments: Mapping[str, Any]
    batch: int
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()
    memory: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False, compare=False)

    def __len__(self) -> int:
        return self.batch


@dataclass(frozen=True)
class _Stage:
    """One stage of some images of a batch, as the pipeline runs it.

    `rows` says which images of the batch they are. `scale` is what the pipeline is told, `guidance` the scale of each
    step; None where that is one scale throughout. `place` is where a tile lies in the whole image, in tokens.
    `callbacks` says whether the owner's are called, and `first` what their first step counts.
    """

    solver: str
    sigmas: tuple[float, ...]
    text: PipelineText
    rows: slice
    scale: float
    guidance: Guidance | None = None
    progress: tuple[float, ...] = (0.0, 1.0)
    around: Around | None = None
    place: tuple[int, int] | None = None
    callbacks: bool = True
    first: int = 0


class PipelineEngine:
    """A loaded diffusers pipeline behind the `Engine` protocol; it runs whole stages itself (`StageEngine`).

    Latents are those of the pipeline's layout, normalised; images are RGB in [0, 1]. The modules run on the device and
    in the dtype that their owner gave them; what enters and leaves is float32 on `device`.

    Attributes:
        name: What records call the model.
        fingerprint: Identifies its weights; empty where unknown.
        rejected: Which images of the last `finish` the pipeline's safety checker made black; None where it has none.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        family: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        seeds: Sequence[int] | None = None,
        name: str = "pipeline",
        fingerprint: str = "",
        compiler: NetworkCompiler | None = None,
        lowered: LoweredNetworks | None = None,
        guided_by_two: bool = False,
        pictures: Pictures | None = None,
    ) -> None:
        """Borrow `pipe`, which stays as it is and stays usable.

        Args:
            pipe: A loaded text-to-image pipeline.
            family: Name of its family, where you know better than its class and configuration.
            arguments: Further keyword arguments of the pipeline's call, passed to it in every stage. `control_image`
                may be a function (width, height) -> hint, and is resized to the stage where it is a tensor.
            seeds: One per image, for what a pipeline draws besides the noise (a ControlNet hint's posterior); None: the
                images' numbers.
            name: What records call the model.
            fingerprint: Identifies its weights.
            compiler: Stages of more than `COMPILE_STEPS` steps run its twin of the network.
            lowered: Makes and keeps the network's twins in other precisions; None: one of its own.
            guided_by_two: Guidance takes a second branch although the family's does not (FLUX.1's true CFG).
            pictures: What the pipeline edits: references, or a picture and a mask.

        Raises:
            MrFlowError: The pipeline's stages cannot be run.
        """
        self._pipe = pipe
        self._compiler = compiler
        self._lowered = lowered or LoweredNetworks()
        self._precision = OWN
        layout = find_layout(view_of(as_pipeline(pipe)), family).for_arguments(arguments or {})
        self._layout = layout.guided_by_two() if guided_by_two else layout
        self._share_hooks(layout.pipe)  # a rehearsal has run
        self._arguments = dict(arguments or {})
        self._seeds = seeds
        self._pictures = pictures or Pictures()
        self._takes = picture_arguments(pipe)
        self._was_interrupted = interrupted(pipe)
        self.name = name
        self.fingerprint = fingerprint
        self.rejected: tuple[bool, ...] | None = None

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | Mapping[str, str] = "auto",
        family: str | None = None,
        offload: bool | Offload = False,
        config: str | Path | None = None,
    ) -> PipelineEngine:
        """Load any text-to-image folder of diffusers, or a single-file checkpoint.

        Args:
            path: The folder that holds model_index.json, or a .safetensors.
            device: "auto" (CUDA if available), or as torch spells it.
            dtype: As in `load_pipeline`.
            family: Name of the family; None: what the folder says (`_mrflow_family` in its model_index.json), else what
                its class and configurations imply.
            offload: As in `load_pipeline`.
            config: For a single file: the diffusers folder that describes it; None: one of the file's name beside it,
                else the folder it lies in.

        Returns:
            The engine, named after the folder or file.

        Raises:
            MrFlowError: A folder that is missing, incomplete, damaged or of no supported pipeline.
        """
        pipe = load_pipeline(path, device=device, dtype=dtype, offload=offload, config=config)
        pipe.set_progress_bar_config(disable=True)
        model = Path(path)
        return cls(pipe, family=family, name=model.resolve().name, fingerprint=model_fingerprint(model, config))

    @property
    def capabilities(self) -> Capabilities:
        """Whole stages, unless a subclass has its own `denoise`, which then is called at every step."""
        mine = type(self)
        whole = mine.denoise is PipelineEngine.denoise or mine.sample_stage is not PipelineEngine.sample_stage
        return Capabilities(
            whole_stages=whole,
            # Within the pipeline's loop, what one branch answers is needed for the other.
            guidance_per_step=whole and not self._layout.negative_call_first,
            counts_on=mine.sample_stage is PipelineEngine.sample_stage,
            network_seam=whole,
            token_subsets=whole and self._layout.tokens is not None and not self._pictures,
            tiles=True,
            places=whole and bool(parameter_names(self._forward) & set(POSITIONS)),
            precisions=whole,
            gradients=not isinstance(self._layout.pipe, ModularView),  # its blocks switch gradients off
            lora_scale=whole and self._lora_argument is not None,
            text_size=bool(self._layout.rewrite_switch),
            alpha=self._layout.keeps_alpha,
        )

    def in_precision(self, precision: str) -> PipelineEngine:
        """The same engine with its network in another precision.

        Args:
            precision: A name of `engines.diffusers.precision.PRECISIONS`, or "own".

        Returns:
            An engine that shares all with this one but the network, which is copied and quantised where it first runs.

        Raises:
            MrFlowError: The precision is unknown, or cannot be had on this device or of this network.
        """
        for name in self._layout.network_names:
            check_precision(precision, getattr(self._layout.pipe, name), self.device)
        engine = copy.copy(self)
        engine._precision = precision
        return engine

    @property
    def pipe(self) -> Any:
        """The pipeline that was given."""
        return self._pipe

    @property
    def layout(self) -> Layout:
        """The pipeline's conventions."""
        return self._layout

    @property
    def family(self) -> Family:
        """The family that plans for this pipeline, with the shift rule of its own scheduler."""
        return self._layout.family

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for whoever runs this pipeline: what its own sampler does and stages do not."""
        scheduler = self._layout.pipe.scheduler
        found: list[str | None] = [*self._layout.notes, sampler_note(scheduler)]
        if self.family.prediction != "flow":
            found.append(spacing_note(scheduler, self._arguments.get("eta")))
        return tuple(note for note in found if note is not None)

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs its networks, and so where latents and images live."""
        return self._layout.device

    @property
    def network(self) -> torch.nn.Module:
        """The pipeline's network, as its owner knows it."""
        return self._layout.network

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network."""
        return self._layout.dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        """Dtype of the VAE."""
        return self._layout.vae_dtype

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtype of each part that has weights, by the part's name: "transformer": "bfloat16", "vae": "float32", ..."""
        parts = {name: getattr(part, "dtype", None) for name, part in self._pipe.components.items()}
        return {
            name: str(dtype).removeprefix("torch.") for name, dtype in parts.items() if isinstance(dtype, torch.dtype)
        }

    @property
    def _forward(self) -> Any:
        """The network's `forward`, as its class has it."""
        kind = cast("Any", type(getattr(self.network, "_orig_mod", self.network)))  # inside torch.compile's
        return kind.forward

    @property
    def _lora_argument(self) -> str | None:
        """The argument of the pipeline's call that hands its network the scale of LoRAs; None where there is none."""
        if not parameter_names(self._forward) & set(SCALE_ARGUMENTS):
            return None  # FLUX.2's network has another of the names than its pipeline's call, but one it must have
        return next((name for name in SCALE_ARGUMENTS if name in self._layout.call_names), None)

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Shape of one image's latents.

        Args:
            width: In pixels, a multiple of the family's grid.
            height: Likewise.

        Returns:
            (C, h, w).

        Raises:
            MrFlowError: A size off the family's grid.
        """
        return self._layout.latent_shape(width, height)

    # ---------------------------------------------------------------------------------------------------------- text

    def encode_text(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None = None,
        *,
        lora_scale: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> PipelineText:
        """Embeddings for a batch of images; embeddings among the engine's arguments are used in their place.

        Its `notes` name text that has no effect (a negative prompt where none is used, the end of a long prompt), and
        are the engine's own besides.

        Args:
            prompts: One text per image.
            negative_prompts: As many, or None.
            lora_scale: Scale of all LoRAs of text encoders and network wherever this text is used; None: the scale
                among the engine's arguments, else 1.
            size: (width, height) of the final image in pixels, for pipelines that rewrite prompts; None: the usual.

        Returns:
            The conditioning, for `denoise` and `sample_stage`.

        Raises:
            MrFlowError: The number of images is no multiple of the given embeddings, or the pipeline cannot read the
                prompts: an argument about text, or a configuration of its tokenizers and text encoders, is wrong.
        """
        texts = [*prompts, *(negative_prompts or ())]
        with told(lambda error: unread_prompt(self._layout.pipe, texts, self._text_names, error)):
            return self._encoded(prompts, negative_prompts, lora_scale, size or self.family.native_size)

    @property
    def _text_names(self) -> list[str]:
        """Names of the caller's own arguments that are about text."""
        known = self._encoder_names
        return [name for name in self._arguments if name in known or _is_embedding(name) or name in SCALE_ARGUMENTS]

    @property
    def _encoder_names(self) -> frozenset[str]:
        """Arguments of the pipeline's `encode_prompt`; empty where it has none."""
        encode = getattr(self._layout.pipe, "encode_prompt", None)
        return frozenset() if encode is None else parameter_names(encode)

    def _encoded(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        lora_scale: float | None,
        size: tuple[int, int],
    ) -> PipelineText:
        """`encode_text`, with the errors of tokenizers and text encoders as they come."""
        longest = self._layout.text_length
        own = self._arguments if longest is None else {"max_sequence_length": longest, **self._arguments}
        options, lora_notes = self._lora_options(lora_scale)
        own = {**own, **options}
        given = given_embeddings(own)
        if given and len(prompts) % given:
            raise MrFlowError(f"prompt_embeds holds {given} prompts, which do not make {len(prompts)} images.")
        negatives = negative_prompts
        if given and negatives is not None:
            negatives = negatives[:: len(prompts) // given]
        if self._takes.read and not given and self._pictures:
            notes = *self.notes, *lora_notes, *self._text_notes(prompts, negatives, own)
            return PipelineText(texts_as_given(self._layout, prompts, negatives), len(prompts), options, notes)
        if "num_condition_images" in self._encoder_names:
            own["num_condition_images"] = len(self._pictures.references_at(*self.family.native_size))  # Z-Image-Omni
        try:
            with TOKENIZER_LOCK:
                read = prompts if given else self._layout.rewritten(prompts, own, size)
                text = self._layout.encode_text(None if given else read, negatives, own)
            if given:
                text |= {name: value for name, value in own.items() if _is_embedding(name) and value is not None}
                text = self._layout.select_text(text, [row * given // len(prompts) for row in range(len(prompts))])
        finally:
            self._free()
        notes = *self.notes, *lora_notes, *self._text_notes(() if given else read, negatives, own)
        return PipelineText(text, len(prompts), options, (*notes, *self._rewriting_notes(prompts, read)))

    def _lora_options(self, scale: float | None) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The argument of the pipeline's call that scales its LoRAs, empty for None; and a note where it has none."""
        name = self._lora_argument
        if scale is None or name is None:
            return {}, ()
        if not any(getattr(part, "peft_config", None) for part in self._pipe.components.values()):
            return {}, ("The pipeline has no LoRA loaded: the scale of LoRAs changes nothing.",)
        return {name: {**(self._arguments.get(name) or {}), "scale": scale}}, ()

    def _text_notes(self, prompts: Sequence[str], negatives: Sequence[str] | None, own: Mapping[str, Any]) -> list[str]:
        """What text has no effect: a negative prompt where none is used, the end of a long prompt."""
        notes: list[str] = []
        guided = self.family.guidance_kind == "cfg" or "true_cfg_scale" in own
        taken = "negative_prompt" in self._layout.call_names | self._encoder_names
        if not (guided and taken) and negatives is not None and any(text.strip() for text in negatives):
            whose = "a negative prompt of its own: yours" if guided else "no negative prompt: it"
            notes.append(f"{self.family.title} has {whose} was ignored.")
        with TOKENIZER_LOCK:
            cut = self._layout.cut_prompt(prompts, own)
        if cut is not None:
            notes.append(f"The prompt is {cut[0]} tokens long and the model reads {cut[1]}: its end was cut off.")
        return notes

    def _rewriting_notes(self, prompts: Sequence[str], read: Sequence[str]) -> list[str]:
        """What the pipeline made of prompts that it rewrote."""
        pairs = dict(zip(prompts, read, strict=True)).items()
        return [
            f"{type(self._pipe).__name__} rewrote the prompt as {quoted(new)}; {self._layout.rewrite_switch}=False "
            "leaves it as it is."
            for old, new in pairs
            if new != old
        ]

    # -------------------------------------------------------------------------------------------------------- images

    def encode(self, images: Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None) -> Tensor:
        """Normalised latents of images.

        Args:
            images: (B, 3, H, W) in [0, 1].
            posterior: "mode" takes the mode of the VAE's distribution, "sample" draws from it.
            seeds: One per image, for "sample".

        Returns:
            (B, C, h, w), float32, on the device of `images`.

        Raises:
            MrFlowError: An unknown posterior, or seeds that do not match the batch.
        """
        try:
            return self._layout.encode(images, posterior, seeds)
        finally:
            self._free()

    def decode(self, latents: Tensor) -> Tensor:
        """Images of normalised latents.

        Args:
            latents: (B, C, h, w).

        Returns:
            (B, 3, H, W), float32 in [0, 1], on the device of `latents`.
        """
        try:
            return self._layout.decode(latents)
        finally:
            self._free()

    def finish(self, images: Tensor) -> Tensor:
        """Apply what the pipeline does to its own final images: safety checker, watermark.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            In the same shape and range. Rejected images are black; `rejected` says which.
        """
        try:
            finished, self.rejected = self._layout.finish(images)
            return finished
        finally:
            self._free()

    def looking_at(self, pictures: Pictures) -> PipelineEngine:
        """This engine with pictures that its pipeline edits.

        Args:
            pictures: They take the place of the engine's own.

        Returns:
            An engine around the same pipeline.
        """
        other = copy.copy(self)
        other._pictures = pictures
        return other

    def in_tiles(self) -> PipelineEngine | None:
        """This engine with its VAE in tiles; the pipeline's own VAE keeps its setting.

        Returns:
            The tiling engine; None where the VAE cannot tile, or already does.
        """
        vae: Any = getattr(self._layout.pipe, "vae", None)
        if getattr(vae, "use_tiling", None) is not False:
            return None
        tiled = copy.copy(vae)  # a module of its own attributes around the same weights
        tiled.enable_tiling()
        other = copy.copy(self)
        other._layout = replace(self._layout, pipe=view_of(self._layout.pipe, vae=tiled))
        return other

    # ------------------------------------------------------------------------------------------------------ sampling

    def denoise(
        self,
        x: Tensor,
        sigma: Tensor,
        text: PipelineText,
        *,
        guidance: float,
        around: Around | None = None,
        place: tuple[int, int] | None = None,
    ) -> Tensor:
        """Clean estimate of noisy latents: a stage of one step, for which the pipeline's callbacks are not called.

        Where gradients are recorded, and `x` or a weight of the network requires them, a graph is kept.

        Args:
            x: (B, *latent_shape), float32.
            sigma: (B,), flow sigma or sigma_ve.
            text: What `encode_text` returned.
            guidance: The scale in force.
            around: As in `sample_stage`.
            place: Where `x` lies in a larger image, (row, column) of its first token; None: it is the image. Counts
                where the network's calls say positions (`Capabilities.places`).

        Returns:
            Clean latents in the shape of `x`, float32.
        """
        sigmas = [float(value) for value in sigma]
        flow = [value if self.family.prediction == "flow" else ve_to_sigma(value) for value in sigmas]
        whole = len(set(sigmas)) == 1 and self._layout.runs_together(text.arguments)
        rows = [slice(0, len(x))] if whole else [slice(row, row + 1) for row in range(len(x))]
        done = [
            self._stage(
                x[each],
                _Stage(
                    *("euler", (sigmas[each.start], 0.0), text, each, guidance),
                    # How far the run is is not known here: the noise already removed stands for it.
                    progress=(1.0 - flow[each.start],) * 2,
                    around=around,
                    place=place,
                    callbacks=False,
                ),
            )
            for each in rows
        ]
        return torch.cat(done)

    def sample_stage(
        self,
        solver: str,
        latents: Tensor,
        sigmas: Sequence[float],
        text: PipelineText,
        *,
        guidance: float | Guidance,
        progress: Sequence[float] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        around: Around | None = None,
        first: int = 0,
    ) -> Tensor:
        """Run one stage by the pipeline's own loop; a batch that does not fit into memory is run image by image.

        Args:
            solver: A name in `mrflow_sched.sampling.solvers.SOLVERS`.
            latents: (B, *latent_shape), float32, at `sigmas[0]`.
            sigmas: Strictly falling to 0, or a part of such a schedule: flow sigma, or sigma_ve for variance-exploding
                models.
            text: What `encode_text` returned.
            guidance: One scale, or a scale for each flow sigma.
            progress: For each of `sigmas`, the fraction of the whole run done when it is reached, from 0 to 1;
                ControlNet windows follow it. If None, the stage is the whole run.
            callback: Called after every evaluation; see `StageEngine.sample_stage`. The dict also has `forwards`, the
                network evaluations per image since the last call.
            around: Called in place of every call of the network (`mrflow_sched.sampling.network`).
            first: Evaluations of the stage that came before, where its sigmas are walked in several calls: what is told
                of steps counts on from there.

        Returns:
            The state at the end of `sigmas`, in the shape of `latents`, float32.

        Raises:
            Cancelled: The pipeline was interrupted (`_interrupt`).
            MrFlowError: Its call refused its arguments, or its loop ended before the last sigma.
            MemoryError: One image does not fit.
        """
        done: list[Tensor] = []
        scale, per_step = self._scales(solver, sigmas, guidance)
        behind = _even(len(sigmas)) if progress is None else tuple(progress)
        asked = _Stage(solver, tuple(sigmas), text, slice(None), scale, per_step, behind, around, first=first)

        def work(_engine: object, rows: slice) -> Tensor:
            for_batch = None if callback is None else _for_whole_batch(callback, latents, done, rows)
            done.append(self._stage(latents[rows], replace(asked, rows=rows), for_batch))
            return done[-1]

        if self._takes.singly or not self._layout.runs_together(text.arguments):
            for row in range(len(latents)):
                work(self, slice(row, row + 1))
            return torch.cat(done)
        width, height = self._pixels(latents)
        what = f"sampling one image of {width}x{height}"
        return within_memory(work, self, len(latents), what, tiles=False)

    def _scales(
        self, solver: str, sigmas: Sequence[float], guidance: float | Guidance
    ) -> tuple[float, Guidance | None]:
        """The scale to tell the pipeline, and that of each step where it is not the same throughout."""
        if not callable(guidance):
            return guidance, None
        flow = self.family.prediction == "flow"

        def at(sigma: float) -> float:
            return guidance(sigma if flow else ve_to_sigma(sigma))

        asked = [at(sigma) for sigma in evaluation_sigmas(solver, sigmas)]
        strongest = max(asked, key=self._layout.guidance_weight)
        return strongest, None if len(set(asked)) == 1 else at

    def _stage(
        self, latents: Tensor, asked: _Stage, callback: Callable[[dict[str, Any]], object] | None = None
    ) -> Tensor:
        """One stage of `latents` (the images `asked.rows` of the batch), by a view of the pipeline."""
        from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler

        layout = self._layout
        width, height = self._pixels(latents)
        counted = 0.0

        def after_evaluation(state: dict[str, Any]) -> None:
            nonlocal counted
            if interrupted(self._pipe) and not self._was_interrupted:
                raise Cancelled
            if callback is not None:
                tensors = {key: layout.unpack(state[key], width, height).float() for key in ("x", "denoised")}
                made, counted = seam.forwards - counted, seam.forwards
                callback({**state, **tensors, "images": len(latents), "forwards": made})

        scheduler = MrFlowScheduler.for_stage(
            layout.pipe.scheduler.config,
            layout.stage_sigmas(asked.sigmas),
            asked.solver,
            prediction=self.family.prediction,
            preserving=layout.preserving,
            start=layout.pack(latents),
            on_evaluation=after_evaluation,
        )
        view = view_of(layout.pipe, scheduler=scheduler, **layout.view_attributes(asked.scale, width, height))
        start = scheduler.to_loop(layout.pack(latents))
        if hasattr(view, "encode_prompt"):
            object.__setattr__(view, "encode_prompt", with_tokenizer_lock(view.encode_prompt))
        if layout.remembered is not None:
            encode = remembering(getattr(view, layout.remembered), asked.text.memory)
            object.__setattr__(view, layout.remembered, encode)
        if self._takes.noised:
            object.__setattr__(view, "prepare_latents", starting_at(view, start))
        elif layout.gives_state:
            object.__setattr__(view, "prepare_latents", returning(view.prepare_latents, start))
        if draws_freely(view) or (self._pictures and view.vae.dtype != layout.dtype):
            put_network(view, "vae", steady_vae(view.vae))
        mirror = Mirror(self._pipe, view)
        seam = self._seam(asked, scheduler, len(latents), mirror)
        for name in layout.network_names:
            network = getattr(layout.pipe, name)
            put_network(view, name, shell_of(network, seam.before(self._as_run(network, asked))))
        try:
            arguments = self._call(latents, asked, scheduler, width, height)
            with told(lambda error: unstarted(self._pipe, list(self._arguments), error), if_=lambda _: not seam.called):
                graph = self._wants_graph(latents)
                call = self._pictures.call_of(view, width, height, graph=graph) or _called(view, graph)
                call(**arguments)
        except BaseException:
            view.maybe_free_model_hooks()
            raise
        finally:
            mirror.end()
            self._share_hooks(view)
        if interrupted(view):
            raise Cancelled
        final = scheduler.final_state
        if final is None:
            made, wanted = scheduler.step_index or 0, len(scheduler.timesteps)
            names = ", ".join(self._arguments)
            advice = f"leave out what ends its loop early ({names})" if names else "use the pipeline by itself"
            raise MrFlowError(
                f"{type(self._pipe).__name__} ended a stage after {made} of {wanted} evaluations; {advice}."
            )
        return layout.unpack(final, width, height).float()

    def _seam(self, asked: _Stage, scheduler: MrFlowScheduler, batch: int, mirror: Mirror) -> NetworkSeam:
        """What runs in place of the network in a stage: guidance for each step, then the method's own function."""
        layout = self._layout
        first = _first_shown(self.network, scheduler) if asked.progress[0] > 0.0 else None

        def before() -> None:
            mirror.show(first if scheduler.current_evaluation == 0 else None)

        arounds = [asked.around] if asked.around is not None else []
        if asked.guidance is not None:
            arounds.insert(0, guided_per_step(asked.guidance, asked.scale, layout.guidance_weight))
        elif asked.scale == 1.0 and layout.always_guided:
            # The loop runs a branch that does not count: it gets the positive one's answer.
            arounds.insert(0, guided_per_step(lambda sigma: 1.0, 2.0, layout.guidance_weight))
        if asked.place is not None:
            arounds.append(moved_to(asked.place))
        return NetworkSeam(
            scheduler=scheduler,
            batch=batch,
            guided=self.family.guidance_kind == "cfg" and (asked.scale != 1.0 or layout.always_guided),
            layout=layout,
            first_image=asked.rows.start or 0,
            first=before,
            arounds=arounds,
        )

    def _as_run(self, network: torch.nn.Module, asked: _Stage) -> torch.nn.Module:
        """The owner's network, or its twin: in another precision, and compiled where the stage is long enough."""
        if self._precision != OWN:
            network = self._lowered(network, self._precision)
        if self._compiler is None or len(asked.sigmas) <= COMPILE_STEPS:
            return network
        return self._compiler(network)

    def _wants_graph(self, latents: Tensor) -> bool:
        """Whether a graph is kept: gradients are recorded, and the state or a weight requires them."""
        if not torch.is_grad_enabled():
            return False
        return latents.requires_grad or any(weight.requires_grad for weight in self.network.parameters())

    def _call(
        self, latents: Tensor, asked: _Stage, scheduler: MrFlowScheduler, width: int, height: int
    ) -> dict[str, Any]:
        """Keyword arguments of the view's call: text, guidance and sizes, the caller's own, and the fixed ones."""
        layout, names, text = self._layout, self._layout.call_names, asked.text
        chosen = range(len(text))[asked.rows]
        arguments = text.arguments if len(chosen) == len(text) else layout.select_text(text.arguments, chosen)
        seeds = self._seeds or range(len(text))
        # A pipeline without a generator would draw from the global one.
        drawn_with = [stage_seed(seeds[row], 0, 0, "hash") for row in chosen]
        generators = [torch.Generator().manual_seed(seed) for seed in drawn_with]
        draws = layout.gives_state or self._takes.noised
        always = {
            "num_inference_steps": len(asked.sigmas) - 1,
            **({} if draws else {"latents": layout.call_latents(scheduler.to_loop(latents))}),
            "generator": generators if len(generators) > 1 else generators[0],
            "output_type": "latent",
            "return_dict": False,
        }
        if (asked.around, asked.guidance, asked.place) != (None, None, None):
            always.update(layout.independent_calls)  # calls may be skipped, or made with other inputs
        own = self._own_arguments(asked, scheduler, width, height)
        told = layout.stage_arguments(arguments, asked.scale, width, height)
        made = {**told, **layout.drawn_arguments(arguments, drawn_with, width, height), **own, **always}
        return copy_containers({name: value for name, value in made.items() if name in names})

    def _own_arguments(self, asked: _Stage, scheduler: MrFlowScheduler, width: int, height: int) -> dict[str, Any]:
        """The caller's own arguments of the pipeline's call, as they are in this stage."""
        layout, batch = self._layout, len(asked.text)
        unread = self._takes.read and "prompt" in asked.text.arguments
        made_once = frozenset[str]() if unread else self._encoder_names  # part of the embeddings already
        encoded = made_once | {layout.rewrite_switch}
        own = {
            name: value
            for name, value in {**self._arguments, **asked.text.options}.items()
            if name not in encoded and not _is_embedding(name)
        }
        chosen = range(batch)[asked.rows]
        if own.get(HINT) is not None:
            own[HINT] = hint_for_stage(own[HINT], width, height, chosen, batch)
        if HINT in own and HINT not in layout.call_names:
            own["image"] = own.pop(HINT)  # its name in Stable Diffusion's ControlNet and T2I-Adapter pipelines
        own |= self._pictures.arguments(layout.pipe, width, height, chosen, batch)
        own |= _stage_windows(own, asked)
        callback: Any = own.pop("callback_on_step_end", None)
        if not asked.callbacks:
            callback = None
        if self._takes.noised:  # the loop changes the latents once more after its last step
            callback = callback or _nothing
            own["callback_on_step_end_tensor_inputs"] = ["latents", *own.get("callback_on_step_end_tensor_inputs", ())]
        if callback is not None:
            if hasattr(callback, "tensor_inputs"):  # diffusers' own callback classes declare theirs
                own["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
            own["callback_on_step_end"] = follow_last_change(callers_own(callback), scheduler, asked.first)
        return own

    def _pixels(self, latents: Tensor) -> tuple[int, int]:
        """(width, height) in pixels of the image whose latents (B, C, h, w) these are."""
        grid = self.family.grid
        _, rows, columns = self._layout.latent_shape(grid, grid)
        return int(latents.shape[-1]) * grid // columns, int(latents.shape[-2]) * grid // rows

    # ---------------------------------------------------------------------------------------------------- offloading

    def _free(self) -> None:
        """Let offloaded modules return to the CPU, as the pipeline's own call does at its end."""
        if getattr(self._pipe, "_all_hooks", None):
            view = view_of(self._pipe)
            view.maybe_free_model_hooks()
            self._share_hooks(view)

    def _share_hooks(self, view: Any) -> None:
        """Freeing makes new hooks on the modules; the pipeline's list must name the current ones."""
        if hasattr(self._pipe, "_all_hooks"):
            for holder in (self._pipe, self._layout.pipe):
                object.__setattr__(holder, "_all_hooks", view._all_hooks)


# -------------------------------------------------------------------------------------------------------------- helpers


def given_embeddings(arguments: Mapping[str, Any]) -> int:
    """How many prompts the given embeddings stand for.

    Args:
        arguments: Keyword arguments of a pipeline's call.

    Returns:
        Rows of the first tensor or list whose name starts with "prompt_embeds"; 0 where there is none.
    """
    found = (value for name, value in arguments.items() if name.startswith("prompt_embeds"))
    return next((len(value) for value in found if isinstance(value, (Tensor, list, tuple))), 0)  # pyright: ignore[reportUnknownArgumentType]


def _is_embedding(name: str) -> bool:
    return "prompt_embeds" in name or "prompt_cu_seqlens" in name


def _even(count: int) -> tuple[float, ...]:
    """`count` values from 0 to 1."""
    return tuple(index / max(count - 1, 1) for index in range(count))


def _called(view: Any, graph: bool) -> Callable[..., Any]:
    """The view's call; with a `graph`, the one inside the decorator that switches gradients off."""
    if not graph:
        return view
    inner: Any = getattr(type(view).__call__, "__wrapped__", type(view).__call__)
    return functools.partial(inner, view)


def _first_shown(network: Any, scheduler: MrFlowScheduler) -> Mapping[str, Any] | None:
    """What the owner is to show at the first evaluation of a later stage in addition; None for nothing.

    FasterCache assumes that a loop starts above its range of timesteps, and where one starts within that range it
    reuses values that it has not stored yet. It is shown the timestep at which full loops start, and so computes that
    evaluation whole.
    """
    hooks = getattr(network, "_diffusers_hook", None)
    if hooks is None or hooks.get_hook("faster_cache_denoiser") is None:
        return None
    return {"_current_timestep": torch.tensor(float(len(scheduler)))}


def _nothing(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {}


_WINDOW = ("control_guidance_start", "control_guidance_end")


def _stage_windows(own: Mapping[str, Any], asked: _Stage) -> dict[str, Any]:
    """The windows of ControlNets, which count over the whole run, as windows of this stage; empty where none is set."""
    start, end = (own.get(name) for name in _WINDOW)
    if start is None and end is None:
        return {}
    counts = [len(each) for each in (start, end) if isinstance(each, (list, tuple))]  # pyright: ignore[reportUnknownArgumentType]
    count = counts[0] if counts else 1
    pairs = zip(_each(start, 0.0, count), _each(end, 1.0, count), strict=True)
    per_step = evaluations_per_step(asked.solver)
    made = [stage_window(first, last, asked.progress, per_step) for first, last in pairs]
    values = [list(each) for each in zip(*made, strict=True)]
    return dict(zip(_WINDOW, values if counts else [value[0] for value in values], strict=True))


def _each(window: Any, absent: float, count: int) -> list[float]:
    if isinstance(window, (list, tuple)):
        return [float(each) for each in window]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return [absent if window is None else float(window)] * count


def _for_whole_batch(
    callback: Callable[[dict[str, Any]], object], latents: Tensor, done: Sequence[Tensor], rows: slice
) -> Callable[[dict[str, Any]], object]:
    """`callback` with tensors of the whole batch where only `rows` of it are evaluated.

    Finished images are passed as they are, images not yet begun as zeros, which decode to a plain colour.
    """
    if rows == slice(0, len(latents)):
        return callback
    later = torch.zeros_like(latents[rows.stop :])

    def called(state: dict[str, Any]) -> None:
        whole = {key: torch.cat([*done, state[key], later]) for key in ("x", "denoised")}
        callback({**state, **whole})

    return called
