"""Padding: which keys of an attention call, and which tokens of a state, are the example's."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.streams.states import AttentionState, ParallelState, RearrangedState, State
from captum_attn.observe.streams.wiring import Wiring
from captum_attn.observe.tracing.token_index import inverse, take

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


class Padding:
    """What is a token of the example, and what is padding or learned; worked out once per call."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self._reals: dict[AttentionCall, Tensor | None] = {}

    def keys(self, update: AttentionState) -> Tensor | None:
        """(B, 1, F k): no padding, and no learned keys; None: all."""
        call, reads = update.call, update.key_state
        if call not in self._reals:
            found = real_keys(call)
            real = None if found is None else found.flatten(1)[:, None]
            if isinstance(reads, RearrangedState) and reads is not update.query_state:
                n = call.positions[1]
                tokens = torch.zeros(1, 1, n, dtype=torch.bool, device=call.v.device)
                for part in reads.parts:
                    index = inverse(part.to, n)
                    tokens = tokens | (True if index is None else index[:, None] >= 0)
                real = tokens if real is None else real & tokens
            self._reals[call] = real
        return self._reals[call]

    def tokens(self, state: State) -> Tensor | None:
        """(B, 1, n) which tokens of a state are no padding, as attention within it shows."""
        while isinstance(state, (AttentionState, ParallelState)):
            before = state.base if isinstance(state, ParallelState) else state.query_state
            for update in self.wiring.updates:
                if update.query_state is before and _reads_itself(update):
                    return self._within(update)
            state = before
        for update in self.wiring.updates:
            if update.query_state is state and _reads_itself(update):
                return self._within(update)
        return None

    def _within(self, update: AttentionState) -> Tensor | None:
        """Of the real keys those of the tokens that the call updates."""
        real = self.keys(update)
        if (
            real is None
            or not isinstance(update.key_state, RearrangedState)
            or update.key_state is update.query_state
        ):
            return real
        to = update.key_state.parts[0].to
        if to is None:
            return real[..., : update.n]
        return take(real.mT, to).mT


def _reads_itself(update: AttentionState) -> bool:
    reads = update.key_state
    if reads is update.query_state:
        return True
    return isinstance(reads, RearrangedState) and all(
        part.state is update.query_state for part in reads.parts
    )
