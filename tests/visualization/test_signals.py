"""Signals with their relevance under them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from captum_attn.errors import InputError, OptionError
from captum_attn.visualization import visualize_signal


def strips(picture) -> list[np.ndarray]:
    return [np.asarray(ax.images[0].get_array()) for ax in picture.axes if ax.images]


def test_each_channel_has_a_line_and_a_strip_for_each_method():
    signal, first = torch.randn(1, 3, 50), torch.rand(1, 3, 50)
    picture = visualize_signal({"GAE": first, "IG": first - 0.5}, signal, channels=["a", "b", "c"],
                               outlier_perc=0)  # fmt: skip
    lines = [ax for ax in picture.axes if ax.lines]
    assert [ax.get_ylabel() for ax in lines] == ["a", "b", "c"]
    for ax, channel in zip(lines, signal[0], strict=True):
        np.testing.assert_allclose(ax.lines[0].get_ydata(), channel.double())
    found = strips(picture)
    assert len(found) == 6
    np.testing.assert_allclose(found[2][0], first[0, 1].double() / float(first.max()), rtol=1e-5)
    limit = float((first - 0.5).abs().max())
    np.testing.assert_allclose(found[3][0], (first[0, 1] - 0.5).double() / limit, rtol=1e-4)


def test_a_long_waveform_is_averaged_and_counted_in_seconds(tmp_path):
    relevance = torch.zeros(48_000)
    relevance[24_000:] = 1.0
    picture = visualize_signal(relevance, torch.randn(48_000), rate=16_000, titles=["why yes"])
    (strip,) = strips(picture)
    assert strip.shape == (1, 1200) and strip[0, :599].max() == 0 and strip[0, 601:].min() == 1
    (shown,) = [ax for ax in picture.axes if ax.images]
    assert shown.get_xlim() == (0, 3) and shown.get_xlabel() == "seconds"
    assert picture.save(tmp_path / "why.png").stat().st_size > 2000


@pytest.mark.parametrize(
    ("relevance", "signal", "options", "said"),
    [
        (torch.rand(9), torch.rand(10), {}, r"expected the signal's shape \(1, 10\)"),
        (torch.rand(2, 3, 9), torch.rand(2, 3, 9), {}, "signal: expected one signal"),
        (torch.rand(9), torch.rand(9) / 0, {}, "signal: expected finite numbers"),
        (torch.rand(9), torch.rand(9), {"rate": 0}, "rate: expected a finite number above 0"),
        (torch.rand(9), torch.rand(9), {"channels": ["a", "b"]}, "channels: expected one for each"),
    ],
)
def test_what_is_no_signal(relevance, signal, options, said):
    with pytest.raises((InputError, OptionError), match=said):
        visualize_signal(relevance, signal, **options)
