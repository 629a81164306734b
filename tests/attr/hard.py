"""Every public call of every attention method with right arguments, and values that are wrong.

    python -m tests.attr.hard         # one wrong value after the other: counts what came of them
    python -m tests.attr.hard 50      # every 50th of them

A call has to return numbers that are there, or to raise an `AttnError`. What a model says when it
is given what it cannot take (raised inside a module's forward) comes through as it is. The model
is as it was found in either case.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_attn import attr, objectives
from captum_attn.attr import AttentionAttribution
from tests.metrics import hard as metrics_hard

METHODS = {
    name: value
    for name, value in vars(attr).items()
    if isinstance(value, type) and issubclass(value, AttentionAttribution)
    and value is not AttentionAttribution
}  # fmt: skip
# Methods for a kind of model or input, which refuse a classifier, or one of texts.
REFUSED = {"classifiers": {"Odam"}, "texts": {"Odam", "VitCX"}}
ENTRIES = (
    "attribute", "attribute_tokens", "attribute_each", "attribute_tokens_each", "relevance_maps",
    "layer_maps", "describe",
)  # fmt: skip


class Layer(nn.Module):
    """x + attention(x), then x + mlp(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, key_padding_mask=hidden)[0]
        return x + self.mlp(self.norms[1](x))


class Pictures(nn.Module):
    """(B, 3, 8, 8) -> (B, 3), from the mean of 4 patches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.layer, self.head = nn.Conv2d(3, 8, 4, 4), Layer(), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(self.patches(images).flatten(2).mT).mean(1))


class Texts(nn.Module):
    """Ids (B, n), mask (B, n) -> (B, n, 3), read at every token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer, self.head = nn.Embedding(9, 8), Layer(), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = None if attention_mask is None else attention_mask == 0
        return self.head(self.layer(self.words(input_ids), hidden))


IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]])
CASES: dict[str, tuple[nn.Module, Any, Any]] = {
    "pictures": (Pictures().eval(), torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8), 1),
    "texts": (Texts().eval(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, (0, 1)),
    "ids": (Texts().eval(), IDS, (4, 2)),
}


def calls() -> dict[str, tuple[Callable, dict[str, Any]]]:
    """name -> (a public call of a method, the arguments of a right one)."""
    found: dict[str, tuple[Callable, dict[str, Any]]] = {}
    for case, (model, inputs, target) in CASES.items():
        for name, method in METHODS.items():
            for entry in ENTRIES:
                targets = {"targets": [target, target]} if "_each" in entry else {"target": target}
                call = _call(method, model, entry)
                found[f"{name}.{entry} of {case}"] = call, {"inputs": inputs, **targets}
    return found


def _call(method: Any, model: nn.Module, entry: str) -> Callable:
    plain = getattr(method(model), entry)

    def call(*, layers: Any = None, forward_func: Any = model, **arguments: Any) -> Any:
        result = getattr(method(forward_func, layers), entry)(**arguments)
        if "_each" in entry:
            return list(result)
        return str(result) if entry == "describe" else result

    call.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    return call


def wrong_values() -> dict[str, Any]:
    """What people pass by mistake."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of tensors that torch calls prototypes
        return _wrong_values()


def _wrong_values() -> dict[str, Any]:
    images = CASES["pictures"][1]
    return metrics_hard.wrong_values() | {
        "images": images, "the wrong rows": images[:1], "no examples": images[:0],
        "too few axes": images[0], "nan pixels": images * float("nan"), "integers": images.long(),
        "flags": images > 0, "half": images.half(), "double": images.double(),
        "a sparse image": images.to_sparse(), "a meta image": images.to("meta"),
        "a quantised image": torch.quantize_per_tensor(images, 0.1, 0, torch.qint8),
        "a nested tensor": torch.nested.nested_tensor([images[0], images[1]]),
        "an 8-bit float": images.to(torch.float8_e4m3fn), "an int key": {0: images},
        "a sparse row": images.flatten(1).to_sparse_csr(),
        "ids that there are not": {"input_ids": IDS + 99}, "negative ids": {"input_ids": IDS - 9},
        "ids of floats": {"input_ids": IDS.float()}, "a short mask": {
            "input_ids": IDS, "attention_mask": torch.ones(2, 3)},
        "no mask": {"input_ids": IDS, "attention_mask": None}, "a cache": {
            "input_ids": IDS, "past_key_values": ()},
        "one row more": {"input_ids": IDS, "attention_mask": torch.ones(3, 5).long()},
        "a huge int": 2**70, "a negative huge int": -(2**70), "-2": -2, "-9": -9, "3": 3,
        "classes": torch.tensor([0, -1]), "classes of floats": torch.tensor([0.0, 1.0]),
        "short classes": torch.tensor([0], dtype=torch.int16), "far classes": torch.tensor([0, 9]),
        "flagged classes": torch.tensor([True, False]), "tuples": [(0, 1), (1, 2)],
        "far tuples": [(0, 1), (9, 9)], "mixed": [(0, 1), 1], "a deep tuple": (0, (1, 2)),
        "a slice": (slice(None), 1), "None in a list": [None, None], "a meta class": torch.zeros(
            2, dtype=torch.long, device="meta"),
        "weights": torch.ones(2, 4), "weights of nan": torch.full((2, 5), float("nan")),
        "an objective": objectives.probability, "objectives": [objectives.probability, None],
        "sums all": lambda output, target: output.sum(), "fails": lambda output, target: 1 / 0,
        "forgets the gradient": lambda output, target: output.detach().flatten(1)[:, 0],
        "is zero": lambda output, target: output.flatten(1)[:, 0] * 0,
        "is nan": lambda output, target: output.flatten(1)[:, 0] * float("nan"),
        "targets of the output": lambda output: [0, 1], "a generator": (i for i in range(2)),
        "a module": nn.Linear(3, 3), "a pattern": "*attention*", "no such module": "no.*",
        "modules": [nn.Linear(3, 3)], "a range": range(2), "a set": {0, 1},
        "bilinear": "bilinear", "1": 1, "2": 2,
    }  # fmt: skip


def arguments_of(function: Callable) -> list[str]:
    """The names of what may be passed, and a misspelt one."""
    return [*inspect.signature(function).parameters, "layers", "forward_func", "targett"]


def state(model: nn.Module) -> dict[str, Any]:
    """What a call must leave alone."""
    found: dict[str, Any] = {
        name: (id(value), value.requires_grad, value._version, id(value.grad))
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    modules = dict(model.named_modules())
    found["training"] = [module.training for module in modules.values()]
    found["hooks"] = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules.values()]
    everywhere = nn.modules.module
    found["hooks of all"] = (
        len(everywhere._global_forward_hooks), len(everywhere._global_forward_pre_hooks)
    )  # fmt: skip
    found["modes"] = torch.is_grad_enabled(), torch._C._len_torch_function_stack()
    return found


def numbers(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from numbers(part)


def outcome(name: str, call: Callable[[], Any]) -> tuple[str, str]:
    """(kind, text) as `tests.metrics.hard` has it; "left" where the model is another one now."""
    model = CASES[name.split(" of ")[1]][0]
    before, rng = state(model), torch.get_rng_state()
    kind, text = metrics_hard.outcome(lambda: list(numbers(call())))
    if state(model) != before or not torch.equal(torch.get_rng_state(), rng):
        return "left", text
    return kind, text


def tried(every: int = 1) -> Iterator[tuple[str, str, str, str, str]]:
    """(call, argument, wrong value, kind, text), one wrong value at a time."""
    wrong, count = wrong_values(), 0
    for name, (function, given) in calls().items():
        for argument in arguments_of(function):
            for label, value in wrong.items():
                count += 1
                if count % every == 0:
                    arguments = {**given, argument: value}
                    kind, text = outcome(name, lambda f=function, a=arguments: f(**a))
                    yield name, argument, label, kind, text


def main(every: int = 1) -> int:
    counted: Counter[str] = Counter()
    for name, argument, label, kind, text in tried(every):
        counted[kind] += 1
        if kind in ("raw", "nan", "left"):
            print(f"{name}({argument}={label}): {kind}: {text[:160]}", flush=True)
    print(", ".join(f"{kind}: {count}" for kind, count in counted.most_common()))
    return int(bool(counted["raw"] or counted["nan"] or counted["left"]))


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
