"""AttCAT: Qiang et al., "AttCAT: Explaining Transformers via Attentive Class Activation Tokens",
NeurIPS 2022."""

from __future__ import annotations

from torch import Tensor

from captum_attn.attr._attended import of_block, real_queries
from captum_attn.attr._base import AttentionAttribution, Block, Run
from captum_attn.attr._propagate import add
from captum_attn.attr._token_sums import TokenSums
from captum_attn.observe.streams.states import AttentionState, State
from captum_attn.observe.vectors.recording_tap import RecordingTap
from captum_attn.observe.vectors.vector_changes import VectorChanges


class AttCAT(TokenSums):
    r"""Attentive class activation tokens (AttCAT), Qiang et al., NeurIPS 2022; signed.

    AttCAT[i] = Σ_l α_l[i] CAT_l[i] with CAT_l[i] = Σ_d h_l[i,d] ∂y/∂h_l[i,d], where h_l are the
    vectors that enter layer l (the embeddings' output among them, the last layer's not), and α_l[i]
    is the attention that the token receives, the mean of A_l[h,q,i] over heads and real queries.

    A token of a later layer stands for the same token of the input. An extension to models of
    several streams: one term for every call, with the h of the tokens that answer.

    Args:
        forward_func, layers: as for every method, see `AttentionAttribution`.

    Raises:
        WiringError: where the vectors that enter a block could not be observed.

    Examples::

        >>> AttCAT(model).attribute(tokenizer(texts, ...), target=1)["input_ids"]   # (B, n)
    """

    keeps_graph = True
    tap = RecordingTap

    @classmethod
    def get_name(cls) -> str:
        return "AttCAT"

    def weigh_heads(self, run: Run[AttentionAttribution.Options], block: Block) -> Tensor:
        return block.attention()

    def credits(self, run: Run[AttentionAttribution.Options]) -> dict[State, Tensor]:
        changes = VectorChanges(run.observation)
        found: dict[State, Tensor] = {}
        states = list(run.calls_into())
        entered = [changes.keys(state) for state in states]
        gradients = run.gradients_at([term.edge for term, _ in entered])
        for state, (term, rows), gradient in zip(states, entered, gradients, strict=True):
            if gradient is not None:
                vectors = rows(term.vectors()) / term.scale  # (B, F k, D)
                activation = (vectors * rows(gradient)).sum(-1).to(run.like)  # CAT
                add(found, state.key_state, self._received(run, state) * activation)
        return found

    def _received(self, run: Run[AttentionAttribution.Options], state: AttentionState) -> Tensor:
        """α, the mean over heads and real queries of A, (B, F k)."""
        call, real = state.call, real_queries(run, state.call)
        found = run.like.new_zeros(run.batch, call.windows, call.n_k)
        for block in run.blocks(call):
            attention = self.weigh_heads(run, block).mean(2)  # (B, F, q', k')
            if real is not None:
                attention = attention * of_block(real, block)[..., None]
            found[..., : block.n_k] += attention.sum(2).to(found)
        count = call.n_q if real is None else real.sum(2, keepdim=True).clamp_min(1)
        return (found / count).flatten(1)
