"""The papers' tables: their numbers are the scripts' own, and the page names every file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from captum_attn import GenericAttention
from captum_attn.toy.digit_vqa import load_digit_vqa
from tests.benchmarks import paper_tables, vqa_perturbation

PAGE = paper_tables.FOLDER.parent / "papers.md"


def cells(text: str) -> dict[str, list[float]]:
    """Row -> its numbers; methods that share a line each have it."""
    lines = re.findall(r"^\| (.+?) +\| (.*±.*) \|$", text, re.MULTILINE)
    return {
        name: [float(number) for number in re.findall(r"([\d.-]+) ±", numbers)]
        for names, numbers in lines
        for name in names.split(" = ")
    }


def test_a_command_writes_the_file_of_its_table(tmp_path: Path) -> None:
    arguments = ["gae-ablation-lxmert", "--examples", "6", "--rows", "GAE", "random"]
    assert paper_tables.main([*arguments, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "gae-ablation-lxmert.md").read_text()
    assert "paper_tables gae-ablation-lxmert --examples 6 --rows GAE random\n" in text
    found = cells(text)
    assert list(found) == ["GAE", "random"]
    model, batch = load_digit_vqa(), vqa_perturbation.collated(vqa_perturbation.asked_about(6, 0))
    maps = GenericAttention(model).attribute(batch.inputs, target=batch.target)
    words = vqa_perturbation.of_words(model, batch.inputs, maps, batch.target, order="most")
    assert found["GAE"][0] == pytest.approx(float(words.double().mean()), abs=1e-4)


def test_masks_of_a_detector_are_held_to_boxes_and_ink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_tables, "RESAMPLES", 2)
    found = cells(paper_tables.of_detector(["GAE", "full LRP", "random"], 2, 0, "otsu"))
    assert found["random"][0] < 1 < found["GAE"][2] < found["GAE"][0] < found["full LRP"][0]


def test_measures_of_a_vit() -> None:
    found = cells(paper_tables.of_vit(["rollout", "random"], 4, 0, ["segmentation"]))
    assert all(ours > chance for ours, chance in zip(*found.values(), strict=True))


@pytest.mark.parametrize("name", paper_tables.TABLES)
def test_what_is_committed_has_every_row(name: str) -> None:
    table, text = paper_tables.TABLES[name], (paper_tables.FOLDER / f"{name}.md").read_text()
    assert set(cells(text)) == set(table.rows)
    assert text.startswith(f"# {table.title}\n")
    assert f"paper_tables {name}\n" in text and f"{table.examples} " in text
    assert f"(tables/{name}.md)" in PAGE.read_text(encoding="utf-8")
