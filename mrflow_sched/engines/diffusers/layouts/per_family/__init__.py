"""A class for each family whose conventions differ from the plain kind, which is `Layout` itself: one file a group.

Argument names of a pipeline are in the family's file. Source of every convention: the pipeline of the same name in
diffusers, and docs/method.md, section 1.6.
"""

from mrflow_sched.engines.diffusers.layouts.base import Layout
from mrflow_sched.engines.diffusers.layouts.per_family.bria import BriaFibo2Layout, BriaFiboLayout, BriaLayout
from mrflow_sched.engines.diffusers.layouts.per_family.by_betas import (
    CogView3Layout,
    HunyuanDitLayout,
    LatentConsistencyLayout,
)
from mrflow_sched.engines.diffusers.layouts.per_family.dreamlite import DreamLiteLayout, DreamLiteMobileLayout
from mrflow_sched.engines.diffusers.layouts.per_family.ernie import ErnieImageLayout
from mrflow_sched.engines.diffusers.layouts.per_family.flux import Flux2KleinLayout, Flux2Layout, FluxLayout
from mrflow_sched.engines.diffusers.layouts.per_family.flux3 import Flux3Layout
from mrflow_sched.engines.diffusers.layouts.per_family.frames import (
    AnimaLayout,
    FrameLayout,
    HunyuanVideo15Layout,
    HunyuanVideoLayout,
    LtxLayout,
    WanLayout,
)
from mrflow_sched.engines.diffusers.layouts.per_family.hidream import HiDreamLayout
from mrflow_sched.engines.diffusers.layouts.per_family.hunyuan import HunyuanImageLayout
from mrflow_sched.engines.diffusers.layouts.per_family.ideogram import Ideogram4Layout
from mrflow_sched.engines.diffusers.layouts.per_family.kandinsky import Kandinsky5Layout
from mrflow_sched.engines.diffusers.layouts.per_family.krea2 import Krea2Layout
from mrflow_sched.engines.diffusers.layouts.per_family.longcat import LongCatImageLayout
from mrflow_sched.engines.diffusers.layouts.per_family.lumina import LuminaNextLayout
from mrflow_sched.engines.diffusers.layouts.per_family.nucleus import NucleusImageLayout
from mrflow_sched.engines.diffusers.layouts.per_family.other_times import (
    CogView4Layout,
    CosmosLayout,
    GlmImageLayout,
    OmniGenLayout,
    SanaSprintLayout,
)
from mrflow_sched.engines.diffusers.layouts.per_family.packed import PackedLayout, VideoVaeLayout, pack, unpack
from mrflow_sched.engines.diffusers.layouts.per_family.prx import PrxLayout, PrxPixelLayout
from mrflow_sched.engines.diffusers.layouts.per_family.qwen import QwenImage21Layout, QwenImageLayout
from mrflow_sched.engines.diffusers.layouts.per_family.stable_diffusion import (
    StableDiffusionLayout,
    StableDiffusionXLLayout,
)
from mrflow_sched.engines.diffusers.layouts.per_family.two_texts import TwoTextsLayout
from mrflow_sched.engines.diffusers.layouts.per_family.z_image import ZImageLayout, ZImageOmniLayout

__all__ = [
    "AnimaLayout",
    "BriaFibo2Layout",
    "BriaFiboLayout",
    "BriaLayout",
    "CogView3Layout",
    "CogView4Layout",
    "CosmosLayout",
    "DreamLiteLayout",
    "DreamLiteMobileLayout",
    "ErnieImageLayout",
    "Flux2KleinLayout",
    "Flux2Layout",
    "Flux3Layout",
    "FluxLayout",
    "FrameLayout",
    "GlmImageLayout",
    "HiDreamLayout",
    "HunyuanDitLayout",
    "HunyuanImageLayout",
    "HunyuanVideo15Layout",
    "HunyuanVideoLayout",
    "Ideogram4Layout",
    "Kandinsky5Layout",
    "Krea2Layout",
    "LatentConsistencyLayout",
    "Layout",
    "LongCatImageLayout",
    "LtxLayout",
    "LuminaNextLayout",
    "NucleusImageLayout",
    "OmniGenLayout",
    "PackedLayout",
    "PrxLayout",
    "PrxPixelLayout",
    "QwenImage21Layout",
    "QwenImageLayout",
    "SanaSprintLayout",
    "StableDiffusionLayout",
    "StableDiffusionXLLayout",
    "TwoTextsLayout",
    "VideoVaeLayout",
    "WanLayout",
    "ZImageLayout",
    "ZImageOmniLayout",
    "pack",
    "unpack",
]
