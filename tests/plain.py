"""Slow, plain rewrites of the equations, against which the library is compared.

One example at a time, float64, nothing shared with the library. A map ``A`` and its gradient
``G`` are ``(H, q, k)``; a weighted map ``A_bar`` is ``(q, k)``; the relevance of several streams
is a dict ``R[row stream, source stream]`` of matrices. Functions return new objects.

The papers: Abnar and Zuidema, ACL 2020 (rollout); Chefer, Gur and Wolf, ICCV 2021 (GAE, "Eq." below
unless said otherwise); Cui, Fan and Chen, arXiv 2605.27458 (heterogenous attention, "HG Eq.").
"""

from __future__ import annotations

import torch

# ------------------------------------------------------------ matrices


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def fuse_heads(maps, how="mean"):
    """(H, q, k) -> (q, k), entry by entry."""
    heads, rows, columns = maps.shape
    fused = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            entries = [float(maps[h, i, j]) for h in range(heads)]
            fused[i, j] = {
                "mean": sum(entries) / heads,
                "max": max(entries),
                "min": min(entries),
            }[how]
    return fused


def row_normalised(matrix):
    out = matrix.clone()
    for i in range(out.shape[0]):
        out[i] = out[i] / out[i].sum()
    return out


# ------------------------------------------------------------ class-agnostic


def raw_attention(A):
    return fuse_heads(A)


def rollout(maps, head_fusion="mean", start_layer=0):
    """R = A_hat_L ... A_hat_start, A_hat = rownorm(heads fused + I)."""
    R = eye(maps[0].shape[-1])
    for A in maps[start_layer:]:
        R = row_normalised(fuse_heads(A, head_fusion) + eye(len(R))) @ R
    return R


def rollout_across(R_ss, A, R_qq, head_fusion="mean"):
    """Eq. 12: what stream s owes to stream q, by the last cross-attention map."""
    return R_ss.T @ fuse_heads(A, head_fusion) @ R_qq


# ------------------------------------------------------------ GAE


def gae_map(A, G):
    """Eq. 5: mean over heads of (G * A)^+."""
    return fuse_heads((G * A).clamp(min=0))


def gae(maps, gradients, start_layer=0, aggregate=True):
    """A single stream, Eq. 6."""
    R = eye(maps[0].shape[-1])
    for A, G in list(zip(maps, gradients, strict=True))[start_layer:]:
        update = gae_map(A, G) @ R
        R = R + update if aggregate else update
    return R


def identity_blocks(sizes, absent=()):
    """The start: every stream knows itself and nothing of the others.

    ``absent``: (row, source) pairs that the model never connects. An encoder is never updated by
    its decoder; no rule reads or writes that block, which matters only without aggregation.
    """
    return {
        (s, x): eye(sizes[s]) if s == x else torch.zeros(sizes[s], sizes[x], dtype=torch.float64)
        for s in sizes
        for x in sizes
        if (s, x) not in absent
    }


def sources_of(R, s):
    return [source for row, source in R if row == s]


def residual_normalised(R):
    """Eq. 8, 9. A row of R - I that sums to 0 stays 0: only the identity is left in it."""
    out = torch.zeros_like(R)
    for i in range(len(R)):
        row = R[i].clone()
        row[i] = row[i] - 1
        total = row.sum()
        if total != 0:
            out[i] = row / total
        out[i, i] = out[i, i] + 1
    return out


def gae_within(R, s, A_bar, *, read=None, aggregate=True):
    """Eq. 6, 7: R[s, x] += A_bar R[s, x] for all x. ``read``: the blocks of the version read."""
    read = R if read is None else read
    new = dict(R)
    for x in sources_of(R, s):
        update = A_bar @ read[s, x]
        new[s, x] = R[s, x] + update if aggregate else update
    return new


def gae_across(
    R,
    s,
    q,
    A_bar,
    *,
    read=None,
    normalize=True,
    self_in_rule_10=True,
    aggregate=True,
    rows=slice(None),
):
    """Eq. 10, 11: s asks, q answers; every right-hand side as before the call.

    ``rows``: the tokens of s that ask; the others are no part of the call and stay as they are.
    """
    read = R if read is None else read
    new = dict(R)
    for x in sources_of(R, s):
        if (q, x) not in read:
            continue
        if x != q:
            update = A_bar @ read[q, x]  # Eq. 11
        elif not self_in_rule_10:
            update = A_bar
        elif normalize:
            own = residual_normalised(R[s, s])[rows, rows]
            update = own.T @ A_bar @ residual_normalised(read[q, q])
        else:
            update = R[s, s][rows, rows].T @ A_bar @ read[q, q]
        new[s, x] = R[s, x].clone()
        new[s, x][rows] = R[s, x][rows] + update if aggregate else update
    return new


# ------------------------------------------------------------ heterogenous attention


def heterogenous_map(A, G, correction="positive"):
    """HG Eq. 1, 2, 3."""
    corrected = {
        "positive": G.clamp(min=0) * A,
        "full": G * A,
        "absolute": G.abs() * A,
    }[correction]
    return fuse_heads(corrected)


def heterogenous(R, s, v, A_bar, *, read=None, rows=slice(None)):
    """HG Eq. 4-7: R[s, x] = R_q[s, x] + A_bar R_v[v, x], for every source x on its own."""
    read = R if read is None else read
    new = dict(R)
    for x in sources_of(R, s):
        if (v, x) in read:
            new[s, x] = R[s, x].clone()
            new[s, x][rows] = R[s, x][rows] + A_bar @ read[v, x]
    return new


def noise_link(R, s):
    """HG Eq. 8-10 on the version of stream s that another stream reads first."""
    return {**R, (s, s): residual_normalised(R[s, s])}


# ------------------------------------------------------------ along a hand-written wiring
#
# A wiring lists the attention calls of a model in the order of execution. A call is (s, q): stream
# s asks, stream q answers; (s, q, rows), where these tokens of s ask alone; or (s, q, rows,
# columns), where these of q answer alone. Calls in a list of their own all read what was there
# before the list. A function R -> R begins or joins streams.


def calls_of(step):
    """The calls of one step of a wiring, all four parts of each."""
    calls = step if isinstance(step, list) else [] if callable(step) else [step]
    return [(*call, *[slice(None)] * (4 - len(call))) for call in calls]


def _placed(A, columns, n):
    """(..., q, k) -> (..., q, n): the keys at their places among the n tokens that answer."""
    out = torch.zeros(*A.shape[:-1], n, dtype=A.dtype)
    out[..., columns] = A
    return out


def follow(wiring, R, maps, rule):
    """R after all calls; ``maps``: A_bar of each; ``rule(R, s, q, A_bar, rows)`` -> R."""
    maps = iter(maps)
    for step in wiring:
        if callable(step):
            R = step(R)
            continue
        before = R
        for s, q, rows, columns in calls_of(step):
            A_bar = _placed(next(maps), columns, len(before[q, q]))
            after = rule(before, s, q, A_bar, rows)
            R = {**R, **{key: block for key, block in after.items() if key[0] == s}}
    assert next(maps, None) is None, "the wiring has fewer calls than the model"
    return R


def gae_rule(R, s, q, A_bar, rows, **options):
    if s == q:
        return gae_within(R, s, A_bar)
    return gae_across(R, s, q, A_bar, rows=rows, **options)


def heterogenous_rule(R, s, q, A_bar, rows):
    return heterogenous(R, s, q, A_bar, rows=rows)


def with_noise_link(wiring, R, maps):
    """The heterogenous rule, with the version of a stream that another one reads first linked."""
    linked, maps = set(), iter(maps)
    for step in wiring:
        if callable(step):
            R = step(R)
            continue
        for s, q, *_ in calls_of(step):
            if s != q and q not in linked:
                linked.add(q)
                R = noise_link(R, q)
        R = follow([step], R, [next(maps) for _ in calls_of(step)], heterogenous_rule)
    return R


def follow_rollout(wiring, R, maps, real, head_fusion="mean"):
    """Rollout within each stream, joined by the last call of each stream to each other (Eq. 12).

    ``real``: stream -> (n,) bool; padding, where there is some, asks nothing.
    """
    maps, last = iter(maps), {}  # last: (s, q) -> what it adds, source -> (rows of s, block)

    def joined(R, last, s):
        blocks = {x: R[s, x].clone() for x in sources_of(R, s)}
        for (asks, _), added in last.items():
            for x, (rows, block) in added.items() if asks == s else ():
                blocks[x][rows] += block
        return blocks

    for step in wiring:
        if callable(step):  # what begins from another stream begins from its joined rows
            whole = {(s, x): b for s in {s for s, _ in R} for x, b in joined(R, last, s).items()}
            begun = step(whole)
            R = {key: begun[key] if begun[key] is not whole[key] else R[key] for key in R}
            continue
        before, answered = R, dict(last)
        for s, q, rows, columns in calls_of(step):
            A = fuse_heads(_placed(next(maps), columns, len(R[q, q])), head_fusion)
            if s == q:
                step_ = row_normalised(A + eye(len(A)))
                R = {**R, **{(s, x): step_ @ before[s, x] for x in sources_of(R, s)}}
            else:
                own = before[s, s][rows, rows].clone()
                if s in real:
                    own[~real[s][rows]] = 0
                answer = joined(before, answered, q)
                last[s, q] = {x: (rows, own.T @ A @ b) for x, b in answer.items() if x != s}
    return {(s, x): block for s in {s for s, _ in R} for x, block in joined(R, last, s).items()}


def follow_raw(wiring, R, maps, weights):
    """The last map within each stream that is read, and its last one to each other stream.

    ``weights``: stream that is read -> (n,); -> source -> relevance.
    """
    maps, last = iter(maps), {}
    for step in wiring:
        if callable(step):
            R = step(R)
            continue
        for s, q, rows, columns in calls_of(step):
            answer = {x: R[q, x] for x in sources_of(R, q)}
            A = _placed(next(maps), columns, len(R[q, q]))
            last[s, q] = rows, raw_attention(A), answer
    relevance = {}
    for (s, _), (rows, A, answer) in last.items():
        for x, block in answer.items() if s in weights else ():
            relevance[x] = relevance.get(x, 0) + weights[s][rows] @ A @ block
    return relevance


# ------------------------------------------------------------ maps of a model


class Maps(list):
    """Where a model's attention calls leave their maps (1, H, q, k), while ``recording`` is on.

    It is off while the library runs: a tensor kept alive here would hide mistakes of its own.
    """

    recording = False

    def add(self, A):
        if self.recording:
            self.append(A)
        return A


def maps_and_gradients(model, objective, *inputs, **named):
    """Run a model that adds every attention map to ``model.maps``, on one example.

    -> lists of (H, q, k): the maps in the order of the calls, and d objective(output) / d map
    (zeros where the objective does not depend on a map).
    """
    maps = model.maps
    try:
        maps.recording = True
        with torch.enable_grad():
            scalar = objective(model(*inputs, **named))
            assert {A.shape[0] for A in maps} == {1}, "maps were seen, of one example"
            found = torch.autograd.grad(scalar, list(maps), allow_unused=True)
        A = [map_[0].detach() for map_ in maps]
        G = [
            torch.zeros_like(a) if g is None else g[0].detach()
            for a, g in zip(A, found, strict=True)
        ]
        return A, G
    finally:
        maps.recording = False
        maps.clear()


# ------------------------------------------------------------ comparing


def close(actual, expected, tolerance=1e-10):
    """Equal shapes, and equal entries relative to the largest (some goldens are below 1e-8)."""
    assert actual.shape == expected.shape
    assert expected.isfinite().all()
    scale = float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    assert difference <= tolerance * scale + 1e-20, (difference, scale)
