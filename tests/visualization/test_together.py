"""Images with texts, and detections: boxes, regions, masks and words where they belong."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from captum_attn.visualization import (
    visualize_detections,
    visualize_image_text,
    visualize_words_on_image,
)
from captum_attn.visualization._regions import LABEL, apart
from captum_attn.visualization._style import tint

IMAGE = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 8.0, 16.0, 16.0]])
TOKENS = ["[CLS]", "what", "is", "it", "##s", "[SEP]"]
WORDS = torch.tensor([9.0, 1.0, 0.0, -0.5, -0.5, 9.0])
ORANGE, PURPLE = "#e08214", "#8073ac"


def filled(ax) -> dict[tuple[float, float], tuple[str, float]]:
    """Upper left corner -> colour and strength of the regions."""
    return {
        p.get_xy(): (to_hex(p.get_facecolor()), p.get_facecolor()[3])
        for p in ax.patches
        if p.get_fill()
    }


def test_words_and_regions_share_a_scale():
    picture = visualize_image_text(
        (WORDS, torch.tensor([2.0, -1.0])), TOKENS, IMAGE, boxes=BOXES, titles=["what?"],
        captions=["model: yes"],
    )  # fmt: skip
    page, on_image = picture.axes
    regions = filled(on_image)
    assert regions[(-0.5, -0.5)] == (ORANGE, pytest.approx(0.45))
    assert regions[(7.5, 7.5)] == (PURPLE, pytest.approx(0.45 / 2))
    assert {t.get_text() for t in on_image.texts} == {"+2.00", "−1.00"}
    said = [t.get_text() for t in page.texts]
    assert {"what?", "model: yes", "what", "is", "its", "+1.00", "0", "−1.00"} <= set(said)
    assert "[CLS]" not in said
    colours = {to_hex(p.get_facecolor()) for p in page.patches if p.get_height() > 10}
    assert colours == {to_hex(tint(share)) for share in (0.5, 0.0, -0.5)}


def test_scales_of_their_own_where_asked_for():
    pair = WORDS, torch.tensor([2.0, -1.0])
    picture = visualize_image_text(pair, TOKENS, IMAGE, boxes=BOXES, shared_scale=False)
    colours = {to_hex(p.get_facecolor()) for p in picture.axes[0].patches if p.get_height() > 10}
    assert to_hex(tint(1.0)) in colours and to_hex(tint(-1.0)) in colours


def test_a_batch_of_maps_and_several_methods():
    images, maps = IMAGE.expand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)
    pair = WORDS.expand(2, 6), maps
    lists = [TOKENS, TOKENS]
    picture = visualize_image_text({"a": pair, "b": pair}, lists, images, sign="positive")
    page, *on_images = picture.axes
    assert len(on_images) == 4
    largest = max(float(maps[0].max()), 1.0)
    expected = (maps[0, 0] / largest).numpy()
    np.testing.assert_allclose(on_images[0].images[1].get_array(), expected, atol=1e-6)
    labels = [t.get_text() for t in page.texts if t.get_text() in ("a", "b")]
    assert labels == ["a", "b", "a", "b"]  # example by example
    tops = [ax.get_position().y0 for ax in on_images]
    assert tops == sorted(tops, reverse=True)
    for ax in on_images:  # square as the image, whatever the height of the figure
        wide, high = np.array(picture.get_size_inches()) * ax.get_position().size
        assert wide == pytest.approx(high)


def test_values_that_would_lie_on_stronger_ones_are_left_out():
    boxes = np.array([[0.0, 0, 9, 9], [1, 0, 9, 9], [0, 9, 9, 20]])
    assert apart(boxes, [1, 0, 2], 20) == [1, 2]
    assert apart(boxes, [0, 1, 2], 1) == [0, 1, 2] and max(LABEL) < 1


def test_a_panel_for_each_word_with_the_mean_of_its_pieces():
    relevance = torch.zeros(6, 4)
    relevance[1, 0], relevance[3, 1], relevance[4, 3] = 1.0, 0.5, 0.25
    picture = visualize_words_on_image(relevance, TOKENS, IMAGE, outlier_perc=0)
    panels = [ax for ax in picture.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["what", "is", "its"]
    of_what, of_is, of_its = (np.asarray(ax.images[1].get_array()) for ax in panels)
    assert of_what[:8, :8].min() == 1 and of_what.sum() == 64
    assert not of_is.any()
    assert of_its[0, 15] == 0.25 and of_its[15, 15] == 0.125


def test_only_the_words_of_most_relevance_are_shown():
    relevance = torch.arange(24.0).view(6, 4)
    picture = visualize_words_on_image(relevance, list("abcdef"), IMAGE, max_words=2, boxes=None)
    assert [ax.get_title() for ax in picture.axes if ax.get_title()] == ["e", "f"]


def test_regions_of_words_in_boxes():
    relevance = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    picture = visualize_words_on_image(relevance, ["a", "b"], IMAGE, boxes=BOXES)
    first, second = (filled(ax) for ax in picture.axes[:2])
    assert first[(-0.5, -0.5)][0] == ORANGE and first[(7.5, 7.5)][1] == 0
    assert second[(7.5, 7.5)][0] == PURPLE and second[(-0.5, -0.5)][1] == 0


def found(count: int) -> SimpleNamespace:
    return SimpleNamespace(
        boxes=torch.tensor([[1.0, 2.0, 9.0, 12.0]]).expand(count, 4),
        scores=torch.linspace(0.9, 0.5, count),
        names=[f"cat {i}" for i in range(count)],
        maps=torch.rand(count, 16, 16),
    )


def panel_titles(picture) -> list[str]:
    titles = [ax.get_title() or ax.get_title(loc="left") for ax in picture.axes]
    return [title for title in titles if title]


def test_a_panel_for_each_detection_with_its_box_and_mask():
    one = found(2)
    masks = one.maps > 0.5
    picture = visualize_detections(one, IMAGE, masks=masks, titles=["scene"])
    assert panel_titles(picture) == ["scene", "cat 0 0.90", "cat 1 0.50", "mask", "mask"]
    by_title = {ax.get_title(): ax for ax in picture.axes}
    panel = by_title["cat 1 0.50"]
    (box,) = panel.patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (0.5, 1.5, 8, 10)
    limit = np.sort(one.maps[1].numpy(), axis=None)
    limit = limit[np.searchsorted(limit.cumsum(), 0.98 * limit.sum())]
    expected = (one.maps[1].numpy() / limit).clip(0, 1)
    np.testing.assert_allclose(panel.images[-1].get_array(), expected, atol=1e-6)
    tinted = np.asarray(by_title["mask"].images[0].get_array())
    grey = np.isclose(tinted[..., 0], tinted[..., 2])
    np.testing.assert_array_equal(grey, ~masks[1].numpy())


def test_a_batch_wraps_and_says_where_nothing_was_found():
    images = [IMAGE, IMAGE]
    picture = visualize_detections([found(3), found(0)], images, columns=2)
    assert panel_titles(picture) == ["cat 0 0.90", "cat 1 0.70", "cat 2 0.50"]
    assert [ax.get_xlabel() for ax in picture.axes if ax.get_xlabel()] == ["nothing detected"]
