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
from captum_attn.insights.tab import ExamplesTab
from captum_attn.insights.uploads import MAX_BYTES, MAX_PIXELS
from captum_attn.metrics import Curve

__all__ = [
    "CSS",
    "HEADER",
    "bar",
    "caption",
    "curves",
    "hint",
    "key",
    "limits",
    "message",
    "panel",
    "predictions",
    "title_of",
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
.ca-night { display: none; } .dark .ca-night { display: block; } .dark .ca-day { display: none; }
.ca-key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
.ca-key i.ca-dashed { border: 1px dashed currentColor; }
.ca-card, .ca-card * { overflow-wrap: anywhere; }
@media (max-width: 520px) { .ca-two { flex-direction: column; }
  .ca-images { flex-direction: column; } .ca-images img { width: 100%; }
  .ca-card { padding: .5rem .6rem .7rem; } .ca-text td { display: block; }
  .ca-bar { grid-template-columns: 5.5rem 1fr 3.2rem !important; gap: .3rem !important; } }
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
.ca-found img, .ca-images.ca-one img { width: min(100%, 26rem); }
.ca-found { background: #fff; padding: .4rem; border-radius: 6px; }
.ca-written { margin: 0; padding-left: 1.6rem; } .ca-written p { margin: .5rem 0 .2rem; }
.ca-upload .icon-wrap { display: none; }
.ca-card img { max-width: 100%; height: auto; border-radius: 4px; }
"""
MAX_CAPTION = 80


def hint() -> str:
    """What the page says before anything was asked."""
    return '<p class="ca-note">The first example is being explained …</p>'


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


def caption(session: ExamplesTab, index: int) -> str:
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
    label = "" if example.label is None else f"({label_of(session, example.label)})"
    return " ".join(filter(None, [f"{index + 1}.", example.name or text, label]))


def title_of(session: ExamplesTab, example: Example) -> str:
    """One line for an example of the list, or for what the user brought."""
    known = [i for i, one in enumerate(session.examples) if one is example]
    return caption(session, known[0]) if known else example.name


def predictions(
    session: Session, example: Example, predicted: Sequence[Prediction], target: int | None
) -> str:
    """The scores as bars; the explained class stands out."""
    scale = max((abs(p.score) for p in predicted), default=0) or 1
    scale = 1.0 if scale <= 1 else scale  # probabilities are shares of the whole width
    bars = "".join(
        bar(p.label, f"{p.score:.3f}", abs(p.score) / scale, p.target == target) for p in predicted
    )
    right = example.label
    said = "" if right is None else f"label: <b>{escape(label_of(session, right))}</b> · "
    named = "the score" if target is None else f"<b>{escape(label_of(session, target))}</b>"
    title = title_of(session, example)
    note = f'<p class="ca-note">{escape(session.note)}</p>' if session.note else ""
    return (
        f'<div class="ca-card"><p class="ca-input">{escape(title)}</p><h3>Prediction</h3>{bars}'
        f"<p>{said}explained: {named}</p>{note}</div>"
    )


def panel(why: Explanation, label: str = "the score") -> str:
    """Every input with its attribution by one method, and what the colours say about the class."""
    several = len([o for o in why.outputs if o.type != "empty"]) > 1
    inputs = "".join(_input(o, several) for o in why.outputs if o.type != "empty")
    signed = any(bool((values < 0).any()) for values in why.attributions)
    return f'<div class="ca-card"><h3>{escape(why.method)}</h3>{inputs}{key(label, signed)}</div>'


def key(label: str, signed: bool, left_out: bool = False) -> str:
    """What the colours say about what is explained."""
    colours = {"#e08214": "for", **({"#8073ac": "against"} if signed else {})}
    said = " &nbsp; ".join(
        f'<i style="background: {colour}"></i> {said} {escape(label)}'
        for colour, said in colours.items()
    )
    said += ' &nbsp; <i class="ca-dashed"></i> left out' if left_out else ""
    return f'<p class="ca-note ca-key">{said}</p>'


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
        bars = (bar(str(n), f"{v:+.0f}", abs(v) / 100, v > 0) for n, v in pairs)
        return heading + "".join(bars)
    return heading + message(f"a feature of type {output.type!r} cannot be drawn here")


def _words(output: FeatureOutput) -> str:
    """Pieces joined into words, special tokens left out; the strongest word has full colour."""
    from captum_attn.visualization import visualize_text

    return visualize_text(torch.tensor(output.modified), output.base, legend=False).html()


def bar(name: str, said: str, share: float, on: bool) -> str:
    name = escape(name)
    kind = "ca-bar ca-on" if on else "ca-bar"
    width = f"{100 * min(share, 1):.1f}%"
    return (
        f'<div class="{kind}"><span title="{name}">{name}</span><i style="width: {width}"></i>'
        f"<span>{said}</span></div>"
    )


LEAST = 0.05  # a score that moves by less than that hardly moves


def curves(measured: Mapping[str, Curve], chance: Curve) -> str:
    """The deletion curves of the methods, with random orders for comparison: by day and by night.

    Args:
        measured (Mapping): name of a method -> its curve, one row.
        chance (Curve): a row for each random order.
    """
    day = _drawn_curves(measured, chance, "#333333").html(dpi=110)
    night = _drawn_curves(measured, chance, "#d4d4d8").html(dpi=110)
    values = torch.cat([chance.values, *(curve.values for curve in measured.values())])
    note = "The faster the score falls, the more the prediction rested on what was named first."
    if float(values.max() - values.min()) < LEAST:
        note = (
            "The score hardly moves, whatever is removed: this answer does not rest on what can be "
            "removed here, and the curves tell the methods not apart."
        )
    return (
        f'<div class="ca-card"><h3>Deletion</h3><div class="ca-day">{day}</div>'
        f'<div class="ca-night">{night}</div><p class="ca-note">{note}</p></div>'
    )


def _drawn_curves(measured: Mapping[str, Curve], chance: Curve, ink: str) -> Any:
    from captum_attn.visualization.picture import Picture

    picture = Picture(alt="Deletion curves", figsize=(8, 2.9), layout="constrained")
    picture.patch.set_alpha(0)  # the card's own ground is seen
    ax: Any = picture.subplots()
    ax.patch.set_alpha(0)
    fractions, rows = chance.fractions.cpu(), chance.values.double().cpu()
    mean, spread = rows.mean(0), rows.std(0, correction=0)
    ax.fill_between(fractions, mean - spread, mean + spread, color="0.5", alpha=0.25, lw=0)
    # Orange and purple as everywhere; the dashes tell them apart without colour.
    looks = zip(measured.items(), (("#e08214", "-"), ("#8073ac", "--")), strict=False)
    for (name, curve), (colour, dashes) in looks:
        label = f"{name}: area {float(curve.area()[0]):.3f}"
        values = curve.values[0].cpu()
        ax.plot(fractions, values, dashes, color=colour, lw=2, label=label)
    area = float(chance.area().mean())
    label = f"{len(rows)} random orders: area {area:.3f}"
    ax.plot(fractions, mean, ":", color="0.5", label=label)
    empty = float(rows[:, -1].mean())
    ax.axhline(empty, color=ink, lw=0.8, ls=(0, (1, 3)), label=f"empty input: {empty:.3f}")
    ax.set(xlabel="share of the input removed, the most relevant first", ylabel="score")
    ax.set_xlim(0, 1)
    every = torch.cat([rows, *(curve.values.double().cpu() for curve in measured.values())])
    if float(every.min()) >= 0 and float(every.max()) <= 1:
        ax.set_ylim(0, 1.02)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["bottom", "left"]].set_color(ink)
    ax.tick_params(colors=ink)
    for words in (ax.xaxis.label, ax.yaxis.label):
        words.set_color(ink)
    legend = {"frameon": False, "fontsize": 9, "labelcolor": ink}
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), **legend)
    return picture


def label_of(session: ExamplesTab, index: int) -> str:
    classes = getattr(session, "classes", [])  # a detector's have names of their own
    return classes[index] if 0 <= index < len(classes) else str(index)
