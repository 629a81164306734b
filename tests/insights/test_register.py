"""What `register` adds to Captum Insights, and what it says where there is none."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

import captum_attn
from captum_attn import insights
from captum_attn.attr import AttentionAttribution
from captum_attn.errors import AttnError, MissingExtraError, OptionError
from captum_attn.insights.methods import METHODS, options_of
from captum_attn.insights.registration import CONFIG
from tests.insights.browser import has_captum_insights

NAMES = {method.get_name() for method in METHODS}


class Field(NamedTuple):
    value: Any
    limit: Any = None
    type: str = ""


class ConfigParameters(NamedTuple):
    params: dict
    help_info: str | None = None
    post_process: dict | None = None


@pytest.fixture
def config(monkeypatch) -> ModuleType:
    """Captum's own registry, restored; a stand-in of the same shape where captum has none."""
    if has_captum_insights():
        import captum.insights.attr_vis.config as found
    else:
        found = ModuleType(CONFIG)
        found.ATTRIBUTION_NAMES_TO_METHODS, found.ATTRIBUTION_METHOD_CONFIG = {}, {}
        found.NumberConfig = found.StrEnumConfig = found.StrConfig = Field
        found.ConfigParameters = ConfigParameters
        for name in ("captum.insights", "captum.insights.attr_vis"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, CONFIG, found)
    for name in ("ATTRIBUTION_NAMES_TO_METHODS", "ATTRIBUTION_METHOD_CONFIG"):
        registry = getattr(found, name)
        for key in [*registry, *NAMES]:
            monkeypatch.setitem(registry, key, registry.get(key))
        for key in NAMES:
            del registry[key]
    return found


def own_options(method):
    """Those that a form has a field for: not the tables and pairs, and no progress bars."""
    shared = {"block_size", "show_progress", "layers_integrated", "leave_out"}
    return {
        f.name: f.default
        for f in method.Options.listed()
        if f.name not in shared and f.default is not None
    }


def shared_options(method):
    return {"start_layer", "interpolation"} if method.confinable else {"interpolation"}


def test_all_methods_and_their_options_are_registered_in_place(config):
    names, options = config.ATTRIBUTION_NAMES_TO_METHODS, config.ATTRIBUTION_METHOD_CONFIG
    before = set(names)
    insights.register()
    assert config.ATTRIBUTION_NAMES_TO_METHODS is names  # the page has bound these very dicts
    assert config.ATTRIBUTION_METHOD_CONFIG is options
    assert set(names) - before == NAMES
    assert names["VTranM"] is captum_attn.VTranM
    for method in METHODS:
        own = {*own_options(method), *shared_options(method)}
        assert set(options[method.get_name()].params) == own
    fields = options["Heterogenous Attention"].params
    assert (fields["correction"].value, list(fields["correction"].limit)) == (
        "positive", ["positive", "full", "absolute"],
    )  # fmt: skip
    assert (fields["noise_link"].value, fields["noise_link"].limit) == ("False", ["True", "False"])
    number = options["Raw Attention"].params["layer"]
    assert (number.value, tuple(number.limit)) == (-1, (None, None))
    assert tuple(options["VTranM"].params["start_layer"].limit) == (0, 10_000)


def test_registering_again_changes_nothing(config):
    insights.register()
    names = dict(config.ATTRIBUTION_NAMES_TO_METHODS)
    options = {k: v.params for k, v in config.ATTRIBUTION_METHOD_CONFIG.items() if v is not None}
    insights.register()
    assert dict(config.ATTRIBUTION_NAMES_TO_METHODS) == names
    assert {
        k: v.params for k, v in config.ATTRIBUTION_METHOD_CONFIG.items() if v is not None
    } == options


@pytest.mark.parametrize("method", METHODS)
def test_the_fields_are_read_back_into_what_the_method_takes(config, method):
    insights.register()
    registered = config.ATTRIBUTION_METHOD_CONFIG[method.get_name()]
    # As the page sends them; Captum's `calculate_attribution` reads them once per example.
    sent = {name: field.value for name, field in registered.params.items()}
    for _ in range(2):
        sent = {name: registered.post_process[name](value) for name, value in sent.items()}
    shared = {name: sent.pop(name) for name in shared_options(method)}
    expected = {"start_layer": 0, "interpolation": "bilinear"}
    assert shared == {name: expected[name] for name in shared}
    assert sent == own_options(method)
    assert [type(v) for v in sent.values()] == [type(v) for v in own_options(method).values()]
    method.settled(sent)  # nothing is refused


def test_a_cleared_number_is_its_default_and_nonsense_is_refused():
    (layer, *_) = options_of(captum_attn.RawAttention)
    assert (layer.read(None), layer.read(2), layer.read("3")) == (-1, 2, 3)
    with pytest.raises(OptionError, match="layer: expected a number, got 'last'"):
        layer.read("last")
    (normalize, *_) = options_of(captum_attn.GenericAttention)
    assert (normalize.read("False"), normalize.read(True)) == (False, True)
    with pytest.raises(OptionError, match="normalize: expected True or False, got 'maybe'"):
        normalize.read("maybe")


def test_a_method_of_ones_own(config):
    class Own(AttentionAttribution):
        @dataclass(frozen=True)
        class Options(AttentionAttribution.Options):
            power: float = 1.5

        @classmethod
        def get_name(cls):
            return "Own"

    insights.register(Own)
    try:
        assert config.ATTRIBUTION_NAMES_TO_METHODS["Own"] is Own
        registered = config.ATTRIBUTION_METHOD_CONFIG["Own"]
        assert registered.params["power"].value == "1.5"
        assert registered.post_process["power"]("2.5") == 2.5
    finally:
        del config.ATTRIBUTION_NAMES_TO_METHODS["Own"], config.ATTRIBUTION_METHOD_CONFIG["Own"]


def test_what_is_no_method_is_refused(config):
    with pytest.raises(OptionError, match="classes of attention methods"):
        insights.register("VTranM")  # type: ignore[arg-type]


@pytest.mark.skipif(has_captum_insights(), reason="this captum has captum.insights")
def test_without_captum_insights_the_error_names_what_has_taken_its_place():
    with pytest.raises(AttnError, match="captum_attn.insights.AttributionVisualizer"):
        insights.register()


def test_a_package_that_captum_insights_needs_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    module = sys.modules["captum_attn.insights.registration"]
    monkeypatch.setattr(module, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(MissingExtraError, match=r"matplotlib.*captum_attn\[insights\]"):
        insights.register()
