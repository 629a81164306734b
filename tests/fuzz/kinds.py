"""Mistakes by kind: what is never right for an argument that wants a count, a title ..."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Makers = dict[str, Callable[[], Any]]  # name of a mistake -> makes it, anew for every call
NAN, INF = float("nan"), float("inf")


class Broken:
    """An object that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def _of(**values: Any) -> Makers:
    return {
        name: value if callable(value) else (lambda v=value: v) for name, value in values.items()
    }


EVERYTHING: Makers = _of(
    none=None, text="x", empty_text="", half_a_letter="\ud800", bytes=b"x", true=True, zero=0,
    minus_one=-1, three=3, half=0.5, huge=10**30, far=1e300, nan=NAN, inf=INF, complex=1j,
    empty_list=[], numbers=[1, 2], mixed=[1, "a"], nested=[[1], [2, 3]], nones=[None],
    empty_dict={}, a_dict={"a": 1}, number_dict={0: torch.ones(2)}, a_set={1, 2}, empty_tuple=(),
    an_object=lambda: object(), broken=lambda: Broken(), a_type=lambda: int,
    a_lambda=lambda: lambda *x, **y: None, generator=lambda: (i for i in range(2)),
    scalar=lambda: torch.tensor(1.0), vector=lambda: torch.rand(3), ids=lambda: torch.arange(4),
    matrix=lambda: torch.rand(2, 3), volume=lambda: torch.rand(2, 3, 4, 5),
    deep=lambda: torch.rand(1, 1, 2, 2, 2), empty=lambda: torch.rand(0),
    hollow=lambda: torch.rand(2, 0),
    nan_tensor=lambda: torch.full((2, 2), NAN), inf_tensor=lambda: torch.full((2,), INF),
    complex_tensor=lambda: torch.ones(2, 2, dtype=torch.cfloat), bools=lambda: torch.ones(2) > 0,
    sparse=lambda: torch.eye(2).to_sparse(), meta=lambda: torch.ones(2, 2, device="meta"),
    int8=lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
    array=lambda: np.ones((2, 2)), strings=lambda: np.array(["a", "b"]),
    objects=lambda: np.array([None, object()]),
    dates=lambda: np.array(["2020-01-01"], "datetime64[D]"),
)  # fmt: skip


def _some(names: str) -> Makers:
    return {name: EVERYTHING[name] for name in names.split()}


OBJECTS = "none an_object broken a_type bytes complex generator a_set"
TENSORS = "vector nan_tensor complex_tensor sparse meta int8 array strings objects"
WORDS = "text empty_text half_a_letter"
BUNDLES = "empty_list mixed nested nones empty_dict a_dict"

MOST = f"{OBJECTS} {TENSORS} {WORDS} {BUNDLES}"
KINDS: dict[str, Makers] = {
    "count": _some(f"{MOST} true zero minus_one half nan inf a_lambda"),
    "index": _some(f"{MOST} true half nan inf huge a_lambda"),
    "length": _some(f"{MOST} true zero minus_one nan inf far huge"),
    "share": _some(f"{MOST} true minus_one three nan inf huge"),
    "percent": _some(f"{MOST} true minus_one nan inf huge"),
    "flag": _some(f"{MOST} three nan"),
    "choice": _some(f"{MOST} true three nan numbers"),
    "pair": _some(f"{MOST} true zero nan three half a_lambda"),
    "side": _some(f"{MOST} true zero nan half a_lambda"),
    "texts": _some(f"{OBJECTS} {WORDS} {BUNDLES} three nan true volume a_lambda scalar"),
    "captions": _some(f"{OBJECTS} {TENSORS} {WORDS} a_dict number_dict three true nones"),
    "tensor": _some(f"{OBJECTS} {WORDS} {BUNDLES} nan_tensor inf_tensor complex_tensor sparse meta "
                    "int8 strings objects dates empty hollow deep nan a_lambda"),
    "tokens": _some(f"{OBJECTS} {WORDS} {BUNDLES} numbers three nan vector volume a_lambda scalar"),
    "mapping": _some(f"{OBJECTS} {WORDS} three nan vector numbers a_lambda"),
    "callable": _some("none an_object broken bytes complex text three nan numbers a_dict vector"),
    "path": _some("none an_object three nan numbers a_dict vector bytes empty_text"),
    "anything": _some(f"{MOST} three nan a_lambda volume scalar"),
}  # fmt: skip


JUNK = _of(
    empty="", blank=" ", bracket="[", closing=")", closed="], [x", deep="(" * 5000, call="a(b=1",
    star="a(**{})", unhashable="a(b={[]: 1})", null="a\0b", half_a_letter="a\ud800",
    long="a" * 5000, digits="9" * 30, minus_one="-1", half="1.5", nan="nan", none="None",
    unknown="Unknown", lines="a\nb", comment="a # b", comma=",", dots="../..", star_path="*",
    fraction="½", arabic="٣٤", zero="0",
)  # fmt: skip
METHODS = _of(
    layer="LayerGradCam", noise="NoiseTunnel", occlusion="Occlusion", twice="VTranM, VTranM",
    no_option="VTranM(lenght=True)", no_choice="VTranM(length='x')", layers="VTranM(layers=3)",
    target="VTranM(target=1)", objective="VTranM(objective='x')", nothing="Attribution",
    steps="IntegratedGradients(n_steps=0)", word="IntegratedGradients(n_steps='a')",
    misspelt="VTramn", a_function="evaluate", private="_x", dotted="captum.attr.Saliency",
    integrated="IntegratedGradients(method='x')", fusion="AttentionRollout(head_fusion=[1])",
)  # fmt: skip
METRICS = _of(
    no_option="aopc(step=2)", no_number="aopc(steps='a')", no_steps="aopc(steps=0)",
    measure="aopc(measure='x')", twice="aopc, aopc", misspelt="aocp", nan="aopc(steps=[nan])",
    infinite="aopc(steps=1e999)", rationale="rationale_f1", fill="aopc(fill=[])",
)  # fmt: skip
PLACES = _of(
    missing="/nowhere/at/all", below_a_file="/etc/hostname/x", device="/dev/null",
    a_file="/etc/hostname", root="/proc/self",
)  # fmt: skip


def _folders() -> Makers:
    from tests.fuzz.cli import CONFIGS, FOLDER

    return {f"of_{name}": (lambda n=name: str(FOLDER / n)) for name in CONFIGS}


def _junk(names: str = "", *, but: str = "", more: Makers | None = None) -> Makers:
    chosen = {n: JUNK[n] for n in (names.split() or JUNK) if n not in but.split()}
    return chosen | (more or {})


WORDS_OF_COMMANDS: dict[str, Callable[[], Makers]] = {
    "model": lambda: _junk(more=_folders() | _of(
        timm="timm/nope", hub="timm/hf-hub:a/b", local="timm/local-dir:/tmp")),
    "methods": lambda: _junk(more=METHODS),
    "metrics": lambda: _junk(more=METRICS),
    "options": lambda: _junk(but="empty blank comment", more=_of(
        patchsize="patchsize=4", two="a=1), g(b=2", word="a")),
    "class": lambda: _junk(but="zero empty none" ),
    "whole_word": lambda: _junk(),
    "device": lambda: _junk(more=_of(meta="meta", tpu="tpu", cuda="cuda:99")),
    "place": lambda: _junk(but="dots blank", more=PLACES),
    "out_folder": lambda: _junk("null half_a_letter long", more=_of(
        below="/etc/hostname/x", file="/etc/hostname", proc="/proc/x")),
    "out_file": lambda: _junk("empty null long bracket", more=_of(
        ending="a.gif", below="/nowhere/x.png", proc="/proc/x.png", folder="/tmp", none="x")),
    "no_text": lambda: _junk("empty blank"),
    "labels": lambda: _junk("empty blank comma half_a_letter"),
}  # fmt: skip


def mistakes(kind: str) -> Makers:
    """The mistakes of a kind; with "?" None is right, with "-a,b" these two are."""
    kind, _, right = kind.partition("-")
    known = {"none"} if kind.endswith("?") else set()
    known |= set(filter(None, right.split(",")))
    kind = kind.rstrip("?")
    made = WORDS_OF_COMMANDS[kind]() if kind in WORDS_OF_COMMANDS else KINDS[kind]
    return {n: make for n, make in made.items() if n not in known}


def shortened(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={type(value).__name__}" for name, value in arguments.items())
