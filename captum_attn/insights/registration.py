"""captum_attn's methods in Captum Insights, which captum has up to 0.8.

Captum Insights reads its methods and their options from two dicts in
`captum/insights/attr_vis/config.py`. `register` adds to them; nothing else of captum is touched.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from captum_attn._checks import shown
from captum_attn.attr import AttentionAttribution
from captum_attn.errors import AttnError, MissingExtraError, OptionError
from captum_attn.insights.methods import METHODS, Option, options_of

__all__ = ["register"]

CONFIG = "captum.insights.attr_vis.config"


def register(*methods: type[AttentionAttribution]) -> None:
    r"""Adds attention methods to the method list of Captum Insights, with their options.

    Registering again changes nothing. One-channel images cannot be drawn by Captum's
    `ImageFeature`; `captum_attn.insights.ImageFeature` can take its place there.

    Args:
        *methods (type): classes of methods. Default: all of captum_attn.

    Raises:
        AttnError: where this captum has no Captum Insights (0.9 and later); says what has taken
            its place.
        OptionError: for what is no class of an attention method.

    Examples::

        >>> from captum.insights import AttributionVisualizer  # captum 0.8
        >>> captum_attn.insights.register()
        >>> AttributionVisualizer([model], classes, features, dataset, score_func).serve()
    """
    for method in methods:
        if not (isinstance(method, type) and issubclass(method, AttentionAttribution)):
            raise OptionError(
                "methods: expected classes of attention methods, such as GenericAttention; got "
                f"{shown(method)}"
            )
    config = _config()
    for method in methods or METHODS:
        options = options_of(method)
        config.ATTRIBUTION_NAMES_TO_METHODS[method.get_name()] = method
        config.ATTRIBUTION_METHOD_CONFIG[method.get_name()] = config.ConfigParameters(
            params={option.name: _field(config, option) for option in options},
            post_process={option.name: option.read for option in options},
        )


def _config() -> ModuleType:
    try:
        return importlib.import_module(CONFIG)
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("captum"):
            raise MissingExtraError(
                f"Captum Insights needs {missing.name}, which is not installed: "
                'pip install "captum_attn[insights]"'
            ) from missing
        raise AttnError(
            "this captum has no captum.insights (dropped in 0.9): use "
            "captum_attn.insights.AttributionVisualizer, which takes the same arguments, or "
            'pip install "captum<0.9" "numpy<2"'
        ) from missing


def _field(config: ModuleType, option: Option) -> tuple:
    """The field of the page: a list to choose from, a whole number, or a line of text."""
    if isinstance(option.default, bool):
        return config.StrEnumConfig(value=str(option.default), limit=["True", "False"])
    if option.choices:
        return config.StrEnumConfig(value=option.default, limit=list(option.choices))
    if isinstance(option.default, int):
        return config.NumberConfig(value=option.default, limit=(option.lowest, option.highest))
    return config.StrConfig(value=str(option.default))
