"""Tokens by tokens, layers and heads: values, labels and what is not known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from captum_attn.visualization import (
    visualize_generation,
    visualize_heads,
    visualize_layers,
    visualize_matrix,
)
from captum_attn.visualization._matrix import cells_of, labels_of

WORDS = {0: "[PAD]", 1: "the", 2: "##s", 3: "Ġcat", 4: "sat", 5: "down"}


def names(ids: list[int]) -> list[str]:
    return [WORDS[i] for i in ids]


def matrices(picture) -> list[np.ndarray]:
    return [ax.images[0].get_array() for ax in picture.axes if ax.images]


def labels(ax, axis: str) -> list[str]:
    return [t.get_text() for t in getattr(ax, f"get_{axis}ticklabels")()]


def test_a_matrix_on_its_scale_with_its_labels():
    values = torch.tensor([[1.0, 0.0, 0.5], [0.0, 4.0, 2.0]])
    picture = visualize_matrix(values, ["a", "##b"], ["x", "y", "z"], outlier_perc=0)
    np.testing.assert_allclose(matrices(picture)[0], values / 4)
    ax = picture.axes[0]
    assert labels(ax, "x") == ["x", "y", "z"] and labels(ax, "y") == ["a", "b"]
    assert ax.images[0].get_clim() == (0, 1) and ax.images[0].get_cmap().name == "viridis"
    signed = visualize_matrix(-values, ["a", "b"], ["x", "y", "z"], outlier_perc=0)
    assert signed.axes[0].images[0].get_clim() == (-1, 1)
    np.testing.assert_allclose(matrices(signed)[0], -values / 4)


def test_a_batch_has_labels_of_its_own():
    picture = visualize_matrix(torch.rand(2, 1, 2), [["a"], ["b"]], [["c", "d"], ["e", "f"]])
    panels = [ax for ax in picture.axes if ax.images]
    assert [labels(ax, "y") + labels(ax, "x") for ax in panels] == [list("acd"), list("bef")]


def test_many_rows_stay_readable():
    count = 400
    words = [f"w{i}" for i in range(count)]
    picture = visualize_matrix(torch.rand(count, count), words)
    cells = cells_of((count, count))
    assert max(picture.get_size_inches()) < 20
    shown = labels(picture.axes[0], "y")
    assert shown[1] == f"w{cells.rows}" and len(shown) < 200
    assert cells.rows * cells.high * 72 >= 5.5  # points from label to label
    assert labels_of(["x" * 40]) == ["x" * 15 + "…"]


def test_labels_lose_the_marks_of_tokenizers_only():
    assert labels_of(["[CLS]", "un", "##able", "[PAD]"]) == ["[CLS]", "un", "able", "[PAD]"]
    assert labels_of(["▁a", "<0xE4>", "<0xBD>", "<0xA0>"]) == ["a", "你", "·", "·"]


def generation() -> SimpleNamespace:
    """Two examples, 3 tokens of prompt (the first of one is padding) and 2 generated."""
    torch.manual_seed(0)
    own = torch.rand(2, 2, 4)
    own[:, 0, 3] = 0
    return SimpleNamespace(
        relevance={"pixel_values": torch.rand(2, 2, 9), "input_ids": own},
        stream="input_ids",
        tokens=torch.tensor([[4, 5], [5, 4]]),
        valid=torch.tensor([[True, True], [True, False]]),
        columns=torch.tensor([[0, 1, 3, 4], [1, 1, 3, 5]]),
        real=torch.tensor([[False, True, True, True], [True, True, True, True]]),
    )


def test_generated_tokens_by_all_before_them():
    written = generation()
    picture = visualize_generation(written, names, outlier_perc=0)
    first, second = (ax for ax in picture.axes if ax.images)
    assert labels(first, "y") == ["sat", "down"] and labels(second, "y") == ["down"]
    assert labels(first, "x") == ["pixel_values (sum)", "the", "cat", "sat"]
    assert labels(second, "x") == ["pixel_values (sum)", "the", "the", "cat", "down"]
    shown = matrices(picture)[0]
    assert np.ma.getmaskarray(shown).tolist() == [[False] * 3 + [True], [False] * 4]
    expected = torch.cat(
        [written.relevance["pixel_values"][0].sum(1, keepdim=True),
         written.relevance["input_ids"][0][:, 1:]], 1
    )  # fmt: skip
    expected = expected / expected.max()
    np.testing.assert_allclose(shown.filled(0), expected, atol=1e-6)
    assert [t.get_text() for t in first.texts] == ["pixel_values", "prompt", "generated"]


def test_sources_with_labels_have_columns():
    written = generation()
    sources = {"pixel_values": [[f"p{i}" for i in range(9)]] * 2}
    picture = visualize_generation(written, SimpleNamespace(convert_ids_to_tokens=names),
                                   sources=sources)  # fmt: skip
    assert labels(picture.axes[0], "x")[:10] == [f"p{i}" for i in range(9)] + ["the"]


def layer_maps(batch: int = 2, heads=(2, 3)) -> list:
    torch.manual_seed(0)
    return [
        (SimpleNamespace(module=f"encoder.{i}.attn"), torch.rand(batch, count, 5, 5))
        for i, count in enumerate(heads)
    ]


def test_layers_over_the_image():
    maps, images = layer_maps(), torch.rand(2, 3, 8, 8)
    picture = visualize_layers(maps, images, row=0, outlier_perc=0, titles=["a", "b"])
    panels = [ax for ax in picture.findobj(lambda a: hasattr(a, "images") and a.images)]
    panels = [ax for ax in panels if len(ax.images) == 2]
    assert [ax.get_title() for ax in panels] == ["layer 0", "layer 1"] * 2
    means = torch.stack([m.mean(1)[:, 0, 1:] for _, m in maps], 1)  # (B, L, 4): without [CLS]
    for i in range(2):
        for j in range(2):
            expected = (means[i, j] / means[i].max()).view(2, 2)
            shown = np.asarray(panels[2 * i + j].images[1].get_array())
            np.testing.assert_allclose(shown[::4, ::4], expected, atol=1e-6)


def test_layers_by_tokens_and_as_matrices():
    maps = layer_maps(1)
    picture = visualize_layers(maps, tokens=list("abcde"), outlier_perc=0)
    means = torch.stack([m[0].mean((0, 1)) for _, m in maps])
    np.testing.assert_allclose(matrices(picture)[0], means / means.max(), atol=1e-6)
    assert labels(picture.axes[0], "y") == ["layer 0", "layer 1"]
    picture = visualize_layers([("own name", maps[0][1])], outlier_perc=0)
    (panel,) = (ax for ax in picture.axes if ax.images)
    mean = maps[0][1][0].mean(0)
    np.testing.assert_allclose(panel.images[0].get_array(), mean / mean.max(), atol=1e-6)
    assert "own name" in panel.get_title()


def test_heads_in_per_cent_of_what_they_carried():
    maps = layer_maps()
    picture = visualize_heads(maps, row=-1)
    carried = torch.zeros(2, 2, 3)
    for i, (_, values) in enumerate(maps):
        carried[:, i, : values.shape[1]] = values[:, :, -1].sum(-1)
    for shown, one in zip(matrices(picture), carried, strict=True):
        np.testing.assert_allclose(shown.filled(0), one / one.max(), atol=1e-6)
        assert np.ma.getmaskarray(shown).tolist() == [[False, False, True], [False] * 3]
    bar = next(ax for ax in picture.axes if ax.get_label() == "<colorbar>")
    share = 100 * float(carried[0].max() / carried[0].sum())
    assert labels(bar, "x") == ["0", f"{share:.2g}"]


def test_windows_are_added_up_per_example():
    folded = torch.rand(6, 2, 4, 4)  # two examples of three windows
    picture = visualize_heads([("a", folded), ("b", torch.rand(2, 2, 4, 4))])
    one = matrices(picture)[1][0]
    sums = folded[3:].sum((0, 2, 3))
    assert one[0] / one[1] == pytest.approx(float(sums[0] / sums[1]))
