"""What happens to a job that cannot run with MrFlow: everyone is told why, and it goes on without it or ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

from mrflow_sched._runtime.errors import MrFlowError, first_line
from mrflow_sched.apps.webui import infotext
from mrflow_sched.apps.webui.host import HostApi
from mrflow_sched.apps.webui.job import ABSENT, Run, own, say, tidy
from mrflow_sched.apps.webui.settings import when_refused

__all__ = ["guarded", "reason", "refuse", "refuse_run"]

logger = logging.getLogger("mrflow")


def refuse(p: Any, host: HostApi, sentence: str, *, stop: bool = False) -> None:
    """Say why a job cannot run with MrFlow, under the image, in its metadata and on the console, or end it.

    Args:
        p: The job, as if MrFlow were off.
        host: The WebUI.
        sentence: Why.
        stop: End the job, whatever the user chose in the settings.
    """
    say(p, sentence)
    logger.warning("%s", sentence)
    if not stop and when_refused(host.opts, p.override_settings) == "go on":
        p.extra_generation_params[infotext.KEY] = infotext.refused(sentence)
    elif getattr(p, "is_api", False):
        p.init = _Stop(sentence)
    else:
        host.state.interrupt()


def refuse_run(p: Any, run: Run, host: HostApi, sentence: str) -> None:
    """Put everything back as if MrFlow were off, also the options, which the host has set by now; then `refuse`.

    Args:
        p: The job.
        run: Its run.
        host: The WebUI.
        sentence: Why.
    """
    for key, (before, option) in run.settings.items():
        host.opts.data[key] = option if before is ABSENT else before
    tidy(p, run)
    # What would be made instead of a finished draft is an image that nobody asked for.
    refuse(p, host, sentence, stop=bool(run.drafts))


class _Stop:
    """Stands where the host begins a job: hosts swallow what a hook raises, but answer with what is raised there.

    Args:
        sentence: Why the job is not done.
    """

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise import_module("fastapi").HTTPException(status_code=422, detail=self._sentence)


def reason(error: Exception, *, stop: bool = False) -> str:
    """Say why a job cannot run with MrFlow; an error that is no refusal is logged too.

    Args:
        error: What was raised.
        stop: The job ends; False: its image is made without MrFlow.

    Returns:
        A sentence for the user.
    """
    if isinstance(error, MrFlowError):
        return str(error)
    logger.error("failed", exc_info=error)
    failed = f"MrFlow failed ({type(error).__name__}: {first_line(error)})"
    return f"{failed}; see the console." if stop else f"{failed}; the image is made without it."


def guarded(work: Callable[..., None], p: Any, *args: Any) -> None:
    """Run a step before sampling; if it fails, the image is made without MrFlow.

    Args:
        work: The step, called as `work(p, *args)`.
        p: The job.
        *args: Passed on; the last one is the host.
    """
    try:
        work(p, *args)
    except Exception as error:
        run = own(p)
        if run is None:
            refuse(p, args[-1], reason(error))
        else:
            refuse_run(p, run, args[-1], reason(error, stop=bool(run.drafts)))
