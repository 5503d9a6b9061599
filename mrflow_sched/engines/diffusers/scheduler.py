"""`MrFlowScheduler`: our schedules and solvers behind the interface of a diffusers scheduler.

A diffusers pipeline owns its loop: it asks the scheduler for timesteps, evaluates its network at each, and passes the
output to `step`. Here `step` turns that output into a denoised estimate and sends it to a solver of
`mrflow_sched.sampling.solvers`, which returns the next state to evaluate. Two ways to use it:

* `MrFlowScheduler.from_config(pipe.scheduler.config, solver=…)` in place of a pipeline's scheduler, with the schedule
  that scheduler would make (`stage="sample"`), or with a refine schedule that nothing shifts (`stage="refine"`).
* `MrFlowScheduler.for_stage(…)` walks exactly one given schedule, whatever the pipeline asks for: a stage of a plan.

The state stays float32 from the first step to `final_state`, whatever the pipeline rounds its copy to. For
variance-exploding models (SD1.5, SDXL) it is x0 + sigma_ve · noise, as in diffusers' EulerDiscreteScheduler, and for
EDM models (Playground 2.5, CosXL) x0 + sigma_data · sigma_ve · noise, as in diffusers' EDMEulerScheduler. The
pipeline's copy is scaled where its loop has another convention: cos(t) x0 + sin(t) noise for "trigflow" (SanaSprint),
unit variance with `preserving` (LCM).
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config  # pyright: ignore[reportUnknownVariableType]
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from mrflow_sched._runtime.errors import MrFlowError
from mrflow_sched.engines.diffusers.walk import Walk
from mrflow_sched.plan.families import Prediction
from mrflow_sched.plan.schedule import Sigmas, refine_sigmas, shift_sigma, unshift_sigma
from mrflow_sched.plan.scheduler_config import (
    CONVERSIONS,
    adds_noise,
    edm_levels,
    flow_sigmas,
    shift_in_force,
    step_count,
    time_of,
    training_sigmas,
    ve_sigmas,
)
from mrflow_sched.plan.trigflow import angle_of, trigflow_sigmas
from mrflow_sched.sampling.noise import model_sigmas, to_denoised
from mrflow_sched.sampling.solvers import evaluation_sigmas, evaluations_per_step, get_solver

# diffusers' words for what a network predicts, and ours.
_PREDICTIONS: Mapping[str, Prediction] = {
    "flow_prediction": "flow",
    "flow": "flow",
    "epsilon": "epsilon",
    "v_prediction": "v",
    "v": "v",
    "edm": "edm",
    "trigflow": "flow",
}
# Options that only shape a schedule or add noise: a stage whose schedule is given does not use them.
_GIVEN_SCHEDULE: Mapping[str, Any] = {
    "stage": "sample",
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}


@dataclass
class MrFlowSchedulerOutput(BaseOutput):
    """What `MrFlowScheduler.step` returns.

    Attributes:
        prev_sample: The next state, in the dtype of the network's output.
        pred_original_sample: The clean estimate of the state just evaluated, float32.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class MrFlowScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler that walks our schedules with our solvers, for flow and for variance-exploding models.

    All arguments but the last four are named and meant as in FlowMatchEulerDiscreteScheduler, in the `use_flow_sigmas`
    mode of DPMSolverMultistepScheduler, in EulerDiscreteScheduler (from `beta_start` to `timestep_type`), and in
    EDMEulerScheduler (from `sigma_min` to `sigma_schedule`), so that their configurations can be taken over. Betas
    without a `prediction_type` mean "epsilon", neither means flow. Schedules always end at 0.

    Args:
        num_train_timesteps: Training steps; a flow model is told sigma times this as the time.
        shift: Fixed shift of flow sigmas, 1 for none.
        use_dynamic_shifting: Shift by the `mu` that the pipeline passes to `set_timesteps`, instead of `shift`.
        base_shift: Read by pipelines that compute `mu`: its value at `base_image_seq_len` tokens.
        max_shift: Likewise: its value at `max_image_seq_len` tokens.
        base_image_seq_len: Tokens of the smallest image.
        max_image_seq_len: Tokens of the largest image.
        invert_sigmas: Times and sigmas that a pipeline reads rise from 0 to 1, and its network predicts image minus
            noise (OmniGen).
        shift_terminal: Stretch the shifted schedule so that its last sigma above 0 is this one; None for no stretching.
        use_karras_sigmas: Respace the schedule by Karras et al. 2022, equation 5, with rho = 7.
        use_exponential_sigmas: Respace it evenly in log sigma.
        use_beta_sigmas: Respace it at quantiles of Beta(0.6, 0.6).
        time_shift_type: "exponential": the shift is exp(mu); "linear": it is mu itself.
        stochastic_sampling: Only False: no noise is added while sampling.
        use_flow_sigmas: Shift by `flow_shift`, and start at 1 where DPMSolverMultistepScheduler starts up to
            1/num_train_timesteps below 1 before the shift.
        flow_shift: Fixed shift with `use_flow_sigmas`.
        beta_start: First beta of a variance-exploding model.
        beta_end: Last beta.
        beta_schedule: "linear", "scaled_linear" (linear in the root) or "squaredcos_cap_v2".
        trained_betas: All betas, in place of the three above.
        prediction_type: "flow", "flow_prediction", "trigflow", "epsilon", "v", "v_prediction" or "edm", which is what
            "epsilon" means with `sigma_data`; None: see above.
        timestep_spacing: "linspace", "leading" or "trailing": Lin et al. 2023, table 2.
        steps_offset: Added to the training steps of "leading" spacing.
        rescale_betas_zero_snr: Rescale the betas to zero terminal signal-to-noise ratio.
        final_sigmas_type: Only "zero".
        interpolation_type: Only "linear".
        timestep_type: Only "discrete".
        sigma_min: Last sigma before 0 where the schedule is spaced anew, or of an EDM model; None: the schedule's own.
        sigma_max: Its first sigma; None: the schedule's own.
        sigma_data: Standard deviation of an EDM model's latents; None: it is no EDM model. Sigma is counted in it. For
            "trigflow" that of the pipeline's state.
        rho: Roots of this order are evenly spaced in an EDM model's schedule.
        sigma_schedule: "karras", or "exponential", which spaces it evenly in log sigma.
        snr_shift_scale: The signal-to-noise ratio of the betas is divided by it (CogVideoXDDIMScheduler).
        solver: A name in `mrflow_sched.sampling.solvers.SOLVERS`.
        stage: "sample" makes the schedule that diffusers' Euler scheduler for such a model would make of the same
            configuration; "refine" makes `refine_sigmas(sigma, steps, refine_curve)`, which nothing shifts.
        sigma: Flow sigma at which a "refine" stage starts.
        refine_curve: Its spacing, as in `refine_sigmas`.

    Raises:
        MrFlowError: An unknown value, or an option that would need noise or another direction of time.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", *(each.name for each in KarrasDiffusionSchedulers)]  # noqa: RUF012
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float | None = 1.0,
        beta_start: float | None = None,
        beta_end: float | None = None,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
        interpolation_type: str = "linear",
        timestep_type: str = "discrete",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        rho: float = 7.0,
        sigma_schedule: str = "karras",
        snr_shift_scale: float = 1.0,
        solver: str = "multistep",
        stage: Literal["sample", "refine"] = "sample",
        sigma: float = 0.12,
        refine_curve: str = "linear",
    ) -> None:
        get_solver(solver)
        options = self._options
        _check_options(options)
        self._angles = prediction_type == "trigflow"
        self._preserving = False
        exploding = not self._angles and not (beta_start is None and trained_betas is None and sigma_data is None)
        self.prediction: Prediction = _PREDICTIONS[prediction_type or ("epsilon" if exploding else "flow")]
        self._edm = None if self._angles else edm_levels(options)
        if self._edm is not None and self.prediction == "epsilon":
            self.prediction = "edm"
        # sigma_ve of every training step, rising; empty for flow and EDM models.
        self._table = () if self.prediction == "flow" or self._edm is not None else training_sigmas(options)
        # Read where a schedule is made from a step count alone; settable, as some pipelines set it.
        static = self.prediction == "flow" and not use_dynamic_shifting
        self.sigma_min = shift_sigma(1.0 / num_train_timesteps, shift) if static else 1.0 / num_train_timesteps
        self._fixed: Sigmas | None = None
        self._start: Tensor | None = None
        self._on_evaluation: Callable[[dict[str, Any]], object] | None = None
        self.num_inference_steps: int | None = None
        self._set_sigmas(self._training_sigmas(), {}, None)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the model that a configuration describes, whatever class of scheduler it came from.

        Every value of the other scheduler counts, also those it filled in by default, so the schedules agree. Warns
        where that sampler adds noise at every step, as far as its configuration tells: none is added here.

        Args:
            config: The configuration, usually `pipe.scheduler.config`.
            return_unused_kwargs: Also return the keyword arguments that this class does not take.
            **kwargs: Override values of the configuration.

        Returns:
            The scheduler; with `return_unused_kwargs` a pair of it and the unused arguments.
        """
        if isinstance(config, dict):
            # diffusers lists here what was left at the other class's default, to use this class's default instead.
            given = cast("dict[str, Any]", config)
            config = {name: value for name, value in given.items() if name != "_use_default_values"}
            if adds_noise(given, str(given.get("_class_name", ""))):
                warnings.warn(
                    "config is of a sampler that adds noise at every step; MrFlowScheduler adds none, so images "
                    "differ, and those of a model distilled for that sampler may lose detail.",
                    stacklevel=2,
                )
        return super().from_config(config, return_unused_kwargs, **kwargs)  # pyright: ignore[reportUnknownMemberType]

    @classmethod
    def for_stage(
        cls,
        config: Mapping[str, Any],
        sigmas: Sequence[float],
        solver: str,
        *,
        prediction: Prediction = "flow",
        preserving: bool = False,
        start: Tensor | None = None,
        on_evaluation: Callable[[dict[str, Any]], object] | None = None,
    ) -> MrFlowScheduler:
        """A scheduler that walks exactly one schedule, whatever a pipeline passes to `set_timesteps`.

        Args:
            config: Configuration of the pipeline's own scheduler.
            sigmas: Strictly falling, usually to 0, in the model's units: flow sigma, or sigma_ve where `prediction` is
                "epsilon" or "v" (`noise.model_sigmas`).
            solver: A name in `mrflow_sched.sampling.solvers.SOLVERS`.
            prediction: What the network predicts.
            preserving: The pipeline hands its network the state as it is, so the state has unit variance.
            start: The state at `sigmas[0]`, in the layout of the pipeline's loop but in our scale; used in place of the
                copy, often in half precision, that the pipeline passes to the first step.
            on_evaluation: Called after each evaluation and before the state moves with a dict of `i` (the step, from
                0), `sigma` (float), `x` and `denoised`; it may raise `Cancelled`.

        Returns:
            The scheduler, at the start of the schedule.

        Raises:
            MrFlowError: A schedule that does not fall, a prediction without betas, or an unknown solver.
        """
        if config.get("prediction_type") not in _ALLOWED["prediction_type"]:
            raise MrFlowError(
                f"config has prediction_type {config['prediction_type']!r}, which is not flow, epsilon or v; "
                "this pipeline cannot be run in stages."
            )
        said = "trigflow" if config.get("prediction_type") == "trigflow" else prediction
        overrides: dict[str, Any] = {**_GIVEN_SCHEDULE, "solver": solver, "prediction_type": said}
        # Names that this class does not take would cause a warning at every stage.
        names = inspect.signature(cls.__init__).parameters
        names = set(names) - {"stochastic_sampling"}  # noise between steps is the method's (`methods.Renoise`)
        known = {name: value for name, value in config.items() if name in names and value is not None}
        made: MrFlowScheduler = cls.from_config(known, False, **overrides)
        made.prediction = prediction  # of an EDM model "epsilon" may be meant
        made._preserving = preserving
        made._start = start
        made._on_evaluation = on_evaluation
        made._fixed = tuple(float(sigma) for sigma in sigmas)
        made._set_sigmas(made._fixed, {}, None)
        return made

    @property
    def _options(self) -> Mapping[str, Any]:
        # Read anew each time: pipelines may replace a scheduler's configuration, as StableDiffusionPipeline does.
        return cast("Mapping[str, Any]", self.config)

    # --- what a pipeline reads

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline multiplies unit noise with: 1, or the first sigma_ve where this class made the schedule."""
        if self.prediction == "flow" or self._fixed is not None or self._options["stage"] == "refine":
            return 1.0
        if self._edm is not None:
            return self._edm.data * self._schedule[0]
        largest = self._schedule[0]
        # Leading spacing stops short of the last training step, so the image is still in what the first step sees.
        return math.hypot(largest, 1.0) if self._options["timestep_spacing"] == "leading" else largest

    @property
    def step_index(self) -> int | None:
        """Evaluations done, counted from the start of the schedule; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The evaluation at which the pipeline starts; None where it was not set."""
        return self._begin_index

    @property
    def current_evaluation(self) -> int:
        """The next evaluation, from 0."""
        return (self._begin_index if self._step_index is None else self._step_index) or 0

    @property
    def current_step(self) -> int:
        """The solver's step, from 0, that the next evaluation belongs to."""
        return self.current_evaluation // evaluations_per_step(self._options["solver"])

    @property
    def current_sigma(self) -> float:
        """The sigma of the next evaluation, in the model's units."""
        return self._evaluations[min(self.current_evaluation, len(self._evaluations) - 1)]

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later evaluation of the schedule (image-to-image).

        Args:
            begin_index: Its number, from 0.
        """
        self._begin_index = begin_index

    @property
    def state(self) -> Tensor | None:
        """The current state, in float32 and in the pipeline's layout; None before the first step."""
        return None if self._walk is None else self._walk.state

    @property
    def final_state(self) -> Tensor | None:
        """The state at the end of the schedule, in float32 and in the pipeline's layout; None until it is reached."""
        return self.state if self._step_index == len(self._evaluations) else None

    def __len__(self) -> int:
        return int(self._options["num_train_timesteps"])

    def __getstate__(self) -> dict[str, Any]:
        # A copy (copy.copy, deepcopy, pickle) has the schedule and is at its start: two must not share one run.
        return {**self.__dict__, "_walk": None, "_step_index": None}

    # --- the schedule

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        *,
        intermediate_timesteps: float | None = None,
        **ignored: Any,
    ) -> None:
        """Make the schedule and start anew.

        One made by `for_stage` keeps its schedule; "refine" only reads the step count.

        Args:
            num_inference_steps: Steps, at least 1; may be left out where `sigmas` or `timesteps` say it.
            device: Where `timesteps` and `sigmas` are put.
            sigmas: Sigmas to use before the shift, with or without the final 0.
            mu: Logarithm of the shift ("linear" time shift: the shift itself), needed with `use_dynamic_shifting`.
            timesteps: What the network is told at each step; flow models that get them (CogView4) are told the time
                before the shift, here too.
            intermediate_timesteps: The angle in the middle of two steps of "trigflow".
            **ignored: Arguments of other schedulers; not used.

        Raises:
            MrFlowError: Nothing gives the number of steps, the counts disagree, or `mu` is missing.
        """
        options, times = self._options, dict[float, float]()
        if self._fixed is not None:
            schedule = self._fixed
        else:
            count = step_count(num_inference_steps, sigmas, timesteps)
            if options["stage"] == "refine":
                refine = refine_sigmas(options["sigma"], count, options["refine_curve"])
                schedule = model_sigmas(refine, self.prediction, None if self._edm is None else self._edm.largest)
            elif self._angles:
                schedule = trigflow_sigmas(count, intermediate_timesteps)
            elif self.prediction == "flow":
                schedule = flow_sigmas(options, count, sigmas, timesteps, mu, self.sigma_min)
                told = None if options["invert_sigmas"] else timesteps
                times = {} if told is None else dict(zip(schedule, map(float, told), strict=False))
            elif self._edm is not None and sigmas is None:
                schedule = self._edm.spaced(count) if timesteps is None else self._edm.told(timesteps)
            else:
                schedule, times = ve_sigmas(options, self._table, count, sigmas, timesteps)
        given = timesteps is not None and self.prediction == "flow" and not options["invert_sigmas"]
        if given and not times:
            # The given times belong to the sigmas of another schedule; they mean that the shift is to be undone.
            shift = shift_in_force(options, mu)
            times = {sigma: len(self) * unshift_sigma(sigma, shift) for sigma in schedule if sigma > 0.0}
        self._set_sigmas(schedule, times, device)
        self.num_inference_steps = len(schedule) - 1

    def set_stage(self, sigmas: Sequence[float], device: str | torch.device | None = None) -> None:
        """Walk exactly this schedule next; `set_timesteps` makes another one again.

        Args:
            sigmas: Strictly falling, in the units of `for_stage`.
            device: Where `timesteps` and `sigmas` are put.

        Raises:
            MrFlowError: A schedule that does not fall, or flow sigmas above 1.
        """
        self._set_sigmas(tuple(float(sigma) for sigma in sigmas), {}, device)
        self.num_inference_steps = len(self._schedule) - 1

    def _set_sigmas(self, sigmas: Sigmas, times: Mapping[float, float], device: str | torch.device | None) -> None:
        """Take `sigmas` as the schedule and `times` as what the network is told (else `_time`); forget any run."""
        self._evaluations = evaluation_sigmas(self._options["solver"], sigmas)
        if self.prediction == "flow" and sigmas[0] > 1.0:
            raise MrFlowError(f"sigmas must be at most 1 for flow models, got {sigmas[0]!r}; 1 is pure noise.")
        self._schedule = sigmas
        told = [times[sigma] if sigma in times else self._time(sigma) for sigma in self._evaluations]
        if self._angles:
            told.append(0.0)  # such pipelines read the end of the last step as well
        levels = [*self._evaluations, sigmas[-1]]
        if self._options["invert_sigmas"]:
            levels = [1.0 - level for level in levels]
        self.timesteps = torch.tensor(told, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor(levels, dtype=torch.float32, device=device)
        self._step_index: int | None = None
        self._begin_index: int | None = None if self._fixed is None else 0
        self._walk: Walk | None = None

    def _time(self, sigma: float) -> float:
        """What the network is told for a sigma: the training step it belongs to, fractions included."""
        if self._edm is not None and self.prediction != "epsilon":
            return self._edm.time(sigma)
        if self._angles:
            return angle_of(sigma)
        if self._options["invert_sigmas"]:
            return (1.0 - sigma) * len(self)
        return time_of(sigma, self._table) if self._table else sigma * len(self)

    def _training_sigmas(self) -> Sigmas:
        """Every sigma of training, for callers that add noise before a schedule is made."""
        if self._edm is not None:
            return self._edm.spaced(len(self))
        if self._table:
            return (*reversed(self._table), 0.0)
        count, shift = len(self), self._options["shift"] if not self._options["use_dynamic_shifting"] else 1.0
        return (*(shift_sigma(index / count, shift) for index in range(count, 0, -1)), 0.0)

    # --- the loop

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The state as the network takes it: unchanged for flow models, else of about unit deviation.

        x / sqrt(sigma_ve² + 1), and for EDM models this divided by `sigma_data`.

        Args:
            sample: The state (B, ...).
            timestep: That of the evaluation; only read where the run has not started.

        Returns:
            In the shape of `sample`.
        """
        if self.prediction == "flow" or self._preserving:
            return sample
        return sample / (math.hypot(self._evaluations[self._index(timestep)], 1.0) * self._deviation)

    def to_loop(self, start: Tensor) -> Tensor:
        """The state at the start of the schedule as the pipeline's loop holds it.

        Args:
            start: In our scale.

        Returns:
            In the shape of `start`.
        """
        scale = self._scale(self._schedule[0])
        return start if scale == 1.0 else start * scale

    def _scale(self, sigma: float) -> float:
        """What the pipeline's state is of ours at a sigma."""
        if self._angles:
            return self._data / math.hypot(sigma, 1.0 - sigma)
        return 1.0 / math.hypot(sigma, 1.0) if self._preserving else 1.0

    @property
    def _data(self) -> float:
        """Standard deviation of clean latents in the state of a "trigflow" pipeline."""
        return float(self._options["sigma_data"] or 1.0)

    @property
    def _deviation(self) -> float:
        """Standard deviation of clean latents, which sigma_ve is counted in."""
        return 1.0 if self._edm is None else self._edm.data

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        **ignored: Any,
    ) -> MrFlowSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the network's output at this evaluation, and return the next state.

        A `sample` that is not what the last step returned (a callback or an inpainting mask changed it) counts: the
        solver goes on from there, with the slopes it knows.

        Args:
            model_output: What the network returned, (B, ...).
            timestep: That of the evaluation; only read where the run has not started.
            sample: The state that was evaluated, as the loop has it, in the same shape.
            return_dict: Return an object rather than a tuple.
            generator: Not used: nothing is random here.
            **ignored: Arguments of other schedulers; not used.

        Returns:
            The next state in the dtype of `model_output`, and the clean estimate in float32.

        Raises:
            MrFlowError: Past the end of the schedule, or shapes that do not fit.
        """
        index = self._index(timestep)
        if model_output.shape != sample.shape:
            raise MrFlowError(
                f"model_output has shape {tuple(model_output.shape)} and sample {tuple(sample.shape)}; they must agree."
            )
        begun, within = divmod(index, evaluations_per_step(self._options["solver"]))
        if self._walk is None and within:
            # Entered between the two evaluations of a Heun step: the step begins at the next one, at the same sigma.
            self._step_index = index + 1
            return _output(sample.to(model_output.dtype), sample.float(), return_dict)
        if self._walk is None:
            self._walk = Walk(self._options["solver"], self._first_state(index, sample), self._schedule[begun:])
        else:
            self._walk.follow(sample)
        x, sigma = self._walk.state, self._evaluations[index]
        denoised = self._denoised(model_output, x, sigma)
        if self._on_evaluation is not None:
            self._on_evaluation({"i": begun, "sigma": sigma, "x": x, "denoised": denoised})
        self._walk.push(denoised)
        self._step_index = index + 1
        after = (*self._evaluations, self._schedule[-1])[index + 1]
        clean = denoised * self._scale(0.0) if self._angles else denoised
        return _output(self._walk.hand_out(model_output.dtype, self._scale(after)), clean, return_dict)

    def _denoised(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        """The clean estimate of the state `x`, in our scale, that the pipeline's output stands for."""
        if self._angles:
            angle = angle_of(sigma)
            state = x * (self._scale(sigma) / self._data)
            return math.cos(angle) * state - math.sin(angle) * output.to(x) / self._data
        if self._options["invert_sigmas"]:
            return to_denoised(-output, x, sigma, self.prediction)
        return to_denoised(output if self._edm is None else output.float() * self._edm.data, x, sigma, self.prediction)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The evaluation at a timestep: the later one where Heun evaluates a sigma twice, as a step begins there.

        Args:
            timestep: One of `timesteps`, exactly.
            schedule_timesteps: Searched in place of `timesteps`.

        Returns:
            Its number, from 0.

        Raises:
            MrFlowError: A timestep that the schedule does not have.
        """
        schedule = (self.timesteps if schedule_timesteps is None else schedule_timesteps).float()
        wanted = torch.as_tensor(timestep, dtype=torch.float32, device=schedule.device)
        found = (schedule == wanted).nonzero()
        if not len(found):
            raise MrFlowError(f"timestep {float(wanted)!r} is not in the schedule; use one of scheduler.timesteps.")
        return int(found[min(len(found) - 1, 1)].item())

    def _index(self, timestep: float | Tensor | None) -> int:
        """The evaluation that is next."""
        index = self._step_index
        if index is None:
            index = self._begin_index
        if index is None:
            index = 0 if timestep is None else self.index_for_timestep(timestep)
        if index >= len(self._evaluations):
            raise MrFlowError(
                f"step came after the last of {len(self._evaluations)} evaluations; call set_timesteps to start anew."
            )
        return index

    def _first_state(self, index: int, sample: Tensor) -> Tensor:
        """The state that the solver starts from: the one given to `for_stage`, else the pipeline's."""
        if self._start is None or index > 0:
            scale = self._scale(self._evaluations[index])
            return sample if scale == 1.0 else sample.float() / scale
        if self._start.shape != sample.shape:
            raise MrFlowError(
                f"start has shape {tuple(self._start.shape)} and the pipeline's latents {tuple(sample.shape)}; "
                "pack start as the pipeline packs its latents."
            )
        return self._start.to(sample.device)

    def follow(self, sample: Tensor) -> None:
        """Go on from another state, where a caller has changed what the last step returned; `step` does so by itself.

        Args:
            sample: The state as the loop has it now, in the shape of what `step` returned.

        Raises:
            MrFlowError: It has another shape.
        """
        if self._walk is not None:
            self._walk.follow(sample)

    # --- noise

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None) -> Tensor:
        """Add noise to clean latents at the sigma of a timestep.

        Flow: (1 - sigma) · sample + sigma · noise; else sample + sigma_ve · noise, and for EDM models the noise times
        `sigma_data`. In a run, or after
        `set_begin_index`, the sigma of the next evaluation is used instead. In a stage of `for_stage` the noise is that
        of its start: a pipeline that keeps a part of a picture has only that start to take for noise.

        Args:
            sample: Clean latents (B, ...).
            timestep: One, or one per image; of `timesteps`.
            noise: Standard normal, in the shape of `sample`.

        Returns:
            In the shape and dtype of `sample`.

        Raises:
            MrFlowError: No noise, or a timestep that the schedule does not have.
        """
        if self._start is not None and self._start.shape == sample.shape:
            noise = self._noise_of(sample)
        if noise is None:
            raise MrFlowError("noise is None; give noise in the shape of sample, as nothing is drawn here.")
        if self._step_index is not None or self._begin_index is not None:
            # A pipeline that set where it begins, or is in a run, means that sigma (image-to-image, inpainting).
            indices = [(self._begin_index if self._step_index is None else self._step_index) or 0]
        else:
            indices = [self.index_for_timestep(each) for each in torch.as_tensor(timestep).reshape(-1)]
        schedule = (*self._evaluations, self._schedule[-1])
        sigma = torch.tensor([schedule[index] for index in indices], device=sample.device)
        sigma = sigma.reshape(-1, *([1] * (sample.ndim - 1)))
        keep = 1.0 - sigma if self.prediction == "flow" else 1.0
        return (keep * sample.float() + sigma * self._deviation * noise.to(sample.device).float()).to(sample.dtype)

    def _noise_of(self, clean: Tensor) -> Tensor:
        """The noise that makes the stage's start of these clean latents; the start itself where it is nothing else."""
        start, sigma = cast("Tensor", self._start).to(clean.device).float(), self._schedule[0]
        if self.prediction == "flow":
            return (start - (1.0 - sigma) * clean.float()) / sigma
        largest = max(self._table) if self._edm is None else self._edm.largest
        kept = clean.float() if sigma < largest * (1.0 - 1e-6) else 0.0
        return (start - kept) / (sigma * self._deviation)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """`scale_noise` under the name and with the argument order that variance-exploding pipelines use.

        Args:
            original_samples: Clean latents (B, ...).
            noise: Standard normal, in the same shape.
            timesteps: One, or one per image; of `timesteps`.

        Returns:
            In the shape and dtype of `original_samples`.
        """
        return self.scale_noise(original_samples, timesteps, noise)


def _output(state: Tensor, denoised: Tensor, return_dict: bool) -> MrFlowSchedulerOutput | tuple[Tensor, Tensor]:
    return MrFlowSchedulerOutput(state, denoised) if return_dict else (state, denoised)


# -------------------------------------------------------------------------------------------------------------- options


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse an option that is unknown or not supported."""
    for name, allowed in _ALLOWED.items():
        if options[name] not in allowed:
            words = ", ".join(repr(value) for value in allowed)
            raise MrFlowError(
                f"{name} is {options[name]!r}, which MrFlowScheduler does not support; use one of {words}."
            )
    if sum(bool(options[name]) for name in CONVERSIONS) > 1:
        raise MrFlowError(f"only one of {', '.join(CONVERSIONS)} can be in force; turn the others off.")
    if options["prediction_type"] == "edm" and options["sigma_data"] is None:
        raise MrFlowError("prediction_type is 'edm', which needs sigma_data, sigma_min and sigma_max; give all three.")
    if options["stage"] == "refine":
        refine_sigmas(options["sigma"], 1, options["refine_curve"])


_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "stochastic_sampling": (False,),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "time_shift_type": ("exponential", "linear"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": (None, *_PREDICTIONS),
    "stage": ("sample", "refine"),
    "sigma_schedule": ("karras", "exponential"),
}
