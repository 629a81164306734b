"""Slow, plain rewrites of the methods that the papers compare with, in float64.

One example at a time, nothing shared with the library. A map ``A`` and its gradient ``G`` are
``(H, q, k)``; ``seen`` is the set of entries that can be attended, ``(q, k)`` bool.
"""

from __future__ import annotations

import torch

from tests.plain import fuse_heads


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
