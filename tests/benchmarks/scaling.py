"""Time and memory as the sequence grows, and on models of several streams.

    python -m tests.benchmarks.scaling --plot tutorials/scaling.png     # all, about an hour
    python -m tests.benchmarks.scaling --models vit --tokens 1025 4097
    python -m tests.benchmarks.scaling --tiny                           # to see that it runs

`GenericAttention` in turns with F, a fused forward and backward with frozen parameters, and, where
there is one and it fits, the plain matrix form that keeps every map and its gradient: P as GAE's
authors run it (every weight gets its gradient, the rule is recorded by autograd), and M with frozen
parameters and no more kept than the rule needs. The models:

    vit     a six-layer ViT-S on larger and larger images
    llama   a causal language model of four layers, width 512
    lxmert  LXMERT-base, 20 words and 36 regions, Eq. 8-11 with its matrices
    detr    DETR-R50 on an image of 800 x 1066, the same

All weights are random. Peak memory is what a fresh process needs beyond the model, its first call
included; glibc is told to hand large blocks back at once (`MALLOC_MMAP_THRESHOLD_`), so that it is
that of what is in use and not of how the heap has been cut up. The exponents are those of a
straight line through the logarithms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks import measure
from tests.benchmarks.models import MODELS, PLAIN, TINY, Model

ROOT = Path(__file__).parents[2]


def kinds_at(model: Model, tokens: int) -> list[str]:
    return [k for k in model.kinds if k not in PLAIN or tokens <= model.most_plain]


def timed(name: str, tokens: int, options: argparse.Namespace) -> dict:
    model = MODELS[name]
    torch.manual_seed(0)
    calls = {k: model.calls(tokens, options.tiny, k) for k in kinds_at(model, tokens)}
    first = {kind: measure.seconds(call) for kind, call in calls.items()}
    if tokens > model.most_timed:
        rounds, times = 1, {kind: np.array([seconds]) for kind, seconds in first.items()}
    else:
        pair = measure.seconds(calls["ours"]) + measure.seconds(calls["F"])
        few = pair >= measure.PAIR_SECONDS
        rounds = options.pairs or (measure.FEW_PAIRS if few else measure.PAIRS)
        times = measure.interleave(calls, rounds)
    return {
        "model": name,
        "tokens": tokens,
        "pairs": rounds,
        "first_s": first,
        "median_s": {kind: float(np.median(values)) for kind, values in times.items()},
        "to": {
            kind: measure.ratio_of_medians(times["ours"], times[kind])._asdict()
            for kind in times
            if kind != "ours"
        },
        "times_s": {kind: values.tolist() for kind, values in times.items()},
    }


def peaks(name: str, tokens: int, options: argparse.Namespace) -> dict[str, float]:
    """MiB beyond the model, each kind in a process of its own."""
    found = {}
    for kind in kinds_at(MODELS[name], tokens):
        command = [sys.executable, "-m", "tests.benchmarks.scaling", "--peak-of", kind]
        command += ["--models", name, "--tokens", str(tokens)] + ["--tiny"] * options.tiny
        command += ["--threads", str(torch.get_num_threads())]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        found[kind] = float(done.stdout.split()[-1])
    return found


def print_peak(name: str, tokens: int, kind: str, tiny: bool) -> None:
    torch.manual_seed(0)
    call = MODELS[name].calls(tokens, tiny, kind)
    before = measure.peak_mib()
    call()
    call()
    print(measure.peak_mib() - before)


def exponent(tokens: Sequence[int], values: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def growth(results: list[dict], name: str) -> str | None:
    """The exponents of time and memory from 1k to 8k tokens."""
    own = [r for r in results if r["model"] == name and 1000 <= r["tokens"] <= 8200]
    if len(own) < 3:
        return None
    tokens = [r["tokens"] for r in own]
    said = []
    for kind in ("ours", "F"):
        time = exponent(tokens, [r["median_s"][kind] for r in own])
        memory = exponent(tokens, [r["peak_mib"][kind] for r in own]) if own[0]["peak_mib"] else 0
        said.append(f"{kind} time {time:.2f}, memory {memory:.2f}")
    return f"{name}, {tokens[0]} to {tokens[-1]} tokens, exponents: " + "; ".join(said)


def markdown(results: list[dict]) -> str:
    lines = [
        "| model | tokens | seconds: ours / F / P / M "
        "| ours to F [95 %] | to P [95 %] | to M [95 %] | first call, s: ours / F "
        "| peak MiB beyond the model: ours / F / P / M | to F | to P | to M |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        kinds = list(r["median_s"])
        ratios = {k: str(measure.Ratio(**v)) for k, v in r["to"].items()}
        peak = r["peak_mib"]
        of_peak = {k: f"{peak['ours'] / peak[k]:.2f}" for k in kinds if peak and k != "ours"}
        lines.append(
            f"| {r['model']} | {r['tokens']} "
            f"| {' / '.join(format(r['median_s'][k], '.3g') for k in kinds)} "
            f"| {ratios['F']} ({r['pairs']}) | {ratios.get('P', '–')} | {ratios.get('M', '–')} "
            f"| {r['first_s']['ours']:.3g} / {r['first_s']['F']:.3g} "
            f"| {' / '.join(f'{peak[k]:.0f}' for k in kinds) if peak else '–'} "
            f"| {' | '.join(of_peak.get(k, '–') for k in ('F', *PLAIN))} |"
        )
    said = filter(None, (growth(results, name) for name in MODELS))
    return "\n".join([*lines, "", *said])


def plot(results: list[dict], path: Path, name: str = "vit") -> None:
    """Time and memory against tokens, of every kind."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

    looks = {
        "ours": ("GenericAttention", "#0072b2", "o"),
        "F": ("forward and backward (F)", "#555555", "s"),
        "P": ("the authors' matrices (P)", "#d55e00", "^"),
        "M": ("lean matrices (M)", "#e69f00", "v"),
    }
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    own = [r for r in results if r["model"] == name]
    for axes, key, label, scale in zip(
        figure.subplots(1, 2), ("median_s", "peak_mib"), ("seconds", "GiB beyond the model"),
        (1, 1024), strict=True,
    ):  # fmt: skip
        for kind, (text, colour, marker) in looks.items():
            points = [(r["tokens"], r[key][kind] / scale) for r in own if kind in r[key]]
            if points:
                axes.loglog(*zip(*points, strict=True), marker, ls="-", color=colour, label=text)
        axes.set(xlabel="tokens", ylabel=label)
        axes.set_xticks([r["tokens"] for r in own])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("A six-layer ViT-S on larger and larger images")
    figure.savefig(path, dpi=110)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, help="lengths (default: each model's own)")
    parser.add_argument("--pairs", type=int, help="rounds (default: 30, or 5 where a pair is slow)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--json", type=Path, default=Path("scaling.json"), help="raw results")
    parser.add_argument("--resume", action="store_true", help="keep what --json has already")
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(options.models[0], options.tokens[0], options.peak_of, options.tiny)
        return 0
    results = json.loads(options.json.read_text())["results"] if options.resume else []
    have = {(r["model"], r["tokens"]) for r in results}
    about = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    for name in options.models:
        own = TINY[name] if options.tiny else MODELS[name].tokens
        for tokens in options.tokens or own:
            if (name, tokens) in have:
                continue
            print(f"{name}, {tokens} tokens ...", file=sys.stderr)
            memory = {} if options.no_memory else peaks(name, tokens, options)
            results.append(timed(name, tokens, options) | {"peak_mib": memory})
            options.json.write_text(json.dumps({"about": about, "results": results}, indent=1))
    print(f"{about}\n\n{markdown(results)}")
    if options.plot:
        plot(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
