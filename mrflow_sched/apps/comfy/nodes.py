"""The nodes that do one part each. Importing this module needs ComfyUI.

Ids are never renamed: they stand in people's workflows.
"""

from __future__ import annotations

from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.comfy import parts
from mrflow_sched.apps.comfy.family import planned_for
from mrflow_sched.apps.comfy.host import module, sampler, zeros
from mrflow_sched.apps.comfy.inputs import PLAN, inputs
from mrflow_sched.apps.comfy.planned import Planned, given
from mrflow_sched.apps.plan_lines import plan_lines
from mrflow_sched.sampling.noise import stage_seed
from mrflow_sched.sampling.solvers import get_solver

__all__ = [
    "MrFlowDecode",
    "MrFlowEmptyLatent",
    "MrFlowGather",
    "MrFlowGuider",
    "MrFlowHandoff",
    "MrFlowNoise",
    "MrFlowPick",
    "MrFlowPlan",
    "MrFlowPlanInfo",
    "MrFlowSigmas",
    "MrFlowSolver",
]

io: Any = module("comfy_api.latest").io

CATEGORY = "sampling/MrFlow"


def schema(name: str, title: str, description: str, **more: Any) -> Any:
    """A node's schema in the room's category.

    Args:
        name: The node's id.
        title: Its name for people.
        description: What it does.
        **more: As ComfyUI's `Schema` takes it.

    Returns:
        ComfyUI's object.
    """
    words = {"search_aliases": ["mrflow", "multi-resolution", "staged sampling", *more.pop("aliases", ())]}
    known = words if "search_aliases" in io.Schema.__dataclass_fields__ else {}  # a younger field
    return io.Schema(node_id=name, display_name=title, category=CATEGORY, description=description, **known, **more)


class MrFlowPlan(io.ComfyNode):
    """All numbers of a run, before anything is sampled."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowPlan",
            "MrFlow Plan",
            "Decides all numbers of a staged run: sizes, sigmas, steps, seeds. What later stages alone use (sigma, "
            "their steps and cfg) is set at their nodes, so that changing it does not run stage 1 again.",
            inputs=inputs(
                *("model", "image?", "vae?", "low_sigmas?", "width", "height", "seed", "preset", "cfg", "family"),
                *("factor", "stages", "low_steps", "solver", "shift", "noise", "upscaler_kind?"),
                image={"tooltip": "An image to refine, which takes the place of stage 1."},
                vae={"tooltip": "Only looked at, to refuse another model's VAE before anything is sampled."},
                width={"min": 0, "tooltip": "Of the finished image; 0: from the size of image and factor."},
                height={"min": 0, "tooltip": "Of the finished image; 0: from the size of image and factor."},
            ),
            outputs=[
                PLAN.Output(display_name="plan"),
                io.Int.Output(display_name="low_width"),
                io.Int.Output(display_name="low_height"),
                io.Int.Output(display_name="width"),
                io.Int.Output(display_name="height"),
                io.String.Output(display_name="text"),
            ],
        )

    @classmethod
    def execute(cls, model: Any, width: int, height: int, image: Any = None, vae: Any = None, **values: Any) -> Any:
        made = planned_for(model, image, vae, width, height, **values)
        low, plan = made.plan.stages[0], made.plan
        return io.NodeOutput(made, low.width, low.height, plan.width, plan.height, _text(made))


class MrFlowEmptyLatent(io.ComfyNode):
    """Where stage 1 starts."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowEmptyLatent",
            "MrFlow Empty Latent",
            "Empty latents of the model at the size of stage 1.",
            inputs=inputs("plan", "model", "batch_size"),
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, plan: Planned, model: Any, batch_size: int) -> Any:
        first = plan.plan.stages[0]
        return io.NodeOutput({"samples": zeros(model, first.width, first.height, batch_size)})


class MrFlowNoise(io.ComfyNode):
    """The noise of one stage."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowNoise",
            "MrFlow Noise",
            "The noise of one stage: each image of a batch has its own seed, so it is what that seed makes alone.",
            inputs=inputs("plan", "stage"),
            outputs=[io.Noise.Output(display_name="noise")],
        )

    @classmethod
    def execute(cls, plan: Planned, stage: int) -> Any:
        return io.NodeOutput(parts.StageNoise(plan, stage))


class MrFlowSigmas(io.ComfyNode):
    """The sigmas of one stage."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowSigmas",
            "MrFlow Sigmas",
            "The sigmas of one stage. Those of the later stages begin at exactly the sigma that is asked for.",
            inputs=inputs(
                *("plan", "model", "stage", "sigma", "steps", "curve"),
                sigma={"tooltip": "Where a later stage starts: the share of noise. 0: as the plan has it."},
            ),
            outputs=[io.Sigmas.Output(display_name="sigmas")],
        )

    @classmethod
    def execute(
        cls,
        plan: Planned,
        model: Any,
        stage: int,
        sigma: float,
        steps: int,
        curve: str = "linear",
    ) -> Any:
        if stage > 1:
            return io.NodeOutput(parts.stage_sigmas(plan.refined(stage, sigma, steps, curve), model, stage))
        if sigma:
            raise MrFlowError(f"sigma {sigma:g} is where a later stage starts, and stage 1 starts at 1; set it to 0.")
        return io.NodeOutput(parts.stage_sigmas(plan.changed(given(low_steps=steps)), model, 1))


class MrFlowSolver(io.ComfyNode):
    """A solver as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowSolver",
            "MrFlow Solver",
            "How steps are taken, as a SAMPLER for any sampling node; family: as the plan has it.",
            inputs=inputs("plan?", "solver", solver={"advanced": False}),
            outputs=[io.Sampler.Output(display_name="sampler")],
        )

    @classmethod
    def execute(cls, solver: str, plan: Planned | None = None) -> Any:
        if solver == "family" and plan is None:
            raise MrFlowError("solver is 'family', which a plan names, and plan is not connected; choose a solver.")
        return io.NodeOutput(sampler(get_solver(plan.plan.stages[0].solver if plan and solver == "family" else solver)))


class MrFlowGuider(io.ComfyNode):
    """Model and conditioning for one stage."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowGuider",
            "MrFlow Guider",
            "Model, conditioning and cfg for one stage; areas of the conditioning follow the stage's size.",
            inputs=inputs("plan", "model", "positive", "negative?", "stage", "cfg"),
            outputs=[io.Guider.Output(display_name="guider")],
        )

    @classmethod
    def execute(cls, plan: Planned, model: Any, positive: Any, stage: int, cfg: float, negative: Any = None) -> Any:
        return io.NodeOutput(parts.stage_guider(plan, model, positive, negative, stage, cfg))


class MrFlowDecode(io.ComfyNode):
    """Images of a stage."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowDecode",
            "MrFlow Decode",
            "Decodes a stage. The last one is trimmed to the size that was asked for, where the model's grid made it "
            "larger.",
            inputs=inputs("plan", "samples", "vae", "stage"),
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, plan: Planned, samples: Any, vae: Any, stage: int) -> Any:
        return io.NodeOutput(parts.decoded(plan, samples["samples"], vae, stage))


class MrFlowGather(io.ComfyNode):
    """One batch of what a list of inputs made."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowGather",
            "MrFlow Gather",
            "Joins the images that a list of inputs made into one batch, and their texts into one.",
            is_input_list=True,
            inputs=inputs("image", "text?", image={"tooltip": "Images of one size, from a list or not."}),
            outputs=[io.Image.Output(display_name="image"), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, image: list[Any], text: list[str] | None = None) -> Any:
        return io.NodeOutput(parts.gathered(image), "\n\n".join(dict.fromkeys(text or ())))


class MrFlowHandoff(io.ComfyNode):
    """From one stage to the next."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowHandoff",
            "MrFlow Handoff",
            "Carries images to a later stage: super-resolution, cropped at the centre and never stretched, encoded one "
            "by one. The sampler adds the noise.",
            inputs=inputs(
                *("plan", "image", "vae", "upscale_model?", "said?", "stage", "index"),
                image={"tooltip": "What the stage before made, or any image."},
                said={"tooltip": "What the handoff before said, to pass it on."},
                stage={"default": 2, "min": 2, "tooltip": "The stage that is to start."},
                index={
                    "advanced": True,
                    "tooltip": "Number of the first image in the batch that it was made in; its noise follows it.",
                },
            ),
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Image.Output(display_name="image", tooltip="The enlarged image, before it is refined."),
                io.String.Output(display_name="text", tooltip="What went wrong; empty where nothing did."),
            ],
        )

    @classmethod
    def execute(
        cls,
        plan: Planned,
        image: Any,
        vae: Any,
        stage: int,
        index: int = 0,
        upscale_model: Any = None,
        said: str | None = None,
    ) -> Any:
        latent, large, now = parts.handed_over(plan, image, vae, upscale_model, stage, index)
        return io.NodeOutput(latent, large, " ".join(dict.fromkeys(text for text in (said, now) if text)))


class MrFlowPick(io.ComfyNode):
    """Some images of a batch."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowPick",
            "MrFlow Pick",
            "Some images of a batch, such as the drafts that are to be finished.",
            inputs=inputs(*("image", "index", "count"), image={"tooltip": "A batch of images."}, count={"default": 1}),
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, image: Any, index: int, count: int) -> Any:
        return io.NodeOutput(parts.picked(image, index, count))


class MrFlowPlanInfo(io.ComfyNode):
    """A plan in words."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowPlanInfo",
            "MrFlow Plan Info",
            "A plan in words: stages, sigmas, cost beside a plain run, notes, and its one line. Give it what you set "
            "at the later stages' nodes.",
            inputs=inputs(
                *("plan", "said?", "sigma", "refine_steps", "refine_cfg", "index"),
                index={"advanced": True, "tooltip": "Number of the image in its batch; the text has its seed."},
            ),
            outputs=[io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(
        cls,
        plan: Planned,
        sigma: float,
        refine_steps: int,
        refine_cfg: float,
        index: int = 0,
        said: str | None = None,
    ) -> Any:
        guided = 0.0 if plan.family.guidance_kind == "embedded" else refine_cfg
        seed = index and stage_seed(plan.plan.seed, index, 0, plan.plan.seed_rule)
        changes = given(sigma=sigma, refine_steps=refine_steps, refine_guidance=guided, seed=seed)
        return io.NodeOutput(_text(plan.changed(changes), said or ""))


def _text(planned: Planned, said: str = "") -> str:
    notes = [*planned.sentences, *([said] if said else ())]
    from_image, guided = planned.image is not None, planned.family.guidance_kind != "embedded"
    lines = plan_lines(planned.plan, notes=notes, from_image=from_image, guidance=guided)
    return "\n".join([planned.summary, "", *lines])
