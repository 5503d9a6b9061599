"""MrFlow in the WebUI: each hook calls a module of `mrflow_sched.apps.webui`, where every decision is made."""

from importlib import import_module
from typing import Any

from modules import script_callbacks, scripts

# All modules are imported now: some hosts take this folder off the path once the script is loaded.
from mrflow_sched.apps.webui import api, axes, host, reporting, run, settings, ui, upscaler, words

HOST = host.attach(import_module)
reporting.attach_console()


class MrFlowScript(scripts.Script):
    """The always-on script "MrFlow" of txt2img; its title is its name in the API."""

    def title(self) -> str:
        """Name the script.

        Returns:
            Its name on the page and in the API.
        """
        return "MrFlow"

    def show(self, is_img2img: bool) -> Any:
        """Tell the host where the script is shown.

        Args:
            is_img2img: Whether the host asks for img2img.

        Returns:
            `scripts.AlwaysVisible` in txt2img, False in img2img.
        """
        return False if is_img2img else scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """Make the accordion.

        Args:
            is_img2img: Whether the page is img2img.

        Returns:
            The components whose values the hooks get as `args`.
        """
        return ui.build(is_img2img, self)

    def after_component(self, component: Any, **kwargs: Any) -> None:
        """Take note of a component that the host made; see `ui.after_component`.

        Args:
            component: Any component of the page.
            **kwargs: What else the host says; not used.
        """
        ui.after_component(self, component)

    def before_process(self, p: Any, *args: Any) -> None:
        """Arm a job, before the model is loaded; see `run.before_process`.

        Args:
            p: The job.
            *args: Values of the script's controls.
        """
        run.before_process(p, args, HOST)

    def process(self, p: Any, *args: Any) -> None:
        """Decide all numbers of a job; see `run.process`.

        Args:
            p: The job.
            *args: Values of the script's controls; not used.
        """
        run.process(p, HOST)

    def before_process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Set the schedule of a batch's first pass; see `run.before_process_batch`.

        Args:
            p: The job.
            *args: Values of the script's controls; not used.
            **kwargs: What else the host says; not used.
        """
        run.before_process_batch(p, HOST)

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Write the metadata of a batch; see `run.process_batch`.

        Args:
            p: The job.
            *args: Values of the script's controls; not used.
            **kwargs: What else the host says; not used.
        """
        run.process_batch(p, HOST)

    def process_before_every_sampling(self, p: Any, *args: Any, x: Any, noise: Any, **kwargs: Any) -> None:
        """Set the solver or the refine noise of a pass; see `run.process_before_every_sampling`.

        Args:
            p: The job.
            *args: Values of the script's controls; not used.
            x: The latents that sampling starts from.
            noise: The noise that the host will add; where ours is wanted, it is overwritten in place.
            **kwargs: What else the host says; not used.
        """
        run.process_before_every_sampling(p, HOST, x, noise)

    def before_hr(self, p: Any, *args: Any) -> None:
        """Set the schedule of a batch's hires pass; see `run.before_hr`.

        Args:
            p: The job.
            *args: Values of the script's controls; not used.
        """
        run.before_hr(p, HOST)

    def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
        """Put back what was set for a batch; see `run.post_sample`.

        Args:
            p: The job.
            ps: The host's latents; not used.
            *args: Values of the script's controls; not used.
        """
        run.post_sample(p, HOST)

    def postprocess_batch(self, p: Any, *args: Any, images: Any, **kwargs: Any) -> None:
        """Keep the pixels of drafts; see `run.postprocess_batch`.

        Args:
            p: The job.
            *args: Values of the script's controls; not used.
            images: The batch's images as floats.
            **kwargs: What else the host says; not used.
        """
        run.postprocess_batch(p, images)

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        """Finish a draft's file, on hosts without the hook below; see `run.postprocess_image`.

        Args:
            p: The job.
            pp: The host's record of the image.
            *args: Values of the script's controls; not used.
        """
        run.postprocess_image(p, pp)

    def postprocess_image_after_composite(self, p: Any, pp: Any, *args: Any) -> None:
        """Finish a draft's file, after what other scripts did to it; see `run.postprocess_image`.

        Args:
            p: The job.
            pp: The host's record of the image.
            *args: Values of the script's controls; not used.
        """
        run.postprocess_image(p, pp)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        """Report a finished job and put the job object back; see `run.postprocess`.

        Args:
            p: The job.
            processed: What the host returns for the job.
            *args: Values of the script's controls; not used.
        """
        run.postprocess(p, HOST, processed)


script_callbacks.on_before_ui(upscaler.register)
axes.register()  # a host without a page reads the plot's axes before the callback below comes
script_callbacks.on_before_ui(axes.register)
script_callbacks.on_before_ui(words.register)
script_callbacks.on_ui_settings(settings.register)
script_callbacks.on_app_started(api.register)
