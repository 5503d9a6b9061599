"""MrFlow in the WebUI: each hook hands on to its room in `mrflow_sched.apps.webui`; every decision is made there."""

from importlib import import_module

from modules import script_callbacks, scripts

# All rooms are imported now: some hosts take this folder off the path once the script is loaded.
from mrflow_sched.apps.webui import api, axes, host, run, settings, ui, upscaler

HOST = host.attach(import_module)


class MrFlowScript(scripts.Script):
    """The always-on script "MrFlow" of txt2img; its title is its name in the API."""

    def title(self):
        return "MrFlow"

    def show(self, is_img2img):
        return False if is_img2img else scripts.AlwaysVisible

    def ui(self, is_img2img):
        return ui.build(is_img2img, self)

    def after_component(self, component, **kwargs):
        ui.after_component(self, component)

    def before_process(self, p, *args):
        run.before_process(p, args, HOST)

    def process(self, p, *args):
        run.process(p, HOST)

    def before_process_batch(self, p, *args, **kwargs):
        run.before_process_batch(p, HOST)

    def process_batch(self, p, *args, **kwargs):
        run.process_batch(p, HOST)

    def process_before_every_sampling(self, p, *args, x, noise, **kwargs):
        run.process_before_every_sampling(p, HOST, x, noise)

    def before_hr(self, p, *args):
        run.before_hr(p, HOST)

    def post_sample(self, p, ps, *args):
        run.post_sample(p, HOST)

    def postprocess(self, p, processed, *args):
        run.postprocess(p, HOST, processed)


script_callbacks.on_before_ui(upscaler.register)
axes.register()  # a host without a page reads the plot's axes before the callback below comes
script_callbacks.on_before_ui(axes.register)
script_callbacks.on_ui_settings(settings.register)
script_callbacks.on_app_started(api.register)
