"""The page: fields on the left, what was found on the right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr

from captum_attn._checks import shown_error, whole
from captum_attn.attr import AttentionRollout
from captum_attn.errors import AttnError, InputError
from captum_attn.insights import drawing
from captum_attn.insights.examples import Example
from captum_attn.insights.methods import Option, help_of, options_of
from captum_attn.insights.session import Explanation, Session
from captum_attn.metrics import Curve

__all__ = ["CSS", "build_page", "theme"]

log = logging.getLogger(__name__)

NOTHING = "nothing"  # in place of a second method
PREDICTED = "the predicted class"
TITLE = "captum_attn"
MAX_WAITING = 20  # questions in the queue
MAX_LETTERS = 5000  # of a text
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
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


def build_page(sessions: Mapping[str, Session]) -> gr.Blocks:
    """The page of one dashboard, or of several as tabs.

    Args:
        sessions (Mapping of str to Session): by the name of the tab.

    Returns:
        gradio.Blocks: not yet served.

    Examples::

        >>> build_page({"Digits": session}).launch()
    """
    # Uploads are deleted after an hour.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(drawing.HEADER)
        if len(sessions) == 1:
            _dashboard(next(iter(sessions.values())), page.load)
        else:
            for name, session in sessions.items():
                with gr.Tab(name) as tab:
                    _dashboard(session, page.load if name == next(iter(sessions)) else tab.select)
        gr.HTML(drawing.limits(MAX_WAITING, MAX_LETTERS))
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page


@dataclass(frozen=True)
class Side:
    """The fields of one of the two methods."""

    method: gr.Dropdown
    fields: list[tuple[str, Option, Any]]  # of all methods; those of the chosen one are shown

    @property
    def components(self) -> list[Any]:
        """All fields, in the order in which `read` takes their values."""
        return [self.method, *(component for *_, component in self.fields)]

    def read(self, values: list[Any]) -> tuple[str, dict[str, Any]]:
        """The method's name and its options."""
        chosen, *rest = values
        each = zip(self.fields, rest, strict=True)
        return chosen, {o.name: value for (name, o, _), value in each if name == chosen}


def _dashboard(session: Session, opened: Callable[..., Any]) -> None:
    """The fields of one session; `opened` is the event by which its first example is explained."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=250):
            inputs, button = _what(session)
            names = list(session.methods)
            first = _side(session, "Method", names[0], [])
            second = _side(session, "Beside it", _contrast(names), [NOTHING])
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

    # The inputs go through the queue one after another; no other page can call them. What shows
    # at once is asked for again when it changes; the rest when the button is pressed.
    example, _, text, model, target = inputs
    given: dict[str, Any] = {
        "fn": explained, "inputs": [field for part in fields for field in part],
        "outputs": [predictions, *panels, curves], "api_visibility": "private",
        "concurrency_limit": 1, "concurrency_id": "model",
    }  # fmt: skip
    button.click(**given)
    text.submit(**given)
    for field in (example, model, target, first.method, second.method):
        field.input(**given, trigger_mode="always_last", show_progress="minimal")
    opened(**given, show_progress="hidden")


def _what(session: Session) -> tuple[list[Any], Any]:
    """Example, picture, text, model and target; and the button, which is seen at once."""
    examples = [(drawing.caption(session, i), i) for i in range(len(session.examples))]
    targets = [(PREDICTED, -1), *((label, i) for i, label in enumerate(session.classes))]
    models = list(session.models)
    example = gr.Dropdown(examples, value=0, label="Example", elem_classes="ca-example")
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


def _side(session: Session, label: str, chosen: str, more: list[str]) -> Side:
    methods = session.methods
    method = gr.Dropdown([*methods, *more], value=chosen, label=label)
    groups, fields = [], []
    for name, kind in methods.items():
        with gr.Group(visible=name == chosen) as group, gr.Accordion("Options", open=False):
            options = [
                option._replace(default=session.presets.get(option.name, option.default))
                for option in options_of(kind)
                if option.name not in _without_effect(session)
            ]
            fields += [
                (name, option, _field(option, help_of(kind, option.name))) for option in options
            ]
            if not options:
                gr.Markdown("It has none.")
        groups.append(group)

    def shown(chosen: str) -> list[Any]:
        return [gr.Group(visible=name == chosen) for name in methods]

    method.change(shown, method, groups, api_visibility="private", show_progress="hidden")
    return Side(method, fields)


def _contrast(names: list[str]) -> str:
    """The method beside the first: one that answers no question, if there is one."""
    rollout = AttentionRollout.get_name()
    return rollout if rollout in names else names[-1]


def _without_effect(session: Session) -> set[str]:
    """Options that change nothing here: of images where there is none, of streams where one is."""
    kinds = [feature.visualization_type() for feature in session.features]
    found = set() if "image" in kinds else {"interpolation"}
    return found if len(kinds) > 1 else found | {"self_in_rule_10", "noise_link"}


def _field(option: Option, info: str) -> Any:
    said: dict[str, Any] = {"label": option.name, "info": info or None}
    if isinstance(option.default, bool):
        return gr.Checkbox(option.default, **said)
    if option.choices:
        return gr.Dropdown(list(option.choices), value=option.default, **said)
    if isinstance(option.default, (int, float)):
        precision = 0 if isinstance(option.default, int) else None
        return gr.Number(
            option.default, precision=precision, minimum=option.lowest, maximum=option.highest,
            **said,
        )  # fmt: skip
    return gr.Textbox(option.default, **said)


def _explained(
    session: Session, asked: list[Any], two: list[tuple[str, dict[str, Any]]], with_curve: bool
) -> Iterator[list[str]]:
    """The four pieces of HTML; what fails says so in its place. The maps come before the curves."""
    found, said = _or_message(_predicted, session, *asked)
    if found is None:
        yield [said, "", "", ""]
        return
    panels, curves = [], {}
    for name, options in two:
        why, drawn = (None, "") if name == NOTHING else _or_message(_panel, found, name, options)
        panels.append(drawn)
        if why is not None:
            curves[name if name not in curves else f"{name} (2)"] = why
    yield [said, *panels, ""]
    if with_curve and curves:
        yield [said, *panels, _or_message(_curves, found, curves)[1]]


class PageQuestion(NamedTuple):
    """What is explained: a model's target for an example."""

    session: Session
    model: str
    example: Example
    target: int | None


def _predicted(
    session: Session, index: int, picture: str | None, text: str | None, model: str, target: int
) -> tuple[PageQuestion, str]:
    index = whole("example", index, 0, len(session.examples) - 1)
    if target is not None and session.classes:
        target = whole("target", target, -1, len(session.classes) - 1)
    if text and len(text) > MAX_LETTERS:
        raise InputError(f"the text has {len(text)} letters: expected at most {MAX_LETTERS}")
    example = session.own(session.examples[index], picture, text)
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


def _or_message(call: Callable[..., tuple[Any, str]], *arguments: Any) -> tuple[Any, str]:
    """What the call returns and its HTML; if it fails, None and the message."""
    try:
        return call(*arguments)
    except AttnError as error:
        return None, drawing.message(str(error))
    # A model or a method of the user's may raise anything, also what ends a program: in a thread
    # of the server nobody would catch that, and the page would wait for ever.
    except BaseException as error:
        log.exception("the dashboard could not explain this")
        return None, drawing.message(shown_error(error))
