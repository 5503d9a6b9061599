"""`mrflow ui`: a page in the browser, on this machine only."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.apps.cli.console import Outcome, refusal_of, say, saying_warnings, writable
from mrflow_sched.apps.cli.forecast import check_memory
from mrflow_sched.apps.cli.inputs import StartImage, read_start
from mrflow_sched.apps.cli.load import (
    Job,
    Loaded,
    check_packages,
    find_upscaler,
    load,
    make_record,
    plan_family,
    upscaler_kind,
)
from mrflow_sched.apps.cli.options import Commands, ModelChoices, common_options, model_options
from mrflow_sched.apps.cli.parsing import path_option, whole_number
from mrflow_sched.apps.cli.repeat import check_model, check_source, other_upscaler, recorded_loras
from mrflow_sched.apps.cli.results import Results
from mrflow_sched.apps.cli.stopping import current
from mrflow_sched.plan.families import Family, get_family
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    from mrflow_sched.apps.ui.studio import Studio, Wish
    from mrflow_sched.images.record import RunRecord
    from mrflow_sched.sampler import StagedResult

PORT = 7870
"""Not 7860, where WebUIs are."""


@dataclass(frozen=True)
class UiRequest:
    """A page to serve.

    Attributes:
        model: The model and the upscaler.
        port: Port of the loopback address; 0: any that is free.
        folder: Where images are saved.
    """

    model: ModelChoices
    port: int
    folder: Path

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> UiRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.
        """
        return cls(ModelChoices.from_args(args), args.port, args.out)


def add_parser(commands: Commands) -> None:
    """Add `mrflow ui`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "ui",
        parents=[model_options(), common_options()],
        allow_abbrev=False,
        help="make images on a page in the browser, on this machine only",
    )
    parser.add_argument(
        "--out", type=path_option, default=Path("out"), metavar="DIR", help="folder for the images (default out)"
    )
    parser.add_argument(
        "--port",
        type=whole_number(0, 65535),
        default=PORT,
        metavar="N",
        help=f"port of the page; 0 takes a free one (default {PORT})",
    )
    parser.set_defaults(from_args=UiRequest.from_args, run=run)


def run(request: UiRequest) -> Outcome:
    """Load the model and serve the page until Ctrl-C, which passes through.

    Args:
        request: What to serve.

    Returns:
        Never.

    Raises:
        MrFlowError: gradio is missing, the port is taken, or the model, the upscaler or the folder cannot be used.
    """
    if find_spec("gradio") is None:
        raise MrFlowError("mrflow ui needs the package gradio; pip install 'mrflow-sched[ui]'.")
    model = request.model
    known = plan_family(model)
    family = get_family(known) if isinstance(known, str) else known
    file = find_upscaler(model)
    check_packages(model)
    width, height = family.default_size or family.native_size
    usual = make_plan(family, width, height, upscaler_kind=upscaler_kind(model))
    check_memory(model, family, usual)
    with tempfile.TemporaryDirectory(prefix="mrflow-ui-") as uploads, writable(request.folder), saying_warnings():
        # Read when gradio is imported: uploads go with the page, and nothing is reported to anybody.
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        from mrflow_sched.apps.ui.jobs import Desk
        from mrflow_sched.apps.ui.page import mounted
        from mrflow_sched.apps.ui.serve import application
        from mrflow_sched.apps.web import listening, serve

        with listening(request.port) as taken:
            studio = studio_of(model, family, load(model, Job(usual, ""), file), request.folder)
            desk = Desk()
            app = application(lambda bare: mounted(bare, studio, desk, Path(uploads)))
            try:
                serve(
                    app,
                    taken,
                    ready=lambda address: say(f"The page is at {address} (Ctrl-C ends it)."),
                    check=current().check,
                )
            finally:
                desk.close()
    return Outcome()


def studio_of(model: ModelChoices, family: Family, loaded: Loaded, folder: Path) -> Studio:
    """What the page is given.

    Args:
        model: The model that was asked for.
        family: Its family.
        loaded: The engine and the upscaler.
        folder: Where images are saved.

    Returns:
        The model with what the command line does around a run.
    """
    from mrflow_sched.apps.ui.studio import Studio

    def save(wish: Wish, result: StagedResult) -> Path:
        native = len(wish.plan.stages) == 1
        used = replace(loaded, upscaler=None, file=None) if native else loaded
        job = Job(
            wish.plan,
            wish.prompt,
            wish.negative,
            start=cast("StartImage | None", wish.start),
            refine_prompt=wish.refine_prompt,
            refine_negative=wish.refine_negative,
        )
        results = Results()
        results.save(folder, ".png", job, make_record(model, job, used), result)
        if not results.images:
            results.tell_missing()
            raise MrFlowError("the image was not saved, because the page was stopped.")
        return results.images[0].path

    def check(plan: StagedPlan) -> None:
        check_memory(model, family, plan)

    def check_draft(name: str, record: RunRecord) -> None:
        check_source(name, model, record)
        check_model(model, record)
        if recorded_loras(model, record).loras != model.loras:
            raise MrFlowError(f"{name!r} was made with its LoRAs at other scales; give them as --lora FILE:SCALE.")
        other = other_upscaler(loaded.file, record)
        if other is not None:
            raise MrFlowError(other)

    return Studio(
        engine=loaded.engine,
        upscaler=loaded.upscaler,
        family=family,
        title="the embedded model" if model.model is None else loaded.engine.name,
        embedded=model.model is None,
        previews=model.offload is None,
        folder=folder,
        check=check,
        check_draft=check_draft,
        read_start=lambda path: read_start(path, None),
        save=save,
        refusal=refusal_of,
    )
