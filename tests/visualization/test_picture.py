"""A picture is a figure that is saved as PNG, SVG, PDF and HTML."""

from __future__ import annotations

import base64
import re
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

from captum_attn.errors import AttnError, MissingExtraError, OptionError
from captum_attn.visualization import visualize_image, visualize_matrix, visualize_text

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
