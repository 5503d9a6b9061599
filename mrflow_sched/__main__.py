"""`python -m mrflow_sched` is the `mrflow` command."""

from __future__ import annotations

import sys

from mrflow_sched.apps.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
