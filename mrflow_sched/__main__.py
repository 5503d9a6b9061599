"""`python -m mrflow_sched` is the `mrflow` command."""

from __future__ import annotations

import os
import sys

from mrflow_sched.apps.cli.stopping import watching


def main() -> int:
    """Run the command line of this process, which ends afterwards.

    Returns:
        The exit code, as in the docstring of `mrflow_sched.apps.cli.main`.
    """
    with watching(ends_process=True) as stop:
        try:
            from mrflow_sched.apps.cli.main import main as run  # late: a signal may come while it is imported

            code = run()
        except BaseException:
            if not stop.raised:
                raise
            if "--json" in sys.argv:
                print('{"error": "Stopped."}')
            print("mrflow: Stopped.", file=sys.stderr)  # a library may have turned the stop into an error of its own
            code = stop.finish(0)
    if stop.raised:
        # What was interrupted may be half an import: taking it down in order could print, wait or crash.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
