"""A matplotlib figure that knows how to be saved, as a picture or as a page."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from captum_attn.errors import OptionError

DPI = 150
MAX_PIXELS = 2**16 - 1  # the side of the largest picture that matplotlib can draw
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
        super().__init__(**options)
        self.alt = alt

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
            OptionError: for another ending.

        Examples::

            >>> visualize_image(attributions, images).save("why.html")
            PosixPath('why.html')
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in FORMATS:
            raise OptionError(f"path: expected a file ending in {', '.join(FORMATS)}, got '{path}'")
        if ending == ".html":
            path.write_text(self.page(dpi), encoding="utf-8")
        else:
            self.savefig(path, dpi=self._drawable(dpi))
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
        """A whole page around :meth:`html`."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.alt)}</title></head>\n<body>\n{self.html(dpi)}\n</body>\n</html>\n"
        )

    def _repr_png_(self) -> bytes:
        """Shown in a notebook whose matplotlib was not set up."""
        return self.png(100)

    def _repr_html_(self) -> str | None:
        return None

    def _drawable(self, dpi: float) -> float:
        return min(dpi, MAX_PIXELS / max(self.get_size_inches()))
