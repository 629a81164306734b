"""Signals, such as audio and series: each channel as a line, with its relevance under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from captum_attn._checks import number, texts
from captum_attn.errors import InputError, OptionError
from captum_attn.visualization._arrays import array, by_label, check_counts
from captum_attn.visualization._fonts import finished
from captum_attn.visualization._options import checked_options
from captum_attn.visualization._panels import colour_bar
from captum_attn.visualization._style import BARS, of_sign, resolved_sign, scale_limit
from captum_attn.visualization.picture import Picture

__all__ = ["visualize_signal"]

MOST_COLUMNS = 1200  # of relevance in a strip; longer ones are averaged
MOST_CHANNELS = 64


@checked_options()
def visualize_signal(
    attributions: Any,
    signal: Any,
    *,
    rate: float | None = None,
    channels: Sequence[str] | None = None,
    sign: str = "auto",
    outlier_perc: float = 2,
    titles: Sequence[str] | None = None,
    width: float = 9.0,
) -> Picture:
    """Draws one signal, and its relevance as a strip of colour under each channel.

    Args:
        attributions (Tensor, array, or Mapping of label to such): of the signal's shape; or (T,),
            one number for each moment, for all channels. A Mapping has a row of strips for each
            label: several methods or targets.
        signal (Tensor or array): (T,), (C, T) or (1, C, T), channels first: a waveform, or the
            series of a forecaster.
        rate (float, optional): moments in a second, which the axis then counts. Default: moments.
        channels (sequence of str, optional): C names.
        sign, outlier_perc: as for `visualize_image`; one colour scale for each label.
        titles (sequence of str, optional): one title.
        width (float): of the figure, in inches. Default: 9.

    Returns:
        Picture: a figure with a line and strips for each channel.

    Raises:
        InputError: for shapes that do not fit, or are not finite.
        OptionError: for an unknown option.

    Examples::

        >>> relevance = GenericAttention(model).attribute(waveform, target=3)  # (1, T)
        >>> visualize_signal(relevance, waveform, rate=16_000).save("why.png")
    """
    values = _rows("signal", array(signal, "signal"))  # (C, T)
    if rate is not None and number("rate", rate, 0, open_ends="(") <= 0:
        raise OptionError(f"rate: expected moments in a second, got {rate}")
    if channels is not None:
        channels = texts("channels", channels, len(values), "channel")
    check_counts(1, {"titles": titles})
    maps = {
        label: _fitted(label, one, values.shape) for label, one in by_label(attributions).items()
    }
    heights = [1.0, *[0.16] * len(maps)] * len(values)
    picture = Picture(
        alt=f"{', '.join(filter(None, maps)) or 'relevance'} of a signal",
        figsize=(width, min(60.0, 0.9 + sum(heights) * 0.95)),
        layout="constrained",
    )
    panels = picture.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    end = values.shape[1] / (rate or 1)
    scales = {label: _scale(found, sign, outlier_perc) for label, found in maps.items()}
    step = 1 + len(maps)
    for i, line in enumerate(values):
        _draw_line(panels[i * step], line, end, channels[i] if channels else "")
        for ax, (label, found) in zip(panels[i * step + 1 :], maps.items(), strict=False):
            _draw_strip(ax, found[i], end, label, *scales[label])
    panels[-1].tick_params(labelbottom=True, bottom=True)
    panels[-1].set_xlabel("moment" if rate is None else "seconds", fontsize=9)
    for label, (shown, limit) in scales.items():
        if limit:
            mappable = ScalarMappable(Normalize(-1 if shown == "all" else 0, 1), BARS[shown])
            colour_bar(picture, list(panels), mappable, limit, shown, label, shrink=0.3, pad=0.02)
    if titles:
        panels[0].set_title(titles[0], fontsize=11, fontweight="bold", loc="left")
    finished(picture)
    return picture


def _rows(name: str, values: np.ndarray) -> np.ndarray:
    """(C, T)."""
    found = values[0] if values.ndim == 3 and len(values) == 1 else values
    found = found[None] if found.ndim == 1 else found
    if found.ndim != 2 or 0 in found.shape or len(found) > MOST_CHANNELS or found.shape[1] < 2:
        raise InputError(
            f"{name}: expected one signal, (T,), (C, T) or (1, C, T) with at most {MOST_CHANNELS} "
            f"channels, which come first; got {values.shape}"
        )
    return found


def _fitted(label: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    name = f"attributions[{label!r}]" if label else "attributions"
    found = _rows(name, array(values, name))
    if found.shape not in (shape, (1, shape[1])):
        raise InputError(f"{name}: expected the signal's shape {shape}, got {found.shape}")
    return np.broadcast_to(found, shape)


def _scale(values: np.ndarray, sign: str, outlier_perc: float) -> tuple[str, float]:
    shown = resolved_sign(sign, [values])
    return shown, scale_limit(of_sign(values, shown), outlier_perc)


def _draw_line(ax: Axes, line: np.ndarray, end: float, name: str) -> None:
    ax.plot(np.linspace(0, end, len(line)), line, color="0.25", lw=0.8)
    ax.set_xlim(0, end)
    ax.set_ylabel(name, fontsize=9)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(bottom=False, labelbottom=False, labelsize=7)


def _draw_strip(
    ax: Axes, values: np.ndarray, end: float, label: str, sign: str, limit: float
) -> None:
    parts = np.array_split(values, min(len(values), MOST_COLUMNS))
    cells = of_sign(np.array([part.mean() for part in parts]), sign)[None] / (limit or 1.0)
    low = -1 if sign == "all" else 0
    ax.imshow(cells, aspect="auto", cmap=BARS[sign], vmin=low, vmax=1, extent=(0, end, 0, 1))
    ax.set_yticks([])
    ax.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    ax.tick_params(bottom=False, labelbottom=False, labelsize=7)
