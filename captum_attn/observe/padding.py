"""Padding: which keys of an attention call are tokens of the example."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_attn.observe.call import AttentionCall

_HIDDEN = -1e4  # what models add to the scores of keys that must not be seen, or less


def real_keys(call: AttentionCall) -> Tensor | None:
    """(B, F, k) which keys are no padding; None: all.

    A key is real if some query sees it. Queries that see nothing do not count: what the kernel does
    for them (padding on the left in a causal model) is its own affair.
    """
    if call.weights is None:
        if call.mask is None:
            return None
        mask = call.mask.detach()
        seen = mask if mask.dtype == torch.bool else mask > _HIDDEN
        seen = seen.expand(*call.lead, call.n_q, call.n_k)
    else:
        weights = call.weights.detach()
        seen = weights != 0
        if bool(seen.all()):
            return None
        spread = weights.amax(-1, keepdim=True) != weights.amin(-1, keepdim=True)
        seen = seen & (spread | (seen.sum(-1, keepdim=True) < seen.shape[-1]))
    if bool(seen.all()):
        return None
    real = call.fold(seen).any(2).any(2)  # over heads and queries
    return None if bool(real.all()) else real
