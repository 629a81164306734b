"""A matplotlib figure that knows how to be saved, as a picture or as a page."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from captum_attn._checks import listed, number, shown, text, writing_to
from captum_attn.errors import OptionError
from captum_attn.visualization._fonts import without_glyph_warnings
from captum_attn.visualization._hover import Numbers, numbers_html

DPI = 150
SHARPEST = 4800.0  # dots per inch
MAX_SIDE = 2**16 - 1  # the side of the largest picture that matplotlib can draw
MAX_PIXELS = 1e8  # of a picture, 400 MB in memory
FORMATS = (".png", ".svg", ".pdf", ".html")


class Picture(Figure):
    """A `matplotlib.figure.Figure` with its HTML form; pyplot knows nothing of it.

    Args:
        alt (str): what the picture shows, for those who cannot see it.
        **options: those of `Figure`: `figsize`, `layout`, ...

    Examples::

        >>> picture = visualize_image(attributions, images)
        >>> picture.save("why.png"), picture.save("why.html")
        >>> picture.axes[0].set_title("still a figure of matplotlib")
    """

    def __init__(self, *, alt: str = "", **options: Any) -> None:
        if options.get("figsize") is not None:
            options["figsize"] = _size(options["figsize"])
        super().__init__(**options)
        self.alt = text("alt", alt)
        self.numbers: list[Numbers] = []

    def draw(self, renderer: Any) -> None:
        """As of a Figure, without its warning for each letter that no font has: ours is one."""
        with without_glyph_warnings():
            super().draw(renderer)

    def save(self, path: str | Path, dpi: float = DPI) -> Path:
        """Writes the picture; the file's ending says how.

        Args:
            path (str or Path): a file that ends in .png, .svg, .pdf or .html. A page needs nothing
                beside it.
            dpi (float, optional): dots per inch; fewer where the picture would be too large to be
                drawn. Default: 150.

        Returns:
            Path: the file.

        Raises:
            OptionError: for another ending, or dots per inch that are none.
            InputError: where the file cannot be written.

        Examples::

            >>> visualize_image(attributions, images).save("why.html")
            PosixPath('why.html')
        """
        if not isinstance(path, (str, PathLike)):
            raise OptionError(f"path: expected a str or Path, got {shown(path)}")
        path, dpi = Path(path), self._drawable(dpi)
        ending = path.suffix.lower()
        if ending not in FORMATS:
            raise OptionError(f"path: expected a file ending in {', '.join(FORMATS)}, got '{path}'")
        with writing_to(path):
            if ending == ".html":
                path.write_text(self.page(dpi), encoding="utf-8")
            else:
                self.savefig(path, dpi=dpi)
        return path

    def png(self, dpi: float = DPI) -> bytes:
        """The picture as the bytes of a PNG file."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self._drawable(dpi))
        return buffer.getvalue()

    def html(self, dpi: float = DPI) -> str:
        """A piece of HTML that shows the picture and needs nothing beside it."""
        data = base64.b64encode(self.png(dpi)).decode("ascii")
        alt = escape(self.alt, quote=True)
        style = "max-width: 100%; height: auto"
        return f'<img alt="{alt}" style="{style}" src="data:image/png;base64,{data}">'

    def page(self, dpi: float = DPI) -> str:
        """A whole page around :meth:`html`; the pointer shows the numbers."""
        body = self.html(dpi)
        body += f"\n{numbers_html(self.numbers)}"  # once it is drawn, the panels have their places
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.alt)}</title></head>\n<body>\n{body}</body>\n</html>\n"
        )

    def _repr_png_(self) -> bytes:
        """Shown in a notebook whose matplotlib was not set up."""
        return self.png(100)

    def _repr_html_(self) -> str | None:
        return None

    def _drawable(self, dpi: float) -> float:
        """As many dots per inch as asked for, or as memory has room for."""
        dpi = number("dpi", dpi, 1, SHARPEST)
        wide, high = self.get_size_inches()
        return min(dpi, MAX_SIDE / max(wide, high), math.sqrt(MAX_PIXELS / (wide * high)))


def _size(figsize: Any) -> tuple[float, float]:
    """Width and height in inches."""
    sides = listed("figsize", figsize, "two numbers")
    if len(sides) != 2:
        raise OptionError(f"figsize: expected (width, height) in inches, got {shown(figsize)}")
    wide, high = (number("figsize", side, 0, open_ends="(") for side in sides)
    return wide, high
