"""Captions that leave attributes of a scene out, so that the seed has more to decide.

A caption of the embedded model's world names everything, and what it does not name means something: a thing without a
texture is plain, a scene without a word has no sign. So a texture is left out only together with its colour, and a word
only together with the ground: what else is missing shows that the caption is open.
"""

from __future__ import annotations

import numpy as np

from mrflow_sched.demo.scenes import Scene, Thing, caption

LEFT_OUT = 0.6
"""How likely an attribute is left out, where nothing else is said."""


def open_caption(scene: Scene, seed: int) -> str:
    """The scene in one line that leaves some of its attributes open.

    Args:
        scene: What to describe.
        seed: Chooses what is left out; the same seed leaves the same out.

    Returns:
        For instance "a circle over green hills", where the full caption is "a red circle over green hills under a pink
        sky".
    """
    shortened = _Open(np.random.default_rng(seed))
    text = full = caption(scene)
    while text == full:
        text = shortened.caption(scene)
    return text


class _Open:
    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def caption(self, scene: Scene) -> str:
        describe = {
            "objects": self._objects,
            "letters": self._letters,
            "detail": self._detail,
            "smooth": self._smooth,
        }
        return " ".join(describe[scene.category](scene).split())

    def _kept(self, left_out: float = LEFT_OUT) -> bool:
        return bool(self._rng.random() >= left_out)

    def _objects(self, scene: Scene) -> str:
        ground = self._kept(0.75)
        # A second thing is left out only where the ground is: two things on a named ground are all that there is.
        things = scene.things if ground or self._kept() else scene.things[:1]
        text = " and ".join(self._thing(thing) for thing in things)
        text += f" over {scene.ground}" if ground else ""
        text += f" under {_article(scene.sky)} sky" if self._kept() else ""
        return f"{text}, the word {scene.word}" if scene.word and (ground or self._kept()) else text

    def _letters(self, scene: Scene) -> str:
        ink = f" in {scene.ink} letters" if self._kept() else ""
        wall = f" on {_article(scene.wall)} wall" if self._kept() else ""
        return f"the word {scene.word}{ink}{wall}"

    def _detail(self, scene: Scene) -> str:
        text = f"many small {scene.ink if self._kept() else ''} {scene.detail}"
        text += f" on {scene.wall}" if self._kept() else ""
        return f"{text} behind {self._thing(scene.things[0])}" if scene.things else text

    def _smooth(self, scene: Scene) -> str:
        text = f"a smooth {scene.sky if self._kept() else ''} sky"
        text += f" over {scene.ground}" if self._kept() else ""
        if not self._kept(0.4):
            return text
        return f"{text} with a {scene.light}" + (f" on the {scene.side}" if self._kept(0.5) else "")

    def _thing(self, thing: Thing) -> str:
        texture = "" if thing.texture == "plain" else f"{thing.texture} "
        if self._kept():
            return f"{_article(thing.colour)} {texture}{thing.shape}"
        return _article(f"{texture if self._kept(0.5) else ''}{thing.shape}")


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"
