"""The command line, ``captum-attn``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """The console script ``captum-attn``; refuses in one line where the extra is missing."""
    try:
        from captum_attn.cli.app import run

        code = run()
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("captum_attn"):
            raise
        code = 2
        print(f"captum-attn: {of_missing(missing)}", file=sys.stderr)
    sys.exit(code)


def of_missing(missing: ModuleNotFoundError) -> str:
    """What to do where a package is not there."""
    package = (missing.name or "a package").split(".")[0]
    return f'{package} is not installed; the command line needs pip install "captum_attn[demo]"'
