"""Seconds of each part of a run in true sizes, with random weights, on torch alone: no other library, no downloads.

    python -m bench.speed.parts                  FLUX.1-dev's network, its VAE, RRDBNet x2, and copies to the device
    python -m bench.speed.parts --small          the same on networks of a few channels, on any machine

Prints JSON: for every part at every size the median seconds and the FLOP, in bfloat16 (the upscaler in float16 and
channels last, as `ModelUpscaler` runs it), seconds per GB of copies in both directions, and "speeds", the fields of
`mrflow_sched.plan.cost.Speeds` that fit them. `TYPICAL` in `mrflow_sched.apps.webui.expected` is made of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """How large the networks are, and at which sides in pixels the final image is measured."""

    width: int = 3072
    heads: int = 24
    double: int = 19
    single: int = 38
    text: int = 512
    channels: tuple[int, ...] = (128, 256, 512, 512)
    filters: int = 64
    blocks: int = 23
    sides: tuple[int, ...] = (512, 1024, 1440, 2048)
    copied: int = 2**30


SMALL = Sizes(64, 2, 1, 2, 16, (8, 8, 16, 16), 8, 1, (64, 128), 2**22)


# ---------------------------------------------------------------------------------------------------------- the network


class Stream(nn.Module):
    """Modulation, projections and MLP of one of the two streams of a double block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Pair(nn.Module):
    """The streams of text and image of a double block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.text, self.image = Stream(width), Stream(width)


def normed(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions on (B, heads, n, d)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def attended(qkv: Tensor, heads: int, angles: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = (turned(F.normalize(x, dim=-1), angles) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Network(nn.Module):
    """A transformer with FLUX.1's widths and depths: blocks of two streams, then blocks of one."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads, self.text = sizes.heads, sizes.text
        self.enter, self.leave = nn.Linear(64, width), nn.Linear(width, 64)
        self.pairs = nn.ModuleList(Pair(width) for _ in range(sizes.double))
        self.modulations = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(sizes.single))
        self.inner = nn.ModuleList(nn.Linear(width, 7 * width) for _ in range(sizes.single))
        self.outer = nn.ModuleList(nn.Linear(5 * width, width) for _ in range(sizes.single))

    def forward(self, image: Tensor, text: Tensor, vector: Tensor, angles: Tensor) -> Tensor:
        streams = [text, self.enter(image)]
        for both in self.pairs:
            pair: tuple[Any, Any] = (both.text, both.image)
            parts: list[Any] = [block.modulation(F.silu(vector))[:, None].chunk(6, -1) for block in pair]
            triples = [
                block.qkv(normed(x, part[0], part[1])) for x, block, part in zip(streams, pair, parts, strict=True)
            ]
            out = attended(torch.cat(triples, 1), self.heads, angles).split([x.shape[1] for x in streams], 1)
            for i, block in enumerate(pair):
                scale, shift, gate = parts[i][3:]
                x = streams[i] + parts[i][2] * block.out(out[i])
                streams[i] = x + gate * block.down(F.gelu(block.up(normed(x, scale, shift)), approximate="tanh"))
        x = torch.cat(streams, 1)
        width = x.shape[-1]
        for modulation, inner, outer in zip(self.modulations, self.inner, self.outer, strict=True):
            scale, shift, gate = modulation(F.silu(vector))[:, None].chunk(3, -1)
            qkv, wide = inner(normed(x, scale, shift)).split([3 * width, 4 * width], -1)
            x = x + gate * outer(torch.cat((attended(qkv, self.heads, angles), F.gelu(wide, approximate="tanh")), -1))
        return self.leave(x[:, self.text :])


def forward(network: Network) -> Callable[[int], Work]:
    """For a side in pixels of the image: a forward of the network for it."""
    weight = network.enter.weight
    width = weight.shape[0]

    def prepare(side: int) -> Work:
        tokens = (side // 16) ** 2
        image, text, vector = (weight.new_zeros(1, *shape) for shape in ((tokens, 64), (network.text, width), (width,)))
        angles = torch.rand(network.text + tokens, width // network.heads // 2, device=weight.device)
        return lambda: network(image, text, vector, angles)

    return prepare


# -------------------------------------------------------------------------------------------- the VAE and the upscaler


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        groups = min(32, inside // 4), min(32, outside // 4)
        self.norms = nn.ModuleList((nn.GroupNorm(groups[0], inside), nn.GroupNorm(groups[1], outside)))
        self.convs = nn.ModuleList((nn.Conv2d(inside, outside, 3, 1, 1), nn.Conv2d(outside, outside, 3, 1, 1)))
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(norm(y)))
        return self.skip(x) + y


class Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(32, channels // 4), channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(flat)[:, None].chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0]).transpose(1, 2).reshape(x.shape)


def middle(channels: int) -> list[nn.Module]:
    return [Residual(channels, channels), Attention(channels), Residual(channels, channels)]


def make_decoder(channels: tuple[int, ...]) -> nn.Sequential:
    """The layers of AutoencoderKL's decoder, from 16 latent channels."""
    now = channels[-1]
    layers: list[nn.Module] = [nn.Conv2d(16, now, 3, 1, 1), *middle(now)]
    for number, wide in enumerate(reversed(channels)):
        layers += [Residual(now, wide), Residual(wide, wide), Residual(wide, wide)]
        now = wide
        if number < len(channels) - 1:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(now, now, 3, 1, 1)]
    return nn.Sequential(*layers, nn.GroupNorm(min(32, now // 4), now), nn.SiLU(), nn.Conv2d(now, 3, 3, 1, 1))


def make_encoder(channels: tuple[int, ...]) -> nn.Sequential:
    """The layers of AutoencoderKL's encoder, to twice 16 latent channels."""
    now = channels[0]
    layers: list[nn.Module] = [nn.Conv2d(3, now, 3, 1, 1)]
    for number, wide in enumerate(channels):
        layers += [Residual(now, wide), Residual(wide, wide)]
        now = wide
        if number < len(channels) - 1:
            layers.append(nn.Conv2d(now, now, 3, 2, 1))
    layers += [*middle(now), nn.GroupNorm(min(32, now // 4), now), nn.SiLU(), nn.Conv2d(now, 32, 3, 1, 1)]
    return nn.Sequential(*layers)


class Dense(nn.Module):
    """Five convolutions, each of which sees all before it."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        grown = filters // 2
        outs = (grown, grown, grown, grown, filters)
        self.convs = nn.ModuleList(nn.Conv2d(filters + i * grown, out, 3, 1, 1) for i, out in enumerate(outs))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in self.convs[:-1]:
            seen.append(F.leaky_relu(conv(torch.cat(seen, 1)), 0.2))
        return x + 0.2 * self.convs[-1](torch.cat(seen, 1))


class Upscaler(nn.Module):
    """RRDBNet x2, whose first layer takes 2x2 pixels as channels."""

    def __init__(self, filters: int, blocks: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(12, filters, 3, 1, 1)
        self.blocks = nn.ModuleList(nn.Sequential(*(Dense(filters) for _ in range(3))) for _ in range(blocks))
        self.after = nn.ModuleList(nn.Conv2d(filters, filters, 3, 1, 1) for _ in range(4))
        self.leave = nn.Conv2d(filters, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = y = self.enter(F.pixel_unshuffle(x, 2))
        for block in self.blocks:
            y = y + 0.2 * block(y)
        y = first + self.after[0](y)
        for conv in self.after[1:3]:
            y = F.leaky_relu(conv(F.interpolate(y, scale_factor=2)), 0.2)
        return self.leave(F.leaky_relu(self.after[3](y), 0.2))


# ------------------------------------------------------------------------------------------------------------ measuring


def convolved(network: Any, channels: int, scale: float) -> Callable[[int], Work]:
    """For a side in pixels of the image: a run of the network, which reads `scale` times that side."""
    weight = next(network.parameters())

    def prepare(side: int) -> Work:
        x = weight.new_zeros(1, channels, int(side * scale), int(side * scale))
        return lambda: network(x)

    return prepare


def ready(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    return module.eval().requires_grad_(False).to(device, dtype)


def median(work: Work, device: torch.device, repeats: int) -> float:
    """Median seconds, after one call to warm up."""
    found: list[float] = []
    for _ in range(repeats + 1):
        settle(device)
        begin = time.perf_counter()
        work()
        settle(device)
        found.append(time.perf_counter() - begin)
    return sorted(found[1:])[repeats // 2]


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(sizes: Sizes, device: torch.device, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds and FLOP by part and by side in pixels of the image that the part makes or reads."""
    exact = torch.bfloat16
    found: dict[str, dict[str, Any]] = {}

    def timed(part: str, work: Callable[[int], Work]) -> None:
        row = found.setdefault(part, {})
        for side in sizes.sides:
            try:
                run = work(side)
                with FlopCounterMode(display=False) as counter:
                    run()
                row[str(side)] = {"seconds": median(run, device, repeats), "FLOP": counter.get_total_flops()}
            except RuntimeError as error:  # out of memory, or no kernel for this size
                print(f"{part} at {side} was not timed: {str(error).splitlines()[0]}", file=sys.stderr)

    before = torch.get_default_dtype()
    torch.set_default_dtype(exact)
    try:
        with device, torch.no_grad():
            timed("network", forward(ready(Network(sizes), device, exact)))
            for name, order in (("decode", torch.contiguous_format), ("decode, channels last", torch.channels_last)):
                decoder = ready(make_decoder(sizes.channels), device, exact).to(memory_format=order)
                timed(name, convolved(decoder, 16, 1 / 8))
            timed("encode", convolved(ready(make_encoder(sizes.channels), device, exact), 3, 1))
            upscaler = ready(Upscaler(sizes.filters, sizes.blocks), device, torch.float16)
            timed("upscale", convolved(upscaler.to(memory_format=torch.channels_last), 3, 1 / 2))
    finally:
        torch.set_default_dtype(before)
    found["seconds per GB"] = copies(sizes.copied, device, repeats)
    found["speeds"] = fitted(found)
    return found


def fitted(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The fields of `Speeds`: seconds per FLOP, and of the network also per forward, that miss least by share."""
    points = [(row["FLOP"], row["seconds"]) for row in found["network"].values()]
    weights = [[1 / seconds, flop / seconds] for flop, seconds in points]
    forward, network = torch.linalg.lstsq(
        torch.tensor(weights, dtype=torch.float64), torch.ones(len(points), 1, dtype=torch.float64)
    ).solution.flatten()
    speeds = {"network": float(network), "forward": max(float(forward), 0.0)}
    for part in ("decode", "encode", "upscale"):
        rates = sorted(row["seconds"] / row["FLOP"] for row in found[part].values())
        speeds[part] = rates[len(rates) // 2]
    return speeds


def copies(count: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds per 10^9 bytes from plain memory, from pinned memory, and back to plain memory."""
    plain = torch.ones(count, dtype=torch.uint8)
    there = plain.to(device)
    ways: dict[str, Work] = {
        "to the device": lambda: plain.to(device, copy=True),
        "back": lambda: there.to("cpu", copy=True),
    }
    if device.type == "cuda":
        pinned = plain.pin_memory()
        ways["to the device, pinned"] = lambda: pinned.to(device, non_blocking=True)
    return {name: median(work, device, repeats) * 1e9 / count for name, work in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.parts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="networks of a few channels")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each part, the median counts (default 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu" and not options.small:
        parser.error("true sizes need a GPU; add --small to run here")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    begin = time.perf_counter()
    found = measure(SMALL if options.small else Sizes(), device, options.repeats)
    took = time.perf_counter() - begin
    print(
        json.dumps(
            {"device": name, "torch": torch.__version__, "small": options.small, **found, "took": took}, indent=1
        )
    )


if __name__ == "__main__":
    main()
