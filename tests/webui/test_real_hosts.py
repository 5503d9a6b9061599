"""The extension in a real WebUI, through its API: sizes, sigmas at the network, metadata, and what is left behind.

Runs where MRFLOW_WEBUI_ROOT names an installed WebUI (see live.py), and is skipped elsewhere. The checkpoint may be of
any architecture; small ones of random weights do.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from documented_request import send
from live import X2_NAME, Answer, Host, find_installation
from PIL import Image, ImageChops

from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.controls import FIELDS, LABELS, Controls
from mrflow_sched.plan.make import make_plan
from mrflow_sched.sampling.shrink import shrink_noise

INSTALLATION, REASON = find_installation(os.environ)
pytestmark = pytest.mark.skipif(INSTALLATION is None, reason=REASON)

SIZE = 512, 512
STEPS = 20
# What the jobs here, at CFG 1, make of a flow model's class; for FLUX.2 of a checkpoint whose name says "base" (12 low
# steps cost more than all four of the distilled one, so there they are refused).
FLOW_FAMILIES = {
    "Flux": "flux1-dev",
    "Flux2": "flux2-klein-base",
    "StableDiffusion3": "sd3",
    "SD3Inferencer": "sd3",
    "Chroma": "chroma",
    "ZImage": "z-image-turbo",
    "Krea2": "krea2-turbo",
    "ErnieImage": "ernie-image-turbo",
    "Anima": "anima",
}
COARSE = ("Flux2", "ErnieImage", "QwenImage21")
"""Models with one latent for 16 pixels along a side."""
SIGMA = 0.12
# float32 of a float64 list, and on A1111 SD3 the way there and back over a time of 0..1000.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Generator[Host, None, None]:
    assert INSTALLATION is not None
    running = Host(INSTALLATION, tmp_path_factory.mktemp("webui"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def plain(host: Host) -> Answer:
    """A picture from before MrFlow was ever on; the job before it loads the checkpoint and notes its hash."""
    off(host)
    return off(host)


@pytest.fixture(scope="module")
def upscaler(host: Host) -> str:
    """A resize that every installation has: what is tested is not the upscaler."""
    names = [entry["name"] for entry in host.get("/sdapi/v1/upscalers")]
    return "Lanczos" if "Lanczos" in names else "None"


def job(host: Host, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    fields: dict[str, Any] = {"width": size[0], "height": size[1], "steps": STEPS, "scheduler": "Simple"}
    if host.installation.forge:
        # Forge wants these of every hires job that comes through the API.
        fields.update(hr_additional_modules=["Use same choices"], distilled_cfg_scale=3.5)
    return fields


def staged(upscaler: str, **changes: object) -> dict[str, object]:
    """The same choices on every family, whatever its own presets are."""
    return {"enabled": True, "preset": "12+1", "sigma": SIGMA, "upscaler": upscaler, **changes}


def off(host: Host) -> Answer:
    return host.txt2img([False], **job(host))


def same(first: Image.Image, second: Image.Image) -> bool:
    return (
        first.size == second.size
        and ImageChops.difference(first.convert("RGB"), second.convert("RGB")).getbbox() is None
    )


def farthest(first: Image.Image, second: Image.Image) -> int:
    pixels = [np.asarray(picture.convert("RGB"), np.int16) for picture in (first, second)]
    return int(np.abs(pixels[0] - pixels[1]).max())


def family(answer: Answer) -> str | None:
    """The flow family of the checkpoint, None for the others, from the class of the host's model."""
    return FLOW_FAMILIES.get(answer.of("process")[0]["model"])


def keys(answer: Answer) -> dict[str, str]:
    """Keys of the last line of the metadata; quoted values whole."""
    line = answer.infotext.rsplit("\n", 1)[-1]
    return {key.strip(): value for key, value in re.findall(r'([\w /-]+): ("(?:\\.|[^"])*"|[^,]*)(?:,|$)', line)}


def low_size(answer: Answer) -> tuple[int, int]:
    width, height = keys(answer)["MrFlow size"].split("x")
    return int(width), int(height)


def expected_first(answer: Answer, steps: int = 12) -> list[float]:
    """What make_plan gives the low size: only its own tokens count."""
    width, height = low_size(answer)
    name = family(answer)
    assert name is not None
    plan = make_plan(name, 2 * width, 2 * height, low_steps=steps, refine_steps=1, sigma=SIGMA)
    assert (plan.stages[0].width, plan.stages[0].height) == (width, height)
    return list(plan.stages[0].sigmas[:-1])


def expected_refine(answer: Answer, sigma: float = SIGMA, steps: int = 1) -> list[float]:
    """Evenly from sigma down, 0 left out; by equal signal-to-noise ratio on models that are no flow."""
    levels = [sigma * (steps - index) / steps for index in range(steps)]
    return levels if family(answer) else [level / (1 - level) for level in levels]


def close(seen: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(seen) == len(wanted) and bool(np.allclose(seen, wanted, rtol=TOLERANCE, atol=TOLERANCE))


def single(sigmas: Sequence[float]) -> list[float]:
    """The values as single precision holds them."""
    return np.asarray(sigmas, np.float32).tolist()


def check_staged(answer: Answer, *, sigma: float = SIGMA, low_steps: int = 12, refine_steps: int = 1) -> None:
    """Both passes ran at the plan's sigmas and nothing else did."""
    assert len(answer.forwards(hires=False)) == low_steps
    assert len(answer.forwards(hires=True)) == refine_steps
    assert close(answer.sigmas(hires=True), expected_refine(answer, sigma, refine_steps))
    if family(answer):
        assert close(answer.sigmas(hires=False), expected_first(answer, low_steps))
        assert close(at_network(answer, hires=True), expected_refine(answer, sigma, refine_steps))


def at_network(answer: Answer, *, hires: bool) -> list[float]:
    """The network's own time argument as a sigma; flow networks are called with it, or with 1000 times it."""
    times = [entry["time"][0] for entry in answer.forwards(hires=hires)]
    model = answer.of("process")[0]["model"]
    return [time / 1000 if "SD3" in model or model == "ErnieImage" else time for time in times]


def expected_size(answer: Answer, size: tuple[int, int]) -> tuple[int, int]:
    """The nearest multiples of 8, or of 16: some latents are that coarse, and A1111 rounds flow models' sides down
    to 16 in the first pass."""
    grid = 16 if answer.of("process")[0]["model"] in ("SD3Inferencer", *COARSE) else 8
    return int(size[0] / grid + 0.5) * grid, int(size[1] / grid + 0.5) * grid


# ------------------------------------------------------------------------------------------------------------- plainly


def test_the_script_is_listed_with_its_arguments_in_order(host: Host) -> None:
    scripts = [entry for entry in host.get("/sdapi/v1/script-info") if entry["name"] == "mrflow"]
    assert [entry["is_img2img"] for entry in scripts] == [False]
    assert [argument["label"] for argument in scripts[0]["args"]][: len(FIELDS)] == [LABELS[name] for name in FIELDS]


def test_nothing_is_complained_of_at_the_start(host: Host) -> None:
    assert "wrong extension" not in host.log()


def test_off_is_the_host_itself(host: Host, plain: Answer) -> None:
    assert plain.images[0].size == SIZE
    assert len(plain.forwards(hires=False)) == STEPS
    assert not plain.forwards(hires=True)
    assert "MrFlow" not in plain.infotext
    unsent = host.txt2img(**job(host))
    assert same(unsent.images[0], plain.images[0])
    assert unsent.infotext == plain.infotext


@pytest.mark.parametrize("size", [(512, 512), (832, 1216), (1000, 616)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_sizes_and_sigmas_are_the_plans(host: Host, plain: Answer, upscaler: str, size: tuple[int, int]) -> None:
    answer = host.txt2img(staged(upscaler), **job(host, size))
    wanted = expected_size(answer, size)
    assert answer.images[0].size == wanted
    low = low_size(answer)
    assert abs(low[0] / low[1] / (wanted[0] / wanted[1]) - 1) < 0.03
    shapes = [entry["shape"][-2:] for entry in (answer.forwards(hires=False)[0], answer.forwards(hires=True)[0])]
    cell = 16 if answer.of("process")[0]["model"] in COARSE else 8
    assert shapes == [[low[1] // cell, low[0] // cell], [wanted[1] // cell, wanted[0] // cell]]
    check_staged(answer)


def test_metadata_tells_the_final_size_and_no_hires_fix(host: Host, plain: Answer, upscaler: str) -> None:
    answer = host.txt2img(staged(upscaler), **job(host))
    found = keys(answer)
    assert found["Size"] == f"{SIZE[0]}x{SIZE[1]}"
    assert found["MrFlow"].startswith("12+1 x2")
    assert (found["MrFlow steps"], found["MrFlow sigma"], found["MrFlow upscaler"]) == ("12+1", "0.12", upscaler)
    assert not [key for key in found if key.startswith("Hires") or key == "Denoising strength"]
    assert answer.images[0].info["parameters"] == answer.infotext


def test_a_picture_repeats_itself_and_comes_back_from_its_metadata(host: Host, plain: Answer, upscaler: str) -> None:
    wanted = staged(upscaler, refine_steps=2, sigma=0.2)
    first = host.txt2img(wanted, **job(host))
    second = host.txt2img(wanted, **job(host))
    assert same(first.images[0], second.images[0])
    assert not same(first.images[0], plain.images[0])
    parsed = host.post("/sdapi/v1/png-info", {"image": first.encoded(0)})["parameters"]
    assert str(parsed["MrFlow"]).startswith("12+1 x2 refine=2 sigma=0.2")
    assert not parsed.get("Hires upscale")


def test_a_pasted_text_makes_the_same_picture(host: Host, plain: Answer, upscaler: str) -> None:
    """Hosts fill the page's controls from a picture's metadata, and here a job's; a text without MrFlow is off."""
    first = host.txt2img(staged(upscaler, refine_steps=2, sigma=0.2, refine_seed="host"), **job(host))
    fields = {**job(host), "styles": []}  # Forge fails where it has to look for them in the text
    again = host.txt2img(infotext=first.infotext, **fields)
    assert same(again.images[0], first.images[0])
    check_staged(again, sigma=0.2, refine_steps=2)
    assert same(host.txt2img(infotext=plain.infotext, **fields).images[0], plain.images[0])


# ------------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("changes", "low_steps", "refine_steps", "sigma"),
    [
        ({"preset": "8+2"}, 8, 2, SIGMA),
        ({"low_steps": 6, "refine_steps": 3, "sigma": 0.3}, 6, 3, 0.3),
        ({"solver": "multistep"}, 12, 1, SIGMA),
        ({"refine_seed": "host", "colour_guard": "auto"}, 12, 1, SIGMA),
    ],
    ids=["8+2", "own numbers", "multistep", "host noise and colour guard"],
)
def test_choices(
    host: Host,
    plain: Answer,
    upscaler: str,
    changes: dict[str, object],
    low_steps: int,
    refine_steps: int,
    sigma: float,
) -> None:
    answer = host.txt2img(staged(upscaler, **changes), **job(host))
    assert answer.images[0].size == SIZE
    assert len(answer.forwards(hires=True)) == refine_steps
    assert close(answer.sigmas(hires=True), expected_refine(answer, sigma, refine_steps))
    if changes.get("solver") != "multistep":
        check_staged(answer, sigma=sigma, low_steps=low_steps, refine_steps=refine_steps)
    elif family(answer):
        assert set(single(expected_first(answer))) <= set(single(answer.sigmas(hires=False)))


def test_the_hosts_own_schedule_stays_untouched(host: Host, plain: Answer, upscaler: str) -> None:
    answer = host.txt2img(staged(upscaler, shift="host"), **job(host))
    native = host.txt2img([False], **{**job(host, low_size(answer)), "steps": 12})
    assert answer.sigmas(hires=False) == native.sigmas(hires=False)
    assert close(answer.sigmas(hires=True), expected_refine(answer))


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "DPM++ 2M SDE", "Euler a", "LMS"])
def test_every_first_order_sampler_gets_the_exact_list(host: Host, plain: Answer, upscaler: str, sampler: str) -> None:
    answer = host.txt2img(staged(upscaler), **{**job(host), "sampler_name": sampler})
    if family(answer) and sampler == "DPM++ 2M SDE" and answer.sigmas(hires=False)[0] < 1:
        # Forge Neo's own function starts a ten-thousandth of its time below 1, where log SNR is finite.
        assert close(answer.sigmas(hires=True), expected_refine(answer))
        assert close(answer.sigmas(hires=False)[1:], expected_first(answer)[1:])
        assert answer.sigmas(hires=False)[0] > 0.9999
        return
    check_staged(answer)


@pytest.mark.parametrize("sampler", ["Heun", "DPM2", "DPM2 a"])
def test_samplers_with_calls_in_between_start_and_end_on_the_list(
    host: Host, plain: Answer, upscaler: str, sampler: str
) -> None:
    answer = host.txt2img(staged(upscaler), **{**job(host), "sampler_name": sampler})
    assert close(answer.sigmas(hires=True), expected_refine(answer))
    if family(answer):
        seen, wanted = single(answer.sigmas(hires=False)), single(expected_first(answer))
        assert seen[0] == wanted[0]
        assert set(wanted) <= set(seen)


@pytest.mark.parametrize(
    "settings",
    [{"always_discard_next_to_last_sigma": True}, {"img2img_extra_noise": 0.1}, {"sgm_noise_multiplier": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_bend_schedules_do_not_bend_ours(
    host: Host, plain: Answer, upscaler: str, settings: dict[str, object]
) -> None:
    answer = host.txt2img(staged(upscaler), settings=settings, **job(host))
    if family(answer):
        check_staged(answer)
    assert close(answer.sigmas(hires=True), expected_refine(answer))


def test_timestep_samplers(host: Host, plain: Answer, upscaler: str) -> None:
    """DDIM ignores sigma lists: on flow models Euler takes its place, elsewhere it makes stage 1 its own way."""
    answer = host.txt2img(staged(upscaler), **{**job(host), "sampler_name": "DDIM"})
    assert answer.images[0].size == SIZE
    assert close(answer.sigmas(hires=True), expected_refine(answer))
    if family(answer):
        check_staged(answer)
        assert "DDIM" in answer.comments


def test_an_upscaler_file_of_the_host_is_found_and_used(host: Host, plain: Answer, upscaler: str) -> None:
    names = [entry["name"] for entry in host.get("/sdapi/v1/upscalers")]
    ours = [name for name in names if name.startswith(X2_NAME)]
    assert ours
    resized = host.txt2img(staged(upscaler), **job(host))
    for name in ours:
        answer = host.txt2img(staged(name), **job(host))
        check_staged(answer)
        assert answer.images[0].size == SIZE
        assert keys(answer)["MrFlow upscaler"] == name
        assert not same(answer.images[0], resized.images[0])


def test_arguments_as_a_list_and_as_an_object_are_the_same(host: Host, plain: Answer, upscaler: str) -> None:
    told = host.get("/mrflow/v1/schema")
    names = [argument["name"] for argument in told["arguments"]]
    assert names == list(FIELDS)
    wanted = staged(upscaler)
    values = [wanted.get(argument["name"], argument["default"]) for argument in told["arguments"]]
    listed = host.txt2img(values, **job(host))
    assert same(listed.images[0], host.txt2img(wanted, **job(host)).images[0])
    check_staged(listed)


def test_prompts_in_the_hosts_own_syntax(host: Host, plain: Answer, upscaler: str) -> None:
    """Editing, weights and extra networks: the passes have different steps, and each reads the prompt for its own."""
    prompt = "a [red:blue:0.5] (circle:1.2) <lora:there-is-none:0.7>"
    answer = host.txt2img(staged(upscaler), **job(host), prompt=prompt)
    assert answer.images[0].size == SIZE
    assert answer.infotext.splitlines()[0] == prompt
    check_staged(answer)
    assert not same(answer.images[0], host.txt2img(staged(upscaler), **job(host)).images[0])


def test_a_prompt_of_its_own_for_the_refine_pass(host: Host, plain: Answer, upscaler: str) -> None:
    usual = host.txt2img(staged(upscaler, sigma=0.5, refine_steps=3), **job(host))
    answer = host.txt2img(staged(upscaler, sigma=0.5, refine_steps=3), **job(host), hr_prompt="a wide blue landscape")
    assert not same(answer.images[0], usual.images[0])
    assert keys(answer)["Hires prompt"].strip('"') == "a wide blue landscape"
    check_nothing_left(answer)


def test_the_low_resolution_picture_is_saved_too(host: Host, plain: Answer, upscaler: str) -> None:
    settings = {"samples_save": True}
    host.txt2img(staged(upscaler, save_stages=True), settings=settings, **job(host), save_images=True)
    sizes = sorted(Image.open(path).size for path in host.saved.rglob("*.png"))
    assert sizes == [(SIZE[0] // 2, SIZE[1] // 2), SIZE]


# ----------------------------------------------------------------------------------------------------------- in a chain


@pytest.mark.parametrize("counts", [{"batch_size": 2}, {"n_iter": 2}], ids=["batch size", "batch count"])
def test_a_batch_holds_the_single_pictures(host: Host, plain: Answer, upscaler: str, counts: dict[str, int]) -> None:
    wanted = staged(upscaler)
    both = host.txt2img(wanted, **{**job(host), **counts}, seed=1234)
    singles = [host.txt2img(wanted, **job(host), seed=seed).images[0] for seed in (1234, 1235)]
    pictures = both.images[-2:]
    assert [picture.size for picture in pictures] == [SIZE, SIZE]
    # Networks round differently in a batch; another picture would be far away.
    assert all(farthest(one, other) <= 4 for one, other in zip(pictures, singles, strict=True))
    passes = counts.get("n_iter", 1)
    assert len(both.forwards(hires=True)) == passes
    assert close(both.sigmas(hires=True), expected_refine(both) * passes)


def test_interrupted_in_the_first_pass(host: Host, plain: Answer, upscaler: str) -> None:
    answer = host.txt2img(staged(upscaler), probe={"interrupt_at": 4}, **job(host))
    assert not answer.forwards(hires=True)
    assert answer.images[0].size == (SIZE[0] // 2, SIZE[1] // 2)
    assert "stopped" in answer.comments
    check_nothing_left(answer)
    assert same(off(host).images[0], plain.images[0])


def test_interrupted_in_the_refine_pass(host: Host, plain: Answer, upscaler: str) -> None:
    wanted = staged(upscaler, refine_steps=3)
    answer = host.txt2img(wanted, probe={"interrupt_at": 14}, **job(host))
    assert len(answer.forwards(hires=True)) < 3
    assert answer.images[0].size == SIZE
    check_nothing_left(answer)
    assert same(off(host).images[0], plain.images[0])


def test_skipped_in_the_first_pass(host: Host, plain: Answer, upscaler: str) -> None:
    """The picture that is skipped ends early; the next one is whole."""
    wanted = staged(upscaler)
    answer = host.txt2img(wanted, probe={"skip_at": 4}, **job(host), n_iter=2)
    assert same(answer.images[-1], host.txt2img(wanted, **job(host), seed=1235).images[0])
    assert len(answer.forwards(hires=False)) < 2 * 12
    check_nothing_left(answer)
    assert same(off(host).images[0], plain.images[0])


def plot(host: Host, wanted: object, axis: str, values: str) -> Answer:
    labels = host.txt2img([False], **job(host)).of("process")[0]["axes"]
    nothing = labels.index("Nothing")
    index = next(number for number, label in enumerate(labels) if axis in label.lower() and "mrflow" in label.lower())
    plots = [entry for entry in host.get("/sdapi/v1/script-info") if entry["name"] == "x/y/z plot"]
    rest = [argument["value"] for argument in plots[0]["args"][9:]]  # the legend, single pictures, seeds, margins
    rest[:2] = False, True
    arguments = [index, values, values.split(", "), nothing, "", [], nothing, "", [], *rest]
    return host.txt2img(wanted, script_name="x/y/z plot", script_args=arguments, **job(host))


def test_xyz_plot_over_sigma(host: Host, plain: Answer, upscaler: str) -> None:
    answer = plot(host, staged(upscaler), "sigma", "0.1, 0.3")
    assert close(answer.sigmas(hires=True), expected_refine(answer, 0.1) + expected_refine(answer, 0.3))
    assert all(picture.size == SIZE for picture in answer.images[1:3])
    assert not same(answer.images[1], answer.images[2])
    # The cell's copy of the job carries the axis's value; no other job ever sees it.
    check_nothing_left(answer, allowed=("_mrflow_axes",))


def test_the_gallerys_upscale_button(host: Host, plain: Answer, upscaler: str) -> None:
    """Stages 2 to 4 on a picture: no low-resolution pass, one forward at sigma."""
    path = host.folder / "picture.png"
    plain.images[0].resize((256, 256)).save(path)
    fields = {**job(host, (256, 256)), "hr_scale": 2.0, "hr_upscaler": upscaler, "denoising_strength": 0.4}
    answer = host.txt2img(staged(upscaler), probe={"upscale": str(path)}, **fields)
    assert answer.images[0].size == SIZE
    assert not answer.forwards(hires=False)
    assert close(answer.sigmas(hires=True), expected_refine(answer))
    check_nothing_left(answer)


def test_a_job_within_the_job(host: Host, plain: Answer, upscaler: str) -> None:
    """What detailers do after every picture: a job of their own with the same scripts, and the hooks on a copy."""
    usual = host.txt2img(staged(upscaler), **job(host), n_iter=2)
    answer = host.txt2img(staged(upscaler), probe={"detail": True}, **job(host), n_iter=2)
    assert [entry["size"] for entry in answer.of("detail")] == [[128, 128]] * 2
    assert all(entry["left"] == {"shadows": [], "names": []} for entry in answer.of("detail"))
    for before, after in zip(usual.images[-2:], answer.images[-2:], strict=True):
        assert after.size == SIZE
        assert not same(before.crop((0, 0, 128, 128)), after.crop((0, 0, 128, 128)))
        rest = (128, 128, *SIZE)
        assert same(before.crop(rest), after.crop(rest))
    assert close(answer.sigmas(hires=True), usual.sigmas(hires=True))
    assert close(answer.sigmas(hires=False), usual.sigmas(hires=False))
    check_nothing_left(answer)
    assert same(off(host).images[0], plain.images[0])


# ----------------------------------------------------------------------------------------------------- known complaints
# What users of Hires. fix and of extensions like this one report publicly, and what they would find here.


def test_each_image_of_a_batch_is_refined_with_its_own_prompt(host: Host, plain: Answer, upscaler: str) -> None:
    """Elsewhere the second pass took the first prompt of the batch for all (forge 1330, OneButtonPrompt 81)."""
    prompts = ["a red circle on green", "a wide blue landscape"]
    wanted = staged(upscaler, sigma=0.5, refine_steps=3)
    both = host.txt2img(wanted, probe={"prompts": prompts}, **job(host), n_iter=2)
    for at, prompt in enumerate(prompts):
        alone = host.txt2img(wanted, **job(host), prompt=prompt, seed=1234 + at)
        assert same(both.images[-2 + at], alone.images[0])


def test_a_distilled_guidance_does_not_stick(host: Host, plain: Answer, upscaler: str) -> None:
    """Elsewhere the hires pass's value stayed for the next image (forge 1025)."""
    host.txt2img(staged(upscaler), **{**job(host), "distilled_cfg_scale": 8.0})
    assert same(off(host).images[0], plain.images[0])


def test_an_odd_size_comes_out_at_the_nearest_one_and_a_note_says_so(host: Host, plain: Answer, upscaler: str) -> None:
    """Elsewhere 1080x1351 came out smaller without a word (A1111 8440)."""
    answer = host.txt2img(staged(upscaler), **job(host, (540, 676)))
    wanted = expected_size(answer, (540, 676))
    assert answer.images[0].size == wanted
    assert keys(answer)["Size"] == f"{wanted[0]}x{wanted[1]}"
    assert "540x676 is made at" in answer.comments


def test_the_progress_of_a_job_ends_at_its_end(host: Host, plain: Answer, upscaler: str) -> None:
    """Elsewhere it stayed at a half (A1111 3184, 2663)."""
    for arguments in (staged(upscaler), staged(upscaler, draft=True)):
        answer = host.txt2img(arguments, **job(host), n_iter=2)
        last = answer.of("postprocess")[-1]
        assert last["job_no"] == last["job_count"]


def test_the_button_goes_on_enlarging(host: Host, plain: Answer, upscaler: str) -> None:
    """Elsewhere a second press did nothing (reForge 277, forge 1535)."""
    path = host.folder / "step.png"
    picture = host.txt2img(staged(upscaler), **job(host, (256, 256)))
    for side in (512, 1024):
        path.write_bytes(base64.b64decode(picture.encoded(0)))
        fields = {**job(host, (256, 256)), "hr_scale": 2.0, "hr_upscaler": upscaler, "denoising_strength": 0.4}
        picture = host.txt2img(staged(upscaler), probe={"upscale": str(path)}, **fields)
        assert picture.images[0].size == (side, side)
    assert keys(picture)["MrFlow enlarged"].count(" to ") == 2
    assert (keys(picture)["Size"], keys(picture)["MrFlow steps"]) == ("256x256", "12+1")


# ------------------------------------------------------------------------------------------- the composition of a seed


@pytest.mark.parametrize(
    ("size", "factor", "settings"),
    [
        (SIZE, 2.0, {}),
        ((640, 448), 1.5, {"randn_source": "CPU", "eta_noise_seed_delta": 3}),
        (SIZE, 2.0, {"randn_source": "NV"}),
    ],
    ids=["whole ratio", "other ratio", "other source of random numbers"],
)
def test_stage_1_starts_from_the_noise_of_the_hosts_own_picture(
    host: Host, plain: Answer, upscaler: str, size: tuple[int, int], factor: float, settings: dict[str, Any]
) -> None:
    """By the latents of the first call of the network. The same image then from the metadata and from the draft."""
    fields = {**job(host, size), "subseed": 7, "subseed_strength": 0.3, "settings": settings}
    kept = staged(upscaler, factor=factor, keep_composition=True)

    def started(mrflow: Any) -> tuple[Any, Answer]:
        path = host.folder / "start.pt"
        answer = host.txt2img(mrflow, probe={"keep_start": str(path)}, **fields)
        return torch.load(path, weights_only=True)[:1].float(), answer

    native, _ = started([False])
    low, answer = started(kept)
    usual, _ = started({**kept, "keep_composition": False})
    shrunk = shrink_noise(native.flatten(1, -3), *low.shape[-2:]).reshape(low.shape)
    near = (low - shrunk).abs().max() / low.std()
    assert float(near) < 1e-5
    assert float((usual - shrunk).abs().max() / low.std()) > 1.0
    assert keys(answer)["MrFlow noise"] == "nested"
    assert same(host.txt2img(infotext=answer.infotext, **job(host, size), styles=[]).images[0], answer.images[0])
    draft = host.txt2img({**kept, "draft": True}, **fields)
    for source in (draft.encoded(0), draft.images[0].info["parameters"]):
        finished = host.txt2img({"finish": source}, **job(host, (320, 256)))
        assert same(finished.images[0], answer.images[0])
        assert finished.infotext == answer.infotext
        check_nothing_left(finished)
    check_nothing_left(answer)
    assert same(off(host).images[0], plain.images[0])


def test_the_plot_compares_both_compositions(host: Host, plain: Answer, upscaler: str) -> None:
    answer = plot(host, staged(upscaler), "keep composition", "True, False")
    alone = [host.txt2img(staged(upscaler, keep_composition=value), **job(host)) for value in (True, False)]
    assert [same(one, other.images[0]) for one, other in zip(answer.images[1:3], alone, strict=True)] == [True, True]
    assert not same(answer.images[1], answer.images[2])


# ------------------------------------------------------------------------------------------------- drafts and detailers


def test_a_batch_of_drafts_and_each_of_them_finished(host: Host, plain: Answer, upscaler: str) -> None:
    """The whole run, its drafts, and what is made of them: from the file, from its text, in one job, by the button."""
    wanted = staged(upscaler, colour_guard="auto")
    fields = {**job(host), "cfg_scale": 2.5, "n_iter": 2}
    whole = host.txt2img(wanted, **fields)
    drafts = host.txt2img({**wanted, "draft": True}, **fields)
    pictures = drafts.images[-2:]
    files = [drafts.encoded(len(drafts.images) - 2 + at) for at in (0, 1)]
    assert [picture.size for picture in pictures] == [low_size(drafts)] * 2
    assert not drafts.forwards(hires=True)
    assert (keys(drafts)["Size"], len(keys(drafts)["MrFlow draft"])) == (f"{SIZE[0]}x{SIZE[1]}", 8)
    # Another job and other values on the way: what counts is in the draft.
    other = {**job(host, (320, 256)), "prompt": "something else", "seed": 5, "cfg_scale": 3.0}
    for at in (0, 1):
        finished = host.txt2img({"finish": files[at]}, **other)
        assert not finished.forwards(hires=False)
        assert same(finished.images[0], whole.images[-2 + at])
        assert finished.infotext == whole.info["infotexts"][-2 + at]
        check_nothing_left(finished)
    both = host.txt2img({"finish": [files[1], pictures[0].info["parameters"]]}, **other)
    assert [same(one, other) for one, other in zip(both.images[-2:], whole.images[:-3:-1], strict=True)] == [True, True]
    assert len(both.forwards(hires=False)) == 12  # the text alone runs stage 1 again
    path = host.folder / "draft.png"
    path.write_bytes(base64.b64decode(files[0]))
    pressed = host.txt2img({**wanted, "draft": True}, probe={"upscale": str(path)}, **other)
    assert same(pressed.images[0], whole.images[-2])
    assert same(off(host).images[0], plain.images[0])


def test_a_draft_from_a_batch_is_near_its_image_of_the_whole_batch(host: Host, plain: Answer, upscaler: str) -> None:
    """Networks round differently in a batch of two; stage 1 is the same batch, the refine step is not."""
    fields = {**job(host), "batch_size": 2}
    whole = host.txt2img(staged(upscaler), **fields)
    drafts = host.txt2img(staged(upscaler, draft=True), **fields)
    finished = host.txt2img({"finish": drafts.encoded(len(drafts.images) - 1)}, **fields)
    assert farthest(finished.images[0], whole.images[-1]) <= 4


def test_drafts_in_a_plot(host: Host, plain: Answer, upscaler: str) -> None:
    answer = plot(host, staged(upscaler, draft=True), "low steps", "4, 6")
    assert [picture.size for picture in answer.images[1:3]] == [low_size(answer)] * 2
    assert len(answer.forwards(hires=False)) == 10
    assert not answer.forwards(hires=True)
    check_nothing_left(answer, allowed=("_mrflow_axes",))


def test_what_cannot_be_finished_is_an_error_and_nothing_is_made(host: Host, plain: Answer) -> None:
    with pytest.raises(RuntimeError, match=r"answered 422.*needs a draft"):
        host.txt2img({"finish": plain.encoded(0)}, **job(host))
    assert same(off(host).images[0], plain.images[0])


@pytest.mark.parametrize("whole", [False, True], ids=["only masked", "whole picture"])
def test_a_real_detailer_gets_the_final_size_and_the_users_steps(
    host: Host, plain: Answer, upscaler: str, whole: bool
) -> None:
    """ADetailer with a detector of random weights, which finds something everywhere."""
    titles = {entry["name"] for entry in host.get("/sdapi/v1/script-info")}
    if "adetailer" not in titles:
        pytest.skip("ADetailer is not installed in this WebUI.")
    detector = {"ad_model": "face_tiny.pt", "ad_confidence": 0.0, "ad_mask_k": 1, "ad_denoising_strength": 0.5}
    asked = [True, False, {**detector, "ad_inpaint_only_masked": not whole}]
    fields = {**job(host), "n_iter": 2, "scripts": {"adetailer": {"args": asked}}}
    native, answer = host.txt2img([False], **fields), host.txt2img(staged(upscaler), **fields)
    seen = answer.of("img2img")
    assert [(entry["width"], entry["height"], entry["steps"], entry["inputs"]) for entry in seen] == [
        (entry["width"], entry["height"], entry["steps"], entry["inputs"]) for entry in native.of("img2img")
    ]
    assert len(seen) == 2
    assert (seen[0]["width"], seen[0]["height"], seen[0]["steps"]) == (*SIZE, STEPS)
    assert [picture.size for picture in answer.images[-2:]] == [SIZE] * 2
    usual = host.txt2img(staged(upscaler), **job(host), n_iter=2)
    assert all(not same(one, other) for one, other in zip(answer.images[-2:], usual.images[-2:], strict=True))
    # Nobody repaints a draft, so it is finished to the image that the detailer then gets.
    drafts = host.txt2img(staged(upscaler, draft=True), **fields)
    assert not drafts.of("img2img")
    finished = host.txt2img({"finish": drafts.encoded(len(drafts.images) - 1)}, **{**fields, "n_iter": 1})
    assert same(finished.images[0], answer.images[-1])
    check_nothing_left(answer)


def test_what_the_button_did_to_an_image_is_told(host: Host, plain: Answer, upscaler: str) -> None:
    path = host.folder / "native.png"
    native = host.txt2img([False], **job(host, (256, 256)))
    path.write_bytes(base64.b64decode(native.encoded(0)))
    fields = {**job(host, (256, 256)), "hr_scale": 2.0, "hr_upscaler": upscaler, "denoising_strength": 0.4, "steps": 7}
    found = keys(host.txt2img(staged(upscaler), probe={"upscale": str(path)}, **fields))
    assert "256x256 to 512x512" in found["MrFlow enlarged"]
    assert (found["Size"], found["Steps"]) == ("256x256", str(STEPS))
    assert "MrFlow" not in found


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_refiner_is_refused_and_the_picture_is_the_hosts_own(host: Host, plain: Answer, upscaler: str) -> None:
    refined: dict[str, Any] = {"refiner_checkpoint": host.checkpoint, "refiner_switch_at": 0.5}
    answer = host.txt2img(staged(upscaler), **job(host), **refined)
    assert "refiner" in answer.comments
    usual = host.txt2img([False], **job(host), **refined)
    assert same(answer.images[0], usual.images[0])
    check_refused(host, answer, "refiner", usual)
    check_nothing_left(answer)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"enabled": True, "factor": 9}, "factor"),
        ({"enabled": True, "nonsense": 1}, "nonsense"),
        ({"sgma": 0.2}, "did you mean 'sigma'"),
        ([True, "bad"], "bad"),
        (["true"], "enabled must be true or false"),
        ({"sigma": float("nan")}, "sigma must be a number"),
        ({"low_steps": 10**15}, "low_steps must be a whole number"),
    ],
    ids=["out of range", "unknown name", "misspelt name", "unknown preset", "no switch", "NaN", "huge"],
)
def test_bad_arguments_cost_one_sentence_and_the_picture_is_the_plain_one(
    host: Host, plain: Answer, arguments: object, word: str
) -> None:
    answer = host.txt2img(arguments, **job(host))
    assert same(answer.images[0], plain.images[0])
    assert word in answer.comments
    check_refused(host, answer, word, plain)


@pytest.mark.parametrize("arguments", [{"sigma": 5}, {"factor": 4, "preset": "12+1"}], ids=["arguments", "size"])
def test_a_job_that_is_to_be_stopped_answers_with_an_error(host: Host, plain: Answer, arguments: object) -> None:
    """Also where the wish is a setting of this one job."""
    small = job(host, (128, 128))
    with pytest.raises(RuntimeError, match=r"answered 422.*(sigma must be a number|sides must be at least 64 px)"):
        host.txt2img(arguments, settings={"mrflow_when_refused": "stop the job"}, **small)
    assert same(off(host).images[0], plain.images[0])


def check_refused(host: Host, answer: Answer, word: str, usual: Answer) -> None:
    """The reply and the console say why, the text pastes as off, and everything else is the host's own."""
    told = str(answer.info["extra_generation_params"]["MrFlow"])
    assert told.startswith("refused (")
    assert word in told
    assert "MrFlow: MrFlow" in answer.log
    assert word in answer.log
    found = keys(answer)
    del found["MrFlow"]
    assert found == keys(usual)
    parsed = host.post("/sdapi/v1/png-info", {"image": answer.encoded(0)})["parameters"]
    assert infotext.read(parsed) == Controls()


# ------------------------------------------------------------------------------------------------------ nothing remains


def check_nothing_left(answer: Answer, allowed: Sequence[str] = ()) -> None:
    last = answer.of("postprocess")[-1]["left"]
    assert last["shadows"] == []
    assert [name for name in last["names"] if name not in allowed] == []


def test_an_unpatched_host_remains(host: Host, plain: Answer, upscaler: str) -> None:
    answer = host.txt2img(staged(upscaler), **job(host))
    check_nothing_left(answer)
    after = off(host)
    assert same(after.images[0], plain.images[0])
    assert after.infotext == plain.infotext
    assert after.of("fingerprint")[0]["values"] == plain.of("fingerprint")[0]["values"]
    assert after.sigmas(hires=False) == plain.sigmas(hires=False)


def test_hires_fix_of_the_host_still_works_afterwards(host: Host, plain: Answer, upscaler: str) -> None:
    fields = {**job(host, (256, 256)), "enable_hr": True, "hr_scale": 2.0, "hr_upscaler": upscaler}
    fields.update(hr_second_pass_steps=4, denoising_strength=0.5)
    first = host.txt2img([False], **fields)
    host.txt2img(staged(upscaler), **job(host))
    second = host.txt2img([False], **fields)
    assert first.sigmas(hires=True) == second.sigmas(hires=True)
    assert keys(first)["Hires upscaler"] == upscaler
    assert "MrFlow" not in second.infotext


def test_memory_stays_level(host: Host, plain: Answer, upscaler: str) -> None:
    wanted = staged(upscaler)
    small = job(host, (256, 256))
    for _ in range(6):
        host.txt2img(wanted, **small)
    before = host.memory()
    for _ in range(14):
        host.txt2img(wanted, **small)
    assert host.memory() - before < 64 * 2**20


def test_the_documented_command(host: Host, plain: Answer) -> None:
    size = {"width": SIZE[0], "height": SIZE[1], "override_settings": {"sd_model_checkpoint": host.checkpoint}}
    reply = send(host.address, size)
    assert "MrFlow: " in json.loads(reply["info"])["infotexts"][0]


def test_reload_ui(host: Host, plain: Answer, upscaler: str) -> None:
    """The host loads all scripts anew into the same process: everything is there once and works as before."""
    wanted = staged(X2_NAME)
    before, listed = host.txt2img(wanted, **job(host)), host.get("/sdapi/v1/upscalers")
    host.reload()
    assert host.get("/mrflow/v1/schema")["version"]
    assert sorted(entry["name"] for entry in host.get("/sdapi/v1/upscalers")) == sorted(
        entry["name"] for entry in listed
    )
    after = host.txt2img(wanted, **job(host))
    labels = after.of("process")[0]["axes"]
    assert len(labels) == len(set(labels))
    assert [label for label in labels if "MrFlow" in label] == [
        label for label in before.of("process")[0]["axes"] if "MrFlow" in label
    ]
    assert same(after.images[0], before.images[0])
    assert after.infotext == before.infotext
    check_staged(after)
    check_nothing_left(after)
    assert same(off(host).images[0], plain.images[0])


def test_the_target_of_hires_fix_is_the_final_size_and_the_plan_route_says_so(host: Host, upscaler: str) -> None:
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": upscaler, "denoising_strength": 0.5}
    fields = {**job(host, (256, 256)), **hires}
    plan = host.post("/mrflow/v1/plan", {**fields, "cfg_scale": 1.0, "args": staged(upscaler)})
    answer = host.txt2img(staged(upscaler), **fields)
    assert plan["refused"] is None
    assert answer.images[0].size == tuple(plan["final"]) == (384, 384)
    assert low_size(answer) == tuple(plan["low"]) == (192, 192)
    sentence = "MrFlow replaces Hires. fix; its target 384x384 is the final size."
    assert sentence in answer.comments
    assert sentence in plan["notes"]
    found = keys(answer)
    assert found["Size"] == "384x384"
    assert not [key for key in found if key.startswith("Hires ") and "prompt" not in key]
    assert len(plan["sigmas"]["first"] or range(13)) == 13
    assert same(host.txt2img(staged(upscaler), **job(host, (384, 384))).images[0], answer.images[0])


def test_the_plan_route_refuses_in_the_words_of_the_job(host: Host) -> None:
    answer = host.txt2img({"sgma": 0.2}, **job(host))
    told = host.post("/mrflow/v1/plan", {"args": {"sgma": 0.2}})
    assert set(told) == {"refused"}
    assert told["refused"] in answer.comments + answer.log


def test_the_sentence_on_speed_never_says_that_native_is_faster(host: Host, upscaler: str) -> None:
    host.txt2img(staged(upscaler), **job(host))
    answer = host.txt2img(staged(upscaler), **job(host))
    assert "MrFlow: 256x256 x12" in answer.comments
    found = re.search(r"20 steps at this size would take about (\S+) times as long", answer.comments)
    assert found is None or float(found[1]) >= 1.2


def test_a_draft_is_finished_after_a_restart(host: Host, plain: Answer, upscaler: str) -> None:
    """The last test: the WebUI is stopped and started again."""
    whole = host.txt2img(staged(upscaler), **job(host))
    draft = host.txt2img(staged(upscaler, draft=True), **job(host))
    host.stop()
    host.start()
    finished = host.txt2img({"finish": draft.encoded(0)}, **job(host))
    assert same(finished.images[0], whole.images[0])
    assert finished.infotext == whole.infotext
