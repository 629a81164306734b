"""The detector's tab: a picture with boxes, and the map of the one that is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import Any, NamedTuple

import gradio as gr

from captum_attn.detection import Detections
from captum_attn.insights import drawing
from captum_attn.insights.detected import DetectionSession
from captum_attn.insights.examples import Example
from captum_attn.insights.fields import (
    ASKED,
    NOTHING,
    PICTURES,
    example_names,
    or_message,
    sides,
)
from captum_attn.insights.pictures import drawn_boxes

__all__ = ["detections_tab"]


def detections_tab(session: DetectionSession, opened: Callable[..., Any]) -> None:
    """The fields of a detector; `opened` is the event by which its first example is explained."""
    models = list(session.models)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=250):
            example = gr.Dropdown(
                example_names(session), value=0, label="Example", elem_classes="ca-example"
            )
            button = gr.Button("Explain", variant="primary", elem_classes="explain")
            picture = gr.File(
                label="or a picture of yours", file_types=PICTURES, type="filepath", height=140,
                elem_classes="ca-upload", visible=session.takes_picture,
            )  # fmt: skip
            model = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1)
            threshold = gr.Slider(
                0, 1, session.threshold, step=0.01, label="Threshold",
                info="A detection is shown whose probability is above it.",
            )  # fmt: skip
            first, second = sides(session)
        with gr.Column(scale=3, min_width=280):
            found = gr.HTML(drawing.hint(), elem_classes="predictions")
            chosen = gr.Radio([], label="Explain the detection", elem_classes="ca-choice")
            with gr.Row(equal_height=False, elem_classes="ca-two"):
                panels = [gr.HTML(elem_classes=f"panel-{side}") for side in ("one", "two")]
    asked = [example, picture, model, threshold, chosen]
    fields = [*asked, *first.components, *second.components]
    border = len(asked) + len(first.components)

    def explained(*values: Any) -> Iterator[list[Any]]:
        two = [first.read(list(values[len(asked) : border])), second.read(list(values[border:]))]
        yield from _explained(session, values[: len(asked)], two)

    def another(*values: Any) -> Iterator[list[Any]]:
        """The same of another picture, whose likeliest detection is explained."""
        yield from explained(*values[: len(asked) - 1], None, *values[len(asked) :])

    given: dict[str, Any] = {"inputs": fields, "outputs": [found, chosen, *panels], **ASKED}
    button.click(explained, **given)
    for field in (chosen, first.method, second.method):
        field.input(explained, **given, trigger_mode="always_last", show_progress="minimal")
    for field in (example, model):
        field.input(another, **given, trigger_mode="always_last", show_progress="minimal")
    threshold.release(explained, **given, trigger_mode="always_last", show_progress="minimal")
    opened(explained, **given, show_progress="hidden")


class _Asked(NamedTuple):
    """What is explained: one detection of a picture."""

    session: DetectionSession
    model: str
    example: Example
    found: Detections
    place: int  # among the detections


def _explained(
    session: DetectionSession, asked: tuple[Any, ...], two: list[tuple[str, dict[str, Any]]]
) -> Iterator[list[Any]]:
    """The picture, the detections to choose from and both maps; what fails says so in its place."""
    question, said = or_message(_detected, session, *asked)
    if question is None or question.place < 0:
        yield [said, gr.Radio([], value=None), "", ""]
        return
    names = [(f"{i + 1}. {_named(question.found, i)}", i) for i in range(len(question.found))]
    choice = gr.Radio(names, value=question.place)
    yield [said, choice, "", ""]
    panels = ["", ""]
    for i, (name, options) in enumerate(two):
        if name != NOTHING:
            panels[i] = or_message(_panel, question, name, options)[1]
    yield [said, choice, *panels]


def _detected(
    session: DetectionSession, index: int, picture: str | None, model: str, threshold: float,
    chosen: int | None,
) -> tuple[_Asked, str]:  # fmt: skip
    example = session.own(session.example(index), picture)
    found = session.detect(model, example, threshold)
    place = -1 if not len(found) else 0
    if chosen is not None and chosen in range(len(found)):
        place = chosen
    return _Asked(session, model, example, found, place), _card(session, example, found, place)


def _named(found: Detections, i: int) -> str:
    return f"{found.names[i]} ({float(found.scores[i]):.2f})"


def _card(session: DetectionSession, example: Example, found: Detections, place: int) -> str:
    title = drawing.title_of(session, example)
    picture = drawn_boxes(session.shown(example), found.boxes, chosen=place)
    names = [f"{i + 1}. {_named(found, i)}" for i in range(len(found))]
    said = "" if names else "<p>Nothing is detected above the threshold: lower it.</p>"
    note = f'<p class="ca-note">{escape(session.note)}</p>' if session.note else ""
    alt = "the picture with the boxes of " + (", ".join(names) or "nothing")
    return (
        f'<div class="ca-card"><p class="ca-input">{escape(title)}</p><h3>Detections</h3>'
        f'<div class="ca-found"><img alt="{escape(alt)}" src="data:image/png;base64,{picture}">'
        f"</div>{said}{note}</div>"
    )


def _panel(asked: _Asked, method: str, options: dict[str, Any]) -> tuple[Detections, str]:
    session, model, example, found, place = asked
    why = session.explain(model, example, int(found.queries[place]), method, options)
    values = why.maps[0]
    drawn = drawn_boxes(session.shown(example), why.boxes, heat=values)
    name = f"{found.names[place]} in box {place + 1}"
    key = drawing.key(name, signed=bool((values < 0).any()))
    return why, (
        f'<div class="ca-card"><h3>{escape(method)}</h3><div class="ca-images ca-one">'
        f'<img alt="the map of {escape(name)}" src="data:image/png;base64,{drawn}">'
        f"</div>{key}</div>"
    )
