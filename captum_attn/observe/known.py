"""Runs without a graph: of a structure that is known, for methods that want no gradients.

The first run of an input's shapes is observed, and its steps are written down. A later one is held
against them as it goes, and has a graph only where something is asked in every run: from the inputs
to the last call that what they hold may change, and from the first call that the output reads. A
run whose steps are other ones is observed like the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from captum._utils.common import _format_additional_forward_args
from torch import Tensor, nn

from captum_attn.observe.capture.known_tap import KnownTap, NotingTap
from captum_attn.observe.capture.own_state import own_state, writes
from captum_attn.observe.capture.restore import left_as_found
from captum_attn.observe.capture.steps import KnownRun
from captum_attn.observe.observation import Observation, observe, watched, wired
from captum_attn.observe.streams.structure_cache import StructureCache

Inputs = tuple[Tensor, ...] | Mapping[str, Any]


def observe_or_know(
    forward_func: Callable,
    inputs: Inputs,
    additional_forward_args: Any,
    roots: list[nn.Module],
    structure: StructureCache,
    draw_again: Callable[[], None],
) -> Observation:
    """`observe`, without most of the graph where the run is known.

    Args:
        draw_again (callable): sets the random generators back to where they were before the run.
    """
    given = forward_func, inputs, additional_forward_args, roots
    own = own_state()
    if own is None or own.trains:
        return observe(*given, structure)
    alike = _sizes(inputs, _format_additional_forward_args(additional_forward_args))
    known = structure.run_like(alike)
    if known is None:
        observation = observe(*given, structure, NotingTap)
        if alike not in structure.runs:
            structure.keep_run(alike, _known(observation))
        return observation
    again = _known_again(*given, structure, known)
    if again is not None:
        return again
    structure.keep_run(alike, None)  # it may be another one every time
    with left_as_found(roots):
        draw_again()
        return observe(*given, structure)


def _known_again(
    forward_func: Callable,
    inputs: Inputs,
    additional_forward_args: Any,
    roots: list[nn.Module],
    structure: StructureCache,
    known: KnownRun,
) -> Observation | None:
    """The run of inputs of which one is known; None where it turned out to be another one."""
    tap = KnownTap(known, roots[0] if len(roots) == 1 else None)
    try:
        run = watched(forward_func, inputs, additional_forward_args, roots, lambda root: tap)
        torch.set_grad_enabled(True)
        return wired(run, structure, known) if tap.is_known else None
    except Exception:  # what is wrong with the run is said when it is observed
        return None
    finally:
        torch.set_grad_enabled(True)


def _known(observation: Observation) -> KnownRun | None:
    """What is kept of a run; None where nothing would be saved, or it could not be told.

    Nor where it would be another one in its last bits: results would depend on what ran before.
    """
    tap, wiring, graph, root = (
        observation.tap, observation.wiring, observation.graph, observation.root,
    )  # fmt: skip
    assert isinstance(tap, NotingTap)
    if not tap.tells or root.edge is None or root.detached_from or wiring.mixings:
        return None
    read = graph.calls(graph.latest(graph.reach(root.edge.node)))
    asked = [call.index for call in tap.calls if not wiring.is_settled(call)]
    asked += tap.born  # where a leaf is made, there is a graph
    first = min((call.index for call in read), default=0)
    last = max(asked, default=0)
    if last >= first or any(last < calls <= first for calls in tap.rounded):
        return None
    reached = [tuple(map(graph.reach, (c.q, c.k, c.v))) for c in tap.calls]
    return KnownRun(
        said=tap.said,
        shapes=tap.shapes,
        calls=tap.known_calls,
        reached=reached,  # type: ignore[arg-type]
        leaves=[leaf.name for leaf in tap.leaves],
        events=tap.events,
        writes={i for i, said in enumerate(tap.said) if writes(said[0], said[1:])},
        fingerprint=wiring.fingerprint,
        asked=last,
        read=first,
    )


def _sizes(*values: Any) -> Any:
    """The shapes of tensors, and what numbers and words there are beside them."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((tuple(value.shape), value.dtype, value.device))
        elif isinstance(value, Mapping):
            found.append(tuple((name, _sizes(item)) for name, item in value.items()))
        elif isinstance(value, (tuple, list)):
            found.append(_sizes(*value))
        else:
            found.append(value if isinstance(value, (int, str)) else type(value))
    return tuple(found)
