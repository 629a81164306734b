"""Several threads at once: numbers, models, random numbers and the process as with one thread."""

from __future__ import annotations

import copy
import os
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_attn import AttentionRollout, AttnLRP, GenericAttention, VTranM
from captum_attn.errors import AttnError
from tests.attr.hard import METHODS, REFUSED
from tests.zoo import ZOO, bert

THREADS = 4
few_or_many_rounds = pytest.mark.parametrize(
    "rounds", [10, pytest.param(50, marks=pytest.mark.slow)]
)
pytestmark = pytest.mark.filterwarnings("ignore:the model is in train mode")


def at_once(*work: Callable[[], None]) -> None:
    """Runs all of `work`, each in a thread of its own; raises what any of them raised."""
    errors: list[BaseException] = []
    together = threading.Barrier(len(work), timeout=60)

    def run(one: Callable[[], None]) -> None:
        try:
            together.wait()
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    if errors:
        raise errors[0]


class Busy(nn.Module):
    """All that a run has to leave alone: statistics, dropout, a counter, a table that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.model = ZOO["by_matmul"].fresh()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("table", torch.zeros(1))
        self.register_buffer("last", torch.zeros(3, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last[:, :2].fill_(float(self.calls))
        if len(self.table) < x.shape[1]:
            self.table = torch.linspace(0, 1, x.shape[1])
            self.register_buffer("made", torch.ones(1))
        x = x + self.table[: x.shape[1], None] + self.last[0, 0] / self.calls
        return self.model(self.drop(self.norm(x.mT).mT))


def flex_bert() -> nn.Module:
    model = bert().eval()
    model.config._attn_implementation = "flex_attention"
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "vit": (ZOO["vit_cls"].fresh, lambda: ZOO["vit_cls"].sample().inputs),
    "flex": (flex_bert, lambda: ZOO["bert"].sample().inputs),
    "busy": (lambda: Busy().train(), lambda: ZOO["by_matmul"].sample().inputs),
    "busy, eval": (lambda: Busy().eval(), lambda: ZOO["by_matmul"].sample().inputs),
}


def rows(explain: Any, inputs: Any, target: int) -> list[Tensor]:
    return list(explain.attribute_tokens(inputs, target).values())


@few_or_many_rounds
@pytest.mark.parametrize("shared", [False, True], ids=["objects", "one object"])
@pytest.mark.parametrize("name", MODELS)
def test_four_threads_on_one_model(name, shared, rounds, left_as_found):
    make, sample = MODELS[name]
    model, inputs = make(), sample()
    torch.manual_seed(5)
    expected = [rows(GenericAttention(model), inputs, target) for target in range(2)]
    found: dict[int, list[Any]] = {i: [] for i in range(THREADS)}
    one = GenericAttention(model)

    def explain(i: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(rounds):
                explainer = one if shared else GenericAttention(model)
                found[i].append(rows(explainer, inputs, i % 2))

        return work

    with left_as_found(model, inputs):
        at_once(*(explain(i) for i in range(THREADS)))
    for i, results in found.items():
        for result in results:
            for a, b in zip(result, expected[i % 2], strict=True):
                assert torch.equal(a, b)


@few_or_many_rounds
def test_four_threads_on_several_models_and_methods(rounds, left_as_found):
    methods = [GenericAttention, AttentionRollout, VTranM, AttnLRP]
    cases = [
        (method, make(), sample())
        for method, (make, sample) in zip(methods, MODELS.values(), strict=True)
    ]
    torch.manual_seed(5)
    expected = [rows(method(model), inputs, 1) for method, model, inputs in cases]
    found: list[list[Any]] = [[] for _ in cases]

    def explain(i: int) -> Callable[[], None]:
        method, model, inputs = cases[i]

        def work() -> None:
            for _ in range(rounds):
                found[i].append(rows(method(model), inputs, 1))

        return work

    with left_as_found(nn.ModuleList(model for _, model, _ in cases)):
        at_once(*(explain(i) for i in range(THREADS)))
    for results, right in zip(found, expected, strict=True):
        for result in results:
            for a, b in zip(result, right, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(
    "method", [m for m in METHODS.values() if m.__name__ not in REFUSED["texts"]],
    ids=lambda method: method.__name__,
)  # fmt: skip
def test_every_method_in_four_threads_on_one_model(method, left_as_found):
    model, inputs = ZOO["bert"].fresh(), ZOO["bert"].sample().inputs
    expected = [rows(method(model), inputs, target) for target in range(THREADS)]
    found: dict[int, list[Any]] = {i: [] for i in range(THREADS)}

    def explain(i: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(2):
                found[i].append(rows(method(model), inputs, i))

        return work

    with left_as_found(model, inputs):
        at_once(*(explain(i) for i in range(THREADS)))
    for i, results in found.items():
        for result in results:
            for a, b in zip(result, expected[i], strict=True):
                assert torch.equal(a, b)


def test_one_object_that_explains_inputs_of_many_shapes():
    """What it remembers of one shape is not taken for another's that another thread explains."""
    model = ZOO["by_matmul"].model()
    inputs = ZOO["by_matmul"].sample().inputs
    cases = [inputs[:b, :n] for b in (1, 2, 3) for n in (3, 4, 5)]
    expected = [GenericAttention(model).attribute(x, 1) for x in cases]
    one, found = GenericAttention(model), []

    def work() -> None:
        for i, x in enumerate(cases * 5):
            found.append((i % len(cases), one.attribute(x, 1)))

    at_once(*[work] * THREADS)
    assert len(found) == THREADS * 5 * len(cases)
    for i, result in found:
        assert torch.equal(result, expected[i])


@pytest.mark.parametrize("name", ["vit", "busy"])
def test_numbers_that_other_threads_draw_do_not_come_again(name):
    make, sample = MODELS[name]
    model, inputs, drawn = make(), sample(), []
    done = threading.Event()

    def explain() -> None:
        while not done.is_set():
            GenericAttention(model).attribute_tokens(inputs, 1)

    def draw() -> None:
        for _ in range(200):
            drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
            threading.Event().wait(0.001)
        done.set()

    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    at_once(explain, draw)
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    alone = [(float(torch.rand(())), float(np.random.rand()), random.random()) for _ in range(200)]
    assert drawn == alone


@pytest.mark.parametrize("name", ["vit", "busy"])
def test_a_thread_that_trains_the_model_is_not_disturbed(name):
    """Its losses and weights are those of a training alone; an explanation is right or refused."""
    make, sample = MODELS[name]
    start, inputs = make().train(), sample()

    def train(model: nn.Module, losses: list[float]) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(30):
            output = model(inputs)
            loss = (output[:, 0] - output[:, 1]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            assert all(p.requires_grad for p in model.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))

    alone, beside, refused = [], [], []
    reference, model = copy.deepcopy(start), copy.deepcopy(start)
    torch.manual_seed(1)
    train(reference, alone)
    done = threading.Event()

    def explain() -> None:
        while not done.is_set():
            try:
                found = GenericAttention(model).attribute_tokens(inputs, 1)
                assert all(bool(rows.isfinite().all()) for rows in found.values())
            except AttnError as error:
                assert "weights" in str(error)
                refused.append(error)

    def trains() -> None:
        try:
            train(model, beside)
        finally:
            done.set()

    torch.manual_seed(1)
    at_once(trains, explain, explain)
    assert beside == alone
    for trained, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(trained, expected)
    assert refused


def test_weights_that_change_while_a_run_lasts_are_refused():
    """Whatever changes them: here a hook in the middle of the forward pass."""
    model, inputs = ZOO["vit_cls"].fresh(), ZOO["vit_cls"].sample().inputs

    def step(*_: Any) -> None:
        def write() -> None:
            with torch.no_grad():
                model.head.bias.add_(1)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    model.blocks[1].register_forward_hook(step)
    with pytest.raises(AttnError, match="weights of the model were changed"):
        GenericAttention(model).attribute(inputs, 1)


def test_weights_that_change_between_targets_are_refused():
    model, inputs = ZOO["vit_cls"].fresh(), ZOO["vit_cls"].sample().inputs
    results = GenericAttention(model).attribute_each(inputs, [0, 1, 2])
    next(results)
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(AttnError, match="overwritten: the weights of the model between"):
        list(results)


class Held:
    """A run that waits in the middle of the model until it is let go."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.here = threading.local()
        self._inputs, self._model = inputs, model
        self._thread = threading.Thread(target=self._explain)
        self._handle = next(model.children()).register_forward_hook(self._wait)

    def _explain(self) -> None:
        self.here.it = True
        GenericAttention(self._model).attribute(self._inputs, 1)

    def _wait(self, *_: Any) -> None:
        if getattr(self.here, "it", False):
            self.inside.set()
            assert self.go.wait(timeout=120)

    def __enter__(self) -> Held:
        self._thread.start()
        assert self.inside.wait(timeout=120)
        return self

    def __exit__(self, *error: Any) -> None:
        self.go.set()
        self._thread.join(timeout=120)
        self._handle.remove()


@pytest.mark.parametrize("first_out", [True, False])
def test_the_last_one_out_puts_back_what_is_shared(first_out):
    """Two runs on one model overlap; the one that ends first leaves the other's changes alone."""
    model, inputs = flex_bert(), ZOO["bert"].sample().inputs
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    model.config.use_cache = True
    model.bert.config = model.config

    def shared() -> tuple[Any, ...]:
        flags = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
        stance = torch._dynamo.eval_frame._stance.stance
        return model.config._attn_implementation, model.config.use_cache, any(flags), stance

    import torch._dynamo

    assert shared() == ("flex_attention", True, True, "default")
    one, other = Held(model, inputs), Held(model, inputs)
    with one:
        assert shared() == ("sdpa", False, False, "force_eager")
        with other:
            ends = one if first_out else other
            ends.go.set()
            ends._thread.join(timeout=120)
            assert shared() == ("sdpa", False, False, "force_eager")
    assert shared() == ("flex_attention", True, True, "default")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded")
def test_a_forked_process_begins_with_the_model_as_it_was_found():
    from torch.nn.modules import module as every_module

    model, inputs = flex_bert(), ZOO["bert"].sample().inputs
    model.config.use_cache = True
    with Held(model, inputs):
        assert model.config._attn_implementation == "sdpa"
        child = os.fork()
        if not child:
            right = (
                model.config._attn_implementation == "flex_attention"
                and model.config.use_cache is True
                and not every_module._global_forward_hooks
                and not every_module._global_forward_pre_hooks
                and all(p.requires_grad for p in model.parameters())
            )
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("method", [GenericAttention, VTranM, AttnLRP])
@pytest.mark.parametrize("name", ["vit", "flex", "busy"])
def test_an_explanation_inside_a_hook_of_the_model_that_is_explained(name, method, left_as_found):
    """The one sees nothing of the other."""
    make, sample = MODELS[name]
    model, inputs = make(), sample()
    torch.manual_seed(2)
    expected = rows(method(model), inputs, 1)
    inner: list[list[Tensor]] = []

    def explain(*_: Any) -> None:
        if not inner:
            inner.append([])
            inner[0] = rows(AttentionRollout(model), inputs, 1)
            inner.append(rows(method(model), inputs, 1))

    hook = next(model.modules()).register_forward_hook(explain)
    middle = list(model.children())[-1].register_forward_hook(explain)
    try:
        with left_as_found(model, inputs):
            found = rows(method(model), inputs, 1)
    finally:
        hook.remove()
        middle.remove()
    assert len(inner) == 2
    for a, b, c in zip(found, inner[1], expected, strict=True):
        assert torch.equal(a, c)
        assert model.training or torch.equal(b, c)  # it draws other numbers for its dropout


def test_an_explanation_inside_a_training_step():
    """The gradients are those of the step without it."""
    model, inputs = ZOO["vit_cls"].fresh().train(), ZOO["vit_cls"].sample().inputs
    model(inputs).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    busy: list[bool] = []

    def explain(*_: Any) -> None:
        if not busy:
            busy.append(True)
            GenericAttention(model).attribute(inputs, 1)

    handle = model.blocks[1].register_forward_hook(explain)
    model(inputs).square().sum().backward()
    handle.remove()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
