"""Every public function of `captum_attn.metrics` with a right call, and values that are wrong.

    python -m tests.metrics.hard      # one wrong value after the other: counts what came of them

A call has to return numbers that are there, or to raise an `AttnError`. What a model says when it
is given what it cannot take (raised inside a module's forward) comes through as it is.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from captum.attr import InputXGradient
from torch import Tensor, nn

from captum_attn import metrics
from captum_attn.errors import AttnError
from captum_attn.metrics._engine import OPTIONS


class Pixels(nn.Module):
    """Images (B, 3, 4, 4) -> logits (B, 2)."""

    def forward(self, images: Tensor) -> Tensor:
        total = images.flatten(1).sum(1)
        return torch.stack([total, -total], 1)


class Words(nn.Module):
    """Ids (B, 5) -> logits (B, 2)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        kept = input_ids if attention_mask is None else input_ids * attention_mask
        return torch.stack([kept.sum(1), 9 * kept[:, 0]], 1).double()


def maps() -> Tensor:
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def marked() -> Tensor:
    return (torch.arange(32).view(2, 4, 4) % 3 == 0).long()


IMAGES = {"forward_func": Pixels().eval(), "inputs": torch.ones(2, 3, 4, 4), "target": 0}
IDS = {"input_ids": torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])}
TEXT = {"forward_func": Words().eval(), "inputs": IDS, "target": 0}
OPTIONAL = {name: None for name in ("additional_forward_args", *OPTIONS)}
PICTURES = [
    {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "area": 4, "bbox": [0, 0, 2, 2],
     "height": 4, "width": 4, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]} for i in (1, 2)
]  # fmt: skip
TRUTH = {"images": PICTURES, "annotations": PICTURES, "categories": [{"id": 1, "name": "a"}]}


def found() -> list[dict[str, Any]]:
    return metrics.coco_results(1, marked()[:1] > 0, [1], [0.5])


def calls() -> dict[str, tuple[Callable, dict[str, Any]]]:
    """name -> (function, the arguments of a right call)."""
    perturbing = {"attributions": maps(), **IMAGES}
    tokens = {"attributions": {"input_ids": torch.rand(2, 5)}, **TEXT}
    localising = {"attributions": maps(), "masks": marked()}
    rational = {"attributions": torch.rand(2, 5), "rationales": torch.eye(2, 5).long()}
    placed = {"attributions": torch.rand(2, 5), "place": torch.eye(2, 5).long()}
    method = InputXGradient(Layer())
    return {
        name: (getattr(metrics, name) if name != "RandomAttribution" else chance, arguments)
        for name, arguments in {
            "perturbation_curve": perturbing, "perturbation_auc": perturbing, "aopc": perturbing,
            "log_odds": perturbing, "abpc": perturbing, "deletion": perturbing,
            "insertion": {**perturbing, "fill": 0.5}, "saco": {**perturbing, "bins": 4},
            "sensitivity_n": {**perturbing, "subsets": 3}, "comprehensiveness": tokens,
            "sufficiency": tokens, "token_removal_auc": tokens,
            "segmentation": localising, "pointing_game": localising, "energy_inside": localising,
            "relevance_rank": localising, "top_k_intersection": {**localising, "k": 3},
            "sparseness": {"attributions": maps()}, "binary_map": {"attributions": maps()},
            "otsu_threshold": {"maps": maps().sum(1)},
            "rationale_f1": rational, "rationale_iou_f1": rational, "rationale_spans": rational,
            "rationale_auprc": rational, "place_hit": placed, "place_rank": placed,
            "place_share": placed,
            "coco_results": {"image_id": 1, "masks": marked() > 0, "labels": torch.ones(2).long(),
                             "scores": torch.rand(2)},
            "coco_average_precision": {"annotations": TRUTH, "results": found()},
            "coco_bootstrap": {"annotations": TRUTH, "results": found(), "resamples": 3},
            "detections": {"logits": torch.randn(4, 3)},
            "query_masks": {"maps": maps()[0], "padded_size": (8, 8)},
            "segment_detections": {"logits": 9 * torch.eye(3), "padded_size": (8, 8),
                                   "explain": lambda query, label: maps()[0, 0]},
            "parameter_randomization": {"method": method, "inputs": torch.ones(2, 3), "target": 0},
            "quantus_explain_func": {"model": Layer(), "inputs": np.ones((2, 3), np.float32),
                                     "targets": np.zeros(2), "method": InputXGradient},
            "RandomAttribution": {"inputs": torch.ones(2, 3)},
        }.items()
    }  # fmt: skip


def chance(inputs: Any, seed: Any = 0, names: Any = None) -> Any:
    return metrics.RandomAttribution(None, seed, names).attribute(inputs)


class Layer(nn.Sequential):
    """(B, 3) -> (B, 2), with weights of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 2))


def wrong_values() -> dict[str, Any]:
    """What people pass by mistake."""
    nan = float("nan")
    return {
        "None": None, "a word": "x", "no word": "", "0": 0, "-1": -1, "a fraction": 0.5, "7": 7,
        "nan": nan, "inf": float("inf"), "True": True, "an empty list": [], "a list": [1, 2],
        "a list of nan": [nan, nan], "a list of words": ["a", "b"], "nested": [[1], [2, 3]],
        "an empty tuple": (), "a tuple": (1, 2), "an empty dict": {}, "a dict": {"x": 1},
        "an object": object(), "bytes": b"x", "a complex number": 1j, "an array": np.ones((2, 3)),
        "a function": lambda *_, **__: None, "a class": dict,
        "a scalar tensor": torch.tensor(1.0), "an empty tensor": torch.zeros(0),
        "a vector": torch.ones(2), "a matrix": torch.ones(2, 3), "multi-hot": torch.eye(2),
        "ids": torch.ones(2, 5).long(), "maps": torch.ones(2, 4, 4),
        "images of another size": torch.ones(2, 3, 5, 5), "one image": torch.ones(1, 3, 4, 4),
        "nan images": torch.full((2, 3, 4, 4), nan), "nan maps": torch.full((2, 4, 4), nan),
        "nan marks": torch.full((2, 5), nan), "nan logits": torch.full((4, 3), nan),
        "complex images": torch.ones(2, 3, 4, 4, dtype=torch.complex64),
        "a sparse matrix": torch.eye(2).to_sparse(),
        "a meta tensor": torch.ones(2, 5, device="meta"),
        "a dict of nan": {"input_ids": torch.full((2, 5), nan)},
        "two tensors": (torch.ones(2, 3), torch.ones(2, 3)),
    }  # fmt: skip


def arguments_of(function: Callable, given: dict[str, Any]) -> list[str]:
    """The names of what may be passed, and a misspelt one."""
    names = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if "forward_func" in given and given["forward_func"] is not None:
        names += [name for name in OPTIONS if name not in names]
    return names


def numbers(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (float, np.ndarray)):
        yield torch.as_tensor(value)
    elif isinstance(value, dict):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, (metrics.Segmentation, metrics.Spans)):
        yield from vars(value).values()


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """(kind, text): "fine", "refused" (an `AttnError`), "model" (its own words), "raw", "nan"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hush = contextlib.redirect_stderr(io.StringIO())  # progress bars
        try:
            with hush:
                result = call()
        except AttnError as error:
            return "refused", str(error)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            inside = any(frame.name == "_call_impl" for frame in frames)
            return "model" if inside else "raw", f"{type(error).__name__}: {error}"
    bad = [t for t in numbers(result) if t.is_floating_point() and not t.isfinite().all()]
    return ("nan", str(bad[0])) if bad else ("fine", type(result).__name__)


def tried() -> Iterator[tuple[str, str, str, str, str]]:
    """(function, argument, wrong value, kind, text), one wrong value at a time."""
    wrong = wrong_values()
    for name, (function, given) in calls().items():
        for argument in arguments_of(function, given):
            for label, value in wrong.items():
                kind, text = outcome(lambda f=function, a={**given, argument: value}: f(**a))
                yield name, argument, label, kind, text


def main() -> int:
    counted: Counter[str] = Counter()
    for name, argument, label, kind, text in tried():
        counted[kind] += 1
        if kind in ("raw", "nan"):
            print(f"{name}({argument}={label}): {kind}: {text[:120]}")
    print(", ".join(f"{kind}: {count}" for kind, count in counted.most_common()))
    return int(bool(counted["raw"] or counted["nan"]))


if __name__ == "__main__":
    raise SystemExit(main())
