"""`mrflow doctor`: what is installed, what would run and what would fail."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mrflow_sched.apps.cli.console import DONE, UNHEALTHY, Outcome
from mrflow_sched.apps.cli.options import Commands, common_options
from mrflow_sched.apps.cli.parsing import path_text_option

if TYPE_CHECKING:
    from mrflow_sched.measure.doctor import Finding


@dataclass(frozen=True)
class DoctorRequest:
    """What to check besides the installation.

    Attributes:
        model: A diffusers folder or a single file, or None.
        config: For a single file: the diffusers folder that describes it, or None.
        upscaler: An ESRGAN-type file, or None.
    """

    model: str | None
    config: str | None
    upscaler: str | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> DoctorRequest:
        """Make the request from parsed arguments.

        Args:
            args: What the parser of `add_parser` returned.

        Returns:
            The request.
        """
        return cls(args.model, args.model_config, args.upscaler)


def add_parser(commands: Commands) -> None:
    """Add `mrflow doctor`.

    Args:
        commands: Where the parser is added.
    """
    parser = commands.add_parser(
        "doctor",
        parents=[common_options()],
        allow_abbrev=False,
        help="check what is installed, what would run and what would fail",
    )
    parser.add_argument(
        "--model",
        type=path_text_option,
        metavar="PATH",
        help="a local model to check, as for generate; no weights are read",
    )
    parser.add_argument(
        "--model-config", type=path_text_option, metavar="DIR", help="for a single file: the folder that describes it"
    )
    parser.add_argument("--upscaler", type=path_text_option, metavar="FILE", help="an ESRGAN-type file to check")
    parser.set_defaults(from_args=DoctorRequest.from_args, run=run)


def run(request: DoctorRequest) -> Outcome:
    """Look at what is installed, what would run and what would fail.

    Args:
        request: What to check.

    Returns:
        The findings; the code is 1 where something would fail.
    """
    from mrflow_sched.measure.doctor import examine

    findings = list(examine(request.model, request.upscaler, config=request.config))
    healthy = all(finding.good for finding in findings)
    return Outcome(
        {"ok": healthy, "findings": [asdict(finding) for finding in findings]},
        tuple(f"{_mark(finding)} {finding.name}: {finding.text}" for finding in findings),
        DONE if healthy else UNHEALTHY,
    )


def _mark(finding: Finding) -> str:
    return "FAIL" if not finding.good else "note" if finding.note else "ok  "
