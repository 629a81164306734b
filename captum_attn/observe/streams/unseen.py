"""Attention that ran, but was not seen: in scripted helpers, in raw kernels beside the fused one.

The graph shows what the tap did not: a product of two activations, a softmax of it, and a product
of that with values; or one node with attention in its name. The names serve to say so, no more:
how such a layer moves tokens is asked as for any other mixing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

from captum_attn.observe.streams.wiring import Wiring
from captum_attn.observe.tracing.autograd_graph import (
    Graph,
    Node,
    Root,
    samples_where_it_computes,
)

_PRODUCTS = ("Bmm", "Mm", "Baddbmm")
_LINEAR = (*_PRODUCTS, "Addmm", "Convolution", "Linear")
_KERNELS = ("attention", "attn", "fmha")
_OPERANDS = 3  # queries, keys, values
_FAR = 24  # steps over views, masks, dropout and the like


def warn_of_unseen(root: Root, wiring: Wiring, graph: Graph) -> None:
    """Warns, once for a structure, of attention beside the calls that were seen."""

    def find() -> list[str]:
        if root.edge is None:
            return []
        seen = {n for call in wiring.tap.calls for n in _back(call.edge.node, _is_last_step)}
        found = [node for node in _all(root.edge.node) if node not in seen and _attends(node)]
        places = [_where(node, wiring, graph) for node in found]
        places += [
            f"in {module!r} (deformable attention: it samples at places that it computes)"
            for node, module in wiring.tap.mixers.items()
            if samples_where_it_computes(node)
        ]
        return list(dict.fromkeys(places))

    if "unseen" not in wiring.structure.entries:
        places = wiring.structure.get_or_compute("unseen", find)
        if places:
            warnings.warn(
                "attention ran that could not be seen (a scripted helper, a raw kernel, sampling), "
                f"{'; '.join(places)}: what it moves is not explained as attention; choose an "
                "`sdpa` or `eager` implementation, if there is one",
                stacklevel=2,
            )


def _where(node: Node, wiring: Wiring, graph: Graph) -> str:
    before = graph.calls(graph.latest(graph.reach(node)))
    behind = [
        call
        for call in wiring.tap.calls
        if any(
            operand.grad_fn is not None and node in set(_between_calls(operand.grad_fn, graph))
            for operand in (call.q, call.k, call.v)
        )
    ]
    places = [f"behind {call.module!r}" for call in before[-1:]]
    places += [f"in front of {call.module!r}" for call in behind[:1]]
    return " and ".join(places) or "on the way to the output"


def _attends(node: Node) -> bool:
    """Whether a node is the product of a softmax of a product with values, or a kernel's."""
    if _is_kernel(node):
        return True
    if "DifferentiableGraph" in node.name():  # scripted: what is inside cannot be seen
        return sum(before is not None for before, _ in node.next_functions) >= _OPERANDS
    if not _is_product(node) or not _of_activations(node):
        return False
    softmaxes = [n for start, _ in node.next_functions if start for n in _back(start, _is_softmax)]
    return any(
        _of_activations(product)
        for softmax in softmaxes
        for start, _ in softmax.next_functions
        if start
        for product in _back(start, _is_product)
    )


def _is_kernel(node: Node) -> bool:
    return any(word in node.name().lower() for word in _KERNELS)


def _is_product(node: Node) -> bool:
    return node.name().startswith(_PRODUCTS)


def _is_softmax(node: Node) -> bool:
    return node.name().startswith("Softmax")


def _is_last_step(node: Node) -> bool:
    return _is_kernel(node) or _is_product(node)


def _of_activations(product: Node) -> bool:
    return sum(before is not None for before, _ in product.next_functions) > 1


def _back(start: Node, wanted: Callable[[Node], bool]) -> Iterator[Node]:
    """The nearest nodes of a kind, by way of no linear map."""
    seen, queue = {start}, [(start, 0)]
    for node, far in queue:
        if wanted(node):
            yield node
        elif not node.name().startswith(_LINEAR) and far < _FAR:
            fresh = [n for n, _ in node.next_functions if n is not None and n not in seen]
            seen.update(fresh)
            queue += [(n, far + 1) for n in fresh]


def _all(start: Node) -> Iterator[Node]:
    """Every node of the graph, also behind attention calls."""
    seen, queue = {start}, [start]
    for node in queue:
        yield node
        fresh = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= fresh
        queue += fresh


def _between_calls(start: Node, graph: Graph) -> Iterator[Node]:
    """The nodes from a call's operand back to the calls and inputs that it stems from."""
    seen, queue = {start}, [start]
    for node in queue:
        yield node
        if graph.is_stop(node):
            continue
        fresh = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= fresh
        queue += fresh
