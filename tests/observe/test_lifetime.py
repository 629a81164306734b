"""Nothing of a run outlives it: no operand, no graph, no copy of the inputs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from captum_attn import AttentionRollout, GenericAttention, VTranM
from captum_attn.errors import AttnError
from captum_attn.observe.capture import tap as tap_file
from captum_attn.observe.streams.wiring import Wiring
from tests.attr.hard import METHODS, REFUSED
from tests.zoo import ZOO


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Whatever is freed is freed by its reference count, at once."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def refs(monkeypatch: pytest.MonkeyPatch) -> dict[str, weakref.ref]:
    """Weak references to all that is large in a run."""
    found: dict[str, weakref.ref] = {}
    plain = Wiring.__init__

    def wired(self: Wiring, tap: Any, graph: Any, *more: Any) -> None:
        plain(self, tap, graph, *more)
        found.update(tap=weakref.ref(tap), graph=weakref.ref(graph), wiring=weakref.ref(self))
        for call in tap.calls:
            for name in "qkv":
                found[f"{name} of {call.module}"] = weakref.ref(getattr(call, name))
        found.update({f"leaf {i}": weakref.ref(x.tensor) for i, x in enumerate(tap.leaves)})

    monkeypatch.setattr(Wiring, "__init__", wired)
    return found


def alive(refs: dict[str, weakref.ref]) -> list[str]:
    return [name for name, ref in refs.items() if ref() is not None]


@pytest.mark.parametrize("entry", ["attribute", "attribute_tokens", "relevance_maps", "describe"])
@pytest.mark.parametrize("method", [GenericAttention, AttentionRollout, VTranM])
@pytest.mark.parametrize("name", ["vit_cls", "bert"])
def test_a_run_is_freed_when_its_result_is_there(method, entry, name, refs, no_collector):
    case = ZOO[name]
    explain = method(case.model())
    result = getattr(explain, entry)(case.sample().inputs, 1)
    assert len(refs) > 8
    assert alive(refs) == []
    del result


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name, kind in (("vit_cls", "classifiers"), ("bert", "texts"))
     for method in METHODS if method not in REFUSED[kind]],
)  # fmt: skip
def test_no_method_leaves_a_tensor_or_a_cycle(name, method):
    case, method = ZOO[name], METHODS[method]
    explain, inputs = method(case.model()), case.sample().inputs
    explain.attribute(inputs, 1)
    gc.collect(0)
    with only_what_comes():
        explain.attribute(inputs, 1)
        assert tensors_alive() == 0
        assert gc.collect() == 0


def test_a_run_of_many_targets_is_freed_with_its_iterator(refs, no_collector):
    case = ZOO["bert"]
    results = GenericAttention(case.model()).attribute_each(case.sample().inputs, [0, 1, 2])
    next(results)
    assert alive(refs)
    del results
    assert alive(refs) == []


def test_a_run_that_fails_is_freed_with_its_error(refs, no_collector):
    case = ZOO["vit_cls"]
    with pytest.raises(AttnError) as error:
        GenericAttention(case.model()).attribute(case.sample().inputs, 99)
    assert len(refs) > 8
    del error
    assert alive(refs) == []


def test_a_copy_of_the_inputs_is_freed(no_collector):
    model = ZOO["vit_cls"].model()
    images, entered = ZOO["vit_cls"].sample().inputs, []
    handle = model.register_forward_pre_hook(lambda _, args: entered.append(weakref.ref(args[0])))
    try:
        GenericAttention(model).attribute(images, 1)
    finally:
        handle.remove()
    (ref,) = entered
    assert ref() is None


class Products(nn.Module):
    """Makes a product that could be QK^T, drops it and looks whether its factors are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        for scale in range(3):
            query, key = x * (scale + 1), x + scale
            product = (query @ key.mT).softmax(-1)
            factors = {"query": weakref.ref(query), "key": weakref.ref(key)}
            del query, key
            assert all(ref() is not None for ref in factors.values())
            del product
            self.left += [name for name, ref in factors.items() if ref() is not None]
        return ((x @ x.mT).softmax(-1) @ x)[:, 0]


def test_the_factors_of_a_product_are_freed_with_it(no_collector):
    """While the model still runs: many scores would add up."""
    products = Products()
    model = nn.Sequential(products, nn.Linear(4, 3))
    GenericAttention(model).attribute(torch.randn(2, 5, 4), 1)
    assert products.left == []


def test_notes_die_with_their_tensors(no_collector):
    tap = tap_file.Tap()
    ids = tap.enter("ids", torch.tensor([[1, 2]]))
    x = tap.enter("x", torch.randn(1, 2, 4).requires_grad_())
    with tap:
        noted = ids + 1, x @ x.mT
    assert (len(tap._provenance), len(tap._scores)) == (2, 1)
    del noted
    assert len(tap._provenance) == 1  # of the ids, which the tap holds
    assert len(tap._scores) == 0


@contextmanager
def only_what_comes() -> Iterator[None]:
    """The collector sees what is made from here on, and frees nothing unasked.

    All that the process holds already, a million objects, need not be looked through each time.
    """
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def tensors_alive() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_300_calls_do_not_grow():
    explain = GenericAttention(nn.Sequential(nn.Embedding(9, 4), Products(), nn.Linear(4, 3)))
    ids = torch.randint(9, (2, 12))

    def call(i: int) -> None:
        explain.attribute(ids[:, i % 7 :], i % 3)  # lengths that come and go

    for i in range(14):
        call(i)
    hooks = len(every_module._global_forward_hooks)
    with only_what_comes():
        for i in range(300):
            call(i)
        gc.collect()
        assert tensors_alive() == 0
    assert len(every_module._global_forward_hooks) == hooks


def test_a_replaced_tensor_of_the_run_gives_its_id_free():
    """Else another tensor that gets the id is taken for the model's weight."""
    from captum_attn.observe.capture.own_state import OwnState

    layer = torch.nn.Linear(2, 2)
    own = OwnState([layer])
    (first,), _ = own.arguments(torch.relu, (layer.weight,), {})
    (second,), _ = own.arguments(torch.Tensor.mul_, (layer.weight, 2), {})[0][:1], {}
    assert first is not second and first is not layer.weight and second is not layer.weight
    assert own.result(second) is layer.weight
    assert own.result(first) is first
