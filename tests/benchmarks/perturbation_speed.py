"""The perturbation test in batches over steps and examples, against one image and step at a time.

    python -m tests.benchmarks.perturbation_speed            # 64 scenes
    python -m tests.benchmarks.perturbation_speed --scenes 8 --rounds 2

Both compute the positive perturbation test on the digit ViT, patch by patch: the probability of a
digit with 0, 5, ..., 100 % of the patches removed. The loop is what one writes by hand; the two
have to agree before they are timed. The forwards alone, on as many images in batches of the same
size, are the floor: nothing that runs the model on every copy can be faster than they are.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from captum_attn import GenericAttention
from captum_attn.demo.digit_vit import load_digit_vit
from captum_attn.demo.scenes import scenes
from captum_attn.metrics import perturbation_curve
from tests.benchmarks.measure import interleave, ratio_of_medians

STEPS, PATCH = 20, 8


def one_by_one(model: nn.Module, images: Tensor, maps: Tensor, target: Tensor) -> Tensor:
    """The curves (B, STEPS + 1): a forward per image and step."""
    curves = torch.zeros(len(images), STEPS + 1, dtype=torch.float64)
    with torch.no_grad():
        for i in range(len(images)):
            side = images.shape[-1] // PATCH
            relevance = torch.zeros(side * side, dtype=torch.float64)
            for p in range(side * side):
                top, left = p // side * PATCH, p % side * PATCH
                patch = maps[i, :, top : top + PATCH, left : left + PATCH]
                relevance[p] = patch.double().sum()
            order = relevance.argsort(descending=True, stable=True)
            for step in range(STEPS + 1):
                image = images[i].clone()
                for p in order[: round(step / STEPS * len(order))].tolist():
                    top, left = p // side * PATCH, p % side * PATCH
                    image[:, top : top + PATCH, left : left + PATCH] = 0.0
                curves[i, step] = model(image[None])[0].double().sigmoid()[target[i]]
    return curves


def batched(
    model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, per_eval: int
) -> Tensor:
    """The same curves by the engine."""
    return perturbation_curve(
        model, images, maps, target, steps=STEPS, patch_size=PATCH, measure="sigmoid",
        perturbations_per_eval=per_eval,
    ).values  # fmt: skip


def forwards(model: nn.Module, images: Tensor, per_eval: int) -> None:
    """As many images through the model as the engine has copies, in batches of the same size."""
    with torch.no_grad():
        for copies in images.repeat(STEPS + 1, 1, 1, 1).split(len(images) * per_eval):
            model(copies)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-eval", type=int, default=1, help="copies of every image at once")
    options = parser.parse_args(arguments)

    model, batch = load_digit_vit(), scenes(options.scenes, split="test", seed=0)
    target = batch.labels[:, 0]
    maps = GenericAttention(model).attribute(batch.images, target=target).detach()
    given = model, batch.images, maps, target
    slow, fast = one_by_one(*given), batched(*given, options.per_eval)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)

    calls = {
        "one by one": lambda: one_by_one(*given),
        "batched": lambda: batched(*given, options.per_eval),
        "forwards alone": lambda: forwards(model, batch.images, options.per_eval),
    }
    times = interleave(calls, options.rounds)
    ratio = ratio_of_medians(times["one by one"], times["batched"])
    floor = ratio_of_medians(times["batched"], times["forwards alone"])
    print(f"{options.scenes} scenes, {STEPS + 1} steps, {torch.get_num_threads()} thread(s)")
    for name, seconds in times.items():
        print(f"  {name:<15}{sorted(seconds)[len(seconds) // 2]:8.2f} s")
    print(f"  largest difference {float((fast - slow).abs().max()):.1e}")
    print(f"  batched is {ratio} times faster than one by one (ratio of medians, 95 % interval)")
    print(f"  and takes {floor} of the time of the forwards alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
