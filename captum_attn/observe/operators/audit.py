"""Which nodes of a run's graph compute something that no rule speaks of?

A gradient mistaken for relevance is a wrong number. Bridges lead past the operations that a table
has rules for; whatever else lies on the way from the output to the inputs must only move data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from captum_attn.observe.operators.bridge import Bridge, Gate, Rules, Shares, factor_of
from captum_attn.observe.operators.rewrites import StandIn

# Nodes that move, pick, mask or cast entries, by the beginnings of their names.
_MOVING = tuple(
    """AccumulateGrad Alias AsStrided Amax Amin Cat Clone ConstantPad Copy Cummax Cummin Detach Diag
    Expand Fill Flip Gather Im2Col Index Kthvalue Lift Masked Max Median Min Mode Movedim NanToNum
    Narrow Permute Pixel Real ReflectionPad Repeat ReplicationPad Reshape Resize Roll Rot90 Scatter
    Select Set Slice Sort Split Squeeze Stack Swap TBackward Take Tile ToCopy Topk Transpose Tril
    Triu Unbind Unfold Unsafe Unsqueeze View Where Zero""".split()
)
_COMPUTING = ("Add", "Reduce", "Softmax")  # ... unless they are one of these
_POOLS = ("MaxPool", "MaxUnpool")


@dataclass(frozen=True)
class Unruled:
    """An operation on the way from the output to the inputs that has no rule.

    Args:
        name (str): of its graph node, "LinalgSolveTriangularBackward0".
        reader (str): the operation with a rule that reads it, "linear"; "" at the output.
    """

    name: str
    reader: str


def nodes_without_rule(start: Any, goals: Collection[Any], rules: Rules) -> list[Unruled]:
    """The nodes that a pass with `rules` goes through though they compute, nearest first.

    Args:
        start (graph node): the output's.
        goals (collection of graph nodes): where relevance is wanted.
    """
    leads = _leading_to(start, set(goals), rules)
    queue: list[tuple[Any, str]] = [(start, "")] if start in leads else []
    seen, found = {start}, []
    for node, reader in queue:
        if not _is_ours(node) and not _moves(node):
            found.append(Unruled(_name(node), reader))
        for before, name in _followed(node, reader, rules):
            if before in leads and before not in seen:
                seen.add(before)
                queue.append((before, name))
    return found


def custom_functions(start: Any) -> list[str]:
    """Names of the model's own autograd Functions, which hide what they compute."""
    every = _below(start)
    foreign = (n for n in every if hasattr(n, "_forward_cls") and not _is_ours(n))
    return list(dict.fromkeys(_name(node).removesuffix("Backward") for node in foreign))


def nodes_behind(top: Any, before: Callable[[Any], Iterable[Any]]) -> list[Any]:
    """`top` and all nodes behind it, each in front of those that it leads to by `before`."""
    done: dict[Any, None] = {}
    opened: set[Any] = set()
    stack = [] if top is None else [top]
    while stack:
        node = stack[-1]
        if node in opened:
            done.setdefault(stack.pop())
        else:
            opened.add(node)
            stack += [n for n in before(node) if n not in opened]
    return list(reversed(done))


def _leading_to(start: Any, goals: set[Any], rules: Rules) -> set[Any]:
    """The nodes from which a pass with `rules` reaches some of the goals."""
    leads: set[Any] = set()
    for node in reversed(_below(start)):
        if node in goals or any(n in leads for n, _ in _followed(node, "", rules)):
            leads.add(node)
    return leads


def _below(start: Any) -> list[Any]:
    """All nodes behind `start`, whatever is in force, each before those that it leads to."""
    return nodes_behind(start, lambda node: (n for n, _ in node.next_functions if n is not None))


def _followed(node: Any, reader: str, rules: Rules) -> Iterator[tuple[Any, str]]:
    """What a pass reaches from a node, and the operation with a rule that it comes from."""
    following = [before for before, _ in node.next_functions]
    if getattr(node, "_forward_cls", None) is Gate and factor_of(rules, node.uses) == 0.0:
        return iter(())  # nothing passes
    operation = getattr(node, "operation", None) if _is_ours(node) else None
    if operation is None:
        return ((before, reader) for before in following)
    rule, n = rules.get(operation.kind), len(operation.slots)
    ruled = rule is not None and not isinstance(rule, Shares)
    ends = following[-n:] if ruled else following[:-n]
    return ((before, operation.name if ruled else reader) for before in ends)


def _is_ours(node: Any) -> bool:
    return getattr(node, "_forward_cls", None) in (Bridge, Gate, StandIn)


def _moves(node: Any) -> bool:
    name = _name(node)
    if hasattr(node, "_forward_cls"):
        return False
    if any(pool in name for pool in _POOLS):
        return True
    return name.startswith(_MOVING) and not any(word in name for word in _COMPUTING)


def _name(node: Any) -> str:
    return node.name().rpartition("::")[2]
