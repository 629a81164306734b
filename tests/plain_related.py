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
