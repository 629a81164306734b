"""Top-k intersection, relevance rank and sparseness: by hand, and against Quantus."""

import numpy as np
import pytest
import torch

from captum_attn.errors import InputError, OptionError
from captum_attn.metrics import RandomAttribution, relevance_rank, sparseness, top_k_intersection


def test_the_first_pixels_by_hand():
    maps = torch.tensor([[[9.0, 1.0, 8.0], [2.0, 7.0, 0.0]]])
    masks = torch.tensor([[[1, 1, 0], [0, 1, 0]]])
    for k, share in ((1, 1.0), (2, 0.5), (3, 2 / 3), (6, 0.5)):
        assert top_k_intersection(maps, masks, k=k).tolist() == pytest.approx([share])
        found = top_k_intersection(maps, masks, k=k, concept_influence=True)
        assert found.tolist() == pytest.approx([share * 2])  # the object has half of the area
    assert relevance_rank(maps, masks).tolist() == pytest.approx([2 / 3])


def test_pixels_that_do_not_count_and_ties():
    maps = torch.tensor([[[9.0, 1.0, 8.0], [2.0, 7.0, 0.0]]])
    masks = torch.tensor([[[-1, 1, 0], [0, 1, 0]]])
    assert top_k_intersection(maps, masks, k=2).tolist() == [0.5]  # 8 and 7
    assert relevance_rank(maps, masks).tolist() == [0.5]
    found = top_k_intersection(maps, masks, k=1, concept_influence=True)
    assert found.tolist() == [0.0]
    with pytest.raises(OptionError, match="k: expected up to 5"):
        top_k_intersection(maps, masks, k=6)
    with pytest.raises(InputError, match="without an object"):
        relevance_rank(maps, torch.zeros(1, 2, 3))
    flat = torch.zeros(1, 2, 3)  # the first in reading order
    assert relevance_rank(flat, torch.tensor([[[1, 0, 0], [0, 0, 1]]])).tolist() == [0.5]


def test_chance_is_the_objects_share():
    images = torch.rand(80, 1, 16, 16)
    masks = torch.zeros(80, 16, 16)
    masks[:, 4:12, 4:12] = 1  # a quarter of the area
    maps = RandomAttribution(None).attribute(images)
    for found in (relevance_rank(maps, masks), top_k_intersection(maps, masks, k=40)):
        assert float(found.mean()) == pytest.approx(0.25, abs=4 * float(found.std() / 80**0.5))


def test_gini_by_hand():
    maps = torch.tensor([[1.0, -3.0, 0.0, 0.0], [2.0, 2.0, -2.0, 2.0], [0.0, 0.0, 0.0, 5.0],
                         [0.0, 0.0, 0.0, 0.0]])  # fmt: skip
    # (2 * 3 - 5) * 1 + (2 * 4 - 5) * 3, over 4 * 4
    assert sparseness(maps).tolist() == pytest.approx([10 / 16, 0.0, 0.75, 0.0])
    assert sparseness(maps.view(4, 1, 2, 2)).tolist() == pytest.approx([10 / 16, 0.0, 0.75, 0.0])


def test_padding_is_no_part_of_a_gini_index():
    scores = torch.rand(3, 9, dtype=torch.float64)
    mask = torch.ones(3, 9)
    mask[0, 6:] = mask[2, 2:] = 0
    found = sparseness(scores, mask)
    for i, size in enumerate((6, 9, 2)):
        a = np.sort(scores[i, :size].numpy())
        plain = sum(abs(x - y) for x in a for y in a) / (2 * size**2 * a.mean())
        assert float(found[i]) == pytest.approx(plain)
    features = torch.rand(3, 9, 4)
    torch.testing.assert_close(sparseness(features, mask), sparseness(features.sum(-1), mask))
    with pytest.raises(InputError, match="one value per token"):
        sparseness(scores, mask[:, :5])


def test_they_are_quantus():
    quantus = pytest.importorskip("quantus")
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(6, 1, 12, 10))
    masks = rng.random((6, 1, 12, 10)) < 0.3
    plain = {"disable_warnings": True, "normalise": False, "abs": False, "return_aggregate": False}
    x, y = np.zeros((6, 3, 12, 10)), np.zeros(6, dtype=int)
    given = {"model": None, "x_batch": x, "y_batch": y, "a_batch": maps}
    ours = torch.from_numpy(maps)
    theirs = quantus.TopKIntersection(k=17, **plain)(**given, s_batch=masks)
    found = top_k_intersection(ours, torch.from_numpy(masks), k=17)
    assert found.tolist() == pytest.approx(theirs)
    theirs = quantus.RelevanceRankAccuracy(**plain)(**given, s_batch=masks)
    assert relevance_rank(ours, torch.from_numpy(masks)).tolist() == pytest.approx(theirs)
    theirs = quantus.Sparseness(**{**plain, "abs": True})(**given)
    assert sparseness(ours).tolist() == pytest.approx(theirs, abs=1e-6)  # they add 1e-7
