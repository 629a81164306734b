"""The commands ``captum-attn explain-text`` and ``captum-attn explain-image``.

The model, the method and what is asked are named on the command line; ``evaluate`` names them in
the same way::

    captum-attn explain-text "The keeper saved the penalty." --model topics --out why.html
    captum-attn explain-image photo.jpg --model timm/vit_base_patch16_224 --target "tabby cat"
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_attn._checks import FAILURES, is_file, is_folder, shown_error
from captum_attn.errors import AttnError, InputError, OptionError
from captum_attn.evaluation.command import device_of, method_of, methods_of
from captum_attn.evaluation.names import check_name

if TYPE_CHECKING:
    from captum_attn.evaluation.loaded import Loaded
    from captum_attn.explain.explained import Explained
    from captum_attn.explain.written import Answer

__all__ = ["explain_image_command", "explain_text_command"]

PICTURES, NUMBERS = (".png", ".html"), (".json", ".csv")
METHOD = "GenericAttention"
Methods = Mapping[str, tuple[str, dict[str, Any]]]


Method = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LIST",
        help='Methods of captum_attn and Captum, such as "GAE, VTranM, IntegratedGradients", by '
        "their classes or their papers' names; several are shown side by side; may be repeated. "
        f"Default: {METHOD}. Where a method has discard_self, it is on.",
    ),
]
Attention = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A .html page on which a layer, a head and a token are chosen, of one attention "
        "method and one model. Default: none.",
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Default: a GPU, if there is one.")
]


def explain_text_command(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is explained.")],
    model: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="topics (a real zero-shot classifier that needs no download), smollm2 (a real "
            "language model, once its package is installed), or a folder or hub id of "
            "transformers: a classifier of texts or tokens, or a causal language model. Repeated: "
            "models one below the other.",
        ),
    ],
    text2: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The second text of a pair.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="WORD", help="Of a token classifier: the word, or the number of the token."
        ),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help="Of a language model: explain the next N tokens, one by one.",
        ),
    ] = None,
    method: Method = None,
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
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="The coloured text, a .html or .png, or its numbers, a .json or .csv; may be "
            "repeated. Default: none.",
        ),
    ] = None,
    attention: Attention = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Words to print.")] = 10,
    device: Device = None,
) -> None:
    """Explain a text: which of its words spoke for a class, or for the next token.

    Prints the words with the most relevance, and writes them coloured in the text to --out. Words
    that were cut into pieces are put together; special tokens are left out unless they hold most
    of the relevance.
    """  # fmt: skip
    asked_for, outs = _methods(method), _checked_outs(out)
    _check_models(model)
    _check_attention(attention, asked_for, model)
    if labels is not None and "topics" not in model:
        raise OptionError(f"--labels are for the model topics; '{model[0]}' has its own")
    alone = token or text2 or target != "predicted" or len(model) > 1 or attention
    if generate is not None and alone:
        raise OptionError("--generate goes on from one text with one model: leave out --text2, "
                          "--token, --target, --attention and a second --model")  # fmt: skip
    # Imported here, so that --help and a mistyped option do not wait for them.
    from captum_attn.explain.ranking import encoded, ranking
    from captum_attn.visualization import visualize_text

    topics = [] if labels is None else labels.split(",")
    texts = [text] if text2 is None else [text, text2]
    about = {"text": text} | ({} if text2 is None else {"text2": text2})
    answers: list[Answer] = []
    for name in model:
        loaded, where = _loaded(name, device, topics if name == "topics" else [])
        if loaded.tokenizer is None:
            raise OptionError(f"'{name}' is for images: see captum-attn explain-image")
        inputs = encoded(loaded, text, where, text2)
        if generate is not None:
            return _generate(name, loaded, inputs, asked_for, generate, outs, about)
        answer = _text_answer(name, loaded, inputs, (target, token), asked_for, texts)
        _announce(answer.asked, name if len(model) > 1 else "")
        print(ranking(answer.words, top), end="\n\n" if name != model[-1] else "\n")
        answers.append(answer)
        if attention is not None:
            page = {"tokens": _tokens_of(loaded, inputs), "title": answer.asked.question}
            _write_attention(attention, loaded, inputs, answer.asked, asked_for, page)
    words = {kind: [answer.words[kind] for answer in answers] for kind in asked_for}
    _write(outs, answers, about, lambda: visualize_text(words, titles=_titles(answers)))


def explain_image_command(
    image: Annotated[Path, typer.Argument(metavar="FILE", help="A picture: PNG, JPEG, WebP ...")],
    model: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="digit-vit, texture-vit or clothing-vit (small, in the package), timm/NAME, or a "
            "folder or hub id of transformers: an image classifier. Repeated: models one below "
            "the other.",
        ),
    ],
    method: Method = None,
    target: Annotated[
        str, typer.Option(metavar="CLASS", help="A class by its name or number.")
    ] = "predicted",
    out: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="The picture, a .png or .html, or its numbers, a .json or .csv; may be repeated. "
            "Default: explanation.png.",
        ),
    ] = None,
    attention: Attention = None,
    device: Device = None,
) -> None:
    """Explain a picture: where in it the model saw a class.

    Writes the picture as the model takes it and a map for each method to --out.
    """
    asked_for, outs = _methods(method), _checked_outs(out or [Path("explanation.png")])
    _check_models(model)
    _check_attention(attention, asked_for, model)
    if not is_file(image):
        raise InputError(f"no picture at '{image}'; give the path of an image file")
    # Imported here, so that --help and a mistyped option do not wait for them.
    from captum_attn.explain.explained import ask
    from captum_attn.explain.written import Answer
    from captum_attn.visualization import visualize_image

    answers, seen, found, marks = [], [], [], []
    for name in model:
        loaded, where = _loaded(name, device)
        if loaded.read is None:
            raise OptionError(f"'{name}' is for text: see captum-attn explain-text")
        pixels = loaded.read(image)[None].to(where)  # (1, C, H, W)
        asked = ask(loaded, pixels, target)
        found.append(_attributions(loaded, pixels, asked, asked_for))
        marks.append(_left_out(loaded, pixels, asked, asked_for))
        maps = {kind: values[0].sum(0) for kind, values in found[-1].items()}
        answers.append(Answer(name, asked, maps=maps))
        seen.append(loaded.shown(pixels[0]))
        if attention is not None:
            page = {"images": seen[-1], "title": asked.question}
            _write_attention(attention, loaded, pixels, asked, asked_for, page)
        _announce(asked, name if len(model) > 1 else "")
    maps = {kind: [one[kind][0] for one in found] for kind in asked_for}
    gone = {kind: [one[kind][0] for one in marks] for kind in marks[0]}
    titles = _titles(answers)
    _write(outs, answers, {"image": str(image)},
           lambda: visualize_image(maps, seen, titles=titles, left_out=gone or None))  # fmt: skip


# ---------------------------------------------------------------------------- before anything runs
def _methods(given: list[str] | None) -> Methods:
    return methods_of("method", ", ".join(given or [METHOD]))


def _check_models(names: Sequence[str]) -> None:
    for name in names:
        check_name(name)
    if len(set(names)) < len(names):
        raise OptionError("--model: expected different models")


def _check_attention(path: Path | None, methods: Methods, models: Sequence[str]) -> None:
    if path is None:
        return
    if path.suffix.lower() != ".html":
        raise OptionError(f"--attention: expected a file ending in .html, got '{path}'")
    if len(methods) > 1 or len(models) > 1:
        raise OptionError("--attention shows one method on one model; give one of each")
    _check_place("--attention", path)


def _checked_outs(outs: list[Path] | None) -> list[Path]:
    """Refuses before a model is loaded what could not be written after it has run."""
    for out in outs or []:
        if out.suffix.lower() not in (*PICTURES, *NUMBERS):
            raise OptionError(
                f"--out: expected a file ending in {', '.join(PICTURES + NUMBERS[:1])} or "
                f"{NUMBERS[1]}, got '{out}'"
            )
        _check_place("--out", out)
    return list(outs or [])


def _check_place(option: str, path: Path) -> None:
    if not is_folder(path.parent):
        raise InputError(f"no folder at '{path.parent}'; give {option} a file in a folder of yours")
    if is_folder(path) or not os.access(path if is_file(path) else path.parent, os.W_OK):
        raise InputError(f"cannot write to '{path}'; give {option} a file of yours")


# ---------------------------------------------------------------------------- the explanation
def _loaded(
    name: str, device: str | None, labels: Sequence[str] | None = None
) -> tuple[Loaded, str]:
    from captum_attn.evaluation.models import load

    loaded, where = load(name, labels), device_of(device)
    loaded.model.to(where)
    return loaded, where


def _text_answer(
    name: str,
    loaded: Loaded,
    inputs: Any,
    question: tuple[str, str | None],
    methods: Methods,
    texts: Sequence[str],
) -> Answer:
    from captum_attn.explain.explained import ask
    from captum_attn.explain.ranking import words_in
    from captum_attn.explain.written import Answer

    target, token = question
    if token is not None and not loaded.tags:
        raise OptionError(f"--token is for token classifiers; '{name}' is none")
    asked = ask(loaded, inputs, target, token)
    found = _attributions(loaded, inputs, asked, methods)
    words = {
        kind: words_in(loaded, inputs, relevance["input_ids"][0], texts)
        for kind, relevance in found.items()
    }
    for kind, marks in _left_out(loaded, inputs, asked, methods).items():
        gone = marks["input_ids"][0]
        words[kind] = [
            w._replace(left_out=bool(gone[list(w.positions)].all())) for w in words[kind]
        ]
    return Answer(name, asked, words)


def _generate(
    name: str,
    loaded: Loaded,
    inputs: Any,
    methods: Methods,
    count: int,
    outs: Sequence[Path],
    about: dict[str, Any],
) -> None:
    from captum_attn.explain.generated import answers_of, picture_of, table_of

    if not loaded.next_token:
        raise OptionError(f"--generate is for language models; '{name}' is none")
    made = {kind: _on_the_model(loaded, *given) for kind, given in methods.items()}
    answers, written = answers_of(name, loaded, inputs, made, count)
    print(table_of(answers))
    _write(outs, answers, about, lambda: picture_of(written, loaded))


def _on_the_model(loaded: Loaded, kind: str, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A method with its options.

    Where the output is a mean over tokens, each is relevant to itself by merely being there; like
    the authors of GAE for display, leave that out.
    """
    attribution, options = method_of(kind, given, loaded, "method")
    typed = getattr(attribution, "Options", None)
    has = set() if typed is None else {field.name for field in typed.listed()}
    if "discard_self" in has and "leave_out" not in options:
        options = {"discard_self": True, **options}
    return attribution, options


def _attributions(
    loaded: Loaded, inputs: Any, asked: Explained, methods: Methods
) -> dict[str, Any]:
    """What every method returns, by its name on the command line."""
    found: dict[str, Any] = {}
    for name, (kind, given) in methods.items():
        attribution, options = _on_the_model(loaded, kind, given)
        try:
            found[name] = attribution.attribute(inputs, target=asked.target, **options)
        except FAILURES as problem:  # of Captum's methods, which ids or options do not suit
            said = str(problem) if isinstance(problem, AttnError) else shown_error(problem)
            raise OptionError(
                f"--method: {name} cannot explain this input by this model: {said}"
            ) from problem
    return found


def _left_out(loaded: Loaded, inputs: Any, asked: Explained, methods: Methods) -> dict[str, Any]:
    """Where methods took relevance away (`leave_out`), by their names on the command line."""
    marks = {}
    for name, (kind, given) in methods.items():
        if given.get("leave_out"):
            attribution, options = _on_the_model(loaded, kind, given)
            marks[name] = attribution.left_out(inputs, target=asked.target, **options)
    return marks


def _tokens_of(loaded: Loaded, inputs: Any) -> Any:
    fast = getattr(inputs, "encodings", None)
    ids = inputs["input_ids"][0].tolist()
    return inputs if fast else loaded.tokenizer.convert_ids_to_tokens(ids)


def _write_attention(
    path: Path, loaded: Loaded, inputs: Any, asked: Explained, methods: Methods, page: Any
) -> None:
    from captum_attn.attr import AttentionAttribution
    from captum_attn.visualization import attention_page

    ((name, (kind, given)),) = methods.items()
    attribution, options = _on_the_model(loaded, kind, given)
    if not isinstance(attribution, AttentionAttribution):
        raise OptionError(f"--attention: expected a method of captum_attn, got {name}")
    row = asked.target[0] if isinstance(asked.target, tuple) else None
    options = {"target": asked.target, **options}
    try:
        layers = attribution.layer_maps(inputs, **options)
        final = attribution.relevance_maps(inputs, **options)
    except AttnError as problem:  # of methods that make no map of each head
        raise OptionError(f"--attention: {name}: {problem}") from problem
    made = attention_page(layers, final, row=row, **page)
    print(f"written to {made.save(path)}")


# ---------------------------------------------------------------------------- what is said
def _titles(answers: Sequence[Answer]) -> list[str]:
    several = len(answers) > 1
    return [f"{a.model}: {a.asked.question}" if several else a.asked.question for a in answers]


def _announce(asked: Explained, model: str) -> None:
    if model:
        print(model)
    print(f"predicted: {asked.prediction}")
    print(asked.question)


def _write(
    outs: Sequence[Path],
    answers: Sequence[Answer],
    about: dict[str, Any],
    draw: Callable[[], Any],
) -> None:
    from captum_attn.explain.written import write

    for out in outs:
        numbers = out.suffix.lower() in NUMBERS
        written = write(out, answers, about) if numbers else draw().save(out)
        print(f"written to {written}")
