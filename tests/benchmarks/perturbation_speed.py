"""The perturbation test in batches over steps and examples, against one image and step at a time.

    python -m tests.benchmarks.perturbation_speed            # 64 scenes
    python -m tests.benchmarks.perturbation_speed --scenes 8 --rounds 2
    python -m tests.benchmarks.perturbation_speed --device cuda --rounds 3

Both compute the positive perturbation test on the digit ViT, patch by patch: the probability of a
digit with 0, 5, ..., 100 % of the patches removed. The loop is what one writes by hand; the two
have to agree before they are timed. The forwards alone, on as many images in batches of the same
size, are the floor: nothing that runs the model on every copy can be faster than they are. How much
faster than one by one they are is a matter of the machine: one core has as much to calculate for an
image whether it comes alone or not, and only spares what a call costs; a GPU is idle for one image.
The forwards one by one say how much of the loop is the model, and how much the masking.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from captum_attn import GenericAttention
from captum_attn.metrics import perturbation_curve
from captum_attn.toy.digit_vit import load_digit_vit
from captum_attn.toy.scenes import scenes
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


def forwards(model: nn.Module, images: Tensor, size: int) -> None:
    """As many images through the model as the engine has copies, in batches of a size."""
    with torch.no_grad():
        for copies in images.repeat(STEPS + 1, 1, 1, 1).split(size):
            output = model(copies)
    float(output[0, 0])  # so that a GPU has done it


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-eval", type=int, default=1, help="copies of every image at once")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    model, batch = load_digit_vit(), scenes(options.scenes, split="test", seed=0)
    model, images = model.to(options.device), batch.images.to(options.device)
    target = batch.labels[:, 0].to(options.device)
    maps = GenericAttention(model).attribute(images, target=target).detach()
    given = model, images, maps, target
    slow, fast = one_by_one(*given), batched(*given, options.per_eval)
    fast = fast.cpu()
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)

    calls = {
        "one by one": lambda: one_by_one(*given),
        "batched": lambda: batched(*given, options.per_eval),
        "its forwards": lambda: forwards(model, images, len(images) * options.per_eval),
        "one by one, its forwards": lambda: forwards(model, images, 1),
    }
    times = interleave(calls, options.rounds)
    ratio = ratio_of_medians(times["one by one"], times["batched"])
    floor = ratio_of_medians(times["batched"], times["its forwards"])
    most = ratio_of_medians(times["one by one"], times["its forwards"])
    where = options.device
    where += f", {torch.get_num_threads()} thread(s)" if where == "cpu" else ""
    print(f"{options.scenes} scenes, {STEPS + 1} steps, {where}")
    for name, seconds in times.items():
        print(f"  {name:<25}{sorted(seconds)[len(seconds) // 2]:8.2f} s")
    print(f"  largest difference {float((fast - slow).abs().max()):.1e}")
    print(f"  batched is {ratio} times faster than one by one (ratio of medians, 95 % interval)")
    print(f"  it takes {floor} of the time of its forwards, which are {most} times faster")
    return 0


if __name__ == "__main__":
    sys.exit(main())
