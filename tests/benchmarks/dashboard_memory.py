"""Memory of the dashboard's server over thousands of questions, asked over HTTP.

    python -m tests.benchmarks.dashboard_memory [--questions 2000] [--every 100]
    python -m tests.benchmarks.dashboard_memory --printed LOG --plot tutorials/dashboard_memory.png

Every question is another visitor's: it explains an example by two methods, with the deletion
curve. The server runs in a process of its own, whose resident memory is read between them. Exit
code 1 unless the second half grows by less than --room MiB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tests.insights.asked import Visitor

SERVER = """
import torch
from captum_attn.insights import AttributionVisualizer, Batch
from tests.insights.models import CLASSES, TinyViT, images, made, photo, softmax
torch.set_num_threads(1)
batch = Batch(images(8), torch.arange(8) % 3)
AttributionVisualizer(made(TinyViT), CLASSES, photo(), [batch], softmax).serve(blocking=True)
"""


def memory(process: int) -> float:
    """Resident memory in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def measured(questions: int, every: int, light: bool = False) -> list[tuple[int, float]]:
    """(questions asked, MiB), from the first hundred on."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-c", SERVER], stdout=subprocess.PIPE, text=True
    )
    found = []
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().strip(" /\n").rsplit(":", 1)[1])
        visitor, begin = Visitor(port), time.monotonic()
        for number in range(1, questions + 1):
            visitor.name = f"visit {number}".replace(" ", "-")
            less = {"Beside_it": "nothing", "Deletion_curve": False} if light else {}
            pieces = visitor.explained(Example=number % 8, **less)
            assert all(pieces[: 2 if light else 4]), pieces
            if number % every == 0:
                found.append((number, memory(server.pid)))
                print(f"{number:6d} questions  {found[-1][1]:8.1f} MiB  "
                      f"{time.monotonic() - begin:6.0f} s", flush=True)  # fmt: skip
    finally:
        server.kill()
        server.wait()
    return found


def printed(text: str) -> list[tuple[int, float]]:
    """What `measured` printed."""
    rows = (line.split() for line in text.splitlines() if " questions " in line)
    return [(int(row[0]), float(row[2])) for row in rows]


def plot(found: list[tuple[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*found, strict=True), "o-", color="#0072b2", markersize=4)
    axes.set(xlabel="questions answered", ylabel="resident memory, MiB")
    axes.set_ylim(0, 1.2 * max(used for _, used in found))
    axes.set_xlim(0, None)
    axes.grid(alpha=0.3)
    axes.set_title("The dashboard's server", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--room", type=float, default=25.0, help="MiB")
    parser.add_argument("--light", action="store_true", help="one method, no deletion curve")
    parser.add_argument("--printed", type=Path, help="read what an earlier call printed")
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    options = parser.parse_args()
    if options.printed:
        found = printed(options.printed.read_text())
    else:
        found = measured(options.questions, options.every, options.light)
    if options.plot:
        plot(found, options.plot)
    half = [used for _, used in found[len(found) // 2 :]]
    grown = max(half[-3:]) - max(half[:3])
    print(f"the second half grew by {grown:.1f} MiB (room: {options.room:.0f})")
    return int(grown > options.room)


if __name__ == "__main__":
    sys.exit(main())
