"""The numbers of a picture's panels, which its page shows where the pointer is."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

LEVELS = 32767  # of a panel's values, on each side of zero
UNKNOWN = -LEVELS - 1
LARGEST = 256  # rows and columns that are written; of more, every second, third, ...

SCRIPT = """
(() => {
  const panels = JSON.parse(document.getElementById("numbers").textContent);
  const image = document.querySelector("img"), said = document.getElementById("said");
  for (const panel of panels) {
    const bytes = Uint8Array.from(atob(panel.values), (letter) => letter.charCodeAt(0));
    panel.cells = new DataView(bytes.buffer);
  }
  const at = (event) => {
    const box = image.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    for (const panel of panels) {
      const [left, top, wide, high] = panel.place, [rows, columns] = panel.shape;
      const i = Math.floor(((y - top) / high) * rows);
      const j = Math.floor(((x - left) / wide) * columns);
      if (i < 0 || j < 0 || i >= rows || j >= columns) continue;
      const level = panel.cells.getInt16(2 * (i * columns + j), true);
      const value = level === UNKNOWN ? "unknown" : (level * panel.step).toPrecision(3);
      const row = panel.rows ? panel.rows[i] : `row ${i * panel.every}`;
      const column = panel.columns ? panel.columns[j] : `column ${j * panel.every}`;
      return `${panel.name ? panel.name + ", " : ""}${row}, ${column}: ${value.replace("-", "−")}`;
    }
    return "";
  };
  image.addEventListener("pointermove", (event) => {
    said.textContent = at(event);
    said.hidden = !said.textContent;
    said.style.left = Math.min(event.clientX + 14, innerWidth - said.offsetWidth - 4) + "px";
    said.style.top = Math.min(event.clientY + 18, innerHeight - said.offsetHeight - 4) + "px";
  });
  image.addEventListener("pointerleave", () => { said.hidden = true; });
})();
"""
STYLE = (
    "position: fixed; pointer-events: none; background: #fff; color: #000; border: 1px solid #777; "
    "border-radius: 4px; padding: 0 .4em; font: 14px/1.6 sans-serif"
)


class Numbers(NamedTuple):
    """What a panel shows.

    Attributes:
        ax (Axes): the panel.
        values (ndarray): (r, c).
        rows, columns (sequence of str or None): what they are called; None: their numbers.
        mask (ndarray or None): (r, c), bool: which cells say nothing.
    """

    ax: Axes
    values: np.ndarray
    rows: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    mask: np.ndarray | None = None


def json_in_page(data: Any) -> str:
    """JSON for a script element, which nothing in it can end."""
    made = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        made = made.replace(letter, f"\\u{ord(letter):04x}")
    return made


def numbers_html(panels: Sequence[Numbers]) -> str:
    """What a page needs beside its picture, which has been drawn, to show the numbers."""
    if not panels:
        return ""
    data = json_in_page([_written(panel) for panel in panels])
    return (
        f'<div id="said" style="{STYLE}" hidden></div>\n'
        f'<script type="application/json" id="numbers">{data}</script>\n'
        f"<script>{SCRIPT.replace('UNKNOWN', str(UNKNOWN))}</script>\n"
    )


def _written(panel: Numbers) -> dict[str, Any]:
    labelled = panel.rows is not None
    every = 1 if labelled else math.ceil(max(panel.values.shape) / LARGEST)
    values = panel.values[::every, ::every]
    step = float(np.abs(values).max()) / LEVELS
    levels = np.rint(values / (step or 1.0)).astype("<i2")
    if panel.mask is not None:
        levels[panel.mask] = UNKNOWN
    place = panel.ax.get_position()
    return {
        "name": panel.ax.get_title().replace("\n", " "),
        "place": [round(v, 5) for v in (place.x0, 1 - place.y1, place.width, place.height)],
        "shape": list(values.shape),
        "every": every,
        "step": step,
        "rows": panel.rows,
        "columns": panel.columns,
        "values": base64.b64encode(levels.tobytes()).decode("ascii"),
    }
