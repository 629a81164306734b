"""A map that says nothing: the output reads all tokens, and the map is no more than that.

Where a model pools its tokens, R holds the identity of every token that is read, weighed as the
output weighs it; next to it what attention has carried may be too little to be seen.
"""

from __future__ import annotations

import warnings

import torch

from captum_attn.attr._propagate import Relevance
from captum_attn.attr._run import Run

__all__ = ["check_spread"]

FEWEST = 4  # tokens that are read: of two or three a flat map may be the answer
NEAR = 0.1  # share of the relevance that lies elsewhere than where the output reads


def check_spread(run: Run, relevance: Relevance | None) -> None:
    """Warns where the relevance lies as the output's reading does, token by token.

    The text is the same whatever is explained, so that Python shows it once.
    """
    if relevance is None or getattr(run.options, "discard_self", False):
        return
    for state, weights in run.weights.items():
        read = (weights > 0).sum(1)
        for source, rows in relevance.items():
            if source.name != state.stream or rows.shape != weights.shape:
                continue
            total = rows.sum(1, keepdim=True)
            # Half the sum of the differences: the share that would have to be moved.
            apart = (rows / total - weights).abs().sum(1) / 2
            even = weights.square().sum(1) * read < 2  # no token is read much more than others
            flat = (apart < NEAR) & even & (read >= FEWEST) & (rows >= 0).all(1) & (total[:, 0] > 0)
            if bool(torch.any(flat)):
                warnings.warn(
                    f"the output reads all tokens of {state.stream!r} (their mean, say), so each "
                    "of them is relevant to itself by merely being there, and the map is hardly "
                    "more than that: GenericAttention with discard_self=True leaves it out",
                    stacklevel=4,
                )
                return
