"""The conformance sweep: what MrFlow makes of every text-to-image pipeline of the installed diffusers, in tiny.

`check("flux1-dev")`, or of a pipeline that you have built, runs `MrFlow` on it and judges the run against the pipeline
itself. `python -m bench.pipelines` does so for every class.
"""

from bench.pipelines.judge import Row, check

__all__ = ["Row", "check"]
