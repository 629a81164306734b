"""What does an explanation cost? Time and peak memory of every method on a timm ViT.

    python -m tests.benchmarks.benchmark              # ViT-B/16 224, batch 1 and 8
    python -m tests.benchmarks.benchmark --tiny       # seconds, to see that it runs

Every method is timed in turns with the least that it could cost, and with its plain matrix form
(`matrix_form.py`): for a gradient method the floor is F, a fused forward and backward with frozen
parameters, which is what Captum's Saliency costs; for the others f, a forward without gradients;
for VTranM it is GAE, `GenericAttention` on the same inputs.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

import captum_attn
from tests.benchmarks import matrix_form, measure

TARGET = 3


class Case(NamedTuple):
    """A method, its floor, its plain matrix form, and the ratio to the floor that it must keep."""

    method: str
    floor: str
    matrix: Callable[[nn.Module, Tensor, int], Tensor]
    bar: float | None


CASES = (
    Case("RawAttention", "f", matrix_form.raw_attention, None),
    Case("AttentionRollout", "f", matrix_form.rollout, 1.15),
    Case("GenericAttention", "F", matrix_form.generic_attention, 1.15),
    Case("VTranM", "GAE", matrix_form.vtranm, 1.25),
)


def build(tiny: bool, fused: bool) -> nn.Module:
    torch.manual_seed(0)
    if tiny:
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        model = timm.models.vision_transformer.VisionTransformer(num_classes=10, **options)
    else:
        model = timm.create_model("vit_base_patch16_224", pretrained=False)
    matrix_form.set_fused(model, fused)
    return model.eval().requires_grad_(False)


def images(batch: int, tiny: bool) -> Tensor:
    side = 32 if tiny else 224
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def forward_backward(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(model(x)[:, TARGET].sum(), x)[0]


def calls_of(case: Case, kinds: tuple[str, ...], batch: int, tiny: bool) -> dict[str, Callable]:
    """The calls to compare: kind ("method", "floor", "matrix") -> a call without arguments."""
    x = images(batch, tiny)
    calls: dict[str, Callable[[], object]] = {}
    for kind in kinds:
        model = build(tiny, fused=kind != "matrix")
        if kind == "method":
            attribution = getattr(captum_attn, case.method)(model)
            calls[kind] = partial(attribution.attribute, x, target=TARGET)
        elif kind == "floor":
            floors = {
                "f": partial(forward, model, x),
                "F": partial(forward_backward, model, x),
                "GAE": partial(captum_attn.GenericAttention(model).attribute, x, target=TARGET),
            }
            calls[kind] = floors[case.floor]
        else:
            calls[kind] = partial(case.matrix, model, x, TARGET)
    return calls


def time_case(case: Case, batch: int, options: argparse.Namespace) -> dict:
    calls = calls_of(case, ("method", "floor", "matrix"), batch, options.tiny)
    first = {kind: measure.seconds(call) for kind, call in calls.items()}
    # The second call decides: the first one also probes.
    pair = measure.seconds(calls["method"]) + measure.seconds(calls["floor"])
    few = pair >= measure.PAIR_SECONDS
    rounds = options.pairs or (measure.FEW_PAIRS if few else measure.PAIRS)
    times = measure.interleave(calls, rounds)
    ratio = measure.ratio_of_medians(times["method"], times["floor"])
    return {
        "method": case.method,
        "batch": batch,
        "floor": case.floor,
        "pairs": rounds,
        "median_s": {kind: float(np.median(values)) for kind, values in times.items()},
        "to_floor": ratio._asdict(),
        "to_matrix": measure.ratio_of_medians(times["method"], times["matrix"])._asdict(),
        "bar": case.bar,
        "holds": None if case.bar is None else ratio.low <= case.bar,
        "first_call_s": first["method"],
        "times_s": {kind: values.tolist() for kind, values in times.items()},
    }


def peaks_of(case: Case, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory in MiB per kind of call, each in a process of its own."""
    peaks = {}
    for kind in ("method", "floor", "matrix"):
        command = [sys.executable, "-m", "tests.benchmarks.benchmark", "--peak-of", kind]
        command += ["--methods", case.method, "--batches", str(batch)]
        command += ["--threads", str(torch.get_num_threads())] + ["--tiny"] * options.tiny
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        peaks[kind] = float(done.stdout.split()[-1])
    return peaks


def print_peak(case: Case, kind: str, batch: int, tiny: bool) -> None:
    call = calls_of(case, (kind,), batch, tiny)[kind]
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
        bar = "–" if r["bar"] is None else f"{r['bar']} {'holds' if r['holds'] else 'MISSED'}"
        peaks = " / ".join(f"{r['peak_mib'][kind]:.0f}" for kind in r["peak_mib"]) or "–"
        lines.append(
            f"| {r['batch']} | {r['method']} | {r['median_s']['method']:.3f} "
            f"| {r['floor']} {r['median_s']['floor']:.3f} s "
            f"| {measure.Ratio(**r['to_floor'])} ({r['pairs']} pairs) | {bar} "
            f"| {measure.Ratio(**r['to_matrix'])} | {r['first_call_s']:.2f} | {peaks} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.method for case in CASES]
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--pairs", type=int, help="rounds (default: 30, or 5 where a pair is slow)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="raw results")
    parser.add_argument("--peak-of", choices=["method", "floor", "matrix"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = [case for case in CASES if case.method in options.methods]
    if options.peak_of:
        print_peak(chosen[0], options.peak_of, options.batches[0], options.tiny)
        return 0
    results = []
    for batch in options.batches:
        for case in chosen:
            print(f"{case.method}, batch {batch} ...", file=sys.stderr)
            peaks = {} if options.no_memory else peaks_of(case, batch, options)
            results.append(time_case(case, batch, options) | {"peak_mib": peaks})
    model = "a tiny ViT" if options.tiny else "ViT-B/16 224 (random weights)"
    about = f"{model}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
    about += platform.machine()
    options.json.write_text(json.dumps({"about": about, "results": results}, indent=1))
    print(f"{about}\n\n{markdown(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
