"""Staged sampling for text-to-image flow models: the `mrflow` command.

Results go to standard output, everything else to standard error. Exit codes: 0 done; 1 (`doctor` only) something would
fail; 2 a refusal, one sentence says why and what to do; 70 a fault of mrflow or of a library, with its traceback; 130
stopped by Ctrl-C. `plan` runs without torch, so torch is imported late.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Sequence
from typing import Protocol

import mrflow_sched
from mrflow_sched.apps.cli import calibrate, compare, doctor, generate, plan
from mrflow_sched.apps.cli.console import (
    FAULT,
    FAULT_SENTENCE,
    REFUSED,
    STOPPED,
    flush_output,
    forget_output,
    refusal_of,
    say,
)
from mrflow_sched.apps.cli.options import Commands, Parser


class Command(Protocol):
    """A module of this package: a command.

    `add_parser` adds the command's parser and sets two defaults on it: `from_args`, which makes the command's request
    (a frozen dataclass) of the parsed arguments, and `run`, which does the work and returns the exit code.
    """

    def add_parser(self, commands: Commands) -> None:
        """Add the command's parser."""
        ...


COMMANDS: tuple[Command, ...] = (plan, generate, compare, calibrate, doctor)
"""All commands, in the order of the help."""


def build_parser(commands: Sequence[Command] = COMMANDS) -> Parser:
    """The whole command line."""
    parser = Parser(prog="mrflow", description=(__doc__ or "").partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mrflow {mrflow_sched.__version__}")
    found = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command in commands:
        command.add_parser(found)
    return parser


def main(argv: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code; see the module."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(commands)
    try:
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help(sys.stderr)
            return REFUSED
        code = int(args.run(args.from_args(args)))
        flush_output()
        return code
    except KeyboardInterrupt:
        say("Stopped.")
        return STOPPED
    except BrokenPipeError:
        forget_output()  # the reader went away (a pager, head)
        return 0
    except Exception as error:
        return _told(error, debug="--debug" in words)


def _told(error: Exception, *, debug: bool) -> int:
    """Tell the user of `error`; the exit code."""
    sentence = refusal_of(error)
    if sentence is None or debug:
        traceback.print_exception(error)
    say(sentence or FAULT_SENTENCE)
    with contextlib.suppress(OSError):
        flush_output()
    return FAULT if sentence is None else REFUSED
