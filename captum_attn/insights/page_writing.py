"""The language model's tab: a prompt, the next tokens, why one of them, and what is written on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import gradio as gr

from captum_attn.errors import InputError
from captum_attn.insights import drawing
from captum_attn.insights.fields import ASKED, MAX_LETTERS, NOTHING, or_message, sides
from captum_attn.insights.writing import MAX_WRITTEN, NextToken, WhyToken, WritingSession

__all__ = ["writing_tab"]

LOADING = '<p class="ca-note">The model is being loaded, the first time for about a minute …</p>'


def writing_tab(session: WritingSession, opened: Callable[..., Any]) -> None:
    """The fields of a language model; `opened` is the event by which its first prompt is read."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=250):
            example, prompt, button, leave_out = _what(session)
            first, second = sides(session)
        with gr.Column(scale=3, min_width=280):
            likely = gr.HTML(LOADING, elem_classes="predictions")
            chosen = gr.Radio(
                [], label="Next token: choose one to ask why", elem_classes="ca-choice"
            )
            with gr.Row(equal_height=False, elem_classes="ca-two"):
                panels = [gr.HTML(elem_classes=f"panel-{side}") for side in ("one", "two")]
            append, count, write, written = _writing()
    asked = [prompt, chosen, leave_out]
    fields = [*asked, *first.components, *second.components]
    border = len(asked) + len(first.components)

    def read(values: tuple[Any, ...]) -> list[tuple[str, dict[str, Any]]]:
        return [first.read(list(values[len(asked) : border])), second.read(list(values[border:]))]

    def why(*values: Any) -> Iterator[list[Any]]:
        prompt, token, out = values[: len(asked)]
        yield from _why(session, prompt, token, out, read(values))

    def anew(*values: Any) -> Iterator[list[Any]]:
        """The same of another prompt, whose likeliest next token is explained."""
        yield from why(values[0], None, *values[2:])

    def on(wanted: Any, *values: Any) -> Iterator[str]:
        text, _, out = values[: len(asked)]
        yield from _written(session, text, wanted, out, *read(values)[0])

    def appended(text: Any, token: Any) -> str:
        longer, _ = or_message(_appended, session, text, token)
        return text if longer is None else longer

    given: dict[str, Any] = {"inputs": fields, "outputs": [likely, chosen, *panels], **ASKED}
    button.click(anew, **given)
    prompt.submit(anew, **given)
    taken = example.input(lambda text: text, example, prompt, **ASKED, show_progress="hidden")
    taken.then(anew, **given, show_progress="minimal")
    for field in (chosen, leave_out, first.method, second.method):
        field.input(why, **given, trigger_mode="always_last", show_progress="minimal")
    longer = append.click(appended, [prompt, chosen], prompt, **ASKED, show_progress="hidden")
    longer.then(anew, **given, show_progress="minimal")
    write.click(on, [count, *fields], written, **ASKED, show_progress="minimal")
    opened(why, **given, show_progress="hidden")


def _what(session: WritingSession) -> tuple[Any, Any, Any, Any]:
    """Example, prompt, button, and whether sink and self are left out."""
    prompts = [*session.prompts]
    first = prompts[0] if prompts else None
    example = gr.Dropdown(
        prompts, value=first, label="Example", elem_classes="ca-example", visible=len(prompts) > 1
    )
    prompt = gr.Textbox(first or "", label="Prompt", lines=2, max_lines=6, max_length=MAX_LETTERS)
    button = gr.Button("Next tokens", variant="primary", elem_classes="explain")
    leave_out = gr.Checkbox(
        True, label="Leave out sink and self",
        info="The token that nearly all heads look at whatever is asked, and the last one.",
    )  # fmt: skip
    return example, prompt, button, leave_out


def _writing() -> tuple[Any, Any, Any, Any]:
    """What goes on from the prompt: buttons, how many tokens, and what was written."""
    with gr.Row(equal_height=True, elem_classes="ca-write"):
        append = gr.Button("Append the chosen token", elem_classes="append")
        count = gr.Number(
            5, label="Tokens to write", precision=0, minimum=1, maximum=MAX_WRITTEN, min_width=120
        )
        write = gr.Button("Write on", elem_classes="write")
    return append, count, write, gr.HTML(elem_classes="written")


def _why(
    session: WritingSession, prompt: Any, token: Any, out: Any,
    two: list[tuple[str, dict[str, Any]]],
) -> Iterator[list[Any]]:  # fmt: skip
    """The next tokens and why one of them; what fails says so in its place."""
    found, said = or_message(_likely, session, prompt, token)
    if found is None:
        yield [said, gr.Radio([], value=None), "", ""]
        return
    tokens, chosen = found
    choice = gr.Radio([(f"{t.text} {t.probability:.3f}", t.token) for t in tokens], value=chosen)
    yield [said, choice, "", ""]
    name, panels = next(t.text for t in tokens if t.token == chosen), ["", ""]
    for i, (method, options) in enumerate(two):
        if method != NOTHING:
            panels[i] = or_message(_panel, session, prompt, chosen, name, method, options, out)[1]
    yield [said, choice, *panels]


def _checked(prompt: Any) -> str:
    if not isinstance(prompt, str) or len(prompt) > MAX_LETTERS:
        raise InputError(f"the prompt: expected a text of at most {MAX_LETTERS} letters")
    return prompt


def _likely(
    session: WritingSession, prompt: Any, token: Any
) -> tuple[tuple[list[NextToken], int], str]:
    tokens = session.next_tokens(_checked(prompt))
    chosen = token if token in [t.token for t in tokens] else tokens[0].token
    name = next(t.text for t in tokens if t.token == chosen)
    sure = sum(t.probability for t in tokens)
    note = f'<p class="ca-note">{escape(session.note)}</p>' if session.note else ""
    return (tokens, chosen), (
        f'<div class="ca-card"><h3>Prediction</h3><p>explained: <b>{escape(name)}</b> as the next '
        f"token. {escape(session.name)} gives the {len(tokens)} likeliest {sure:.3f} of the "
        f"probability.</p>{note}</div>"
    )


def _panel(
    session: WritingSession, prompt: Any, token: int, name: str, method: str,
    options: dict[str, Any], out: Any,
) -> tuple[WhyToken, str]:  # fmt: skip
    why = session.explain(prompt, token, method, options, bool(out))
    return why, (
        f'<div class="ca-card"><h3>{escape(method)}</h3>{_words(why)}'
        f"{drawing.key(name, bool((why.relevance < 0).any()), bool(why.left_out.any()))}</div>"
    )


def _words(why: WhyToken) -> str:
    """The prompt's words; the strongest has full colour, one that was left out a dashed frame."""
    from captum_attn.visualization import visualize_text

    drawn = visualize_text(why.relevance, why.tokens, left_out=why.left_out, legend=False)
    return f'<div class="ca-text">{drawn.html()}</div>'


def _appended(session: WritingSession, prompt: Any, token: Any) -> tuple[str, str]:
    if token is None:
        raise InputError("no token is chosen: ask for the next tokens first")
    return session.with_token(_checked(prompt), token)[:MAX_LETTERS], ""


def _written(
    session: WritingSession, prompt: Any, count: Any, out: Any, method: str,
    options: dict[str, Any],
) -> Iterator[str]:  # fmt: skip
    """The tokens one by one, each with its map, as they come."""
    rows: list[str] = []
    tokens = session.write(str(prompt)[: MAX_LETTERS + 1], count, method, options, bool(out))
    while True:
        found, said = or_message(lambda: (next(tokens, False), ""))
        if found is None or found is False:
            yield _list(rows, method, said, done=True)
            return
        token, why = found
        rows.append(
            f'<li><p><b>{escape(token.text)}</b> <span class="ca-note">'
            f"{token.probability:.3f}</span></p>{_words(why)}</li>"
        )
        yield _list(rows, method, "", done=False)


def _list(rows: list[str], method: str, said: str, done: bool) -> str:
    more = "" if done else '<p class="ca-note">writing …</p>'
    return (
        f'<div class="ca-card"><h3>Written on, each token by {escape(method)}</h3>'
        f'<ol class="ca-written">{"".join(rows)}</ol>{said}{more}</div>'
    )
