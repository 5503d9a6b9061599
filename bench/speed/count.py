"""FLOP and memory of true-size networks, counted without running them, on tensors that have a shape and no content.

    python -m bench.speed.count            the table behind the numbers of the families and the cost model

FLOP: torch's own counter (two per multiply-add; matrix products, convolutions and attention). Memory: peak bytes of the
tensors that a forward makes, without the weights, workspaces and fragmentation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bench.command import run_command
from bench.markdown import table
from bench.speed import networks


@dataclass(frozen=True)
class Count:
    """One call: FLOP, peak bytes alive, and the bytes of the weights that it reads."""

    flop: float
    peak: int
    weights: int


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOP of the CPU's fused attention, which torch's counter does not know, from shapes."""
    return sdpa_flop_count(query, key, value)


_MORE = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


class _Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                key = storage._cdata
                if key not in self._known and id(storage) not in given:
                    size = each.untyped_storage().nbytes()
                    self._known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def count(make: Callable[[], Any], call: Callable[[Any], Any], dtype: torch.dtype = torch.bfloat16) -> Count:
    """Count `call(module)` for the module that `make` builds; nothing is allocated or computed."""
    before = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(dtype)
        try:
            module = make().eval()
            weights = sum(each.numel() * each.element_size() for each in module.parameters())
            alive = _Alive()
            with FlopCounterMode(display=False, custom_mapping=_MORE) as counter, alive:
                call(module)
        finally:
            torch.set_default_dtype(before)
    return Count(counter.get_total_flops(), alive.peak, weights)


# ------------------------------------------------------------------------------------------------ the calls of a family


def forward(name: str, width: int, height: int, *, small: bool = False, batch: int = 1) -> Count:
    """One forward of the family's network for an image of `width` x `height` pixels."""
    return count(lambda: networks.make_network(name, small=small), _FORWARDS[name](width // 8, height // 8, batch))


def decode(name: str, width: int, height: int, *, small: bool = False) -> Count:
    """The VAE's decoder, with the weights of the whole VAE."""

    def call(vae: Any) -> None:
        channels = getattr(vae.config, "latent_channels", None) or vae.config.z_dim
        frames = (1,) if "z_dim" in vae.config else ()
        vae.decode(torch.zeros(1, channels, *frames, height // 8, width // 8))

    return count(lambda: networks.make_vae(name, small=small), call)


def encode(name: str, width: int, height: int, *, small: bool = False) -> Count:
    """The VAE's encoder, with the weights of the whole VAE."""

    def call(vae: Any) -> None:
        frames = (1,) if "z_dim" in vae.config else ()
        vae.encode(torch.zeros(1, 3, *frames, height, width))

    return count(lambda: networks.make_vae(name, small=small), call)


def upscale(width: int, height: int, *, small: bool = False) -> Count:
    """RRDBNet x2 on an image of `width` x `height` pixels."""
    return count(lambda: networks.make_upscaler(small=small), lambda m: m(torch.zeros(1, 3, height, width)))


def flux_forward(tokens: int, text: int, batch: int = 1) -> Callable[[Any], Any]:
    """A forward of FLUX.1's class on `tokens` image tokens and `text` text tokens."""

    def call(model: Any) -> Any:
        config = model.config
        return model(
            hidden_states=torch.zeros(batch, tokens, config.in_channels),
            encoder_hidden_states=torch.zeros(batch, text, config.joint_attention_dim),
            pooled_projections=torch.zeros(batch, config.pooled_projection_dim),
            timestep=torch.ones(batch),
            guidance=torch.ones(batch),
            img_ids=torch.zeros(tokens, 3),
            txt_ids=torch.zeros(text, 3),
        )

    return call


def _flux(wide: int, high: int, batch: int) -> Callable[[Any], Any]:
    return flux_forward(wide * high // 4, 512, batch)


def _qwen(wide: int, high: int, batch: int) -> Callable[[Any], Any]:
    def call(model: Any) -> Any:
        config = model.config
        return model(
            hidden_states=torch.zeros(batch, wide * high // 4, config.in_channels),
            encoder_hidden_states=torch.zeros(batch, 64, config.joint_attention_dim),
            encoder_hidden_states_mask=None,
            timestep=torch.ones(batch),
            img_shapes=[[(1, high // 2, wide // 2)]] * batch,
        )

    return call


def _zimage(wide: int, high: int, batch: int) -> Callable[[Any], Any]:
    def call(model: Any) -> Any:
        pictures = [torch.zeros(model.in_channels, 1, high, wide) for _ in range(batch)]
        return model(pictures, torch.ones(batch), [torch.zeros(64, model.config.cap_feat_dim) for _ in pictures])

    return call


def _sd3(wide: int, high: int, batch: int) -> Callable[[Any], Any]:
    def call(model: Any) -> Any:
        config = model.config
        return model(
            hidden_states=torch.zeros(batch, config.in_channels, high, wide),
            encoder_hidden_states=torch.zeros(batch, 333, config.joint_attention_dim),
            pooled_projections=torch.zeros(batch, config.pooled_projection_dim),
            timestep=torch.ones(batch),
        )

    return call


def _sdxl(wide: int, high: int, batch: int) -> Callable[[Any], Any]:
    def call(model: Any) -> Any:
        config = model.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return model(
            torch.zeros(batch, 4, high, wide),
            torch.ones(batch),
            torch.zeros(batch, 77, config.cross_attention_dim),
            added_cond_kwargs={"text_embeds": torch.zeros(batch, pooled), "time_ids": torch.zeros(batch, 6)},
        )

    return call


_FORWARDS: dict[str, Callable[[int, int, int], Callable[[Any], Any]]] = {
    "flux1-dev": _flux,
    "qwen-image": _qwen,
    "z-image": _zimage,
    "sd35": _sd3,
    "sdxl": _sdxl,
}


def main() -> None:
    print(table(["part", "pixels", "TFLOP", "peak MiB", "GiB of weights"], rows()))


def rows() -> list[list[str]]:
    """Every part at its sizes: name, side in pixels, TFLOP, peak MiB of tensors, GiB of weights."""
    found: list[list[str]] = []

    def row(part: str, side: int, count: Count) -> None:
        cells = [f"{count.flop / 1e12:.4f}", f"{count.peak / 2**20:.0f}", f"{count.weights / 2**30:.2f}"]
        found.append([part, str(side), *cells])

    for name in networks.RECIPES:
        for side in (512, 1024, 2048):
            row(f"{name}: network", side, forward(name, side, side))
        for side in (512, 1024):
            row(f"{name}: decode", side, decode(name, side, side))
            row(f"{name}: encode", side, encode(name, side, side))
    for side in (512, 1024):
        row("RRDBNet x2", side, upscale(side, side))
    return found


if __name__ == "__main__":
    run_command(main)
