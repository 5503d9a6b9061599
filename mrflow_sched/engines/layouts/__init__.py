"""What differs between diffusers' text-to-image pipelines, one answer each: see `Layout`, and `find_layout` to get one."""

from mrflow_sched.engines.layouts.base import Layout
from mrflow_sched.engines.layouts.find import find_layout

__all__ = ["Layout", "find_layout"]
