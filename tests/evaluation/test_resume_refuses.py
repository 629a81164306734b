"""What is no continuation: other data, other settings of any depth, changed lines, a second run."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, NoiseTunnel, Saliency
from torch.utils.data import IterableDataset

import captum_attn
from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation import evaluate
from captum_attn.evaluation.fingerprint import Describer, described, digest
from captum_attn.evaluation.log import only_writer
from tests.evaluation.models import examples, linear
from tests.fuzz.models import vit

ROOT = Path(__file__).parents[2]
SCALE = 2.0


def run(out, methods, dataset=None, model=None, resume=True, **options):
    options = {"batch_size": 4, "resamples": 200, "show_progress": False, **options}
    return evaluate(
        model or linear(), dataset or examples(), methods, "aopc", out=out, resume=resume, **options
    )


# ---------------------------------------------------------------------------- data
def other_label(rows):
    rows[9] = (rows[9][0], (rows[9][1] + 1) % 3, rows[9][2])


def other_pixel(rows):
    image = rows[9][0].clone()
    image[0, 0, 0] += 1e-3
    rows[9] = (image, *rows[9][1:])


def other_mask(rows):
    rows[9] = (*rows[9][:2], ~rows[9][2])


def other_order(rows):
    rows[8], rows[9] = rows[9], rows[8]


@pytest.mark.parametrize("change", [other_label, other_pixel, other_mask, other_order])
@pytest.mark.parametrize("finished", [3, 5])
def test_other_data_in_the_middle(tmp_path, change, finished):
    run(tmp_path, InputXGradient)
    log = tmp_path / "batches-0.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[: 1 + finished]))
    rows, before = examples(), log.read_bytes()
    change(rows)
    with pytest.raises(OptionError, match=r"batch 2 \(from example 8 on\) was made of other data"):
        run(tmp_path, InputXGradient, rows)
    assert log.read_bytes() == before


def test_other_groups(tmp_path):
    def rows(group):
        return [
            (x, y, {"masks": m, "groups": group if i == 9 else i // 2})
            for i, (x, y, m) in enumerate(examples())
        ]

    run(tmp_path, InputXGradient, rows(4))
    run(tmp_path, InputXGradient, rows(4))
    with pytest.raises(OptionError, match="batch 2.*other data"):
        run(tmp_path, InputXGradient, rows(5))


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_stream_of_other_examples(tmp_path):
    run(tmp_path, InputXGradient, Stream(examples()))
    run(tmp_path, InputXGradient, Stream(examples()))
    rows = examples()
    other_label(rows)
    with pytest.raises(OptionError, match="batch 2.*other data"):
        run(tmp_path, InputXGradient, Stream(rows))


# ---------------------------------------------------------------------------- settings
def scaled(by):
    def method(inputs, target, additional):
        return by * inputs

    return method


def by_global(inputs, target, additional):
    return SCALE * inputs


class Own:
    """A method with a setting that is no plain value."""

    def __init__(self, weights):
        self.weights = {"a": [weights]}

    def attribute(self, inputs, target):
        return inputs * self.weights["a"][0]


def noisy(inner, **options):
    return lambda model: (NoiseTunnel(inner(model)), {"nt_samples": 2, **options})


CHANGES = {
    "layers": (lambda m: captum_attn.GenericAttention(m, layers=["attention"]),
               lambda m: captum_attn.GenericAttention(m)),
    "inner method": (noisy(InputXGradient), noisy(Saliency)),
    "inner setting": (
        noisy(lambda m: Own2(m, 1.0)), noisy(lambda m: Own2(m, 2.0))),
    "option": (noisy(Saliency), noisy(Saliency, stdevs=0.5)),
    "closure": (lambda m: scaled(1.0), lambda m: scaled(2.0)),
    "closure of a tensor": (lambda m: scaled(torch.ones(1)), lambda m: scaled(torch.zeros(1))),
    "partial": (
        lambda m: functools.partial(by_name, by=1), lambda m: functools.partial(by_name, by=2)),
    "code": (lambda m: lambda x, t, a: x + 1, lambda m: lambda x, t, a: x + 2),
    "default": (lambda m: lambda x, t, a, k=1: x * k, lambda m: lambda x, t, a, k=2: x * k),
    "attribute": (lambda m: Own(torch.ones(1)), lambda m: Own(torch.zeros(1))),
    "array": (lambda m: Own(np.ones(1)), lambda m: Own(np.zeros(1))),
    "set": (lambda m: scaled(frozenset("a")), lambda m: scaled(frozenset("b"))),
}  # fmt: skip


def by_name(inputs, target, additional, by):
    return by * inputs


class Own2(Saliency):
    def __init__(self, model, power):
        super().__init__(model)
        self._power = power


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_number_is_described(name):
    one, other = CHANGES[name]
    assert described(one(vit())) == described(one(vit()))
    assert described(one(vit())) != described(other(vit()))


@pytest.mark.parametrize("name", ["layers", "inner method", "inner setting"])
def test_another_method_inside(tmp_path, name):
    one, other = CHANGES[name]
    rows = [(torch.rand(3, 8, 8), i % 3) for i in range(4)]

    def explained(make, out):
        model = vit()
        return run(out, {"m": make(model)}, rows, model, batch_size=2, perturbation={"steps": 2})

    explained(one, tmp_path)
    explained(one, tmp_path)
    with pytest.raises(OptionError, match=r"methods\.m"):
        explained(other, tmp_path)


def test_a_global_that_a_function_speaks_of(monkeypatch):
    before = described(by_global)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert described(by_global) != before


def test_a_model_is_its_weights_buffers_settings_and_hooks():
    def changed(change):
        model = vit()
        model.register_buffer("scale", torch.ones(1), persistent=False)
        change(model)
        return described(model)

    kept = changed(lambda m: None)
    assert kept == changed(lambda m: None)
    for change in (
        lambda m: m.scale.mul_(2), lambda m: setattr(m.attention, "heads", 4),
        lambda m: m.head.register_forward_hook(lambda *_: None), lambda m: m.half(),
        lambda m: m.head.bias.data.add_(1),
    ):  # fmt: skip
        assert changed(change) != kept


def test_a_method_that_was_used_is_the_same():
    model = vit()
    method = captum_attn.GenericAttention(model)
    before = described(method)
    method.attribute(torch.rand(1, 3, 8, 8), target=1)
    assert described(method) == before


def test_descriptions_are_the_same_in_another_process():
    code = (
        "from tests.evaluation.test_resume_refuses import *; import json;"
        "print(json.dumps([described(one(vit())) for one, _ in CHANGES.values()]))"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, text=True, capture_output=True,
        check=True, env=os.environ | {"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    here = [described(one(vit())) for one, _ in CHANGES.values()]
    assert json.loads(found.stdout.splitlines()[-1]) == json.loads(json.dumps(here))


def test_what_cannot_be_fingerprinted_is_named(tmp_path):
    rows, lock = (i for i in range(3)), threading.Lock()

    def method(inputs, target, additional):
        with lock:
            return inputs * len([rows])

    with pytest.warns(UserWarning, match=r"mine\[0\]\.lock \(_thread\.lock\), mine\[0\]\.rows"):
        run(tmp_path, {"mine": method}, examples()[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(None, {"mine": method}, examples()[:4], resume=False)


def test_cycles_and_depth_end():
    loop: list = []
    loop.append(loop)
    assert described(loop) == described(loop)
    deep: list = []
    for _ in range(200):
        deep = [deep]
    describe = Describer()
    describe(deep, "deep")
    assert len(describe.unknown) == 1


def test_digests_tell_numbers_of_any_kind_apart():
    values = [1, 1.0, True, "1", None, [1], (2,), {"a": 1}, {"b": 1}, torch.ones(1),
              torch.ones(1).double(), torch.ones(1, 1), np.ones(1), float("nan"), b"1"]  # fmt: skip
    assert len({digest(v) for v in values}) == len(values)


# ---------------------------------------------------------------------------- lines
def broken_lines(good):
    first = good[1].encode()
    record = json.loads(good[1])
    half = {**record, "size": 3}
    return {
        "not utf-8": b"\xff\xfe\n", "a number": b"3\n", "null": b"null\n", "a list": b"[]\n",
        "garbage": b"x\n", "deep": b"[" * 100_000 + b"\n", "only a number": b'{"batch": 0}\n',
        "a word": b'{"batch": "a"}\n', "another batch": first.replace(b'"batch": 0', b'"batch": 9'),
        "a negative one": first.replace(b'"batch": 0', b'"batch": -1'),
        "true": first.replace(b'"batch": 0', b'"batch": true'),
        "nothing kept": json.dumps({**record, "kept": {}}).encode() + b"\n",
        "another size": json.dumps(half).encode() + b"\n",
        "another number": first.replace(b'"first": 0', b'"first": 4'),
        "no check": json.dumps({k: v for k, v in record.items() if k != "check"}).encode() + b"\n",
        "blank": b"\n",
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    run(out, InputXGradient)
    return (out / "batches-0.jsonl").read_text().splitlines(keepends=True)


@pytest.mark.parametrize("name", list(broken_lines(["", '{"batch": 0}'])))
def test_a_broken_line_is_named(tmp_path, finished, name):
    lines = [line.encode() for line in finished]
    lines[2] = broken_lines(finished)[name]
    (tmp_path / "batches-0.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=r"line 3 of '.*batches-0.jsonl'.*delete the line"):
        run(tmp_path, InputXGradient)


def test_one_digit_of_a_result(tmp_path, finished):
    value = json.loads(finished[3])["kept"]["Input X Gradient"]["aopc"]["value"][0]
    changed = finished[3].replace(repr(value), repr(value + 0.25))
    assert changed != finished[3]
    text = "".join([*finished[:3], changed, *finished[4:]])
    (tmp_path / "batches-0.jsonl").write_text(text)
    with pytest.raises(InputError, match="line 4 of"):
        run(tmp_path, InputXGradient)


def test_a_batch_that_the_data_set_has_not(tmp_path, finished):
    (tmp_path / "batches-0.jsonl").write_text("".join(finished))
    header = json.loads(finished[0])
    header["settings"]["dataset"]["examples"] = 12  # as if the header had been another's
    (tmp_path / "batches-0.jsonl").write_text(json.dumps(header) + "\n" + "".join(finished[1:]))
    with pytest.raises(InputError, match="line 5 of .* has batch 3, but the data set has 3"):
        run(tmp_path, InputXGradient, examples()[:12])


def test_one_batch_twice(tmp_path, finished):
    (tmp_path / "batches-0.jsonl").write_text("".join(finished))
    (tmp_path / "batches-1.jsonl").write_text("".join(finished[:2]))  # the same numbers
    run(tmp_path, InputXGradient)


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "batches-0.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot read .*batches-0.jsonl"):
        run(tmp_path, InputXGradient)


# ---------------------------------------------------------------------------- writers
def test_a_second_run_on_the_folder_is_refused(tmp_path):
    code = f"""
import time
from pathlib import Path
from captum_attn.evaluation.log import only_writer
with only_writer(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another run is writing to"):
            run(tmp_path, InputXGradient)
    finally:
        other.kill()
        other.wait()
    run(tmp_path, InputXGradient)  # the lock went with its process


def test_two_threads_are_two_writers(tmp_path):
    with only_writer(tmp_path), pytest.raises(InputError, match="another run"):
        run(tmp_path, InputXGradient)


@pytest.mark.parametrize("out", [3, "", b"x", float("nan"), "a\0b"])
def test_a_directory_that_is_none(out):
    with pytest.raises(OptionError, match="out: expected a directory"):
        run(out, InputXGradient, resume=False)
