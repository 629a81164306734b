"""What relevance propagation costs: `python -m tests.benchmarks.relevance vit gpt2`.

In turns in one process and on one thread, as multiples of F, one forward and backward pass of the
model with frozen weights down to its inputs; the process's own time is counted, so that the figures
bear a machine that others use. Then the memory beyond the model, each call in a process of its own.

    vit           ViT-B/16 224 of timm, an image
    gpt2          GPT-2 of transformers, 512 tokens
    torchvision   ViT-B/16 224 of torchvision, which LXT patches

The package `lxt`, where it is installed (LXT 2.1 needs transformers 4.52), explains `gpt2` and
`torchvision` beside ours; that both give the same numbers is checked first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_attn import CPLRP, AttnLRP, TransformerAttribution, TransformerLRP
from captum_attn.observe.capture.restore import left_as_found
from tests.benchmarks import measure
from tests.benchmarks.peers import patched

ROOT = Path(__file__).parents[2]
TOKENS = 512
Target = int | tuple[int, int]
Calls = dict[str, Callable[[], Tensor]]


def vit() -> tuple[nn.Module, Tensor, Target]:
    import timm

    return timm.create_model("vit_base_patch16_224").eval(), torch.randn(1, 3, 224, 224), 3


def torchvision() -> tuple[nn.Module, Tensor, Target]:
    from torchvision.models import vit_b_16

    model = vit_b_16()
    nn.init.normal_(model.heads.head.weight)  # torchvision's own are 0
    return model.eval(), torch.randn(1, 3, 224, 224), 3


def gpt2() -> tuple[nn.Module, Tensor, Target]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config()
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config).eval(), torch.randint(50_000, (1, TOKENS)), (TOKENS - 1, 77)


MODELS = {"vit": vit, "gpt2": gpt2, "torchvision": torchvision}
METHODS = {
    "vit": (AttnLRP, CPLRP, TransformerLRP, TransformerAttribution),
    "gpt2": (AttnLRP, CPLRP, TransformerLRP),
    "torchvision": (CPLRP,),
}
BARS = {
    ("vit", "AttnLRP"): 1.25, ("vit", "TransformerAttribution"): 3.0, ("gpt2", "AttnLRP"): 1.35,
    **{(name, "CPLRP"): 1.15 for name in MODELS},
}  # fmt: skip
MEMORY_BARS = {
    "AttnLRP": 1.6, "CPLRP": 1.6, "TransformerLRP": 2.2, "TransformerAttribution": 2.2,
}  # fmt: skip


def gradient_x_input(model: nn.Module, x: Tensor, target: Target) -> Tensor:
    """One forward and one backward pass: F, or LXT's relevance where it has patched the model."""
    with left_as_found([model]):
        if isinstance(target, int):
            leaf = x.clone().requires_grad_()
            value = model(leaf)[:, target].sum()
            return leaf.detach() * torch.autograd.grad(value, leaf)[0]
        leaf = model.get_input_embeddings()(x).detach().requires_grad_()  # type: ignore
        value = model(inputs_embeds=leaf).logits[:, target[0], target[1]].sum()
        return (leaf.detach() * torch.autograd.grad(value, leaf)[0]).sum(-1)


def calls(name: str) -> Calls:
    torch.manual_seed(0)
    model, x, target = MODELS[name]()
    made: Calls = {"F": lambda: gradient_x_input(model, x, target)}
    for method in METHODS[name]:
        explainer = method(model)
        made[method.__name__] = lambda explainer=explainer: explainer.attribute(x, target)  # type: ignore[misc]
    return made | _lxt(name, model, x, target)


def _lxt(name: str, model: nn.Module, x: Tensor, target: Target) -> Calls:
    """LXT's own: it patches classes and modules, which are put back behind every call."""
    try:
        if name == "gpt2":
            from lxt.efficient.models.gpt2 import attnLRP as patches
        elif name == "torchvision":
            from lxt.efficient.models.vit_torch import cp_LRP as patches
        else:
            return {}
    except ImportError:
        return {}

    def explain() -> Tensor:
        with patched(patches):
            return gradient_x_input(model, x, target)

    return {"LXT": explain}


def check_alike(name: str, made: Calls) -> None:
    """LXT's relevance is ours, so that the two are timed at the same work."""
    if "LXT" in made:
        own, theirs = made[METHODS[name][0].__name__](), made["LXT"]()
        error = float((own - theirs).abs().max() / theirs.abs().max())
        print(f"{name}: largest difference between LXT's and ours {error:.0e}", flush=True)
        assert error < 1e-3


def peak(name: str, call: str) -> float:
    """MiB beyond the model, of a process that makes one call twice."""
    command = [sys.executable, "-m", "tests.benchmarks.relevance", name, "--peak-of", call]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def print_peak(name: str, call: str) -> None:
    made = calls(name)[call]
    before = measure.peak_mib()
    made()
    made()
    print(measure.peak_mib() - before)


def table(name: str, rounds: int) -> None:
    made = calls(name)
    check_alike(name, made)
    for call in made.values():
        call()
    times = measure.interleave(made, rounds, time.process_time)
    base = peak(name, "F")
    for key, values in times.items():
        ratio = measure.ratio_of_medians(values, times["F"])
        mib = base if key == "F" else peak(name, key)
        bar, most = BARS.get((name, key)), MEMORY_BARS.get(key)
        print(
            f"| {name} | {key} | {sorted(values)[len(values) // 2]:.2f} | {ratio} | {bar or '–'} "
            f"| {mib:.0f} | {mib / base:.2f} | {most or '–'} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peak-of", help="one call's memory alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print_peak(options.models[0], options.peak_of)
        return
    print("| model | call | seconds | over F [95 %] | bar | MiB beyond the model | over F | bar |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models:
        table(name, options.rounds)


if __name__ == "__main__":
    main()
