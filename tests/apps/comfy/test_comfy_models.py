"""What ComfyUI's nodes make of the loaded model: its family, its units, its guidance, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy_bench import PLAN, Bench, name_of, refined
from comfy_doubles import (
    ENGINE,
    DiscreteSampling,
    Model,
    ModelSamplingFlux,
    Vae,
)

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.plan.families import get_family
from mrflow_sched.plan.schedule import native_sigmas

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.mark.parametrize(
    ("model", "values", "family"),
    [
        (Model(), {}, "z-image"),
        (Model(file="z_image_turbo_bf16"), {}, "z-image-turbo"),
        (Model(file=None), {"cfg": 1.0}, "z-image-turbo"),
        (Model(file=None), {"cfg": 4.0}, "z-image"),
        (Model(config="SomethingNew"), {}, "flow"),
        (Model(config="WAN21_T2V"), {"family": "flow"}, "flow"),
    ],
    ids=name_of,
)
def test_the_family_is_found(model: Model, values: dict[str, Any], family: str) -> None:
    text = Bench(model=model).run("MrFlowPlan", "model", output=5, **{**PLAN, **values})
    assert text.splitlines()[2].startswith(f"{family} ")


def test_what_is_assumed_of_a_model_is_said() -> None:
    text = Bench(model=Model(file=None)).run("MrFlowPlan", "model", output=5, **PLAN)
    assert "Nothing in the model tells whether it is z-image or z-image-turbo; z-image is assumed." in text
    flux = Model(config="Flux", file="flux1-dev", unet={"guidance_embed": True})
    for cfg, twice in ((0.0, False), (1.0, False), (2.0, True)):
        text = Bench(model=flux).run("MrFlowPlan", "model", output=5, **{**PLAN, "cfg": cfg})
        assert text.splitlines()[2].startswith("flux1-dev ")
        assert ("cfg 2 evaluates the model twice a step" in text) == twice
    text = Bench(model=Model(config="SomethingNew")).run("MrFlowPlan", "model", output=5, **PLAN)
    assert "The model is SomethingNew, of which MrFlow knows no settings" in text


@pytest.mark.parametrize(("sampling", "shift"), [(Model().sampling, 3.0), (ModelSamplingFlux(1.15), 3.1582)])
def test_the_models_own_shift_is_taken_where_it_is_asked_for_or_nothing_is_known(sampling: Any, shift: float) -> None:
    for model, values in ((Model(sampling=sampling), {"shift": "model"}), (Model("New", sampling=sampling), {})):
        made = Bench(model=model).run("MrFlowPlan", "model", **{**PLAN, **values})
        assert made.plan.stages[0].sigmas == pytest.approx(native_sigmas(6, mu=math.log(shift)), abs=1e-4)


def test_models_of_another_kind_of_noise_get_their_own_levels() -> None:
    from mrflow_sched.apps.comfy.family import first_sigmas, fit_of
    from mrflow_sched.apps.comfy.parts import stage_sigmas
    from mrflow_sched.apps.comfy.planned import planned

    model = Model(config="SDXL", kind="EPS", sampling=DiscreteSampling(), channels=4, unet={"context_dim": 2048})
    plan = planned(get_family("sdxl"), (512, 512), {"preset": "12+1", "sigma": 0.12}, fit=fit_of(model))
    first, later = stage_sigmas(plan, model, 1), stage_sigmas(plan, model, 2)
    assert later.tolist() == pytest.approx([0.12 / 0.88, 0.0])
    assert float(first[0]) == pytest.approx(14.6146, abs=1e-3)
    back = first_sigmas(first, model)
    assert back == pytest.approx(plan.plan.stages[0].sigmas, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "values", "sentence"),
    [
        (Model(config="SVD_img2vid", kind="V_PREDICTION_EDM"), {}, "SVD_img2vid, of the kind V_PREDICTION_EDM"),
        (Model(config="WAN21_T2V"), {}, "WAN21_T2V, which makes videos; .* choose 'flow' as the family"),
        (Model(config="ACEStep15"), {}, "ACEStep15, which makes no images"),
        (Model(config="MiniMaxMusic3"), {}, "MiniMaxMusic3, which makes no images"),
        (Model(config="SomeSound", dimensions=1), {}, "SomeSound, which makes no images"),
        (Model(config="SDXLRefiner", kind="EPS"), {}, "SDXLRefiner, which makes no images"),
        (
            Model(config="PixArtSigma", kind="EPS", unet={"depth": 28}),
            {},
            "PixArtSigma, which is no flow model, and neither SD1.5 nor SDXL",
        ),
        (Model(config="Ideogram4"), {}, "Ideogram4, which guides with two models"),
        (
            Model(config="SDXL", kind="EPS", channels=4, unet={"context_dim": 2048}),
            {"family": "flow"},
            "SDXL, which is no flow model; choose 'auto' as the family",
        ),
        (Model(), {"family": "sdxl"}, "family sdxl has other latents or another kind of noise"),
        (Model(file="z_image_turbo"), {"cfg": 4.0}, "the guidance scale must be left out or 1 for z-image-turbo"),
        (Model(), {"factor": 0.5}, "factor must be"),
        (Model(), {"width": 0}, "width must be"),
    ],
    ids=name_of,
)
def test_what_cannot_be_is_one_sentence_before_sampling(model: Model, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MrFlowError, match=sentence) as refused:
        Bench(model=model).run("MrFlowPlan", "model", **{**PLAN, **values})
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize(("channels", "ratio"), [(4, 8), (16, 8), (3, 1), (64, 32), (128, 16)])
def test_older_releases_do_not_tell_how_large_a_latent_is(channels: int, ratio: int) -> None:
    from mrflow_sched.apps.comfy.host import latent_ratio

    model = Model(channels=channels)
    del model.format.spacial_downscale_ratio
    assert latent_ratio(model) == ratio


@pytest.mark.parametrize(("own", "channels"), [(4, 16), (16, 4), (128, 16), (16, 128), (48, 16)])
def test_another_models_vae_is_refused_before_sampling(own: int, channels: int) -> None:
    sentence = f"the VAE makes latents of {own} channels, and the model's have {channels}"
    bench = Bench(model=Model(config="Unknown", channels=channels), vae=Vae(latent_channels=own))
    with pytest.raises(MrFlowError, match=sentence):
        bench.run("MrFlowPlan", "model", "vae", **PLAN)


def test_a_vae_that_does_not_tell_is_seen_by_its_latents() -> None:
    Bench(model=Model(config="Unknown", channels=64), vae=Vae(latent_channels=4)).run(
        "MrFlowPlan", "model", "vae", **PLAN
    )
    bench = Bench(vae=Vae(engine=replace(ENGINE, family=get_family("demo"))))
    with pytest.raises(MrFlowError, match="the VAE gives latents of 48 channels, and those of ZImage have 192"):
        refined(bench, torch.rand(1, 32, 32, 3))


# ----------------------------------------------------------------------------------------------------------- guidance

FLUX = Model(config="Flux", file="flux1-dev", unet={"guidance_embed": True})


def test_cfg_of_a_model_with_embedded_guidance_is_what_the_user_set_and_never_the_familys() -> None:
    for cfg, rows in ((0.0, 1), (1.0, 1), (3.0, 2)):
        bench = Bench(model=FLUX)
        bench.sampler(cfg=cfg)
        assert [each for _, each in bench.model.calls] == [rows] * 7
    bench.sampler(cfg=3.0, refine_cfg=1.0)
    assert [each for _, each in bench.model.calls] == [1]
    bench.sampler(cfg=1.0, refine_cfg=3.0)
    assert [each for _, each in bench.model.calls] == [1] * 6 + [2]


def test_a_distilled_model_takes_cfg_in_no_stage() -> None:
    turbo = Bench(model=Model(file="z_image_turbo"))
    turbo.sampler()
    assert [each for _, each in turbo.model.calls] == [1] * len(turbo.model.calls)
    with pytest.raises(MrFlowError, match="cfg must be 0 or 1 for Z-Image-Turbo, which is distilled; got 3"):
        turbo.sampler(refine_cfg=3.0)


def test_ideogram_can_be_planned_for_single_nodes() -> None:
    text = Bench(model=Model(config="Ideogram4")).run("MrFlowPlan", "model", output=5, **{**PLAN, "family": "flow"})
    assert text.splitlines()[2].startswith("flow ")


def test_models_that_count_noise_otherwise_are_told_what_a_sigma_is_there() -> None:
    model = Model(config="SDXL", kind="EPS", sampling=DiscreteSampling(), channels=4, unet={"context_dim": 2048})
    text = Bench(model=model).run("MrFlowPlan", "model", output=5, **PLAN)
    assert "sigma s is s / (1 - s) at its network, .12 is .136" in text
    assert "s / (1 - s)" not in Bench().run("MrFlowPlan", "model", output=5, **PLAN)


# ---------------------------------------------------------------------------------------------------------- what fits


def test_a_plan_is_for_the_model_that_it_was_made_for() -> None:
    bench = Bench()
    plan = bench.run("MrFlowPlan", "model", **PLAN)
    other: dict[str, Any] = {"model": Model(config="Krea2"), "plan": plan}
    given: dict[str, dict[str, Any]] = {
        "MrFlowSigmas": {"sigma": 0.0, "steps": 0, "curve": "linear"},
        "MrFlowGuider": {"positive": [["red", {}]], "cfg": 1.0},
    }
    for kind, values in given.items():
        with pytest.raises(MrFlowError, match="the plan was made for ZImage, and the model is Krea2"):
            bench.run(kind, **{**other, **values, "stage": 1})


def test_a_vae_of_another_scale_is_refused() -> None:
    class Finer(Vae):
        def spacial_compression_encode(self) -> int:
            return 4

    with pytest.raises(MrFlowError, match="the VAE makes one latent of 4 pixels, and the model's stand for 8"):
        Bench(vae=Finer()).run("MrFlowPlan", "model", "vae", **PLAN)

    class Silent(Vae):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return super().encode(images)[..., ::2, ::2]

    with pytest.raises(MrFlowError, match="latents of 4 columns for 64 pixels, and ZImage has one for 8"):
        Bench(vae=Silent()).sampler()


class Broken(Vae):
    """A VAE that returns NaN for some images."""

    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.rows = list(rows)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        images = super().decode(samples)
        images[self.rows] = torch.nan
        return images


def test_nan_is_refused_with_its_owner_and_told_where_only_some_images_have_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(MrFlowError, match="the VAE returned NaN or infinity in stage 1; start ComfyUI with --fp32-vae"):
        Bench(vae=Broken(0)).sampler()
    image = Bench(vae=Broken(1)).sampler(batch_size=2)
    torch.testing.assert_close(image[0], Bench().sampler()[0], rtol=0, atol=2e-6)
    assert "MrFlow: the VAE returned NaN or infinity in stage 1 for image 2 of the batch." in caplog.text
    nan = torch.full((1, 192, 4, 4), torch.nan)
    plan = Bench().run("MrFlowPlan", "model", **PLAN)
    with pytest.raises(MrFlowError, match="the model returned NaN or infinity in stage 1"):
        Bench().run("MrFlowDecode", "vae", plan=plan, samples={"samples": nan}, stage=1)


def test_an_image_of_another_shape_is_said_to_be_cropped() -> None:
    bench = Bench()
    plan = bench.run("MrFlowPlan", "model", **PLAN)
    values = {"plan": plan, "image": torch.rand(1, 32, 64, 3), "stage": 2, "index": 0}
    text = bench.run("MrFlowHandoff", "vae", "upscale_model", output=2, **values)
    assert "The image is not shaped like 64x64" in text
    assert "losing 50.0% of the image" in text
