"""The page: fields on the left, what was found on the right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import gradio as gr

from captum_attn._checks import whole
from captum_attn.errors import InputError
from captum_attn.insights import drawing
from captum_attn.insights.detected import DetectionSession
from captum_attn.insights.examples import Example
from captum_attn.insights.fields import (
    ASKED,
    MAX_LETTERS,
    NOTHING,
    PICTURES,
    example_names,
    or_message,
    sides,
)
from captum_attn.insights.page_detections import detections_tab
from captum_attn.insights.page_writing import writing_tab
from captum_attn.insights.session import Explanation, Session
from captum_attn.insights.tab import Absent, Tab
from captum_attn.insights.writing import WritingSession
from captum_attn.metrics import Curve

__all__ = ["CSS", "build_page", "theme"]

PREDICTED = "the predicted class"
TITLE = "captum_attn"
MAX_WAITING = 20  # questions in the queue
CSS = drawing.CSS


def theme() -> gr.themes.Base:
    """Fonts of the reader's own computer: the page asks no other server for anything."""
    return gr.themes.Soft(
        primary_hue="orange", secondary_hue="purple", neutral_hue="slate",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    ).set(
        block_title_background_fill="transparent", block_title_padding="0",
        block_label_background_fill="transparent", block_title_text_color="*body_text_color",
        block_label_text_color="*body_text_color",
    )  # fmt: skip


def build_page(sessions: Mapping[str, Tab]) -> gr.Blocks:
    """The page of one dashboard, or of several as tabs.

    Args:
        sessions (Mapping of str to Tab): by the name of the tab.

    Returns:
        gradio.Blocks: not yet served.

    Examples::

        >>> build_page({"Digits": session}).launch()
    """
    # Uploads are deleted after an hour.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(drawing.HEADER)
        if len(sessions) == 1:
            _filled(next(iter(sessions.values())), page.load)
        else:
            for name, session in sessions.items():
                with gr.Tab(name) as tab:
                    _filled(session, page.load if name == next(iter(sessions)) else tab.select)
        gr.HTML(drawing.limits(MAX_WAITING, MAX_LETTERS))
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page


def _filled(tab: Tab, opened: Callable[..., Any]) -> None:
    """What is in a tab, by its kind."""
    if isinstance(tab, Absent):
        gr.HTML(drawing.message(tab.note))
    elif isinstance(tab, DetectionSession):
        detections_tab(tab, opened)
    elif isinstance(tab, WritingSession):
        writing_tab(tab, opened)
    elif isinstance(tab, Session):
        _dashboard(tab, opened)


def _dashboard(session: Session, opened: Callable[..., Any]) -> None:
    """The fields of one session; `opened` is the event by which its first example is explained."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=250):
            inputs, button = _what(session)
            first, second = sides(session)
            curve = gr.Checkbox(
                True, label="Deletion curve",
                info="How the score falls as the most relevant parts are removed.",
            )  # fmt: skip
        with gr.Column(scale=3, min_width=280):
            predictions = gr.HTML(drawing.hint(), elem_classes="predictions")
            with gr.Row(equal_height=False, elem_classes="ca-two"):
                panels = [gr.HTML(elem_classes=f"panel-{side}") for side in ("one", "two")]
            curves = gr.HTML(elem_classes="curves")
    fields = [inputs, first.components, second.components, [curve]]

    def explained(*values: Any) -> Iterator[list[str]]:
        given = iter(values)
        asked, one, two, (with_curve,) = ([next(given) for _ in part] for part in fields)
        yield from _explained(session, asked, [first.read(one), second.read(two)], with_curve)

    # What shows at once is asked for again when it changes; the rest when the button is pressed.
    example, _, text, model, target = inputs
    given: dict[str, Any] = {
        "fn": explained, "inputs": [field for part in fields for field in part],
        "outputs": [predictions, *panels, curves], **ASKED,
    }  # fmt: skip
    button.click(**given)
    text.submit(**given)
    for field in (example, model, target, first.method, second.method):
        field.input(**given, trigger_mode="always_last", show_progress="minimal")
    opened(**given, show_progress="hidden")


def _what(session: Session) -> tuple[list[Any], Any]:
    """Example, picture, text, model and target; and the button, which is seen at once."""
    targets = [(PREDICTED, -1), *((label, i) for i, label in enumerate(session.classes))]
    models = list(session.models)
    example = gr.Dropdown(
        example_names(session), value=0, label="Example", elem_classes="ca-example"
    )
    target = gr.Dropdown(targets, value=-1, label="Explain", visible=session.use_label_for_attr)
    button = gr.Button("Explain", variant="primary", elem_classes="explain")
    text = gr.Textbox(
        label="or a text of yours", max_lines=4, max_length=MAX_LETTERS, visible=session.takes_text
    )
    picture = gr.File(
        label="or a picture of yours", file_types=PICTURES, type="filepath", height=140,
        elem_classes="ca-upload", visible=session.takes_picture,
    )  # fmt: skip
    model = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1)
    return [example, picture, text, model, target], button


def _explained(
    session: Session, asked: list[Any], two: list[tuple[str, dict[str, Any]]], with_curve: bool
) -> Iterator[list[str]]:
    """The four pieces of HTML; what fails says so in its place. The maps come before the curves."""
    found, said = or_message(_predicted, session, *asked)
    if found is None:
        yield [said, "", "", ""]
        return
    panels, curves = [], {}
    for name, options in two:
        why, drawn = (None, "") if name == NOTHING else or_message(_panel, found, name, options)
        panels.append(drawn)
        if why is not None:
            curves[name if name not in curves else f"{name} (2)"] = why
    yield [said, *panels, ""]
    if with_curve and curves:
        yield [said, *panels, or_message(_curves, found, curves)[1]]


class PageQuestion(NamedTuple):
    """What is explained: a model's target for an example."""

    session: Session
    model: str
    example: Example
    target: int | None


def _predicted(
    session: Session, index: int, picture: str | None, text: str | None, model: str, target: int
) -> tuple[PageQuestion, str]:
    if target is not None and session.classes:
        target = whole("target", target, -1, len(session.classes) - 1)
    if text and len(text) > MAX_LETTERS:
        raise InputError(f"the text has {len(text)} letters: expected at most {MAX_LETTERS}")
    example = session.own(session.example(index), picture, text)
    predicted = session.predict(model, example)
    chosen = predicted[0].target if target is None or target < 0 else target
    wanted = chosen if session.use_label_for_attr else None
    html = drawing.predictions(session, example, predicted, wanted)
    return PageQuestion(session, model, example, wanted), html


def _panel(asked: PageQuestion, method: str, options: dict[str, Any]) -> tuple[Explanation, str]:
    session, model, example, target = asked
    why = session.explain(model, example, method, options, target)
    named = "the score" if target is None else drawing.label_of(session, target)
    return why, drawing.panel(why, named)


def _curves(asked: PageQuestion, explained: dict[str, Explanation]) -> tuple[dict[str, Curve], str]:
    session, model, example, target = asked
    found = {
        label: session.deletion(model, example, why.attributions, target)
        for label, why in explained.items()
    }
    return found, drawing.curves(found, session.chance(model, example, target))
