"""`mrflow doctor`: what is installed, what would run and what would fail."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from mrflow_sched.apps.cli.console import AILING, print_json

# --- mrflow doctor ----------------------------------------------------------------------------


def run_doctor(args: argparse.Namespace) -> int:
    from mrflow_sched.measure.doctor import examine

    findings = list(examine(args.model, args.upscaler))
    healthy = all(finding.good for finding in findings)
    if args.json:
        print_json({"ok": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.good else 'FAIL'} {finding.name}: {finding.text}")
    return 0 if healthy else AILING
