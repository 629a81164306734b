"""The command ``captum-attn demo``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from captum_attn.errors import InputError, OptionError

if TYPE_CHECKING:
    from captum_attn.demo.report import Chapter, Shown

SCENES, DETECTED, KINDS = 3, 2, 4


def demo_command(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for the pictures and the page.")
    ] = Path("captum-attn-demo"),
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Your own text instead of the examples; may be repeated."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="LIST", help='Your own topics, such as "football, opera, chess".'),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Your own picture of digits instead of the scenes; may be repeated.",
        ),
    ] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="Leave out the texts.")] = False,
    no_images: Annotated[bool, typer.Option("--no-images", help="Leave out the images.")] = False,
) -> None:
    """Explain a real text model and small image models, and write the maps as PNG and HTML.

    Texts: all-MiniLM-L6-v2 as a zero-shot topic classifier. Images: a vision transformer that
    names the two digits of a scene, a detector that finds them, and an LXMERT that answers
    questions about them; the last two are left out where you give texts or pictures of your own.
    Nothing is downloaded; it takes about a minute.
    """
    if no_text and (text or labels):
        raise OptionError("--text and --labels explain a text; leave out --no-text")
    if no_images and image:
        raise OptionError("--image explains a picture; leave out --no-images")
    if no_text and no_images:
        raise OptionError("nothing to do; leave out --no-text or --no-images")
    _make_directory(out)
    print("Loading the models ...", flush=True)
    # Imported here, so that --help and a mistyped option do not wait for them.
    from captum_attn.demo.report import text_table, write_report

    topics = None if labels is None else labels.split(",")
    parts = _explained(text, topics, image, not no_text, not no_images)
    files = write_report(out, parts)
    for part, cases in parts:
        print(text_table(part.title, cases), end="\n\n")
    print(f"Open {files[0].resolve().as_uri()}")
    print(f"Pictures in {out.resolve()}: {', '.join(file.name for file in files[1:])}")


def _make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as problem:
        raise InputError(
            f"cannot write to '{out}' ({problem.strerror}); give --out a directory of yours"
        ) from problem


def _explained(
    texts: list[str] | None,
    labels: list[str] | None,
    images: list[Path] | None,
    with_text: bool,
    with_images: bool,
) -> list[tuple[Chapter, list[Shown]]]:
    """Explains what was asked for, with a progress bar; refuses what cannot be before that."""
    from tqdm import tqdm

    from captum_attn.demo.detector import explain_detected
    from captum_attn.demo.image import explain_pictures, explain_scenes
    from captum_attn.demo.report import DETECTION, IMAGES, QUESTIONS, TEXT
    from captum_attn.demo.text import explain_texts
    from captum_attn.demo.vqa import explain_examples
    from captum_attn.toy.digit_detr import load_digit_detr
    from captum_attn.toy.digit_vit import load_digit_vit
    from captum_attn.toy.digit_vqa import load_digit_vqa
    from captum_attn.toy.topics import LABELS, TEXTS, load_topic_classifier

    parts: list[tuple[Chapter, Iterable[Shown], int]] = []
    if with_text:
        cases = explain_texts(load_topic_classifier(labels or LABELS), texts or TEXTS)
        parts.append((TEXT, cases, len(texts or TEXTS)))
    if with_images:
        model = load_digit_vit()
        cases = explain_pictures(model, images) if images else explain_scenes(model, SCENES)
        parts.append((IMAGES, cases, len(images or range(SCENES))))
    if with_images and not (texts or labels or images):
        parts.append((DETECTION, explain_detected(load_digit_detr(), DETECTED), DETECTED))
        parts.append((QUESTIONS, explain_examples(load_digit_vqa()), KINDS))
    with tqdm(
        total=sum(count for *_, count in parts), desc="explaining", unit="input", file=sys.stderr
    ) as bar:

        def watched(cases: Iterable[Shown]) -> Iterator[Shown]:
            for case in cases:
                bar.update()
                yield case

        return [(part, list(watched(cases))) for part, cases, _ in parts]
