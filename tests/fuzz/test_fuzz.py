"""No mistake ends in an error of Python's or of torch's, none is passed over in silence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captum_attn._checks import shown
from captum_attn.errors import AttnError
from tests.fuzz.kinds import EVERYTHING, KINDS, Broken, mistakes
from tests.fuzz.public import RAW, REFUSED, SILENT, VAGUE, Public
from tests.fuzz.rooms import NAMES, ROOMS

QUICK = tuple(name for name in NAMES if name != "cli")
SEVERAL = settings(
    max_examples=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def faults(room: str) -> list[str]:
    return [
        f"{found.kind}: {public.name}({argument}={name}): {found.text[:200]}"
        for public in ROOMS[room]()
        for argument, name, make in public.mistakes()
        if (found := public.verdict(argument, make)).kind != REFUSED
    ]


SLOW = ("cli", "insights", "visualization", "generation")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "room", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES]
)
def test_every_mistake_is_refused_by_name(room):
    assert faults(room) == []


@pytest.mark.parametrize("room", QUICK)
def test_what_the_tables_call_right_is_right(room):
    for public in ROOMS[room]():
        if public.right() and public.name != "Picture.save":
            public.run()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("room", QUICK)
def test_several_mistakes_at_once(room):
    """Any junk in any arguments together: an `AttnError`, or a result."""
    for public in ROOMS[room]():
        if public.kinds:
            _several(public)


def _several(public: Public) -> None:
    junk = st.dictionaries(
        st.sampled_from(sorted(public.kinds)), st.sampled_from(sorted(EVERYTHING)), min_size=1
    )

    @SEVERAL
    @given(junk)
    def tried(chosen: dict[str, str]) -> None:
        known = {
            a: EVERYTHING[n] for a, n in chosen.items() if n in mistakes(public.kinds[a])
        }  # fmt: skip
        if known:
            with pytest.raises(AttnError):
                public.run(**{a: make() for a, make in known.items()})

    tried()


# ---------------------------------------------------------------------------- the fuzz itself
def test_verdicts_tell_them_apart():
    def call(value: Any) -> Any:
        if value == 0:
            raise ZeroDivisionError
        if value == 1:
            raise AttnError("value: expected 2")
        if value == 2:
            raise AttnError("expected something else")
        return value

    public = Public("call", call, dict, {"value": "count"})
    kinds = [public.verdict("value", lambda v=v: v).kind for v in range(4)]
    assert kinds == [RAW, REFUSED, VAGUE, SILENT]


def test_every_kind_has_mistakes_and_none_is_right_for_itself():
    assert all(len(found) > 5 for found in KINDS.values())
    assert "none" in mistakes("count") and "none" not in mistakes("count?")
    assert not {"none", "zero"} & set(mistakes("count?-zero"))


def test_what_cannot_be_shown_is_named_by_its_class():
    assert shown(Broken()) == "Broken"
    assert shown("\ud800") == "'\\\\ud800'" or shown("\ud800") == "'\\ud800'"
    assert shown("x" * 500) == "str of 500"
    assert "\n" not in shown("a\nb")


@pytest.mark.parametrize("room", QUICK)
def test_every_public_function_is_in_the_tables(room):
    """A new function of a room comes with its row."""
    import importlib

    module = importlib.import_module(f"captum_attn.{room}")
    named = " ".join(public.name for public in ROOMS[room]())
    results = {"Word", "Objective", "Detections", "DetectedQueries", "Generation", "METRICS",
               "Column", "Difference", "Results", "Value", "Metric", "BaseFeature", "FeatureOutput",
               "Batch", "Missed"}  # fmt: skip
    missing = [name for name in module.__all__ if name not in results and name not in named]
    assert missing == []
