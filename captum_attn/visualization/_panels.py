"""One panel: an image, a map on it as Captum draws it, its colour bar, boxes."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from captum.attr import visualization
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle

from captum_attn.errors import InputError, OptionError
from captum_attn.visualization._hover import Numbers
from captum_attn.visualization._style import (
    BARS,
    DIVERGING,
    EMPTY,
    FOR,
    GREY,
    LINES,
    OVERLAYS,
    SEQUENTIAL,
    of_sign,
    scale_limit,
)
from captum_attn.visualization.picture import Picture

VIEWS = (*visualization.ImageVisualizationMethod.__members__, "contour")
UNSIGNED = ("masked_image", "alpha_scaling")  # show how much, not for or against
NO_OUTLIERS = 1e-9  # they are cut off; at 0 Captum fails where its sum is rounded
NOTHING = (0.0, 0.0, 0.0, 0.0)
PLACE: dict[str, Any] = {"location": "bottom", "aspect": 22, "pad": 0.03, "shrink": 0.85}
PALE = 0.4  # how much of white an image has below a blended map
LEVELS = (0.25, 0.5, 0.75)  # of the scale, where contours are drawn


class Style(NamedTuple):
    """How a map is drawn.

    Attributes:
        view (str): one of `VIEWS`.
        sign (str): one of Captum's.
        outlier_perc (float): Captum's.
        cmap (str, Colormap or None): None for this package's own.
        alpha (float): of the map over the image.
    """

    view: str
    sign: str
    outlier_perc: float
    cmap: str | Colormap | None
    alpha: float

    @property
    def colours(self) -> str | Colormap:
        """The colour map."""
        if self.cmap is not None:
            return self.cmap
        if self.view == "blended_heat_map":
            return OVERLAYS[self.sign]
        return DIVERGING if self.sign == "all" else SEQUENTIAL


def checked_view(view: str, sign: str, auto: bool, with_image: bool) -> tuple[str, str]:
    """The view and the sign that it shows."""
    if not with_image and view not in ("heat_map", "contour"):
        raise InputError(f"method={view!r} needs the image; pass `images=` or method='heat_map'")
    if view in UNSIGNED and sign == "all":
        if not auto:
            raise OptionError(
                f"method={view!r} cannot show both signs; pass sign='positive', 'negative' or "
                "'absolute_value'"
            )
        sign = "absolute_value"
    return view, sign


def show_image(ax: Axes, image: np.ndarray | None, size: tuple[int, int], grey: bool) -> None:
    """An image `(H, W, 3)` without ticks and frame, or an empty panel of its size."""
    if image is None:
        ax.imshow(np.full((*size, 3), 0.95))
    elif grey:
        ax.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)
    else:
        ax.imshow(image)
    bare(ax)


def frame_left_out(ax: Axes, mask: np.ndarray) -> None:
    """A dashed line round the pixels `(H, W)` of the tokens that were left out."""
    if mask.any():
        padded = np.pad(mask.astype(float), 1)  # also where they touch the edge
        at = [np.arange(-1, side + 1) for side in mask.shape]
        options: dict[str, Any] = {"colors": GREY, "linewidths": 0.9, "linestyles": "dashed"}
        lines = ax.contour(at[1], at[0], padded, [0.5], **options)
        lines.set_clip_on(False)


def bare(ax: Axes) -> None:
    """Takes ticks and frame away."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def draw_map(
    figure: Figure,
    ax: Axes,
    values: np.ndarray,
    image: np.ndarray | None,
    style: Style,
    bar: bool = True,
    note: str = "the map",
) -> None:
    """A map `(H, W)` on its image `(H, W, 3)`, with a colour bar that says what the colours mean.

    A map without relevance of that sign is an empty panel with a note, and a warning.
    """
    if isinstance(figure, Picture):
        figure.numbers.append(Numbers(ax, values))
    shown = of_sign(values, style.sign)
    limit = scale_limit(shown, style.outlier_perc)
    if limit == 0:
        what = "is zero everywhere" if not values.any() else f"has no {style.sign} relevance"
        warnings.warn(f"{note} {what}: drawn as empty", stacklevel=3)
        show_image(ax, image, values.shape, grey=True)
        words = EMPTY if not values.any() else f"no {style.sign}"
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}
        middle: dict[str, Any] = {"ha": "center", "va": "center", "transform": ax.transAxes}
        ax.text(0.5, 0.5, words, fontsize=9, color=GREY, bbox=box, **middle)
        if bar:
            no_bar(figure, ax)
        return
    if style.view == "contour":
        show_image(ax, image, values.shape, grey=True)
        mappable: ScalarMappable | None = _contours(ax, values, limit, style)
    else:
        below = image
        if style.view == "blended_heat_map" and image is not None:
            below = PALE + (1 - PALE) * image  # orange on black would be brown
        visualization.visualize_image_attr(
            (values / limit).clip(-1, 1)[..., None],  # Captum takes small numbers for zeros
            below,
            method=style.view,
            sign=style.sign,
            plt_fig_axis=(figure, ax),
            outlier_perc=NO_OUTLIERS,
            cmap=style.colours,
            alpha_overlay=style.alpha,
            use_pyplot=False,
        )
        bare(ax)
        if below is not image:
            ax.images[0].set_clim(0, 255)  # Captum's would be stretched to black again
        drawn = style.view in ("heat_map", "blended_heat_map")
        mappable = ax.images[-1] if drawn else None
        if style.view == "blended_heat_map" and style.cmap is None:
            mappable = ScalarMappable(ax.images[-1].norm, BARS[style.sign])
    if bar and mappable is not None:
        colour_bar(figure, ax, mappable, limit, style.sign)
    elif bar:
        no_bar(figure, ax)


def _contours(ax: Axes, values: np.ndarray, limit: float, style: Style) -> ScalarMappable:
    signs = (-1, 1) if style.sign == "all" else (1,)
    share = of_sign(values, style.sign) / limit
    levels = sorted(sign * level for sign in signs for level in LEVELS)
    levels = [level for level in levels if share.min() < level < share.max()]
    norm = Normalize(-1 if style.sign == "all" else 0, 1)
    colours = style.cmap or (LINES if style.sign == "all" else SEQUENTIAL)
    if levels:
        ax.contour(share, levels=levels, cmap=colours, norm=norm, linewidths=1.6)
    return ScalarMappable(norm, colours)


def colour_bar(
    figure: FigureBase,
    ax: Axes | Sequence[Axes],
    mappable: ScalarMappable,
    limit: float,
    sign: str,
    label: str = "",
    **place: Any,
) -> None:
    """A bar below the panel whose ends are named in the attribution's own unit."""
    bar = figure.colorbar(mappable, ax=ax, **PLACE | place)
    end = f"{limit:.2g}"
    if sign == "all":
        bar.set_ticks([-1, 0, 1], labels=[f"−{end}", "0", end])
    else:
        bar.set_ticks([0, 1], labels=["0", f"−{end}" if sign == "negative" else end])
    bar.ax.tick_params(labelsize=7, length=2)
    bar.set_label(label, fontsize=8)
    bar.outline.set_linewidth(0.4)


def no_bar(figure: Figure, ax: Axes) -> None:
    """The place of a bar left free, so that panels of a row stay aligned."""
    unseen = ScalarMappable(Normalize(0, 1), ListedColormap([NOTHING]))
    bar = figure.colorbar(unseen, ax=ax, ticks=[0], **PLACE)
    bar.ax.patch.set_visible(False)  # also on a ground that is not white
    bar.ax.tick_params(labelsize=7, length=2, colors=NOTHING)
    bar.outline.set_visible(False)


def draw_box(ax: Axes, box: Iterable[float], label: str = "", **options: Any) -> None:
    """A frame (x_min, y_min, x_max, y_max) in pixels, with a label at its upper left."""
    left, top, right, bottom = (float(side) - 0.5 for side in box)  # pixels' centres are integers
    given = {"fill": False, "edgecolor": FOR, "linewidth": 2, **options}
    ax.add_patch(Rectangle((left, top), right - left, bottom - top, **given))
    if label:
        back = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
        inside = top < 0.1 * ax.get_ylim()[0]  # above it there is no room
        place = "top" if inside else "bottom"
        ax.text(left, top, label, fontsize=7.5, va=place, bbox=back, clip_on=True)


def title(ax: Axes, words: str, width: float, **options: Any) -> None:
    """A title, broken where it would leave a panel of so many inches."""
    size = float(options.setdefault("fontsize", 10))
    letters = max(6, int(width * 72 / (0.56 * size)))
    ax.set_title(textwrap.fill(words, letters), **options)
