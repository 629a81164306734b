"""Slow, plain rewrites of the methods that the papers compare with, in float64.

One example at a time, nothing shared with the library. A map ``A`` and its gradient ``G`` are
``(H, q, k)``; ``seen`` is the set of entries that can be attended, ``(q, k)`` bool.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.plain import eye, fuse_heads, row_normalised


def everywhere(A):
    return torch.ones(A.shape[1:], dtype=torch.bool)


# ------------------------------------------------------------ Grad-CAM, Grad-SAM


def attention_gradcam(A, G, weights="map", seen=None):
    """(E_h[w_h A_h])^+; "row": w_h of each row alone, without its own column."""
    seen = everywhere(A) if seen is None else seen
    weighted = torch.zeros_like(A)
    for h in range(len(A)):
        for i in range(A.shape[1]):
            if weights == "map":
                entries = [float(g) for g in G[h][seen]]
            else:
                entries = [float(G[h, i, j]) for j in range(A.shape[2]) if seen[i, j] and i != j]
            weighted[h, i] = A[h, i] * (sum(entries) / len(entries) if entries else 0.0)
    return fuse_heads(weighted).clamp(min=0)


def grad_sam(maps, gradients, axis="key"):
    """1/(L H N) times the sum of A (grad A)^+ over layers, heads and the other axis."""
    n = maps[0].shape[-1]
    relevance = torch.zeros(n, dtype=torch.float64)
    for A, G in zip(maps, gradients, strict=True):
        for h in range(len(A)):
            for i in range(n):
                for j in range(n):
                    token = j if axis == "key" else i
                    relevance[token] += A[h, i, j] * max(float(G[h, i, j]), 0.0)
    return relevance / (len(maps) * len(maps[0]) * n)


# ------------------------------------------------------------ AttCAT


def attcat(maps, vectors, gradients):
    """vectors, gradients: (n, D) of what enters each layer."""
    relevance = torch.zeros(maps[0].shape[-1], dtype=torch.float64)
    for A, h, g in zip(maps, vectors, gradients, strict=True):
        for i in range(len(relevance)):
            received = sum(float(a) for a in A[:, :, i].flatten()) / (A.shape[0] * A.shape[1])
            relevance[i] += received * sum(float(a * b) for a, b in zip(h[i], g[i], strict=True))
    return relevance


# ------------------------------------------------------------ averaged gradients: TAM, BI


def feedback(gradients):
    """E_h[(mean over steps)^+]; gradients: (H, q, k) of the last map at every step."""
    return fuse_heads((sum(gradients) / len(gradients)).clamp(min=0))


def tam(maps, gradients, row, start_layer=0, normalize=False):
    """s of one row, times its feedback."""
    s = fuse_heads(maps[-1])[row]
    for A in reversed(maps[start_layer:-1]):
        moved = s @ fuse_heads(A) + s
        s = moved / 2 if normalize else moved
    return s * feedback(gradients)[row]


def bi_head_map(A, G):
    """P of BI-H."""
    importance = []
    for h in range(len(A)):
        product = A[h].T @ G[h]
        importance.append(sum(abs(float(x)) for x in product.flatten()) / product.numel())
    return sum(A[h] * importance[h] / sum(importance) for h in range(len(A)))


def bi_token_map(A, values, projection, skip):
    """P of BI-T; values (n, D) all heads side by side, projection (D, D), skip (n, D)."""
    P = fuse_heads(A)
    for j in range(P.shape[1]):
        P[:, j] = P[:, j] * (values[j] @ projection).norm() / skip[j].norm()
    return P


def bi(perceptions, gradients):
    """(R * W), all rows; perceptions: P of every layer from the start."""
    R = torch.eye(perceptions[0].shape[-1], dtype=torch.float64)
    for P in perceptions:
        R = R + P @ R
    return R * feedback(gradients)


# ------------------------------------------------------------ Grad-ECLIP


def grad_eclip(G, q, k, row, similarity=True, seen=None):
    """One layer before the clamp: lambda_j times the sum over heads; q, k: (H, n, d)."""
    n = G.shape[-1]
    seen = list(range(n)) if seen is None else seen
    h = torch.tensor([float(G[:, row, j].sum()) for j in range(n)], dtype=torch.float64)
    if not similarity:
        return h
    query, keys = torch.cat(list(q[:, row])), [torch.cat(list(k[:, j])) for j in range(n)]
    cosines = [float(query @ key / query.norm() / key.norm()) for key in keys]
    least, most = min(cosines[j] for j in seen), max(cosines[j] for j in seen)
    share = [(c - least) / (most - least) if j in seen else 0.0 for j, c in enumerate(cosines)]
    return h * torch.tensor(share, dtype=torch.float64)


# ------------------------------------------------------------ TIS


def kept_tokens(centroid, keep):
    """The floor(keep n) largest tokens of a centroid, as a set."""
    order = sorted(range(len(centroid)), key=lambda i: -float(centroid[i]))
    return set(order[: math.floor(keep * len(centroid))])


def tis(masks, scores):
    """masks: the sets of tokens that were kept; the mean score of those that kept a token."""
    n = 1 + max(max(mask) for mask in masks if mask)
    relevance = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        own = [s for mask, s in zip(masks, scores, strict=True) if i in mask]
        relevance[i] = sum(own) / len(own) if own else 0.0
    return relevance


def k_means(vectors, start):
    """Lloyd's algorithm from the vectors whose numbers are given; empty clusters are dropped."""
    centroids, before = [vectors[i] for i in start], None
    while True:
        nearest = [
            min(range(len(centroids)), key=lambda c: float((v - centroids[c]).norm()))
            for v in vectors
        ]
        groups = [[v for v, c in zip(vectors, nearest, strict=True) if c == i]
                  for i in range(len(centroids))]  # fmt: skip
        if nearest == before:
            return torch.stack(centroids)
        full = all(groups)
        centroids = [sum(group) / len(group) for group in groups if group]
        before = nearest if full else None


# ------------------------------------------------------------ ViT-CX


def unit(x):
    low, high = float(x.min()), float(x.max())
    return (x - low) / (high - low) if high > low else torch.zeros_like(x)


def vit_cx_masks(maps, size, threshold):
    """maps: (D, h, w) features over the patches; complete linkage of the enlarged ones."""
    large = [unit(F.interpolate(m[None, None], size, mode="bilinear")[0, 0]) for m in maps]
    large = [m for m in large if m.any()]

    def distance(a, b):
        return 1 - float((a * b).sum() / a.norm() / b.norm())

    clusters = [[i] for i in range(len(large))]
    table = [[distance(a, b) for b in large] for a in large]
    while len(clusters) > 1:
        pairs = [(max(table[i][j] for i in a for j in b), x, y)
                 for x, a in enumerate(clusters) for y, b in enumerate(clusters[:x])]  # fmt: skip
        least, x, y = min(pairs)
        if least > threshold:
            break
        clusters[y] += clusters.pop(x)
    return [unit(sum(large[i] for i in cluster)) for cluster in clusters]


def vit_cx(x, masks, noise, p):
    """(1/N) sum of s_i M_i over the sum of the M_j; x (C, H, W), p: an image -> a number."""
    total, covered = torch.zeros_like(masks[0]), torch.zeros_like(masks[0])
    for M, e in zip(masks, noise, strict=True):
        s = p(x * M + e * (1 - M)) - p(x + e * (1 - M)) + p(x)
        total, covered = total + s * M, covered + M
    share = torch.where(covered == 0, 0.0, total / torch.where(covered == 0, 1.0, covered))
    return share / len(masks)


# ------------------------------------------------------------ DIX


def dix(steps, row):
    """steps: for each fraction, the maps and their gradients, all layers, (H, n, n) each."""
    R = eye(steps[0][0][0].shape[-1])
    for layer in range(len(steps[0][0])):
        M = sum(fuse_heads((maps[layer] * grads[layer]).clamp(min=0)) for maps, grads in steps)
        R = row_normalised(M / len(steps) + eye(len(R))) @ R
    return R[row]


# ------------------------------------------------------------ attention flow


def max_flow(capacity, source, sink):
    """Edmonds and Karp; capacity: dict node -> dict node -> number."""
    left = {a: dict(edges) for a, edges in capacity.items()}
    for a, edges in capacity.items():
        for b in edges:
            left.setdefault(b, {}).setdefault(a, 0.0)
    total = 0.0
    while True:
        came, queue = {source: None}, [source]
        for a in queue:
            for b, room in left.get(a, {}).items():
                if room > 1e-15 and b not in came:
                    came[b] = a
                    queue.append(b)
        if sink not in came:
            return total
        path, b = [], sink
        while came[b] is not None:
            path.append((came[b], b))
            b = came[b]
        room = min(left[a][b] for a, b in path)
        for a, b in path:
            left[a][b] -= room
            left[b][a] += room
        total += room


def attention_flow(maps, row):
    """The flow from a row behind the last layer to each token of the input."""
    n, capacity = maps[0].shape[-1], {}
    for layer, A in enumerate(maps, 1):
        shares = row_normalised(fuse_heads(A) + eye(n))
        for q in range(n):
            capacity[layer, q] = {(layer - 1, k): float(shares[q, k]) for k in range(n)}
    return torch.tensor(
        [max_flow(capacity, (len(maps), row), (0, k)) for k in range(n)], dtype=torch.float64
    )


# ------------------------------------------------------------ ODAM


def odam(features, gradient):
    """(C, ...): the gradient is not pooled."""
    return sum(f * g for f, g in zip(features, gradient, strict=True)).clamp(min=0)
