"""Small stand-ins for a WebUI: the job object, samplers, models and the order of events of A1111 1.10, Forge and Neo.

Names, signatures, the order of hooks and the arithmetic of the hires schedule are the hosts'; what a network, a VAE or
an upscaler would compute is replaced by something short that still depends on all its inputs. A `WebUI` records the
level at every model call, so that a test can compare it with the plan's.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrflow_sched.apps.webui import host as webui_host
from mrflow_sched.apps.webui import run

# ---------------------------------------------------------------------------------------------------------------- state


class State:
    def __init__(self) -> None:
        self.interrupted = self.skipped = self.stopping_generation = False
        self.job_count = -1
        self.processing_has_refined_job_count = False
        self.jobs_done = 0

    def interrupt(self) -> None:
        self.interrupted = True

    def nextjob(self) -> None:
        self.jobs_done += 1


class Opts:
    """Attributes over `data`, a dict of what was saved; an option that is missing there has its default."""

    def __init__(self) -> None:
        self.__dict__["defaults"] = {
            "img2img_extra_noise": 0.0,
            "save_images_before_highres_fix": False,
            "always_discard_next_to_last_sigma": False,
            "use_old_hires_fix_width_height": False,
            "mrflow_when_refused": "go on without MrFlow",
            "samples_format": "png",
            "enable_pnginfo": True,
            "sd_model_checkpoint": "checkpoint [0123456789]",
            "CLIP_stop_at_last_layers": 1,
        }
        self.__dict__["data"] = dict(self.defaults)

    def __getattr__(self, key: str) -> Any:
        for values in (self.__dict__["data"], self.__dict__["defaults"]):
            if key in values:
                return values[key]
        raise AttributeError(key)

    def __setattr__(self, key: str, value: Any) -> None:
        self.data[key] = value


class ImageRNG:
    """Seeded noise; the first draw also seeds torch's global generator, as the hosts' does."""

    def __init__(
        self,
        shape: Sequence[int],
        seeds: Sequence[int],
        subseeds: Sequence[int] | None = None,
        subseed_strength: float = 0.0,
        seed_resize_from_h: int = 0,
        seed_resize_from_w: int = 0,
    ) -> None:
        self.shape, self.seeds, self.subseeds, self.strength = tuple(shape), list(seeds), subseeds, subseed_strength
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.is_first = True

    def next(self) -> Tensor:
        drawn = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        if self.is_first:
            self.is_first = False
            for i, seed in enumerate(self.seeds):
                torch.manual_seed((int(seed) + 100000) % 65536)
                if self.subseeds is not None and self.strength:
                    other = torch.randn(self.shape, generator=torch.Generator().manual_seed(int(self.subseeds[i])))
                    drawn[i] = (1 - self.strength) * drawn[i] + self.strength * other
        return torch.stack(drawn)


# --------------------------------------------------------------------------------------------------------------- models


class Vae:
    """Latents are averages of factor x factor pixels, repeated over the channels, plus a random draw."""

    def __init__(self, channels: int, factor: int, five_d: bool, rgba: bool = False) -> None:
        self.channels, self.factor, self.five_d, self.colours = channels, factor, five_d, 4 if rgba else 3
        self.pictures: list[int] = []

    def encode(self, x: Tensor) -> Tensor:
        self.pictures.append(x.shape[0])
        small = torch.nn.functional.avg_pool2d(x, self.factor)
        latent = small.mean(dim=1, keepdim=True).repeat(1, self.channels, 1, 1)
        latent = latent + 0.01 * torch.randn(latent.shape)
        return latent[:1].unsqueeze(2) if self.five_d else latent  # such engines keep the first picture only

    def decode(self, z: Tensor) -> Tensor:
        flat = z[:, :, 0] if z.ndim == 5 else z
        picture = (
            flat[:, : self.colours].repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3).clamp(-1, 1)
        )
        return picture.unsqueeze(1) if z.ndim == 5 else picture


class Predictor:
    def __init__(self, kind: str, shift: float = 1.0) -> None:
        self.prediction_type = kind
        steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
        self.sigmas = (shift * steps / (1 + (shift - 1) * steps)).float() if kind == "const" else steps.float() * 14.6

    def noise_scaling(self, sigma: Any, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        if self.prediction_type == "const":
            return sigma * noise + (1.0 - sigma) * latent
        return noise * sigma + latent


class ForgeModel:
    """A Forge engine; `type(model).__name__` is what tells engines apart, so classes are made by `engine`."""

    predictor_kind, channels, factor, wan = "const", 16, 8, False
    shift, repository, rgba = 3.0, "", False
    is_sdxl = False

    def __init__(self, name: str = "checkpoint", neo: bool = False) -> None:
        self.sd_checkpoint_info = SimpleNamespace(name_for_extra=name)
        self.sd_model_hash: str | None = None
        self.model_config = SimpleNamespace(huggingface_repo=self.repository)
        self.vae = Vae(self.channels, self.factor, self.wan, self.rgba)
        predictor = Predictor(self.predictor_kind, self.shift)
        unet = SimpleNamespace(model=SimpleNamespace(predictor=predictor))
        self.forge_objects = SimpleNamespace(unet=unet, vae=SimpleNamespace(latent_channels=self.channels))
        if neo:
            frames = (lambda count: max(0, count * 4 - 3), 8, 8)
            self.forge_objects.vae.upscale_ratio = frames if self.wan else self.factor
        self.use_distilled_cfg_scale = type(self).__name__ == "Flux"
        self.is_inpaint = False
        if neo:
            self.is_wan = self.wan
            self.ini_latent = None

    def encode_first_stage(self, x: Tensor) -> Tensor:
        return self.vae.encode(x)

    def get_first_stage_encoding(self, x: Tensor) -> Tensor:
        return x

    def decode_first_stage(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


def engine(name: str, **facts: Any) -> type[ForgeModel]:
    return type(name, (ForgeModel,), facts)


Flux = engine("Flux")
Flux2 = engine("Flux2", channels=128, factor=16)
QwenImage = engine("QwenImage", wan=True)
ZImage = engine("ZImage", repository="Tongyi-MAI/Z-Image-Turbo")  # that of the base model too
StableDiffusion = engine("StableDiffusion", predictor_kind="epsilon", channels=4)
StableDiffusionXL = engine("StableDiffusionXL", predictor_kind="epsilon", channels=4, is_sdxl=True)
Wan = engine("Wan", wan=True)
Anima = engine("Anima", wan=True)
Krea2 = engine("Krea2", wan=True, shift=math.exp(1.15), repository="krea/Krea-2-Raw")
ErnieImage = engine("ErnieImage", channels=128, factor=16, repository="baidu/ERNIE-Image")
QwenImage21 = engine("QwenImage21", channels=64, factor=16, rgba=True, repository="Qwen/Qwen-Image-2.1")
Mugen = engine("Mugen", channels=32, shift=12.0, is_sdxl=True, repository="CabalResearch/Mugen")
PiD = engine("PiD", channels=3, factor=1, shift=1.5, repository="nvidia/PiD")


class LdmModel:
    """An A1111 model of SD1.5's kind: the encoder returns a distribution that is drawn from later."""

    is_sd1, is_sdxl, is_sd3 = True, False, False
    channels = 4

    def __init__(self, name: str = "v1-5") -> None:
        self.sd_checkpoint_info = SimpleNamespace(name_for_extra=name)
        self.sd_model_hash: str | None = None
        self.latent_channels = self.channels
        self.vae = Vae(self.channels, 8, False)
        self.table = Predictor("epsilon").sigmas

    def encode_first_stage(self, x: Tensor) -> Any:
        return SimpleNamespace(picture=x)

    def get_first_stage_encoding(self, encoding: Any) -> Tensor:
        return self.vae.encode(encoding.picture)

    def decode_first_stage(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


class Sd3Model(LdmModel):
    is_sd1, is_sd3 = False, True
    channels = 16

    def __init__(self, name: str = "sd3_medium") -> None:
        super().__init__(name)
        self.table = Predictor("const", 3.0).sigmas

    def add_noise_to_latent(self, x: Tensor, noise: Tensor, amount: Any) -> Tensor:
        return x * (1 - amount) + noise * amount

    def fix_dimensions(self, width: int, height: int) -> tuple[int, int]:
        return width // 16 * 16, height // 16 * 16


class Placeholder:
    """What sits in `shared.sd_model` before the first job."""


# ------------------------------------------------------------------------------------------------------------- samplers


def k_euler(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
    s_churn: float = 0.0,
) -> Tensor:
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(x.shape[0]), **(extra_args or {}))
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = denoised + (x - denoised) * (sigmas[i + 1] / sigmas[i])
    return x


def k_sde(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
    eta: float = 1.0,
    noise_sampler: Any = None,
) -> Tensor:
    return k_euler(model, x, sigmas, extra_args, callback, disable)


def k_adaptive(
    model: Any,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
) -> Tensor:
    return k_euler(model, x, torch.tensor([sigma_max, sigma_min]), extra_args, callback, disable)


SAMPLERS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "Euler": (k_euler, {}),
    "DPM++ 2M": (k_euler, {}),
    "DPM2": (k_euler, {"discard_next_to_last_sigma": True}),
    "DPM++ 3M SDE": (k_sde, {"discard_next_to_last_sigma": True, "brownian_noise": True}),
    "DPM adaptive": (k_adaptive, {}),
    "DDIM": (k_euler, {"timesteps": True}),
}


class InterruptedException(BaseException):
    pass


class Sampler:
    """A k-diffusion sampler of the hosts'."""

    def __init__(self, ui: WebUI, name: str) -> None:
        self.ui = ui
        self.func, options = SAMPLERS[name]
        self.original = self.func
        self.config = SimpleNamespace(name=name, options=options)
        self.last_latent: Any = None
        ui.samplers.append(self)

    def table(self) -> Tensor:
        model = self.ui.sd_model
        return model.forge_objects.unet.model.predictor.sigmas if hasattr(model, "forge_objects") else model.table

    def get_sigmas(self, p: Any, steps: int) -> Tensor:
        discard = self.config.options.get("discard_next_to_last_sigma", False)
        discard = discard or self.ui.opts.always_discard_next_to_last_sigma
        steps += 1 if discard else 0
        name = (p.hr_scheduler if p.is_hr_pass else p.scheduler) or "Automatic"
        if p.sampler_noise_scheduler_override:
            sigmas = p.sampler_noise_scheduler_override(steps)
        elif name == "Turbo":
            sigmas = torch.tensor([999.0 - 999.0 * i / steps for i in range(steps)] + [0.0])
        else:
            places = [len(self.table()) - 1 - round(i * len(self.table()) / steps) for i in range(steps)]
            sigmas = torch.tensor([float(self.table()[place]) for place in places] + [0.0])
            if p.is_hr_pass:
                p.extra_generation_params["Hires schedule type"] = name
        if discard:
            sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
        return sigmas.cpu()

    def network(self, p: Any) -> Callable[..., Tensor]:
        def model(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            assert sigma.shape == (x.shape[0],)
            self.ui.calls.append(("hires" if p.is_hr_pass else "first", float(sigma[0]), tuple(x.shape)))
            self.ui.scales.append(extra["cond_scale"])
            if self.ui.fail_at == len(self.ui.calls):
                raise RuntimeError("out of memory")
            if self.ui.interrupt_at == len(self.ui.calls):
                self.ui.state.interrupt()
            if self.ui.state.interrupted:
                raise InterruptedException
            self.last_latent = torch.tanh(x) * 0.5
            return self.last_latent

        return model

    def launch(self, p: Any, x: Tensor, sigmas: Tensor, steps: int, everything: Tensor) -> Tensor:
        self.last_latent = x
        keywords: dict[str, Any] = {}
        parameters = inspect.signature(self.func).parameters
        if "sigma_min" in parameters:
            keywords.update(sigma_min=float(self.table()[0]), sigma_max=float(self.table()[-1]))
        if "n" in parameters:
            keywords["n"] = steps
        if "sigmas" in parameters:
            keywords["sigmas"] = sigmas
        if "eta" in parameters:
            keywords["eta"] = 1.0
        if self.config.options.get("brownian_noise"):
            keywords["noise_sampler"] = (float(everything[everything > 0].min()), float(everything.max()))
        extra = {"cond": p.c, "uncond": p.uc, "cond_scale": self.scale(p)}
        try:
            return self.func(self.network(p), x, extra_args=extra, disable=False, callback=self.callback, **keywords)
        except InterruptedException:
            return self.last_latent

    def scale(self, p: Any) -> float:
        return p.hr_cfg if p.is_hr_pass and hasattr(p, "hr_cfg") else p.cfg_scale

    def callback(self, told: Any) -> None:
        assert set(told) == {"x", "i", "sigma", "sigma_hat", "denoised"}

    def sample(
        self, p: Any, x: Tensor, conditioning: Any, unconditional_conditioning: Any, steps: Any = None
    ) -> Tensor:
        steps = steps or p.steps
        sigmas = self.get_sigmas(p, steps)
        return self.launch(p, self.mix(sigmas[0], x, torch.zeros_like(x)), sigmas, steps, sigmas)

    def sample_img2img(
        self, p: Any, x: Tensor, noise: Tensor, conditioning: Any, unconditional_conditioning: Any, steps: int
    ) -> Tensor:
        total = int(steps / min(p.denoising_strength, 0.999)) if p.denoising_strength > 0 else 0
        everything = self.get_sigmas(p, total)
        sigmas = everything[total - (steps - 1) - 1 :]
        self.ui.mixed.append((x.clone(), noise.clone(), float(sigmas[0])))
        mixed = self.mix(sigmas[0], noise, x)
        if self.ui.opts.img2img_extra_noise > 0:
            mixed = mixed + noise * self.ui.opts.img2img_extra_noise
        return self.launch(p, mixed, sigmas, steps, everything)

    def mix(self, sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
        model = self.ui.sd_model
        if hasattr(model, "forge_objects"):
            return model.forge_objects.unet.model.predictor.noise_scaling(sigma, noise, latent)
        if hasattr(model, "add_noise_to_latent"):
            return model.add_noise_to_latent(latent, noise, sigma)
        return latent + noise * sigma


class TimestepSampler(Sampler):
    """DDIM and its like: no `get_sigmas`; sigma lists are ignored."""

    get_sigmas: Any = None

    def __getattribute__(self, name: str) -> Any:
        if name == "get_sigmas":
            raise AttributeError(name)
        return super().__getattribute__(name)

    def sample(
        self, p: Any, x: Tensor, conditioning: Any, unconditional_conditioning: Any, steps: Any = None
    ) -> Tensor:
        sigmas = torch.linspace(0.9, 0.1, steps or p.steps)
        return self.launch(p, x, sigmas, p.steps, sigmas)


# ------------------------------------------------------------------------------------------------------------- the job


class DecodedSamples(list[Any]):
    already_decoded = True


@dataclass(repr=False)
class Txt2Img:
    """A1111's job object; `ForgeTxt2Img` adds Forge's fields."""

    ui: WebUI
    prompt: Any = "a lighthouse"
    negative_prompt: str = ""
    seed: int = 1000
    subseed: int = 5
    subseed_strength: float = 0.0
    seed_resize_from_h: int = -1
    seed_resize_from_w: int = -1
    sampler_name: str = "Euler"
    scheduler: str | None = "Automatic"
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 20
    cfg_scale: float = 5.0
    width: int = 512
    height: int = 512
    extra_generation_params: dict[str, Any] = field(default_factory=dict)
    override_settings: dict[str, Any] = field(default_factory=dict)
    refiner_checkpoint: str | None = None
    enable_hr: bool = False
    denoising_strength: float = 0.75
    hr_scale: float = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int = 0
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: Any = ""
    hr_negative_prompt: str = ""
    firstpass_image: Any = None
    styles: list[str] = field(default_factory=list)
    is_api: bool = False

    def __post_init__(self) -> None:
        self.comments: dict[str, int] = {}
        self.sampler_noise_scheduler_override: Any = None
        self.is_hr_pass = False
        self.sampler: Any = None
        self.rng: Any = None
        self.iteration = 0
        self.c = self.uc = self.hr_c = self.hr_uc = None
        self.hr_upscale_to_x = self.hr_upscale_to_y = self.truncate_x = self.truncate_y = 0
        self.all_prompts: Any = None
        self.all_negative_prompts: Any = None
        self.all_seeds: Any = None
        self.all_subseeds: Any = None
        self.all_hr_prompts: Any = None
        self.all_hr_negative_prompts: Any = None
        self.prompts: Any = None
        self.negative_prompts: Any = None
        self.seeds: Any = None
        self.subseeds: Any = None
        self.hr_prompts: Any = None
        self.hr_negative_prompts: Any = None
        self.extra_network_data: Any = None
        self.hr_extra_network_data: Any = None

    @property
    def sd_model(self) -> Any:
        return self.ui.sd_model

    @property
    def scripts(self) -> Any:
        return self.ui.script

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def setup_prompts(self) -> None:
        count = self.batch_size * self.n_iter
        self.all_prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt] * count
        negative = self.negative_prompt
        self.all_negative_prompts = negative if isinstance(negative, list) else [negative] * count
        if self.enable_hr:
            self.hr_prompt = self.hr_prompt or self.prompt
            self.hr_negative_prompt = self.hr_negative_prompt or self.negative_prompt
            self.all_hr_prompts = self.hr_prompt if isinstance(self.hr_prompt, list) else [self.hr_prompt] * count
            negative = self.hr_negative_prompt
            self.all_hr_negative_prompts = negative if isinstance(negative, list) else [negative] * count

    def calculate_target_resolution(self) -> None:
        params = self.extra_generation_params
        if self.ui.opts.use_old_hires_fix_width_height:
            self.width, self.height = 512, 512
        if not self.hr_resize_x and not self.hr_resize_y:
            params["Hires upscale"] = self.hr_scale
            wanted = self.width * self.hr_scale, self.height * self.hr_scale
        else:
            params["Hires resize"] = f"{self.hr_resize_x}x{self.hr_resize_y}"
            wanted = (
                self.hr_resize_x or self.hr_resize_y * self.width / self.height,
                self.hr_resize_y or self.hr_resize_x * self.height / self.width,
            )
        self.hr_upscale_to_x, self.hr_upscale_to_y = (self.ui.round_target(side) for side in wanted)

    def init(self) -> None:
        if not self.enable_hr:
            return
        params = self.extra_generation_params
        if not self.ui.neo:
            params["Denoising strength"] = self.denoising_strength
        if self.hr_sampler_name is not None and self.hr_sampler_name != self.sampler_name:
            params["Hires sampler"] = self.hr_sampler_name
        params["Hires prompt"] = lambda p, index, prompt, **_: (
            p.all_hr_prompts[index] if p.all_hr_prompts[index] != prompt else None
        )
        params["Hires schedule type"] = None
        if self.hr_scheduler is None:
            self.hr_scheduler = self.scheduler
        if not any(entry.name == self.hr_upscaler for entry in self.ui.sd_upscalers):
            raise ValueError(f"could not find upscaler named {self.hr_upscaler}")
        self.calculate_target_resolution()
        state = self.ui.state
        if not state.processing_has_refined_job_count:
            state.job_count = (self.n_iter if state.job_count == -1 else state.job_count) * 2
            state.processing_has_refined_job_count = True
        if self.hr_second_pass_steps:
            params["Hires steps"] = self.hr_second_pass_steps
        params["Hires upscaler"] = self.hr_upscaler

    def parse_extra_network_prompts(self) -> None:
        self.extra_network_data = {}
        if self.enable_hr:
            place = slice(self.iteration * self.batch_size, (self.iteration + 1) * self.batch_size)
            self.hr_prompts = self.all_hr_prompts[place]
            self.hr_negative_prompts = self.all_hr_negative_prompts[place]
            self.hr_extra_network_data = {}

    def setup_conds(self) -> None:
        self.c, self.uc = self.ui.encode_text(self.prompts, self.negative_prompts, self.cfg_scale)
        self.hr_c = self.hr_uc = None
        if self.enable_hr and self.ui.early_conds:
            self.calculate_hr_conds()

    def calculate_hr_conds(self) -> None:
        if self.hr_c is None:
            scale = getattr(self, "hr_cfg", self.cfg_scale)
            self.hr_c, self.hr_uc = self.ui.encode_text(self.hr_prompts, self.hr_negative_prompts, scale)

    def before_sampling(self, x: Tensor, noise: Tensor, c: Any, uc: Any) -> Tensor:
        self.ui.hook("process_before_every_sampling", self, x=x, noise=noise, c=c, uc=uc)
        modified = getattr(self, "modified_noise", None)
        if modified is not None:
            self.modified_noise = None
            return modified
        return noise

    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: Any,
        subseeds: Any,
        subseed_strength: float,
        prompts: Any,
    ) -> Any:
        self.sampler = self.ui.create_sampler(self.sampler_name)
        if self.firstpass_image is not None and self.enable_hr:
            levels = np.array(self.firstpass_image).astype(np.float32) / 255.0 * 2.0 - 1.0
            samples, decoded = None, torch.from_numpy(np.moveaxis(levels, 2, 0)[None])
            if self.ui.neo:
                decoded = ((decoded + 1) / 2).clamp(0, 1)
        else:
            x = self.rng.next()
            x = self.before_sampling(x, x, conditioning, unconditional_conditioning)
            samples = self.sampler.sample(self, x, conditioning, unconditional_conditioning)
            if not self.enable_hr:
                return samples
            decoded = self.sd_model.decode_first_stage(samples).float()
            if self.ui.neo:
                decoded = ((decoded + 1) / 2).clamp(0, 1)
        if "Use same choices" not in getattr(self, "hr_additional_modules", ["Use same choices"]):
            raise AssertionError("the modules would be changed")
        if hasattr(self, "hr_distilled_cfg"):
            self.extra_generation_params["Hires Distilled CFG Scale"] = getattr(self, "hr_distilled_cfg", None)
        return self.sample_hr_pass(samples, decoded, seeds, subseeds, subseed_strength, prompts)

    def sample_hr_pass(
        self, samples: Any, decoded_samples: Any, seeds: Any, subseeds: Any, subseed_strength: float, prompts: Any
    ) -> Any:
        ui = self.ui
        if ui.neo:
            self.extra_generation_params["Denoising strength"] = self.denoising_strength
        if ui.state.interrupted:
            return samples
        self.is_hr_pass = True
        self.sampler = ui.create_sampler(self.hr_sampler_name or self.sampler_name)
        if ui.opts.save_images_before_highres_fix:
            ui.saved.append(tuple(decoded_samples.shape))
        unit = decoded_samples if ui.neo else (decoded_samples + 1) / 2
        if unit.ndim == 5:
            unit = unit[:, 0]
        unit = torch.from_numpy((255.0 * unit.clamp(0, 1).numpy()).astype(np.uint8).astype(np.float32)) / 255.0
        size = self.hr_upscale_to_y, self.hr_upscale_to_x
        larger = torch.nn.functional.interpolate(unit, size=size, mode="bilinear") * 2 - 1
        samples = ui.images_to_samples(larger)
        ui.state.nextjob()
        self.rng = ImageRNG(samples.shape[1:], self.seeds, self.subseeds, self.subseed_strength)
        noise = self.rng.next()
        self.calculate_hr_conds()
        ui.hook("before_hr", self)
        for _ in range(ui.hires_calls):
            noise = self.before_sampling(samples, noise, self.hr_c, self.hr_uc)
        steps = self.hr_second_pass_steps or self.steps
        samples = self.sampler.sample_img2img(self, samples, noise, self.hr_c, self.hr_uc, steps=steps)
        self.sampler = None
        decoded = DecodedSamples(self.sd_model.decode_first_stage(samples))
        self.is_hr_pass = False
        return decoded


@dataclass(repr=False)
class ForgeTxt2Img(Txt2Img):
    distilled_cfg_scale: float = 3.5
    hr_additional_modules: Any = None
    hr_cfg: float = 1.0
    hr_distilled_cfg: float = 3.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.modified_noise: Any = None

    def init(self) -> None:
        super().init()
        if self.enable_hr:
            self.extra_generation_params["Hires CFG Scale"] = self.hr_cfg
            self.extra_generation_params["Hires Module 1"] = "Use same choices"


class Img2Img:
    """Another kind of job, without any hires field."""

    def __init__(self) -> None:
        self.width = self.height = 512
        self.extra_generation_params: dict[str, Any] = {}


# ----------------------------------------------------------------------------------------------------------- the WebUI


class Hooks:
    """The script as the host sees it: each hook hands on to its room, as scripts/mrflow.py does."""

    def __init__(self, api: Any) -> None:
        self.api = api

    def before_process(self, p: Any, *args: Any) -> None:
        run.before_process(p, args, self.api)

    def process(self, p: Any, *args: Any) -> None:
        run.process(p, self.api)

    def before_process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        run.before_process_batch(p, self.api)

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        run.process_batch(p, self.api)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        run.process_before_every_sampling(p, self.api, kwargs["x"], kwargs["noise"])

    def before_hr(self, p: Any, *args: Any) -> None:
        run.before_hr(p, self.api)

    def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
        run.post_sample(p, self.api)

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        run.postprocess_batch(p, kwargs["images"])

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        run.postprocess_image(p, pp)

    def postprocess_image_after_composite(self, p: Any, pp: Any, *args: Any) -> None:
        run.postprocess_image(p, pp)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        run.postprocess(p, self.api, processed)


class WebUI:
    """One running host. `kind`: "a1111", "forge" or "neo"."""

    def __init__(self, kind: str, model: Any = None) -> None:
        self.kind, self.neo = kind, kind == "neo"
        self.early_conds = kind != "a1111"
        self.hires_calls = 2 if kind == "forge" else 1
        self.opts, self.state = Opts(), State()
        names = ["None"] if self.neo else ["None", "Lanczos", "Nearest"]
        self.sd_upscalers = [SimpleNamespace(name=name, scaler=None) for name in [*names, "R-ESRGAN 2x+"]]
        self.sd_model: Any = Placeholder()
        self.model = model if model is not None else (LdmModel() if kind == "a1111" else Flux(neo=self.neo))
        self.dynamic_args = SimpleNamespace(kontext=False, edit=False, wan=False)
        self.calls: list[tuple[str, float, tuple[int, ...]]] = []
        self.scales: list[float] = []
        self.mixed: list[tuple[Tensor, Tensor, float]] = []
        self.samplers: list[Sampler] = []
        self.texts: list[Any] = []
        self.saved: list[Any] = []
        self.params_txt: list[dict[str, Any]] = []
        self.infotexts: list[dict[str, Any]] = []
        self.errors: list[BaseException] = []
        self.events: list[str] = []
        self.fail_at = self.interrupt_at = -1
        self.twice = False
        self.on_image: Callable[[Any], object] | None = None
        self.on_finished: Callable[[Any, Any], object] | None = None
        self.at: dict[str, Callable[[Any], object]] = {}
        self.api = webui_host.attach(self.import_module)
        self.script: Any = Hooks(self.api)
        self.args: tuple[Any, ...] = ()

    def import_module(self, name: str) -> Any:
        """The host's modules, as far as the extension asks for them."""
        if name == "modules.shared":
            return self
        if name == "modules.rng":
            return SimpleNamespace(ImageRNG=ImageRNG)
        if name == "modules.sd_samplers_timesteps":
            return SimpleNamespace(samplers_data_timesteps=[SimpleNamespace(name="DDIM")])
        if name == "backend.args" and self.neo:
            return SimpleNamespace(dynamic_args=self.dynamic_args)
        if name == "modules.processing":
            return SimpleNamespace(opt_f=self.model.vae.factor)
        if name == "modules.infotext_utils":
            return SimpleNamespace(
                parse_generation_parameters=parse_generation_parameters, get_override_settings=self.settings_of
            )
        if name == "modules.sd_models":
            return SimpleNamespace(checkpoint_aliases={"0123456789": 1, "fedcba9876": 2})
        raise ImportError(name)

    def settings_of(self, params: dict[str, Any]) -> list[tuple[str, str, Any]]:
        labels = {"Model hash": "sd_model_checkpoint", "Clip skip": "CLIP_stop_at_last_layers"}
        found = [(label, key, params[label]) for label, key in labels.items() if label in params]
        found = [(label, key, int(value) if key.startswith("CLIP") else value) for label, key, value in found]
        return [entry for entry in found if entry[2] != getattr(self.opts, entry[1])]

    @property
    def prompt_styles(self) -> Any:
        return SimpleNamespace(apply_styles_to_prompt=lambda prompt, styles: ", ".join([prompt, *styles]))

    def job(self, **fields: Any) -> Any:
        return (Txt2Img if self.kind == "a1111" else ForgeTxt2Img)(self, **fields)

    def round_target(self, side: float) -> int:
        return math.floor(side / 64 + 0.5) * 64 if self.neo else int(side)

    def create_sampler(self, name: str) -> Sampler:
        return (TimestepSampler if SAMPLERS[name][1].get("timesteps") else Sampler)(self, name)

    def encode_text(self, prompts: Any, negative: Any, scale: float) -> tuple[Any, Any]:
        self.texts.append(list(prompts))
        return ("c", tuple(prompts)), None if scale == 1 and self.kind != "a1111" else ("uc", tuple(negative))

    def images_to_samples(self, pictures: Tensor) -> Tensor:
        model = self.sd_model
        if len(pictures) > 1 and not getattr(model, "is_wan", False):
            parts = [model.get_first_stage_encoding(model.encode_first_stage(one[None]))[0] for one in pictures]
            return torch.stack(parts)
        return model.get_first_stage_encoding(model.encode_first_stage(pictures))

    def hook(self, name: str, p: Any, *before: Any, **kwargs: Any) -> None:
        """Call one hook of the script; hosts catch and print what it raises."""
        self.events.append(name)
        for _ in range(2 if self.twice else 1):
            if not hasattr(self.script, name):
                return
            try:
                getattr(self.script, name)(p, *before, *self.args, **kwargs)
            except Exception as error:
                self.errors.append(error)
        if name in self.at:
            self.at[name](p)

    def generate(self, p: Any, *args: Any) -> Any:
        """A job from begin to end, as the hosts' `process_images`."""
        self.args = args
        self.hook("before_process", p)
        stored = {key: self.opts.data[key] for key in p.override_settings if key in self.opts.data}
        try:
            self.opts.data.update(p.override_settings)
            self.sd_model = self.model
            return self._generate(p)
        finally:
            self.opts.data.update(stored)
            self.state.processing_has_refined_job_count = False
            self.state.job_count = -1

    def _generate(self, p: Any) -> Any:
        if hasattr(self.sd_model, "fix_dimensions"):
            p.width, p.height = self.sd_model.fix_dimensions(p.width, p.height)
        if self.neo:
            p.width, p.height = (max(round(side / 64), 1) * 64 for side in (p.width, p.height))
        p.setup_prompts()
        count = len(p.all_prompts)
        step = 1 if p.subseed_strength == 0 else 0
        p.all_seeds = p.seed if isinstance(p.seed, list) else [p.seed + i * step for i in range(count)]
        p.all_subseeds = p.subseed if isinstance(p.subseed, list) else [p.subseed + i for i in range(count)]
        self.hook("process", p)
        p.init()
        images: list[Any] = []
        self.pictures: list[Image.Image] = []
        for n in range(p.n_iter):
            p.iteration = n
            self.state.skipped = False
            if self.state.interrupted or self.state.stopping_generation:
                break
            self._batch(p, n, images)
        infotexts = [create_infotext(p, i) for i in range(len(images))]
        processed = SimpleNamespace(width=p.width, height=p.height, images=images, infotexts=infotexts)
        processed.pictures, processed.extra_generation_params = self.pictures, p.extra_generation_params
        processed.comments = "".join(f"{comment}\n" for comment in p.comments)
        self.hook("postprocess", p, processed)
        return processed

    def _batch(self, p: Any, n: int, images: list[Any]) -> None:
        place = slice(n * p.batch_size, (n + 1) * p.batch_size)
        p.prompts, p.negative_prompts = p.all_prompts[place], p.all_negative_prompts[place]
        p.seeds, p.subseeds = p.all_seeds[place], p.all_subseeds[place]
        factor = self.sd_model.vae.factor
        shape = self.sd_model.vae.channels, p.height // factor, p.width // factor
        if getattr(self.sd_model, "is_wan", False):
            shape = (shape[0], 1, *shape[1:])
        p.rng = ImageRNG(shape, p.seeds, p.subseeds, p.subseed_strength)
        told = {"batch_number": n, "prompts": p.prompts, "seeds": p.seeds, "subseeds": p.subseeds}
        self.hook("before_process_batch", p, **told)
        p.parse_extra_network_prompts()
        self.hook("process_batch", p, **told)
        p.setup_conds()
        if n == 0:
            self.params_txt.append(create_infotext(p, 0))
        samples = p.sample(
            conditioning=p.c,
            unconditional_conditioning=p.uc,
            seeds=p.seeds,
            subseeds=p.subseeds,
            subseed_strength=p.subseed_strength,
            prompts=p.prompts,
        )
        self.hook("post_sample", p, SimpleNamespace(samples=samples))
        if not getattr(samples, "already_decoded", False):
            samples = list(self.sd_model.decode_first_stage(samples))
        self.state.nextjob()
        samples = [picture[0] if picture.ndim == 4 else picture for picture in samples]
        self.hook("postprocess_batch", p, images=((torch.stack(samples).float() + 1) / 2).clamp(0, 1), batch_number=n)
        for i, picture in enumerate(samples):
            p.batch_index = i
            unit = ((picture.float() + 1) / 2).clamp(0, 1).numpy()
            pp = SimpleNamespace(image=Image.fromarray((255.0 * np.moveaxis(unit, 0, 2)).astype(np.uint8)))
            if self.on_image is not None:
                self.on_image(p)
            self.hook("postprocess_image", p, pp)
            if self.on_finished is not None:
                self.on_finished(p, pp)
            self.hook("postprocess_image_after_composite", p, pp)
            infotext = create_infotext(p, n * p.batch_size + i)
            pp.image.info["parameters"] = as_text(p, infotext, n * p.batch_size + i)
            self.infotexts.append(infotext)
            self.pictures.append(pp.image)
            images.append(picture)


def create_infotext(p: Any, index: int) -> dict[str, Any]:
    """What the host would write into a picture, before it is joined to one text."""
    params = {
        "Steps": p.steps,
        "Sampler": p.sampler_name,
        "Schedule type": p.scheduler,
        "CFG scale": p.cfg_scale,
        "Seed": p.all_seeds[index],
        "Size": f"{p.width}x{p.height}",
        "Variation seed": p.all_subseeds[index] if p.subseed_strength else None,
        "Variation seed strength": p.subseed_strength or None,
        "Denoising strength": p.extra_generation_params.get("Denoising strength"),
        **p.extra_generation_params,
    }
    for key, value in params.items():
        if callable(value):
            try:
                params[key] = value(p=p, index=index, prompt=p.all_prompts[index])
            except Exception:  # hosts print it
                params[key] = None
    return {key: value for key, value in params.items() if value is not None}


def as_text(p: Any, params: dict[str, Any], index: int) -> str:
    """The text of a picture: prompt, negative prompt, and a line of keys."""

    def quoted(value: Any) -> str:
        text = str(value)
        return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text

    negative = p.all_negative_prompts[index]
    lines = [p.all_prompts[index], *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {quoted(value)}" for key, value in params.items())])


def parse_generation_parameters(text: str, skip_fields: list[str] | None = None) -> dict[str, Any]:
    """The hosts' reader: keys of the last line, sizes split in two, and what a missing key means."""
    *lines, last = text.strip().split("\n")
    found: dict[str, Any] = {}
    for key, value in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last):
        value = json.loads(value) if value[:1] == value[-1:] == '"' else value
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        found.update({f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: value})
    found["Prompt"] = "\n".join(line for line in lines if not line.startswith("Negative prompt:"))
    return found


def pasted(params: dict[str, Any]) -> dict[str, str]:
    """The keys as a host parses them back from a picture's text: strings, sizes split in two."""
    found: dict[str, str] = {}
    for key, value in params.items():
        first, mark, second = str(value).partition("x")
        if mark and first.isdigit() and second.isdigit():
            found[f"{key}-1"], found[f"{key}-2"] = first, second
        else:
            found[key] = str(value)
    return found


def attributes(p: Any) -> dict[str, Any]:
    """A snapshot of a job's attributes, to compare; what holds a tensor or a host object counts by identity."""
    kept = {name: value for name, value in vars(p).items() if name not in ("comments", "ui")}

    def plain(value: Any) -> Any:
        return id(value) if isinstance(value, Tensor) else copy.copy(value) if isinstance(value, dict) else value

    return {name: plain(value) for name, value in kept.items()}


def levels(ui: WebUI, which: str) -> list[float]:
    """The noise levels at which the network was called in one of the passes."""
    return [level for name, level, _ in ui.calls if name == which]


def close(found: Sequence[float], wanted: Sequence[float]) -> bool:
    """Equal to the rounding of float32."""
    return len(found) == len(wanted) and all(
        math.isclose(a, b, rel_tol=2e-7, abs_tol=1e-9) for a, b in zip(found, wanted, strict=True)
    )
