"""The nodes that stand for a whole run and expand into the others. Importing this module needs ComfyUI.

ComfyUI caches every node of such a graph by the inputs of all that lead to it. So what only a later stage uses enters
at that stage's nodes, and links are passed on as links: a changed sigma runs the refining step alone.
"""

from __future__ import annotations

from typing import Any

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.comfy.host import graph_builder, module
from mrflow_sched.apps.comfy.inputs import PLAN, inputs
from mrflow_sched.apps.comfy.nodes import schema
from mrflow_sched.apps.comfy.parts import check_negative
from mrflow_sched.apps.comfy.planned import Planned
from mrflow_sched.plan.options import OPTIONS

__all__ = ["MrFlowDraft", "MrFlowFinish", "MrFlowRefine", "MrFlowSampler"]

io: Any = module("comfy_api.latest").io

Link = Any

_STAGE_1 = ("preset", "cfg", "family", "factor", "stages", "low_steps", "solver", "shift", "noise")


class _Graph:
    # A run as nodes, around what a node was given.

    def __init__(self, values: dict[str, Any]) -> None:
        self._builder = graph_builder()
        self._values = values
        self._sampler: Link = None

    def add(self, kind: str, **values: Any) -> Any:
        return self._builder.node(kind, **{name: value for name, value in values.items() if value is not None})

    def link(self, *names: str) -> dict[str, Link]:
        # Inputs of the node, passed on as they came: links stay links.
        return {name: self._values.get(name) for name in names}

    def plan(self, **more: Any) -> Link:
        names = ("model", "vae", "low_sigmas", "width", "height", "seed", *_STAGE_1)
        return self.add("MrFlowPlan", **{**self.link(*names), **more}).out(0)

    def kind(self) -> str:
        # What is going to enlarge the image.
        return "interpolation" if self._values.get("upscale_model") is None else "network"

    def first(self, plan: Link) -> Link:
        # The images of stage 1.
        latent = self.add("MrFlowEmptyLatent", plan=plan, **self.link("model", "batch_size")).out(0)
        return self._sampled(plan, 1, latent, 0.0, {"sigma": 0.0, "steps": 0})

    def later(self, plan: Link, image: Link, stages: int, index: int = 0) -> tuple[Link, Link]:
        # The images of the last stage, and what the handoffs said; `index` is the first image's number.
        said: Link = None
        for stage in range(2, stages + 1):
            own = {"plan": plan, "image": image, "stage": stage, "index": index, "said": said}
            handoff = self.add("MrFlowHandoff", **own, **self.link("vae", "upscale_model"))
            said = handoff.out(2)
            sigmas = {"sigma": self._values["sigma"], "steps": self._values["refine_steps"]}
            image = self._sampled(plan, stage, handoff.out(0), self._values.get("refine_cfg", 0.0), sigmas)
        return image, said

    def _sampled(self, plan: Link, stage: int, latent: Link, cfg: float, sigmas: dict[str, Any]) -> Link:
        if self._sampler is None:
            self._sampler = self.add("MrFlowSolver", plan=plan, solver="family").out(0)
        own = {"plan": plan, "stage": stage}
        done = self.add(
            "SamplerCustomAdvanced",
            noise=self.add("MrFlowNoise", **own).out(0),
            guider=self.add("MrFlowGuider", **own, **self.link("model", "positive", "negative"), cfg=cfg).out(0),
            sampler=self._sampler,
            sigmas=self.add("MrFlowSigmas", **own, **self.link("model"), **sigmas, curve="linear").out(0),
            latent_image=latent,
        )
        return self.add("MrFlowDecode", **own, samples=done.out(0), **self.link("vae")).out(0)

    def text(self, plan: Link, said: Link = None) -> Link:
        numbers = {name: self._values.get(name, 0) for name in ("sigma", "refine_steps", "refine_cfg", "index")}
        return self.add("MrFlowPlanInfo", plan=plan, said=said, **numbers).out(0)

    def gathered(self, image: Link, text: Link = None) -> tuple[Link, Link]:
        # Where inputs were lists, nodes ran for each of their items. What they made leaves as one batch and one text:
        # ComfyUI takes one value for each output of an expanded node.
        node = self.add("MrFlowGather", image=image, text=text)
        return node.out(0), node.out(1)

    def output(self, *outputs: Link) -> Any:
        return io.NodeOutput(*outputs, expand=self._builder.finalize())


def _check(values: dict[str, Any], *scales: str) -> None:
    # Refuse what later nodes would refuse, before anything runs: ComfyUI checks no number that comes by a link. A scale
    # of 0 is found out by the plan; sigma and steps that come by a link are known at their stage.
    if "stages" in values:
        OPTIONS["stages"].checked(values["stages"])
    if values.get("refine_cfg"):
        OPTIONS["refine_guidance"].checked(values["refine_cfg"])
    for name in scales:
        check_negative(values.get("negative"), name, values[name] or 1.0)


def _single(name: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise MrFlowError(f"{name} is a list of {len(values)}; give one value.")
    return values[0]


def _refining(plan: Planned, values: dict[str, Any]) -> dict[str, Any]:
    # Sigma and steps of a draft's later stages where no upscale model is connected, which the draft did not know. What
    # its plan or the user has of its own stays.
    if values.get("upscale_model") is not None or values["sigma"]:
        return {}
    other = plan.changed({"upscaler_kind": "interpolation"})
    if other.plan.stages == plan.plan.stages:
        return {}
    last = other.stage(len(other.plan.stages))
    return {"sigma": last.start_sigma, "refine_steps": values["refine_steps"] or last.steps}


class MrFlowSampler(io.ComfyNode):
    """A whole staged run."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowSampler",
            "MrFlow Sampler",
            "Samples at low resolution, enlarges the image with a super-resolution model, adds a little noise and "
            "refines it in one step at full size. Changing sigma runs that last step alone.",
            enable_expand=True,
            aliases=("hires fix", "highres fix", "two stage", "fast", "KSampler"),
            inputs=inputs(
                *("model", "positive", "negative?", "vae", "upscale_model?", "low_sigmas?"),
                *("width", "height", "batch_size", "seed", "preset", "sigma", "cfg"),
                *("family", "factor", "stages", "low_steps", "refine_steps", "refine_cfg", "solver", "shift", "noise"),
                raw=True,
            ),
            outputs=[
                io.Image.Output(display_name="image"),
                io.Image.Output(display_name="draft", tooltip="The image of stage 1."),
                io.String.Output(display_name="text", tooltip="What was run, in words and in one line."),
            ],
        )

    @classmethod
    def execute(cls, **values: Any) -> Any:
        _check(values, "cfg", "refine_cfg")
        graph = _Graph(values)
        # Stage 1 is the same whatever enlarges its image, so a plan of its own leads to it.
        draft = graph.first(graph.plan())
        plan = graph.plan(upscaler_kind=graph.kind())
        image, said = graph.later(plan, draft, values["stages"])
        image, text = graph.gathered(image, graph.text(plan, said))
        return graph.output(image, graph.gathered(draft)[0], text)


class MrFlowDraft(io.ComfyNode):
    """Stage 1 alone."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowDraft",
            "MrFlow Draft",
            "Stage 1 alone, for several seeds: choose among its images, and let MrFlow Finish make the chosen ones at "
            "full size. Each becomes what its seed makes alone.",
            enable_expand=True,
            aliases=("preview", "contact sheet"),
            inputs=inputs(
                *("model", "positive", "negative?", "vae", "low_sigmas?"),
                *("width", "height", "batch_size", "seed", *_STAGE_1),
                raw=True,
                seed={"tooltip": "Of the first draft; fix it (control after generate), or the next run makes others."},
                batch_size={"default": 4, "tooltip": "Drafts: seed, seed + 1 and so on."},
            ),
            outputs=[
                io.Image.Output(display_name="drafts"),
                PLAN.Output(display_name="plan"),
                io.String.Output(display_name="text"),
            ],
        )

    @classmethod
    def execute(cls, **values: Any) -> Any:
        _check(values, "cfg")
        graph = _Graph(values)
        plan = graph.plan()
        drafts, text = graph.gathered(graph.first(plan), graph.text(plan))
        return graph.output(drafts, plan, text)


class MrFlowFinish(io.ComfyNode):
    """The later stages of drafts."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowFinish",
            "MrFlow Finish",
            "The later stages of one or some drafts. The drafts are not sampled again.",
            enable_expand=True,
            aliases=("hires fix",),
            inputs=inputs(
                *("model", "positive", "negative?", "vae", "upscale_model?", "plan", "drafts", "index", "count"),
                *("sigma", "refine_steps", "refine_cfg"),
                raw=True,
                plan={"raw_link": False},
                count={"default": 1},
            ),
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            is_input_list=True,
            outputs=[io.Image.Output(display_name="image"), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, plan: list[Planned], **lists: list[Any]) -> Any:
        values = {name: _single(name, each) for name, each in lists.items()}
        _check(values, "refine_cfg")
        graph = _Graph({**values, **_refining(plan[0], values)})
        stages = _single("the number of the plan's stages", sorted({len(each.plan.stages) for each in plan}))
        link = cls.hidden.dynprompt.get_node(cls.hidden.unique_id)["inputs"]["plan"]
        drafts = graph.add("MrFlowPick", image=values["drafts"], **graph.link("index", "count")).out(0)
        image, said = graph.later(link, drafts, stages, values["index"])
        return graph.output(*graph.gathered(image, graph.text(link, said)))


class MrFlowRefine(io.ComfyNode):
    """Any image as a finished stage 1."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "MrFlowRefine",
            "MrFlow Refine",
            "Enlarges any image with a super-resolution model and refines it from exactly the sigma that you set: a "
            "hires fix whose number means what it says on every model.",
            enable_expand=True,
            aliases=("hires fix", "highres fix", "upscale", "img2img"),
            inputs=inputs(
                *("model", "positive", "negative?", "vae", "image", "upscale_model?"),
                *("width", "height", "seed", "preset", "sigma", "cfg", "family", "factor", "refine_steps"),
                raw=True,
                image={"tooltip": "Any image."},
                width={"default": 0, "min": 0, "tooltip": "Of the result; 0: from the size of image and factor."},
                height={"default": 0, "min": 0, "tooltip": "Of the result; 0: from the size of image and factor."},
                factor={
                    "default": 2.0,
                    "min": 1.0,
                    "advanced": False,
                    "tooltip": "How many times larger, where width and height are 0; 1 keeps the size.",
                },
            ),
            outputs=[io.Image.Output(display_name="image"), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, **values: Any) -> Any:
        _check(values, "cfg")
        graph = _Graph(values)
        fixed = {"stages": 2, "low_steps": 0, "solver": "family", "shift": "low", "noise": "own"}
        plan = graph.plan(image=values["image"], upscaler_kind=graph.kind(), **fixed)
        image, said = graph.later(plan, values["image"], 2)
        return graph.output(*graph.gathered(image, graph.text(plan, said)))
