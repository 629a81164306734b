"""The page of the measures: its tables are those of the scripts, and no difference is large."""

from __future__ import annotations

import re

import pytest

from captum_attn import metrics
from tests.benchmarks import false_positives, held_against, pages


@pytest.mark.parametrize("row", held_against.COMPARISONS, ids=lambda row: row.measure)
def test_a_measure_is_what_it_was_held_against(row: held_against.Comparison) -> None:
    pytest.importorskip("quantus")
    pytest.importorskip("cv2")
    coarse = "1e-7" in row.against or "float32" in row.against
    assert row.difference < (1e-6 if coarse else 1e-9)


def test_the_page_lists_every_row() -> None:
    listed = pages.part("held_against")
    for row in held_against.COMPARISONS:
        assert f"| `{row.measure}` | {row.paper} | {row.against} |" in listed
    assert all(row.measure.split(",")[0].split(" ")[0] in metrics.__all__
               for row in held_against.COMPARISONS)  # fmt: skip


def test_the_page_shows_no_rate_of_6_per_cent() -> None:
    rates = re.findall(r"(?<=\| )[0-9]+\.[0-9](?= \|)", pages.part("false_positives"))
    assert len(rates) == 15 * len(false_positives.GROUPS) + 2 * 3
    assert max(map(float, rates)) < 6.0
