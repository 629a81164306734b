"""What the tabs of the page have in common: the fields of a method, and messages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from captum_attn._checks import shown_error
from captum_attn.attr import AttentionRollout
from captum_attn.errors import AttnError
from captum_attn.insights import drawing
from captum_attn.insights.methods import Option, help_of, options_of
from captum_attn.insights.tab import ExamplesTab, Tab

__all__ = [
    "ASKED",
    "MAX_LETTERS",
    "NOTHING",
    "PICTURES",
    "Side",
    "example_names",
    "or_message",
    "sides",
]

log = logging.getLogger(__name__)

MAX_LETTERS = 5000  # of a text
NOTHING = "nothing"  # in place of a second method
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
# The inputs go through the queue one after another; no other page can call them.
ASKED: dict[str, Any] = {
    "api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "model",
}  # fmt: skip


def example_names(tab: ExamplesTab) -> list[tuple[str, int]]:
    """The examples as a list shows them."""
    return [(drawing.caption(tab, i), i) for i in range(len(tab.examples))]


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


def sides(tab: Tab) -> tuple[Side, Side]:
    """The fields of the two methods."""
    names = list(tab.methods)
    return _side(tab, "Method", names[0], []), _side(tab, "Beside it", _contrast(names), [NOTHING])


def _side(tab: Tab, label: str, chosen: str, more: list[str]) -> Side:
    methods = tab.methods
    method = gr.Dropdown([*methods, *more], value=chosen, label=label)
    groups, fields = [], []
    for name, kind in methods.items():
        with gr.Group(visible=name == chosen) as group, gr.Accordion("Options", open=False):
            options = [
                option._replace(default=tab.presets.get(option.name, option.default))
                for option in options_of(kind)
                if option.name not in tab.without_effect()
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


def or_message(call: Callable[..., tuple[Any, str]], *arguments: Any) -> tuple[Any, str]:
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
