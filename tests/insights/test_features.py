"""How inputs are drawn: the same protocol as Captum Insights' features."""

from __future__ import annotations

import pytest
import torch

from captum_attn.errors import InputError
from captum_attn.insights import (
    EmptyFeature,
    GeneralFeature,
    ImageFeature,
    RegionFeature,
    TextFeature,
)
from tests.insights.browser import pixels


def orange(image) -> torch.Tensor:
    """Where a picture is orange: much more red than blue, (H, W)."""
    values = torch.from_numpy(image)
    return (values[..., 0] - values[..., 2]) > 60


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_coloured_where_its_relevance_lies(channels):
    data = torch.full((1, channels, 16, 16), 0.5)
    attribution = torch.zeros_like(data)
    attribution[..., :8, 8:] = 1.0  # the upper right
    found = ImageFeature("Photo").visualize(attribution, data, 0.25)
    assert (found.name, found.type, found.contribution) == ("Photo", "image", 0.25)
    assert not orange(pixels(found.base)).any()
    drawn = orange(pixels(found.modified))
    height, width = drawn.shape
    rows, columns = drawn[: height * 3 // 4].nonzero().unbind(1)  # the colour bar is below
    assert len(rows) > 100
    assert columns.min() >= width * 0.45
    assert rows.max() <= height * 0.55


def test_an_image_is_shown_as_its_transform_says():
    data = torch.zeros(1, 1, 16, 16)
    feature = ImageFeature("Photo", None, None, lambda x: x + 1)
    white = pixels(feature.visualize(data + 1, data, 1.0).base)
    black = pixels(ImageFeature("Photo").visualize(data + 1, data, 1.0).base)
    middle = tuple(side // 2 for side in white.shape[:2])
    assert white[middle].tolist() == [255, 255, 255]
    assert black[middle].tolist() == [0, 0, 0]


def test_regions_are_coloured_by_their_relevance():
    picture = torch.full((1, 16, 16), 0.5)
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 8.0, 16.0, 16.0]])
    feature = RegionFeature("Regions", None, None, lambda features: (picture, boxes))
    values = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])  # the lower right
    found = feature.visualize(values, torch.rand(1, 2, 2), 1.0)
    assert not orange(pixels(found.base)).any()
    drawn = orange(pixels(found.modified))
    height, width = drawn.shape
    assert drawn[height // 2 + 5 :, width // 2 + 5 :].float().mean() > 0.5
    assert not drawn[: height // 2 - 5].any() and not drawn[:, : width // 2 - 5].any()


def test_words_get_their_relevance_in_per_cent_of_the_largest():
    words = ["[CLS]", "good", "film"]
    feature = TextFeature("Text", None, None, lambda ids: words)
    found = feature.visualize(torch.tensor([[0.0, 2.0, -4.0]]), torch.tensor([[1, 2, 3]]), 1.0)
    assert (found.base, found.modified) == (words, [0.0, 50.0, -100.0])
    embedded = torch.tensor([[[0.0, 0.0], [0.5, 1.5], [-3.0, -1.0]]])
    assert feature.visualize(embedded, embedded, 1.0).modified == [0.0, 50.0, -100.0]
    nothing = feature.visualize(torch.zeros(1, 3), torch.tensor([[1, 2, 3]]), 1.0)
    assert nothing.modified == [0.0, 0.0, 0.0]


def test_words_and_tokens_of_unlike_numbers_are_refused():
    feature = TextFeature("Text", None, None, lambda ids: ["one"])
    with pytest.raises(InputError, match="one word for each of the 2 tokens, got 1"):
        feature.visualize(torch.ones(1, 2), torch.tensor([[1, 2]]), 1.0)


def test_categories_and_numbers_of_unlike_numbers_are_refused():
    feature = GeneralFeature("Numbers", ["age"])
    with pytest.raises(InputError, match="expected 1 numbers, one for each category, got 2"):
        feature.visualize(torch.ones(1, 2), torch.ones(1, 2), 1.0)


def test_an_empty_feature_draws_nothing():
    found = EmptyFeature().visualize(torch.ones(1, 2), torch.ones(1, 2), -0.5)
    assert found == ("empty", None, None, "empty", -0.5)


def test_transforms_may_be_one_a_list_or_none():
    assert ImageFeature("Photo").input_transforms == []
    assert ImageFeature("Photo", abs).baseline_transforms == [abs]
    assert ImageFeature("Photo", None, [abs, round]).input_transforms == [abs, round]
