"""An object that has seen inputs of other lengths explains as one that has seen none.

The traps are models that treat some lengths, some batches or some inputs differently, so that what
was found of one run is wrong of the next.
"""

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

from captum_attn import (
    AttentionFlow,
    AttentionRollout,
    GenericAttention,
    RawAttention,
    VTranM,
)
from captum_attn.errors import AttnError
from captum_attn.observe.tracing import token_tracer
from tests.observe.test_traps import DIM, Trap, random, ready
from tests.plain import close
from tests.zoo import ZOO
from tests.zoo_streams import STREAMS

CASES = {**ZOO, **STREAMS}


class Layers(Trap):
    """Two attention layers with a residual; a subclass says what lies between them."""

    def __init__(self):
        super().__init__("first", "second")
        self.mlp = nn.Linear(DIM, DIM)

    def between(self, x):
        return x

    def mask(self, x):
        return None

    def forward(self, x):
        x = x + self.first(x, x, mask=self.mask(x))
        x = self.between(x + self.mlp(x).tanh())
        x = x + self.second(x, x, mask=self.mask(x))
        return self.head(x[:, 0])


class RollsLong(Layers):
    """As windows that are shifted where there are several."""

    def between(self, x):
        return x.roll(2, 1) if x.shape[1] > 6 else x


class TurnsEven(Layers):
    def between(self, x):
        return x.flip(1) if x.shape[1] % 2 == 0 else x


class PermutesLong(Layers):
    """By a product with a matrix: at short lengths it is the identity, in the same graph."""

    def between(self, x):
        n = x.shape[1]
        order = torch.arange(n).roll(n // 6)
        return torch.eye(n, dtype=x.dtype)[order] @ x


class PoolsLong(Layers):
    def between(self, x):
        n = x.shape[1]
        return x.unflatten(1, (n // 2, 2)).mean(2) if n > 6 else x


class Convolves(Layers):
    """Over three tokens; of a single one the convolution sees nothing else."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(DIM, DIM, 3, padding=1)

    def between(self, x):
        return self.convolution(x.mT).mT


class Windows(Layers):
    """Tokens see their neighbours alone."""

    def mask(self, x):
        places = torch.arange(x.shape[1])
        return (places[:, None] - places).abs() <= 2


class TurnsSome(Layers):
    """What the input holds decides, not its size."""

    def between(self, x):
        return x.flip(1) if bool(x[0, 0, 0] > 0) else x


def text(n, batch=1, seed=0):
    return random(batch, n, DIM, seed=seed)


LENGTHS = [text(n) for n in (4, 8, 5, 10, 4)]
TRAPS = {
    "rolls long inputs": (RollsLong, LENGTHS),
    "turns inputs of even length": (TurnsEven, LENGTHS),
    "permutes long inputs by a product": (PermutesLong, LENGTHS),
    "pools long inputs": (PoolsLong, LENGTHS),
    "convolves, one token first": (Convolves, [text(1), text(2), text(7), text(1)]),
    "convolves, long inputs first": (Convolves, [text(7), text(1)]),
    "sees neighbours": (Windows, [text(3), text(9), text(4)]),
    "turns some inputs": (TurnsSome, [text(5, seed=s) for s in range(6)]),
    "batches of other sizes": (Layers, [text(5, b) for b in (1, 3, 2, 5, DIM, 1)]),
    "as many tokens as channels": (Layers, [text(n, b) for n in (DIM, 2) for b in (1, 2, DIM)]),
}
METHODS = (GenericAttention, VTranM, AttentionRollout)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("trap", TRAPS)
def test_what_was_seen_before_changes_no_number(trap, method):
    kind, inputs = TRAPS[trap]
    model = ready(kind)
    seasoned = method(model)
    for x in inputs:
        found, expected = outcome(seasoned, x), outcome(method(model), x)
        if isinstance(expected, str):
            assert found == expected
        else:
            close(found, expected)


def outcome(method, x):
    """The relevance, or why there is none."""
    try:
        return method.attribute(x, target=1)
    except AttnError as error:
        return str(error)


def test_some_inputs_are_turned_and_some_are_not():
    model = ready(TurnsSome)
    assert len({turns(model, text(5, seed=s)) for s in range(6)}) == 2


class Blanks(Layers):
    """Tokens that begin with zero are padding, overwritten in place before the mean."""

    def forward(self, x):
        padding = x[..., 0] == 0
        x = x + self.first(x, x)
        x = self.mlp(x + self.second(x, x))  # a view of the product, which holds no mask itself
        x[padding] = 0.0
        return self.head(x.sum(1) / (~padding).sum(1, keepdim=True))


@pytest.mark.parametrize("method", [AttentionRollout, GenericAttention])
def test_padding_that_is_overwritten_in_place_is_seen_in_every_run(method):
    """What is read of an example without padding is not taken for what is read of one with it."""
    model = ready(Blanks)
    whole, padded = text(5), text(5, seed=1)
    padded[:, 3:] = 0.0
    seasoned = method(model)
    seasoned.attribute(whole, 1)
    close(seasoned.attribute(padded, 1), method(model).attribute(padded, 1), 1e-10)


# ---------------------------------------------------------------------------- without a graph
class Notes(Layers):
    """Writes down whether gradients are on between its layers."""

    def between(self, x):
        self.with_graph = torch.is_grad_enabled()
        return x


class Trades(Layers):
    """What the inputs hold decides which of two the second layer asks from: by no function."""

    def forward(self, x, y):
        x, y = x + self.first(x, x), self.mlp(y)
        one, other = (x, y) if bool(x[0, 0, 0] > 0) else (y, x)
        one = one + self.second(one, other)
        return self.head(one[:, 0])


class Picks(Layers):
    """What the input holds decides which of two equal layers runs first: by no function."""

    def forward(self, x):
        one, other = self.first, self.second
        if bool(x[0, 0, 0] > 0):
            one, other = other, one
        x = x + one(x, x)
        return self.head((x + other(x, x))[:, 0])


@pytest.mark.parametrize("method", [AttentionRollout, RawAttention, AttentionFlow])
def test_a_known_structure_runs_without_a_graph(method):
    model = ready(Notes)
    seasoned = method(model)
    seasoned.attribute(text(5), target=1)
    assert model.with_graph
    found = seasoned.attribute(text(5, seed=1), target=1)
    assert not model.with_graph
    close(found, method(model).attribute(text(5, seed=1), target=1), 1e-10)
    assert torch.is_grad_enabled()


def test_a_known_structure_is_told_by_the_weights_that_are_used():
    """Else `layers` would name one layer and leave out the other."""
    model = ready(Picks)
    seasoned = AttentionRollout(model, layers="first")
    for seed in range(6):
        found = seasoned.attribute_tokens(text(5, seed=seed), target=1)["x"]
        fresh = AttentionRollout(model, layers="first")
        assert torch.equal(found, fresh.attribute_tokens(text(5, seed=seed), target=1)["x"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.random])
def test_a_known_run_is_the_observed_one_bit_for_bit(name):
    """Else what a resumed evaluation finds would depend on where it was cut."""
    case, sample = CASES[name], CASES[name].sample()
    explain = AttentionRollout(case.function(case.model()))
    asked = {"target": case.target_of(sample), "objective": getattr(case, "objective", None)}
    first, again = (
        explain.attribute_tokens(sample.inputs, additional_forward_args=sample.extra, **asked)
        for _ in range(2)
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(first[stream], again[stream]) for stream in first)


def test_a_known_structure_is_told_by_where_tensors_come_from():
    """Not by the functions alone, and in any order of the inputs."""
    model = ready(Trades)
    seasoned = AttentionRollout(model)
    for seed in range(6):
        inputs = text(5, seed=seed), text(5, seed=seed + 6)
        found = seasoned.attribute_tokens(inputs, target=1)
        expected = AttentionRollout(model).attribute_tokens(inputs, target=1)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def turns(model, x):
    flipped = []
    between = model.between
    model.between = lambda t: (flipped.append(bool(t[0, 0, 0] > 0)), between(t))[1]
    model(x)
    del model.between
    return flipped[0]


# ---------------------------------------------------------------------------- how often it asks
@pytest.fixture
def questions(monkeypatch):
    """The backward passes by which tokens are traced."""
    asked, plain = [], token_tracer.gradients
    monkeypatch.setattr(
        token_tracer, "gradients", lambda *a, **k: (asked.append(1), plain(*a, **k))[1]
    )
    return asked


class Deep(Trap):
    """Several layers that work token by token beside their attention."""

    def __init__(self, depth):
        super().__init__(*(f"layer_{i}" for i in range(depth)))
        self.mlp, self.norm = nn.Linear(DIM, DIM), nn.LayerNorm(DIM)
        self.depth = depth

    def forward(self, x):
        for i in range(self.depth):
            y = self.norm(x)
            x = x + getattr(self, f"layer_{i}")(y, y)
            x = x + self.mlp(self.norm(x)).relu()
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_layers_that_work_token_by_token_are_not_asked(method, questions):
    """Only how the input enters is asked for, however many layers there are."""
    method(ready(Deep, 2)).attribute(text(5), target=1)
    few = len(questions)
    questions.clear()
    method(ready(Deep, 6)).attribute(text(5), target=1)
    assert len(questions) == few < 20


def test_describe_says_whether_a_run_was_observed_or_known():
    method = GenericAttention(ready(TurnsEven))
    for x, known in ((text(5), False), (text(4), False), (text(5, seed=1), True)):
        table = method.describe(x, target=1)
        assert table.known == known
        last = "structure: known from an earlier run" if known else "structure: observed"
        assert str(table).splitlines()[-1] == last


# ---------------------------------------------------------------------------- copies
def _explained(method, x, results):
    results.put(method.attribute(x, target=1).tolist())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["vit_cls", "ast", "bert"])
def test_a_copy_knows_what_the_object_knew(name, copied, questions):
    case = ZOO[name]
    sample = case.sample()
    method = GenericAttention(case.fresh())
    given = sample.inputs, case.target_of(sample), sample.extra
    before = method.attribute_tokens(*given)
    assert questions or name == "bert"
    questions.clear()
    after = copied(method).attribute_tokens(*given)
    assert not questions
    assert before.keys() == after.keys()
    assert all(torch.equal(before[stream], after[stream]) for stream in before)


@pytest.mark.slow
def test_a_worker_process_explains_alike():
    method, x = GenericAttention(ready(RollsLong)), text(8)
    method.attribute(text(5), target=1)
    expected = method.attribute(x, target=1)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=_explained, args=(method, x, results))
    worker.start()
    found = torch.tensor(results.get(timeout=120), dtype=x.dtype)
    worker.join()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
