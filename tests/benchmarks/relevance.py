"""What relevance propagation costs: `python -m tests.benchmarks.relevance vit|gpt2 [ROUNDS]`.

Interleaved in one process, as multiples of F, one forward and backward pass of the model with
frozen weights down to its inputs; and the memory beyond the model, each in a process of its own.
LXT's patched model is timed beside ours where the package `lxt` is installed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from captum_attn import CPLRP, AttnLRP, TransformerAttribution, TransformerLRP
from captum_attn.observe.capture.restore import left_as_found
from tests.benchmarks.measure import interleave, ratio_of_medians

TOKENS = 512


def vit() -> tuple[nn.Module, Tensor, int]:
    import timm

    return timm.create_model("vit_base_patch16_224").eval(), torch.randn(1, 3, 224, 224), 3


def gpt2() -> tuple[nn.Module, Tensor, tuple[int, int]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config()
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config).eval(), torch.randint(50_000, (1, TOKENS)), (TOKENS - 1, 77)


def floor(model: nn.Module, x: Tensor, target: int | tuple[int, int]) -> None:
    """One forward and one backward pass."""
    with left_as_found([model]):
        if isinstance(target, int):
            leaf = x.clone().requires_grad_()
            value = model(leaf)[:, target].sum()
        else:
            leaf = model.get_input_embeddings()(x).detach().requires_grad_()  # type: ignore
            value = model(inputs_embeds=leaf).logits[:, target[0], target[1]].sum()
        torch.autograd.grad(value, leaf)


def calls(name: str) -> dict[str, Callable[[], object]]:
    model, x, target = {"vit": vit, "gpt2": gpt2}[name]()
    methods = {m.__name__: m(model) for m in (AttnLRP, CPLRP, TransformerLRP)}
    if name == "vit":
        methods["TransformerAttribution"] = TransformerAttribution(model)
    made: dict[str, Callable[[], object]] = {"F": lambda: floor(model, x, target)}
    for key, method in methods.items():
        made[key] = lambda method=method: method.attribute(x, target)  # type: ignore[misc]
    if name == "gpt2":
        made |= _lxt(x, target)
    return made


def _lxt(x: Tensor, target: int | tuple[int, int]) -> dict[str, Callable[[], object]]:
    """LXT's AttnLRP: it patches transformers' GPT-2 in this process, so a model of its own."""
    try:
        from lxt.efficient import monkey_patch
        from lxt.efficient.models.gpt2 import attnLRP
    except ImportError:
        return {}
    from transformers.models.gpt2 import modeling_gpt2

    monkey_patch(modeling_gpt2, patch_map=attnLRP)
    model = gpt2()[0]
    return {"LXT": lambda: floor(model, x, target)}


def memory(name: str, call: str) -> float:
    """MiB beyond what the process has before the second call."""
    source = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests.benchmarks import relevance as r, measure\n"
        f"made = r.calls({name!r}); before = measure.peak_mib()\n"
        f"made[{call!r}](); print(measure.peak_mib() - before)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(name: str, rounds: int) -> None:
    torch.set_num_threads(1)
    made = calls(name)
    for call in made.values():
        call()
    times = interleave(made, rounds)
    base = memory(name, "F")
    for key, values in times.items():
        ratio = ratio_of_medians(values, times["F"])
        mib = base if key == "F" else memory(name, key) if key != "LXT" else float("nan")
        print(f"{name:5} {key:24} {ratio} F   {mib:6.0f} MiB, {mib / base:.2f} F", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)
