"""The flow model: a small FLUX.1 transformer trained at 64 pixels first, then 128, then 256, then given embedded
guidance.

Velocity v = noise - x0 is regressed at x = (1-sigma) x0 + sigma noise. An auxiliary linear head on the tokens of a
middle block names what each token shows (:func:`train_demo.data.meaning`); it is discarded after training. The schedule
is in seconds, so one setting serves any machine; a stopped run resumes from its last checkpoint.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from mrflow_sched.demo import scenes
from mrflow_sched.demo.captions import caption
from mrflow_sched.engines.diffusers.layouts.per_family import pack, unpack
from tools.train_demo import data, text

GUIDANCE_RANGE = (1.0, 5.0)


@dataclass(frozen=True)
class FlowSettings:
    seconds: float = 30000.0  # budget of the base training
    tiny_until: float = 0.095  # share of the budget spent at 64 pixels only
    low_until: float = 0.35  # share after which 256 pixels join 128
    high_share: float = 0.60  # share of steps at 256 pixels after that
    batch_tiny: int = 48
    batch_low: int = 16
    batch_high: int = 4
    band_share: float = 0.5  # share of steps at 256 pixels on a band of half the height, two for the price of one
    batch_band: int = 8
    word_share: float = 0.3  # share of steps at 128 and 256 pixels on images with a word only
    mark_weight: float = 4.0  # of the loss where letters, things and lights are, at 128 and 256 pixels
    muon_lr: float = 0.02
    adam_lr: float = 1.5e-3
    text_lr: float = 5e-4
    flat_until: float = 0.90  # share of the budget at full rates, falling linearly to 2 per cent after it
    warmup_steps: int = 150
    ema: float = 0.9985
    meaning_weight: float = 0.10  # of the auxiliary loss at the start; falls linearly to a fifth
    drop_text: float = 0.10
    skip_sky: float = 0.25  # share of captions that leave the sky open
    long_text: float = 0.015  # share of steps with 512 text tokens, the length that pipelines pad to by default
    seed: int = 7


SHIFTS = {data.TINY: 1.0, data.LOW: 1.65, data.HIGH: 3.0}  # of the training sigmas: larger images need more noise
NAMES = {data.TINY: "tiny", data.LOW: "low", data.HIGH: "high"}
MEANING_BLOCK = 1  # single block whose image tokens are classified


def make_transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("proj_out") or ("norm" in name and ".linear." in name):
                parameter.zero_()
    return model


def position_ids(h: int, w: int, top: int = 0) -> Tensor:
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1], ids[..., 2] = top + torch.arange(h // 2)[:, None], torch.arange(w // 2)[None]
    return ids.reshape(-1, 3)


def velocity(
    model: Any, x: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor, guidance: Tensor, top: int = 0
) -> Tensor:
    """x (B,16,h,w) → v of the same shape. `top`: row of tokens that x begins at, if it is a band of an image."""
    h, w = x.shape[-2:]
    out = model(
        hidden_states=pack(x),
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        timestep=sigma,
        guidance=guidance,
        img_ids=position_ids(h, w, top).to(x.device),
        txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device),
        return_dict=False,
    )[0]
    return unpack(out.float(), h, w)


def draw_sigma(count: int, shift: float, uniform: float) -> Tensor:
    sigma = torch.sigmoid(torch.randn(count))
    sigma = torch.where(torch.rand(count) < uniform, torch.rand(count), shift * sigma / (1 + (shift - 1) * sigma))
    return sigma.clamp(0.002, 1.0)


class TextToVelocity(nn.Module):
    """The transformer with its two text encoders, trained together."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        _, self.t5, _, self.clip = text.load(work)
        self.transformer = make_transformer()
        self.meaning = nn.ModuleDict(
            {kind: nn.Linear(self.transformer.inner_dim, len(names)) for kind, names in data.MEANINGS.items()}
        )
        self.requires_grad_(True)

    def naming_loss(self, features: Tensor, shown: Tensor) -> Tensor:
        """features (B, tokens, width), shown (B, 3, tokens) → mean cross-entropy of what every token shows."""
        features = nn.functional.layer_norm(features, features.shape[-1:])
        loss = torch.zeros((), device=features.device)
        for index, head in enumerate(self.meaning.values()):
            wanted = shown[:, index].flatten()
            known = wanted != data.UNKNOWN
            if bool(known.any()):
                logits = head(features.flatten(0, 1)[known])
                loss = loss + nn.functional.cross_entropy(logits.float(), wanted[known])
        return loss

    def encode(self, ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5(ids).last_hidden_state, self.clip(clip_ids).pooler_output


def is_letter(part: Any) -> Any:
    """Where an array of parts (the first of :data:`train_demo.data.MEANINGS`) shows letters."""
    names = data.MEANINGS["part"]
    first = names.index(scenes.LETTERS[0])
    return (part >= first) & (part < first + len(scenes.LETTERS))


def is_mark(part: Any) -> Any:
    """Where an array of parts shows a letter, a thing or a light: small parts that decide how an image is read."""
    names = data.MEANINGS["part"]
    return (part >= names.index(scenes.SHAPES[0])) & (part <= names.index(scenes.LIGHTS[-1]))


class Batches:
    """Random batches of (latents, T5 ids, CLIP ids) at either size."""

    def __init__(self, work: Path, settings: FlowSettings) -> None:
        self.latents = {size: np.load(work / f"latents{size}.npy", mmap_mode="r") for size in data.SIZES}
        self.meanings = {size: np.load(work / f"meaning{size}.npy", mmap_mode="r") for size in data.SIZES}
        self.t5_tokenizer, _, self.clip_tokenizer, _ = text.load(work)
        cache = work / "tokens.pt"
        if not cache.exists():
            drawn = data.load_scenes(work)
            texts = [caption(scene, name_sky=named) for named in (True, False) for scene in drawn]
            torch.save((self.tokenise([*texts, ""]), len(drawn)), cache)
        (self.ids, self.clip_ids), self.count = torch.load(cache)
        self.settings = settings
        self.rng = np.random.default_rng(settings.seed)
        self.with_words, self.first_row, self.last_row = self._words()

    def _words(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Indices of the images with a word, and the first and last row of tokens of each word at 256 pixels."""
        has = np.concatenate([is_letter(part[:, 0]).any(2) for part in np.array_split(self.meanings[data.HIGH], 50)])
        found = np.flatnonzero(has.any(1))
        return found, has[found].argmax(1), has.shape[1] - 1 - has[found, ::-1].argmax(1)

    def draw_band(self) -> tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """First row of tokens, and a batch of bands from there: half the height at 256 pixels, each with its word."""
        height = data.HIGH // data.TOKEN // 2
        one = self.rng.integers(len(self.with_words))
        top = int(self.rng.integers(max(0, self.last_row[one] - height + 1), min(height, self.first_row[one]) + 1))
        fits = self.with_words[(self.first_row >= top) & (self.last_row < top + height)]
        x0, ids, clip_ids, shown = self.draw(data.HIGH, self.settings.batch_band, among=fits)
        width = shown.shape[-1] // (2 * height)
        shown = shown.unflatten(2, (2 * height, width))[:, :, top : top + height].flatten(2)
        return top, (x0[:, :, 2 * top : 2 * (top + height)].contiguous(), ids, clip_ids, shown)

    def tokenise(self, texts: list[str], length: int = text.LENGTH) -> tuple[Tensor, Tensor]:
        pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.t5_tokenizer(texts, max_length=length, **pad).input_ids
        return ids, self.clip_tokenizer(texts, max_length=48, **pad).input_ids

    def draw(
        self, size: int, count: int, *, long_text: bool = False, among: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents (B, 16, h, w), T5 ids, CLIP ids, and what each token shows (B, 3, tokens)."""
        if among is None and size != data.TINY and self.rng.random() < self.settings.word_share:
            among = self.with_words
        rows = np.sort(self.rng.integers(0, self.count, count) if among is None else self.rng.choice(among, count))
        x0 = torch.from_numpy(self.latents[size][rows].astype(np.float32))
        shown = torch.from_numpy(self.meanings[size][rows].astype(np.int64)).flatten(2)
        rows = np.where(self.rng.random(count) < self.settings.skip_sky, rows + self.count, rows)
        empty = self.rng.random(count) < self.settings.drop_text
        rows = np.where(empty, len(self.ids) - 1, rows)
        ids = self.ids[rows]
        if long_text:
            ids = torch.nn.functional.pad(ids, (0, 512 - ids.shape[1]))
        return x0, ids, self.clip_ids[rows], shown

    def empty(self, count: int) -> tuple[Tensor, Tensor]:
        return self.ids[-1:].expand(count, -1), self.clip_ids[-1:].expand(count, -1)


def optimisers(model: Any, settings: FlowSettings) -> list[torch.optim.Optimizer]:
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    words: list[Tensor] = []
    for name, parameter in model.named_parameters():
        # Modulations are matrices too, but start at zero, so they are treated like the rest.
        inside = "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name
        (words if name.startswith(("t5.", "clip.")) else matrices if inside else rest).append(parameter)
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(rest, lr=settings.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    if words:
        made.append(torch.optim.AdamW(words, lr=settings.text_lr, betas=(0.9, 0.98), weight_decay=0.0))
    return made


def set_rates(opts: list[torch.optim.Optimizer], settings: FlowSettings, step: int, done: float) -> None:
    falling = max(0.02, (1 - done) / (1 - settings.flat_until))
    scale = min(1.0, (step + 1) / settings.warmup_steps) * min(1.0, falling)
    for opt, rate in zip(opts, (settings.muon_lr, settings.adam_lr, settings.text_lr), strict=True):
        for group in opt.param_groups:
            group["lr"] = rate * scale


@torch.no_grad()
def update_ema(ema: Any, model: Any, decay: float) -> None:
    for old, new in zip(ema.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - decay)


def save_state(path: Path, **state: Any) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train(
    work: Path, settings: FlowSettings | None = None, *, compiled: bool = True, save_every: float = 120.0
) -> dict[str, Any]:
    settings = settings or FlowSettings()
    torch.manual_seed(settings.seed)
    model = TextToVelocity(work)
    ema = copy.deepcopy(model).requires_grad_(False)
    opts = optimisers(model, settings)
    step, elapsed, curve, samples = 0, 0.0, [], dict.fromkeys(NAMES.values(), 0)
    path = work / "flow.pt"
    if path.exists():
        state = torch.load(path, weights_only=False)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        step, elapsed, curve, samples = state["step"], state["elapsed"], state["curve"], state["samples"]
        torch.manual_seed(settings.seed + step)
    batches = Batches(work, settings)
    batches.rng = np.random.default_rng([settings.seed, step])
    fast = torch.compile(model.transformer, dynamic=False) if compiled else model.transformer
    running: dict[str, list[float]] = {name: [] for name in (*NAMES.values(), "meaning")}
    features: list[Tensor] = []
    block = model.transformer.single_transformer_blocks[MEANING_BLOCK]
    hook = block.register_forward_hook(lambda _module, _inputs, out: features.append(out[1]))
    begin, last_save = time.time() - elapsed, time.time()
    while elapsed < settings.seconds:
        done = elapsed / settings.seconds
        set_rates(opts, settings, step, done)
        size = data.TINY if done < settings.tiny_until else data.LOW
        if done >= settings.low_until and batches.rng.random() < settings.high_share:
            size = data.HIGH
        count = {data.TINY: settings.batch_tiny, data.LOW: settings.batch_low, data.HIGH: settings.batch_high}[size]
        long_text = batches.rng.random() < settings.long_text
        if long_text:
            size, count = min(size, data.LOW), 4
        band = size == data.HIGH and done < settings.flat_until and batches.rng.random() < settings.band_share
        top, drawn = batches.draw_band() if band else (0, batches.draw(size, count, long_text=long_text))
        x0, ids, clip_ids, shown = drawn
        sigma = draw_sigma(len(x0), SHIFTS[size], 0.15 if size < data.HIGH else 0.25)
        noise = torch.randn_like(x0)
        s = sigma.view(-1, 1, 1, 1)
        guidance = torch.empty(len(x0)).uniform_(*GUIDANCE_RANGE)
        features.clear()
        with torch.autocast("cpu", torch.bfloat16):
            tokens, pooled = model.encode(ids, clip_ids)
            v = velocity(
                model.transformer if long_text else fast, (1 - s) * x0 + s * noise, sigma, tokens, pooled, guidance, top
            )
            naming = model.naming_loss(features[0], shown)
        squares = (v - (noise - x0)).square()
        error = squares.mean()
        weight = torch.ones_like(squares[:, :1])
        if size != data.TINY:
            marks = is_mark(shown[:, 0]).view(len(x0), 1, x0.shape[2] // 2, -1)
            wide = marks.repeat_interleave(2, 2).repeat_interleave(2, 3)
            weight = torch.where(wide, settings.mark_weight, weight)
        loss = (squares * weight).mean() / weight.mean() + settings.meaning_weight * (1 - 0.8 * done) * naming
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        update_ema(ema, model, min(settings.ema, (step + 1) / (step + 10)))
        running[NAMES[size]].append(float(error.detach()))
        running["meaning"].append(float(naming.detach()))
        samples[NAMES[size]] += len(x0)
        step += 1
        elapsed = time.time() - begin
        if step % 50 == 0:
            row = [step, elapsed, *(float(np.mean(each)) if each else None for each in running.values())]
            curve.append(row)
            running = {name: [] for name in running}
            print("flow", row, samples, flush=True)
        if time.time() - last_save > save_every or elapsed >= settings.seconds:
            save_state(
                path,
                model=model.state_dict(),
                ema=ema.state_dict(),
                opts=[o.state_dict() for o in opts],
                step=step,
                elapsed=elapsed,
                curve=curve,
                samples=samples,
            )
            last_save = time.time()
    hook.remove()
    record = {"settings": asdict(settings), "steps": step, "seconds": elapsed, "samples": samples, "curve": curve}
    (work / "flow.json").write_text(json.dumps(record))
    return record


# --------------------------------------------------------------------------------------------------- embedded
# guidance


@dataclass(frozen=True)
class GuideSettings:
    seconds: float = 420.0
    batch_low: int = 16
    batch_high: int = 4
    high_share: float = 0.40
    muon_lr: float = 0.004
    adam_lr: float = 1e-3
    drop_text: float = 0.05  # share without a caption, where guidance changes nothing
    ema: float = 0.98
    seed: int = 11


FASTEST_WAVE = 0.003
"""Radians per thousandth of guidance: the highest frequency of the scale that is kept, half a cycle per unit."""


@torch.no_grad()
def heed_guidance(model: Any) -> Callable[[], object]:
    """Initialise the guidance embedding anew around its mean output, which the network relies on.

    In the base training the scale has no meaning, so its embedding becomes constant, with units that no gradient
    reaches. Returns a function that keeps the embedding smooth, to be called after every step: it keeps only
    frequencies below half a cycle per unit of scale. Higher ones let the network react to differences of 0.006, so 3.5
    and its bfloat16 rounding 3.504 would give different images.
    """
    parts = model.time_text_embed
    scales = parts.time_proj(1000 * torch.linspace(*GUIDANCE_RANGE, 9))
    before = parts.guidance_embedder(scales).mean(0)
    parts.guidance_embedder.linear_1.reset_parameters()
    keep_smooth = _without_fast_waves(parts.guidance_embedder.linear_1.weight)
    keep_smooth()
    torch.nn.init.normal_(parts.guidance_embedder.linear_2.weight, std=0.1)
    parts.guidance_embedder.linear_2.bias += before - parts.guidance_embedder(scales).mean(0)
    return keep_smooth


def _without_fast_waves(weight: Tensor) -> Callable[[], object]:
    """A function that zeroes the high-frequency columns of `weight` (cosines and sines of falling frequency)."""
    half = weight.shape[1] // 2
    slow = 10000.0 ** (-torch.arange(half) / half) <= FASTEST_WAVE
    mask = torch.cat([slow, slow]).to(weight)

    @torch.no_grad()
    def clear() -> None:
        weight.mul_(mask)

    return clear


def train_guidance(
    work: Path, settings: GuideSettings | None = None, *, compiled: bool = True, save_every: float = 120.0
) -> dict[str, Any]:
    """Train the model to give in one forward what classifier-free guidance takes two for, at the scale it is given.

    The teacher is the base model's average, frozen: target = v_empty + w (v_text - v_empty).
    """
    settings = settings or GuideSettings()
    torch.manual_seed(settings.seed)
    base = TextToVelocity(work)
    base.load_state_dict(torch.load(work / "flow.pt", weights_only=False)["ema"])
    base.eval().requires_grad_(False)
    teacher = base.transformer
    model = copy.deepcopy(teacher).requires_grad_(True)
    ema = copy.deepcopy(teacher)
    keep_smooth = heed_guidance(model)
    ema.load_state_dict(model.state_dict())
    opts = optimisers(model, FlowSettings(muon_lr=settings.muon_lr, adam_lr=settings.adam_lr))[:2]
    step, elapsed, curve = 0, 0.0, []
    path = work / "guided.pt"
    if path.exists():
        state = torch.load(path, weights_only=False)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        step, elapsed, curve = state["step"], state["elapsed"], state["curve"]
    batches = Batches(work, FlowSettings(drop_text=settings.drop_text, word_share=0.5))
    batches.rng = np.random.default_rng([settings.seed, step])
    fast = torch.compile(model, dynamic=False) if compiled else model
    running: list[float] = []
    plain: list[float] = []
    begin, last_save = time.time() - elapsed, time.time()
    while elapsed < settings.seconds:
        scale = min(1.0, (step + 1) / 20) * max(0.02, 1 - elapsed / settings.seconds)
        for opt, rate in zip(opts, (settings.muon_lr, settings.adam_lr), strict=True):
            for group in opt.param_groups:
                group["lr"] = rate * scale
        high = batches.rng.random() < settings.high_share
        size, count = (data.HIGH, settings.batch_high) if high else (data.LOW, settings.batch_low)
        x0, ids, clip_ids, _ = batches.draw(size, count)
        sigma = draw_sigma(count, 3.0 if high else 1.65, 0.25)
        s = sigma.view(-1, 1, 1, 1)
        x = (1 - s) * x0 + s * torch.randn_like(x0)
        guidance = torch.empty(count).uniform_(*GUIDANCE_RANGE)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                tokens, pooled = base.encode(ids, clip_ids)
                empty = base.encode(*batches.empty(count))
                pair = velocity(
                    teacher,
                    x.repeat(2, 1, 1, 1),
                    sigma.repeat(2),
                    torch.cat([tokens, empty[0]]),
                    torch.cat([pooled, empty[1]]),
                    torch.full((2 * count,), 3.0),
                )
                with_text, without = pair.chunk(2)
                target = without + guidance.view(-1, 1, 1, 1) * (with_text - without)
            v = velocity(fast, x, sigma, tokens, pooled, guidance)
        loss = (v - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        keep_smooth()
        update_ema(ema, model, min(settings.ema, (step + 1) / (step + 10)))
        running.append(float(loss.detach()))
        plain.append(float((with_text - target).square().mean()))  # of a network that ignores the scale
        step += 1
        elapsed = time.time() - begin
        if step % 25 == 0:
            curve.append([step, elapsed, float(np.mean(running)), float(np.mean(plain))])
            running, plain = [], []
            print("guide", curve[-1], flush=True)
        if time.time() - last_save > save_every or elapsed >= settings.seconds:
            save_state(
                path,
                model=model.state_dict(),
                ema=ema.state_dict(),
                opts=[opt.state_dict() for opt in opts],
                step=step,
                elapsed=elapsed,
                curve=curve,
            )
            last_save = time.time()
    record = {"settings": asdict(settings), "steps": step, "seconds": elapsed, "curve": curve}
    (work / "guided.json").write_text(json.dumps(record))
    return record
