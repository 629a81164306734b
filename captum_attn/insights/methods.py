"""The methods that a dashboard offers, and what can be set about each of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from captum.attr import Attribution, IntegratedGradients, Saliency

from captum_attn._checks import number, one_of, shown, text
from captum_attn.attr import (
    CPLRP,
    AttCAT,
    AttentionAttribution,
    AttentionFlow,
    AttentionGradCam,
    AttentionRollout,
    AttnLRP,
    BeyondIntuition,
    ConservativeLRP,
    DeepIntegratedExplanations,
    GenericAttention,
    GradEclip,
    GradSam,
    HeterogenousAttention,
    Odam,
    PartialLRP,
    RawAttention,
    TransformerAttribution,
    TransformerInputSampling,
    TransformerLRP,
    TransitionAttention,
    VitCX,
    VTranM,
)
from captum_attn.errors import OptionError
from captum_attn.observe.streams.to_inputs import INTERPOLATIONS

__all__ = [
    "CAPTUM_METHODS",
    "MAX_STEPS",
    "METHODS",
    "OF_DETECTIONS",
    "OF_WORDS",
    "Option",
    "help_of",
    "options_of",
    "values_of",
]

Method = type[Attribution]
MAX_STEPS = 200  # of Integrated Gradients: passes of the model for one question
LARGEST = 10**6  # of any other number

METHODS: tuple[type[AttentionAttribution], ...] = (
    GenericAttention,
    VTranM,
    HeterogenousAttention,
    AttnLRP,
    CPLRP,
    ConservativeLRP,
    TransformerAttribution,
    PartialLRP,
    TransformerLRP,
    AttentionRollout,
    RawAttention,
    AttentionGradCam,
    GradSam,
    AttCAT,
    TransitionAttention,
    BeyondIntuition,
    GradEclip,
    DeepIntegratedExplanations,
    TransformerInputSampling,
    AttentionFlow,
    VitCX,
)
# Without those that explain pixels, and `Odam`, which explains detections.
OF_WORDS = tuple(method for method in METHODS if method is not VitCX)
# What explains one of a detector's queries: ODAM, and what reads attention or goes back by
# gradients. Grad-ECLIP reads one token's row, and masks of tokens move the detections themselves.
_NOT_OF_DETECTIONS = (GradEclip, TransformerInputSampling, VitCX)
OF_DETECTIONS = (*(m for m in METHODS if m not in _NOT_OF_DETECTIONS), Odam)
# Beside ours, where every input is of floats; on token ids they fail.
CAPTUM_METHODS: tuple[Method, ...] = (IntegratedGradients, Saliency)


class Option(NamedTuple):
    """Something that can be set about a method.

    Attributes:
        name (str): the keyword argument of `attribute`.
        default (bool, int, float or str): what it is where nothing is set.
        choices (tuple of str): the values of a str.
        lowest, highest (int, optional): the least and the largest value of a number.
    """

    name: str
    default: Any
    choices: tuple[str, ...] = ()
    lowest: int | None = None
    highest: int | None = None

    def read(self, value: Any) -> Any:
        """The value that a form's field stands for; a field that was cleared is the default.

        Reading twice changes nothing, because Captum Insights reads once per example.
        """
        if value is None or (isinstance(value, str) and not value):
            return self.default
        if isinstance(self.default, bool):
            known = {"true": True, "false": False}.get(str(value).lower())
            if known is None:
                raise OptionError(f"{self.name}: expected True or False, got {value!r}")
            return known
        if isinstance(self.default, (int, float)):
            return self._number(value)
        if self.choices:
            return one_of(self.name, value, self.choices)
        return text(self.name, value)

    def _number(self, value: Any) -> int | float:
        try:
            found = type(self.default)(value)
        except (TypeError, ValueError, OverflowError) as problem:
            raise OptionError(f"{self.name}: expected a number, got {shown(value)}") from problem
        least = -LARGEST if self.lowest is None else self.lowest
        most = LARGEST if self.highest is None else self.highest
        number(self.name, found, least, most)
        return found


_EVERYWHERE = (
    Option("start_layer", 0, lowest=0, highest=10_000),
    Option("interpolation", "bilinear", tuple(INTERPOLATIONS)),
)
# What a visitor could make a server work on for hours.
_CAPTUM_HELP = {"n_steps": "Inputs on the way from the baseline at which the gradient is taken."}
_BOUNDS: dict[str, dict[str, int]] = {
    "n_steps": {"lowest": 1, "highest": MAX_STEPS},
    "n_masks": {"lowest": 1, "highest": 1024},
    "perturbations_per_eval": {"lowest": 1, "highest": 64},
    "keep": {"lowest": 0, "highest": 1},
    "threshold": {"lowest": 0, "highest": 2},
    "noise": {"lowest": 0, "highest": 100},
    "seed": {"lowest": 0, "highest": LARGEST},
}
_NOT_IN_FORMS = ("show_progress",)
_OF_CAPTUM = {IntegratedGradients: (Option("n_steps", 25, lowest=2, highest=MAX_STEPS),)}


def options_of(method: Method) -> tuple[Option, ...]:
    """What can be set about a method in a form: its flags, choices, numbers and words.

    Args:
        method (type): a method's class.

    Returns:
        tuple of Option: its own, then what all attention methods share.

    Examples::

        >>> [option.name for option in options_of(AttentionRollout)]
        ['head_fusion', 'start_layer', 'interpolation']
    """
    if not issubclass(method, AttentionAttribution):
        return _OF_CAPTUM.get(method, ())
    own = [
        Option(
            field.name,
            field.default,
            method.Options.choices(field.name),
            **_BOUNDS.get(field.name, {}),
        )
        for field in method.Options.listed()
        if isinstance(field.default, (bool, int, float, str)) and field.name not in _NOT_IN_FORMS
    ]
    shared = [o for o in _EVERYWHERE if method.confinable or o.name != "start_layer"]
    return (*own, *shared)


def help_of(method: Method, name: str) -> str:
    """What an option does, in its method's own words: the docstring's.

    Examples::

        >>> help_of(GenericAttention, "aggregate")
        'False: every update replaces R instead of being added.'
    """
    if not issubclass(method, AttentionAttribution):
        return _CAPTUM_HELP.get(name, "")
    documents = [*(base.__doc__ or "" for base in method.__mro__)]
    documents.append(AttentionAttribution.attribute.__doc__ or "")
    for document in documents:
        found = re.search(
            rf"^( +)(?:\w+, )*{name}(?:, \w+)* ?(?:\([^)]*\))?: (.*?)(?=^\1\S|\n\n|\Z)",
            document,
            re.M | re.S,
        )
        if found:
            words = " ".join(found[2].replace("`", "").split())
            return re.sub(r"\s*Default: .*$", "", words)
    return ""


def values_of(method: Method, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a filled form stands for."""
    return {o.name: o.read(fields.get(o.name)) for o in options_of(method)}
