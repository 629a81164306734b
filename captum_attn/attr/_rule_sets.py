"""Tables of rules by name, and what a user may change about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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
    changed = {**table, **given}
    return {kind: rule for kind, rule in changed.items() if rule is not None}
