"""Colours, scales and Captum's sign and outlier options.

Colours are safe for the colour-blind: orange speaks for the target, purple against it, and white
is between them; values without a sign go through viridis.
"""

from __future__ import annotations

import numpy as np
from captum.attr import visualization
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, to_rgb

FOR, AGAINST = (np.array(to_rgb(colour)) for colour in ("#e08214", "#8073ac"))
LEGEND = "orange: for the target, purple: against it"
GREY = "0.35"  # of what is said beside the picture
SIGNS = ("auto", *visualization.VisualizeSign.__members__)
EMPTY = "all zero"  # the note on a map without any relevance
LEFT_OUT = "left out"  # what a frame of dashes says


def _ramp(name: str, *stops: tuple[float, np.ndarray, float]) -> Colormap:
    return LinearSegmentedColormap.from_list(name, [(at, (*c, alpha)) for at, c, alpha in stops])


def tint(value: float) -> tuple[float, float, float]:
    """The colour behind a word, light enough for black letters.

    Args:
        value (float): relevance divided by the largest magnitude; beyond [-1, 1] it is cut off.

    Returns:
        tuple: red, green and blue in [0, 1].

    Examples::

        >>> [round(part, 2) for part in tint(0.0)]
        [1.0, 1.0, 1.0]
    """
    red, green, blue = 1 - min(abs(value), 1) * (1 - (FOR if value > 0 else AGAINST))
    return float(red), float(green), float(blue)


SIGNED = LinearSegmentedColormap.from_list("signed", [tint(-1.0), tint(0.0), tint(1.0)])
SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"
# Laid over an image: what has no relevance is left as it is.
OVERLAYS = {
    "all": _ramp("overlay", (0, AGAINST, 1), (0.5, AGAINST, 0), (0.5, FOR, 0), (1, FOR, 1)),
    "positive": _ramp("overlay_for", (0, FOR, 0), (1, FOR, 1)),
    "negative": _ramp("overlay_against", (0, AGAINST, 0), (1, AGAINST, 1)),
}
OVERLAYS["absolute_value"] = OVERLAYS["positive"]
# The same on white, for their colour bars.
BARS = {
    "all": SIGNED,
    "positive": LinearSegmentedColormap.from_list("for", [tint(0.0), tint(1.0)]),
    "negative": LinearSegmentedColormap.from_list("against", [tint(0.0), tint(-1.0)]),
}
BARS["absolute_value"] = BARS["positive"]
LINES = ListedColormap([AGAINST, FOR])  # contours, where pale colours would not be seen


def resolved_sign(sign: str, values: list[np.ndarray]) -> str:
    """Captum's sign option; "auto" is "all" where a value is negative, else "positive"."""
    if sign != "auto":
        return sign
    return "all" if any((v < 0).any() for v in values) else "positive"


def of_sign(values: np.ndarray, sign: str) -> np.ndarray:
    """What of the values is shown: as in Captum, negative ones alone become positive."""
    chosen = {
        "all": values,
        "positive": values.clip(min=0),
        "negative": (-values).clip(min=0),
        "absolute_value": np.abs(values),
    }
    return chosen[sign]


def scale_limit(values: np.ndarray, outlier_perc: float) -> float:
    """Where the colour scale ends, by Captum's rule; 0 where all values are.

    The largest magnitudes that make up `outlier_perc` per cent of the sum lie beyond it.
    """
    ordered = np.sort(np.abs(values), axis=None)
    sums = ordered.cumsum()
    if not len(sums) or sums[-1] == 0:
        return 0.0
    # Rounding may ask for more than there is, where Captum fails.
    least = min(sums[-1] * 0.01 * (100 - outlier_perc), sums[-1])
    return float(ordered[np.searchsorted(sums, least)])


def shares_of(values: np.ndarray, sign: str, limit: float) -> np.ndarray:
    """In [-1, 1]; what is against the target is negative, also where it alone is shown."""
    shares = (of_sign(values, sign) / (limit or 1.0)).clip(-1, 1)
    return -shares if sign == "negative" else shares


def signed(value: float, digits: int = 2) -> str:
    """`+0.12`, `−0.12` or `0`."""
    shown = f"{value:+.{digits}f}".replace("-", "−")
    return shown if float(shown[1:]) else "0"
