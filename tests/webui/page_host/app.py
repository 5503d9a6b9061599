"""A small txt2img page with the real script on it: `PYTHONPATH=REPOSITORY python app.py PORT`. Serves on the
loopback until it is ended.

Environment: PAGE_MODEL "flux" or "none"; PAGE_ESRGAN a folder of upscaler files; PAGE_LATE "1" puts width and height
below the script, as a user may order the page; PAGE_PACK the file of a translation pack.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import gradio
from modules import localization, script_callbacks, sd_models, shared  # pyright: ignore

gr: Any = gradio  # that of the host, whose release is another than the tests' own

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def load_script() -> Any:
    """The extension's script, loaded from its file as a WebUI does."""
    spec = importlib.util.spec_from_file_location("mrflow.py", ROOT / "scripts" / "mrflow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MrFlowScript()


def sizes(script: Any) -> list[Any]:
    """The sliders of the page that the plan depends on."""
    made = [
        gr.Slider(64, 2048, 1024, step=8, label="Width", elem_id="txt2img_width"),
        gr.Slider(64, 2048, 1024, step=8, label="Height", elem_id="txt2img_height"),
        gr.Slider(1, 30, 1.0, step=0.5, label="CFG Scale", elem_id="txt2img_cfg_scale"),
        gr.Slider(1, 150, 20, step=1, label="Sampling steps", elem_id="txt2img_steps"),
        gr.Checkbox(False, label="Hires. fix", elem_id="txt2img_hr-checkbox"),
        gr.Slider(1, 4, 2.0, step=0.05, label="Upscale by", elem_id="txt2img_hr_scale"),
        gr.Slider(0, 2048, 0, step=8, label="Resize width to", elem_id="txt2img_hr_resize_x"),
        gr.Slider(0, 2048, 0, step=8, label="Resize height to", elem_id="txt2img_hr_resize_y"),
    ]
    for component in made:
        script.after_component(component)
    return made


def parse(text: str) -> dict[str, str]:
    """Metadata such as "Steps: 12, MrFlow: 12+1" by key, split the way WebUIs do."""
    found: dict[str, str] = {}
    for key, value in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text):
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        if size:
            found[f"{key}-1"], found[f"{key}-2"] = size[1], size[2]
        else:
            found[key] = value.strip('"')
    return found


def build() -> Any:
    """The whole page."""
    script = load_script()
    print(f"the model is {type(sd_models.model_data.sd_model).__name__}")
    for moment in ("on_ui_settings", "on_before_ui"):
        for callback in script_callbacks.registered.get(moment, []):
            callback()
    with gr.Blocks(title="page", analytics_enabled=False) as demo:
        gr.Textbox(label="Prompt", elem_id="txt2img_prompt", value="a lighthouse on a cliff")
        late = os.environ.get("PAGE_LATE") == "1"
        made = [] if late else sizes(script)
        with gr.Group():
            controls = script.ui(False)
        made = made or sizes(script)
        pasted = gr.Textbox(label="Metadata", elem_id="page_metadata")
        paste = gr.Button("Paste", elem_id="page_paste")
        values = gr.Textbox(label="Values", elem_id="page_values", lines=2)
        show = gr.Button("Show values", elem_id="page_show")
        fields = script.infotext_fields

        def fill(text: str) -> list[Any]:
            params = parse(text)
            out: list[Any] = []
            for component, source in fields:
                value = source(params)
                kind = type(component.value)
                out.append(gr.update() if value is None else gr.update(value=kind(value)))
            return out

        paste.click(fill, inputs=[pasted], outputs=[component for component, _ in fields], queue=False)
        show.click(lambda *chosen: json.dumps(chosen), inputs=controls, outputs=[values], queue=False)
    return demo


def add_to_head(*, scripts: list[Path], styles: list[Path]) -> None:
    """Put scripts and styles into every page that gradio serves, as WebUIs do."""
    head = f"<script>{localization.localization_js(shared.opts.localization)}</script>" + "".join(
        f"<script>{path.read_text(encoding='utf-8')}</script>" for path in scripts
    )
    body = "".join(f"<style>{path.read_text(encoding='utf-8')}</style>" for path in styles)
    original = gr.routes.templates.TemplateResponse

    def response(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        made.body = made.body.replace(b"</head>", f"{head}</head>".encode())
        made.body = made.body.replace(b"</body>", f"{body}</body>".encode())
        made.init_headers()
        return made

    gr.routes.templates.TemplateResponse = response


if __name__ == "__main__":
    page = build()
    add_to_head(
        scripts=[HERE / "page.js", *sorted((ROOT / "javascript").glob("*.js"))],
        styles=[HERE / "page.css", ROOT / "style.css"],
    )
    app, url, _ = page.launch(
        server_name="127.0.0.1", server_port=int(sys.argv[1]), prevent_thread_lock=True, quiet=True, show_api=False
    )
    for started in script_callbacks.registered.get("on_app_started", []):
        started(page, app)
    print(f"ready {url} gradio {gr.__version__}", flush=True)
    page.block_thread()
