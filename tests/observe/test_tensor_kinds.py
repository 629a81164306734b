"""Inputs and weights of unusual kinds: right numbers, or an error that says what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_attn import AttentionRollout, GenericAttention, VTranM
from captum_attn.errors import InputError
from tests.zoo import ZOO

METHODS = [GenericAttention, AttentionRollout, VTranM]


@pytest.fixture
def images() -> Tensor:
    return ZOO["vit_cls"].sample().inputs


@pytest.mark.filterwarnings("ignore:.*(prototype|deprecated|beta)")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.to("meta"), "'meta', which has none; put the input on the model's device"),
        (lambda x: x.to_sparse(), "torch.sparse_coo; pass `tensor.to_dense"),
        (lambda x: x.flatten(1).to_sparse_csr(), "torch.sparse_csr"),
        (lambda x: x.to_mkldnn(), "torch._mkldnn"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "pass `tensor.dequantize"),
        (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "nested one; pad it"),
        (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn; pass it in the dtype"),
        (lambda x: x.to(torch.complex64), "pass `torch.view_as_real"),
    ],
    ids=["meta", "sparse", "csr", "mkldnn", "quantised", "nested", "fp8", "complex"],
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["tensor", "mapping"])
def test_an_input_of_an_unusual_kind(change, words, wrapped, images, left_as_found):
    model, given = ZOO["vit_cls"].model(), change(images)
    if wrapped and given.is_complex():
        pytest.skip("what stands beside the inputs in a Mapping may be complex: rotations")
    with left_as_found(model), pytest.raises(InputError, match=words):
        GenericAttention(model).attribute({"x": given} if wrapped else given, 1)


@pytest.mark.parametrize(
    "transform",
    [
        lambda explain, x: torch.func.vmap(lambda one: explain(one[None]))(x),
        lambda explain, x: torch.func.grad(lambda one: explain(one).sum())(x),
        lambda explain, x: torch.func.jvp(explain, (x,), (x,)),
    ],
    ids=["vmap", "grad", "jvp"],
)
def test_a_call_inside_a_transform(transform, images, left_as_found):
    model = ZOO["vit_cls"].model()
    with left_as_found(model), pytest.raises(InputError, match="outside of `vmap`"):
        transform(lambda x: GenericAttention(model).attribute(x, 1), images)


def test_a_fake_tensor(images):
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode().from_tensor(images)
    with pytest.raises(InputError, match="numbers can be read, got FakeTensor"):
        GenericAttention(ZOO["vit_cls"].model()).attribute(fake, 1)


def test_a_key_that_is_no_name(images):
    with pytest.raises(InputError, match="names of the model's arguments, got the key 0"):
        GenericAttention(ZOO["vit_cls"].model()).attribute({0: images}, 1)


# ------------------------------------------------------------------ weights
def test_weights_without_numbers(images):
    model = ZOO["vit_cls"].fresh().to("meta")
    with pytest.raises(InputError, match="is on 'meta' and has no numbers: load"):
        GenericAttention(model).attribute(images, 1)


def test_lazy_layers(images, left_as_found):
    model = nn.Sequential(ZOO["vit_cls"].fresh(), nn.LazyLinear(3)).eval()
    with pytest.raises(InputError, match="'weight' of a LazyLinear has no shape yet.*run the mo"):
        GenericAttention(model).attribute(images, 1)
    model(images)
    with left_as_found(model, images):
        assert GenericAttention(model).attribute(images, 1).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit_cls", "bert", "mha"])
def test_weights_made_in_inference_mode(method, name):
    """They work: the run computes with copies that may be saved for the gradient."""
    case = ZOO[name]
    model, inputs, target = case.fresh(), case.sample().inputs, case.target_of(case.sample())
    expected = method(model).attribute_tokens(inputs, target)
    with torch.inference_mode():
        loaded = copy.deepcopy(model)
        for module in loaded.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(weight.clone()))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.clone())
        flags = [p.requires_grad for p in loaded.parameters()]
    assert all(p.is_inference() for p in loaded.parameters())
    found = method(loaded).attribute_tokens(inputs, target)
    each = list(method(loaded).attribute_each(inputs, [target, target]))
    assert [p.requires_grad for p in loaded.parameters()] == flags
    assert all(p.is_inference() for p in loaded.parameters())
    assert len(each) == 2
    for stream, rows in expected.items():
        torch.testing.assert_close(found[stream], rows)


def test_a_tensor_made_in_inference_mode_that_is_no_weight(images, left_as_found):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ZOO["vit_cls"].fresh()
            with torch.inference_mode():
                self.scale = torch.full((1,), 2.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x * self.scale)

    model = Scaled().eval()
    with pytest.raises(InputError, match="under `torch.inference_mode.*neither a weight nor a buf"):
        GenericAttention(model).attribute(images, 1)


class Float8(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def float8(linear: nn.Linear) -> nn.Linear:
    made = Float8(linear.in_features, linear.out_features)
    made.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn))
    made.bias = linear.bias
    return made


def sparse(linear: nn.Linear) -> nn.Linear:
    made = copy.deepcopy(linear)
    made.weight = nn.Parameter(linear.weight.detach().to_sparse_csr())
    return made


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [float8, sparse])
def test_weights_of_an_unusual_kind(
    change: Callable[[nn.Linear], nn.Linear], method, images, left_as_found
):
    """As with the same numbers in dense float32."""
    plain = ZOO["vit_cls"].fresh()
    for block in plain.blocks:
        with torch.no_grad():
            block.mlp.fc1.weight.copy_(change(block.mlp.fc1).weight.detach().to_dense().float())
    changed = copy.deepcopy(plain)
    for block in changed.blocks:
        block.mlp.fc1 = change(block.mlp.fc1)
    expected = method(plain).attribute_tokens(images, 1)
    found = method(changed.eval()).attribute_tokens(images, 1)
    for stream, rows in expected.items():
        torch.testing.assert_close(found[stream], rows, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ buffers
class Counting(nn.Module):
    """Writes into buffers in every way, in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ZOO["vit_cls"].fresh()
        for name in ("added", "filled", "written", "viewed", "replaced", "out"):
            self.register_buffer(name, torch.zeros(4))
        self.register_buffer("none", None)
        self.gain = nn.Parameter(torch.ones(()))
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.added += 1
        self.filled.fill_(2)
        self.written[1:3] = 3
        self.viewed[:2].add_(4)
        self.replaced = self.replaced + 5
        torch.add(self.out, 6, out=self.out)
        self.none = torch.ones(2)
        self.register_buffer("new", torch.ones(3), persistent=False)
        with torch.no_grad():
            self.gain.mul_(2)
        buffers = (self.added, self.filled, self.written, self.viewed, self.replaced, self.out)
        self.seen = [float(buffer.sum()) for buffer in (*buffers, self.gain)]
        return self.model(x) * self.gain


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:the model is in train mode")
def test_whatever_a_forward_writes_is_as_it_was(training, images, left_as_found):
    """The model itself reads what it wrote."""
    model = Counting().train(training)
    written = copy.deepcopy(model)
    with torch.no_grad():
        written(images)
    seen = written.seen
    assert seen == [4, 8, 6, 8, 20, 24, 2]
    for _ in range(2):
        with left_as_found(model, images):
            GenericAttention(model).attribute(images, 1)
            found, model.seen = model.seen, []
        assert found == seen
    assert not hasattr(model, "new")
    assert model.none is None
