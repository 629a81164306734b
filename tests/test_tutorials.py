"""The tutorials as they are read: with their outputs, small, and without a trace of a machine.

That they run is nbmake's part (`addopts` in setup.cfg).
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 700_000


def cells(path: Path, kind: str) -> list[dict]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_reading_order_names_every_notebook():
    listed = re.findall(r"\]\((\d_\w+\.ipynb)\)", (FOLDER / "README.md").read_text("utf-8"))
    assert listed == [path.name for path in NOTEBOOKS] and len(listed) == 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_has_run_from_top_to_bottom(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert path.stat().st_size < MAX_BYTES
    printed = "".join(str(v) for o in outputs for v in (o.get("text"), o.get("data")))
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/|site-packages", printed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_one_question_and_shows_a_model_of_the_hub(path):
    text = ["".join(cell["source"]) for cell in cells(path, "markdown")]
    title = text[0].splitlines()[0]
    assert title.startswith("# ") and "?" in title
    blocks = re.findall(r"^```python\n(.*?)^```$", "\n".join(text), re.M | re.S)
    assert any("from_pretrained" in block or "timm.create_model" in block for block in blocks)
    for block in blocks:
        ast.parse(block)


@pytest.mark.parametrize(
    "path", [*NOTEBOOKS, *sorted(FOLDER.glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_somewhere(path):
    texts = [path.read_text("utf-8")]
    if path.suffix == ".ipynb":
        texts = ["".join(cell["source"]) for cell in cells(path, "markdown")]
    for target in re.findall(r"\]\(([^)#]+)\)", "\n".join(texts)):
        target = "".join(target.split())
        assert target.startswith("https://") or (FOLDER / target).exists(), target
