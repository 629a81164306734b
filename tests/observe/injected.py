"""An exception at every point of a run, and what it leaves behind.

    python -m tests.observe.injected [--every 7]

A point is a place in Python code from which a function is called while a method explains a model:
in the package, in the model, in torch. At each of them a run raises, once a `RuntimeError` and
once a `KeyboardInterrupt`; afterwards the model, the inputs, the random numbers and torch's modes
have to be what they were, and the same object has to explain the model as before. What puts things
back is left alone: an exception there is one that nobody can answer.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_attn import attr
from tests.attr.hard import numbers
from tests.conftest import state_of
from tests.zoo import ZOO, bert

METHODS = {
    "GenericAttention": {}, "VTranM": {}, "AttnLRP": {}, "AttentionRollout": {},
    "BeyondIntuition": {"n_steps": 2}, "DeepIntegratedExplanations": {"n_steps": 1},
    "TransformerInputSampling": {"n_masks": 4}, "TransformerLRP": {},
}  # fmt: skip
# Functions that put things back, or take a run's own things away.
CLEANUP = frozenset(
    "put_back draw_again copy_back off set_to _forget __exit__ remove callback pop close"
    " set_rng_state setstate set_state remove_ check_unchanged clear update alone".split()
)


class Point(NamedTuple):
    """Where a function is called: the caller's file and line, and the function's name."""

    file: str
    line: int
    name: str


class Injected(RuntimeError):
    """Raised at a point."""


class Stopped(KeyboardInterrupt):
    """The same, by a person's hand."""


def busy() -> nn.Module:
    """A model with all that a run has to leave alone."""
    from tests.observe.test_threads import Busy

    return Busy().train()


def flex_bert() -> nn.Module:
    model = bert().eval()
    model.config._attn_implementation = "flex_attention"
    model.config.use_cache = True
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "busy": (busy, lambda: ZOO["by_matmul"].sample().inputs),
    "flex": (flex_bert, lambda: ZOO["bert"].sample().inputs),
}


def points_of(run: Callable[[], Any]) -> list[Point]:
    """The points that a run passes, each once, in their order."""
    found: dict[Point, None] = {}

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and not _puts_back(frame):
            found[_point(frame)] = None

    _traced(run, trace)
    return list(found)


def raise_at(point: Point, run: Callable[[], Any], kind: type[BaseException]) -> None:
    """Runs, and raises where a point is passed first; what comes out of it is swallowed."""
    left = [kind]

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        if left and event == "call" and _point(frame) == point and not _puts_back(frame):
            raise left.pop()(str(point))

    with contextlib.suppress(BaseException):
        _traced(run, trace)


def _traced(run: Callable[[], Any], trace: Callable) -> None:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)


def _point(frame: FrameType) -> Point:
    caller = frame.f_back
    assert caller is not None
    return Point(caller.f_code.co_filename, caller.f_lineno, frame.f_code.co_name)


def _puts_back(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in CLEANUP:
            return True
        frame = frame.f_back
    return False


def modes() -> tuple[Any, ...]:
    """Of the process and this thread, beside those of `state_of`."""
    import torch._dynamo

    from captum_attn.observe.capture.own_state import own_state
    from captum_attn.observe.capture.shared_state import shared_state

    stance = torch._dynamo.eval_frame._stance.stance
    return stance, own_state(), dict(shared_state._held), torch.get_default_device()


def tried(every: int = 1) -> Iterator[tuple[str, Point, str, str]]:
    """(what ran, the point, the exception, what was left otherwise), for every such point."""
    count = 0
    for model_name, (make, sample) in MODELS.items():
        for name, options in METHODS.items():
            model, inputs = make(), sample()
            explain = getattr(attr, name)(model)

            def run(explain: Any = explain, inputs: Any = inputs, options: Any = options) -> Any:
                torch.manual_seed(0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return list(numbers(explain.attribute(inputs, 1, **options)))

            right = run()
            points = points_of(run)
            for point in points:
                for kind in (Injected, Stopped):
                    count += 1
                    if count % every == 0:
                        yield (
                            f"{name} of {model_name}",
                            point,
                            kind.__name__,
                            _left(model, inputs, run, right, point, kind),
                        )


def _left(
    model: nn.Module, inputs: Any, run: Callable[[], list[Tensor]], right: list[Tensor],
    point: Point, kind: type[BaseException],
) -> str:  # fmt: skip
    """What is not as it was; "" where all is."""
    torch.manual_seed(0)
    before, around = state_of(model, inputs), modes()
    raise_at(point, run, kind)
    after = state_of(model, inputs)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if modes() != around:
        changed.append("modes of the process")
    again = run()
    if not all(torch.equal(a, b) for a, b in zip(again, right, strict=True)):
        changed.append("the next result")
    return ", ".join(changed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="every so many points alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = faults = 0
    for what, point, kind, left in tried(options.every):
        count += 1
        if left:
            faults += 1
            print(
                f"{what}: {kind} at {point.name} in {point.file}:{point.line}: {left}", flush=True
            )
    print(f"{count} injected exceptions, {faults} of them left something changed")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
