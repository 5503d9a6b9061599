"""What this host and the loaded model can do, found by looking at their objects, never at a version number.

Three kinds of host meet here. New Forge (Forge main, Neo): `sd_model.forge_objects.unet.model.predictor` exists and
mixes noise as the model expects it. A1111: no `forge_objects`; flow models have `add_noise_to_latent`. Old Forge
(Classic, reForge): `forge_objects` without `predictor`, where noise is always added as for variance-exploding models.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError, first_line, shown
from mrflow_sched.plan.families import Family, HostFacts, family_of_host, get_family, unknown_flow

__all__ = [
    "Host",
    "HostApi",
    "ModelInfo",
    "attach",
    "capabilities",
    "kept_random_state",
    "own_attributes",
    "probe_model",
    "refiner_refusal",
]

Noising = Literal["flow", "ve", "none"]


# ------------------------------------------------------------------------------------------------------------ the host


class HostApi(Protocol):
    """What the extension asks of a running WebUI besides the job object."""

    @property
    def opts(self) -> Any:
        """The host's options: attributes, and `data`, the dict behind them."""
        ...

    @property
    def state(self) -> Any:
        """The host's progress: `interrupted`, `skipped`, `stopping_generation`."""
        ...

    @property
    def dynamic_args(self) -> Any:
        """Forge Neo's record of the kind of model that is loaded; None on other hosts."""
        ...

    def upscalers(self) -> Sequence[Any]:
        """List the host's upscalers.

        Returns:
            Entries with a `name`, in the order of the host's menu.
        """
        ...

    def timestep_samplers(self) -> frozenset[str]:
        """Name the samplers that walk timesteps and ignore schedules of sigmas.

        Returns:
            Names as in the host's menu, such as "DDIM"; empty where the host has none.
        """
        ...

    def make_noise(self, p: Any, shape: Sequence[int], seeds: Sequence[int], subseeds: Sequence[int]) -> Tensor:
        """Draw noise as the host does for the job, variation settings included, without changing random states.

        Args:
            p: The job, whose variation settings apply.
            shape: Shape of one latent, without the batch.
            seeds: A seed for each image.
            subseeds: A variation seed for each image.

        Returns:
            Standard normal noise (len(seeds), *shape).
        """
        ...

    def pixels_per_latent(self) -> int:
        """Return how many pixels a latent covers on each side, as the host counts for the loaded model.

        Returns:
            8, or 16 for some models of Forge Neo.
        """
        ...

    def settings_of(self, text: str) -> dict[str, Any]:
        """Return the host's settings that an image was made with and that differ from those of now.

        Args:
            text: Its metadata.

        Returns:
            Values by setting, without the checkpoint.

        Raises:
            MrFlowError: A value cannot be used.
        """
        ...

    def has_checkpoint(self, name: str) -> bool:
        """Tell whether a checkpoint is installed.

        Args:
            name: Its name, title or hash, as the host's setting takes it.

        Returns:
            Whether the host would load it.
        """
        ...

    def with_styles(self, prompt: str, styles: Sequence[str]) -> str:
        """Return a prompt with the user's styles filled in.

        Args:
            prompt: The prompt.
            styles: Names of styles.

        Returns:
            The prompt as the host would use it.
        """
        ...


@dataclass(frozen=True)
class _WebUI:
    """`HostApi` over a host's modules."""

    shared: Any
    rng: Any
    samplers: frozenset[str]
    dynamic_args: Any
    processing: Any = None
    infotexts: Any = None
    checkpoints: Any = None

    @property
    def opts(self) -> Any:
        return self.shared.opts

    @property
    def state(self) -> Any:
        return self.shared.state

    def upscalers(self) -> Sequence[Any]:
        return list(self.shared.sd_upscalers)

    def timestep_samplers(self) -> frozenset[str]:
        return self.samplers

    def make_noise(self, p: Any, shape: Sequence[int], seeds: Sequence[int], subseeds: Sequence[int]) -> Tensor:
        # The host's generator seeds torch's global one on the way; sampling goes on from there, so it is put back.
        with kept_random_state():
            return self.rng.ImageRNG(
                tuple(shape),
                list(seeds),
                subseeds=list(subseeds),
                subseed_strength=p.subseed_strength,
                seed_resize_from_h=p.seed_resize_from_h,
                seed_resize_from_w=p.seed_resize_from_w,
            ).next()

    def pixels_per_latent(self) -> int:
        # Neo sets it anew for each model.
        return int(getattr(self.processing, "opt_f", 8))

    def settings_of(self, text: str) -> dict[str, Any]:
        parse, find = self.infotexts.parse_generation_parameters, getattr(self.infotexts, "get_override_settings", None)
        try:
            # Hosts since 1.10 leave out what the user does not want pasted, unless they are told otherwise.
            params = parse(text, []) if len(inspect.signature(parse).parameters) > 1 else parse(text)
            found = {} if find is None else {str(key): value for _, key, value in find(dict(params))}
        except Exception as error:  # whatever a host raises for a value of the wrong kind
            raise MrFlowError(f"The draft's settings cannot be used ({first_line(error)}).") from error
        # Found by whoever finishes a draft: users may have switched off that hosts follow it.
        found.pop("sd_model_checkpoint", None)
        modules = _stems(getattr(self.opts, "forge_additional_modules", None))
        if _stems(found.get("forge_additional_modules")) == modules:
            found.pop("forge_additional_modules", None)
        return found

    def has_checkpoint(self, name: str) -> bool:
        return name in getattr(self.checkpoints, "checkpoint_aliases", {})

    def with_styles(self, prompt: str, styles: Sequence[str]) -> str:
        return str(self.shared.prompt_styles.apply_styles_to_prompt(prompt, list(styles)))


def _stems(paths: Any) -> list[str]:
    return [PurePath(str(path)).stem for path in paths or ()]


def own_attributes(thing: Any) -> dict[str, Any]:
    """Return the attributes of an object itself, without those of its class.

    Args:
        thing: Any object with a `__dict__`.

    Returns:
        The live dict, as `vars` gives it.
    """
    return thing.__dict__


@contextmanager
def kept_random_state() -> Generator[None, None, None]:
    """Put torch's global generators (CPU, and the current GPU where one is used) back when the block ends.

    Yields:
        Nothing; the block may seed the generators and draw from them.
    """
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    library: Any = torch.random  # partially typed
    with library.fork_rng(devices=[torch.cuda.current_device()] if used else []):
        yield


def attach(import_module: Callable[[str], Any]) -> HostApi:
    """Connect to the running WebUI through its modules.

    Call it while the script is loaded: some hosts take the extension's folder off the path afterwards.

    Args:
        import_module: `importlib.import_module`, or a function like it.

    Returns:
        The WebUI.
    """

    def found(*names: str) -> Any:
        for name in names:
            try:
                return import_module(name)
            except ImportError:
                continue
        return None

    data = getattr(found("modules.sd_samplers_timesteps"), "samplers_data_timesteps", ())
    return _WebUI(
        import_module("modules.shared"),
        import_module("modules.rng"),
        samplers=frozenset(str(entry.name) for entry in data),
        dynamic_args=getattr(found("backend.args"), "dynamic_args", None),
        processing=found("modules.processing"),
        infotexts=found("modules.infotext_utils", "modules.generation_parameters_copypaste"),
        checkpoints=found("modules.sd_models"),
    )


@dataclass(frozen=True)
class Host:
    """What this host offers.

    Attributes:
        has_every_sampling: The host calls a hook before every sampling, where the refine noise and the solver are set.
        noising: How its hires pass mixes noise in: "flow", "ve" (variance-exploding), or "none" while no model is
            loaded.
    """

    has_every_sampling: bool
    noising: Noising


def capabilities(p: Any) -> Host:
    """Find out what the host of a job can do.

    Args:
        p: The job, or anything with `sd_model`.

    Returns:
        What the host offers.
    """
    return Host(
        has_every_sampling=hasattr(getattr(p, "scripts", None), "process_before_every_sampling"),
        noising=_noising(getattr(p, "sd_model", None)),
    )


# ----------------------------------------------------------------------------------------------------------- the model


def refiner_refusal(checkpoint: Any) -> str | None:
    """Return why a job with a refiner cannot run staged.

    Args:
        checkpoint: The refiner that the job asks for, as hosts name it.

    Returns:
        A sentence for the user; None where it asks for none.
    """
    if checkpoint in (None, "", "None", "none"):
        return None
    name = shown(checkpoint)
    return f"MrFlow cannot be used with the refiner {name}; switch the refiner off, or generate without MrFlow."


@dataclass(frozen=True)
class ModelInfo:
    """The loaded model.

    Attributes:
        family: Its family, or a stand-in where `known` is False.
        title: Its name in sentences.
        flow: It predicts a velocity of the flow interpolant.
        experimental: It is no flow model; sigmas are converted at equal signal-to-noise ratio.
        refusal: The sentence that says why it cannot run staged, or None.
        grid_final: Sides of the final image are multiples of this many pixels.
        grid_low: Sides of the low-resolution image are multiples of this many pixels.
        known: Its schedule is in the family table; for other models stage 1 uses the host's schedule.
    """

    family: Family
    title: str
    flow: bool
    experimental: bool
    refusal: str | None
    grid_final: int
    grid_low: int
    known: bool = True


_EDITS = re.compile(r"kontext|(?:image|qwen)[-_ .]?edit|(?<![a-z])edit(?![a-z])", re.IGNORECASE)
_PLAIN = "generate without MrFlow, or choose another checkpoint"


def probe_model(p: Any, host: HostApi | None = None) -> ModelInfo:
    """Find out what model is loaded. A model that cannot be used is told by `ModelInfo.refusal`, not raised.

    Args:
        p: The job, or anything with `sd_model`.
        host: The WebUI, whose record of the model (Forge Neo) is read too; None leaves that out.

    Returns:
        The model.
    """
    model = getattr(p, "sd_model", None)
    noising = _noising(model)
    engine = type(model).__name__
    if model is None or noising == "none":
        return _refused("sd15", engine, "MrFlow needs a loaded checkpoint, and none is loaded yet")
    name = _checkpoint_name(model)
    flow = _is_flow(model)
    family, known = _family(p, model, engine, name, flow)
    refusal = _refusal(model, engine, name, flow, noising, family.title, host)
    pixels = _pixels(model, family, flow)
    return ModelInfo(
        family=family,
        title=family.title,
        flow=flow,
        experimental=not flow,
        refusal=refusal,
        grid_final=pixels,
        grid_low=math.lcm(family.grid, pixels),
        known=known,
    )


def _pixels(model: Any, family: Family, flow: bool) -> int:
    """Return how many pixels along a side the host makes of one value of the model's latents."""
    vae = getattr(getattr(model, "forge_objects", None), "vae", None)
    ratios = (getattr(vae, name, None) for name in ("upscale_ratio", "downscale_ratio"))
    told = next((ratio for ratio in ratios if isinstance(ratio, int)), 0)  # VAEs of videos have functions there
    # Flow models of A1111 round to 16; FLUX.2's latents are packed on every host.
    packed = flow and (family.shift.kind == "flux2" or _predictor(model) is None)
    return max(told, 16) if packed else told or family.vae_factor


def _refused(family: str, title: str, sentence: str) -> ModelInfo:
    known = get_family(family)
    return ModelInfo(known, title, False, True, f"{sentence}; {_PLAIN}.", 8, known.grid)


def _refusal(
    model: Any, engine: str, name: str, flow: bool, noising: Noising, title: str, host: HostApi | None
) -> str | None:
    record = getattr(host, "dynamic_args", None)
    if engine.startswith("Wan") or bool(getattr(record, "wan", False)):
        return f"MrFlow makes images, and {name or engine} makes videos; {_PLAIN}."
    if engine == "PiD" or bool(getattr(record, "pid", False)):
        return f"MrFlow makes images from text, and {name or engine} finishes those of other models; {_PLAIN}."
    edits = any(bool(getattr(record, kind, False)) for kind in ("kontext", "edit"))
    # With this option Anima's encoder makes each picture, that of stage 1 too, a reference of what follows.
    edits = edits or (engine == "Anima" and bool(getattr(getattr(host, "opts", None), "anima_do_reference", False)))
    if edits or _EDITS.search(name):
        return f"MrFlow cannot be used with the edit model {name or engine}, which encodes reference images; {_PLAIN}."
    if engine == "StableDiffusionXLRefiner":
        return f"MrFlow needs a base model, and {name or engine} is a refiner; {_PLAIN}."
    if bool(getattr(model, "is_inpaint", False)):
        return f"MrFlow cannot be used with the inpainting model {name or engine}; {_PLAIN}."
    if flow and noising == "ve":
        return (
            f"MrFlow cannot be used with {title} on this WebUI, whose hires pass adds noise to flow models as if they "
            "were variance-exploding; generate without MrFlow, or use Forge or Forge Neo."
        )
    return None


def _family(p: Any, model: Any, engine: str, name: str, flow: bool) -> tuple[Family, bool]:
    """Return the family of the loaded model, and whether its schedule is known."""
    facts = HostFacts(
        engine=engine,
        name=name.lower(),
        repository=str(getattr(getattr(model, "model_config", None), "huggingface_repo", "")).lower(),
        flow=flow,
        guidance=getattr(p, "cfg_scale", None),
        distilled_scale=bool(getattr(model, "use_distilled_cfg_scale", True)),
        is_sd3=bool(getattr(model, "is_sd3", False)),
        is_sdxl=bool(getattr(model, "is_sdxl", False)),
    )
    found = family_of_host(facts)
    if found is not None:
        return found, True
    like = get_family("sdxl" if facts.is_sdxl else "z-image")
    return unknown_flow(engine, shift=_host_shift(model) or 1.0, like=like), False


def _host_shift(model: Any) -> float | None:
    """Return the static shift of the host's table of sigmas, read off at its middle; None where there is no table."""
    table = getattr(_predictor(model), "sigmas", None)
    if not isinstance(table, Tensor) or table.ndim != 1 or len(table) < 2:
        return None
    middle = float(table[len(table) // 2 - 1])
    return max(middle / (1.0 - middle), 1.0) if 0.0 < middle < 1.0 else None


def _checkpoint_name(model: Any) -> str:
    info = getattr(model, "sd_checkpoint_info", None)
    return str(getattr(info, "name_for_extra", None) or getattr(info, "name", None) or "")


def _predictor(model: Any) -> Any:
    objects = getattr(model, "forge_objects", None)
    return getattr(getattr(getattr(objects, "unet", None), "model", None), "predictor", None)


def _noising(model: Any) -> Noising:
    """Return how the host mixes noise into this model's latents in its hires pass."""
    if model is None:
        return "none"
    predictor = _predictor(model)
    if predictor is not None:
        return "flow" if predictor.prediction_type == "const" else "ve"
    if getattr(model, "forge_objects", None) is not None:
        return "ve"
    if hasattr(model, "add_noise_to_latent"):
        return "flow"
    # A1111's LDM models; a placeholder that hosts keep before the first load has neither of these.
    return "ve" if hasattr(model, "get_first_stage_encoding") and hasattr(model, "decode_first_stage") else "none"


def _is_flow(model: Any) -> bool:
    """Return whether the model predicts a velocity of the flow interpolant."""
    if _noising(model) == "flow":
        return True
    if _predictor(model) is not None:
        return False
    inner = getattr(getattr(getattr(model, "forge_objects", None), "unet", None), "model", None)
    kind = getattr(getattr(inner, "model_type", None), "name", "")
    return str(kind).startswith("FL") or bool(getattr(model, "is_sd3", False))
