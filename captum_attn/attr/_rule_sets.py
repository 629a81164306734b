"""Tables of rules by name, and what a user may change about them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from captum_attn.attr import _gradient_rules, _relevance_rules
from captum_attn.attr._gradient_rules import attn_lrp, conservative, cp_lrp
from captum_attn.attr._relevance_rules import transformer_lrp
from captum_attn.errors import OptionError
from captum_attn.observe.operators.bridge import Rules, Shares
from captum_attn.observe.operators.kinds import KINDS

# What a table's formulas hand on: a rewritten gradient, or relevance itself.
Form = Literal["gradient", "relevance"]

# The published tables: kind of operation (`KINDS` says what each holds) -> rule.
RULE_SETS: dict[str, Rules] = {
    "attn_lrp": attn_lrp(),
    "cp_lrp": cp_lrp(),
    "conservative": conservative(),
    "gradient": {},
    "transformer_lrp": transformer_lrp(),
}
FORMS: dict[str, Form] = dict.fromkeys(RULE_SETS, "gradient")
FORMS["transformer_lrp"] = "relevance"
# Rules hand on the form of their module's tables; those of users are taken at their word.
_MODULES: dict[str, Form] = {
    _gradient_rules.__name__: "gradient",
    _relevance_rules.__name__: "relevance",
}


def overlaid(table: Rules, given: Mapping[str, Any] | str | None, form: Form) -> Rules:
    """A method's table with what the user has changed: a whole table by name, or some kinds.

    Args:
        table (mapping): the method's own.
        given (mapping or str, optional): kind -> rule, None to leave a kind its ordinary gradient;
            or the name of a published table.
        form (str): what the method's formulas hand on.
    """
    if given is None:
        return table
    if isinstance(given, str):
        known = [name for name in RULE_SETS if FORMS[name] == form]
        if given not in known:
            raise OptionError(f"rules: expected a mapping or one of {known}, got {given!r}")
        return RULE_SETS[given]
    for kind, rule in given.items():
        if kind not in KINDS:
            raise OptionError(f"rules: unknown kind {kind!r}; there are: {', '.join(KINDS)}")
        if not (rule is None or isinstance(rule, Shares) or callable(rule)):
            raise OptionError(
                f"rules[{kind!r}]: expected Shares, a callable (operation, what arrives) -> what "
                f"each operand gets, or None; got {rule!r}"
            )
        if (other := _form_of(rule, form)) != form:
            raise OptionError(
                f"rules[{kind!r}]: {_bare(rule).__name__} hands on {_HANDED_ON[other]}, and this "
                f"method's rules hand on {_HANDED_ON[form]}; take a rule of the same form"
            )
    changed = {**table, **given}
    return {kind: rule for kind, rule in changed.items() if rule is not None}


_HANDED_ON: dict[Form, str] = {"gradient": "a gradient", "relevance": "relevance"}


def _bare(rule: Any) -> Any:
    return rule.func if isinstance(rule, partial) else rule


def _form_of(rule: Any, default: Form) -> Form:
    """What a rule of this package hands on; of any other, what the method expects."""
    return _MODULES.get(getattr(_bare(rule), "__module__", ""), default)
