"""A zoo of tiny models under the relevance rules: `python -m tests.lrp.zoo_conservation FOLDER`.

FOLDER holds `zoo.py` with `cases()`. Arguments behind it: EVERY and OFFSET (each EVERY-th case from
OFFSET), and METHODS, a comma between. One line for each case and method:

    conserves   every operation hands on what arrives, but what constants absorb, to 1e-6 (1e-4 in
                float32), and the output is the plain model's, bit for bit
    leaks       another share, with the worst operations
    output      it is not the plain model's, nor the model's with a gradient for its inputs, with
                which torch takes other kernels in some models
    no path     nothing arrives at any input: the value does not depend on them with a gradient
    ruled       every operation that computes has a relevance rule (TransformerLRP)
    refused     a RuleError: what has none
    error       whatever else
"""

from __future__ import annotations

import random
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from captum_attn.attr._ruled import check_ruled, ruled_pass
from captum_attn.attr.rules import RULE_SETS
from captum_attn.errors import RuleError
from captum_attn.observe.capture.restore import left_as_found
from captum_attn.observe.capture.tap import Tap
from captum_attn.observe.observation import watched
from tests.lrp import conservation

LIMIT_SECONDS = 90


class Late(BaseException):
    pass


class Scalar(torch.nn.Module):
    """A case's model with one number per example to explain."""

    def __init__(self, model: torch.nn.Module, read: Any, task: str) -> None:
        super().__init__()
        self.model, self.read, self.task = model, read, task

    def forward(self, **inputs: Any) -> torch.Tensor:
        y = self.read(self.model(**inputs))
        if "zero-shot" in self.task and y.dim() == 2 and y.shape[0] == y.shape[1]:
            return y.diagonal()
        return y.flatten(1)[:, :50].amax(1) if y.dim() > 1 else y


class Positional(Scalar):
    def forward(self, *inputs: Any) -> torch.Tensor:  # type: ignore[override]
        y = self.read(self.model(*inputs))
        return y.flatten(1)[:, :50].amax(1) if y.dim() > 1 else y


def built(case: Any) -> tuple[Scalar, Any, torch.dtype]:
    """The model in float64 where it runs so, with its inputs."""
    model, inputs, read, _ = case.build()
    wrapped = (Scalar if isinstance(inputs, dict) else Positional)(model, read, case.task).eval()
    for dtype in (torch.float64, torch.float32):
        try:
            wrapped, cast = wrapped.to(dtype), _cast(inputs, dtype)
            with torch.no_grad():
                _run(wrapped, cast)
            return wrapped, cast, dtype
        except RuntimeError:
            if dtype == torch.float32:
                raise
    raise AssertionError


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    def one(v: Any) -> Any:
        return v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v

    if isinstance(inputs, dict):
        return {name: one(value) for name, value in inputs.items()}
    return tuple(map(one, inputs))


def _run(model: Scalar, inputs: Any) -> torch.Tensor:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def judged(model: Scalar, inputs: Any, rules: Any, form: str, tolerance: float) -> tuple[str, str]:
    """(verdict, what is worth saying)."""
    with left_as_found([model]):
        with torch.no_grad():
            plain = _run(model, inputs)
        operators: list[conservation.Counting] = []

        def counting(*args: Any) -> conservation.Counting:
            operators.append(conservation.Counting(*args))
            return operators[-1]

        made = counting if form == "gradient" else None
        run = _watched(model, inputs, rules, made)
        if not _equal(run.output, plain):
            without = watched(model, inputs, None, [model], Tap).output
            if not _equal(run.output, without):
                return "output", f"differs by {float((run.output - without).abs().max()):.1e}"
        leaves = [leaf.tensor for leaf in run.tap.leaves if leaf.name]
        value = run.output.clone()
        if len(value) != run.batch:  # some models have several rows for an example
            value = value.view(run.batch, -1).sum(1)
        if form == "relevance":
            nodes = [torch.autograd.graph.get_gradient_edge(t).node for t in leaves]
            check_ruled(run, nodes, rules)
        arrived = ruled_pass(run, value, leaves, rules, again=True)
        finite = all(a is None or bool(torch.isfinite(a).all()) for a in arrived)
        if not finite:
            (gradient,) = torch.autograd.grad(value.sum(), leaves[:1], allow_unused=True)
            own = bool(torch.isfinite(plain).all()) and (
                gradient is None or bool(torch.isfinite(gradient).all())
            )
            return ("not finite", "") if own else ("not finite itself", "")
        if not any(a is not None and bool(a.any()) for a in arrived):
            return "no path", ""
        if form == "relevance":
            return "ruled", ""
        return _books(operators[-1], value, tolerance)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())


def _books(operators: Any, value: torch.Tensor, tolerance: float) -> tuple[str, str]:
    missing: Counter[str] = Counter()
    for record in {id(record): record for record in operators.records}.values():
        if record.missing == record.missing:
            missing[f"{record.name} in {record.module}"] += abs(record.missing)
    share = sum(missing.values()) / max(float(value.detach().abs().sum()), 1e-3)
    worst = ", ".join(f"{name} {size:.0e}" for name, size in missing.most_common(3))
    return ("conserves", f"{share:.0e}") if share < tolerance else ("leaks", f"{share:.0e} {worst}")


def _watched(model: Scalar, inputs: Any, rules: Any, made: Any) -> Any:
    from captum_attn.observe import observation

    before = observation.Operators
    observation.Operators = made or before  # type: ignore[misc]
    try:
        return watched(model, inputs, None, [model], Tap, (rules,))
    finally:
        observation.Operators = before  # type: ignore[misc]


def _late(*_: Any) -> None:
    raise Late


def main(folder: str, every: int, offset: int, methods: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(folder)))
    import zoo

    todo = list(zoo.cases())
    random.Random(11).shuffle(todo)
    signal.signal(signal.SIGPROF, _late)
    verdicts: dict[str, Counter[str]] = {method: Counter() for method in methods}
    for case in todo[offset::every]:
        try:
            model, inputs, dtype = built(case)
        except Exception as error:
            print(f"not built  {case.name}: {error!r:.100}", flush=True)
            continue
        for method in methods:
            form = "relevance" if method == "transformer_lrp" else "gradient"
            tolerance = 1e-6 if dtype == torch.float64 else 1e-4
            try:
                signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)  # of the process's own time
                verdict, why = judged(model, inputs, RULE_SETS[method], form, tolerance)
            except RuleError as error:
                verdict, why = "refused", str(error)[80:260]
            except Late:
                verdict, why = "late", ""
            except Exception as error:
                verdict, why = "error", f"{error!r:.160}"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            verdicts[method][verdict] += 1
            print(f"{method:16} {verdict:10} {case.name} {str(dtype)[6:]} {why}", flush=True)
    for method, count in verdicts.items():
        print(method, dict(count))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        given[0],
        int(given[1]) if len(given) > 1 else 1,
        int(given[2]) if len(given) > 2 else 0,
        given[3].split(",") if len(given) > 3 else ["attn_lrp", "cp_lrp", "transformer_lrp"],
    )
