"""The measures' equations once more: one example, one step and one unit at a time."""

from __future__ import annotations

import math

import torch


def order_of(scores, order="most"):
    """Indices in the order of removal; Python's sort is stable, so ties keep their index."""
    sign = -1 if order == "most" else 1
    return sorted(range(len(scores)), key=lambda i: sign * float(scores[i]))


def half_even(number):
    return round(number)  # Python rounds halves to even


def curve(f, x, scores, fractions, remove, order="most", insert=False):
    """f of one example x with a fraction of its units removed; `remove(x, units)` removes them."""
    ranked = order_of(scores, order)
    values = []
    for fraction in fractions:
        k = half_even(fraction * len(ranked))
        gone = ranked[k:] if insert else ranked[:k]
        values.append(float(f(remove(x, gone))))
    return values


def trapezoid(values, fractions):
    area = 0.0
    for i in range(len(values) - 1):
        area += (values[i] + values[i + 1]) / 2 * (fractions[i + 1] - fractions[i])
    return area


def aopc(p, p_t):
    """VTranM Eq. 21."""
    return sum(p - value for value in p_t) / len(p_t)


def log_odds(p, p_t):
    """VTranM Eq. 22."""
    return sum(math.log(value / p) for value in p_t) / len(p_t)


def saco(f, x, scores, remove, bins):
    """Wu et al. 2024, Algorithm 1, for a number of units that `bins` divides."""
    ranked, size = order_of(scores), len(scores) // bins
    groups = [ranked[i * size : (i + 1) * size] for i in range(bins)]
    s = [sum(float(scores[u]) for u in group) for group in groups]
    d = [float(f(x)) - float(f(remove(x, group))) for group in groups]
    total = weights = 0.0
    for i in range(bins - 1):
        for j in range(i + 1, bins):
            weight = s[i] - s[j] if d[i] >= d[j] else -(s[i] - s[j])
            total += weight
            weights += abs(weight)
    return total / weights


def linear_imputation(image, gone):
    """ROAD's imputation of one channel (H, W) with `gone` (H, W), by a dense system."""
    height, width = image.shape
    cells = [(r, c) for r in range(height) for c in range(width) if gone[r, c]]
    number = {cell: i for i, cell in enumerate(cells)}
    left = torch.zeros(len(cells), len(cells), dtype=torch.float64)
    right = torch.zeros(len(cells), dtype=torch.float64)
    for (r, c), i in number.items():
        for dr in (-1, 0, 1):
            for dc in (-1, 0, 1):
                at = r + dr, c + dc
                if (dr, dc) == (0, 0) or not (0 <= at[0] < height and 0 <= at[1] < width):
                    continue
                weight = 1 / 6 if 0 in (dr, dc) else 1 / 12
                left[i, i] += weight
                if at in number:
                    left[i, number[at]] -= weight
                else:
                    right[i] += weight * float(image[at])
    solved = image.clone()
    for cell, value in zip(cells, torch.linalg.solve(left, right), strict=True):
        solved[cell] = value
    return solved
