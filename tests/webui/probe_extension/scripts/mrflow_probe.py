"""A WebUI extension that watches: what the network is called with, which hooks ran, what was left behind.

tests/webui/live.py copies this folder into a host's extensions for the length of a test run. Every event is one JSON
line appended to the file that the environment variable MRFLOW_PROBE_FILE names; without the variable nothing is
written. It changes a job only when its one argument, a line of JSON, asks for it: {"interrupt_at": n} interrupts before
the n-th forward, {"skip_at": n} skips the picture there, {"upscale": path} makes the job the one that the gallery's
upscale button starts for that picture, and {"detail": true} draws a corner of every picture anew with a job of its own,
as detailers do. {"prompts": [...]} gives each image a prompt of its own, as wildcard extensions do, and
{"keep_start": path} writes the latents that the first pass starts from to a file.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from typing import Any

import torch
from modules import (  # pyright: ignore
    processing,
    script_callbacks,
    scripts,
    sd_samplers_common,
    sd_samplers_kdiffusion,
    shared,
)
from PIL import Image

FILE = os.environ.get("MRFLOW_PROBE_FILE", "")
# What the hires and sampler route of a job reads from `p`: printed at every hook, so that a test sees when it changed.
WATCHED = (
    "width", "height", "steps", "enable_hr", "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x",
    "hr_resize_y", "hr_upscale_to_x", "hr_upscale_to_y", "denoising_strength", "cfg_scale", "hr_cfg", "sampler_name",
    "hr_sampler_name", "scheduler", "hr_scheduler", "is_hr_pass",
)  # fmt: skip


class _State:
    """The job now running. One at a time: hosts serialise jobs."""

    lock = threading.Lock()
    job = 0
    forward = 0
    current: Any = None
    interrupt_at = 0
    skip_at = 0
    keep_start = ""
    hooks: tuple[Any, ...] = ()


def _write(event: str, **values: Any) -> None:
    if not FILE:
        return
    line = json.dumps({"job": _State.job, "event": event, **values}, default=repr)
    with _State.lock, open(FILE, "a", encoding="utf-8") as out:
        out.write(line + "\n")


def _note(event: str, p: Any, **values: Any) -> None:
    watched = {name: getattr(p, name, None) for name in WATCHED}
    _write(event, override=getattr(p, "sampler_noise_scheduler_override", None) is not None, **watched, **values)


def _network(p: Any) -> Any:
    """The torch module that predicts, on every host family."""
    model = p.sd_model
    objects = getattr(model, "forge_objects", None)
    inner = objects.unet.model if objects is not None else model.model
    return inner.diffusion_model


def _schedule(p: Any) -> dict[str, Any]:
    """How the host turns the network's time argument into a sigma: the predictor or denoiser that the sampler uses."""
    wrap = getattr(p.sampler, "model_wrap", None)
    predictor = getattr(wrap, "predictor", None)
    table = getattr(wrap, "sigmas", None)
    return {
        "sampler": type(p.sampler).__name__,
        "func": getattr(getattr(p.sampler, "func", None), "__name__", repr(getattr(p.sampler, "func", None))),
        "prediction": getattr(predictor, "prediction_type", None),
        "sigma_max": float(table[-1]) if table is not None else None,
    }


def _before_forward(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    p = _State.current
    if p is None:
        return
    x = args[0]
    time = args[1] if len(args) > 1 else kwargs.get("timesteps", kwargs.get("t"))
    _State.forward += 1
    values = [] if time is None else time.detach().double().flatten().tolist()
    _write("network", hires=bool(getattr(p, "is_hr_pass", False)), shape=list(x.shape), time=values)
    if _State.interrupt_at and _State.forward == _State.interrupt_at:
        shared.state.interrupt()
    if _State.skip_at and _State.forward == _State.skip_at:
        shared.state.skip()


def _watch(p: Any) -> None:
    """(Re)attach the forward hook: the model may have been loaded anew since the last pass."""
    module = _network(p)
    if _State.hooks and _State.hooks[0] is module:
        return
    if _State.hooks:
        _State.hooks[1].remove()
    _State.hooks = (module, module.register_forward_pre_hook(_before_forward, with_kwargs=True))


def _sigma(params: Any) -> None:
    p = _State.current
    if p is not None:
        sigma = params.sigma.detach().double().flatten().tolist()
        _write("sigma", hires=bool(getattr(p, "is_hr_pass", False)), sigma=sigma, shape=list(params.x.shape))
        if _State.keep_start:
            torch.save(params.x.detach().cpu().clone(), _State.keep_start)
            _State.keep_start = ""


def _fingerprint() -> dict[str, str]:
    """Identity of everything process-wide that an extension could have patched, and every option's value."""
    found: dict[str, str] = {}
    owners: list[Any] = [processing, sd_samplers_common, sd_samplers_kdiffusion]
    for module in (processing, sd_samplers_common, sd_samplers_kdiffusion):
        owners += [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    for owner in owners:
        for name, value in vars(owner).items():
            if callable(value):
                found[f"{owner.__name__}.{name}"] = f"{type(value).__name__} {id(value):x}"
    for name in sorted({*shared.opts.data_labels, *shared.opts.data}):
        found[f"opts.{name}"] = repr(getattr(shared.opts, name, None))
    for sampler in sd_samplers_kdiffusion.samplers_data_k_diffusion:
        found[f"sampler.{sampler.name}"] = f"{id(sampler.constructor):x} {sampler.options!r}"
    return found


def _left_on(p: Any) -> dict[str, list[str]]:
    """Instance attributes that are not the dataclass's own: methods put over a class's, and names that mention us."""
    own = vars(p)
    shadows = sorted(name for name, value in own.items() if callable(value) and callable(getattr(type(p), name, None)))
    return {"shadows": shadows, "names": sorted(name for name in own if "mrflow" in name.lower())}


def _asked(args: tuple[Any, ...]) -> dict[str, Any]:
    return json.loads(args[0]) if args and args[0] else {}


def _axes() -> list[str]:
    """Labels of the X/Y/Z plot's axes on txt2img, in the order that its API arguments count them in."""
    for data in scripts.scripts_data:
        if os.path.basename(data.path) == "xyz_grid.py":
            options = data.module.axis_options
            return [option.label for option in options if getattr(option, "is_img2img", None) is not True]
    return []


def _draw_corner_anew(p: Any, picture: Any) -> Any:
    """`picture` with its upper left 128 pixels through img2img, in a job with the same scripts and arguments."""
    corner = picture.crop((0, 0, 128, 128))
    inner = processing.StableDiffusionProcessingImg2Img(
        init_images=[corner],
        denoising_strength=0.5,
        prompt=p.prompt,
        seed=7,
        steps=4,
        width=128,
        height=128,
        cfg_scale=p.cfg_scale,
        sampler_name=p.sampler_name,
        batch_size=1,
        n_iter=1,
        outpath_samples=p.outpath_samples,
        outpath_grids=p.outpath_grids,
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    inner.scripts = copy.copy(p.scripts)
    inner.scripts.alwayson_scripts = [each for each in p.scripts.alwayson_scripts if not isinstance(each, ProbeScript)]
    inner.script_args = p.script_args
    _State.current, outer = None, _State.current
    try:
        drawn = processing.process_images(inner).images[0]
    finally:
        _State.current = outer
    # Detailers run the outer job's hooks again, on a copy.
    others = copy.copy(p.scripts)
    others.alwayson_scripts = inner.scripts.alwayson_scripts
    again = copy.copy(p)
    others.before_process(again)
    others.process(again)
    _write("detail", size=list(drawn.size), left=_left_on(inner))
    result = picture.copy()
    result.paste(drawn.resize(corner.size), (0, 0))
    return result


def _watch_img2img() -> None:
    """Note every img2img job, also those that detailers start within a job, with scripts of their own choice."""
    kind = processing.StableDiffusionProcessingImg2Img
    if getattr(kind.init, "probe", False):
        return
    before = kind.init

    def init(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = [list(image.size) for image in self.init_images or [] if hasattr(image, "size")]
        _write("img2img", width=self.width, height=self.height, steps=self.steps, inputs=inputs)
        return before(self, *args, **kwargs)

    setattr(init, "probe", True)  # noqa: B010
    kind.init = init


_watch_img2img()


class ProbeScript(scripts.Script):
    def title(self) -> str:
        return "mrflow probe"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        import gradio  # pyright: ignore

        return [gradio.Textbox("", label="mrflow probe", visible=False)]

    def setup(self, p: Any, *args: Any) -> None:
        path = _asked(args).get("upscale")
        if path:
            # What modules/txt2img.py sets when the button is pressed.
            p.txt2img_upscale = True
            p.enable_hr = True
            p.batch_size = p.n_iter = 1
            p.firstpass_image = Image.open(path).convert("RGB")
            p.width, p.height = p.firstpass_image.size
        _write("setup")

    def before_process(self, p: Any, *args: Any) -> None:
        _State.job += 1
        _State.forward = 0
        _State.current = p
        _State.interrupt_at = int(_asked(args).get("interrupt_at", 0))
        _State.skip_at = int(_asked(args).get("skip_at", 0))
        _State.keep_start = str(_asked(args).get("keep_start", ""))
        _write("fingerprint", values=_fingerprint())
        _note("before_process", p)

    def process(self, p: Any, *args: Any) -> None:
        prompts = _asked(args).get("prompts")
        if prompts:
            p.all_prompts = list(prompts)
            if getattr(p, "all_hr_prompts", None):
                p.all_hr_prompts = list(prompts)
        _note("process", p, model=type(p.sd_model).__name__, axes=_axes())

    def before_process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _note("before_process_batch", p)

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _note("process_batch", p)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _watch(p)
        noise = kwargs.get("noise")
        if noise is None:
            summary = None
        else:
            summary = {
                "shape": list(noise.shape),
                "mean": float(noise.float().mean()),
                "std": float(noise.float().std()),
            }
        _note("process_before_every_sampling", p, noise=summary, **_schedule(p))

    def before_hr(self, p: Any, *args: Any) -> None:
        _note("before_hr", p)

    def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
        _note("post_sample", p)

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _note("postprocess_batch", p)

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        _note("postprocess_image", p, size=list(pp.image.size))
        if _asked(args).get("detail"):
            pp.image = _draw_corner_anew(p, pp.image)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        comments = getattr(processed, "comments", "") or ""
        counts = {"job_no": shared.state.job_no, "job_count": shared.state.job_count}
        generation = dict(p.extra_generation_params)
        _note("postprocess", p, left=_left_on(p), comments=comments, generation=generation, **counts)
        _State.current = None


def _add_reload(_demo: Any, app: Any) -> None:
    """A route for what the page's "Reload UI" button asks of the host."""
    app.add_api_route("/mrflow-probe/reload", shared.state.request_restart, methods=["POST"])


script_callbacks.on_cfg_denoiser(_sigma)
script_callbacks.on_app_started(_add_reload)
