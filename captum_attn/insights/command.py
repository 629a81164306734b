"""The command ``captum-attn dashboard``: the package's own models in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from captum_attn.errors import OptionError

__all__ = ["dashboard_command"]

MODELS = "digits, topics, questions, detector, smollm2"


def dashboard_command(
    models: Annotated[
        str,
        typer.Option(metavar="LIST", help="What to show, a tab each."),
    ] = MODELS,
    port: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=65535, help="Default: a free one.")
    ] = None,
    bind_all: Annotated[
        bool,
        typer.Option("--bind-all", help="Let other computers in, too. There is no password."),
    ] = False,
) -> None:
    """Open a dashboard on the package's own models; stop it with Ctrl-C.

    Choose an example, or bring a picture or a text of your own, and see what two methods make of
    the prediction, a detection or a language model's next token. With your own model:
    captum_attn.insights. Needs pip install "captum_attn[demo,insights]".
    """
    known = MODELS.split(", ")
    chosen = list(dict.fromkeys(name.strip() for name in models.split(",")))
    if unknown := [name for name in chosen if name not in known]:
        raise OptionError(f"--models: expected some of {MODELS}, got {', '.join(unknown)!r}")
    # Imported here, so that --help and a mistyped option do not wait for them.
    from captum_attn.insights.toys import DASHBOARDS
    from captum_attn.insights.visualizer import checked_port, serve

    port = checked_port(port, bind_all)
    print("Loading the models ...", flush=True)
    serve({name: DASHBOARDS[name]() for name in chosen}, True, False, port, bind_all)
