"""What does not fit is refused in one sentence that says what to do."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from captum_attn.errors import InputError, OptionError
from captum_attn.visualization import (
    text_records,
    visualize_detections,
    visualize_generation,
    visualize_heads,
    visualize_image,
    visualize_image_text,
    visualize_layers,
    visualize_matrix,
    visualize_text,
    visualize_words_on_image,
)

IMAGE, IMAGES, MAP = torch.rand(3, 8, 8), torch.rand(2, 3, 8, 8), torch.rand(8, 8)
NAN = torch.full((8, 8), float("nan"))
FOUND = SimpleNamespace(
    boxes=torch.tensor([[0.0, 0, 4, 4]]), scores=[0.5], names=["a"], maps=MAP[None]
)
TEXT = (torch.ones(2), ["a", "b"])
LAYERS = [("one", torch.rand(1, 2, 5, 5)), ("two", torch.rand(1, 2, 5, 4))]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: visualize_image(MAP[:4], IMAGE), InputError,
         r"map of the image's size \(8, 8\), got \(4, 8\).*patch_size"),
        (lambda: visualize_image(IMAGES[:1], IMAGES), InputError, "one map for each image.* got 1"),
        (lambda: visualize_image(IMAGES, IMAGE), InputError, r"each image \(1\), got 2"),
        (lambda: visualize_image(torch.rand(7, 8, 8), IMAGE), InputError, "7 channels.*Mapping"),
        (lambda: visualize_image(IMAGE), InputError, "three axes could be either"),
        (lambda: visualize_image({"m": NAN}, IMAGE), InputError, "'m'.*64 of 64 NaN"),
        (lambda: visualize_image(MAP, IMAGE * float("inf")), InputError, "images: expected finite"),
        (lambda: visualize_image("map", IMAGE), InputError, "expected numbers"),
        (lambda: visualize_image({}, IMAGE), InputError, "empty Mapping"),
        (lambda: visualize_image(MAP, torch.rand(5, 8, 8)), InputError, "1 or 3 channels"),
        (lambda: visualize_image(MAP, IMAGE, method="heat"), OptionError, "'heat_map'.*'contour'"),
        (lambda: visualize_image(MAP, IMAGE, sign="both"), OptionError, "'all'.*got 'both'"),
        (lambda: visualize_image(MAP, IMAGE, outlier_perc=100), OptionError, r"100\), got 100"),
        (lambda: visualize_image(MAP, IMAGE, outlier_perc="2"), OptionError, r"100\), got '2'"),
        (lambda: visualize_image(MAP, IMAGE, alpha_overlay=2), OptionError, "alpha_overlay"),
        (lambda: visualize_image(MAP, IMAGE, patch_size=3), OptionError, "does not divide"),
        (lambda: visualize_image(MAP, IMAGE, patch_size=0), OptionError, "patch_size: expected"),
        (lambda: visualize_image(MAP, IMAGE, interpolation="nearest"), OptionError, "needs `patch"),
        (lambda: visualize_image(MAP, IMAGE, patch_size=4, interpolation="cubic"), OptionError,
         "interpolation: .*'bilinear'.*'cubic'"),
        (lambda: visualize_image(MAP), InputError, "needs the image"),
        (lambda: visualize_image(MAP, IMAGE, sign="all", method="masked_image"), OptionError,
         "cannot show both signs"),
        (lambda: visualize_image(MAP, IMAGE, titles="one"), InputError, "titles: .*in a list"),
        (lambda: visualize_image(MAP, IMAGE, captions={"x": ["y"]}), InputError, "some of"),
        (lambda: visualize_text(torch.ones(3), TEXT[1]), InputError, "of 2 tokens, got 3.*padding"),
        (lambda: visualize_text(torch.tensor([1, float("nan")]), TEXT[1]), InputError, "1 of 2 N"),
        (lambda: visualize_text(torch.ones(2)), InputError, "expected `tokens`"),
        (lambda: visualize_text(torch.ones(2), "ab"), InputError, "tokens: .*got 'ab'"),
        (lambda: visualize_text(torch.ones(0), []), InputError, "at least one token"),
        (lambda: visualize_text(torch.ones(3, 2), [TEXT[1]] * 2), InputError, "of the 2 examples"),
        (lambda: visualize_text(*TEXT, width=1), OptionError, r"width: .*\[4, 60\], got 1"),
        (lambda: text_records(*TEXT, pred_class=["a", "b"]), InputError, r"class.*\(1\), got 2"),
        (lambda: text_records(torch.ones(2), SimpleNamespace(encodings=None)), InputError,
         "convert_ids_to_tokens"),
        (lambda: visualize_image_text(MAP, TEXT[1], IMAGE), InputError, "expected a pair"),
        (lambda: visualize_image_text((TEXT[0], torch.ones(3)), TEXT[1], IMAGE,
                                      boxes=torch.tensor([[0.0, 0, 4, 4]])),
         InputError, "relevance of 1 boxes, got"),
        (lambda: visualize_image_text((TEXT[0], torch.ones(1)), TEXT[1], IMAGE,
                                      boxes=torch.tensor([[0.1, 0.1, 0.5, 0.5]])),
         InputError, "pixels.*multiply them"),
        (lambda: visualize_image_text((TEXT[0], torch.ones(1)), TEXT[1], IMAGE,
                                      boxes=torch.tensor([[5.0, 5, 2, 2]])),
         InputError, "x_min <= x_max"),
        (lambda: visualize_words_on_image(torch.ones(2, 3), TEXT[1], IMAGE), OptionError,
         "columns. of 3 patches"),
        (lambda: visualize_words_on_image(torch.ones(2), TEXT[1], IMAGE), InputError, r"\(n, R\)"),
        (lambda: visualize_detections(FOUND, IMAGES), InputError, r"found: .*\(2\), got 1"),
        (lambda: visualize_detections(MAP, IMAGE), InputError, "as explain_detections returns"),
        (lambda: visualize_detections(FOUND, IMAGE, masks=torch.ones(2, 8, 8)), InputError,
         r"masks: expected \(1, 8, 8\), got \(2, 8, 8\)"),
        (lambda: visualize_detections(FOUND, torch.rand(3, 9, 9)), InputError, "found.maps"),
        (lambda: visualize_matrix(MAP, ["a"]), InputError, r"rows: .*token \(8\), got 1"),
        (lambda: visualize_matrix(torch.ones(3), ["a"]), InputError, r"\(r, c\) or \(B, r, c\)"),
        (lambda: visualize_matrix(NAN, ["a"] * 8), InputError, "NaN"),
        (lambda: visualize_generation(None, 3), InputError, "tokenizer: expected"),
        (lambda: visualize_layers([]), InputError, "at least one pair"),
        (lambda: visualize_layers(LAYERS, tokens=list("abcde")), InputError, "looks at 5.* at 4"),
        (lambda: visualize_layers(LAYERS, IMAGE, tokens=["a"]), OptionError, "got both"),
        (lambda: visualize_layers(LAYERS[:1], row=0), OptionError, "with `images` or `tokens`"),
        (lambda: visualize_layers(LAYERS[:1], IMAGE, row=5), OptionError, "5 queries, got 5"),
        (lambda: visualize_layers(LAYERS[:1], IMAGE, grid=(3, 3)), OptionError, "most 5 patches"),
        (lambda: visualize_heads([("a", torch.rand(3, 3))]), InputError, r"\(B, H, q, k\)"),
        (lambda: visualize_heads(LAYERS, examples=2), InputError, "multiple of 2 examples, got 1"),
    ],
)  # fmt: skip
def test_it_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_zero_matrices_are_empty_with_a_warning():
    with pytest.warns(UserWarning, match="matrix of example 0 is zero"):
        picture = visualize_matrix(np.zeros((2, 2)), ["a", "b"])
    assert not np.asarray(picture.axes[0].images[0].get_array()).any()
    with pytest.warns(UserWarning, match="carried nothing"):
        visualize_heads([("a", torch.zeros(1, 2, 3, 3))])
    with pytest.warns(UserWarning, match="the maps of example 0 are zero"):
        visualize_layers([("a", torch.zeros(1, 2, 5, 5))], IMAGE)
    with pytest.warns(UserWarning, match="a row has no relevance to show"):
        visualize_image_text((torch.zeros(2), MAP * 0), TEXT[1], IMAGE)
