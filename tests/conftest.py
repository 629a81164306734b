"""Fixtures shared by all tests: one thread, a known seed, and that a model is left as found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from captum_attn.attr import AttentionAttribution
from tests.zoo import SHARED, kind_of

PLAIN = (bool, int, float, str, type(None), torch.dtype)
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--block-size", type=int, help="form every attention map this many queries at a time"
    )


@pytest.fixture(scope="session", autouse=True)
def blocks(request: pytest.FixtureRequest) -> None:
    """`pytest --block-size 2` holds the blocked form to every test."""
    size = request.config.getoption("--block-size")
    if size is not None:
        monkeypatch = pytest.MonkeyPatch()
        settle = AttentionAttribution.Options.settle.__func__
        monkeypatch.setattr(
            AttentionAttribution.Options,
            "settle",
            classmethod(lambda cls, given, *of: settle(cls, {"block_size": size, **given}, *of)),
        )
        request.addfinalizer(monkeypatch.undo)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def shared_models_stay() -> Iterator[None]:
    """A test that changes a model of the zoo that other tests are given fails itself."""
    SHARED.clear()
    yield
    changed = [case.name for case, kind in SHARED.items() if kind_of(case.model()) != kind]
    assert not changed, f"changed for the tests that follow: {changed}; use `Model.fresh`"


def pairs(names: Iterable[str], methods: Iterable[str]) -> pytest.MarkDecorator:
    """`name` and `method` of a test that takes long in sum: all pairs, three of four `slow`.

    In the fast suite each method meets every fourth model, and each model every fourth method.
    """
    fast, slow = (), pytest.mark.slow
    return pytest.mark.parametrize(
        ("name", "method"),
        [
            pytest.param(name, method, marks=slow if (i + j) % 4 else fast, id=f"{name}-{method}")
            for i, name in enumerate(names)
            for j, method in enumerate(methods)
        ],
    )


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def kept(tensor: Tensor | None) -> Any:
    """A copy of the numbers, in a form in which NaN equals NaN."""
    if tensor is None:
        return None
    raw = tensor.detach().clone().contiguous().flatten()
    return tuple(tensor.shape), tensor.dtype, bytes(raw.view(torch.uint8).numpy())


def state_of(model: nn.Module, *inputs: Any) -> dict[str, Any]:
    """All that an attribution could leave behind, in comparable form."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, PLAIN)}
        state[f"module {name}"] = type(module), plain, sorted(vars(module))
        state[f"hooks of {name}"] = {kind: list(getattr(module, kind)) for kind in HOOKS}
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            attention = getattr(config, "_attn_implementation", None)
            state[f"config of {name}"] = config.to_dict(), attention
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[f"tensor {name}"] = (
            id(tensor), tensor.requires_grad, tensor.is_leaf, kept(tensor), id(tensor.grad),
            kept(tensor.grad), bool(tensor._backward_hooks),
        )  # fmt: skip
    for i, tensor in enumerate(tensors(inputs)):
        state[f"input {i}"] = tensor.requires_grad, tensor.is_leaf, kept(tensor), kept(tensor.grad)
    every = torch.nn.modules.module
    state["hooks of all modules"] = {
        kind: list(getattr(every, kind)) for kind in vars(every) if kind.startswith("_global_")
        and isinstance(getattr(every, kind), dict)
    }  # fmt: skip
    state["random numbers"] = kept(torch.get_rng_state()), random.getstate()
    state["modes"] = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.autograd.graph.saved_tensors_hooks is _SAVED_TENSORS_HOOKS,
    )
    state["functions"] = {name: getattr(F, name) for name in _FUNCTIONS} | {
        "checkpoint": torch.utils.checkpoint.checkpoint,
        "matmul": torch.matmul,
        "torch.softmax": torch.softmax,
        "Tensor.softmax": Tensor.softmax,
        "call": nn.Module.__call__,
    }
    return state


_SAVED_TENSORS_HOOKS = torch.autograd.graph.saved_tensors_hooks
_FUNCTIONS = (
    "softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "embedding",
    "dropout", "linear",
)  # fmt: skip


@contextmanager
def _left_as_found(model: nn.Module, *inputs: Any) -> Iterator[None]:
    before = state_of(model, *inputs)
    try:
        yield
    finally:
        after = state_of(model, *inputs)
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        assert not changed, f"changed by the attribution: {changed}"


def skip_unless_double_runs(run: Callable[[], Any]) -> None:
    """transformers 4.48 fills causal masks of float32 with the smallest number of float64."""
    try:
        run()
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        pytest.skip("this version of transformers cannot run the model in float64")


@pytest.fixture
def left_as_found() -> Callable[..., AbstractContextManager[None]]:
    """`with left_as_found(model, inputs): ...`, also when the block raises."""
    return _left_as_found


@contextmanager
def _in_use(model: nn.Module) -> Iterator[None]:
    """Puts a model in the middle of someone's work: gradients there, some parameters frozen."""
    parameters = list(model.parameters())
    flags = [p.requires_grad for p in parameters]
    try:
        for i, parameter in enumerate(parameters):
            if i % 3 == 0 and parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.5)
            if i % 4 == 1:
                parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)


@pytest.fixture
def in_use() -> Callable[[nn.Module], AbstractContextManager[None]]:
    return _in_use
