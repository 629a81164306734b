"""Every measure beside independent code: the largest difference, on the same random input.

    python -m tests.benchmarks.held_against            # prints the table
    python -m tests.benchmarks.held_against --write    # and puts it into tutorials/measures.md

The independent code is that of other packages (Quantus, scikit-learn, OpenCV, torchvision, scipy),
or the paper's equations written once more, plainly and slowly (`tests/metrics/plain.py`, and here).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from captum_attn import metrics
from captum_attn.metrics._engine import prepare
from captum_attn.metrics.sensitivity import correlations
from tests.benchmarks import pages
from tests.metrics import plain

RNG = np.random.default_rng(0)
TARGETS = [1, 0, 2]
PLAIN = "plain rewrite"
QUIET = {"disable_warnings": True, "normalise": False, "abs": False, "return_aggregate": False}


class Net(nn.Module):
    """Images (B, 1, 6, 4) -> logits (B, 3), float64, not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.from_numpy(RNG.normal(size=(24, 3))))

    def forward(self, images: Tensor) -> Tensor:
        return 2 * (images.double().flatten(1) @ self.weights).tanh()


NET = Net().eval()
IMAGES, MAPS = (torch.from_numpy(RNG.normal(size=(3, 1, 6, 4))) for _ in range(2))
MASKS = torch.from_numpy(RNG.random((3, 6, 4)) < 0.4)
GIVEN = {"x_batch": IMAGES.numpy(), "y_batch": np.array(TARGETS), "a_batch": MAPS.numpy()}
SCORES = torch.from_numpy(RNG.normal(size=(4, 30)))
MARKED = torch.from_numpy(RNG.random((4, 30)) < 0.3)


class Comparison(NamedTuple):
    """A row of the page.

    Attributes:
        measure, paper, against (str): what, from where, beside what.
        numbers (callable): -> (ours, theirs), of one shape.
    """

    measure: str
    paper: str
    against: str
    numbers: Callable[[], tuple[np.ndarray | Tensor | list, np.ndarray | Tensor | list]]

    @property
    def difference(self) -> float:
        """The largest one."""
        ours, theirs = (np.asarray(part, dtype=np.float64).ravel() for part in self.numbers())
        assert ours.shape == theirs.shape and ours.size
        return float(np.abs(ours - theirs).max())


def _probability(target: int) -> Callable[[Tensor], Tensor]:
    return lambda x: NET(x[None])[0].softmax(-1)[target]


def _without(x: Tensor, pixels: list[int], value: float = 0.0) -> Tensor:
    flat = x.flatten().clone()
    flat[pixels] = value
    return flat.view_as(x)


def _curves(order: str, steps: int, insert: bool = False) -> list[list[float]]:
    levels = [t / steps for t in range(steps + 1)]
    return [
        plain.curve(_probability(t), x, m.flatten(), levels, _without, order, insert)
        for x, m, t in zip(IMAGES, MAPS, TARGETS, strict=True)
    ]


def _areas(curves: list[list[float]], steps: int) -> np.ndarray:
    levels = [t / steps for t in range(steps + 1)]
    return np.array([plain.trapezoid(curve, levels) for curve in curves])


def _intact() -> list[float]:
    return [float(_probability(t)(x)) for x, t in zip(IMAGES, TARGETS, strict=True)]


def perturbation_auc() -> tuple:
    levels = metrics.TO_90
    areas = []
    for x, m, t in zip(IMAGES, MAPS, TARGETS, strict=True):
        hits = plain.curve(
            lambda v, t=t: float(NET(v[None])[0].argmax() == t), x, m.flatten(), levels, _without
        )  # fmt: skip
        areas.append(plain.trapezoid(hits, levels) / 0.9)
    return metrics.perturbation_auc(NET, IMAGES, MAPS, TARGETS), areas


def aopc() -> tuple:
    pairs = zip(_intact(), _curves("most", 20), strict=True)
    return metrics.aopc(NET, IMAGES, MAPS, TARGETS), [plain.aopc(p, c) for p, c in pairs]


def log_odds() -> tuple:
    pairs = zip(_intact(), _curves("most", 20), strict=True)
    return metrics.log_odds(NET, IMAGES, MAPS, TARGETS), [plain.log_odds(p, c) for p, c in pairs]


def abpc() -> tuple:
    theirs = _areas(_curves("least", 20), 20) - _areas(_curves("most", 20), 20)
    return metrics.abpc(NET, IMAGES, MAPS, TARGETS), theirs


def deletion() -> tuple:
    return metrics.deletion(NET, IMAGES, MAPS, TARGETS), _areas(_curves("most", 100), 100)


def insertion() -> tuple:
    ours = metrics.insertion(NET, IMAGES, MAPS, TARGETS, fill="zero")
    return ours, _areas(_curves("most", 100, insert=True), 100)


def saco() -> tuple:
    ours = metrics.saco(NET, IMAGES, MAPS, TARGETS, bins=6, fill="zero")
    theirs = [
        plain.saco(_probability(t), x, m.flatten(), _without, 6)
        for x, m, t in zip(IMAGES, MAPS, TARGETS, strict=True)
    ]
    return ours, theirs


def sensitivity() -> tuple:
    """Quantus' FaithfulnessCorrelation, with the sets that it draws."""
    import quantus

    drawn, choose = [], np.random.choice

    def remembered(*arguments, **options):  # type: ignore[no-untyped-def]
        drawn.append(choose(*arguments, **options))
        return drawn[-1]

    metric = quantus.FaithfulnessCorrelation(
        nr_runs=40, subset_size=7, perturb_baseline=0.0, **QUIET
    )  # fmt: skip
    state = np.random.get_state()
    np.random.seed(0)
    np.random.choice = remembered
    try:
        theirs = metric(model=NET, softmax=False, channel_first=True, **GIVEN)
    finally:
        np.random.choice = choose
        np.random.set_state(state)
    ours = []
    for i, target in enumerate(TARGETS):
        own = drawn[i :: len(TARGETS)]  # run by run, example by example
        orders = (torch.zeros(1, 24).index_fill(1, torch.as_tensor(s), 1.0) for s in own)
        one = IMAGES[i : i + 1], MAPS[i : i + 1], target
        ready = prepare(NET, *one, measure="logit", reduce="sum")
        ours.append(float(correlations(ready, torch.tensor([[7]]), orders)))
    return ours, theirs


def _quantus(name: str, **options: object) -> list[float]:
    import quantus

    metric = getattr(quantus, name)(**{**QUIET, **options})
    return metric(model=None, s_batch=MASKS[:, None].numpy(), **GIVEN)


def top_k() -> tuple:
    return metrics.top_k_intersection(MAPS, MASKS, k=7), _quantus("TopKIntersection", k=7)


def rank() -> tuple:
    return metrics.relevance_rank(MAPS, MASKS), _quantus("RelevanceRankAccuracy")


def gini() -> tuple:
    return metrics.sparseness(MAPS), _quantus("Sparseness", abs=True)


def pointing() -> tuple:
    return metrics.pointing_game(MAPS, MASKS), np.asarray(_quantus("PointingGame"), dtype=float)


def energy() -> tuple:
    import quantus

    metric = quantus.RelevanceMassAccuracy(**QUIET)
    positive = {**GIVEN, "a_batch": MAPS.clamp(min=0).numpy()}
    theirs = metric(model=None, s_batch=MASKS[:, None].numpy(), **positive)
    return metrics.energy_inside(MAPS, MASKS), theirs


def segmentation() -> tuple:
    from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score

    theirs = []
    for m, mask in zip(MAPS[:, 0].numpy(), MASKS.numpy(), strict=True):
        scaled = ((m - m.min()) / (m.max() - m.min())).ravel()
        named, truth = scaled > scaled.mean(), mask.ravel()
        both = np.concatenate([~truth, truth]), np.concatenate([1 - scaled, scaled])
        theirs.append(
            [accuracy_score(truth, named), jaccard_score(truth, named, average="macro"),
             average_precision_score(*both)]
        )  # fmt: skip
    found = metrics.segmentation(MAPS, MASKS)
    return torch.stack([found.accuracies, found.ious, found.precision], 1), theirs


def otsu() -> tuple:
    import cv2

    ours, theirs = [], []
    for power in (1, 3, 6):
        whole = (255 * RNG.random((25, 34)) ** power).astype(np.uint8)
        whole[0, :2] = 0, 255
        theirs.append(cv2.threshold(whole, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1])
        map_ = torch.from_numpy(whole.astype(float))[None]
        ours.append(metrics.binary_map(map_, threshold="otsu")[0].double().numpy())
    return np.stack(ours), np.stack(theirs)


def rationales() -> tuple:
    from sklearn.metrics import auc, f1_score, precision_recall_curve

    theirs = []
    for s, m in zip(SCORES.numpy(), MARKED.numpy(), strict=True):
        chosen = np.zeros(len(s), dtype=bool)
        chosen[np.argsort(-s, kind="stable")[: m.sum()]] = True
        precision, recall, _ = precision_recall_curve(m, s)
        theirs.append([f1_score(m, chosen), auc(recall, precision)])
    measures = (metrics.rationale_f1, metrics.rationale_auprc)
    return torch.stack([measure(SCORES, MARKED) for measure in measures], 1), theirs


def spans() -> tuple:
    """ERASER's IOU F1 of a data set, in its own words: means first, F1 of them."""

    def runs(on: np.ndarray) -> list[set[int]]:
        ends = np.flatnonzero(np.diff(np.concatenate([[0], on.astype(int), [0]])))
        return [set(range(a, b)) for a, b in zip(ends[::2], ends[1::2], strict=True)]

    shares = []
    for s, m in zip(SCORES.numpy(), MARKED.numpy(), strict=True):
        chosen = np.zeros(len(s), dtype=bool)
        chosen[np.argsort(-s, kind="stable")[:9]] = True
        a, b = runs(chosen), runs(m)

        def met(one: set[int], others: list[set[int]]) -> bool:
            return max(len(one & o) / len(one | o) for o in others) >= 0.3

        shares.append([np.mean([met(x, b) for x in a]), np.mean([met(x, a) for x in b])])
    precision, recall = np.mean(shares, 0)
    ours = metrics.rationale_spans(SCORES, MARKED, fraction=0.3, min_iou=0.3).f1
    return [ours], [2 * precision * recall / (precision + recall)]


def imputation() -> tuple:
    gone = torch.from_numpy(RNG.random((3, 1, 6, 4)) < 0.5)
    fill = metrics.NoisyLinear(noise=0.0).prepare(IMAGES)
    theirs = [plain.linear_imputation(x[0], g[0]) for x, g in zip(IMAGES, gone, strict=True)]
    return fill(torch.arange(3), gone)[:, 0], torch.stack(theirs)


def blur() -> tuple:
    from scipy.ndimage import gaussian_filter

    image = RNG.normal(size=(1, 1, 20, 20))
    theirs = gaussian_filter(image[0, 0], 1.5, truncate=5 / 1.5, mode="mirror")
    ours = metrics.Blur(11, 1.5).baseline(torch.from_numpy(image))
    return ours[0, 0], theirs


COMPARISONS = [
    Comparison("perturbation_auc", "Chefer et al., CVPR 2021", PLAIN, perturbation_auc),
    Comparison("aopc", "Samek et al. 2017; VTranM, Eq. 21", PLAIN, aopc),
    Comparison("log_odds", "Shrikumar et al. 2017; VTranM, Eq. 22", PLAIN, log_odds),
    Comparison("abpc", "Schulz et al. 2020", PLAIN, abpc),
    Comparison("deletion", "Petsiuk et al. 2018 (RISE)", PLAIN, deletion),
    Comparison("insertion (fill zero)", "Petsiuk et al. 2018 (RISE)", PLAIN, insertion),
    Comparison("saco", "Wu et al., CVPR 2024, Algorithm 1", PLAIN, saco),
    Comparison("sensitivity_n (one n)", "Ancona et al., ICLR 2018",
               "Quantus, FaithfulnessCorrelation (float32)", sensitivity),
    Comparison("top_k_intersection", "Theiner et al., WACV 2022", "Quantus", top_k),
    Comparison("relevance_rank", "Arras et al. 2022", "Quantus", rank),
    Comparison("sparseness", "Chalasani et al., ICML 2020", "Quantus, which adds 1e-7", gini),
    Comparison("pointing_game (tolerance 0)", "Zhang et al. 2016", "Quantus", pointing),
    Comparison("energy_inside", "Wang et al. 2020", "Quantus, RelevanceMassAccuracy", energy),
    Comparison("segmentation", "Chefer et al., CVPR 2021", "scikit-learn", segmentation),
    Comparison("binary_map, Otsu", "Otsu 1979; GAE, Algorithm 1", "OpenCV, on 8-bit maps", otsu),
    Comparison("rationale_f1, rationale_auprc", "DeYoung et al. 2020 (ERASER)", "scikit-learn",
               rationales),
    Comparison("rationale_spans (IOU F1)", "DeYoung et al. 2020 (ERASER)", PLAIN, spans),
    Comparison("NoisyLinear", "Rong et al., ICML 2022 (ROAD)", "plain dense system", imputation),
    Comparison("Blur", "Petsiuk et al. 2018 (RISE)", "scipy, a Gaussian cut at 11 pixels", blur),
]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into tutorials/measures.md")
    options = parser.parse_args(arguments)
    rows = [
        [f"`{name}`", paper, against, f"{Comparison(name, paper, against, numbers).difference:.1e}"]
        for name, paper, against, numbers in COMPARISONS
    ]
    found = pages.table(["measure", "paper", "held against", "largest difference"], rows)
    print(found)
    if options.write:
        pages.write("held_against", f"\n{found}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
