"""What does an explanation cost? Time and peak memory of every method on a ViT-B/16.

    python -m tests.benchmarks.benchmark              # ViT-B/16 224, batch 1 and 8
    python -m tests.benchmarks.benchmark --peers      # Captum's, grad-cam's and LXT's, too
    python -m tests.benchmarks.benchmark --related    # the methods that the papers compare with
    python -m tests.benchmarks.benchmark --tiny       # seconds, to see that it runs

Every method is timed in turns with the least that it could cost, and with its plain matrix form
(`matrix_form.py`): for a gradient method the floor is F, a fused forward and backward with frozen
parameters, which is what Captum's Saliency costs; for the others f, a forward without gradients.
Of a method that takes K runs the floor is K F ("20F"), or K f for forwards alone.
VTranM is timed against GAE, `GenericAttention` on the same inputs, as well.
A bar holds if the lower end of the ratio's interval is within it. The first call, in which the
model is observed, is reported separately. Peak memory is that of a fresh process per case, its
first call included.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

import captum_attn
from tests.benchmarks import matrix_form, measure, peers

TARGET = 3


class Case(NamedTuple):
    """A method, its floors with the ratios that it must keep, and its plain matrix form.

    Args:
        method (str): its name.
        floors (dict): floor -> the bar, None for a ratio that is only reported.
        matrix (callable, optional): the matrix form.
        make (callable, optional): (model, target) -> the call, for a method of another package.
        model (str): whose ViT it is measured on.
        options (dict): of `attribute`.
    """

    method: str
    floors: dict[str, float | None]
    matrix: Callable[[nn.Module, Tensor, int], Tensor] | None = None
    make: Callable[[nn.Module, int], Callable[[Tensor], object]] | None = None
    model: str = "timm"
    options: Mapping[str, Any] = {}


CASES = (
    Case("RawAttention", {"f": None}, matrix_form.raw_attention),
    Case("AttentionRollout", {"f": 1.10}, matrix_form.rollout),
    Case("GenericAttention", {"F": 1.10}, matrix_form.generic_attention),
    Case("HeterogenousAttention", {"F": 1.10}, matrix_form.generic_attention),
    Case("VTranM", {"F": 1.25, "GAE": 1.25}, matrix_form.vtranm),
)
# One forward and backward pass; K of them; forwards alone. ViT-CX makes as many masks as it finds.
RELATED = (
    Case("AttentionGradCam", {"F": 1.10}),
    Case("GradSam", {"F": 1.25}),
    Case("AttCAT", {"F": None}),
    Case("GradEclip", {"F": 1.10}),
    Case("TransitionAttention", {"20F": 1.10}),
    Case("BeyondIntuition", {"20F": 1.10}),
    Case("DeepIntegratedExplanations", {"21F": None}),
    Case("TransformerInputSampling", {"33f": None},
         options={"n_masks": 32, "perturbations_per_eval": 8}),
    Case("VitCX", {"f": None}, options={"threshold": 0.9, "perturbations_per_eval": 8}),
    Case("AttentionFlow", {"f": None}),
)  # fmt: skip
PEERS = (
    Case("captum Saliency", {"F": None}, make=peers.saliency),
    Case("captum IntegratedGradients, 50 steps", {"F": None}, make=peers.integrated_gradients),
    Case("grad-cam", {"F": None}, make=peers.grad_cam),
    Case("GenericAttention (torchvision)", {"F": None}, make=peers.generic, model="torchvision"),
    Case("LXT (torchvision)", {"F": None}, make=peers.lxt, model="torchvision"),
)


def build(tiny: bool, fused: bool, model: str = "timm") -> nn.Module:
    torch.manual_seed(0)
    if model == "torchvision":
        from torchvision.models import VisionTransformer, vit_b_16

        small = partial(VisionTransformer, 32, 8, num_layers=2, num_heads=2, num_classes=10)
        made = small(hidden_dim=32, mlp_dim=64) if tiny else vit_b_16(weights=None)
        nn.init.normal_(made.heads.head.weight, std=0.02)  # zero as it is made: no gradient
        return made.eval().requires_grad_(False)
    if tiny:
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        made = timm.models.vision_transformer.VisionTransformer(num_classes=10, **options)
    else:
        made = timm.create_model("vit_base_patch16_224", pretrained=False)
    matrix_form.set_fused(made, fused)
    return made.eval().requires_grad_(False)


def images(batch: int, tiny: bool) -> Tensor:
    side = 32 if tiny else 224
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def forward_backward(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(model(x)[:, TARGET].sum(), x)[0]


def calls_of(case: Case, batch: int, tiny: bool, only: str | None = None) -> dict[str, Callable]:
    """The calls to compare: "method", "matrix" or a floor -> a call without arguments."""
    x = images(batch, tiny)
    kinds = ["method", *case.floors] + ["matrix"] * (case.matrix is not None)
    calls: dict[str, Callable[[], object]] = {}
    for kind in kinds if only is None else [only]:
        model = build(tiny, fused=kind != "matrix", model=case.model)
        if kind == "method" and case.make is not None:
            calls[kind] = partial(case.make(model, TARGET), x)
        elif kind in ("method", "GAE"):
            name = case.method if kind == "method" else "GenericAttention"
            attribution = getattr(captum_attn, name)(model)
            options = case.options if kind == "method" else {}
            calls[kind] = partial(attribution.attribute, x, target=TARGET, **options)
        elif kind == "matrix" and case.matrix is not None:
            calls[kind] = partial(case.matrix, model, x, TARGET)
        else:
            run = partial(forward if kind[-1] == "f" else forward_backward, model, x)
            calls[kind] = partial(times, int(kind[:-1] or 1), run)
    return calls


def times(count: int, run: Callable[[], object]) -> None:
    for _ in range(count):
        run()


def time_case(case: Case, batch: int, options: argparse.Namespace) -> dict:
    calls = calls_of(case, batch, options.tiny)
    first = {kind: measure.seconds(call) for kind, call in calls.items()}
    # The second call decides: the first one also probes.
    pair = measure.seconds(calls["method"]) + measure.seconds(calls[next(iter(case.floors))])
    few = pair >= measure.PAIR_SECONDS
    rounds = options.pairs or (measure.FEW_PAIRS if few else measure.PAIRS)
    times = measure.interleave(calls, rounds)
    ratios = {
        kind: measure.ratio_of_medians(times["method"], times[kind])
        for kind in times
        if kind != "method"
    }
    return {
        "method": case.method,
        "batch": batch,
        "pairs": rounds,
        "median_s": {kind: float(np.median(values)) for kind, values in times.items()},
        "ratios": {kind: ratio._asdict() for kind, ratio in ratios.items()},
        "bars": case.floors,
        "holds": {
            kind: None if bar is None else ratios[kind].low <= bar
            for kind, bar in case.floors.items()
        },
        "first_call_s": first["method"],
        "times_s": {kind: values.tolist() for kind, values in times.items()},
    }


def peaks_of(case: Case, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory in MiB per kind of call, each in a process of its own."""
    peaks = {}
    for kind in ["method", *case.floors] + ["matrix"] * (case.matrix is not None):
        command = [sys.executable, "-m", "tests.benchmarks.benchmark", "--peak-of", kind]
        command += ["--methods", case.method, "--batches", str(batch), "--peers", "--related"]
        command += ["--threads", str(torch.get_num_threads())] + ["--tiny"] * options.tiny
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        peaks[kind] = float(done.stdout.split()[-1])
    return peaks


def print_peak(case: Case, kind: str, batch: int, tiny: bool) -> None:
    call = calls_of(case, batch, tiny, only=kind)[kind]
    call()
    call()
    print(measure.peak_mib())


def markdown(results: list[dict]) -> str:
    lines = [
        "| batch | method | seconds | floor | ratio to the floor [95 %] | bar | "
        "ratio to the matrix form [95 %] | first call, s | "
        "peak MiB: method / floor / matrix form |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        for floor, bar in r["bars"].items():
            held = "–" if bar is None else f"{bar:.2f} {'holds' if r['holds'][floor] else 'MISSED'}"
            kinds = ["method", floor, "matrix"]
            peaks = " / ".join(f"{r['peak_mib'][k]:.0f}" for k in kinds if k in r["peak_mib"])
            matrix = r["ratios"].get("matrix")
            lines.append(
                f"| {r['batch']} | {r['method']} | {r['median_s']['method']:.3f} "
                f"| {floor} {r['median_s'][floor]:.3f} s "
                f"| {measure.Ratio(**r['ratios'][floor])} ({r['pairs']} pairs) | {held} "
                f"| {measure.Ratio(**matrix) if matrix else '–'} | {r['first_call_s']:.2f} "
                f"| {peaks or '–'} |"
            )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = names_of(CASES + RELATED + PEERS)
    parser.add_argument("--methods", nargs="+", choices=names, help="default: all of ours")
    parser.add_argument("--peers", action="store_true", help="methods of other packages, too")
    parser.add_argument("--related", action="store_true", help="the papers' other methods, too")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--pairs", type=int, help="rounds (default: 30, or 5 where a pair is slow)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="raw results")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def names_of(cases: tuple[Case, ...]) -> list[str]:
    return [case.method for case in cases]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = CASES + RELATED * options.related + PEERS * options.peers
    chosen = [case for case in cases if case.method in (options.methods or names_of(cases))]
    if options.peak_of:
        print_peak(chosen[0], options.peak_of, options.batches[0], options.tiny)
        return 0
    results = []
    for batch in options.batches:
        for case in chosen:
            print(f"{case.method}, batch {batch} ...", file=sys.stderr)
            try:
                timed = time_case(case, batch, options)
            except ImportError as error:  # a peer that is not installed, or not for this torch
                print(f"{case.method} is left out: {error}", file=sys.stderr)
                continue
            peaks = {} if options.no_memory else peaks_of(case, batch, options)
            results.append(timed | {"peak_mib": peaks})
    model = "a tiny ViT" if options.tiny else "ViT-B/16 224 (random weights)"
    about = f"{model}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
    about += platform.machine()
    options.json.write_text(json.dumps({"about": about, "results": results}, indent=1))
    print(f"{about}\n\n{markdown(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
