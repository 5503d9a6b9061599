"""Any diffusers text-to-image pipeline as an engine: the pipeline's own loop runs every stage, on our scheduler.

For each stage a *view* of the pipeline is made: a shallow copy, whose modules are the pipeline's own and whose
scheduler is an `MrFlowScheduler` that walks the plan's list and nothing else. Calling the view does all in which
families differ: position ids, guidance of either kind, attention masks, ControlNet, IP adapters, LoRA scales, hooks of
offloading, callbacks. What the call sets (scales, the step it is at, an interrupt) it sets on the view. The pipeline
itself is not written to, so two threads can use one pipeline.

diffusers is imported when a folder is loaded or a stage is run, never when this module is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrflow_sched._runtime.cancel import Cancelled
from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.compiled import COMPILE_STEPS, NetworkCompiler
from mrflow_sched.engines.diffusers.flux import (
    folder_fingerprint,
)
from mrflow_sched.engines.diffusers.folder import load_pipeline
from mrflow_sched.engines.diffusers.layouts import Layout, find_layout
from mrflow_sched.engines.diffusers.layouts.base import takes
from mrflow_sched.engines.diffusers.layouts.known import FluxLayout
from mrflow_sched.engines.diffusers.view import (
    HINT,
    TOKENIZER_LOCK,
    compile_network,
    hint_for_stage,
    interrupted,
    one_at_a_time,
    own_dicts,
    view_of,
)
from mrflow_sched.plan.families import Family
from mrflow_sched.sampling.memory import within_memory
from mrflow_sched.sampling.noise import stage_seed

_T5_TOKENS = 512
"""What FLUX.1's pipelines pad T5's tokens to, unless told otherwise."""


@dataclass(frozen=True)
class PipelineText:
    """Conditioning of a batch of `batch` images: keyword arguments of the pipeline's call, embeddings made once."""

    arguments: Mapping[str, Any]
    batch: int

    def __len__(self) -> int:
        return self.batch


class PipelineEngine:
    """A loaded diffusers pipeline behind the `Engine` protocol; it runs whole stages itself (`StageEngine`).

    Latents are those of the pipeline's layout, normalised; images are RGB in [0, 1]. The modules run where and in the
    dtype that their owner gave them; what enters and leaves is float32 on `device`.
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
    ) -> None:
        """Borrow `pipe`, which stays as it is and stays usable.

        `arguments` are further keyword arguments of the pipeline's call, given to it in every stage: `control_image`
        may be a function (width, height) -> hint, and is resized to the stage where it is a tensor. `seeds`, one per
        image, are for what a pipeline draws besides the noise (a ControlNet hint's posterior); left out, they are the
        images' numbers. With a `compiler`, stages of several steps run its twin of the network. Raises ValueError, one
        sentence, for a pipeline whose stages cannot be run.
        """
        self._pipe = pipe
        self._compiler = compiler
        self._layout = find_layout(view_of(pipe), family)
        self._arguments = dict(arguments or {})
        self._seeds = seeds
        self._was_interrupted = interrupted(pipe)
        self.name = name
        self.fingerprint = fingerprint

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        family: str | None = None,
        offload: bool = False,
    ) -> PipelineEngine:
        """Load any text-to-image folder of diffusers (`load_pipeline`, same arguments and errors)."""
        pipe = load_pipeline(path, device=device, dtype=dtype, offload=offload)
        folder = Path(path)
        parts = [part.name for part in sorted(folder.iterdir()) if part.is_dir()]
        return cls(pipe, family=family, name=folder.resolve().name, fingerprint=folder_fingerprint(folder, parts))

    @property
    def pipe(self) -> Any:
        """The pipeline as its owner knows it."""
        return self._pipe

    @property
    def layout(self) -> Layout:
        """The pipeline's conventions."""
        return self._layout

    @property
    def family(self) -> Family:
        """The family whose numbers plan for this pipeline, with the shift rule of its own scheduler."""
        return self._layout.family

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs its networks, and so where latents and images live."""
        return self._layout.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network."""
        return getattr(self._layout.pipe, self._network).dtype

    @property
    def _network(self) -> str:
        """What the pipeline calls its network."""
        return "unet" if getattr(self._layout.pipe, "transformer", None) is None else "transformer"

    @property
    def vae_dtype(self) -> torch.dtype:
        """Dtype of the VAE."""
        return self._layout.pipe.vae.dtype

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """(C, h, w) of one image's latents. Raises ValueError off the family's grid."""
        return self._layout.latent_shape(width, height)

    def encode_text(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> PipelineText:
        """Embeddings for a batch of `len(prompts)` images; embeddings among the engine's arguments take their place."""
        own = self._arguments
        longest = getattr(getattr(self._pipe, "tokenizer_2", None), "model_max_length", None)
        if isinstance(self._layout, FluxLayout) and longest is not None and longest < _T5_TOKENS:
            own = {"max_sequence_length": int(longest), **own}  # a network made for shorter texts than the default
        given = given_embeddings(own)
        if given and len(prompts) % given:
            raise MrFlowError(f"prompt_embeds holds {given} prompts, which do not make {len(prompts)} images.")
        told = negative_prompts
        if given and told is not None:
            told = told[:: len(prompts) // given]
        try:
            with TOKENIZER_LOCK:
                text = self._layout.encode_text(None if given else prompts, told, own)
            if given:
                text |= {name: value for name, value in own.items() if _is_embedding(name) and value is not None}
                text = self._layout.select_text(text, [row * given // len(prompts) for row in range(len(prompts))])
        finally:
            self._free()
        return PipelineText(text, len(prompts))

    def encode(self, images: Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None) -> Tensor:
        """Normalised latents of images in [0, 1]; see `Layout.encode`."""
        try:
            return self._layout.encode(images, posterior, seeds)
        finally:
            self._free()

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1] of normalised latents."""
        try:
            return self._layout.decode(latents)
        finally:
            self._free()

    def finish(self, images: Tensor) -> Tensor:
        """Final images in [0, 1] with what the pipeline does to its own: safety checker, watermark."""
        try:
            return self._layout.finish(images)
        finally:
            self._free()

    def in_tiles(self) -> PipelineEngine | None:
        """This engine with its VAE in tiles, or None where it cannot; the pipeline's own VAE keeps its setting."""
        vae = self._layout.pipe.vae
        if getattr(vae, "use_tiling", None) is not False:
            return None
        tiled = copy.copy(vae)  # a module of its own attributes around the same weights
        tiled.enable_tiling()
        other = copy.copy(self)
        other._layout = replace(self._layout, pipe=view_of(self._layout.pipe, vae=tiled))
        return other

    # ------------------------------------------------------------------------------------------------------ sampling

    def denoise(self, x: Tensor, sigma: Tensor, text: PipelineText, *, guidance: float) -> Tensor:
        """Clean estimate of `x` (B, *latent_shape) at `sigma` (B,): a stage of one step. Keeps no gradients."""
        levels = [float(level) for level in sigma]
        if len(set(levels)) == 1:
            return self._stage("euler", x, (levels[0], 0.0), text, guidance, slice(None), None)
        one_by_one = range(len(x))
        return torch.cat(
            [
                self._stage("euler", x[row : row + 1], (levels[row], 0.0), text, guidance, slice(row, row + 1), None)
                for row in one_by_one
            ]
        )

    def sample_stage(
        self,
        solver: str,
        latents: Tensor,
        sigmas: Sequence[float],
        text: PipelineText,
        *,
        guidance: float,
        callback: Callable[[dict[str, Any]], object] | None = None,
    ) -> Tensor:
        """The state at the end of `sigmas`, by the pipeline's own loop; see `StageEngine.sample_stage`.

        A batch that does not fit into memory goes through image by image. The dict that `callback` hears has one more
        key: `images`, how many images this evaluation was of. Raises `Cancelled` where the pipeline was interrupted
        (`_interrupt`), and MemoryError where one image does not fit.
        """
        done: list[Tensor] = []

        def work(_engine: object, rows: slice) -> Tensor:
            hear = None if callback is None else _for_whole_batch(callback, latents, done, rows)
            done.append(self._stage(solver, latents[rows], sigmas, text, guidance, rows, hear))
            return done[-1]

        width, height = self._pixels(latents)
        what = f"sampling one image of {width}x{height}"
        return within_memory(work, self, len(latents), what, tiles=False)

    def _stage(
        self,
        solver: str,
        latents: Tensor,
        sigmas: Sequence[float],
        text: PipelineText,
        guidance: float,
        rows: slice,
        callback: Callable[[dict[str, Any]], object] | None,
    ) -> Tensor:
        """One stage of the images `rows` of the batch, by a view of the pipeline."""
        from mrflow_sched.engines.diffusers.scheduler import MrFlowScheduler

        layout = self._layout
        width, height = self._pixels(latents)

        def heard(state: dict[str, Any]) -> None:
            if interrupted(self._pipe) and not self._was_interrupted:
                raise Cancelled
            if callback is not None:
                tensors = {key: layout.unpack(state[key], width, height).float() for key in ("x", "denoised")}
                callback({**state, **tensors, "images": len(latents)})

        scheduler = MrFlowScheduler.for_stage(
            layout.pipe.scheduler.config,
            sigmas,
            solver,
            prediction=self.family.prediction,
            start=layout.pack(latents),
            on_evaluation=heard,
        )
        view = view_of(layout.pipe, scheduler=scheduler, **layout.view_attributes(guidance, width, height))
        if self._compiler is not None and len(sigmas) > COMPILE_STEPS:
            compile_network(view, self._network, self._compiler)
        object.__setattr__(view, "encode_prompt", one_at_a_time(view.encode_prompt))
        try:
            view(**self._call(latents, sigmas, text, guidance, rows, width, height))
        except BaseException:
            view.maybe_free_model_hooks()
            raise
        finally:
            self._share_hooks(view)
        if interrupted(view):
            raise Cancelled
        final = scheduler.final_state
        if final is None:
            made, wanted = scheduler.step_index or 0, len(scheduler.timesteps)
            raise RuntimeError(f"{type(self._pipe).__name__} made {made} of {wanted} evaluations of a stage.")
        return layout.unpack(final, width, height).float()

    def _call(
        self,
        latents: Tensor,
        sigmas: Sequence[float],
        text: PipelineText,
        guidance: float,
        rows: slice,
        width: int,
        height: int,
    ) -> dict[str, Any]:
        """Keyword arguments of the view's call: text, guidance and sizes, the caller's own, and what is always so."""
        layout, names = self._layout, self._layout.call_names
        chosen = range(len(text))[rows]
        arguments = text.arguments if len(chosen) == len(text) else layout.select_text(text.arguments, chosen)
        said = takes(layout.pipe.encode_prompt)  # is in the embeddings already
        own = {name: value for name, value in self._arguments.items() if name not in said and not _is_embedding(name)}
        if own.get(HINT) is not None:
            own[HINT] = hint_for_stage(own[HINT], width, height, chosen, len(text))
        seeds = self._seeds or range(len(text))
        # A pipeline without a generator would draw from the global one.
        generators = [torch.Generator().manual_seed(stage_seed(seeds[row], 0, 0, "hash")) for row in chosen]
        always = {
            "num_inference_steps": len(sigmas) - 1,
            "latents": layout.call_latents(latents),
            "generator": generators if len(generators) > 1 else generators[0],
            "output_type": "latent",
            "return_dict": False,
        }
        if HINT in own and HINT not in names:
            own["image"] = own.pop(HINT)  # the word of Stable Diffusion's ControlNet pipelines
        made = {**layout.stage_arguments(arguments, guidance, width, height), **own_dicts(own), **always}
        return {name: value for name, value in made.items() if name in names}

    def _pixels(self, latents: Tensor) -> tuple[int, int]:
        """(width, height) of the image that latents (B, C, h, w) are of."""
        grid = self.family.grid
        _, rows, columns = self._layout.latent_shape(grid, grid)
        return int(latents.shape[-1]) * grid // columns, int(latents.shape[-2]) * grid // rows

    # ---------------------------------------------------------------------------------------------------- offloading

    def _free(self) -> None:
        """Let offloaded modules go home, as the pipeline's own call does at its end."""
        if getattr(self._pipe, "_all_hooks", None):
            view = view_of(self._pipe)
            view.maybe_free_model_hooks()
            self._share_hooks(view)

    def _share_hooks(self, view: Any) -> None:
        """Freeing makes new hooks on the modules; the pipeline's list must name those that are there."""
        if hasattr(self._pipe, "_all_hooks"):
            for holder in (self._pipe, self._layout.pipe):
                object.__setattr__(holder, "_all_hooks", view._all_hooks)


def given_embeddings(arguments: Mapping[str, Any]) -> int:
    """How many prompts the ready embeddings among `arguments` stand for; 0 where there are none."""
    found = (value for name, value in arguments.items() if name.startswith("prompt_embeds") and value is not None)
    return next((len(value) for value in found if not isinstance(value, dict)), 0)


def _is_embedding(name: str) -> bool:
    return "prompt_embeds" in name


def _for_whole_batch(
    callback: Callable[[dict[str, Any]], object], latents: Tensor, done: Sequence[Tensor], rows: slice
) -> Callable[[dict[str, Any]], object]:
    """`callback` with tensors of the whole batch where only `rows` of it are at work: finished images as they are,
    images not yet begun as zeros, which decode to a plain colour."""
    if rows == slice(0, len(latents)):
        return callback
    later = torch.zeros_like(latents[rows.stop :])

    def hear(state: dict[str, Any]) -> None:
        whole = {key: torch.cat([*done, state[key], later]) for key in ("x", "denoised")}
        callback({**state, **whole})

    return hear
