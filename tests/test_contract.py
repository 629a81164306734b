"""The contract table: what every method owes to every model of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_attn import AttentionRollout, GenericAttention, RawAttention
from captum_attn.errors import AttnError
from tests.conftest import skip_unless_double_runs
from tests.zoo import CASES, TWINS, ZOO, Case, Sample, output_tensor, patches

METHODS = {method.__name__: method for method in (RawAttention, AttentionRollout, GenericAttention)}
NAMES = [case.name for case in CASES]
PADDED = [case.name for case in CASES if case.padded]
every_method = pytest.mark.parametrize("method", METHODS)
every_model = pytest.mark.parametrize("name", NAMES)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance`, relative to the largest entry where that is above 1."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        found, expected, atol=tolerance * scale, rtol=tolerance, check_dtype=False
    )


def explainer(case: Case, method: str, model: nn.Module | None = None) -> Any:
    return METHODS[method](case.function(case.model() if model is None else model))


def arguments(case: Case, sample: Sample) -> tuple:
    return sample.inputs, case.target_of(sample), sample.extra


def tokens_of(case: Case, method: str, sample: Sample, **options: Any) -> Tensor:
    tokens = explainer(case, method).attribute_tokens(*arguments(case, sample), **options)
    assert set(tokens) == {case.stream}
    return tokens[case.stream]


def readout_weights(case: Case, sample: Sample) -> Tensor:
    """(B, n), also where the table gives one row."""
    readout = case.readout_of(case.model(), sample)
    if isinstance(readout, Tensor):
        return readout
    batch = case.content_of(sample.inputs).shape[0]
    n = case.tokens if sample.real is None else sample.real.shape[1]
    return F.one_hot(torch.tensor(readout), n).float().expand(batch, n).clone()


@cache
def explained(name: str, method: str) -> tuple[Any, Tensor]:
    """-> attributions with `interpolation="nearest"`, token relevance; of the batch of three."""
    case = ZOO[name]
    sample = case.sample()
    torch.manual_seed(0)
    explain = explainer(case, method)
    attributions = explain.attribute(*arguments(case, sample), interpolation="nearest")
    tokens = explain.attribute_tokens(*arguments(case, sample))
    assert set(tokens) == {case.stream}
    return attributions, tokens[case.stream]


# Of every kind one; the others are slow.
SEASONED = ("vit_cls", "hf_vit_eager", "bert", "gpt2_left", "llama_right", "ast_overlapping")


def other_lengths(case: Case) -> Sample:
    """One example, shorter than the batch that is explained where the model takes such."""
    return case.collate(case.raw(3, seed=1)[1:2])


def seasoned(names: list[str]) -> list[Any]:
    return [n if n in SEASONED else pytest.param(n, marks=pytest.mark.slow) for n in names]


@every_method
@pytest.mark.parametrize("name", seasoned(NAMES))
def test_an_object_that_has_seen_another_length_explains_alike(name: str, method: str) -> None:
    case = ZOO[name]
    sample, explain = case.sample(), explainer(case, method)
    attributions, tokens = explained(name, method)
    explain.attribute_tokens(*arguments(case, other_lengths(case)))
    for _ in range(2):
        torch.manual_seed(0)
        found = explain.attribute(*arguments(case, sample), interpolation="nearest")
        for one, other in zip(_values(found), _values(attributions), strict=True):
            close(one, other, 1e-6)
        if not case.random:  # it draws its tokens' order
            close(explain.attribute_tokens(*arguments(case, sample))[case.stream], tokens, 1e-6)


def _values(attributions: Any) -> list[Tensor]:
    if isinstance(attributions, Tensor):
        return [attributions]
    return list(attributions.values() if isinstance(attributions, Mapping) else attributions)


@pytest.mark.parametrize("name", seasoned(NAMES))
def test_the_same_in_double(name: str) -> None:
    case = ZOO[name]
    model = case.fresh().double()
    sample, other = (s.to(torch.float64) for s in (case.sample(), other_lengths(case)))
    skip_unless_double_runs(lambda: sample.run(case.function(model)))
    fresh, explain = (explainer(case, "GenericAttention", model) for _ in range(2))
    explain.attribute_tokens(*arguments(case, other))
    torch.manual_seed(0)
    expected = fresh.attribute_tokens(*arguments(case, sample))[case.stream]
    torch.manual_seed(0)
    close(explain.attribute_tokens(*arguments(case, sample))[case.stream], expected, 1e-10)


# ------------------------------------------------------------------ the table itself
class Counter(TorchFunctionMode):
    """Counts attention without the library. Each softmax of the zoo is one of attention."""

    ATTENTION = (
        F.scaled_dot_product_attention, F.multi_head_attention_forward, F.softmax, torch.softmax,
        Tensor.softmax,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += func in self.ATTENTION
        return func(*args, **(kwargs or {}))


@every_model
def test_the_table_counts_the_attention_calls(name: str) -> None:
    case = ZOO[name]
    with torch.no_grad(), Counter() as counter:
        case.sample().run(case.function(case.model()))
    assert counter.count == case.calls


@pytest.mark.parametrize("twin", TWINS)
def test_twins_compute_the_same(twin: str) -> None:
    outputs = []
    for name in TWINS[twin]:
        case = ZOO[name]
        sample = case.sample()
        with torch.no_grad():
            output = output_tensor(sample.run(case.function(case.model())))
        outputs.append(output[sample.real] if output.ndim == 3 else output)
    for output in outputs[1:]:
        close(output, outputs[0])


# ------------------------------------------------------------------ results
@every_method
@every_model
def test_result(name: str, method: str) -> None:
    """Container, shape, dtype, finite, and relevance that attention brought to each example."""
    case = ZOO[name]
    sample = case.sample()
    attributions, tokens = explained(name, method)

    mapping = isinstance(sample.inputs, Mapping)
    assert type(attributions) is (dict if mapping else type(sample.inputs))
    content = case.content_of(attributions)
    assert content.shape == case.content_of(sample.inputs).shape
    assert tokens.shape == (len(content), case.tokens)
    for values in (content, tokens):
        assert values.dtype == torch.float32
        assert not values.requires_grad
        assert values.isfinite().all()
        assert (values.flatten(1).abs().amax(1) > 0).all()
    # GAE and rollout start from the identity: without attention the readout weights come out
    brought = (tokens - readout_weights(case, sample)).abs().amax(1)
    assert (brought > 1e-3 * tokens.abs().amax(1)).all()


@every_method
@pytest.mark.parametrize("name", [case.name for case in CASES if case.grid is not None])
def test_relevance_lies_where_the_tokens_are(name: str, method: str) -> None:
    case = ZOO[name]
    attributions, tokens = explained(name, method)
    content = case.content_of(attributions)
    total = content if case.channel is None else content.sum(case.channel)
    close(total, case.grid(tokens, content.shape), 1e-6)  # type: ignore[misc]
    if case.channel is not None:  # in equal shares
        share = (total / content.shape[case.channel]).unsqueeze(case.channel)
        close(content, share.expand_as(content), 1e-6)


@pytest.mark.parametrize("name", ["vit_cls", "vit_oblong", "vit_one_channel"])
def test_bilinear_is_the_default_and_torch_s_own(name: str) -> None:
    case = ZOO[name]
    sample = case.sample()
    attributions = explainer(case, "GenericAttention").attribute(*arguments(case, sample))
    size = attributions.shape[-2:]
    nearest, _ = explained(name, "GenericAttention")
    patch = case.model().patch_embed.patch_size  # type: ignore[union-attr]
    grid = nearest.sum(1, keepdim=True)[..., :: patch[0], :: patch[1]]
    expected = F.interpolate(grid, size, mode="bilinear", align_corners=False)
    close(attributions.sum(1, keepdim=True), expected)
    assert (attributions - nearest).abs().max() > 1e-4


MASKS = {
    "bert": {"input_ids"},
    "bert_types_and_positions": {"input_ids"},
    "gpt2_left": {"input_ids"},
    "bert_embeddings_mapping": {"inputs_embeds"},
    "hf_vit_eager": {"pixel_values"},
    "vilt": {"input_ids", "pixel_values"},
    "wav2vec2": {"input_values"},
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_positions_and_token_types_get_no_entry(name: str) -> None:
    assert set(explained(name, "GenericAttention")[0]) == MASKS[name]


@every_method
@every_model
def test_batch_equals_one_by_one(name: str, method: str) -> None:
    case = ZOO[name]
    sample = case.sample()
    attributions, tokens = explained(name, method)
    for i in range(3):
        single = sample.one(i)
        if isinstance(target := case.target_of(sample), list):
            single_target = target[i : i + 1]
        else:
            single_target = target
        explain = explainer(case, method)
        got = explain.attribute(single.inputs, single_target, single.extra, interpolation="nearest")
        close(case.content_of(got), case.content_of(attributions)[i : i + 1])
        if i == 1:
            alone = explain.attribute_tokens(single.inputs, single_target, single.extra)
            close(alone[case.stream], tokens[i : i + 1])


@every_method
@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing(name: str, method: str) -> None:
    """A padded example is explained as it is alone, and padding gets no relevance."""
    case = ZOO[name]
    sample = case.sample()
    _, tokens = explained(name, method)
    assert sample.real is not None and not sample.real.all()
    for i, example in enumerate(case.raw()):
        trimmed = case.collate([example])
        assert trimmed.real is not None and trimmed.real.all()
        target = case.target_of(trimmed)
        if isinstance(target, list):  # the same token, at its place in the shorter text
            target = [(target[0][0], case.target_of(sample)[i][1])]
        alone = explainer(case, method).attribute_tokens(trimmed.inputs, target, trimmed.extra)
        close(tokens[i][sample.real[i]], alone[case.stream][0])
        assert (tokens[i][~sample.real[i]] == 0).all()


@every_method
@every_model
def test_auto_readout_is_what_the_head_reads(name: str, method: str) -> None:
    """ "auto" against the rows and weights that the table gives, and against the final matrix."""
    case = ZOO[name]
    sample = case.sample()
    _, tokens = explained(name, method)
    close(tokens_of(case, method, sample, readout=case.readout_of(case.model(), sample)), tokens)

    maps = explainer(case, method).relevance_maps(*arguments(case, sample))
    assert set(maps) == {(case.stream, case.stream)}
    weights = readout_weights(case, sample)
    close((weights[:, None] @ maps[case.stream, case.stream])[:, 0], tokens)


@pytest.mark.parametrize("name", [c.name for c in CASES if not callable(c.target)])
def test_only_gae_asks_for_the_target(name: str) -> None:
    case = ZOO[name]
    sample = case.sample()

    def explain(method: str, target: int) -> Tensor:
        tokens = explainer(case, method).attribute_tokens(sample.inputs, target, sample.extra)
        return tokens[case.stream]

    asked, other = (explain("GenericAttention", target) for target in (1, 0))
    assert ((asked - other).abs().amax(1) > 1e-4 * asked.abs().amax(1)).all()
    if isinstance(case.readout, int):
        for method in ("RawAttention", "AttentionRollout"):
            close(explain(method, 0), explained(name, method)[1])


# ------------------------------------------------------------------ every attention call is seen
@every_method
@every_model
def test_every_attention_call_is_seen(name: str, method: str) -> None:
    case = ZOO[name]
    sample = case.sample()
    explain = explainer(case, method)
    maps = explain.layer_maps(*arguments(case, sample))
    assert len(maps) == case.calls
    for _, weighted in maps:
        assert weighted.ndim >= 4
        assert weighted.isfinite().all()
        assert weighted.abs().max() > 0
    if method == "RawAttention" and name not in ("talking_heads", "sinks", "mha_extra_keys"):
        rows = torch.ones(weighted.shape[:-1])
        for _, weighted in maps:
            total = weighted.sum(-1)
            if sample.real is None:
                close(total, rows)
            else:  # what a padding token asks is the kernel's own affair
                close(total.movedim(-1, 1)[sample.real], rows.movedim(-1, 1)[sample.real])


@pytest.mark.parametrize("name", [case.name for case in CASES if case.attention])
def test_describe_names_the_calls(name: str) -> None:
    case = ZOO[name]
    table = str(explainer(case, "GenericAttention").describe(*arguments(case, case.sample())))
    for module in case.attention:
        assert module in table
    assert case.stream in table
    assert sum("attn" in line or "attention" in line for line in table.splitlines()) >= case.calls


@pytest.mark.parametrize("twin", ["hf_vit", "bert", "gpt2", "llama", "clip_text", "clip_vision"])
def test_maps_are_those_of_transformers(twin: str) -> None:
    """A, for the eager and for the fused form, is what `output_attentions` gives."""
    eager = next(ZOO[name] for name in TWINS[twin] if name.endswith("_eager"))
    sample = eager.sample()
    model = eager.model()
    with torch.no_grad():
        if isinstance(sample.inputs, Mapping):
            expected = model(**sample.inputs, output_attentions=True).attentions
        else:
            expected = model(sample.inputs, output_attentions=True).attentions
    assert len(expected) == eager.calls
    for name in TWINS[twin]:
        case = ZOO[name]
        maps = explainer(case, "RawAttention").layer_maps(*arguments(case, case.sample()))
        for (_, found), A in zip(maps, expected, strict=True):
            found, A = found.movedim(2, 1), A.movedim(2, 1)  # (B, q, H, k)
            close(found if sample.real is None else found[sample.real],
                  A if sample.real is None else A[sample.real])  # fmt: skip


@every_method
@pytest.mark.parametrize("twin", TWINS)
def test_twins_are_explained_alike(twin: str, method: str) -> None:
    assert len(TWINS[twin]) > 1
    first, *others = (explained(name, method)[1] for name in TWINS[twin])
    for tokens in others:
        close(tokens, first)


@pytest.mark.parametrize("name", TWINS["inline"])
def test_inline_forms_against_the_equations(name: str) -> None:
    """Every way of writing attention, against the papers' equations on autograd's own A."""
    plain = ZOO["by_matmul"].fresh().double()
    sample = ZOO["by_matmul"].sample().to(torch.float64)
    record: list[Tensor] = []
    for block in plain.blocks:  # type: ignore[union-attr]
        block.attention.record = record
    plain(sample.inputs)[:, 1].sum().backward()

    identity = torch.eye(6, dtype=torch.float64)
    gae, rollout = identity.expand(3, 6, 6), identity.expand(3, 6, 6)
    for A in record:
        assert A.grad is not None
        gae = gae + (A.grad * A.detach()).clamp(min=0).mean(1) @ gae
        A_hat = A.detach().mean(1) + identity
        rollout = A_hat / A_hat.sum(-1, keepdim=True) @ rollout
    expected = {
        "GenericAttention": gae[:, 0],
        "AttentionRollout": rollout[:, 0],
        "RawAttention": record[-1].detach().mean(1)[:, 0],
    }
    case = ZOO[name]
    model = case.fresh().double()
    for method, tokens in expected.items():
        found = METHODS[method](model).attribute_tokens(sample.inputs, target=1)["vectors"]
        assert found.dtype == torch.float64
        close(found, tokens, 1e-6 if name == "by_casts" else 1e-10)


# ------------------------------------------------------------------ dtypes
@pytest.mark.parametrize("method", ["AttentionRollout", "GenericAttention"])
@every_model
def test_double_models_are_explained_in_double(name: str, method: str) -> None:
    case = ZOO[name]
    model = case.fresh().double()
    sample = case.sample().to(torch.float64)
    skip_unless_double_runs(lambda: sample.run(case.function(model)))
    explain = explainer(case, method, model)
    attributions = explain.attribute(*arguments(case, sample), interpolation="nearest")
    content = case.content_of(attributions)
    assert content.dtype == torch.float64
    close(content, case.content_of(explained(name, method)[0]).double(), 1e-4)


HALF = ["vit_cls", "bert", "gpt2_right", "llama_right", "by_sdpa", "by_matmul", "masked_fill"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", HALF)
@every_method
def test_half_precision_models_are_explained_in_single(
    name: str, method: str, dtype: torch.dtype
) -> None:
    case = ZOO[name]
    model = case.fresh().to(dtype)
    sample = case.sample().to(dtype)
    attributions = explainer(case, method, model).attribute(
        *arguments(case, sample), interpolation="nearest"
    )
    content = case.content_of(attributions)
    expected = case.content_of(explained(name, method)[0])
    assert content.dtype == torch.float32
    close(content, expected, 0.1 if dtype == torch.bfloat16 else 0.02)


# ------------------------------------------------------------------ nothing is left behind
@every_method
@every_model
def test_model_is_observed_and_left_alone(
    name: str, method: str, left_as_found: Any, in_use: Any
) -> None:
    """The output under observation is the model's own, and afterwards all is as before."""
    case = ZOO[name]
    model, sample = case.model(), case.sample()
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(
        lambda module, args, output: outputs.append(output_tensor(output).detach().clone())
    )
    try:
        with torch.no_grad():
            sample.run(case.function(model))
        plain = outputs.pop()
        with in_use(model), left_as_found(model, sample.inputs, sample.extra):
            explainer(case, method).attribute(*arguments(case, sample))
    finally:
        hook.remove()
    assert outputs
    # what the fast path of torch leaves at padding is its own affair
    rows = sample.real if plain.ndim == 3 and sample.real is not None else slice(None)
    for output in outputs:
        scale = float(plain.abs().max())
        torch.testing.assert_close(output[rows], plain[rows], rtol=1e-5, atol=1e-5 * scale)


class Failure(Exception):
    """Raised inside the model."""


def middle_module(case: Case, model: nn.Module, sample: Sample) -> nn.Module:
    """A leaf module halfway through the forward run."""
    ran: list[nn.Module] = []
    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_pre_hook(lambda m, _: ran.append(m)) for leaf in leaves]
    sample.run(case.function(model))
    for hook in hooks:
        hook.remove()
    return ran[len(ran) // 2]


def fail_in_the_model(case: Case, explain: Any, sample: Sample, module: nn.Module) -> None:
    def fail(module: nn.Module, args: tuple) -> None:
        raise Failure

    hook = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(Failure):
            explain.attribute(*arguments(case, sample))
    finally:
        hook.remove()


def fail_at_the_target(case: Case, explain: Any, sample: Sample, module: nn.Module) -> None:
    with pytest.raises((AttnError, IndexError, AssertionError)) as error:
        explain.attribute(sample.inputs, 10**6, sample.extra)
    assert any(word in str(error.value).lower() for word in ("target", "bound", "range"))


def fail_in_the_objective(case: Case, explain: Any, sample: Sample, module: nn.Module) -> None:
    def interrupted(output: Tensor, target: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain.attribute(*arguments(case, sample), objective=interrupted)


FAILURES = [fail_in_the_model, fail_at_the_target, fail_in_the_objective]
FEW = ["vit_cls", "bert", "gpt2_left", "vilt", "encoder_mean", "mha", "by_einsum"]


@pytest.mark.parametrize(
    ("name", "method", "failure"),
    [(name, "GenericAttention", failure) for name in NAMES for failure in FAILURES]
    # a class-agnostic method need not ask the objective
    + [
        (name, method, failure)
        for name in FEW
        for method in ("RawAttention", "AttentionRollout")
        for failure in FAILURES[:2]
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_failure_leaves_no_trace(
    name: str, method: str, failure: Callable, left_as_found: Any, in_use: Any
) -> None:
    case = ZOO[name]
    model, sample = case.model(), case.sample()
    explain = explainer(case, method)
    module = middle_module(case, model, sample)
    with in_use(model), left_as_found(model, sample.inputs, sample.extra):
        failure(case, explain, sample, module)
    # neither in the model nor in the attribution object
    tokens = explain.attribute_tokens(*arguments(case, sample))[case.stream]
    close(tokens, explained(name, method)[1])


# ------------------------------------------------------------------ ViLT: probed in every call
def test_vilt_is_mapped_back_from_every_permutation() -> None:
    case = ZOO["vilt"]
    model, sample = case.model(), case.sample()
    entered: list[Tensor] = []
    hook = model.vilt.encoder.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda module, args, kwargs: entered.append(
            (args[0] if args else kwargs["hidden_states"]).detach().clone()
        ),
        with_kwargs=True,
    )
    explain = GenericAttention(model)
    try:
        found = []
        for seed in (0, 1, 2):
            torch.manual_seed(seed)
            found.append(explain.attribute(sample.inputs, 1, interpolation="nearest"))
    finally:
        hook.remove()
    assert (entered[0] - entered[-1]).abs().max() > 0.1  # the order really changed
    for attributions in found[1:]:
        close(attributions["input_ids"], found[0]["input_ids"])
        close(attributions["pixel_values"], found[0]["pixel_values"])
    tokens = explained("vilt", "GenericAttention")[1]
    text = sample.inputs["input_ids"].shape[1]
    close(found[0]["input_ids"], tokens[:, :text])
    laid = patches(4, 4, text + 1)(tokens, sample.inputs["pixel_values"].shape)
    close(found[0]["pixel_values"].sum(1), laid)


@pytest.mark.parametrize("seed", range(5))
@every_method
@pytest.mark.filterwarnings("ignore:parts of 'pixel_values'")
def test_vilt_with_images_of_different_sizes(method: str, seed: int) -> None:
    """A smaller image is explained as it is alone, and the pixels beyond it get nothing.

    The model fills the smaller one up with masked patches, some of them drawn more than once.
    """
    case = ZOO["vilt"]
    sample = case.sample(batch=2)
    inputs = dict(sample.inputs)
    inputs["pixel_values"], inputs["pixel_mask"] = (
        inputs[name].clone() for name in ("pixel_values", "pixel_mask")
    )
    inputs["pixel_values"][1, ..., 12:] = 0
    inputs["pixel_mask"][1, :, 12:] = 0
    explain = explainer(case, method)
    torch.manual_seed(seed)
    both = explain.attribute(inputs, 1, interpolation="nearest")["pixel_values"]

    n = int(inputs["attention_mask"][1].sum())
    alone = {name: value[1:] for name, value in inputs.items()}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        alone[name] = alone[name][:, :n]
    for name in ("pixel_values", "pixel_mask"):
        alone[name] = alone[name][..., :12]
    single = explain.attribute(alone, 1, interpolation="nearest")["pixel_values"]
    close(both[1:, ..., :12], single)
    assert (both[1, ..., 12:] == 0).all()


# ------------------------------------------------------------------ layers and start_layer
@every_method
@pytest.mark.parametrize(
    ("name", "last"),
    [("vit_cls", "blocks.2*"), ("bert", "*layer.1.*"), ("gpt2_right", "*h.1*"),
     ("masked_fill", "blocks.1*")],
)  # fmt: skip
def test_layers_and_start_layer_agree(name: str, last: str, method: str) -> None:
    case = ZOO[name]
    sample = case.sample()
    started = tokens_of(case, method, sample, start_layer=case.calls - 1)
    confined = METHODS[method](case.function(case.model()), layers=[last])
    tokens = confined.attribute_tokens(*arguments(case, sample))[case.stream]
    close(tokens, started)
    if method == "RawAttention":
        close(tokens, explained(name, method)[1])
    else:
        assert (tokens - explained(name, method)[1]).abs().max() > 1e-3
