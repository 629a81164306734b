"""Which module an attention call ran in, told by hooks that last as long as the run."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from captum_attn import GenericAttention, VTranM
from captum_attn.observe.capture.module_stack import ModuleStack


class Attention(nn.Module):
    """(B, n, 16) -> (B, n, 16), with 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """x + attention(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class Model(nn.Module):
    """(B, n, 16) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


NAMES = ["layers.0.attention", "layers.1.attention"]


def hooks() -> list[int]:
    return [
        len(value) for name, value in vars(every_module).items()
        if name.startswith("_global_") and isinstance(value, dict)
    ]  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 16)


def names(forward_func: Any, x: Tensor, method: Any = GenericAttention) -> list[str]:
    return [call.module for call, _ in method(forward_func).layer_maps(x, 1)]


@pytest.mark.parametrize("method", [GenericAttention, VTranM])
def test_the_innermost_module_is_named(method, x):
    assert names(Model().eval(), x, method) == NAMES


def test_a_callable_that_hides_its_model_is_named_from_the_outermost_that_runs(x):
    models = {"it": Model().eval()}
    assert names(lambda x: models["it"](x), x) == NAMES


def test_a_module_around_the_attribution_is_not_taken_for_the_model(x):
    """As in a LightningModule whose validation step explains the model that it holds."""

    class Lightning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model().eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def validation_step(self, x: Tensor) -> list[str]:
            return names(lambda x: models["it"](x), x)

    around = Lightning()
    models = {"it": around.model}
    assert around.validation_step(x) == NAMES
    assert names(around, x) == [f"model.{name}" for name in NAMES]


def test_two_threads_on_one_model_see_their_own_modules(x):
    """Each waits inside a layer until the other one is inside another layer."""
    model, found, together = Model().eval(), {}, threading.Barrier(2)

    def wait(module, inputs):
        together.wait(timeout=60)

    def explain(layers):
        found[layers] = names(model, x)

    for layer in model.layers:
        layer.register_forward_pre_hook(wait)
    threads = [threading.Thread(target=explain, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: NAMES, 1: NAMES}


def test_what_another_thread_runs_is_passed_by(x):
    model = Model().eval()
    with ModuleStack(model) as modules:
        seen: list[str] = []
        model.head.register_forward_pre_hook(lambda *_: seen.append(modules.name()))
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()
        model(x)
    assert seen == ["-", "head"]


def test_hooks_of_the_user_run_beside_ours(x):
    model, order = Model().eval(), []
    everywhere = every_module.register_module_forward_hook(
        lambda module, inputs, output: order.append(type(module).__name__)
    )
    model.layers[1].register_forward_pre_hook(lambda *_: order.append("before"))
    model.layers[1].register_forward_hook(lambda *_: order.append("after"))
    try:
        before = hooks()
        assert names(model, x) == NAMES
        assert hooks() == before
    finally:
        everywhere.remove()
    assert order.index("before") < order.index("after")
    assert order.count("Layer") == 2
    assert order.count("Attention") == 2


class Swallows(Model):
    """Goes on without what failed: a module, one inside another, one whose input does not fit."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.broken = nn.Sequential(nn.Identity(), Failing(error))
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        for failing in (self.broken, self.head, self.layers[0].attention):
            with suppress(self.error, RuntimeError):
                failing(x[..., :7])
        return super().forward(x)


class Failing(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error("on purpose")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_that_the_model_swallows(error, x):
    assert names(Swallows(error).eval(), x) == NAMES


def test_a_hook_of_the_user_that_fails_before_ours(x):
    """Then ours is told of a module's end, but not of its beginning."""
    model = Model().eval()
    spare = Attention()

    def refuse(module, inputs):
        if module is spare:
            raise RuntimeError("not this one")

    def forward(x):
        return model(x)

    def attempt(module, inputs):
        with suppress(RuntimeError):
            spare(*inputs)

    handle = every_module.register_module_forward_pre_hook(refuse)
    model.layers[1].attention.register_forward_pre_hook(attempt)
    try:
        assert names(forward, x) == NAMES
    finally:
        handle.remove()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_hooks_are_gone_after_an_exception(error, x):
    model, before = nn.Sequential(Layer(), Failing(error)), hooks()
    with pytest.raises(error, match="on purpose"):
        GenericAttention(model).attribute(x, target=1)
    assert hooks() == before


@pytest.mark.filterwarnings("error:Using `torch.compile")
def test_compiled_models_and_parts(x):
    """Which would warn of hooks on all modules."""
    whole, part = Model().eval(), Model().eval()
    part.layers[1] = torch.compile(part.layers[1], backend="eager")
    found = names(torch.compile(whole, backend="eager"), x)
    assert found == [f"_orig_mod.{name}" for name in NAMES]
    assert names(part, x) == [NAMES[0], "layers.1._orig_mod.attention"]
    assert not any(module._forward_hooks for module in (*whole.modules(), *part.modules()))


def test_a_module_that_runs_itself_again(x):
    """Its name is given back when the inner run is over."""

    class Twice(Model):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            inner = self(x, again=False) if again else 0
            return super().forward(x) + inner

    assert names(Twice().eval(), x) == NAMES * 2
