"""GAE's perturbation tests of LXMERT (its Fig. 3) in small: words or regions taken away.

    python -m tests.benchmarks.vqa_perturbation            # 500 scenes, a question each
    python -m tests.benchmarks.vqa_perturbation --scenes 40 --out results

A question about a scene is answered from its words and from six regions. Words, or regions, are
masked out of the attention, the most relevant first (positive: the accuracy should fall soon, lower
is better) or the least relevant first (negative: it should last, higher is better). The number is
the area under the accuracy of the answers. Request is the right answer.

Words go in steps of a tenth, and [CLS], [SEP] stay, also when all words are gone. Regions go one by
one, and the last one stays: a softmax whose every key is masked attends to all of them alike, so
LXMERT cannot be left without a region in this way.

Half of the answers are no, and a model that has lost the asked region says no: the questions whose
answer is yes are shown on their own as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

import captum_attn
from captum_attn import (
    AttentionRollout,
    GenericAttention,
    HeterogenousAttention,
    RawAttention,
    VTranM,
)
from captum_attn.evaluation import Batch, Column, Metric, Results
from captum_attn.metrics import RandomAttribution, Remove, token_removal_auc
from captum_attn.toy.digit_vqa import YES, load_digit_vqa, questions, regions
from captum_attn.toy.scenes import scenes
from captum_attn.toy.vocabulary import PAD, SPECIAL, VOCABULARY, tokenize

BATCH = 50
REGIONS = 6


class WordsAndRegions:
    """Captum's Integrated Gradients on the words' embeddings and the regions' features.

    From [PAD] in place of every word, and from black regions. The answer turns over a short piece
    of that way: with 20 steps nearly half of it is missed, with 200 some hundredths.
    """

    def __init__(self, model: nn.Module, n_steps: int = 200) -> None:
        self.model, self.n_steps = model, n_steps
        self.words = next(m for m in model.modules() if isinstance(m, nn.Embedding))

    def attribute(self, inputs: dict[str, Tensor], target: Any) -> dict[str, Tensor]:
        """``input_ids`` (B, n) and ``visual_feats`` (B, 6), signed."""

        def forward(words: Tensor, features: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
            return self.model(
                inputs_embeds=words, visual_feats=features, visual_pos=boxes, attention_mask=mask
            ).question_answering_score

        ids, features = inputs["input_ids"], inputs["visual_feats"]
        blank = ids.where(ids < len(SPECIAL), VOCABULARY[PAD])
        with torch.no_grad():
            words, no_words = self.words(ids), self.words(blank)
        found = IntegratedGradients(forward).attribute(
            (words, features),
            baselines=(no_words, torch.zeros_like(features)),
            target=target,
            additional_forward_args=(inputs["visual_pos"], inputs["attention_mask"]),
            n_steps=self.n_steps,
        )
        on_words, on_regions = (part.sum(-1).detach() for part in found)
        return {"input_ids": on_words, "visual_feats": on_regions}


METHODS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "RawAttention": (RawAttention, {}),
    "AttentionRollout": (AttentionRollout, {}),
    "GenericAttention": (GenericAttention, {}),
    "Heterogenous, positive": (HeterogenousAttention, {"correction": "positive"}),
    "Heterogenous, absolute": (HeterogenousAttention, {"correction": "absolute"}),
    "Heterogenous, full": (HeterogenousAttention, {"correction": "full"}),
    "VTranM": (VTranM, {}),
    "IntegratedGradients": (WordsAndRegions, {}),
    "RandomAttribution": (RandomAttribution, {}),
}


def of_words(
    model: Callable, inputs: dict, attributions: Any, target: Any, _: Any = None, *, order: str
) -> Tensor:
    """Area under the accuracy while words are masked out, (B,)."""
    return token_removal_auc(
        model, inputs, attributions, target, order=order, steps=10, perturb="input_ids",
        removable=inputs["input_ids"] >= len(SPECIAL), perturbations_per_eval=11,
    )  # fmt: skip


def of_regions(
    model: Callable, inputs: dict, attributions: Any, target: Any, _: Any = None, *, order: str
) -> Tensor:
    """Area under the accuracy while all regions but one are masked out, (B,)."""
    return token_removal_auc(
        model, inputs, attributions, target, order=order, perturb="visual_feats",
        steps=[k / REGIONS for k in range(REGIONS)], fill=Remove("visual_attention_mask"),
        perturbations_per_eval=REGIONS,
    )  # fmt: skip


METRICS = {
    f"{what}, {sign}": Metric(
        function, {"value": Column("value", better)}, options={"order": order}
    )
    for what, function in (("words", of_words), ("regions", of_regions))
    for sign, order, better in (("positive", "most", "lower"), ("negative", "least", "higher"))
}


def asked_about(n: int, seed: int) -> list[tuple[str, dict[str, Tensor], int]]:
    """Held-out scenes: a question, the regions, the right answer."""
    found = regions(scenes(n, split="test", seed=seed), seed)
    asked = questions(found, seed)
    return [
        (text, {name: x[i] for name, x in found.inputs.items()}, int(asked.answers[i]))
        for i, text in enumerate(asked.texts)
    ]


def collated(examples: list[tuple[str, dict[str, Tensor], int]]) -> Batch:
    texts, of_scene, answers = zip(*examples, strict=True)
    features = {name: torch.stack([one[name] for one in of_scene]) for name in of_scene[0]}
    return Batch(tokenize(texts) | features, torch.tensor(answers))


def some_of(results: Results, rows: Tensor) -> Results:
    """The results of some examples, True in (n,)."""
    chosen = rows.numpy()
    kept = {of: {k: v[chosen] for k, v in found.items()} for of, found in results.kept.items()}
    groups = [g for g, here in zip(results.groups, chosen, strict=True) if here]
    return replace(results, kept=kept, groups=groups)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep batches and differences in this directory")
    parser.add_argument("--resume", action="store_true", help="go on with what --out has")
    options = parser.parse_args(arguments)

    model = load_digit_vqa()
    examples = asked_about(options.scenes, options.seed)
    results = captum_attn.evaluate(
        model,
        examples,
        {name: (METHODS[name][0](model), METHODS[name][1]) for name in options.methods},
        METRICS,
        batch_size=BATCH,
        collate_fn=collated,
        seed=options.seed,
        out=options.out,
        resume=options.resume,
    )
    whole = collated(examples)
    with torch.no_grad():
        right = model(**whole.inputs).question_answering_score.argmax(1) == whole.target
    print(f"{len(examples)} held-out scenes, {float(right.double().mean()):.1%} answered right\n")
    print(f"All questions:\n\n{results}\n")
    print(f"The questions whose answer is yes:\n\n{some_of(results, whole.target == YES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
