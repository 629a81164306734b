"""The commands of ``captum-attn``, and what a mistake looks like.

What the user got wrong is one line that says what to do, and exit code 2.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, cast

import typer

from captum_attn._checks import shown_error
from captum_attn.cli import of_missing
from captum_attn.demo.command import demo_command
from captum_attn.errors import AttnError
from captum_attn.evaluation.command import evaluate_command
from captum_attn.explain.command import explain_image_command, explain_text_command
from captum_attn.insights.command import dashboard_command

# The base of every error in the command line itself; typer carries its own copy of click since
# 0.26, so that importing click would give another class.
_CommandLineError = cast(type[Exception], typer.BadParameter.__mro__[2])

TRACEBACK = "CAPTUM_ATTN_TRACEBACK"  # in the environment: shows where an error came up

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Attention attribution for any transformer, beside Captum's methods.",
)
app.command("demo")(demo_command)
app.command("explain-text")(explain_text_command)
app.command("explain-image")(explain_image_command)
app.command("evaluate")(evaluate_command)
app.command("dashboard")(dashboard_command)


def run(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments (list of str, optional): the arguments. Default: those of the process.

    Returns:
        int: the exit code: 0, or 2 where the user has to change something.

    Examples::

        >>> run(["demo", "--no-text", "--out", "maps"])
        0
    """
    try:
        # Without arguments the help, and code 0.
        shown = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
        with warnings.catch_warnings():
            warnings.showwarning = _noted
            code = app(shown, prog_name="captum-attn", standalone_mode=False)
    except typer.Abort:
        print("captum-attn: stopped", file=sys.stderr)
        return 130
    except (AttnError, _CommandLineError) as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        hint = "" if isinstance(error, AttnError) else "; see captum-attn --help"
        return _said(f"{message.rstrip('.')}{hint}")
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("captum_attn"):
            raise
        return _said(of_missing(missing))
    except Exception as error:
        # Files, disks and other packages fail in ways that nobody foresees; a traceback helps
        # those who look for it.
        if os.environ.get(TRACEBACK):
            raise
        return _said(f"{shown_error(error)} ({TRACEBACK}=1 shows where it came up)")
    return code if isinstance(code, int) else 0


def _noted(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning as a line; those for programmers are left out."""
    if issubclass(category, UserWarning) and not issubclass(category, DeprecationWarning):
        print(f"note: {' '.join(str(message).split())}", file=sys.stderr)


def _said(message: str) -> int:
    """Prints a mistake on one line; the exit code."""
    words = " ".join(message.split()).encode(errors="backslashreplace").decode()
    print(f"captum-attn: {words}", file=sys.stderr)
    return 2
