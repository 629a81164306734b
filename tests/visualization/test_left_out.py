"""Pictures mark the tokens whose relevance was taken away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from captum_attn.errors import InputError
from captum_attn.visualization import visualize_image, visualize_text

TOKENS = ["<|im_start|>", "Ġgoal", "keeper", "Ġdives"]
VALUES = torch.tensor([0.0, 0.0, 0.5, 1.0])


def test_a_text_frames_words_of_which_all_pieces_were_left_out() -> None:
    mask = torch.tensor([True, True, False, False])
    page = visualize_text(VALUES, TOKENS, left_out=mask).html()
    assert page.count('title="left out"') == 1  # half of a word is not the word
    assert ">&lt;|im_start|&gt;</span>" in page and page.count("outline: 1px dashed") == 1
    assert "</span> left out" in page  # the legend
    whole = visualize_text(VALUES, TOKENS, left_out=~torch.tensor([1, 0, 0, 1]).bool()).html()
    assert whole.count('title="left out"') == 1 and ">goalkeeper</span>" in whole


def test_a_text_without_any_is_as_it_was() -> None:
    plain = visualize_text(VALUES, TOKENS)
    page = plain.html()
    assert "left out" not in page and "dashed" not in page
    assert page == visualize_text(VALUES, TOKENS, left_out=torch.zeros(4).bool()).html()


def test_the_figure_has_a_dashed_frame_round_the_word_and_in_the_legend() -> None:
    def dashed(left_out: torch.Tensor | None) -> int:
        figure = visualize_text(VALUES, TOKENS, left_out=left_out)
        return sum(patch.get_linestyle() in ("--", "dashed") for patch in figure.sheet.patches)

    assert dashed(torch.tensor([1, 0, 0, 1])) == 2 + 1 and dashed(None) == 0


def test_masks_belong_to_labels_or_to_all() -> None:
    both = {"a": VALUES, "b": VALUES}
    mask = torch.tensor([True, False, False, False])
    assert visualize_text(both, TOKENS, left_out=mask).html().count('title="left out"') == 2
    assert visualize_text(both, TOKENS, left_out={"b": mask}).html().count('"left out"') == 1
    with pytest.raises(InputError, match=r"left_out: expected some of \['a', 'b'\], got \['c'\]"):
        visualize_text(both, TOKENS, left_out={"c": mask})
    with pytest.raises(InputError, match=r"left_out: expected \(B, n\) for 1 examples of up to 4"):
        visualize_text(VALUES, TOKENS, left_out=mask[:2])


def test_an_image_has_a_dashed_line_round_the_patch() -> None:
    values, image = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4, 4:] = True  # in the corner
    (ax,) = visualize_image(values, image, left_out=mask, show_colorbar=False).axes[1:]
    (lines,) = [c for c in ax.collections if c.get_linestyle()[0][1] is not None]
    (path,) = lines.get_paths()
    low, high = path.vertices.min(0), path.vertices.max(0)
    np.testing.assert_allclose([*low, *high], [3.5, -0.5, 7.5, 3.5])
    with pytest.raises(InputError, match="left_out: expected"):
        visualize_image(values, image, left_out=mask[..., :4, :])
