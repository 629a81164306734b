"""The benchmark of new lengths runs, and says what it measured."""

import json

import numpy as np
import pytest

from tests.benchmarks import lengths


def test_the_mean_of_the_ratios_and_its_interval():
    floors = np.linspace(0.5, 2.0, 20)
    assert tuple(lengths.mean_ratio(1.5 * floors, floors)) == pytest.approx((1.5, 1.5, 1.5))
    ratio = lengths.mean_ratio(floors * np.linspace(1.0, 1.4, 20), floors)
    assert ratio.value == pytest.approx(1.2) and ratio.low < 1.2 < ratio.high


def test_every_length_is_new():
    for case in lengths.CASES.values():
        if case.kind == "lengths":
            chosen = lengths.lengths_of(case, tiny=False)
            assert len(set(chosen)) == 20
            assert (chosen[0], chosen[-1]) == case.sizes
            assert (chosen[0] + chosen[1]) // 2 not in chosen  # which the object sees first


@pytest.mark.slow
def test_the_script_writes_its_table_and_numbers(tmp_path, capsys):
    path = tmp_path / "lengths.json"
    names = ["bert-gae", "first-bert", "rollout-vit-s", "generation"]
    arguments = ["--tiny", "--rounds", "2", "--no-memory", "--json", str(path), "--only", *names]
    assert lengths.main(arguments) == 0
    results = json.loads(path.read_text())["results"]
    assert [r["name"] for r in results] == names
    assert [len(r["ours_s"]) for r in results] == [20, 2, 2, 2]
    assert results[-1]["passes"] == 4
    printed = capsys.readouterr().out
    for r in results:
        assert r["holds"] == (r["ratio"]["low"] <= r["bar"])
        assert ("holds" if r["holds"] else "MISSED") in printed
