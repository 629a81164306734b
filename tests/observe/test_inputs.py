"""Inputs whose rows are no examples, whose ids are not looked up as given, or that enter twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_attn import (
    AttentionRollout,
    GenericAttention,
    HeterogenousAttention,
    VTranM,
)

METHODS = [GenericAttention, AttentionRollout, HeterogenousAttention, VTranM]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)


def encoder(layers: int = 2, width: int = 16) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def attributed(method: Any, model: nn.Module, inputs: Any, **options: Any) -> Any:
    if method is not AttentionRollout:
        options.setdefault("target", 1)
    return method(model.eval()).attribute(inputs, **options)


class Words(nn.Module):
    """Ids become vectors by `lookup(model, ids)`, (B, n, 16)."""

    def __init__(self, lookup: Callable[[Words, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.lookup = nn.Parameter(torch.randn(50, 16)), lookup
        self.encoder, self.head = encoder(), nn.Linear(16, 3)
        self.register_buffer("offset", torch.tensor([0, 10, 20, 30, 0, 10]))
        self.register_buffer("remap", torch.arange(50).flip(0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.lookup(self, ids))[:, 0])


def ordinary(model: Words, ids: Tensor) -> Tensor:
    return F.embedding(ids, model.table)


def written(model: Words, ids: Tensor) -> Tensor:
    one_hot = torch.zeros(*ids.shape, 50)
    return one_hot.scatter(-1, ids[..., None], 1.0) @ model.table


IDS = torch.randint(0, 10, (2, 6), generator=torch.Generator().manual_seed(0))
LOOKUPS: dict[str, Callable[[Words, Tensor], Tensor]] = {
    "W[ids]": lambda m, ids: m.table[ids],
    "W[ids, :]": lambda m, ids: m.table[ids, :],
    "index_select": lambda m, ids: m.table.index_select(0, ids.flatten()).view(*ids.shape, -1),
    "gather": lambda m, ids: m.table.gather(
        0, ids.flatten()[:, None].expand(-1, 16)
    ).view(*ids.shape, 16),
    "one_hot @ W": lambda m, ids: F.one_hot(ids, 50).float() @ m.table,
    "scattered one_hot @ W": written,
    "bags of one": lambda m, ids: F.embedding_bag(ids.view(-1, 1), m.table).view(*ids.shape, 16),
    "bags by offsets": lambda m, ids: F.embedding_bag(
        ids.flatten(), m.table, torch.arange(ids.numel()), mode="sum"
    ).view(*ids.shape, 16),
}  # fmt: skip


@every_method
@pytest.mark.parametrize("kind", LOOKUPS)
def test_a_lookup_in_another_form_is_the_embedding(kind: str, method: Any) -> None:
    found = attributed(method, Words(LOOKUPS[kind]), IDS)
    torch.testing.assert_close(found, attributed(method, Words(ordinary), IDS))


def overwritten(ids: Tensor) -> Tensor:
    shifted = ids.new_zeros(ids.shape)
    shifted[:, 1:] = ids[:, :-1].clone()
    shifted[:, 0] = 7
    return shifted.masked_fill_(shifted == -100, 1)


def into_a_view(ids: Tensor) -> Tensor:
    shifted = torch.full_like(ids, 7)
    shifted[:, 1:].copy_(ids[:, :-1])
    return shifted


def in_place(ids: Tensor) -> Tensor:
    ids += 10
    ids[:, 1:].add_(1)
    return ids


# what the model makes of its ids -> the element (of 6) that each looked-up id was, -1: none
MOVED: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "offset": (lambda ids: ids + torch.tensor([0, 10, 20, 30, 0, 10]), [0, 1, 2, 3, 4, 5]),
    "remapped": (lambda ids: torch.arange(50).flip(0)[ids], [0, 1, 2, 3, 4, 5]),
    "halved": (lambda ids: ids // 2, [0, 1, 2, 3, 4, 5]),
    "bucketed": (lambda ids: (ids * 7 + 3) % 50, [0, 1, 2, 3, 4, 5]),
    "clamped": (lambda ids: ids.clamp(max=3), [0, 1, 2, 3, 4, 5]),
    "cast": (lambda ids: ids.int().float().long(), [0, 1, 2, 3, 4, 5]),
    "replaced": (lambda ids: torch.where(ids == 3, 49, ids), [0, 1, 2, 3, 4, 5]),
    "begun": (lambda ids: torch.where(torch.arange(6) == 0, 49, ids), [-1, 1, 2, 3, 4, 5]),
    "trimmed": (lambda ids: ids[:, :4], [0, 1, 2, 3]),
    "prefixed": (lambda ids: F.pad(ids, (2, 0), value=7), [-1, -1, 0, 1, 2, 3, 4, 5]),
    "joined": (lambda ids: torch.cat([ids[:, :1] * 0 + 5, ids], 1), [-1, 0, 1, 2, 3, 4, 5]),
    "rolled": (lambda ids: ids.roll(1, 1), [5, 0, 1, 2, 3, 4]),
    "flipped": (lambda ids: ids.flip(1), [5, 4, 3, 2, 1, 0]),
    "strided": (lambda ids: ids[:, ::2], [0, 2, 4]),
    "overwritten": (overwritten, [-1, 0, 1, 2, 3, 4]),
    "into a view": (into_a_view, [-1, 0, 1, 2, 3, 4]),
    "in place": (in_place, [0, 1, 2, 3, 4, 5]),
    "twice": (lambda ids: torch.cat([ids, ids[:, 1:4]], 1), [0, 1, 2, 3, 4, 5, 1, 2, 3]),
}


@every_method
@pytest.mark.parametrize("kind", MOVED)
def test_ids_that_are_moved_before_the_lookup_keep_their_relevance(kind: str, method: Any) -> None:
    """Each id gets what the looked-up ids that it has become get where they are given."""
    moved, elements = MOVED[kind]
    ids = IDS.clone()
    found = attributed(method, Words(lambda m, ids: ordinary(m, moved(ids))), ids)
    assert torch.equal(ids, IDS)  # the model writes into its own copy
    given = attributed(method, Words(ordinary), moved(IDS.clone()))
    expected = torch.zeros(2, 6)
    for place, element in enumerate(elements):
        if element >= 0:
            expected[:, element] += given[:, place]
    torch.testing.assert_close(found, expected)


def test_equal_ids_are_told_apart() -> None:
    """By where they were, not by their value."""
    ids = torch.full((1, 4), 3)
    model = Words(lambda m, ids: ordinary(m, ids.flip(1)) + torch.arange(4.0)[:, None])
    straight = Words(lambda m, ids: ordinary(m, ids) + torch.arange(4.0)[:, None])
    found, given = (attributed(GenericAttention, m, ids) for m in (model, straight))
    assert found.unique().numel() == 4
    torch.testing.assert_close(found, given.flip(1))


class Table(nn.Module):
    """Categories with an offset and numbers, both integers, as rows behind a learned [CLS]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.category = nn.Embedding(30, 16)
        self.slope, self.start = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(4, 16))
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.encoder, self.head = encoder(), nn.Linear(16, 2)
        self.register_buffer("offset", torch.tensor([0, 10, 20]))

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        columns = self.category(categories + self.offset)
        rows = numbers[..., None] * self.slope + self.start
        rows = torch.cat([self.cls.expand(len(columns), -1, -1), columns, rows], 1)
        return self.head(self.encoder(rows)[:, 0])


@every_method
def test_integer_numbers_get_what_floats_get(method: Any) -> None:
    model, categories = Table(), torch.randint(0, 10, (2, 3))
    numbers = torch.randint(1, 9, (2, 4))
    as_integers = attributed(method, model, {"categories": categories, "numbers": numbers})
    as_floats = attributed(method, model, {"categories": categories, "numbers": numbers.float()})
    assert set(as_integers) == {"categories", "numbers"}
    for name, found in as_integers.items():
        assert found.any()
        torch.testing.assert_close(found, as_floats[name])


class Pictures(nn.Module):
    """(B, 3, 16, 16) or (B, 16, 16, 3) pictures of bytes, normalised by the model."""

    def __init__(self, normalise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.normalise, self.patch = normalise, nn.Conv2d(3, 16, 4, 4)
        self.encoder, self.head = encoder(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patch(self.normalise(x)).flatten(2).mT)[:, 0])


MEAN = torch.tensor([100.0, 110.0, 120.0]).view(3, 1, 1)
BYTES: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": lambda x: x.float() / 255,
    "divided": lambda x: x / 255,
    "subtracted": lambda x: (x - MEAN) / 50,
    "written": lambda x: torch.zeros(x.shape).copy_(x) / 255,
    "cropped": lambda x: F.pad(x[:, :, 4:], (0, 0, 4, 0)) / 255,
    "channels last": lambda x: x.permute(0, 3, 1, 2).to(torch.float32) / 255,
}


@pytest.mark.parametrize("kind", BYTES)
def test_a_picture_of_bytes_gets_what_a_picture_of_floats_gets(kind: str) -> None:
    shape = (2, 16, 16, 3) if kind == "channels last" else (2, 3, 16, 16)
    picture = torch.randint(0, 256, shape, dtype=torch.uint8)
    model = Pictures(BYTES[kind])
    found = attributed(GenericAttention, model, picture, interpolation="nearest")
    assert found.dtype == torch.float32 and found.any()
    expected = attributed(GenericAttention, model, picture.float(), interpolation="nearest")
    torch.testing.assert_close(found, expected)


def test_arithmetic_in_place_on_an_input() -> None:
    def in_place(x: Tensor) -> Tensor:
        x -= 100
        return x.div_(50)

    x = torch.rand(2, 3, 16, 16) * 255
    before = x.clone()
    found = attributed(GenericAttention, Pictures(in_place), x)
    assert torch.equal(x, before)
    expected = attributed(GenericAttention, Pictures(lambda x: (x - 100) / 50), x)
    torch.testing.assert_close(found, expected)
