"""What pyproject.toml cannot say: the README with whole links, as a package index has no repository to look into."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/mrflow-sched/mrflow-sched"


def with_whole_links(text: str) -> str:
    """Images from the repository's files, and links to its pages, of the main branch."""
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#|mailto:)", rf"\1{REPOSITORY}/blob/main/", text)


README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(long_description=with_whole_links(README), long_description_content_type="text/markdown")
