"""What does it cost to explain inputs of ever new lengths, and the very first one?

    python -m tests.benchmarks.lengths              # all, about a quarter of an hour on one core
    python -m tests.benchmarks.lengths --only bert-gae first-bert
    python -m tests.benchmarks.lengths --tiny       # to see that it runs

- New lengths: one object explains one input, and then twenty of twenty other lengths, each once and
  in turns with F, a fused forward and backward with frozen parameters on the same input. The figure
  is the mean of the twenty ratios.
- First calls: a new object explains its first input, in turns with F. Their peak memory is what a
  fresh process needs beyond the model (see `scaling`).
- Second calls: the same input again, in turns with F, or with f, a forward without gradients.
- A generation: 64 new tokens, in turns with 64 backward passes of the model's own.

All weights are random. What is timed is the processor's time, so that other processes on the
machine hardly count. A bar holds if the lower end of the bootstrap interval is within it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import captum_attn
from captum_attn.attr import _backward
from captum_attn.generation import explain_generation
from tests.benchmarks import measure
from tests.benchmarks.benchmark import TARGET
from tests.benchmarks.models import backward, frozen

ROOT = Path(__file__).parents[2]
GENERATED = 64


class Explained(NamedTuple):
    """A model as it is explained, and as F runs it.

    Args:
        model (Module): the model.
        inputs (callable): length -> what is explained.
        target (callable): length -> the target.
        floor (callable): inputs -> F, run.
    """

    model: nn.Module
    inputs: Callable[[int], object]
    target: Callable[[int], object]
    floor: Callable[[object], object]


def text_of(model: nn.Module, vocabulary: int, score: Callable, target: Callable) -> Explained:
    def inputs(length: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(length)
        return {"input_ids": torch.randint(3, vocabulary, (1, length), generator=generator)}

    def floor(given: dict[str, Tensor]) -> object:
        words = model.get_input_embeddings()(given["input_ids"])
        return backward(lambda e: score(model(inputs_embeds=e).logits), words)

    return Explained(model, inputs, target, floor)


def bert(tiny: bool) -> Explained:
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**(small if tiny else {}), num_labels=TARGET + 1)
    model = frozen(BertForSequenceClassification(config))
    return text_of(model, config.vocab_size, lambda y: y[:, TARGET], lambda n: TARGET)


def llama(tiny: bool) -> Explained:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = (32, 2) if tiny else (512, 12)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=11 * width // 4,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    model = frozen(LlamaForCausalLM(config))
    return text_of(model, 1000, lambda y: y[:, -1, TARGET], lambda n: (n - 1, TARGET))


def vit(tiny: bool, name: str = "vit_base_patch16_224") -> Explained:
    import timm

    small = {"embed_dim": 32, "depth": 2, "num_heads": 2} if tiny else {}
    model = frozen(timm.create_model(name, pretrained=False, **small))

    def inputs(batch: int) -> Tensor:
        return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(batch))

    def floor(x: object) -> object:
        return backward(lambda x: model(x)[:, TARGET], x)

    return Explained(model, inputs, lambda batch: TARGET, floor)


MODELS: dict[str, Callable[[bool], Explained]] = {
    "bert": bert,
    "llama": llama,
    "vit-b": vit,
    "vit-s": partial(vit, name="vit_small_patch16_224"),
}


class Case(NamedTuple):
    """A row of the table.

    Args:
        kind (str): "lengths", "first", "second", "forward" (against f) or "generation".
        model (str): which of `MODELS`.
        method (str): the method.
        bar (float): the ratio that must be reached.
        sizes (tuple of int): the first and the last length, the batch, or the prompt.
    """

    kind: str
    model: str
    method: str
    bar: float
    sizes: tuple[int, ...]


CASES = {
    "bert-gae": Case("lengths", "bert", "GenericAttention", 1.25, (16, 256)),
    "bert-vtranm": Case("lengths", "bert", "VTranM", 1.5, (16, 256)),
    "llama-gae": Case("lengths", "llama", "GenericAttention", 1.2, (32, 1024)),
    "first-bert": Case("first", "bert", "GenericAttention", 2.0, (128,)),
    "first-vit": Case("first", "vit-b", "GenericAttention", 2.0, (1,)),
    "second-vit": Case("second", "vit-b", "GenericAttention", 1.1, (1,)),
    "second-vit-8": Case("second", "vit-b", "GenericAttention", 1.1, (8,)),
    "rollout-vit-b": Case("forward", "vit-b", "AttentionRollout", 1.1, (1,)),
    "rollout-vit-s": Case("forward", "vit-s", "AttentionRollout", 1.1, (1,)),
    "generation": Case("generation", "llama", "GenericAttention", 1.1, (64,)),
}
TINY = {"lengths": (8, 27)}
MEMORY_BAR = 1.25


def spent(call: Callable[[], object]) -> float:
    """Seconds of the processor's time."""
    start = time.process_time()
    call()
    return time.process_time() - start


def method_of(case: Case, explained: Explained) -> Callable[[int], Callable[[], object]]:
    """size -> the call that explains an input of that size, of one new object."""
    method = getattr(captum_attn, case.method)(explained.model)
    return lambda size: partial(
        method.attribute, explained.inputs(size), target=explained.target(size)
    )


def lengths_of(case: Case, tiny: bool) -> list[int]:
    first, last = TINY["lengths"] if tiny else case.sizes
    return [int(n) for n in np.linspace(first, last, 20).round()]


def new_lengths(case: Case, explained: Explained, tiny: bool) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each length, and of F around it."""
    lengths = lengths_of(case, tiny)
    call = method_of(case, explained)
    call((lengths[0] + lengths[1]) // 2)()
    order = np.random.default_rng(0).permutation(lengths)
    ours, floors = [], []
    for n in order.tolist():
        floor = partial(explained.floor, explained.inputs(n))
        before = [spent(floor), spent(floor)]
        ours.append(spent(call(n)))
        floors.append(np.median([*before, spent(floor)]))
    return np.array(ours), np.array(floors)


def in_turns(case: Case, explained: Explained, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of first or second calls, and of the floor."""
    size = case.sizes[0]
    inputs = explained.inputs(size)
    known = method_of(case, explained)(size)

    def forward() -> None:
        with torch.no_grad():
            explained.model(inputs)

    floor = forward if case.kind == "forward" else partial(explained.floor, inputs)
    ours, floors = [], []
    for _ in range(2):
        known(), floor()
    for _ in range(rounds):
        call = method_of(case, explained)(size) if case.kind == "first" else known
        floors.append(spent(floor))
        ours.append(spent(call))
    return np.array(ours), np.array(floors)


def generations(
    case: Case, explained: Explained, rounds: int, tiny: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Seconds of an explained generation, of as many backward passes, and how many it takes."""
    count = 4 if tiny else GENERATED
    prompt = explained.inputs(case.sizes[0])["input_ids"]  # type: ignore[index]
    tokens = torch.cat([prompt, explained.inputs(count)["input_ids"]], 1)  # type: ignore[index]
    method = getattr(captum_attn, case.method)(explained.model)
    explain = partial(explain_generation, method, prompt, tokens, eos_token_id=())

    def passes() -> None:
        words = explained.model.get_input_embeddings()(tokens).requires_grad_()
        logits = explained.model(inputs_embeds=words).logits
        for i in range(prompt.shape[1] - 1, tokens.shape[1] - 1):
            torch.autograd.grad(logits[0, i, tokens[0, i + 1]], words, retain_graph=True)

    explain()
    run, plain = [0], _backward.gradients

    def counted(*args: Any, **kwargs: Any) -> Any:
        run[0] += 1
        return plain(*args, **kwargs)

    _backward.gradients = counted
    try:
        explain()
    finally:
        _backward.gradients = plain
    pairs = [(spent(explain), spent(passes)) for _ in range(rounds)]
    ours, floors = np.array(pairs).T
    return ours, floors, run[0]


def mean_ratio(ours: np.ndarray, floors: np.ndarray) -> measure.Ratio:
    """The mean of the ratios, and its bootstrap 95 % interval over the lengths."""
    ratios = ours / floors
    draws = np.random.default_rng(0).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.quantile(ratios[draws].mean(1), [0.025, 0.975])
    return measure.Ratio(float(ratios.mean()), float(low), float(high))


def measured(name: str, options: argparse.Namespace) -> dict:
    case = CASES[name]
    torch.manual_seed(0)
    explained = MODELS[case.model](options.tiny)
    found: dict = {"name": name, **case._asdict()}
    if case.kind == "lengths":
        ours, floors = new_lengths(case, explained, options.tiny)
        ratio = mean_ratio(ours, floors)
    elif case.kind == "generation":
        ours, floors, found["passes"] = generations(
            case, explained, max(2, options.rounds // 4), options.tiny
        )
        ratio = measure.ratio_of_medians(ours, floors)
    else:
        ours, floors = in_turns(case, explained, options.rounds)
        ratio = measure.ratio_of_medians(ours, floors)
    if case.kind == "first" and not options.no_memory:
        ours_mib, floor_mib = (peak(name, kind, options) for kind in ("ours", "F"))
        found |= {"peak_mib": [ours_mib, floor_mib], "memory": ours_mib / floor_mib}
    found |= {"ratio": ratio._asdict(), "holds": ratio.low <= case.bar}
    return found | {"ours_s": ours.tolist(), "floor_s": floors.tolist()}


def peak(name: str, kind: str, options: argparse.Namespace) -> float:
    """MiB beyond the model, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.lengths", "--peak-of", kind]
    command += ["--only", name, *["--tiny"] * options.tiny]
    command += ["--threads", str(torch.get_num_threads())]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def print_peak(case: Case, kind: str, tiny: bool) -> None:
    torch.manual_seed(0)
    explained = MODELS[case.model](tiny)
    size = case.sizes[0]
    floor = partial(explained.floor, explained.inputs(size))
    call = method_of(case, explained)(size) if kind == "ours" else floor
    before = measure.peak_mib()
    call()
    print(measure.peak_mib() - before)


def markdown(results: Sequence[dict]) -> str:
    lines = ["| what | method | ratio [95 %] | bar | memory to F |", "|---|---|---|---|---|"]
    said = {
        "lengths": "{model}, 20 lengths of {0}-{1}, each new, to F",
        "first": "{model} {0}, first call, to F",
        "second": "{model}, batch {0}, second call, to F",
        "forward": "{model}, batch {0}, second call, to a forward",
        "generation": "{model}, 64 new tokens, to as many backward passes",
    }
    for r in results:
        what = said[r["kind"]].format(*r["sizes"], model=r["model"])
        what += f" ({r['passes']} passes)" if "passes" in r else ""
        held = "holds" if r["holds"] else "MISSED"
        memory = f"{r['memory']:.2f} ({MEMORY_BAR})" if "memory" in r else "–"
        ratio = measure.Ratio(**r["ratio"])
        lines.append(f"| {what} | {r['method']} | {ratio} | {r['bar']} {held} | {memory} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=12, help="of first and second calls")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--json", type=Path, default=Path("lengths.json"), help="raw results")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(CASES[options.only[0]], options.peak_of, options.tiny)
        return 0
    results = []
    for name in options.only:
        print(f"{name} ...", file=sys.stderr)
        results.append(measured(name, options))
        print(markdown(results[-1:]).splitlines()[-1], file=sys.stderr)
    about = f"torch {torch.__version__}, {options.threads} thread(s), {platform.machine()}"
    options.json.write_text(json.dumps({"about": about, "results": results}, indent=1))
    print(f"{about}\n\n{markdown(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
