"""The `mrflow` command: `plan` shows the numbers of a run, `generate` makes pictures, `compare` measures both ways,
`calibrate` measures what suits a model, `doctor` says what would run here.

Results go to standard output, everything said on the way to standard error. Exit codes: 0 done, 1 (`doctor` only)
something would fail, 2 a request that cannot
be met (one sentence says why and what to do), 130 stopped by Ctrl-C. `plan` runs without torch, so torch comes late.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import mrflow_sched
from mrflow_sched.apps.cli.calibrate import run_calibrate
from mrflow_sched.apps.cli.compare import run_compare
from mrflow_sched.apps.cli.console import REFUSED, STOPPED, flush_output, forget_output, out_of_memory, say, sentence_of
from mrflow_sched.apps.cli.doctor import run_doctor
from mrflow_sched.apps.cli.generate import run_generate
from mrflow_sched.apps.cli.options import (
    SEED_END,
    Parser,
    common_options,
    machine_options,
    plan_options,
    prompt_option,
    size_option,
    whole_number,
)
from mrflow_sched.apps.cli.plan import run_plan
from mrflow_sched.images.record import MAX_BATCH
from mrflow_sched.plan.families import FAMILIES


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="mrflow", description=__doc__.partition("\n")[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mrflow {mrflow_sched.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    common, numbers, machine = common_options(), plan_options(), machine_options()

    plan = commands.add_parser("plan", parents=[numbers, common], allow_abbrev=False, help="show the numbers of a run")
    plan.add_argument("--family", required=True, metavar="NAME", help=", ".join(FAMILIES))
    plan.add_argument("--native", action="store_true", help="plan ordinary one-stage sampling")
    plan.add_argument(
        "--timings", type=Path, metavar="FILE", help="what compare --json printed: expect seconds on that machine"
    )
    plan.set_defaults(run=run_plan)

    generate = commands.add_parser(
        "generate", parents=[numbers, machine, common], allow_abbrev=False, help="make pictures from a prompt"
    )
    generate.add_argument("prompt", nargs="?", type=prompt_option, metavar="PROMPT")
    generate.add_argument(
        "--negative", metavar="TEXT", help="what the picture should not show, for models that have it"
    )
    generate.add_argument("--batch", type=whole_number(1, MAX_BATCH), default=1, metavar="N", help="number of pictures")
    generate.add_argument("--native", action="store_true", help="sample at full size throughout, in one stage")
    generate.add_argument("--save-stages", action="store_true", help="save the picture of every stage too")
    generate.add_argument(
        "--from", dest="source", type=Path, metavar="IMAGE.png", help="repeat the run of a saved picture"
    )
    generate.set_defaults(run=run_generate)

    compare = commands.add_parser(
        "compare", parents=[numbers, machine, common], allow_abbrev=False, help="measure native and staged sampling"
    )
    compare.add_argument("prompt", type=prompt_option, metavar="PROMPT")
    compare.add_argument(
        "--repeats", type=whole_number(1, 100), default=1, metavar="N", help="runs of each, median counts"
    )
    compare.set_defaults(run=run_compare)

    calibrate = commands.add_parser(
        "calibrate",
        parents=[machine, common],
        allow_abbrev=False,
        help="measure which start sigma and how many steps suit a model and an upscaler",
    )
    calibrate.add_argument(
        "prompts",
        nargs="*",
        type=prompt_option,
        metavar="PROMPT",
        help="a picture each (default: four of different kinds)",
    )
    calibrate.add_argument("--size", type=size_option, metavar="WxH", help="size of the pictures to measure")
    calibrate.add_argument("--factor", type=float, metavar="F", help="enlargement between stages, 1.25 to 4")
    calibrate.add_argument("--steps", type=whole_number(1, 1000), metavar="N", help="steps of the native pictures")
    calibrate.add_argument(
        "--images", type=Path, nargs="+", metavar="IMAGE", help="pictures to measure in place of native ones"
    )
    calibrate.add_argument(
        "--seed", type=whole_number(0, SEED_END), default=0, help="seed of the first picture (default 0)"
    )
    calibrate.set_defaults(run=run_calibrate)

    doctor = commands.add_parser(
        "doctor", parents=[common], allow_abbrev=False, help="say what is installed, what would run and what would fail"
    )
    doctor.add_argument("--model", metavar="DIR", help="a local diffusers folder to look at; no weights are read")
    doctor.add_argument("--upscaler", metavar="FILE", help="an ESRGAN-type file to look at")
    doctor.set_defaults(run=run_doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code.

    ValueError and OSError are refusals: one sentence, code 2. Anything else is a fault of ours and shows its traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help(sys.stderr)
            return REFUSED
        code = int(args.run(args))
        flush_output()
        return code
    except KeyboardInterrupt:
        say("Stopped.")
        return STOPPED
    except BrokenPipeError:
        forget_output()  # the reader went away (a pager, head)
        return 0
    except Exception as error:
        known = isinstance(error, (ValueError, OSError)) or out_of_memory(error)
        if not known or "--debug" in words:
            raise
        if out_of_memory(error):
            say("there is not enough memory for this size or batch; make the picture or the batch smaller.")
        else:
            say(sentence_of(error))
        with contextlib.suppress(OSError):
            flush_output()
        return REFUSED
