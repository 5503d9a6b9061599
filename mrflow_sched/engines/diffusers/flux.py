"""FLUX.1 as an engine, built from the components of a diffusers `FluxPipeline` folder.

Only the components are used: transformer, VAE, two text encoders, two tokenizers. No scheduler and no pipeline takes
part, so no shift can be applied behind a plan's back and nothing has to be patched. Conventions (packing, position ids,
time and guidance embeddings, latent scaling) are those of `diffusers.pipelines.flux.pipeline_flux`; tests hold the two
together.

diffusers and transformers are imported when a folder is loaded, never when this module is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mrflow_sched._runtime.device import has_bfloat16, resolve_device
from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.plan.families import Family, get_family

PATCH = 2
"""Latent pixels per side of one token."""

MAX_TEXT_TOKENS = 512
"""Longest T5 prompt FLUX.1 was trained on (`max_sequence_length` of the pipeline)."""

_MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FluxText:
    """Conditioning of a batch: CLIP's pooled vector (B, P) and T5's token states (B, T, C), in the network's dtype."""

    pooled: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return self.pooled.shape[0]


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`"auto"` is bfloat16 where the hardware multiplies it (`has_bfloat16`), else float32.

    Raises ValueError for an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if dtype not in _DTYPES:
        raise MrFlowError(f"dtype is {dtype!r}; use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


class FluxEngine:
    """FLUX.1 (dev, schnell, Krea, or any model in the same layout) behind the `Engine` protocol.

    Latents are (16, H/f, W/f) per image, normalised by the VAE's own shift and scaling factor; images are RGB in
    [0, 1]. The network runs in `dtype`, the VAE in `vae_dtype`; what enters and leaves is float32 on `device`.
    """

    def __init__(
        self,
        *,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        family: Family,
        name: str = "FLUX.1",
        fingerprint: str = "",
        offload_text: bool = False,
    ) -> None:
        """Wrap loaded components, which are used as they are and never changed; `from_folder` is the usual way in.

        With `offload_text` the text encoders wait on the CPU and visit the device only while prompts are encoded.
        Raises ValueError when the components do not have the latent layout that `family` describes.
        """
        self._transformer, self._vae = transformer, vae
        self._clip, self._t5 = text_encoder, text_encoder_2
        self._clip_tokenizer, self._t5_tokenizer = tokenizer, tokenizer_2
        self._family = family
        self.name = name
        self.fingerprint = fingerprint
        self._offload_text = offload_text
        self.text_tokens = min(MAX_TEXT_TOKENS, family.text_tokens, int(tokenizer_2.model_max_length))
        self._embeds_guidance = bool(transformer.config.guidance_embeds)
        _check_layout(family, vae, transformer)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        vae_dtype: str | torch.dtype = "auto",
        family: str | None = None,
        offload_text: bool = False,
    ) -> FluxEngine:
        """Load a `FluxPipeline` folder from disk; nothing is downloaded and only safetensors are read.

        `family` names the model's family; left out, it is what the folder says under `_mrflow_family` in its
        model_index.json, else flux1-dev or flux1-schnell by whether the network embeds guidance. `dtype` is the
        network's and the text encoders'; `vae_dtype="auto"` is float32 on a CPU and `dtype` elsewhere.
        Raises ValueError, in one sentence, for a folder that is missing, incomplete, damaged or of another model.
        """
        folder = Path(path)
        read_family(folder)
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        vae_kind = (torch.float32 if where.type == "cpu" else kind) if vae_dtype == "auto" else vae_dtype
        kinds = dict.fromkeys(_MODELS, kind) | {"vae": resolve_dtype(vae_kind, where)}
        text_home = torch.device("cpu") if offload_text else where
        homes = dict.fromkeys(_MODELS, where) | {"text_encoder": text_home, "text_encoder_2": text_home}
        parts = {part: _load(folder, part, kinds[part], homes[part]) for part in _MODELS}
        parts |= {part: _load_tokenizer(folder, part) for part in _TOKENIZERS}
        return cls(
            **parts,
            family=get_family(family or read_family(folder)),
            name=folder.resolve().name,
            fingerprint=folder_fingerprint(folder),
            offload_text=offload_text,
        )

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, family: str | None = None) -> FluxEngine:
        """Borrow the components of a loaded diffusers `FluxPipeline`; the pipeline stays as it is and stays usable."""
        parts = {part: getattr(pipeline, part) for part in (*_MODELS, *_TOKENIZERS)}
        return cls(**parts, family=get_family(family or _guess_family(parts["transformer"])), name="pipeline")

    @property
    def family(self) -> Family:
        """The family whose numbers plan for this model."""
        return self._family

    @property
    def device(self) -> torch.device:
        """Where the network is, and so where latents and images live."""
        return _home(self._transformer)[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights and activations."""
        return _home(self._transformer)[1]

    @property
    def vae_dtype(self) -> torch.dtype:
        """Dtype of the VAE's weights and activations."""
        return _home(self._vae)[1]

    def encode_text(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> FluxText:
        """CLIP's pooled vector and T5's states for each prompt; equal prompts are encoded once, each prompt by itself.

        `negative_prompts` are ignored with a warning: guidance is a number that the network reads, not a second branch.
        A prompt longer than the text encoder reads is cut, with a warning that says how much.
        """
        if negative_prompts is not None and any(text.strip() for text in negative_prompts):
            warnings.warn(f"{self.family.title} has no negative prompt: it was ignored.", stacklevel=2)
        with self._text_on_device() as where, torch.no_grad():
            known = {prompt: self._encode_one(prompt, where) for prompt in dict.fromkeys(prompts)}
        rows = [known[prompt] for prompt in prompts]
        pooled, tokens = (torch.cat(part).to(self.device, self.dtype) for part in zip(*rows, strict=True))
        return FluxText(pooled, tokens)

    def _encode_one(self, prompt: str, where: torch.device) -> tuple[Tensor, Tensor]:
        clip_length = int(self._clip_tokenizer.model_max_length)
        ids = _token_ids(self._clip_tokenizer, prompt, clip_length)
        pooled: Tensor = self._clip(ids.to(where), output_hidden_states=False).pooler_output
        ids = _token_ids(self._t5_tokenizer, prompt, self.text_tokens)
        wanted = len(self._t5_tokenizer(prompt, verbose=False).input_ids)
        if wanted > self.text_tokens:
            warnings.warn(
                f"The prompt is {wanted} tokens long and the model reads {self.text_tokens}: its end was cut off.",
                stacklevel=4,
            )
        tokens: Tensor = self._t5(ids.to(where), output_hidden_states=False)[0]
        return pooled, tokens

    @contextlib.contextmanager
    def _text_on_device(self) -> Generator[torch.device, None, None]:
        if not self._offload_text:
            yield _home(self._t5)[0]
            return
        try:
            self._clip.to(self.device)
            self._t5.to(self.device)
            yield self.device
        finally:
            self._clip.to("cpu")
            self._t5.to("cpu")

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of one image's latents. Raises ValueError off the grid of `family.grid` pixels."""
        grid = self.family.grid
        if width < grid or height < grid or width % grid or height % grid:
            raise MrFlowError(
                f"size is {width}x{height}; {self.family.title} makes positive multiples of {grid} pixels per side."
            )
        factor = self.family.vae_factor
        return (self.family.latent_channels, height // factor, width // factor)

    def denoise(self, x: Tensor, sigma: Tensor, text: FluxText, *, guidance: float) -> Tensor:
        """Clean estimate x - sigma * velocity, in float32; one forward of the network for the whole batch.

        `x` is (B, C, rows, columns) float32 at flow sigma `sigma` (B,) in (0, 1]. `guidance` is the embedded guidance
        scale, ignored by networks that embed none (schnell).
        """
        rows, columns = x.shape[-2:]
        # Position ids stay float32: bfloat16 counts exactly only to 256, which a 4096 pixel side reaches.
        ids = _position_ids(rows // PATCH, columns // PATCH, x.device)
        scale = torch.full_like(sigma, guidance, dtype=torch.float32) if self._embeds_guidance else None
        with _gradient_of(x):
            velocity: Tensor = self._transformer(
                hidden_states=pack(x).to(self.dtype),
                timestep=sigma.to(torch.float32),  # the network multiplies by 1000 itself
                guidance=scale,
                pooled_projections=text.pooled,
                encoder_hidden_states=text.tokens,
                txt_ids=ids.new_zeros(text.tokens.shape[1], 3),
                img_ids=ids,
                return_dict=False,
            )[0]
            return x - sigma.view(-1, 1, 1, 1).to(x.dtype) * unpack(velocity.to(x.dtype), rows, columns)

    def encode(self, images: Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None) -> Tensor:
        """Normalised latents (z - shift_factor) * scaling_factor of images in [0, 1], one image at a time.

        `posterior="mode"` takes the centre of the VAE's distribution; "sample" draws from it with one CPU generator per
        image from `seeds`. Raises ValueError for another word or for seeds that do not match the batch.
        """
        if posterior not in ("mode", "sample"):
            raise MrFlowError(f"posterior is {posterior!r}; use mode or sample.")
        if posterior == "sample" and (seeds is None or len(seeds) != len(images)):
            raise MrFlowError(
                f"seeds is {seeds!r}; sampling the posterior needs one seed for each of {len(images)} images."
            )
        latents: list[Tensor] = []
        with _gradient_of(images):
            for number, image in enumerate(images):
                pixels = (2 * image[None] - 1).to(self.device, self.vae_dtype)
                spread = self._vae.encode(pixels).latent_dist
                centre: Tensor = spread.mode().float()
                if posterior == "sample" and seeds is not None:
                    noise = torch.randn(centre.shape, generator=torch.Generator().manual_seed(seeds[number]))
                    centre = centre + spread.std.float() * noise.to(centre)
                latents.append((centre - self._shift) * self._scale)
        return torch.cat(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1] of normalised latents, one at a time, as activations fill memory."""
        images: list[Tensor] = []
        with _gradient_of(latents):
            for latent in latents:
                values = (latent[None].float() / self._scale + self._shift).to(self.device, self.vae_dtype)
                pixels: Tensor = self._vae.decode(values, return_dict=False)[0]
                images.append((pixels.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    @property
    def _shift(self) -> float:
        return float(self._vae.config.shift_factor or 0.0)

    @property
    def _scale(self) -> float:
        return float(self._vae.config.scaling_factor)


def pack(latents: Tensor) -> Tensor:
    """(B, C, 2h, 2w) latents as (B, h*w, 4C) tokens: each token is a 2x2 patch, channel outermost (FLUX.1's order)."""
    batch, channels, rows, columns = latents.shape
    patches = latents.reshape(batch, channels, rows // PATCH, PATCH, columns // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `pack`: (B, rows/2 * columns/2, 4C) tokens as (B, C, rows, columns) latents."""
    batch, _, features = tokens.shape
    channels = features // (PATCH * PATCH)
    patches = tokens.reshape(batch, rows // PATCH, columns // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows, columns)


def _position_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows*columns, 3) float32 token positions: (0, row, column), row by row."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None, :]
    return ids.reshape(-1, 3)


def read_family(folder: str | Path) -> str:
    """Name of the family that a model folder is of, from its small files alone, so that plans need no loading.

    Raises ValueError for a folder that is missing, incomplete or of another model.
    """
    root = Path(folder)
    index = _read_index(root)
    if "_mrflow_family" in index:
        return str(index["_mrflow_family"])
    try:
        config: Any = json.loads((root / "transformer" / "config.json").read_text(encoding="utf-8"))
        embeds_guidance = bool(config.get("guidance_embeds", False))
    except (OSError, ValueError, AttributeError) as error:
        raise MrFlowError(
            f"model is {str(root)!r}, whose transformer/config.json cannot be read; download it again."
        ) from error
    return "flux1-dev" if embeds_guidance else "flux1-schnell"


def folder_fingerprint(folder: str | Path, parts: Sequence[str] = (*_MODELS, *_TOKENIZERS)) -> str:
    """16 hex digits that change with the configuration or weights of a folder's `parts`, without reading gigabytes.

    Hashes every .json and .txt whole and, of each .safetensors, its size, first and last 64 KiB.
    """
    root, digest, edge = Path(folder), hashlib.sha256(), 65536
    for part in parts:
        for file in sorted(
            path for path in (root / part).glob("*") if path.suffix in (".json", ".txt", ".safetensors")
        ):
            size = file.stat().st_size
            digest.update(f"{part}/{file.name}:{size}\n".encode())
            with file.open("rb") as stream:
                if file.suffix != ".safetensors" or size <= 2 * edge:
                    digest.update(stream.read())
                    continue
                digest.update(stream.read(edge))
                stream.seek(-edge, 2)
                digest.update(stream.read(edge))
    return digest.hexdigest()[:16]


def _gradient_of(x: Tensor) -> torch.set_grad_enabled:
    """Keep a graph only where the caller asked for gradients of `x`: weights that ask for theirs are not a reason."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad)


def _home(module: Any) -> tuple[torch.device, torch.dtype]:
    first: Tensor = next(module.parameters())
    return first.device, first.dtype


def _token_ids(tokenizer: Any, prompt: str, length: int) -> Tensor:
    found = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = found.input_ids
    return ids


def _check_layout(family: Family, vae: Any, transformer: Any) -> None:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    channels = int(transformer.config.in_channels) // PATCH**2
    wanted = (family.vae_factor, family.latent_channels)
    if (factor, channels) != wanted or int(vae.config.latent_channels) != channels:
        raise MrFlowError(
            f"family is {family.name!r} with a VAE factor of {wanted[0]} and {wanted[1]} latent channels, the model "
            f"has {factor}, {vae.config.latent_channels} (VAE) and {channels} (network); name the family it is of."
        )


def _guess_family(transformer: Any) -> str:
    return "flux1-dev" if transformer.config.guidance_embeds else "flux1-schnell"


def _read_index(folder: Path) -> Mapping[str, Any]:
    """The folder's model_index.json, once every component is seen to be there."""
    advice = "give a local diffusers FLUX.1 folder, the one that holds model_index.json"
    if not folder.is_dir():
        raise MrFlowError(f"model is {str(folder)!r}, which is not a folder; {advice}.")
    try:
        index: Any = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MrFlowError(f"model is {str(folder)!r}, which has no model_index.json; {advice}.") from None
    except (OSError, ValueError) as error:
        raise MrFlowError(f"model is {str(folder)!r}, whose model_index.json cannot be read; {advice}.") from error
    entries = cast("dict[str, Any]", index) if isinstance(index, dict) else {"_class_name": None}
    made_for = entries.get("_class_name", "FluxPipeline")
    if made_for != "FluxPipeline":
        raise MrFlowError(f"model is {str(folder)!r}, made for {made_for} and not for FluxPipeline; {advice}.")
    missing = [part for part in (*_MODELS, *_TOKENIZERS) if not (folder / part).is_dir()]
    missing += [f"{part}/config.json" for part in _MODELS if part not in missing and not _has_config(folder / part)]
    missing += [name for part in _MODELS if part not in missing for name in _missing_weights(folder / part)]
    if missing:
        raise MrFlowError(
            f"model is {str(folder)!r}, which lacks {', '.join(missing)}; download it whole and try again."
        )
    return entries


def _has_config(part: Path) -> bool:
    return (part / "config.json").is_file()


def _missing_weights(part: Path) -> list[str]:
    """Names of the weight files that a component needs and does not have."""
    indexes = sorted(part.glob("*.safetensors.index.json"))
    if not indexes:
        return [] if any(part.glob("*.safetensors")) else [f"{part.name}/*.safetensors"]
    try:
        shards = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return [f"{part.name}/{indexes[0].name} in readable form"]
    return [f"{part.name}/{shard}" for shard in sorted(shards) if not (part / shard).is_file()]


def _load(folder: Path, part: str, dtype: torch.dtype, device: torch.device) -> Any:
    """One component, ready to run on its device; a weight that the file does not have is an error, never a guess."""
    model_class, dtype_word = _model_class(part)
    try:
        with quiet_loading():
            model, report = model_class.from_pretrained(
                folder / part,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **{dtype_word: dtype},
            )
    except Exception as error:  # whatever a reader of a damaged file may raise: several libraries are involved
        raise MrFlowError(
            f"model is {str(folder)!r}, whose {part} cannot be read ({first_line(error)}); download it again."
        ) from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise MrFlowError(f"model is {str(folder)!r}, whose {part} lacks {len(lacking)} weights, first {lacking[0]!r}.")
    model = model.eval().requires_grad_(False).to(device)
    # Channels last: convolutions of a VAE run about twice as fast on a CPU, and no slower on a GPU.
    return model.to(memory_format=torch.channels_last) if part == "vae" else model


def dtype_word(library: Any) -> str:
    """The word by which a loader of diffusers or transformers is told the dtype; the old one warns once it is old."""
    renamed = {"diffusers": (0, 42), "transformers": (4, 56)}[library.__name__]
    return "dtype" if tuple(int(part) for part in library.__version__.split(".")[:2]) >= renamed else "torch_dtype"


def _model_class(part: str) -> tuple[Any, str]:
    """The class that a component is of, and the word by which its loader is told the dtype."""
    prepare_imports()
    import diffusers
    import transformers

    if part == "transformer":
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        return FluxTransformer2DModel, dtype_word(diffusers)
    if part == "vae":
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return AutoencoderKL, dtype_word(diffusers)
    return (transformers.CLIPTextModel if part == "text_encoder" else transformers.T5EncoderModel), dtype_word(
        transformers
    )


def _load_tokenizer(folder: Path, part: str) -> Any:
    prepare_imports()
    import transformers

    library: Any = transformers  # its lazy module hides names from type checkers
    kind = library.CLIPTokenizer if part == "tokenizer" else library.T5TokenizerFast
    try:
        with quiet_loading():
            return kind.from_pretrained(folder / part, local_files_only=True)
    except Exception as error:
        raise MrFlowError(
            f"model is {str(folder)!r}, whose {part} cannot be read ({first_line(error)}); download it again."
        ) from error


def prepare_imports() -> None:
    """diffusers and transformers import torchvision, which fails where its operators do not match torch."""
    from mrflow_sched._runtime import torchvision_ops as _torchvision_ops

    _torchvision_ops.ensure_ops()


@contextlib.contextmanager
def quiet_loading() -> Generator[None, None, None]:
    """Silence the loaders' progress bars and notes, and give both libraries back the settings they had."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    # The oldest diffusers we support cannot say whether its bars are on; they are unless somebody turned them off.
    before = [(each.get_verbosity(), getattr(each, "is_progress_bar_enabled", lambda: True)()) for each in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
        yield
    finally:
        for logger, (verbosity, bars) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if bars:
                logger.enable_progress_bar()
