"""Measuring: native and staged sampling side by side, calibration, and what this machine can run."""
