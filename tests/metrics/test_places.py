"""Where the most relevant token should be: hit, rank and share against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_attn.errors import InputError
from captum_attn.metrics import place_hit, place_rank, place_share


def plain_rank(scores: list[float], place: list[int], counted: list[int]) -> int:
    """By sorting: the largest first, equal ones as they stand."""
    order = sorted((i for i, c in enumerate(counted) if c), key=lambda i: (-scores[i], i))
    return min(order.index(i) for i in range(len(scores)) if place[i] and counted[i]) + 1


def test_they_are_those_of_plain_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (200, 7), generator=draw).double()  # many are equal
    counted = torch.rand(200, 7, generator=draw) > 0.2
    counted[:, 3] = True
    place = (torch.rand(200, 7, generator=draw) > 0.7) & counted
    place[:, 3] |= ~place.any(1)
    ranks = place_rank(scores, place, counted)
    for row, score, at, counts in zip(
        ranks.tolist(), scores.tolist(), place.tolist(), counted.tolist(), strict=True
    ):
        assert row == plain_rank(score, at, counts)
    assert torch.equal(place_hit(scores, place, counted), (ranks == 1).double())
    share = place_share(scores, place, counted)
    for i in range(200):
        positive = [
            max(s, 0.0) * c for s, c in zip(scores[i].tolist(), counted[i].tolist(), strict=True)
        ]
        inside = sum(p for p, at in zip(positive, place[i].tolist(), strict=True) if at)
        assert share[i].item() == pytest.approx(inside / sum(positive) if sum(positive) else 0.0)


@pytest.mark.parametrize("measure", [place_hit, place_rank, place_share])
def test_padding_counts_nowhere_and_embeddings_are_summed(measure) -> None:
    scores, place = torch.tensor([[9.0, 1.0, 3.0, 2.0]]), torch.tensor([[0, 0, 1, 0]])
    mask = torch.tensor([[0, 1, 1, 1]])
    alone = measure(scores[:, 1:], place[:, 1:])
    assert torch.equal(measure(scores, place, mask), alone)
    spread = torch.stack([scores / 2, scores / 2], -1)
    torch.testing.assert_close(measure({"ids": spread}, place, mask), alone)


def test_a_map_without_relevance_has_no_share_and_no_hit_but_for_the_first() -> None:
    none, place = torch.zeros(1, 3), torch.tensor([[0, 1, 0]])
    assert place_share(none, place).item() == 0 and place_hit(none, place).item() == 0
    assert place_rank(none, place).item() == 2


def test_no_place_is_refused() -> None:
    with pytest.raises(InputError, match="example 1 has no marked token"):
        place_hit(torch.rand(2, 3), Tensor([[1, 0, 0], [0, 0, 0]]))
