"""diffusers pipelines as engines.

Importing anything of this package makes diffusers importable, here and for the caller, where torchvision was made for
another torch (`torchvision_ops`): `from diffusers import FluxPipeline` works after `from mrflow_sched import MrFlow`.
"""

from mrflow_sched._runtime.torchvision_ops import ensure_ops

ensure_ops()
