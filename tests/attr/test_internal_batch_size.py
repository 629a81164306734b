"""`internal_batch_size`: the same numbers, a few examples at a time."""

import pytest
import torch
from captum.attr import IntegratedGradients
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LxmertConfig,
    LxmertForQuestionAnswering,
)

import captum_attn
from captum_attn import AttentionRollout, GenericAttention, VTranM, errors
from tests.zoo import timm_vit

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
METHODS = ["RawAttention", "AttentionRollout", "GenericAttention", "VTranM"]


@pytest.fixture(scope="module")
def vit():
    return timm_vit().double()


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=40, num_hidden_layers=2, **SMALL)
    ).eval()


def counted(model):
    """The batch sizes that the model has seen."""
    sizes = []
    model.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    return sizes


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_the_same_numbers(name, size, vit, images):
    method = getattr(captum_attn, name)(vit)
    targets = torch.tensor([0, 3, 1, 2, 2])
    whole = method.attribute(images, targets)
    close(method.attribute(images, targets, internal_batch_size=size), whole)
    tokens = method.attribute_tokens(images, targets, internal_batch_size=size)
    close(tokens, method.attribute_tokens(images, targets))


def test_no_more_examples_at_a_time():
    model = timm_vit()
    sizes = counted(model)
    GenericAttention(model).attribute(torch.randn(5, 3, 16, 16), 1, internal_batch_size=2)
    assert max(sizes) == 2 and sum(sizes) == 5


@pytest.mark.parametrize(
    "target", [2, (2,), torch.tensor(2), torch.tensor([2]), [0, 1, 2, 3, 0], [(1,)] * 5]
)
def test_every_form_of_a_target_is_divided(target, vit, images):
    method = GenericAttention(vit)
    expected = method.attribute(images, target)
    close(method.attribute(images, target, internal_batch_size=2), expected)


def test_what_belongs_to_an_example_goes_with_it(vit, images):
    def scaled(x, factor, flag):
        assert flag == "plain" and len(factor) == len(x)
        return vit(x) * factor

    method = GenericAttention(scaled)
    factor = torch.tensor([1.0, -1, 2, 1, -3])[:, None].double()
    rows = torch.tensor([0, 4, 2, 7, 1])
    options = {"additional_forward_args": (factor, "plain"), "readout": rows}
    expected = method.attribute(images, 1, **options)
    close(method.attribute(images, 1, internal_batch_size=3, **options), expected)


def test_words_and_their_mask(bert):
    inputs = {"input_ids": torch.randint(40, (5, 7)), "attention_mask": torch.ones(5, 7).long()}
    inputs["attention_mask"][3:, 4:] = 0
    method = AttentionRollout(bert.double())
    expected = method.attribute(inputs)
    found = method.attribute(inputs, internal_batch_size=2)
    assert list(found) == list(expected)
    close(found["input_ids"], expected["input_ids"])


def test_two_streams():
    torch.manual_seed(0)
    config = LxmertConfig(vocab_size=40, num_qa_labels=6, visual_feat_dim=8, l_layers=1, x_layers=1,
                          r_layers=1, **SMALL)  # fmt: skip
    method = GenericAttention(LxmertForQuestionAnswering(config).double().eval())
    regions, boxes = torch.randn(3, 4, 8).double(), torch.rand(3, 4, 4).double()
    words = torch.randint(40, (3, 5))
    inputs = {"input_ids": words, "visual_feats": regions, "visual_pos": boxes}
    found = method.attribute(inputs, 2, internal_batch_size=1)
    for name, expected in method.attribute(inputs, 2).items():
        close(found[name], expected)


def test_a_tuple_keeps_its_form(vit, images):
    method = GenericAttention(lambda x, y: vit(x + 0 * y))  # y enters nowhere
    found = method.attribute((images, images), 1, internal_batch_size=2)
    assert isinstance(found, tuple)
    close(found, method.attribute((images, images), 1))
    assert found[0].abs().sum() > 0 == found[1].abs().sum()


def test_like_captums(vit, images):
    """The argument has Captum's name and meaning."""
    ours, theirs = GenericAttention(vit), IntegratedGradients(vit)
    for method in (ours, theirs):
        close(
            method.attribute(images, target=1, internal_batch_size=2),
            method.attribute(images, target=1),
        )


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_no_number(size, vit, images):
    with pytest.raises(errors.OptionError, match="internal_batch_size: expected an int >= 1"):
        GenericAttention(vit).attribute(images, 1, internal_batch_size=size)


@pytest.mark.parametrize("target", [[1, 2, 3], [1] * 6, torch.tensor([1, 2])])
def test_targets_for_other_examples(target, vit, images):
    with pytest.raises(errors.TargetError, match="expected one for each of 5 examples"):
        VTranM(vit).attribute(images, target, internal_batch_size=2)


def test_rows_that_belong_to_no_example(bert):
    inputs = {"input_ids": torch.randint(40, (4, 7)), "position_ids": torch.arange(7)[None]}
    with pytest.raises(errors.InputError, match="'position_ids' has 1 rows .* 4 examples"):
        GenericAttention(bert).attribute(inputs, 1, internal_batch_size=2)
