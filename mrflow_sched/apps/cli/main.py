"""Staged sampling for text-to-image flow models: the `mrflow` command.

Results go to standard output, everything else to standard error. Exit codes: 0 done; 1 (`doctor` only) something would
fail; 2 a refusal, whose one sentence says why and what to do; 70 a fault of mrflow or of a library, with its traceback;
130, 143 or 129 stopped by Ctrl-C, SIGTERM or SIGHUP. `plan`, `sizes` and `families` run without torch, which is
imported late.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import mrflow_sched
from mrflow_sched._runtime.chatter import without_chatter
from mrflow_sched.apps.cli import (
    batch,
    calibrate,
    compare,
    doctor,
    draft,
    families,
    finish,
    generate,
    plan,
    preview,
    serve,
    sizes,
    tune,
    ui,
)
from mrflow_sched.apps.cli.console import FAULT, FAULT_SENTENCE, REFUSED, Outcome, refusal_of, say
from mrflow_sched.apps.cli.options import Commands, Parser
from mrflow_sched.apps.cli.stopping import STOPPED, Stopped, watching


class Command(Protocol):
    """A subcommand: a module of this package that has `add_parser`."""

    def add_parser(self, commands: Commands) -> None:
        """Add the command's parser.

        Two defaults are set on the parser: `from_args`, which turns the parsed arguments into the command's request (a
        frozen dataclass), and `run`, which takes the request, does the work and returns an `Outcome`.

        Args:
            commands: Where the parser is added.
        """
        ...


_ABOUT = "Make images with text-to-image flow models: few steps at low resolution, upscaling, one step at full size."

COMMANDS: tuple[Command, ...] = (
    plan,
    sizes,
    families,
    generate,
    draft,
    finish,
    batch,
    preview,
    compare,
    calibrate,
    tune,
    doctor,
    ui,
    serve,
)
"""All commands, in the order of the help."""


def build_parser(commands: Sequence[Command] = COMMANDS) -> Parser:
    """Build the parser of the whole command line.

    Args:
        commands: The subcommands, in the order in which the help lists them.

    Returns:
        A parser whose result has `command` (None where none was given) and the defaults that the command set.
    """
    parser = Parser(prog="mrflow", description=_ABOUT, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mrflow {mrflow_sched.__version__}")
    found = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command in commands:
        command.add_parser(found)
    return parser


def main(argv: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Run a command line. No exception leaves this function except argparse's own exit after --help or --version.

    Args:
        argv: The arguments after the program's name; None takes those of the process.
        commands: The subcommands to offer.

    Returns:
        The exit code: 0, 1, 2, 70, 129, 130 or 143, as in the module's docstring.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    flags = words[: words.index("--")] if "--" in words else words
    with watching() as stop, without_chatter():
        try:
            outcome = _run(words, build_parser(commands))
        except (Exception, KeyboardInterrupt) as error:
            outcome = Outcome(error=error)
        stop.end()
        if stop.raised and isinstance(outcome.error, Exception):  # a library turned the stop into an error of its own
            outcome = replace(outcome, error=Stopped())
        return stop.finish(_report(outcome, as_json="--json" in flags, debug="--debug" in flags))


def _run(words: list[str], parser: Parser) -> Outcome:
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help(sys.stderr)
        return Outcome(code=REFUSED)
    return args.run(args.from_args(args))


def _report(outcome: Outcome, *, as_json: bool, debug: bool) -> int:
    """Print what a command leaves, and what ended it early; return the exit code."""
    error = outcome.error
    try:
        outcome.show(None if error is None else _sentence(error), as_json=as_json)
    except BrokenPipeError:
        pass  # the reader went away (a pager, head)
    except Exception as unprinted:
        error = error or unprinted
    if error is None:
        return outcome.code
    stopped, fault = isinstance(error, KeyboardInterrupt), _sentence(error) == FAULT_SENTENCE
    if fault or (debug and not stopped):
        traceback.print_exception(error)
    say(_sentence(error))
    return STOPPED if stopped else FAULT if fault else REFUSED


def _sentence(error: BaseException) -> str:
    return "Stopped." if isinstance(error, KeyboardInterrupt) else refusal_of(error) or FAULT_SENTENCE
