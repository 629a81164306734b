"""Known answers on SmolLM2: every method, with sinks and self left in and left out.

Every prompt is explained once for both rows of a method: what is left out is what its option
`leave_out` leaves out, and Captum's methods lose the same tokens. A run that was stopped goes on:

    python -m tests.benchmarks.known_answers --limit 24 --out FOLDER
    python -m tests.benchmarks.known_answers --methods "AttnLRP, FeatureAblation" --out FOLDER
    torchrun --nproc-per-node 2 -m tests.benchmarks.known_answers --limit 24 --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_attn import RawAttention, evaluate
from captum_attn.evaluation.command import ANSWER_METHODS, listed, method_of
from captum_attn.evaluation.known_answers import TASKS, KnownAnswers, NextToken, blank_of
from captum_attn.evaluation.known_answers import known_answers as prompts_of
from captum_attn.evaluation.loaded import Loaded
from captum_attn.evaluation.results import Results
from captum_attn.toy.smollm2 import load_smollm2

METRICS = ("place_hit", "place_rank", "place_share", "comprehensiveness")
STEPS = (0.05, 0.1, 0.2)  # shares of the tokens that are taken away
LEFT_OUT = ", left out"  # behind the name of a row


class Once:
    """A method that explains a batch once for the two rows that it has."""

    def __init__(self, method: Any, options: dict[str, Any]) -> None:
        self.method, self.options = method, options
        self.inputs: Tensor | None = None

    def attribute(self, inputs: Tensor, target: Any, additional_forward_args: Any) -> Tensor:
        """(B, n)."""
        if inputs is not self.inputs:
            given = {"target": target, "additional_forward_args": additional_forward_args}
            self.found = self.method.attribute(inputs, **given, **self.options)
            self.inputs = inputs
        return self.found


class WithoutSinks:
    """The same with the relevance of sinks and of the last token set to 0, Captum's as well."""

    def __init__(self, method: Once, marks: Once) -> None:
        self.method, self.marks = method, marks

    def attribute(self, inputs: Tensor, target: Any, additional_forward_args: Any) -> Tensor:
        """(B, n)."""
        given = inputs, target, additional_forward_args
        return self.method.attribute(*given).masked_fill(self.marks.attribute(*given), 0)


class Marks:
    """What `leave_out` leaves out, which is the same for all methods."""

    def __init__(self, model: NextToken) -> None:
        self.method = RawAttention(model)

    def attribute(self, inputs: Tensor, **given: Any) -> Tensor:
        """(B, n), bool."""
        return self.method.left_out(inputs, leave_out=("sink", "self"), **given)


def measured(
    limit: int,
    folder: Path,
    methods: str = ANSWER_METHODS,
    names: Sequence[str] = METRICS,
    seed: int = 0,
) -> tuple[Results, KnownAnswers]:
    """The table over `limit` prompts, an equal share of each task.

    Args:
        limit (int): prompts.
        folder (Path): of what is finished; a run that was stopped goes on.
        methods (str): as of `captum-attn evaluate`.
        names (sequence of str): of the measures.
        seed (int): of the prompts.
    """
    begun = any(folder.glob("*"))  # before the first of several processes writes
    inner, tokenizer = load_smollm2()
    model = NextToken(inner).eval()
    data = prompts_of(model, tokenizer, -(-limit // len(TASKS)), seed)
    loaded = Loaded(model, tokenizer=tokenizer, next_token=True)
    marks = Once(Marks(model), {})
    rows: dict[str, Any] = {}
    for name, (kind, options) in listed("methods", methods).items():
        rows[name] = once = Once(*method_of(kind, options, loaded))
        if kind != "RandomAttribution":
            rows[name + LEFT_OUT] = WithoutSinks(once, marks)
    removal: dict[str, Any] = {
        "fill": blank_of(tokenizer),
        "perturbations_per_eval": len(STEPS) + 1,
    }
    metrics = {name: (name, {"steps": STEPS} if name == METRICS[-1] else {}) for name in names}
    if METRICS[-1] not in names:
        removal = {}
    results = evaluate(
        model, data, rows, metrics, perturbation=removal, batch_size=len(TASKS), limit=limit,
        seed=seed, out=folder, resume=begun,
    )  # fmt: skip
    return results, data


def main() -> None:
    """The command line: prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=1200)
    parser.add_argument("--methods", default=ANSWER_METHODS)
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    results, data = measured(args.limit, args.out, args.methods, args.metrics)
    if os.environ.get("RANK", "0") == "0":
        print(f"{data}\n\n{results}")
        tried = json.dumps({k: vars(v) for k, v in data.tried.items()})
        (args.out / "tried.json").write_text(tried)


if __name__ == "__main__":
    main()
