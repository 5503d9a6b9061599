"""Staged sampling for text-to-image flow models: the `mrflow` command.

Results go to standard output, everything else to standard error. Exit codes: 0 done; 1 (`doctor` only) something would
fail; 2 a refusal, whose one sentence says why and what to do; 70 a fault of mrflow or of a library, with its traceback;
130, 143 or 129 stopped by Ctrl-C, SIGTERM or SIGHUP. `plan` and `families` run without torch, which is imported late.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Sequence
from typing import Protocol

import mrflow_sched
from mrflow_sched.apps.cli import calibrate, compare, doctor, families, generate, plan
from mrflow_sched.apps.cli.console import (
    FAULT,
    FAULT_SENTENCE,
    REFUSED,
    flush_output,
    forget_output,
    refusal_of,
    say,
)
from mrflow_sched.apps.cli.options import Commands, Parser
from mrflow_sched.apps.cli.stopping import STOPPED, Stop, Stopped, watching


class Command(Protocol):
    """A subcommand: a module of this package that has `add_parser`."""

    def add_parser(self, commands: Commands) -> None:
        """Add the command's parser.

        Two defaults are set on the parser: `from_args`, which turns the parsed arguments into the command's request (a
        frozen dataclass), and `run`, which takes the request, does the work and returns the exit code.

        Args:
            commands: Where the parser is added.
        """
        ...


_ABOUT = "Make images with text-to-image flow models: few steps at low resolution, upscaling, one step at full size."

COMMANDS: tuple[Command, ...] = (plan, families, generate, compare, calibrate, doctor)
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
    with watching() as stop:
        try:
            code = _run(words, build_parser(commands), stop)
        except KeyboardInterrupt:
            say("Stopped.")
            code = STOPPED
        return stop.finish(code)


def _run(words: list[str], parser: Parser, stop: Stop) -> int:
    """Run a command line and return its exit code; only a stop leaves this function as an exception."""
    try:
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help(sys.stderr)
            return REFUSED
        code = int(args.run(args.from_args(args)))
        flush_output()
        return code
    except BrokenPipeError:
        forget_output()  # the reader went away (a pager, head)
        return 0
    except Exception as error:
        if stop.raised:  # a library turned the stop into an error of its own
            raise Stopped from error
        return _report_error(error, debug="--debug" in words)


def _report_error(error: Exception, *, debug: bool) -> int:
    """Print what the user should know of `error`, and return the exit code."""
    sentence = refusal_of(error)
    if sentence is None or debug:
        traceback.print_exception(error)
    say(sentence or FAULT_SENTENCE)
    with contextlib.suppress(OSError):
        flush_output()
    return FAULT if sentence is None else REFUSED
