"""tools/train_demo: the tokenizers of the embedded model."""

from __future__ import annotations

import numpy as np

from mrflow_sched.demo.captions import caption
from mrflow_sched.demo.scenes import CATEGORIES, FINE_KINDS, OUTLINED, Scene, Thing, fine_scene, random_scene
from tools.train_demo.text import make_clip_tokenizer, make_t5_tokenizer


def test_no_caption_is_longer_than_what_the_text_encoders_read() -> None:
    things = Thing("purple", "checkered", "triangle"), Thing("orange", OUTLINED, "triangle")
    longest = Scene("objects", things, "a dark city", "orange", word="ABCDE", birds="three")
    drawn = [random_scene(np.random.default_rng(seed), kind) for kind in CATEGORIES for seed in range(60)]
    drawn += [fine_scene(np.random.default_rng(seed), kind) for kind in FINE_KINDS for seed in range(60)]
    texts = [caption(scene) for scene in (longest, *drawn)]
    for tokenizer, length in ((make_t5_tokenizer(), 32), (make_clip_tokenizer()[0], 77)):
        assert max(len(tokens) for tokens in tokenizer(texts).input_ids) <= length
