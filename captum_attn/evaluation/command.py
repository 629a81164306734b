"""The command ``captum-attn evaluate``: methods side by side over files, or a model's own data.

One command line for one process and for several::

    captum-attn evaluate --model digit-vit --out results
    torchrun --nproc-per-node 2 --no-python captum-attn evaluate --model digit-vit --out results
"""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captum_attn._checks import is_file, is_folder, shown, shown_error, whole
from captum_attn._method_names import method_class, method_name, with_hyphens, without_hyphens
from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation.names import EMBEDDED, check_name

if TYPE_CHECKING:
    from captum_attn.evaluation.known_answers import KnownAnswers
    from captum_attn.evaluation.loaded import Loaded

__all__ = ["evaluate_command"]

MOST = 2**63 - 1  # a number that torch can count to

METHODS = "RawAttention, AttentionRollout, GenericAttention, VTranM, HeterogenousAttention, " \
    "IntegratedGradients, RandomAttribution"  # fmt: skip
IMAGE_METRICS = "positive_auc, negative_auc, aopc, log_odds"
INDEPENDENT_METRICS = "positive_auc(measure='sigmoid_accuracy'), " \
    "negative_auc(measure='sigmoid_accuracy'), aopc(measure='sigmoid'), " \
    "log_odds(measure='log_sigmoid')"  # fmt: skip
MASK_METRICS = ", segmentation, pointing_game, energy_inside"
# Every method of the package and of Captum's that runs on ids, and chance.
ANSWER_METHODS = "RawAttention, AttentionRollout, AttentionGradCam, GradSam, AttCAT, " \
    "TransitionAttention(n_steps=5), BeyondIntuition(n_steps=5), GenericAttention, " \
    "HeterogenousAttention, HeterogenousAttention(correction='full'), VTranM, " \
    "TransformerAttribution, AttnLRP, CPLRP, ConservativeLRP, InputXGradient, " \
    "IntegratedGradients(n_steps=20), DeepLift, FeatureAblation, KernelShap(n_samples=50), " \
    "RandomAttribution"  # fmt: skip
ANSWER_METRICS = "place_hit, place_rank, place_share, comprehensiveness(steps=(0.05, 0.1, 0.2))"
KNOWN_ANSWERS = "known-answers"
TEXT_METRICS = "token_removal_auc, comprehensiveness, sufficiency, aopc, log_odds"
RATIONALE_METRICS = ", rationale_f1, rationale_auprc"


def evaluate_command(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="digit-vit, texture-vit, clothing-vit, topics, smollm2, timm/NAME, or a folder or "
            "hub id of transformers.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for the batches and the results.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A folder of images, a sub-folder per class; or a file of lines, each with a "
            "label, a tab and a text, and after another tab the words that are marked as its "
            "reason; or known-answers, prompts of a language model whose answer stands at a known "
            "place. Default: the model's own scenes, textures, clothing or texts.",
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Masks of the objects, under the images' paths."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help='Methods of captum_attn and Captum, such as "GenericAttention, '
            'VTranM(length=False)". Default: those that the data is for.',
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help='Metrics, such as "aopc(steps=10), segmentation". Default: those that the data '
            "is for.",
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="WHAT", help="label, predicted, or a class's number. Default: label, if any."
        ),
    ] = "",
    perturbation: Annotated[
        str,
        typer.Option(
            metavar="OPTIONS",
            help="What the metrics that perturb share, such as \"patch_size=8, fill='mean'\".",
        ),
    ] = "",
    limit: Annotated[int | None, typer.Option(metavar="N", help="The first examples only.")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Examples at a time.")] = 8,
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything random.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out has already.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: a GPU, if there is one.")
    ] = None,
) -> None:
    """Measure attribution methods side by side over a data set, with errors and differences.

    Under torchrun or accelerate launch every process takes its share. A run that was killed goes
    on with --resume.
    """
    whole("--seed", seed, 0, 2**63 - 1), whole("--batch-size", batch_size, 1, MOST)
    if limit is not None:
        whole("--limit", limit, 1, MOST)
    answers = str(data) == KNOWN_ANSWERS and not is_file(data) and not is_folder(data)
    if methods is None:
        methods = ANSWER_METHODS if answers else METHODS
    asked = methods_of("methods", methods)
    check_name(model)
    chosen = None if metrics is None else listed("metrics", metrics)
    shared = options_of("perturbation", perturbation)
    if not answers:
        _check_data(model, data, masks)
    # Imported here, so that --help and a mistyped option do not wait for them.
    from captum_attn.evaluation.data import read_lines
    from captum_attn.evaluation.models import load
    from captum_attn.evaluation.run import evaluate

    labels = (read_lines(data).names or []) if data is not None and is_file(data) else None
    loaded = load(model, labels)
    text = loaded.tokenizer is not None
    loaded.model.to(device_of(device))
    if answers:
        loaded, dataset = _known_answers(model, loaded, limit, seed)
    else:
        dataset = _dataset(model, loaded, data, masks, limit, seed)
    labelled = not hasattr(dataset, "labels") or dataset.labels is not None
    if chosen is None:
        marked = masks is not None or data is None
        marked = getattr(dataset, "spans", None) is not None if text else marked
        default = ANSWER_METRICS if answers else _default_metrics(loaded, marked)
        chosen = listed("metrics", default)
    results = evaluate(
        loaded.model,
        dataset,
        {name: method_of(kind, given, loaded) for name, (kind, given) in asked.items()},
        chosen,
        target=_target(target, labelled),
        perturbation={"fill": _fill(loaded, answers), "perturbations_per_eval": 11} | shared,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        out=out,
        resume=resume,
    )
    if os.environ.get("RANK", "0") == "0":
        print(results.table(shutil.get_terminal_size((100, 24)).columns))
        print(f"\nresults.json, results.csv, differences.csv and table.md in {out.resolve()}")


def _fill(loaded: Loaded, answers: bool) -> Any:
    """What stands for what is taken away."""
    from captum_attn.evaluation.known_answers import blank_of

    if answers:
        return blank_of(loaded.tokenizer)
    return "zero" if loaded.tokenizer is None else "remove"


def _known_answers(
    name: str, loaded: Loaded, limit: int | None, seed: int
) -> tuple[Loaded, KnownAnswers]:
    """The language model as a classifier of the next token, and the prompts that it has right."""
    from dataclasses import replace

    from captum_attn.evaluation.known_answers import EACH, TASKS, NextToken, known_answers

    if not loaded.next_token:
        raise OptionError(
            f"--data {KNOWN_ANSWERS} is for causal language models, such as smollm2; '{name}' is "
            "none"
        )
    model = NextToken(loaded.model).eval()
    each = EACH if limit is None else -(-limit // len(TASKS))
    found = known_answers(model, loaded.tokenizer, each, seed)
    if os.environ.get("RANK", "0") == "0":
        print(f"{found}\n")
    return replace(loaded, model=model), found


def _default_metrics(loaded: Loaded, marked: bool) -> str:
    if loaded.tokenizer is not None:
        return TEXT_METRICS + (RATIONALE_METRICS if marked else "")
    by_image = INDEPENDENT_METRICS if loaded.independent else IMAGE_METRICS
    return by_image + (MASK_METRICS if marked else "")


def listed(option: str, text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """``"a, b(c=1)"`` -> {"a": ("a", {}), "b(c=1)": ("b", {"c": 1})}."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for node in _parsed(option, text, f"[{text}\n]").elts:
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(call.func, ast.Name) or call.args:
            raise OptionError(
                f"--{option}: expected names or name(option=value), got {shown(text)}"
            )
        name = ast.unparse(node)
        if name in found:
            raise OptionError(f"--{option}: {name} is there twice")
        found[name] = call.func.id, _keywords(option, call)
    return found


def methods_of(option: str, text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """`listed` of methods, whose names are checked: nothing is loaded yet.

    Examples::

        >>> methods_of("methods", "GAE, T-Attr(start_layer=1)")
        {'GAE': ('GenericAttention', {}),
         'T-Attr(start_layer=1)': ('TransformerAttribution', {'start_layer': 1})}
    """
    found = listed(option, without_hyphens(text))
    if not found:
        raise OptionError(f"--{option}: expected at least one")
    return {
        with_hyphens(name): (method_name(f"--{option}", kind), given)
        for name, (kind, given) in found.items()
    }


def options_of(option: str, text: str) -> dict[str, Any]:
    """``"a=1, b='c'"`` -> {"a": 1, "b": "c"}."""
    calls = _parsed(option, text, f"[f({text}\n)]").elts
    call = calls[0] if len(calls) == 1 else None
    plain = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
    if not isinstance(call, ast.Call) or not plain:
        raise OptionError(f"--{option}: expected option=value, ..., got {shown(text)}")
    return _keywords(option, call)


def _parsed(option: str, text: str, source: str) -> ast.List:
    try:
        found = ast.parse(source, mode="eval").body
    except SyntaxError as problem:
        raise OptionError(f"--{option}: cannot read {shown(text)}: {problem.msg}") from problem
    except (
        ValueError,
        RecursionError,
        MemoryError,
    ) as problem:  # null bytes, thousands of brackets
        raise OptionError(f"--{option}: cannot read {shown(text)}") from problem
    if not isinstance(found, ast.List):  # brackets that close ours
        raise OptionError(f"--{option}: cannot read {shown(text)}: its brackets do not match")
    return found


def _keywords(option: str, call: ast.Call) -> dict[str, Any]:
    try:
        if any(k.arg is None for k in call.keywords):
            raise ValueError("**")
        return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, TypeError, RecursionError, MemoryError) as problem:
        raise OptionError(
            f"--{option}: expected plain values, such as steps=10 or fill='mean', got "
            f"{shown(ast.unparse(call))}"
        ) from problem


def _check_data(model: str, data: Path | None, masks: Path | None) -> None:
    if data is None and model not in EMBEDDED:
        own = [name for name in EMBEDDED if name != "smollm2"]
        raise OptionError(
            f"--data: only {', '.join(own)} bring data of their own; give a folder or a file"
        )
    if data is not None and not (is_file(data) or is_folder(data)):
        raise InputError(f"no folder or file at '{data}'; see --data")
    if masks is not None and (data is None or is_file(data)):
        raise OptionError("--masks are for a folder of images; give it with --data")


def device_of(device: str | None) -> str:
    import torch

    if device is None:
        number = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except Exception as problem:  # every backend has errors of its own
        raise OptionError(
            f"--device: {device!r} cannot be used: {shown_error(problem)}; give cpu or cuda"
        ) from problem
    return device


def _dataset(
    name: str, loaded: Loaded, data: Path | None, masks: Path | None, limit: int | None, seed: int
) -> Any:
    from captum_attn.evaluation.data import ImageFolder, TextFile

    if loaded.tags:
        raise OptionError(f"'{name}' is a token classifier: see captum-attn explain-text")
    if loaded.next_token:
        raise OptionError(
            f"'{name}' is a language model: give --data {KNOWN_ANSWERS}, or see captum-attn "
            "explain-text"
        )
    if data is None:
        assert loaded.examples is not None
        return loaded.examples(limit, seed)
    if is_file(data):
        if loaded.tokenizer is None:
            raise OptionError(f"'{name}' is for images: give --data a folder")
        return TextFile(data, loaded.tokenizer, loaded.classes, loaded.max_length)
    if loaded.read is None:
        raise OptionError(f"'{name}' is for text: give --data a file of lines")
    return ImageFolder(data, loaded.read, masks, loaded.read_mask, loaded.classes)


def method_of(
    kind: str, options: dict[str, Any], loaded: Loaded, option: str = "methods"
) -> tuple[Any, dict[str, Any]]:
    """A method with its options: those of `__init__` go there, the others to `attribute`."""
    import inspect

    from captum_attn.evaluation.known_answers import AtEmbeddings, NextToken, blank_of
    from captum_attn.evaluation.methods import check_options, made
    from captum_attn.evaluation.models import EmbeddingGradients

    of_next = isinstance(loaded.model, NextToken)
    if of_next and kind in AtEmbeddings.KINDS:
        return AtEmbeddings(kind, loaded.model, loaded.tokenizer), options
    if loaded.tokenizer is not None and kind == "IntegratedGradients":
        return EmbeddingGradients(loaded.model, loaded.tokenizer), options
    found = method_class(f"--{option}", kind)
    made_with = {k: v for k, v in options.items() if k in inspect.signature(found).parameters}
    rest = {k: v for k, v in options.items() if k not in made_with}
    if of_next and kind in ("FeatureAblation", "KernelShap"):
        rest.setdefault("baselines", blank_of(loaded.tokenizer))
    if given := sorted({"target", "inputs", "additional_forward_args", "objective"} & set(rest)):
        raise OptionError(f"--{option}: {given[0]} is no option of a method here; see --target")
    with _saying(option, kind):
        method = made(found, loaded.model, made_with)
        check_options(method, rest, kind)
    return method, rest


@contextmanager
def _saying(option: str, kind: str) -> Iterator[None]:
    """Errors about a method name the option of the command line, and the method."""
    try:
        yield
    except OptionError as error:
        said = str(error)
        bare = said.removeprefix("methods: ")
        about = bare if bare != said else f"{kind}: {said}"
        raise OptionError(f"--{option}: {about}") from error


def _target(given: str, labelled: bool) -> Any:
    if not given:
        return "label" if labelled else "predicted"
    if not given.lstrip("-").isdecimal():
        return given
    return whole("--target", int(given[:20]), -(2**31), 2**31)
