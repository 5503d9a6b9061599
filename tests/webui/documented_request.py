"""The curl commands of docs/webui.md, read from the page and sent to any address."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "webui.md"
DOCUMENTED_ADDRESS = "http://127.0.0.1:7860"


def command(route: str = "/sdapi/v1/txt2img") -> list[str]:
    """The command for a route as a shell would split it."""
    commands = re.findall(r"^```\n(curl .*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    found = [each for each in commands if f"{DOCUMENTED_ADDRESS}{route} " in each]
    assert len(found) == 1
    return shlex.split(found[0].replace("\\\n", " "))


def send(address: str, changes: Mapping[str, Any] | None = None) -> Any:
    """Run the command against the host at `address`, with `changes` to the fields of its body; the JSON answer."""
    words = command()
    body = words.index("-d") + 1
    words[body] = json.dumps({**json.loads(words[body]), **(changes or {})})
    words = [word.replace(DOCUMENTED_ADDRESS, address) for word in words]
    done = subprocess.run([*words, "--noproxy", "*"], capture_output=True, text=True, check=True, timeout=900)
    return json.loads(done.stdout)
