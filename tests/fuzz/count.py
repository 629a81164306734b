"""Counts mistakes: refused, vague (the error does not name the argument), silent, raw.

python -m tests.fuzz.count [--room visualization] [--show raw silent vague]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch

from tests.fuzz.public import RAW, REFUSED, SILENT, VAGUE
from tests.fuzz.rooms import ROOMS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--room", nargs="*", default=list(ROOMS), choices=list(ROOMS))
    parser.add_argument("--show", nargs="*", default=[RAW, SILENT, VAGUE])
    options = parser.parse_args()
    torch.set_num_threads(1)
    faults = 0
    print(f"{'room':16}{'calls':>7}{REFUSED:>9}{VAGUE:>7}{SILENT:>8}{RAW:>5}")
    for room in options.room:
        counted: Counter[str] = Counter()
        for public in ROOMS[room]():
            for argument, name, make in public.mistakes():
                verdict = public.verdict(argument, make)
                counted[verdict.kind] += 1
                if verdict.kind in options.show:
                    words = " ".join(verdict.text.split())[:150]
                    print(f"  {verdict.kind}: {public.name}({argument}={name}): {words}")
        row = "".join(f"{counted[k]:>{w}}" for k, w in zip(
            (REFUSED, VAGUE, SILENT, RAW), (9, 7, 8, 5), strict=True))  # fmt: skip
        print(f"{room:16}{sum(counted.values()):>7}{row}", flush=True)
        faults += sum(counted.values()) - counted[REFUSED]
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
