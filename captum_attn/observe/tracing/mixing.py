"""Tokens that are mixed by something else than attention: T of a hop, asked of autograd.

Where a convolution, a recurrence, a state-space or linear attention layer lies between two
attention calls, the tokens u that leave the one enter the tokens t of the other by

    T[i, j] = ‖∂t_i/∂u_j‖² / Σ_j' ‖∂t_i/∂u_j'‖²,

rows that sum to 1, over everything that lies between (a skip connection is in the Jacobian). It is
the index map where the hop is one, and causal where the hop is. With independent random r_i,

    (w^T T)_j = E ‖Σ_i √(w_i / N_i) (∂t_i/∂u_j)^T r_i‖²,
    N_i = Σ_j ‖∂t_i/∂u_j‖² = E ‖Σ_j ∂t_i/∂u_j v_j‖²,

so that a row vector takes a few backward passes, and N a few forward ones: the derivative of a
backward pass, which is linear in the vector that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_attn.observe.capture.attention_call import working_dtype
from captum_attn.observe.tracing.autograd_graph import cut_at, gradients, shape_of
from captum_attn.observe.tracing.token_map import Downstream, Upstream

# The error falls with the square root of draws times channels: as many make it 4 % or so.
_ENOUGH = 2048
_MOST_DRAWS = 128
_FEWER = 4
# Elements of several draws that go through the graph together.
_AT_ONCE = 2**18


class Mixing:
    """T of one mixing hop.

    Every example gets the same random numbers, and every token its own ones whatever follows, so
    that a batch equals its examples.

    Args:
        downs (sequence of Downstream): what is made of the tokens t, (B, n, features) each.
        members (sequence of (int, sequence of Upstream)): for each state that is mixed its
            number of tokens, and where the gradient of its tokens u is taken.
        cuts (sequence of graph nodes): the outputs of attention calls, which the hop ends at.
        seed (int): of the random numbers.

    Attributes:
        draws (int): how many random vectors are drawn.
    """

    def __init__(
        self,
        downs: Sequence[Downstream],
        members: Sequence[tuple[int, Sequence[Upstream]]],
        cuts: Sequence[Any],
        seed: int = 0,
    ) -> None:
        self.downs, self.seed = list(downs), seed
        self.sizes = [n for n, _ in members]
        self.members = [list(upstreams) for _, upstreams in members]
        self._cuts, self._vectorized = cuts, True
        self._random: dict[tuple[tuple[int, ...], int], Tensor] = {}
        self._edges = [upstream.edge for member in self.members for upstream in member]
        self._dtype = working_dtype(self.downs[0].like.dtype)
        self._reach: list[Tensor] | None = None
        self._matrices: list[Tensor] | None = None
        self.draws = self._enough()

    def _enough(self) -> int:
        """As many draws as keep the error of a map under 5 %, a power of two."""
        widths = [self._width]
        for n, member in zip(self.sizes, self.members, strict=True):
            widths.append(sum(map(_size, member)) // (self.shape[0] * n))
        return min(_MOST_DRAWS, _power(-(-_ENOUGH // max(1, min(widths)))))

    @property
    def _width(self) -> int:
        return sum(down.shape[2] for down in self.downs)

    @property
    def _row_draws(self) -> int:
        """Draws for each row of a matrix, whose errors are apart and cancel in products.

        As many orthogonal vectors as there are channels give T exactly.
        """
        exact = _power(self._width)
        return exact if self.is_exact else min(max(1, self.draws // _FEWER), exact)

    @property
    def is_exact(self) -> bool:
        """Whether T is so small that it is formed exactly, with hardly more effort."""
        return _power(self._width) <= self.draws and self.shape[1] * self._width <= 4 * self.draws

    @property
    def shape(self) -> tuple[int, int]:
        """Examples and tokens, (B, n)."""
        return self.downs[0].shape[:2]

    def passed(self, weights: Tensor) -> list[Tensor]:
        """w^T T for each member, (B, n) -> (B, n_member); of both signs apart."""
        weights = weights.to(self.downs[0].like.device, self._dtype)
        if self.is_exact or self._matrices is not None:
            return [(weights[:, None] @ mixing)[:, 0] for mixing in self.matrices()]
        found = self._passed(weights.clamp_min(0))
        if bool((weights < 0).any()):
            negative = self._passed((-weights).clamp_min(0))
            found = [one - other for one, other in zip(found, negative, strict=True)]
        return found

    def matrices(self) -> list[Tensor]:
        """T for each member, (B, n, n_member), a row at a time."""
        if self._matrices is None:
            self._matrices = _shares(self._row_by_row())
        return self._matrices

    def reached(self) -> list[Tensor]:
        """N for each member, (B, n): how strongly each token t depends on any of its tokens."""
        if self._reach is None:
            try:
                self._reach = self._pushed()
            except RuntimeError:  # not every backward pass has a derivative of its own
                self._reach = [rows.sum(-1) for rows in self._row_by_row()]
        return self._reach

    # ------------------------------------------------------------------------ row vectors
    def _passed(self, weights: Tensor) -> list[Tensor]:
        reach = torch.stack(self.reached()).sum(0)
        live = reach > reach.amax(1, keepdim=True) * torch.finfo(self._dtype).eps ** 2
        weights = weights * live
        size = torch.where(live, weights / torch.where(live, reach, 1), 0).sqrt()
        size = size / size.amax(1, keepdim=True).clamp_min(torch.finfo(self._dtype).tiny)

        def vectors(draw: int) -> list[Tensor]:
            return [self._noise(d, draw, i) * size[..., None] for i, d in enumerate(self.downs)]

        found = self._pulled(vectors, range(self.draws))
        total = torch.stack([rows.sum(1, keepdim=True) for rows in found]).sum(0)
        scale = weights.sum(1, keepdim=True) / torch.where(total > 0, total, 1)
        return [rows * scale for rows in found]

    def _pulled(self, vectors: Callable[[int], list[Tensor]], draws: Sequence[int]) -> list[Tensor]:
        """‖∂<t, vectors>/∂u_j‖² for each member, (B, n_member), summed over draws."""

        def pull(given: list[Tensor], several: bool) -> list[Tensor | None]:
            outputs = [(d.edge, v) for d, v in zip(self.downs, given, strict=True)]
            return gradients(outputs, self._edges, self._cuts, several=several)

        def of(draw: int) -> list[Tensor]:
            pairs = zip(self.downs, vectors(draw), strict=True)
            return [d.placed(v.to(d.like)) for d, v in pairs]

        found = self._squares(list(draws), of, pull)
        return [torch.stack(squares).sum(0) for squares in found]

    def _squares(
        self,
        draws: Sequence[int],
        of: Callable[[int], list[Tensor]],
        pull: Callable[[list[Tensor], bool], list[Tensor | None]],
    ) -> list[list[Tensor]]:
        """For each member and each draw ‖·‖² of the gradients at its tokens, (B, n_member)."""
        made: list[list[Tensor]] = [[] for _ in self.members]
        for chunk in self._chunks(draws):
            for single in self._singles(chunk, of, pull):
                for squares, rows in zip(made, self._of_members(single), strict=True):
                    squares.append(rows)
        return made

    def _singles(
        self,
        chunk: Sequence[int],
        of: Callable[[int], list[Tensor]],
        pull: Callable[[list[Tensor], bool], list[Tensor | None]],
    ) -> Iterator[list[Tensor | None]]:
        """The gradients of each draw; of several at once, where the graph can do that."""
        if self._vectorized and len(chunk) > 1:
            given = [torch.stack(one) for one in zip(*map(of, chunk), strict=True)]
            try:
                found = pull(given, True)
            except RuntimeError:  # not every backward pass takes several vectors
                self._vectorized = False
            else:
                for k in range(len(chunk)):
                    yield [None if g is None else g[k] for g in found]
                return
        for draw in chunk:
            yield pull(of(draw), False)

    def _chunks(self, draws: Sequence[int]) -> list[Sequence[int]]:
        most = max(1, _AT_ONCE // max(math.prod(down.shape) for down in self.downs))
        return [draws[i : i + most] for i in range(0, len(draws), most)]

    def _of_members(self, found: Sequence[Tensor | None]) -> list[Tensor]:
        made, gradients_ = [], iter(found)
        for n, member in zip(self.sizes, self.members, strict=True):
            total: Tensor | None = None
            for upstream in member:
                gradient = next(gradients_)
                if gradient is None:
                    continue
                squares = upstream.rows(gradient).to(self._dtype).square().sum(-1)
                total = squares if total is None else total + squares
            if total is None:
                device = self.downs[0].like.device
                total = torch.zeros(self.shape[0], n, dtype=self._dtype, device=device)
            made.append(total)
        return made

    # ------------------------------------------------------------------------ N
    def _pushed(self) -> list[Tensor]:
        """‖Σ_j ∂t_i/∂u_j v_j‖² for each member, (B, n), the mean over draws."""
        with torch.enable_grad():
            given = [
                self._noise(d, 0, i).to(d.like).repeat(d.shape[0], 1, 1).requires_grad_()
                for i, d in enumerate(self.downs)
            ]
            outputs = [(d.edge, d.placed(y)) for d, y in zip(self.downs, given, strict=True)]
            with cut_at(self._cuts):
                ends, vectors = zip(*outputs, strict=True)
                found = torch.autograd.grad(
                    ends, self._edges, vectors, create_graph=True, allow_unused=True
                )
            gradients_ = iter(found)
            members = [
                [(u, u.rows(g)) for u in member if (g := next(gradients_)) is not None]
                for member in self.members
            ]
        pushed = []
        for member in members:
            rows = [r for _, r in member]
            total = torch.zeros(self.shape, dtype=self._dtype, device=given[0].device)
            for draw, back in enumerate(self._forward(rows, given)):
                if not draw:
                    self._check(rows, given, back)
                for pushed_rows in back:
                    if pushed_rows is not None:
                        total += pushed_rows.to(self._dtype).square().sum(-1)
            pushed.append(total / self.draws)
        return pushed

    def _check(self, rows: list[Tensor], given: list[Tensor], back: list[Tensor | None]) -> None:
        """<J v, r> = <v, J^T r>: not so where a part of the backward pass has no derivative.

        Raises:
            RuntimeError: as autograd does for a backward pass that knows that it has none.
        """
        pairs = [(one, r) for one, r in zip(back, given, strict=True) if one is not None]
        there = [(self._noise_like(r, 0, i), r) for i, r in enumerate(rows)]
        one, other = (
            sum(
                ((a * b).to(self._dtype).flatten(1).sum(1) for a, b in both),
                given[0].new_zeros((), dtype=self._dtype),
            )
            for both in (pairs, there)
        )
        size = sum(r.to(self._dtype).flatten(1).square().sum(1) for r in rows)
        if not rows:
            return
        most = _tolerance(rows[0]) * torch.as_tensor(size).sqrt()
        if not bool(((one - other).abs() <= most).all()):
            raise RuntimeError("the backward pass of a mixing hop has no derivative of its own")

    def _forward(self, rows: list[Tensor], given: list[Tensor]) -> Iterator[list[Tensor | None]]:
        """For each draw of v, ∂t/∂u v of every downstream tensor, (B, n, features)."""

        live = [i for i, r in enumerate(rows) if r.requires_grad]

        def push(noise: list[Tensor], several: bool) -> list[Tensor | None]:
            if not live:
                return [None] * len(given)
            vectors = [noise[i] for i in live]
            return list(
                torch.autograd.grad(
                    [rows[i] for i in live],
                    given,
                    vectors,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=several,
                )
            )

        for chunk in self._chunks(range(self.draws)):
            drawn = [[self._noise_like(r, draw, i) for i, r in enumerate(rows)] for draw in chunk]
            if self._vectorized and len(chunk) > 1:
                try:
                    found = push([torch.stack(one) for one in zip(*drawn, strict=True)], True)
                except RuntimeError:
                    self._vectorized = False
                else:
                    for k in range(len(chunk)):
                        yield [None if g is None else g[k] for g in found]
                    continue
            for noise in drawn:
                yield push(noise, False)

    # ------------------------------------------------------------------------ matrices
    def _row_by_row(self) -> list[Tensor]:
        """‖∂t_i/∂u_j‖² for each member, (B, n, n_member)."""
        batch, n = self.shape
        draws = self._row_draws

        noise = [
            [self._noise(down, draw, i).to(down.like) for draw in range(draws)]
            for i, down in enumerate(self.downs)
        ]

        def of(question: int) -> list[Tensor]:
            row, draw = divmod(question, draws)
            vectors = []
            for down, drawn in zip(self.downs, noise, strict=True):
                vector = torch.zeros(down.shape, dtype=down.like.dtype, device=down.like.device)
                vector[:, row] = drawn[draw][:, row]
                vectors.append(down.placed(vector))
            return vectors

        def pull(given: list[Tensor], several: bool) -> list[Tensor | None]:
            outputs = [(d.edge, v) for d, v in zip(self.downs, given, strict=True)]
            return gradients(outputs, self._edges, self._cuts, several=several)

        found = self._squares(range(n * draws), of, pull)
        return [torch.stack(squares, 1).unflatten(1, (n, draws)).mean(2) for squares in found]

    # ------------------------------------------------------------------------ random numbers
    def _noise(self, down: Downstream, draw: int, part: int) -> Tensor:
        return self._signs(down.shape[1:], draw, part).to(down.like.device, self._dtype)

    def _noise_like(self, rows: Tensor, draw: int, part: int) -> Tensor:
        return self._signs(tuple(rows.shape[1:]), draw, part).to(rows).expand_as(rows)

    def _signs(self, shape: tuple[int, ...], draw: int, part: int) -> Tensor:
        """(1, n, features) of ±1; the first tokens' are the same whatever n is.

        Over all draws those of neighbouring channels and tokens are orthogonal (the rows of a
        Hadamard matrix, with random signs), so that what they have in common cancels.
        """
        if (shape, part) not in self._random:
            generator = torch.Generator().manual_seed(self.seed * 1013 + part)
            self._random[shape, part] = torch.randint(2, shape, generator=generator)
        before = sum(down.shape[2] for down in self.downs[:part])
        place = torch.arange(shape[0])[:, None] ^ torch.arange(before, before + shape[1])
        odd = self._random[shape, part].clone()
        for bit in range(self.draws.bit_length()):
            odd += (place >> bit) & (draw >> bit)
        return (1 - odd % 2 * 2)[None]


def _tolerance(rows: Tensor) -> float:
    return 0.2 if rows.dtype in (torch.float16, torch.bfloat16) else 1e-2


def _shares(squares: Sequence[Tensor]) -> list[Tensor]:
    """Rows divided by their sums over all members; a row that depends on none of them stays 0."""
    total = torch.stack([one.sum(-1, keepdim=True) for one in squares]).sum(0)
    return [one / torch.where(total > 0, total, 1) for one in squares]


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (max(1, number) - 1).bit_length()


def _size(upstream: Upstream) -> int:
    edge = upstream.edge
    return (
        edge.numel() if isinstance(edge, Tensor) else math.prod(shape_of(edge.node, edge.output_nr))
    )
