"""`mrflow serve`: an HTTP API that makes images, on this machine only unless a key is asked for."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mrflow_sched._runtime.errors import MrFlowError, quoted
from mrflow_sched.apps.cli.console import Outcome, os_reason, refusal_of, say, saying_warnings
from mrflow_sched.apps.cli.forecast import check_memory
from mrflow_sched.apps.cli.load import (
    EMBEDDED,
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
from mrflow_sched.apps.cli.parsing import number_option, path_option, size_option, text_option, whole_number
from mrflow_sched.apps.cli.stopping import current
from mrflow_sched.plan.families import Family, get_family
from mrflow_sched.plan.make import make_plan
from mrflow_sched.plan.stages import StagedPlan

if TYPE_CHECKING:
    import socket

    from mrflow_sched.apps.serve.jobs import Jobs
    from mrflow_sched.apps.serve.limits import Limits
    from mrflow_sched.apps.serve.served import ImageRequest, Offered, Served
    from mrflow_sched.images.record import RunRecord

PORT = 7871
"""The one after that of `mrflow ui`."""
KEY_VARIABLE = "MRFLOW_API_KEY"
"""The environment variable that holds the key where no file does."""

_LEAST_KEY = 16
_MOST_KEY = 4096
_OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class ServeRequest:
    """An API to serve.

    Attributes:
        model: The model and the upscaler.
        host: Address to listen at.
        port: 0: any that is free.
        key_file: Holds the API key; None: the environment does, or there is none.
        names: Further names by which clients ask for the server.
        size: (width, height) of the largest area that is made; None: twice the usual sides.
        queue: Jobs that may wait.
        images: Most images of a request.
        timeout: Seconds that a job may run.
        keep: Seconds that ended jobs and their images are kept.
        grace: Seconds that jobs which run have when the server is stopped.
        ray: Address of the Ray cluster that makes the images; None: this process does.
        replicas: Of the model on that cluster; None: one for each GPU.
    """

    model: ModelChoices
    host: str
    port: int
    key_file: Path | None = None
    names: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    queue: int = 16
    images: int = 10
    timeout: float = 600.0
    keep: float = 3600.0
    grace: float = 10.0
    ray: str | None = None
    replicas: int | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ServeRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.

        Raises:
            MrFlowError: Options do not go together.
        """
        if args.replicas is not None and args.ray is None:
            raise MrFlowError(
                f"--replicas {args.replicas} is for a Ray cluster; give --ray ADDRESS too, "
                "such as --ray local, or leave it out."
            )
        return cls(
            ModelChoices.from_args(args),
            args.host,
            args.port,
            args.api_key_file,
            tuple(args.allow_host),
            args.max_size,
            args.queue,
            args.max_images,
            args.timeout,
            args.keep,
            args.grace,
            args.ray,
            args.replicas,
        )

    def limits(self, family: Family) -> Limits:
        """What the server takes at most.

        Args:
            family: The model's.

        Returns:
            The limits.
        """
        from mrflow_sched.apps.serve.limits import Limits

        usual = family.default_size or family.native_size
        width, height = self.size or (2 * usual[0], 2 * usual[1])
        return Limits(width * height, self.queue, self.images, self.timeout, self.keep, self.grace)


@dataclass(frozen=True)
class Access:
    """Who is answered.

    Attributes:
        key: That clients must send; None: none.
        names: By which they ask for the server; None: any.
    """

    key: str | None = field(repr=False)
    names: tuple[str, ...] | None


def add_parser(commands: Commands) -> None:
    """Add `mrflow serve`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "serve",
        parents=[model_options(), common_options()],
        allow_abbrev=False,
        help="make images for other programs: an HTTP API like OpenAI's",
    )
    group = parser.add_argument_group("the server")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen at (default 127.0.0.1, this machine only); any other needs an API key",
    )
    group.add_argument(
        "--port", type=whole_number(0, 65535), default=PORT, metavar="N", help=f"0 takes a free one (default {PORT})"
    )
    group.add_argument(
        "--api-key-file",
        type=path_option,
        metavar="FILE",
        help=f"file with the key that clients must send (default: the environment variable {KEY_VARIABLE}, if set)",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name by which clients ask for the server, as behind a proxy; may be repeated",
    )
    group = parser.add_argument_group("its limits")
    group.add_argument(
        "--max-size",
        type=size_option,
        metavar="WxH",
        help="images have at most as many pixels as this (default: twice the model's usual sides)",
    )
    group.add_argument(
        "--max-images", type=whole_number(1, 100), default=10, metavar="N", help="images of a request (default 10)"
    )
    group.add_argument(
        "--queue", type=whole_number(0, 10000), default=16, metavar="N", help="jobs that may wait (default 16)"
    )
    for name, value, words in (
        ("--timeout", 600.0, "that a job may run"),
        ("--keep", 3600.0, "that an ended job and its images can be fetched"),
        ("--grace", 10.0, "that jobs which run have to end when the server is stopped"),
    ):
        group.add_argument(
            name, type=_seconds, default=value, metavar="SECONDS", help=f"seconds {words} (default {value:g})"
        )
    group = parser.add_argument_group("who makes the images")
    group.add_argument(
        "--ray", type=text_option, metavar="ADDRESS", help="a Ray cluster, by Ray Serve: auto, HOST:PORT, or local"
    )
    group.add_argument(
        "--replicas",
        type=whole_number(1, 1024),
        metavar="N",
        help="models on the cluster, each of which makes an image at a time (default: one for each GPU)",
    )
    parser.set_defaults(from_args=ServeRequest.from_args, run=run)


def _seconds(text: str) -> float:
    number = number_option(text)
    if not 0 <= number <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 1e9")
    return number


def run(request: ServeRequest) -> Outcome:
    """Load the model and serve until Ctrl-C or SIGTERM, which pass through.

    Args:
        request: What to serve.

    Returns:
        Never.

    Raises:
        MrFlowError: fastapi or uvicorn is missing, the port is taken, the key is missing or unusable, the model or the
            upscaler cannot be used, or the Ray cluster.
    """
    missing = next((name for name in ("fastapi", "uvicorn") if find_spec(name) is None), None)
    if missing is not None:
        raise MrFlowError(f"mrflow serve needs the package {missing}; pip install 'mrflow-sched[serve]'.")
    from mrflow_sched.apps.web import listening

    key = read_key(request.key_file)
    with listening(request.port, request.host) as taken:
        access = access_of(request, taken, key)
        if request.ray is None:
            _serve_here(request, access, taken)
        else:
            _serve_on_ray(request, request.ray, access, taken)
    return Outcome()


def _serve_here(request: ServeRequest, access: Access, taken: socket.socket) -> None:
    from mrflow_sched.apps.serve.routes import jobs_of

    with saying_warnings():
        served = ServedMaker(request.model)()
    # What runs warn of may quote prompts: clients get it as notes, and the terminal does not.
    jobs = jobs_of(served, request.limits(served.family))
    _serve(served, jobs, access, taken)


def _serve_on_ray(request: ServeRequest, address: str, access: Access, taken: socket.socket) -> None:
    from mrflow_sched.apps.serve.jobs import Jobs
    from mrflow_sched.apps.serve.ray_engines import RayEngines
    from mrflow_sched.apps.serve.served import Offer, failure_elsewhere

    model = request.model
    family = _family_of(model)
    maker = ServedMaker(model.on_any_machine())
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints there, where only results belong
        engines = RayEngines(maker, address, replicas=request.replicas, device=model.device, check=current().check)
        try:
            told = engines.described
            offer = Offer(family, told.name, told.upscaler_kind, lambda plan: check_packages(model, plan))
            jobs = Jobs(engines.make, failure_elsewhere, request.limits(family), at_once=engines.replicas)
            _serve(offer, jobs, access, taken)
        finally:
            engines.close()


def _serve(served: Offered, jobs: Jobs, access: Access, taken: socket.socket) -> None:
    from mrflow_sched.apps.serve.routes import application
    from mrflow_sched.apps.web import serve

    lock = "" if access.key is None else ", with the API key"
    serve(
        application(served, jobs, names=access.names, key=access.key),
        taken,
        ready=lambda address: say(f"The API is at {address}/v1{lock} (Ctrl-C ends it)."),
        check=current().check,
        closing=jobs.close,
        connections=jobs.limits.connections,
        arrival=jobs.limits.arrival,
    )


def _family_of(model: ModelChoices) -> Family:
    known = plan_family(model)
    return get_family(known) if isinstance(known, str) else known


@dataclass(frozen=True)
class ServedMaker:
    """Loads the model that is served, in this process or in another.

    Attributes:
        model: The model, the upscaler and what they run on.
    """

    model: ModelChoices

    def __call__(self) -> Served:
        """Load the model.

        Returns:
            The model.

        Raises:
            MrFlowError: The model or the upscaler cannot be used, or does not fit into memory.
        """
        model = self.model
        family = _family_of(model)
        file = find_upscaler(model)
        check_packages(model)
        usual = make_plan(family, *(family.default_size or family.native_size), upscaler_kind=upscaler_kind(model))
        check_memory(model, family, usual)
        return served_of(model, family, usual, load(model, Job(usual, ""), file))


def access_of(request: ServeRequest, taken: socket.socket, key: str | None) -> Access:
    """Who is answered at an address.

    Args:
        request: The address, and further names of the server.
        taken: Listens there.
        key: The API key, or None.

    Returns:
        On the loopback: whoever asks by one of its names. Elsewhere: whoever has the key, by any name unless some were
        given.

    Raises:
        MrFlowError: Other machines can reach it, and there is no key.
    """
    from mrflow_sched.apps.web import is_loopback

    local = is_loopback(taken)
    if not local and key is None:
        raise MrFlowError(
            f"--host is {quoted(request.host)}, which other machines can reach, so an API key is needed; give "
            f"--api-key-file FILE, or set {KEY_VARIABLE}."
        )
    own = (*_OWN_NAMES, request.host, str(taken.getsockname()[0]))
    return Access(key, (*own, *request.names) if local or request.names else None)


def read_key(file: Path | None) -> str | None:
    """The API key.

    Args:
        file: Holds it; None: the environment does.

    Returns:
        The key without the white space around it; None where neither has one.

    Raises:
        MrFlowError: The file cannot be read, or the key is too short, too long, or has letters that a header cannot
            hold.
    """
    if file is None:
        text, where = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
        if not text:
            return None
    else:
        where = f"--api-key-file {quoted(str(file))}"
        try:
            with file.open("rb") as stream:
                text = stream.read(_MOST_KEY + 1).decode("latin-1")
        except OSError as error:
            raise MrFlowError(
                f"{where} cannot be read ({os_reason(error)}); give a file that holds the key."
            ) from error
    key = text.strip()
    if not _LEAST_KEY <= len(key) <= _MOST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
        raise MrFlowError(
            f"{where} must hold a key of {_LEAST_KEY} to {_MOST_KEY} ASCII letters and digits without spaces, and its "
            f"{len(key)} characters are not that; make one with openssl rand -hex 32."
        )
    return key


def served_of(model: ModelChoices, family: Family, usual: StagedPlan, loaded: Loaded) -> Served:
    """What the server is given.

    Args:
        model: The model that was asked for.
        family: Its family.
        usual: A staged plan of it.
        loaded: The engine and the upscaler.

    Returns:
        The model with what the command line does around a run.
    """
    import torch

    from mrflow_sched.apps.serve.served import Served

    staged = make_record(model, Job(usual, ""), loaded)
    native = make_record(model, Job(usual, ""), replace(loaded, upscaler=None, file=None))

    def record(asked: ImageRequest, plan: StagedPlan) -> RunRecord:
        return replace(
            native if len(plan.stages) == 1 else staged,
            plan=plan.to_string(),
            prompt=asked.prompt,
            negative=asked.negative,
            refine_prompt=asked.refine_prompt,
            refine_negative=asked.refine_negative,
            seed=plan.seed,
            threads=torch.get_num_threads(),
        )

    def check(plan: StagedPlan) -> None:
        check_packages(model, plan)
        check_memory(model, family, plan, loaded=True)

    return Served(
        engine=loaded.engine,
        upscaler=loaded.upscaler,
        family=family,
        name=EMBEDDED if model.model is None else Path(loaded.engine.name).name or loaded.engine.name,
        check=check,
        record=record,
        refusal=refusal_of,
    )
