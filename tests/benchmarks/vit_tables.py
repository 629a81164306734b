"""Tables 2 and 4 of the VTranM paper in small: where the relevance lies, and what depends on it.

    python -m tests.benchmarks.vit_tables                     # all models, 500 images each
    python -m tests.benchmarks.vit_tables --models textures --images 40
    python -m tests.benchmarks.vit_tables --models textures --picture tutorials/textures.png

Small ViTs on held-out images whose masks are known: one object with a texture over noise (one
class per image), a scene of two digits, asked about both, the mask being that of the asked one, and
a photograph of a piece of clothing on a black ground, the mask being what is not black.

Segmentation is that of ImageNet-Segmentation: the map, scaled to [0, 1], with its mean as the
threshold; mAP is of object and background together; mIoU is taken over the whole data set. The
perturbation tests take 10, 20, ..., 90 % of the pixels away (black), the most (positive) or the
least (negative) relevant first; the area is that under the share of questions whose target is still
the model's answer: the highest logit, or a probability over one half where several classes are
shown. Every question counts, also those that the model answers wrongly.

All numbers in per cent; standard errors are over images (jackknife), because the two questions
about one scene are not independent. All methods see the same images, so a difference of two methods
is known better than either: a second table gives VTranM's advantage over every row.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from tqdm import tqdm

from captum_attn import (
    AttCAT,
    AttentionGradCam,
    AttentionRollout,
    BeyondIntuition,
    GenericAttention,
    HeterogenousAttention,
    PartialLRP,
    RawAttention,
    TransformerAttribution,
    TransformerLRP,
    TransitionAttention,
    VTranM,
)
from captum_attn.metrics import RandomAttribution, perturbation_auc, segmentation
from captum_attn.metrics.localization import Segmentation, binary_map
from captum_attn.toy.clothing import packaged_clothing
from captum_attn.toy.clothing_vit import load_clothing_vit
from captum_attn.toy.digit_vit import load_digit_vit
from captum_attn.toy.scenes import scenes
from captum_attn.toy.texture_vit import load_texture_vit
from captum_attn.toy.textures import textured_objects

BATCH = 50
CLOTH = 0.05  # brightness of a photograph's pixel that is no black ground


class Row(NamedTuple):
    """A method and the options of its `attribute`."""

    method: type
    options: Mapping[str, Any] = {}

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return self.method.__name__ + (f", {given}" if given else "")


ROWS = (
    Row(RawAttention),
    Row(AttentionRollout),
    Row(GenericAttention),
    Row(VTranM),
    Row(VTranM, {"length": False}),
    Row(VTranM, {"direction": False}),
    Row(VTranM, {"length": False, "direction": False}),
    Row(VTranM, {"aggregate": False}),
    Row(HeterogenousAttention, {"correction": "positive"}),
    Row(HeterogenousAttention, {"correction": "absolute"}),
    Row(IntegratedGradients, {"n_steps": 20}),
    Row(RandomAttribution),
)
# The others that the papers compare with, between ours and the yardsticks.
ALL_ROWS = (
    *ROWS[:-2],
    Row(AttentionGradCam),
    Row(TransformerLRP),
    Row(PartialLRP),
    Row(TransformerAttribution),
    Row(AttCAT),
    Row(TransitionAttention, {"n_steps": 5}),
    Row(BeyondIntuition, {"n_steps": 5}),
    *ROWS[-2:],
)
REFERENCE = ROWS[3]
PICTURED = (0, 1, 2, 3, 6, 9)


class Questions(NamedTuple):
    """Questions about images, Q per image.

    Attributes:
        images (Tensor): (N, C, H, W).
        targets (Tensor): (N, Q), the classes asked about.
        masks (Tensor): (N, Q, H, W), bool, where each is.
    """

    images: Tensor
    targets: Tensor
    masks: Tensor


def over_one_half(output: Tensor, target: Tensor) -> Tensor:
    """Whether an independent class (a sigmoid) is the model's answer, (B,)."""
    return (output.gather(1, target[:, None])[:, 0] > 0).double()


class Case(NamedTuple):
    """A model, what it is asked, and when it still gives the answer."""

    title: str
    load: Callable[[], nn.Module]
    draw: Callable[[int, int], Questions]  # (n, seed)
    measure: str | Callable[[Tensor, Tensor], Tensor]
    rows: tuple[Row, ...] = ROWS


def ask_textures(n: int, seed: int) -> Questions:
    batch = textured_objects(n, "test", seed)
    return Questions(batch.images, batch.labels[:, None], batch.masks[:, None])


def ask_digits(n: int, seed: int) -> Questions:
    batch = scenes(n, "test", seed)
    return Questions(batch.images, batch.labels, batch.masks)


def ask_clothing(n: int, seed: int) -> Questions:
    """Test pictures that the package carries, drawn by the seed where not all are asked for."""
    images, labels = packaged_clothing()
    some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:n]
    return Questions(images[some], labels[some, None], images[some] > CLOTH)


CASES = {
    "textures": Case("Textured objects over noise", load_texture_vit, ask_textures, "accuracy"),
    "digits": Case(
        "Scenes of two digits, asked about both", load_digit_vit, ask_digits, over_one_half
    ),
    "clothing": Case(
        "Photographs of clothing", load_clothing_vit, ask_clothing, "accuracy", ALL_ROWS
    ),
}


class Found(NamedTuple):
    """What was measured of one method, image by image.

    Attributes:
        segmentation (Segmentation): of all questions, those about one image side by side.
        positive, negative (Tensor): (N, Q), areas under the perturbation curves.
    """

    segmentation: Segmentation
    positive: Tensor
    negative: Tensor


def maps_of(row: Row, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """The map of every image, summed over the channels: (B, H, W)."""
    attributions = row.method(model).attribute(images, target=target, **row.options)
    return attributions.detach().sum(1)


def batches(asked: Questions) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (B, C, H, W), targets (B,) and masks (B, H, W); the questions about one image are
    neighbours."""
    each = asked.targets.shape[1]
    for images, targets, masks in zip(
        *(part.split(max(BATCH // each, 1)) for part in asked), strict=True
    ):
        yield images.repeat_interleave(each, 0), targets.flatten(), masks.flatten(0, 1)


def evaluate(row: Row, case: Case, model: nn.Module, asked: Questions, bar: tqdm) -> Found:
    counted, areas = [], []
    for images, target, masks in batches(asked):
        maps = maps_of(row, model, images, target)
        counted.append(segmentation(maps, masks))
        areas.append(
            [
                perturbation_auc(
                    model, images, maps, target,
                    order=order, measure=case.measure, perturbations_per_eval=5,
                )
                for order in ("most", "least")
            ]
        )  # fmt: skip
        bar.update(len(images))
    positive, negative = (torch.cat(part) for part in zip(*areas, strict=True))
    total = counted[0]
    for part in counted[1:]:
        total = total + part
    return Found(total, positive.view(asked.targets.shape), negative.view(asked.targets.shape))


def jackknife(value: Callable[[Tensor], Tensor], n: int) -> tuple[Tensor, Tensor]:
    """A statistic of `n` images, and its standard error by leaving out one image at a time.

    Args:
        value (callable): from the positions of some images (m,) to the statistics (S,).
        n (int): how many images there are.

    Returns:
        tuple of Tensor: (S,) each. Of a mean, the error is the usual one.
    """
    everyone = torch.arange(n)
    without = torch.stack([value(everyone[everyone != i]) for i in range(n)])
    spread = (without - without.mean(0)).square().sum(0)
    return value(everyone), (spread * (n - 1) / n).sqrt()


NAMES = (
    "pixel accuracy",
    "mAP",
    "mIoU",
    "positive AUC (lower is better)",
    "negative AUC (higher is better)",
)


def numbers(found: Found, images: Tensor) -> Tensor:
    """Those called `NAMES` of some images (m,): (5,)."""
    each = found.positive.shape[1]
    chosen = found.segmentation[(images[:, None] * each + torch.arange(each)).flatten()]
    areas = found.positive[images].mean(), found.negative[images].mean()
    return torch.tensor(
        [chosen.pixel_accuracy, chosen.mean_average_precision, chosen.mean_iou, *areas],
        dtype=torch.float64,
    )


def summary(found: Found, other: Found | None = None) -> tuple[Tensor, Tensor]:
    """The numbers, or how far they lie above those of another method, and their standard errors;
    (5,) each."""

    def value(images: Tensor) -> Tensor:
        own = numbers(found, images)
        return own if other is None else own - numbers(other, images)

    return jackknife(value, len(found.positive))


def answered(case: Case, model: nn.Module, asked: Questions) -> float:
    """Share of the questions whose target is the intact model's answer."""
    right = []
    with torch.no_grad():
        for images, target, _masks in batches(asked):
            output = model(images)
            if callable(case.measure):
                right.append(case.measure(output, target))
            else:
                right.append((output.argmax(1) == target).double())
    return float(torch.cat(right).mean())


def markdown(lines: Mapping[str, tuple[Tensor, Tensor]], form: str) -> str:
    """A table of numbers and their standard errors, a line per method."""
    rows = [f"| {' | '.join(('method', *NAMES))} |", "|---" * (1 + len(NAMES)) + "|"]
    for name, (values, errors) in lines.items():
        cells = [f"{100 * v:{form}} ± {100 * e:.1f}" for v, e in zip(values, errors, strict=True)]
        rows.append(f"| {' | '.join((name, *cells))} |")
    return "\n".join(rows)


def report(case: Case, asked: Questions) -> str:
    """Both tables of one model, as Markdown."""
    model, found, results = case.load(), {}, {}
    heading = (
        f"{len(asked.images)} held-out images, {asked.targets.numel()} questions; the model "
        f"answers {answered(case, model, asked):.1%} of them. Objects cover "
        f"{asked.masks.double().mean():.1%} of the image."
    )
    with tqdm(total=len(case.rows) * asked.targets.numel(), unit="question") as bar:
        for row in case.rows:
            bar.set_description(str(row))
            found[str(row)] = evaluate(row, case, model, asked, bar)
            results[str(row)] = summary(found[str(row)])
            line = markdown({str(row): results[str(row)]}, ".1f").splitlines()[-1]
            bar.write(line, file=sys.stderr)  # so that nothing of a stopped run is lost
    own = found[str(REFERENCE)]
    ahead = {name: summary(own, of_row) for name, of_row in found.items() if of_row is not own}
    parts = [
        f"### {case.title}", heading, markdown(results, ".1f"),
        f"{REFERENCE} minus the method, image by image:", markdown(ahead, "+.1f"),
    ]  # fmt: skip
    return "\n\n".join(parts)


def save_picture(path: Path, asked: Questions, model: nn.Module) -> None:
    """One line per image: the image with its mask, then every map; its mean is drawn in white."""
    from matplotlib.figure import Figure
    from PIL import Image

    rows = [ROWS[i] for i in PICTURED]
    n = len(asked.images)
    figure = Figure(figsize=(1.55 * (1 + len(rows)), 1.62 * n + 0.45), layout="constrained")
    axes = figure.subplots(n, 1 + len(rows), squeeze=False)
    maps = [maps_of(row, model, asked.images, asked.targets[:, 0]) for row in rows]
    for i, line in enumerate(axes):
        line[0].imshow(asked.images[i].permute(1, 2, 0))
        for ax, of_method in zip(line[1:], maps, strict=True):
            ax.imshow(of_method[i], cmap="cividis")
            ax.contour(binary_map(of_method[i : i + 1])[0], [0.5], colors="white", linewidths=0.8)
        for ax in line:
            ax.contour(asked.masks[i, 0], [0.5], colors="#e66101", linewidths=1.2, linestyles="--")
            ax.set(xticks=[], yticks=[])
    for ax, title in zip(axes[0], ["image", *map(str, rows)], strict=True):
        ax.set_title(title.replace(", ", ",\n"), fontsize=8)
    figure.supxlabel(
        "dashed: the object's mask; white: where the map is above its mean", fontsize=8
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(256).save(path, "PNG", optimize=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--picture", type=Path, help="only write this picture of the textures' maps"
    )
    options = parser.parse_args(arguments)
    if options.picture is not None:
        save_picture(options.picture, ask_textures(4, options.seed), load_texture_vit())
        return 0
    for name in options.models:
        case = CASES[name]
        print(report(case, case.draw(options.images, options.seed)), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
