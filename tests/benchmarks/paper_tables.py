"""The papers' tables in small, a command and a file of results each.

    python -m tests.benchmarks.paper_tables gae-table-1               # writes tutorials/tables/
    python -m tests.benchmarks.paper_tables gae-fig-3 --examples 40 --out FOLDER
    python -m tests.benchmarks.paper_tables --list

`tutorials/papers.md` says which is which, and sets the papers' order beside ours. Rows have the
names of the papers; `ROWS` says what they are here. Every row of a table sees the same examples.

- Detector: masks made of the maps, as `detr_tables` makes them, held to the boxes of the digits.
- LXMERT: words or regions masked out of the attention, as `vqa_perturbation` does.
- ViT: textured objects over noise; segmentation with the map's mean as threshold, and the accuracy
  while pixels are taken away.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from captum.attr import IntegratedGradients

from captum_attn import (
    AttCAT,
    AttentionGradCam,
    AttentionRollout,
    AttnLRP,
    BeyondIntuition,
    ConservativeLRP,
    GenericAttention,
    GradSam,
    HeterogenousAttention,
    PartialLRP,
    RawAttention,
    TransformerAttribution,
    TransformerLRP,
    TransitionAttention,
    VTranM,
    evaluate,
)
from captum_attn.evaluation import Results
from captum_attn.evaluation.models import load
from captum_attn.metrics import RandomAttribution
from captum_attn.toy.digit_detr import load_digit_detr
from captum_attn.toy.digit_vqa import load_digit_vqa
from captum_attn.toy.scenes import scenes
from tests.benchmarks import detr_tables, pages, vqa_perturbation

FOLDER = Path(__file__).parents[2] / "tutorials" / "tables"
RESAMPLES = 50  # of the detector's scenes
PATH_STEPS = 20  # of the methods that go from a baseline to the input

# A paper's name of a row -> the class, and the options of its `attribute`.
ROWS: dict[str, tuple[type, dict[str, Any]]] = {
    "raw attention": (RawAttention, {}),
    "rollout": (AttentionRollout, {}),
    "Grad-CAM": (AttentionGradCam, {}),
    "partial LRP": (PartialLRP, {}),
    "full LRP": (TransformerLRP, {}),
    "conservative LRP": (ConservativeLRP, {}),
    "Transformer Attribution": (TransformerAttribution, {}),
    "GAE": (GenericAttention, {}),
    "GAE, LRP in place of A": (GenericAttention, {"relevance": "lrp"}),
    "GAE, no self-attention in Eq. 10": (GenericAttention, {"self_in_rule_10": False}),
    "GAE, no normalisation (Eq. 8, 9)": (GenericAttention, {"normalize": False}),
    "GAE, no aggregation": (GenericAttention, {"aggregate": False}),
    "heterogenous, positive": (HeterogenousAttention, {}),
    "heterogenous, positive, noise link": (HeterogenousAttention, {"noise_link": True}),
    "heterogenous, absolute": (HeterogenousAttention, {"correction": "absolute"}),
    "heterogenous, absolute, noise link": (
        HeterogenousAttention,
        {"correction": "absolute", "noise_link": True},
    ),
    "heterogenous, full": (HeterogenousAttention, {"correction": "full"}),
    "heterogenous, homogenous part": (HeterogenousAttention, {"part": "homogenous"}),
    "VTranM": (VTranM, {}),
    "VTranM, no length": (VTranM, {"length": False}),
    "VTranM, no direction": (VTranM, {"direction": False}),
    "VTranM, neither": (VTranM, {"length": False, "direction": False}),
    "VTranM, no aggregation": (VTranM, {"aggregate": False}),
    "AttCAT": (AttCAT, {}),
    "Grad-SAM": (GradSam, {}),
    "TAM": (TransitionAttention, {"n_steps": PATH_STEPS}),
    "BI, head-wise": (BeyondIntuition, {"n_steps": PATH_STEPS}),
    "BI, token-wise": (BeyondIntuition, {"n_steps": PATH_STEPS, "perception": "token"}),
    "AttnLRP": (AttnLRP, {}),
    "Integrated Gradients": (IntegratedGradients, {"n_steps": PATH_STEPS}),
    "random": (RandomAttribution, {}),
}
ABLATIONS = {
    "GAE": tuple(name for name in ROWS if name.startswith("GAE, ")),
    "VTranM": tuple(name for name in ROWS if name.startswith("VTranM, ")),
}
COMPARED = tuple(name for name in ROWS if name not in ABLATIONS["GAE"] + ABLATIONS["VTranM"])
# Of one stream, the heterogenous rules without a second one are each other's or GAE's.
ONE_STREAM = tuple(
    name for name in COMPARED if "noise link" not in name and "homogenous part" not in name
)


class Table(NamedTuple):
    """A table of a paper.

    Attributes:
        title (str): what it shows, and in which paper.
        make (callable): (rows, examples, seed, the table's own settings) -> the text of the table.
        rows (sequence of str): of `ROWS`.
        examples (int): the number of examples.
        settings (Any): see `make`.
    """

    title: str
    make: Callable[[Sequence[str], int, int, Any], str]
    rows: Sequence[str]
    examples: int
    settings: Any = None


# ---------------------------------------------------------------------------------- the detector
def of_detector(rows: Sequence[str], examples: int, seed: int, threshold: str) -> str:
    """Masks of a detector's maps, held to the digits' boxes and to their ink."""
    model, batch = load_digit_detr(), scenes(examples, split="test", seed=seed)
    truths = {
        kind: detr_tables.annotations(detr_tables.truth_of(batch, kind), batch.labels)
        for kind in detr_tables.TRUTHS
    }
    detected, lines = 0, []
    for name in rows:
        kind, options = ROWS[name]
        found = detr_tables.explained(kind(model), options, batch.images)
        detected = sum(len(one.labels) for one in found)
        made = detr_tables.results(found, threshold)
        cells = detr_tables.cells(truths, made, resamples=RESAMPLES)
        lines.append([name, *map(str, cells)])
        print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    head = ["method", *(f"{c} of {t} ↑" for t in detr_tables.TRUTHS for c in detr_tables.COLUMNS)]
    said = f"{examples} held-out scenes, {detected} detections; in per cent, ± standard error over"
    return f"{said} scenes (bootstrap, {RESAMPLES} resamples).\n\n{pages.table(head, lines)}"


# ---------------------------------------------------------------------------------- the LXMERT
def of_lxmert(rows: Sequence[str], examples: int, seed: int, _: Any) -> str:
    """Areas under the accuracy while words, or regions, are masked out of the attention."""
    model, asked = load_digit_vqa(), vqa_perturbation.asked_about(examples, seed)
    methods = {
        name: (vqa_perturbation.WordsAndRegions(model), {})  # of ids and features together
        if ROWS[name][0] is IntegratedGradients
        else (ROWS[name][0](model), ROWS[name][1])
        for name in rows
    }
    results = evaluate(
        model, asked, methods, vqa_perturbation.METRICS, seed=seed,
        batch_size=vqa_perturbation.BATCH, collate_fn=vqa_perturbation.collated,
    )  # fmt: skip
    return written(results)


# ---------------------------------------------------------------------------------- the ViT
def of_vit(rows: Sequence[str], examples: int, seed: int, metrics: Sequence[str]) -> str:
    """Measures of the package on textured objects over noise, asked about the true class."""
    loaded = load("texture-vit")
    assert loaded.examples is not None
    methods = {name: (ROWS[name][0](loaded.model), ROWS[name][1]) for name in rows}
    results = evaluate(
        loaded.model, loaded.examples(examples, seed), methods, list(metrics), seed=seed,
        perturbation={"fill": "zero", "perturbations_per_eval": 11}, batch_size=20,
    )  # fmt: skip
    return written(results)


def written(results: Results) -> str:
    """The table, with the number of examples."""
    return f"{len(results)} examples.\n\n{results}"


TABLES = {
    "gae-fig-3": Table(
        "GAE, Fig. 3: words and regions of an LXMERT taken away, most relevant first (positive) "
        "and least relevant first (negative)",
        of_lxmert, COMPARED, 200,
    ),
    "gae-ablation-lxmert": Table(
        "GAE, ablations on an LXMERT", of_lxmert, ("GAE", *ABLATIONS["GAE"]), 200
    ),
    "gae-table-1": Table(
        "GAE, Table 1: masks of a detector's maps, Otsu's threshold",
        of_detector, COMPARED, 60, "otsu",
    ),
    "gae-ablation-detector": Table(
        "GAE, ablations on a detector, Otsu's threshold",
        of_detector, ("GAE", *ABLATIONS["GAE"]), 100, "otsu",
    ),
    "gae-vit": Table(
        "GAE, a ViT: segmentation by the map, and the accuracy while pixels are taken away",
        of_vit,
        ("raw attention", "rollout", "Grad-CAM", "partial LRP", "Transformer Attribution", "GAE",
         "GAE, LRP in place of A", "random"),
        100, ("segmentation", "positive_auc", "negative_auc"),
    ),
    "heterogenous-table-1": Table(
        "Heterogenous, Table 1: masks of a detector's maps, Otsu's threshold",
        of_detector, tuple(n for n in COMPARED if n.startswith(("het", "GAE", "random"))), 200,
        "otsu",
    ),
    "heterogenous-table-2": Table(
        "Heterogenous, Table 2: masks of a detector's maps, 0.3 times Otsu's threshold",
        of_detector, tuple(n for n in COMPARED if n.startswith(("het", "GAE", "random"))), 200,
        "0.3otsu",
    ),
    "vtranm-segmentation": Table(
        "VTranM: segmentation by the map of a ViT", of_vit, ONE_STREAM, 100, ("segmentation",)
    ),
    "vtranm-perturbation": Table(
        "VTranM: the accuracy of a ViT while pixels are taken away, most relevant first (positive) "
        "and least relevant first (negative)",
        of_vit, ONE_STREAM, 100, ("positive_auc", "negative_auc"),
    ),
    "vtranm-faithfulness": Table(
        "VTranM: AOPC and LOdds of a ViT", of_vit, ONE_STREAM, 40, ("aopc", "log_odds")
    ),
    "vtranm-table-4": Table(
        "VTranM, Table 4: what of it helps",
        of_vit, ("GAE", "VTranM", *ABLATIONS["VTranM"]), 100,
        ("segmentation", "positive_auc", "negative_auc"),
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="what there is, and nothing else")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW")
    parser.add_argument("--examples", type=int, help="instead of the table's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{name}: {table.title}" for name, table in TABLES.items()))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.tables:
        table = TABLES[name]
        rows, examples = given.rows or table.rows, given.examples or table.examples
        text = table.make(rows, examples, given.seed, table.settings)
        command = f"python -m tests.benchmarks.paper_tables {name}"
        if examples != table.examples:
            command += f" --examples {examples}"
        if rows is not table.rows:
            command += f" --rows {' '.join(map(shlex.quote, rows))}"
        if given.seed:
            command += f" --seed {given.seed}"
        page = f"# {table.title}\n\n```bash\n{command}\n```\n\n{text}\n"
        (given.out / f"{name}.md").write_text(page, encoding="utf-8")
        print(page)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
