"""A picture is a figure that is saved as PNG, SVG, PDF and HTML."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from captum_attn.errors import AttnError, MissingExtraError, OptionError
from captum_attn.visualization import visualize_image, visualize_matrix, visualize_text
from tests.insights.browser import MARKS, opened

IMAGE, MAP = torch.rand(3, 8, 8), torch.rand(8, 8)


def test_it_is_a_figure_and_saves_in_every_form(tmp_path):
    picture = visualize_image({"a <b>": MAP}, IMAGE, titles=['say "3"'])
    assert isinstance(picture, Figure)
    heads = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!DOCTYPE html>"}
    for ending, head in heads.items():
        path = picture.save(tmp_path / f"picture.{ending.upper()}", dpi=40)
        assert path.read_bytes().startswith(head)


def test_the_page_holds_the_picture_and_its_words(tmp_path):
    picture = visualize_image({"a <b>": MAP}, IMAGE, titles=['say "3"'])
    page = picture.save(tmp_path / "page.html", dpi=40).read_text(encoding="utf-8")
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert 'alt="a &lt;b&gt;: say &quot;3&quot;"' in page


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"ending in \.png, \.svg, \.pdf, \.html, got"):
        visualize_image(MAP, IMAGE).save(tmp_path / "picture.gif")


def test_notebooks_show_it():
    assert visualize_image(MAP, IMAGE)._repr_png_().startswith(b"\x89PNG")
    assert visualize_image(MAP, IMAGE)._repr_html_() is None
    assert "<span" in visualize_text(torch.ones(2), ["a", "b"])._repr_html_()


def test_a_huge_picture_is_saved_with_fewer_dots(tmp_path):
    picture = visualize_matrix(torch.rand(2, 2), ["a", "b"])
    picture.set_size_inches(3, 1000)
    assert picture._drawable(150) == pytest.approx(65.535)


@pytest.mark.parametrize("module", ["matplotlib"])
def test_a_missing_extra_names_itself(module):
    script = (
        "import sys, captum_attn\n"
        f"for name in list(sys.modules):\n    if name.split('.')[0] == {module!r}:\n"
        f"        del sys.modules[name]\nsys.modules[{module!r}] = None\n"
        "from captum_attn.errors import AttnError\n"
        "try:\n    import captum_attn.visualization\n"
        "except AttnError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 'pip install "captum_attn[visualization]"' in done.stdout, done.stderr
    assert issubclass(MissingExtraError, AttnError) and issubclass(MissingExtraError, ImportError)


def test_the_page_has_the_numbers_of_each_panel():
    values = torch.tensor([[1.0, -0.25], [0.5, 0.0]])
    maps = visualize_image({"a</script>": values}, torch.rand(3, 2, 2))
    matrix = visualize_matrix(values, ["<b>", "y"], mask=values == 0.5)
    for picture, name in [(maps, "a</script>"), (matrix, "")]:
        page = picture.page()
        assert "</script>," not in page and "<b>" not in page
        (panel,) = json.loads(re.search(r'id="numbers">(.*?)</script>', page)[1])
        levels = np.frombuffer(base64.b64decode(panel["values"]), "<i2").reshape(panel["shape"])
        known = levels != -32768
        found = (levels * panel["step"])[known]
        np.testing.assert_allclose(found, values.numpy()[known], atol=1e-4)
        assert panel["name"].replace(" ", "") == name
        left, top, wide, high = panel["place"]
        assert 0 <= left < left + wide <= 1 and 0 <= top < top + high <= 1
    assert not known[1, 0] and panel["rows"] == ["<b>", "y"]


@pytest.mark.browser
@MARKS[1]
def test_the_pointer_shows_the_number_below_it(tmp_path):
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    picture = visualize_image({"GAE": values}, torch.rand(3, 2, 2), show_original=False)
    path = picture.save(tmp_path / "why.html")
    (ax,) = [one.ax for one in picture.numbers]
    place = ax.get_position()
    with opened(path.as_uri(), str(tmp_path / "profile")) as page:
        box = page.locator("img").bounding_box()
        x, y = place.x0 + 0.25 * place.width, 1 - place.y1 + 0.75 * place.height
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        assert page.inner_text("#said") == "GAE, row 1, column 0: 3.00"
        page.mouse.move(box["x"] + 1, box["y"] + 1)
        assert not page.is_visible("#said")
