"""The commands ``captum-attn explain-text`` and ``captum-attn explain-image``.

The model, the method and what is asked are named on the command line; ``evaluate`` names them in
the same way::

    captum-attn explain-text "The keeper saved the penalty." --model topics --out why.html
    captum-attn explain-image photo.jpg --model timm/vit_base_patch16_224 --target "tabby cat"
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_attn._checks import FAILURES, is_file, is_folder, shown_error
from captum_attn.errors import AttnError, InputError, OptionError
from captum_attn.evaluation.command import device_of, listed, method_of

if TYPE_CHECKING:
    from captum_attn.evaluation.loaded import Loaded
    from captum_attn.explain.explained import Explained

__all__ = ["explain_image_command", "explain_text_command"]

SUFFIXES = (".png", ".html")
IMAGE_METHOD = "GenericAttention"
# Where the output is a mean over tokens, each is relevant to itself by merely being there; like the
# authors of GAE for display, leave that out.
TEXT_METHOD = "GenericAttention(discard_self=True)"


def _method_option(default: str) -> Any:
    return typer.Option(
        metavar="LIST",
        help='Methods of captum_attn and Captum, such as "VTranM, IntegratedGradients"; several '
        f"are shown side by side; may be repeated. Default: {default}.",
    )


Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Default: a GPU, if there is one.")
]


def explain_text_command(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is explained.")],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="topics (a real zero-shot classifier that needs no download), smollm2 (a real "
            "language model, once its package is installed), or a folder or hub id of "
            "transformers: a text classifier or a causal language model.",
        ),
    ],
    method: Annotated[list[str] | None, _method_option(TEXT_METHOD)] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="CLASS",
            help="A class by its name or number; of a language model, a next token.",
        ),
    ] = "predicted",
    labels: Annotated[
        str | None,
        typer.Option(metavar="LIST", help='Your own topics for topics: "football, opera".'),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The coloured text, a .html or .png. Default: none."),
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Words to print.")] = 10,
    device: Device = None,
) -> None:
    """Explain a text: which of its words spoke for a class, or for the next token.

    Prints the words with the most relevance, and writes them coloured in the text to --out. Words
    that were cut into pieces are put together; special tokens are left out.
    """
    asked_for = _methods(method, TEXT_METHOD)
    _check_out(out)
    if labels is not None and model != "topics":
        raise OptionError(f"--labels are for the model topics; '{model}' has its own")
    # Imported here, so that --help and a mistyped option do not wait for them.
    from captum_attn.evaluation.models import load
    from captum_attn.explain.explained import ask
    from captum_attn.explain.ranking import encoded, ranking
    from captum_attn.visualization import visualize_text

    loaded = load(model, [] if labels is None else labels.split(","))
    if loaded.tokenizer is None:
        raise OptionError(f"'{model}' is for images: see captum-attn explain-image")
    where = device_of(device)
    loaded.model.to(where)
    inputs = encoded(loaded, text, where)
    asked = ask(loaded, inputs, target)
    found = {
        name: relevance["input_ids"][0]
        for name, relevance in _attributions(loaded, inputs, asked, asked_for).items()
    }
    _announce(asked)
    print(ranking(loaded, found, inputs, top))
    if out is not None:
        marks = _left_out(loaded, inputs, asked, asked_for)
        left_out = {name: mark["input_ids"][0] for name, mark in marks.items()} or None
        picture = visualize_text(
            found, inputs, text=text, titles=[asked.question], left_out=left_out
        )
        print(f"\nwritten to {picture.save(out)}")


def explain_image_command(
    image: Annotated[Path, typer.Argument(metavar="FILE", help="A picture: PNG, JPEG, WebP ...")],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="digit-vit, texture-vit or clothing-vit (small, in the package), timm/NAME, or a "
            "folder or hub id of transformers: an image classifier.",
        ),
    ],
    method: Annotated[list[str] | None, _method_option(IMAGE_METHOD)] = None,
    target: Annotated[
        str, typer.Option(metavar="CLASS", help="A class by its name or number.")
    ] = "predicted",
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture, a .png or .html.")] = Path(
        "explanation.png"
    ),
    device: Device = None,
) -> None:
    """Explain a picture: where in it the model saw a class.

    Writes the picture as the model takes it and a map for each method to --out.
    """
    asked_for = _methods(method, IMAGE_METHOD)
    _check_out(out)
    # Imported here, so that --help and a mistyped option do not wait for them.
    from captum_attn.evaluation.models import load
    from captum_attn.explain.explained import ask
    from captum_attn.visualization import visualize_image

    if not is_file(image):
        raise InputError(f"no picture at '{image}'; give the path of an image file")
    loaded = load(model)
    if loaded.read is None:
        raise OptionError(f"'{model}' is for text: see captum-attn explain-text")
    where = device_of(device)
    loaded.model.to(where)
    pixels = loaded.read(image)[None].to(where)  # (1, C, H, W)
    asked = ask(loaded, pixels, target)
    found = _attributions(loaded, pixels, asked, asked_for)
    picture = visualize_image(
        found, loaded.shown(pixels[0])[None], titles=[asked.question],
        left_out=_left_out(loaded, pixels, asked, asked_for) or None,
    )  # fmt: skip
    _announce(asked)
    print(f"written to {picture.save(out)}")


def _methods(given: list[str] | None, default: str) -> dict[str, tuple[str, dict[str, Any]]]:
    found = listed("method", ", ".join(given or [default]))
    if not found:
        raise OptionError("--method: expected at least one")
    return found


def _check_out(out: Path | None) -> None:
    """Refuses before the model is loaded what could not be written after it has run."""
    if out is None:
        return
    if out.suffix.lower() not in SUFFIXES:
        raise OptionError(f"--out: expected a file ending in {' or '.join(SUFFIXES)}, got '{out}'")
    if not is_folder(out.parent):
        raise InputError(f"no folder at '{out.parent}'; give --out a file in a folder of yours")
    if is_folder(out) or not os.access(out if is_file(out) else out.parent, os.W_OK):
        raise InputError(f"cannot write to '{out}'; give --out a file of yours")


def _attributions(
    loaded: Loaded,
    inputs: Any,
    asked: Explained,
    methods: Mapping[str, tuple[str, dict[str, Any]]],
) -> dict[str, Any]:
    """What every method returns, by its name on the command line."""
    found: dict[str, Any] = {}
    for name, (kind, given) in methods.items():
        attribution, options = method_of(kind, given, loaded, "method")
        try:
            found[name] = attribution.attribute(inputs, target=asked.target, **options)
        except FAILURES as problem:  # of Captum's methods, which ids or options do not suit
            said = str(problem) if isinstance(problem, AttnError) else shown_error(problem)
            raise OptionError(
                f"--method: {name} cannot explain this input by this model: {said}"
            ) from problem
    return found


def _left_out(
    loaded: Loaded,
    inputs: Any,
    asked: Explained,
    methods: Mapping[str, tuple[str, dict[str, Any]]],
) -> dict[str, Any]:
    """Where methods took relevance away (`leave_out`), by their names on the command line."""
    marks = {}
    for name, (kind, given) in methods.items():
        if given.get("leave_out"):
            attribution, options = method_of(kind, given, loaded, "method")
            marks[name] = attribution.left_out(inputs, target=asked.target, **options)
    return marks


def _announce(asked: Explained) -> None:
    print(f"predicted: {asked.prediction}")
    print(asked.question)
