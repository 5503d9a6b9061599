"""Axes of the X/Y/Z plot, the settings page and the schema route, on stand-ins with the hosts' signatures."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest

from mrflow_sched.apps.webui import api, axes, settings
from mrflow_sched.apps.webui.controls import CHOICES, FIELDS, LABELS, Controls

UPSCALERS = ["None", "Lanczos", "4x-Foo", "2x-Bar (MrFlow)"]


class AxisOption:
    """The plot's own class, by its signature."""

    def __init__(
        self,
        label: str,
        type: Any,
        apply: Any,
        format_value: Any = None,
        confirm: Any = None,
        cost: float = 0.0,
        choices: Any = None,
        prepare: Any = None,
    ) -> None:
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices
        self.cost = cost


class AxisOptionTxt2Img(AxisOption):
    is_img2img = False


def plot(path: str = "/webui/scripts/xyz_grid.py") -> Any:
    module = SimpleNamespace(
        AxisOption=AxisOption,
        AxisOptionTxt2Img=AxisOptionTxt2Img,
        axis_options=[AxisOption("Steps", int, None)],
    )
    return SimpleNamespace(path=path, module=module)


def added(data: Any) -> dict[str, AxisOption]:
    return {option.label.removeprefix(axes.PREFIX): option for option in data.module.axis_options[1:]}


@pytest.fixture
def options() -> dict[str, AxisOption]:
    data = plot()
    axes.add_axes([SimpleNamespace(path="/webui/scripts/loopback.py", module=None), data], lambda: UPSCALERS)
    return added(data)


def test_axes_are_added_once_whatever_reloads() -> None:
    data = plot()
    assert axes.add_axes([data], lambda: UPSCALERS) == len(axes.AXES)
    assert axes.add_axes([data], lambda: UPSCALERS) == 0
    labels = [option.label for option in data.module.axis_options]
    assert len(labels) == len(set(labels)) == len(axes.AXES) + 1
    assert all(label.startswith("[MrFlow] ") and label.count("MrFlow") == 1 for label in labels[1:])
    assert {"[MrFlow] Preset", "[MrFlow] SR model", "[MrFlow] Enabled"} < set(labels)


def test_a_host_without_the_plot_stays_as_it_is() -> None:
    data = plot("/webui/extensions/other/scripts/xyz.py")
    assert axes.add_axes([data], lambda: UPSCALERS) == 0
    assert len(data.module.axis_options) == 1


def test_axes_belong_to_txt2img(options: dict[str, AxisOption]) -> None:
    assert all(isinstance(option, AxisOptionTxt2Img) for option in options.values())


def test_every_axis_is_a_control_that_takes_its_values(options: dict[str, AxisOption]) -> None:
    values: dict[str, Any] = {
        "sigma": 0.2,
        "low_steps": 8,
        "refine_steps": 2,
        "factor": 1.5,
        "preset": "20+1",
        "upscaler": "2x-Bar (MrFlow)",
        "solver": "multistep",
        "enabled": "True",
        "keep_composition": "True",
    }
    assert {name for name, _ in axes.AXES} == set(values) <= set(FIELDS)
    job = SimpleNamespace()
    for (name, kind), option in zip(axes.AXES, options.values(), strict=True):
        assert isinstance(values[name], kind)
        option.confirm(job, [values[name]])
        option.apply(job, values[name], [values[name]])
    controls = Controls.from_args([dict(axes.overrides(job))])
    assert controls == Controls(**{**values, "enabled": True, "keep_composition": True})


def test_cells_do_not_share_values(options: dict[str, AxisOption]) -> None:
    job = SimpleNamespace()
    first, second = copy.copy(job), copy.copy(job)
    options["Refine sigma"].apply(first, 0.1, [0.1, 0.2])
    nested = copy.copy(first)
    options["Low steps"].apply(nested, 8, [8])
    options["Refine sigma"].apply(second, 0.2, [0.1, 0.2])
    assert axes.overrides(first) == {"sigma": 0.1}
    assert axes.overrides(nested) == {"sigma": 0.1, "low_steps": 8}
    assert axes.overrides(second) == {"sigma": 0.2}
    assert axes.overrides(job) == {}
    assert not vars(job)


@pytest.mark.parametrize(
    ("label", "value", "named"),
    [
        ("Refine sigma", 0.95, "sigma must be a number from 0.02 to 0.9"),
        ("Low steps", 151, "low_steps must be a whole number from 0 to 150"),
        (LABELS["factor"], 1.0, "factor must be"),
        ("Preset", "12", "preset must be"),
        ("SR model", "9x-Nothing", "upscaler must be 'automatic' or one of None, Lanczos"),
        ("Stage 1 solver", "euler", "solver must be"),
        ("Enabled", "maybe", "enabled must be true or false"),
        ("Keep composition", "maybe", "keep_composition must be true or false"),
    ],
)
def test_bad_values_are_refused_before_the_first_cell(
    options: dict[str, AxisOption], label: str, value: Any, named: str
) -> None:
    with pytest.raises(ValueError, match=named.replace("'", ".")):
        options[label].confirm(SimpleNamespace(), [value])


def test_choices_are_read_when_the_menu_opens() -> None:
    names = list(UPSCALERS)
    data = plot()
    axes.add_axes([data], lambda: names)
    names.append("new")
    assert added(data)["SR model"].choices() == ["automatic", *UPSCALERS, "new"]
    assert added(data)["Preset"].choices() == list(CHOICES["preset"])
    assert added(data)["Refine sigma"].choices is None


# ------------------------------------------------------------------------------------------------------------ settings


class OptionInfo:
    """A host's setting, by its signature."""

    def __init__(
        self,
        default: Any = None,
        label: str = "",
        component: Any = None,
        component_args: Any = None,
        section: Any = None,
    ) -> None:
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.section, self.notes = section, list[str]()

    def info(self, text: str) -> OptionInfo:
        self.notes.append(text)
        return self

    def needs_reload_ui(self) -> OptionInfo:
        self.notes.append("reload")
        return self


class Options(dict[str, OptionInfo]):
    def add_option(self, key: str, info: OptionInfo) -> None:
        self[key] = info


def test_settings_stand_in_one_section_and_start_as_the_controls_do() -> None:
    opts = Options()
    gr = SimpleNamespace(Checkbox="checkbox", Dropdown="dropdown", Radio="radio")
    settings.add_settings(opts, OptionInfo, gr)
    assert set(opts) == set(settings.LABELS)
    assert {tuple(option.section) for option in opts.values()} == {("mrflow", "MrFlow")}
    saved = SimpleNamespace(**{key: option.default for key, option in opts.items()})
    assert settings.defaults(saved) == Controls()
    assert settings.when_refused(saved) == "go on"
    assert "reload" not in opts["mrflow_when_refused"].notes  # read for each job


def test_settings_reach_the_page_and_the_job() -> None:
    saved = SimpleNamespace(
        mrflow_enabled=True, mrflow_preset="text", mrflow_save_stages=True, mrflow_when_refused="stop the job"
    )
    assert settings.defaults(saved) == Controls(enabled=True, preset="text", save_stages=True)
    assert settings.when_refused(saved) == "stop"


@pytest.mark.parametrize("saved", [SimpleNamespace(), SimpleNamespace(mrflow_enabled="yes", mrflow_preset="gone")])
def test_missing_or_stale_settings_count_as_the_defaults(saved: Any) -> None:
    assert settings.defaults(saved) == Controls()
    assert settings.when_refused(saved) == "go on"


# -------------------------------------------------------------------------------------------------------------- schema


class App:
    """FastAPI's two sides that the route needs."""

    def __init__(self) -> None:
        self.routes: list[Any] = []

    def add_api_route(self, path: str, endpoint: Any, *, methods: list[str], name: str) -> None:
        self.routes.append(SimpleNamespace(path=path, endpoint=endpoint, methods=methods, name=name))


def test_the_route_is_added_once() -> None:
    app = App()
    api.register(None, app)
    api.register(None, app)
    route, other = app.routes
    assert (route.path, route.methods) == ("/mrflow/v1/schema", ["GET"])
    assert (other.path, other.methods) == ("/mrflow/v1/plan", ["POST"])
    assert route.endpoint() == api.schema()


def test_the_schema_is_json_in_the_order_of_the_arguments() -> None:
    schema = json.loads(json.dumps(api.schema()))
    assert [argument["name"] for argument in schema["arguments"]] == list(FIELDS)
    assert Controls.from_args([argument["default"] for argument in schema["arguments"]]) == Controls()


def test_the_schema_s_example_and_choices_are_accepted() -> None:
    schema = api.schema()
    assert Controls.from_args(schema["example"]["alwayson_scripts"]["mrflow"]["args"]).enabled
    for argument in schema["arguments"]:
        for choice in argument.get("choices", []):
            Controls(**{argument["name"]: choice})
        for end in ("minimum", "maximum", "minimum_above_zero"):
            if end in argument:
                Controls(**{argument["name"]: argument[end]})
