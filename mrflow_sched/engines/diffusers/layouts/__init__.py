"""What differs between diffusers' text-to-image pipelines: `find_layout` gives the `Layout` of one."""

from mrflow_sched.engines.diffusers.layouts.base import Layout
from mrflow_sched.engines.diffusers.layouts.find import find_layout

__all__ = ["Layout", "find_layout"]
