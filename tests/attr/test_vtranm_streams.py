"""VTranM across streams, its extension by the heterogenous rule: LXMERT and DETR.

A and its gradient are the goldens of the original authors' code; vectors and weights are taken from
the modules by hooks.
"""

from __future__ import annotations

import pytest
import torch

from captum_attn import VTranM, objectives
from tests import plain
from tests.plain_vtranm import (
    AttentionStep,
    FeedForwardStep,
    feed_forward_weights,
    heads_of,
    length,
    weighted_map,
)
from tests.test_goldens_two_streams import CASES, close_to, detr_image, lxmert_inputs, stored
from tests.test_goldens_two_streams import detr as detr
from tests.test_goldens_two_streams import lxmert as lxmert
from tests.test_plain import detr_sites, lxmert_sites

VARIANTS = [(True, True), (True, False), (False, True), (False, False)]
every_variant = pytest.mark.parametrize(("with_length", "with_direction"), VARIANTS)


class Recorder:
    """What went into modules and came out of them, call by call, without the batch axis."""

    def __init__(self, model, run):
        self.calls = {}
        handles = [
            module.register_forward_hook(self.keeper(name))
            for name, module in model.named_modules()
            if name
        ]
        self.modules = dict(model.named_modules())
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()

    def keeper(self, name):
        def keep(module, inputs, output):
            given = [t[0] for t in inputs if isinstance(t, torch.Tensor) and t.ndim]
            if given and isinstance(output, torch.Tensor) and output.ndim:
                self.calls.setdefault(name, []).append((given, output[0]))

        return keep

    def step(self, site, value, projection, call=0):
        """An attention step: E is what the values are projected from."""
        A, G = site
        (E, *_), V = self.calls[value][call]
        return AttentionStep(A, heads_of(V, len(A)), self.modules[projection].weight.T, E), G


class Streams:
    """R of several streams by the heterogenous rule, with U of Eq. 14 and 16."""

    def __init__(self, first, options):
        self.options = options
        self.R = {}
        for s, E in first.items():
            for x, other in first.items():
                block = torch.zeros(len(E), len(other), dtype=torch.float64)
                if s == x:
                    lengths = [length(e) if options["with_length"] else 1.0 for e in E]
                    block = torch.diag(torch.tensor(lengths, dtype=torch.float64))
                self.R[s, x] = block

    def attend(self, s, v, step_and_gradient, read=None):
        step, gradient = step_and_gradient
        real = torch.ones(len(step.E), dtype=torch.bool)
        U = weighted_map(step, gradient, real, **self.options)
        read = dict(self.R) if read is None else read
        for row, x in list(self.R):
            if row == s:
                self.R[s, x] = self.R[s, x] + U @ read[v, x]

    def feed_forward(self, s, E, branch):
        real = torch.ones(len(E), dtype=torch.bool)
        w = feed_forward_weights(FeedForwardStep(E, branch), real, **self.options)
        for row, x in list(self.R):
            if row == s:
                self.R[s, x] = torch.diag(1 + w) @ self.R[s, x]


@every_variant
@pytest.mark.parametrize("case", CASES)
def test_lxmert(lxmert, case, with_length, with_direction):
    sites = lxmert_sites(case, "t0")
    seen = Recorder(lxmert, lambda: lxmert(**lxmert_inputs(case)))
    root = "lxmert.encoder"

    def self_step(site, name, value="attention.self.value", dense="attention.output.dense"):
        return seen.step(sites[site], f"{root}.{name}.{value}", f"{root}.{name}.{dense}")

    def feed(stream, name):
        (inner, skip), _ = seen.calls[f"{root}.{name}"][0]
        streams.feed_forward(stream, skip, seen.modules[f"{root}.{name}.dense"](inner))

    first = {
        "t": seen.calls[f"{root}.layer.0.attention.self.value"][0][0][0],
        "i": seen.calls[f"{root}.r_layers.0.attention.self.value"][0][0][0],
    }
    streams = Streams(first, {"with_length": with_length, "with_direction": with_direction})
    with torch.no_grad():
        for layer in range(2):
            streams.attend("t", "t", self_step(f"lang{layer}", f"layer.{layer}"))
            feed("t", f"layer.{layer}.output")
            streams.attend("i", "i", self_step(f"vis{layer}", f"r_layers.{layer}"))
            feed("i", f"r_layers.{layer}.output")
        for layer in range(2):
            old, x = dict(streams.R), f"x_layers.{layer}"
            names = (
                f"{root}.{x}.visual_attention.att.value",
                f"{root}.{x}.visual_attention.output.dense",
            )
            text = seen.step(sites[f"x{layer}.cross_t_i"], *names, call=0)
            streams.attend("t", "i", text, read=old)
            image = seen.step(sites[f"x{layer}.cross_i_t"], *names, call=1)
            streams.attend("i", "t", image, read=old)
            for s, part in (("t", "lang"), ("i", "visn")):
                own = "self.value", "output.dense"
                step = self_step(f"x{layer}.self_{s}", f"{x}.{part}_self_att", *own)
                streams.attend(s, s, step)
                feed(s, f"{x}.{part}_output")
    target = int(stored("lxmert_vqa", "expected")[f"{case}.t0.target"])
    maps = VTranM(lxmert).relevance_maps(
        lxmert_inputs(case), target, objective=objectives.logit,
        length=with_length, direction=with_direction,
    )  # fmt: skip
    names = {"t": "input_ids", "i": "visual_feats"}
    for (s, x), block in streams.R.items():
        plain.close(maps[names[s], names[x]][0], block)
    tokens = VTranM(lxmert).attribute_tokens(
        lxmert_inputs(case), target, objective=objectives.logit,
        length=with_length, direction=with_direction,
    )  # fmt: skip
    plain.close(tokens["input_ids"][0], streams.R["t", "t"][0])
    plain.close(tokens["visual_feats"][0], streams.R["t", "i"][0])


@every_variant
def test_detr(detr, with_length, with_direction):
    """The queries begin as zeros: they have no length, and nothing of them is kept."""
    sites = detr_sites("in0", "t1")
    expected = stored("detr_dec2", "expected")
    query, target = (int(expected[f"in0.t1.{name}"]) for name in ("query", "target"))
    seen = Recorder(detr, lambda: detr(detr_image("in0")))

    def one(prefix, *endings):
        return next(f"{prefix}.{e}" for e in endings if f"{prefix}.{e}" in seen.modules)

    def step(site, name):
        projection = one(name, "o_proj", "out_proj")
        return seen.step(sites[site], f"{name}.v_proj", projection)

    def feed(stream, layer):
        (skip,), _ = seen.calls[one(layer, "fc1", "mlp.fc1")][0]
        streams.feed_forward(stream, skip, seen.calls[one(layer, "fc2", "mlp.fc2")][0][1])

    first = {
        "q": seen.calls["model.decoder.layers.0.self_attn.v_proj"][0][0][0],
        "i": seen.calls["model.encoder.layers.0.self_attn.v_proj"][0][0][0],
    }
    assert not first["q"].any()
    streams = Streams(first, {"with_length": with_length, "with_direction": with_direction})
    with torch.no_grad():
        for i in range(2):
            layer = f"model.encoder.layers.{i}"
            streams.attend("i", "i", step(f"enc{i}", f"{layer}.self_attn"))
            feed("i", layer)
        for i in range(2):
            layer = f"model.decoder.layers.{i}"
            streams.attend("q", "q", step(f"dec{i}.self", f"{layer}.self_attn"))
            streams.attend("q", "i", step(f"dec{i}.cross", f"{layer}.encoder_attn"))
            feed("q", layer)
    tokens = VTranM(detr).attribute_tokens(
        detr_image("in0"), (query, target), objective=objectives.logit,
        length=with_length, direction=with_direction,
    )  # fmt: skip
    close_to(detr, tokens["pixel_values"][0], streams.R["q", "i"][query])
    close_to(detr, tokens["queries"][0], streams.R["q", "q"][query])
