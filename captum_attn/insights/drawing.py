"""The page's pieces of HTML. What comes from users, models and data sets is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch

from captum_attn.insights.examples import Example
from captum_attn.insights.features import FeatureOutput
from captum_attn.insights.methods import MAX_STEPS
from captum_attn.insights.session import STEPS, Explanation, Prediction, Session
from captum_attn.insights.uploads import MAX_BYTES, MAX_PIXELS
from captum_attn.metrics import Curve

__all__ = [
    "CSS",
    "HEADER",
    "caption",
    "curves",
    "hint",
    "limits",
    "message",
    "panel",
    "predictions",
]

HEADER = (
    '<div class="ca-header"><b>captum_attn</b> '
    "<span>Which parts of the input moved the prediction? Two methods, side by side.</span></div>"
)
CSS = """
.ca-header { padding: .2rem 0 .4rem; border-bottom: 3px solid #e08214; }
.ca-header b { font-size: 1.35rem; margin-right: .8rem; }
.ca-header span, .ca-note { color: var(--body-text-color-subdued); }
.ca-card { border: 1px solid var(--border-color-primary); border-radius: 10px;
  background: var(--background-fill-primary); padding: .7rem 1rem 1rem; margin-bottom: .6rem; }
.ca-card h3 { margin: 0 0 .1rem; font-size: 1.05rem; }
.ca-card h4 { margin: .7rem 0 .3rem; font-size: .85rem; font-weight: 600;
  color: var(--body-text-color-subdued); }
.ca-images { display: flex; gap: .6rem; align-items: flex-start; }
.ca-images img { width: calc(50% - .3rem); min-width: 0; }
.ca-text { line-height: 2; background: #fff; color: #111; padding: .4rem .6rem;
  border-radius: 6px; }
.ca-text table, .ca-text tr, .ca-text td { border: 0 !important; margin: 0; }
.ca-example input { text-overflow: ellipsis; padding-right: 1.8rem !important; }
.ca-bar { display: grid; grid-template-columns: 9rem 1fr 3.5rem; gap: .6rem; align-items: center;
  margin: .15rem 0; } .ca-bar i { display: block; height: .8rem; border-radius: 3px;
  background: #9ca3af; min-width: 2px; } .ca-bar.ca-on i { background: #e08214; }
.ca-bar.ca-on span { font-weight: 600; } .ca-bar span { overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.ca-message { border-left: 4px solid #b91c1c; padding: .6rem 1rem; border-radius: 4px;
  background: var(--background-fill-secondary); overflow-wrap: anywhere; }
.ca-upload .icon-wrap { display: none; }
.ca-card img { max-width: 100%; height: auto; border-radius: 4px; }
"""
MAX_CAPTION = 80


def hint() -> str:
    """What the page says before anything was asked."""
    return '<p class="ca-note">Choose an example, or bring your own, and press Explain.</p>'


def limits(waiting: int, letters: int) -> str:
    """What a question may cost, for all who ask."""
    return (
        '<p class="ca-note ca-limits">Limits: pictures of at most '
        f"{MAX_BYTES >> 20} MiB and {MAX_PIXELS / 1e6:.0f} megapixels, resized to the model's "
        f"input; texts of at most {letters:,} letters; n_steps up to {MAX_STEPS}; a deletion curve "
        f"of {STEPS} steps; one question at a time, {waiting} waiting.</p>"
    )


def message(text: str) -> str:
    """An error, as the user is told of it."""
    return f'<div class="ca-message" role="alert">{escape(text)}</div>'


def caption(session: Session, index: int) -> str:
    """One line for an example: its number, its words if it has any, and its label."""
    from captum_attn.visualization import text_records

    example = session.examples[index]
    words: list[str] = []
    for feature, value in zip(session.features, example.inputs, strict=True):
        if feature.visualization_type() == "text":
            tokens = feature.visualize(torch.zeros_like(value), value, 0.0).base
            words += text_records(torch.zeros(len(tokens)), tokens)[0].raw_input_ids
    text = " ".join(words)
    text = text if len(text) <= MAX_CAPTION else f"{text[:MAX_CAPTION].rstrip()} …"
    label = "" if example.label is None else f"({_label(session, example.label)})"
    return " ".join(filter(None, [f"{index + 1}.", text, label]))


def predictions(
    session: Session, example: Example, predicted: Sequence[Prediction], target: int | None
) -> str:
    """The scores as bars; the explained class stands out."""
    scale = max((abs(p.score) for p in predicted), default=0) or 1
    scale = 1.0 if scale <= 1 else scale  # probabilities are shares of the whole width
    bars = "".join(
        _bar(p.label, f"{p.score:.3f}", abs(p.score) / scale, p.target == target) for p in predicted
    )
    right = example.label
    said = "" if right is None else f"label: <b>{escape(_label(session, right))}</b> · "
    named = "the score" if target is None else f"<b>{escape(_label(session, target))}</b>"
    return f'<div class="ca-card"><h3>Prediction</h3>{bars}<p>{said}explained: {named}</p></div>'


def panel(why: Explanation) -> str:
    """Every input with its attribution by one method."""
    several = len([o for o in why.outputs if o.type != "empty"]) > 1
    inputs = "".join(_input(o, several) for o in why.outputs if o.type != "empty")
    return f'<div class="ca-card"><h3>{escape(why.method)}</h3>{inputs}</div>'


def _input(output: FeatureOutput, several: bool) -> str:
    share = f" · {output.contribution:+.0%} of the relevance" if several else ""
    heading = f"<h4>{escape(output.name)}{share}</h4>"
    if output.type == "image":
        views = (("original", output.base), ("attribution", output.modified))
        images = "".join(f'<img alt="{a}" src="data:image/png;base64,{d}">' for a, d in views)
        return f'{heading}<div class="ca-images">{images}</div>'
    if output.type == "text":
        return f'{heading}<div class="ca-text">{_words(output)}</div>'
    if output.type == "general":
        pairs = zip(output.base, output.modified, strict=True)
        bars = (_bar(str(n), f"{v:+.0f}", abs(v) / 100, v > 0) for n, v in pairs)
        return heading + "".join(bars)
    return heading + message(f"a feature of type {output.type!r} cannot be drawn here")


def _words(output: FeatureOutput) -> str:
    """Pieces joined into words, special tokens left out; the strongest word has full colour."""
    from captum_attn.visualization import visualize_text

    return visualize_text(torch.tensor(output.modified), output.base, legend=False).html()


def _bar(name: str, said: str, share: float, on: bool) -> str:
    name = escape(name)
    kind = "ca-bar ca-on" if on else "ca-bar"
    width = f"{100 * min(share, 1):.1f}%"
    return (
        f'<div class="{kind}"><span title="{name}">{name}</span><i style="width: {width}"></i>'
        f"<span>{said}</span></div>"
    )


def curves(measured: Mapping[str, Curve], chance: Curve) -> str:
    """The deletion curves of the methods, with a random order for comparison."""
    from captum_attn.visualization.picture import Picture

    picture = Picture(alt="Deletion curves", figsize=(8, 2.9), layout="constrained")
    ax: Any = picture.subplots()
    # Orange and purple as everywhere; the dashes tell them apart without colour.
    looks = zip(measured.items(), (("#c46a00", "-"), ("#6a51a3", "--")), strict=False)
    for (name, curve), (colour, dashes) in looks:
        area = float(curve.area()[0])
        label = f"{name}: area {area:.3f}"
        ax.plot(
            curve.fractions.cpu(), curve.values[0].cpu(), dashes, color=colour, lw=2, label=label
        )
    area = float(chance.area()[0])
    ax.plot(
        chance.fractions.cpu(),
        chance.values[0].cpu(),
        ":",
        color="0.5",
        label=f"random order: area {area:.3f}",
    )
    ax.set(xlabel="share of the input removed, the most relevant first", ylabel="score")
    ax.set_xlim(0, 1)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    note = "The faster the score falls, the more the prediction rested on what was named first."
    return (
        f'<div class="ca-card"><h3>Deletion</h3>{picture.html(dpi=110)}'
        f'<p class="ca-note">{note}</p></div>'
    )


def _label(session: Session, index: int) -> str:
    return session.classes[index] if 0 <= index < len(session.classes) else str(index)
