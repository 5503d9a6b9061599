"""Measuring: native and staged sampling compared, calibration, and what this machine can run."""
