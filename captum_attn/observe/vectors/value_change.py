"""How vectors change: lengths before and after a transformation, and the angle between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from captum_attn.observe.capture.attention_call import AttentionCall
from captum_attn.observe.vectors.output_projection import LinearMap

_WIDTHS = (
    "its values come from vectors of another width than those they become, so the angle between "
    "the two is not defined"
)


@dataclass
class VectorChange:
    """Vectors of n tokens before and after a transformation by each of H heads.

    Args:
        before (Tensor): their lengths before, (B, 1, n).
        after (Tensor): their lengths after, (B, H, n).
        dot (Tensor or None): inner products of the two, (B, H, n); None where they have not the
            same number of channels.
        real (Tensor or None): (B, 1, n) which of them are tokens of the example, no padding and no
            learned keys; None: all.
        module (str): where it happens.
        why (str): where there is no `dot`, why there is none.
        measured (bool): False where the lengths are not known either, and taken to be kept.

    Where what the transformation is depends on the query (behind a gate), an axis of queries stands
    before the last one: (B, 1, 1, n) and (B, H, q, n).
    """

    before: Tensor
    after: Tensor
    dot: Tensor | None
    real: Tensor | None
    module: str
    why: str = ""
    measured: bool = True


@dataclass
class ValueChange:
    """The values of an attention call through its output projection.

    Args:
        values (Tensor): v, (B, H, n, d), of n = F k keys.
        vectors (Tensor): E, (B, n, D'), the keys' vectors.
        linear_map (LinearMap): what becomes of them.
        real (Tensor or None): see `VectorChange`.
        call (AttentionCall): the call.
    """

    values: Tensor
    vectors: Tensor
    linear_map: LinearMap
    real: Tensor | None
    call: AttentionCall

    @cached_property
    def products(self) -> Tensor:
        """W W^T, (H, d, d): |v W| by it, no (H, n, D) tensor is formed."""
        matrix = self.linear_map.matrix
        return matrix @ matrix.mT

    @cached_property
    def pulled(self) -> Tensor | None:
        """v ⊙ (E W^T), (B, H, n, d), whose sum over d is the inner product of E and v W."""
        matrix = self.linear_map.matrix  # (H, d, D)
        if self.vectors.shape[-1] != matrix.shape[-1]:
            return None
        return self.values * (self.vectors[:, None] @ matrix.mT)

    @cached_property
    def change(self) -> VectorChange:
        """Without gains."""
        after = ((self.values @ self.products) * self.values).sum(-1).clamp_min(0).sqrt()
        dot = None if self.pulled is None else self.pulled.sum(-1)
        lengths, why = self.vectors.norm(dim=-1)[:, None], "" if dot is not None else _WIDTHS
        return VectorChange(lengths, after, dot, self.real, self.call.module, why)

    def of_queries(self, rows: Tensor | None) -> VectorChange:
        """With what F q' queries multiply: |Ẽ_ij| and E_j · Ẽ_ij, Ẽ_ij = ((g_i ⊙ v_j) W) ⊙ r_i."""
        found = self.linear_map
        gains, behind = (self._chosen(g, rows) for g in (found.gains, found.behind))
        plain = self.change
        if behind is not None:
            after, dot = self._gated_behind(gains, behind)
        else:
            assert gains is not None
            after, dot = self._gated_in_front(gains.transpose(1, 2))
        real = None if plain.real is None else plain.real[:, :, None]
        return VectorChange(plain.before[:, :, None], after, dot, real, plain.module, plain.why)

    def _chosen(self, gains: Tensor | None, rows: Tensor | None) -> Tensor | None:
        """(B, F q, ...) -> (B, F q', ...)."""
        if gains is None or rows is None:
            return gains
        return gains.unflatten(1, (self.call.windows, -1)).index_select(2, rows).flatten(1, 2)

    def _gated_in_front(self, gains: Tensor) -> tuple[Tensor, Tensor | None]:
        """By g alone, (B, H, F q', d)."""
        one, plain = gains[..., :1], self.change
        if bool(((gains - one).abs() <= 1e-5 * one.abs()).all()):  # one number for a whole head
            dot = None if plain.dot is None else one * plain.dot[..., None, :]
            return one.abs() * plain.after[..., None, :], dot
        after = self._squares(gains).clamp_min(0).sqrt()
        return after, None if self.pulled is None else gains @ self.pulled.mT

    def _gated_behind(self, gains: Tensor | None, behind: Tensor) -> tuple[Tensor, Tensor | None]:
        """By r, (B, F q', D), and by g, (B, F q', H, d): then one query after the other."""
        alike: list[tuple[Tensor | None, Tensor]] = [(None, behind)]
        apart = [] if gains is None else zip(gains.split(1, 1), behind.split(1, 1), strict=True)
        after, dot = [], []
        for g, r in apart or alike:
            values = self.values if g is None else self.values * g.transpose(1, 2)
            rows, r = values @ self.linear_map.matrix, r[:, None]  # (B, H, n, D), (B, 1, q', D)
            after.append((r.square() @ rows.square().mT).sqrt())
            if self.pulled is not None:
                dot.append(r @ (self.vectors[:, None] * rows).mT)
        return torch.cat(after, 2), torch.cat(dot, 2) if dot else None

    def _squares(self, gains: Tensor) -> Tensor:
        """Σ_ab g_ia g_ib v_ja v_jb (W W^T)_ab, (B, H, q, n), one channel a after the other."""
        batch, heads, queries, width = gains.shape
        found = gains.new_zeros(batch, heads, queries, self.values.shape[2])
        for a in range(width):
            keys = self.values[..., a, None] * self.values * self.products[:, None, a]
            found += (gains[..., a, None] * gains) @ keys.mT
        return found
