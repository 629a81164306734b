"""Why a token may be left out of the relevance: the words of the option `leave_out`."""

from __future__ import annotations

from typing import Any

from captum_attn._checks import shown
from captum_attn.errors import OptionError

SINK, SELF = "sink", "self"
REASONS = (SINK, SELF)


def check_leave_out(given: Any) -> None:
    """Refuses what is no tuple of reasons."""
    if not isinstance(given, tuple) or any(one not in REASONS for one in given):
        raise OptionError(
            f"leave_out: expected some of {REASONS} in a tuple, such as ('sink', 'self'), got "
            f"{shown(given)}"
        )
