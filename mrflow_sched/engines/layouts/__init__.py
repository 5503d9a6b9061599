"""What differs between diffusers' text-to-image pipelines: `find_layout` gives the `Layout` of one."""

from mrflow_sched.engines.layouts.base import Layout
from mrflow_sched.engines.layouts.find import find_layout

__all__ = ["Layout", "find_layout"]
