"""Maps of images: what is drawn where, in which colours, on which scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import visualization as captum
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from captum_attn.errors import InputError
from captum_attn.visualization import visualize_image
from captum_attn.visualization._panels import NOTHING
from captum_attn.visualization._style import OVERLAYS, of_sign, scale_limit

IMAGES = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
SIGNED = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
POSITIVE = SIGNED.abs()
PURPLE, ORANGE = "#8073ac", "#e08214"


def bars(picture) -> list[Axes]:
    """The colour bars that say something."""
    found = [ax for ax in picture.axes if ax.get_label() == "<colorbar>"]
    return [ax for ax in found if ax.get_xticklabels()[0].get_color() != NOTHING]


def panels(picture) -> list[Axes]:
    return [ax for ax in picture.axes if ax.get_label() != "<colorbar>"]


def drawn(ax: Axes) -> np.ndarray:
    """What the last image of a panel shows."""
    return np.asarray(ax.images[-1].get_array())


@pytest.mark.parametrize("outlier_perc", [0, 2, 10.5, 60])
@pytest.mark.parametrize("sign", ["all", "positive", "negative", "absolute_value"])
def test_values_are_scaled_as_captum_scales_them(sign, outlier_perc):
    values = SIGNED[0].sum(0).double().numpy()
    expected = captum._normalize_attr(values, sign, outlier_perc or 1e-9)
    picture = visualize_image(
        SIGNED[0].sum(0), method="heat_map", sign=sign, outlier_perc=outlier_perc
    )
    (panel,) = panels(picture)
    np.testing.assert_allclose(drawn(panel), expected, atol=1e-12)
    low = -1 if sign == "all" else 0
    assert panel.images[-1].get_clim() == (low, 1)


def test_no_outliers_where_captum_fails_by_rounding():
    values = np.array([0.1] * 3 + [0.2, 0.3])
    for seed in range(50):
        values = np.random.default_rng(seed).random(19)
        assert scale_limit(values, 0) == values.max()


def test_the_bar_names_the_ends_in_the_attributions_unit():
    maps = torch.zeros(4, 4)
    maps[0, 0], maps[1, 1] = 0.25, -0.5
    signed = bars(visualize_image(maps, method="heat_map", outlier_perc=0))
    assert [t.get_text() for t in signed[0].get_xticklabels()] == ["−0.5", "0", "0.5"]
    (one,) = bars(visualize_image(maps.clamp(min=0), method="heat_map", outlier_perc=0))
    assert [t.get_text() for t in one.get_xticklabels()] == ["0", "0.25"]
    (one,) = bars(visualize_image(maps, method="heat_map", outlier_perc=0, sign="negative"))
    assert [t.get_text() for t in one.get_xticklabels()] == ["0", "−0.5"]


def test_colours_tell_the_sign_and_white_is_in_the_middle():
    picture = visualize_image(SIGNED[0].sum(0), method="heat_map")
    colours = panels(picture)[0].images[0].get_cmap()
    assert colours.name == "PuOr_r"
    below, zero, above = (np.array(colours(x)[:3]) for x in (0.0, 0.5, 1.0))
    assert zero.min() > 0.95
    assert below[2] > below[0] and above[0] > above[2]  # purple and orange: no red beside green
    positive = visualize_image(POSITIVE[0].sum(0), method="heat_map")
    assert panels(positive)[0].images[0].get_cmap().name == "viridis"


def test_overlays_leave_the_image_where_nothing_is_relevant():
    for sign, at_zero in (("all", 0.5), ("positive", 0.0), ("negative", 0.0)):
        assert OVERLAYS[sign](at_zero)[3] < 0.01 and OVERLAYS[sign](1.0)[3] == 1
    assert [to_hex(OVERLAYS["all"](x)) for x in (0.0, 1.0)] == [PURPLE, ORANGE]
    assert to_hex(OVERLAYS["negative"](1.0)) == PURPLE


def test_a_row_for_each_example_and_a_column_for_each_method():
    picture = visualize_image(
        {"one": SIGNED, "two": POSITIVE.sum(1)}, IMAGES, titles=["first", "second"]
    )
    found = panels(picture)
    assert len(found) == 2 * 3 and len(bars(picture)) == 4
    titles = [ax.get_title() or ax.get_title(loc="left") for ax in found]
    assert titles == ["first", "one", "two", "second", "one", "two"]
    for row in range(2):
        np.testing.assert_allclose(
            drawn(found[3 * row]), IMAGES[row].permute(1, 2, 0).double(), atol=1e-6
        )
        # Each map is on its own scale, positive ones without a side against the target.
        assert found[3 * row + 1].images[-1].get_clim() == (-1, 1)
        assert found[3 * row + 2].images[-1].get_clim() == (0, 1)
        values = POSITIVE[row].sum(0).double().numpy()
        expected = captum._normalize_attr(values, "positive", 2)
        np.testing.assert_allclose(drawn(found[3 * row + 2]), expected, atol=1e-6)


def test_one_example_is_a_batch_of_one():
    one, many = visualize_image(SIGNED[0], IMAGES[0]), visualize_image(SIGNED[:1], IMAGES[:1])
    for a, b in zip(panels(one), panels(many), strict=True):
        np.testing.assert_array_equal(drawn(a), drawn(b))


def test_views_of_one_map_beside_each_other():
    views = ["heat_map", "blended_heat_map", "masked_image", "alpha_scaling", "contour"]
    picture = visualize_image(POSITIVE[0], IMAGES[0], method=views, show_original=False)
    heat, blended, masked, alpha, contour = panels(picture)
    share = drawn(heat)
    np.testing.assert_array_equal(drawn(blended), share)
    grey = (0.4 + 0.6 * IMAGES[0].mean(0).double().numpy()) * 255  # pale, whatever it spans
    assert blended.images[0].get_clim() == (0, 255)
    np.testing.assert_allclose(np.asarray(blended.images[0].get_array()), grey, atol=1.0)
    colour = IMAGES[0].permute(1, 2, 0).double().numpy()
    np.testing.assert_allclose(drawn(masked), 255 * colour * share[..., None], atol=2.0)
    np.testing.assert_allclose(drawn(alpha)[..., 3], 255 * share, atol=1.0)
    lines = [c for c in contour.collections if hasattr(c, "levels")]
    assert list(lines[0].levels) == [0.25, 0.5, 0.75]
    assert len(bars(picture)) == 3  # masked and alpha-scaled images have no colours to explain
    titles = [ax.get_title() for ax in panels(picture)]
    assert titles == [view.replace("_", " ") for view in views]


def test_contours_of_both_signs_have_a_level_on_either_side():
    (panel,) = panels(visualize_image(SIGNED[0].sum(0), method="contour"))
    (lines,) = (c for c in panel.collections if hasattr(c, "levels"))
    assert list(lines.levels) == [-0.75, -0.5, -0.25, 0.25, 0.5, 0.75]


def test_masks_of_signed_maps_show_magnitudes():
    picture = visualize_image(SIGNED[0], IMAGES[0], method="alpha_scaling", show_original=False)
    values = captum._normalize_attr(SIGNED[0].sum(0).double().numpy(), "absolute_value", 2)
    np.testing.assert_allclose(drawn(panels(picture)[0])[..., 3], 255 * values, atol=1.0)


def test_patches_are_exact_or_smooth():
    cells = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.0]])
    full = cells.repeat_interleave(4, 0).repeat_interleave(4, 1)
    full = full + torch.tensor([0.2, -0.2]).repeat(6)  # uneven within a patch, the mean is the same
    options = {"outlier_perc": 0, "method": "heat_map", "patch_size": 4}
    for maps in (cells, full):
        exact = drawn(panels(visualize_image(maps, IMAGES[0], **options))[1])
        expected = cells.repeat_interleave(4, 0).repeat_interleave(4, 1)
        np.testing.assert_allclose(exact, expected, atol=1e-6)
    smooth = panels(visualize_image(cells, IMAGES[0], interpolation="bilinear", **options))[1]
    expected = torch.nn.functional.interpolate(cells[None, None], (8, 12), mode="bilinear")[0, 0]
    expected = (expected / expected.max()).numpy()
    np.testing.assert_allclose(drawn(smooth), expected, atol=1e-6)


def test_images_in_every_form_look_alike():
    pil = pytest.importorskip("PIL.Image")
    whole = (IMAGES[0] * 255).round().to(torch.uint8)
    array = whole.permute(1, 2, 0).numpy()
    expected = whole.permute(1, 2, 0).double().numpy() / 255
    for image in (whole, array, pil.fromarray(array), whole.double() / 255, array / 255.0):
        shown = drawn(panels(visualize_image(SIGNED[0].sum(0), image))[0])
        np.testing.assert_allclose(shown, expected, atol=1e-6)
    normalised = (IMAGES[0] - 0.5) / 0.25
    shown = drawn(panels(visualize_image(SIGNED[0], normalised))[0])
    assert shown.min() == 0 and shown.max() == 1
    grey = visualize_image(SIGNED[0].sum(0), IMAGES[0].mean(0))
    assert drawn(panels(grey)[0]).shape == (8, 12, 3)


def test_captums_arrays_have_their_channels_last():
    of_tensor = visualize_image(SIGNED[0], IMAGES[0])
    of_array = visualize_image(
        SIGNED[0].permute(1, 2, 0).numpy(), IMAGES[0].permute(1, 2, 0).numpy()
    )
    for a, b in zip(panels(of_tensor), panels(of_array), strict=True):
        np.testing.assert_allclose(drawn(a), drawn(b), atol=1e-6)


def test_images_of_unlike_sizes_in_one_figure():
    images = [torch.rand(3, 8, 8), torch.rand(3, 6, 10)]
    picture = visualize_image([torch.rand(8, 8), torch.rand(6, 10)], images)
    assert [drawn(ax).shape[:2] for ax in panels(picture)] == [(8, 8)] * 2 + [(6, 10)] * 2


def test_boxes_and_captions():
    picture = visualize_image(
        {"m": POSITIVE}, IMAGES, boxes=[[(1, 2, 5, 6)], []], captions={"m": ["a", "b"]}
    )
    first, of_first, second, of_second = panels(picture)
    (box,) = first.patches
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (0.5, 1.5, 4, 4)
    assert not second.patches
    assert [of_first.get_xlabel(), of_second.get_xlabel()] == ["a", "b"]


def test_a_map_of_zeros_is_empty_and_says_so():
    with pytest.warns(UserWarning, match="m of example 1 is zero everywhere: drawn as empty"):
        maps = torch.stack([POSITIVE[0].sum(0), torch.zeros(8, 12)])
        picture = visualize_image({"m": maps}, IMAGES)
    panel = panels(picture)[3]
    assert [t.get_text() for t in panel.texts] == ["all zero"]
    assert len(panel.images) == 1 and len(bars(picture)) == 1  # the image alone
    with pytest.warns(UserWarning, match="has no negative relevance"):
        picture = visualize_image(POSITIVE[0], IMAGES[0], sign="negative")
    assert [t.get_text() for t in panels(picture)[1].texts] == ["no negative"]


def test_very_small_numbers_are_no_zeros(recwarn):
    picture = visualize_image(SIGNED[0] * 1e-9, IMAGES[0])
    np.testing.assert_allclose(
        drawn(panels(picture)[1]),
        drawn(panels(visualize_image(SIGNED[0], IMAGES[0]))[1]),
        atol=1e-6,
    )
    assert not recwarn.list


def test_pyplot_knows_nothing():
    before = pyplot.get_fignums()
    visualize_image(SIGNED, IMAGES, method=["heat_map", "contour"])
    assert pyplot.get_fignums() == before


def test_labels_are_no_formulas():
    picture = visualize_image({"$x_1$ costs $5": SIGNED}, IMAGES)
    assert not any(t.get_parse_math() for ax in panels(picture) for t in [ax.title])
    assert picture.png(30)[:4] == b"\x89PNG"


def test_of_sign_is_what_it_says():
    values = np.array([-2.0, 0.0, 3.0])
    assert of_sign(values, "negative").tolist() == [2, 0, 0]
    assert of_sign(values, "positive").tolist() == [0, 0, 3]
    assert of_sign(values, "absolute_value").tolist() == [2, 0, 3]


@pytest.mark.parametrize("images", [None, torch.rand(1, 12), torch.rand(1, 1, 12)])
def test_a_row_of_values_is_no_picture(images):
    with pytest.raises(InputError, match="12 values in a row, .*visualize_text .*visualize_signal"):
        visualize_image(torch.rand(1, 12), images, method="heat_map")


def test_every_row_has_the_height_of_its_own_picture():
    images = [torch.rand(3, 10, 50), torch.rand(3, 50, 50)]
    maps = [torch.rand(10, 50), torch.rand(50, 50)]
    both = visualize_image(maps, images, show_colorbar=False)
    alone = [visualize_image(m, i, show_colorbar=False) for m, i in zip(maps, images, strict=True)]
    heights = [picture.get_size_inches()[1] for picture in alone]
    assert both.get_size_inches()[1] == pytest.approx(sum(heights))
    assert heights[1] - heights[0] == pytest.approx(0.8 * 2.2)  # of panels 2.2 inches wide
