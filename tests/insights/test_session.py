"""What the dashboard computes: the numbers of the methods themselves, of the chosen example."""

from __future__ import annotations

import inspect
import itertools
import re

import pytest
import torch
from captum.attr import IntegratedGradients

from captum_attn import GenericAttention, HeterogenousAttention
from captum_attn.errors import InputError, OptionError
from captum_attn.insights import Batch, EmptyFeature, GeneralFeature, ImageFeature
from captum_attn.insights.methods import METHODS, OF_WORDS, help_of, options_of
from captum_attn.insights.session import Session
from tests.insights.models import (
    CLASSES,
    PATCH,
    TEXT_BATCH,
    TinyPair,
    TinyText,
    TinyViT,
    ids_of,
    images,
    made,
    photo,
    softmax,
    text,
)

GAE = GenericAttention.get_name()


@pytest.fixture
def session() -> Session:
    batch = Batch(images(3), torch.tensor([0, 1, 2]))
    models = {"first": made(TinyViT), "second": made(TinyViT)}
    torch.nn.init.constant_(models["second"].head.bias[1:2], 5.0)  # type: ignore[index]
    return Session(models, CLASSES, photo(patch_size=PATCH), [batch], softmax)


def test_predictions_are_the_scores_of_the_chosen_model_in_order(session):
    example = session.examples[1]
    model = session.models["first"]
    with torch.no_grad():
        scores = model(2 * example.inputs[0] - 1).softmax(-1)[0]
    found = session.predict("first", example)
    assert [p.score for p in found] == sorted(scores.tolist(), reverse=True)
    assert [CLASSES[p.target] for p in found] == [p.label for p in found]
    assert found[0].target == int(scores.argmax())
    assert session.predict("second", example) != found
    assert [len(session.predict("first", example, top=k)) for k in (1, 2)] == [1, 2]


@pytest.mark.parametrize("method", METHODS)
def test_attributions_are_those_of_the_method_itself(session, method):
    example, start = session.examples[2], 1 if method.confinable else 0
    options = {"start_layer": str(start), "interpolation": "nearest"}
    along = {}  # methods that follow a path begin at the dashboard's baseline
    if "baselines" in inspect.signature(method.attribute).parameters:
        along["baselines"] = session._baselines((2 * example.inputs[0] - 1,))[0]
    why = session.explain("first", example, method.get_name(), options, target=1)
    direct = method(session.models["first"]).attribute(
        2 * example.inputs[0] - 1, target=1, start_layer=start, interpolation="nearest",
        **along,
    )  # fmt: skip
    assert direct.abs().sum() > 0
    assert torch.equal(why.attributions[0], direct.detach())
    assert (why.method, why.target) == (method.get_name(), 1)


def test_the_default_target_is_the_predicted_class_of_the_chosen_model(session):
    example = session.examples[0]
    for name in session.models:
        predicted = session.predict(name, example)[0].target
        assert session.explain(name, example, GAE).target == predicted
    targets = {session.explain(name, example, GAE).target for name in session.models}
    assert len(targets) == 2


def test_options_reach_the_method(session):
    example = session.examples[0]
    name = HeterogenousAttention.get_name()
    full = session.explain("first", example, name, {"correction": "full"}, target=0)
    direct = HeterogenousAttention(session.models["first"]).attribute(
        2 * example.inputs[0] - 1, target=0, correction="full"
    )
    assert torch.equal(full.attributions[0], direct.detach())
    assert not torch.equal(
        full.attributions[0], session.explain("first", example, name, {}, 0).attributions[0]
    )
    with pytest.raises(OptionError, match="correction"):
        session.explain("first", example, name, {"correction": "none"}, target=0)


def test_captums_methods_start_from_the_features_baseline(session):
    assert "Integrated Gradients" in session.methods
    example = session.examples[0]
    found = session.explain("first", example, "Integrated Gradients", {"n_steps": 7}, 2)
    made_input = 2 * example.inputs[0] - 1
    direct = IntegratedGradients(session.models["first"]).attribute(
        made_input, baselines=torch.full_like(made_input, 0.5), target=2, n_steps=7
    )
    assert torch.allclose(found.attributions[0], direct, atol=1e-7)


def test_the_deletion_curve_puts_the_baseline_where_relevant_patches_were(session):
    example, model = session.examples[0], session.models["first"]
    why = session.explain("first", example, GAE, {"interpolation": "nearest"}, target=1)
    curve = session.deletion("first", example, why.attributions, 1)
    order = why.attributions[0].sum(1)[0, ::PATCH, ::PATCH].flatten().argsort(descending=True)
    image = 2 * example.inputs[0] - 1
    with torch.no_grad():
        expected = [float(model(image).softmax(-1)[0, 1])]
        for patch in order.tolist():
            row, column = (PATCH * k for k in divmod(patch, 2))
            image = image.clone()
            image[..., row : row + PATCH, column : column + PATCH] = 0.5
            expected.append(float(model(image).softmax(-1)[0, 1]))
    quarters = torch.tensor([0, 5, 10, 15, 20])
    assert torch.equal(curve.fractions[quarters], torch.arange(5) / 4)
    assert torch.allclose(curve.values[0, quarters].float(), torch.tensor(expected), atol=1e-6)
    assert len(set(expected)) == 5


def test_chance_removes_in_another_order_and_ends_at_the_same_place(session):
    example = session.examples[0]
    chance = session.chance("first", example, 1)
    assert chance.values.shape == (10, 21)
    why = session.explain("first", example, GAE, {}, 1)
    curve = session.deletion("first", example, why.attributions, 1)
    ends = curve.values[:, [0, -1]].expand(10, -1)
    assert torch.allclose(chance.values[:, [0, -1]], ends)
    assert torch.equal(chance.values, session.chance("first", example, 1).values)


@pytest.mark.parametrize("method", OF_WORDS)
def test_every_method_of_words_explains_a_text(method):
    """Those that follow a path begin at ids, the words' baseline."""
    session = Session(made(TinyText), CLASSES, text(), [TEXT_BATCH], softmax)
    example = session.examples[0]
    (found,) = session.explain("TinyText", example, method.get_name(), target=0).attributions
    along = {}
    if "baselines" in inspect.signature(method.attribute).parameters:
        along["baselines"] = session._baselines(example.inputs)
    direct = method(made(TinyText)).attribute(example.inputs[0], target=0, **along)
    assert torch.equal(found, direct.detach())


def test_special_tokens_are_never_removed():
    session = Session(made(TinyText), CLASSES, text(), [TEXT_BATCH], softmax)
    assert set(session.methods) == {m.get_name() for m in OF_WORDS}  # ids cannot be interpolated
    example = session.examples[0]
    why = session.explain("TinyText", example, GAE, {}, 0)
    assert torch.equal(
        why.attributions[0],
        GenericAttention(made(TinyText)).attribute(example.inputs[0], target=0).detach(),
    )
    curve = session.deletion("TinyText", example, why.attributions, 0)
    with torch.no_grad():
        emptied = made(TinyText)(torch.tensor([[1, 0, 0, 0, 0]])).softmax(-1)
    assert float(curve.values[0, -1]) == pytest.approx(float(emptied[0, 0]), abs=1e-6)


def test_several_inputs_share_the_relevance():
    batch = Batch((torch.tensor([[1, 2, 3]]), images(1, channels=1)), None)
    session = Session(made(TinyPair), CLASSES, [text(), ImageFeature("Photo")], [batch])
    why = session.explain("TinyPair", session.examples[0], GAE, {}, 0)
    sums = [float(a.double().sum()) for a in why.attributions]
    assert all(value > 0 for value in sums)
    shares = [output.contribution for output in why.outputs]
    assert shares == pytest.approx([value / sum(sums) for value in sums])
    assert [output.type for output in why.outputs] == ["text", "image"]
    curve = session.deletion("TinyPair", session.examples[0], why.attributions, 0)
    blank = torch.tensor([[1, 0, 0]]), torch.zeros(1, 1, 16, 16)
    with torch.no_grad():
        assert float(curve.values[0, -1]) == pytest.approx(
            float(made(TinyPair)(*blank)[0, 0]), abs=1e-6
        )


def test_additional_arguments_go_with_their_example():
    scales = torch.tensor([[1.0], [0.0]])
    session = Session(
        made(TinyViT), CLASSES, ImageFeature("Photo"), [Batch(images(2), None, scales)], softmax
    )
    assert session.predict("TinyViT", session.examples[1])[0].score == pytest.approx(1 / 3)
    assert session.predict("TinyViT", session.examples[0])[0].score != pytest.approx(1 / 3)
    why = session.explain("TinyViT", session.examples[0], GAE, {}, 0)
    direct = GenericAttention(made(TinyViT)).attribute(
        images(2)[:1], target=0, additional_forward_args=scales[:1]
    )
    assert torch.equal(why.attributions[0], direct.detach())
    still = session.deletion("TinyViT", session.examples[1], why.attributions, 0)
    assert torch.allclose(still.values, torch.tensor(1 / 3, dtype=torch.float64))


def test_a_model_with_one_score_is_explained_without_a_target():
    session = Session(
        made(TinyViT, outputs=1), ["no", "yes"], ImageFeature("Photo"), [Batch(images(1))],
        torch.sigmoid, use_label_for_attr=False,
    )  # fmt: skip
    example = session.examples[0]
    (found,) = session.predict("TinyViT", example)
    assert found.label == ["no", "yes"][round(found.score)]
    why = session.explain("TinyViT", example, GAE)
    direct = GenericAttention(made(TinyViT, outputs=1)).attribute(example.inputs[0])
    assert why.target is None
    assert torch.equal(why.attributions[0], direct.detach())
    curve = session.deletion("TinyViT", example, why.attributions, None)
    assert float(curve.values[0, 0]) == pytest.approx(found.score, abs=1e-6)


def test_a_typed_text_takes_the_place_of_the_examples():
    session = Session(made(TinyText), CLASSES, text(), [TEXT_BATCH], softmax)
    own = session.own(session.examples[0], text="old sea")
    assert torch.equal(own.inputs[0], ids_of("old sea")) and own.label is None
    assert session.own(session.examples[0], text="") is session.examples[0]
    with pytest.raises(InputError, match="the text is empty"):
        session.own(session.examples[0], text="  ")
    assert own.name == "your text “old sea”"
    why = session.explain("TinyText", own, GAE, {}, 2)
    assert why.outputs[0].base == ["[CLS]", "old", "sea"]
    assert (session.takes_text, session.takes_picture) == (True, False)
    with pytest.raises(InputError, match="takes no image: expected an ImageFeature"):
        session.own(session.examples[0], picture="cat.png")


def test_methods_go_by_their_names_and_their_papers():
    session = Session(made(TinyText), CLASSES, text(), [TEXT_BATCH], methods=["GAE", "rollout"])
    assert list(session.methods) == [GAE, "Attention Rollout"]
    (example, *_), expected = (
        session.examples,
        session.explain("TinyText", session.examples[0], GAE),
    )
    for name in ("gae", "GenericAttention"):
        found = session.explain("TinyText", example, name)
        assert torch.equal(found.attributions[0], expected.attributions[0])
    with pytest.raises(OptionError, match="method: expected one of"):
        session.explain("TinyText", example, "VTranM")


def test_a_score_that_hardly_moves_is_told():
    from captum_attn.insights.drawing import curves
    from captum_attn.metrics import Curve

    steps = torch.linspace(0, 1, 3).double()
    flat = Curve(steps, torch.full((1, 3), 0.5).double(), torch.tensor([0.5]))
    steep = flat._replace(values=torch.tensor([[0.9, 0.4, 0.1]]).double())
    orders = flat._replace(values=torch.full((10, 3), 0.51).double())
    assert "hardly moves" in curves({"a": flat}, orders)
    assert "hardly moves" not in curves({"a": steep}, orders)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_every_option_has_a_line_of_help(method):
    assert all(help_of(method, option.name) for option in options_of(method))


def test_scenes_say_that_they_have_two_digits():
    from captum_attn.insights.toys import digits

    session = digits()
    assert all(re.fullmatch(r"a \d and a \d", one.name) for one in session.examples)
    assert session.note.startswith("A scene has two digits")
    scores = [session.predict("digit ViT", one, top=2)[1].score for one in session.examples]
    assert scores[0] == max(scores)  # both of the first scene's digits are clear


def test_an_endless_data_set_is_read_no_further_than_shown():
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield Batch(images(2), torch.tensor([0, 1]))

    session = Session(made(TinyViT), CLASSES, photo(), endless(), num_examples=5)
    assert [example.label for example in session.examples] == [0, 1, 0, 1, 0]
    assert read == [0, 1, 2]


def test_numbers_are_explained_too():
    class Linear(torch.nn.Linear):
        pass

    model = Linear(2, 3)
    session = Session(
        model, CLASSES, GeneralFeature("Numbers", ["age", "fare"]),
        [Batch(torch.tensor([[2.0, -1.0]]))], methods=[IntegratedGradients],
    )  # fmt: skip
    why = session.explain("Linear", session.examples[0], "Integrated Gradients", {}, 0)
    expected = model.weight[0].detach() * torch.tensor([2.0, -1.0])
    assert torch.allclose(why.attributions[0][0], expected, atol=1e-6)
    assert why.outputs[0].base == ["age: 2.00", "fare: -1.00"]
    largest = expected.abs().max()
    assert why.outputs[0].modified == pytest.approx((100 * expected / largest).tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "at least one Batch"),
        ([torch.rand(1, 3, 16, 16)], "expected batches, .* got Tensor"),
        ([Batch((images(1), images(1)))], "expected 1 inputs in each batch, .* got 2"),
        ([Batch(images(2), torch.tensor([1]))], r"inputs of \[2\] and 1 labels"),
    ],
)
def test_data_that_does_not_fit_is_refused(dataset, message):
    with pytest.raises(InputError, match=message):
        Session(made(TinyViT), CLASSES, photo(), dataset)


def test_unknown_names_are_refused(session):
    example = session.examples[0]
    with pytest.raises(OptionError, match="method: expected one of .* got 'magic'"):
        session.explain("first", example, "magic")
    with pytest.raises(OptionError, match=r"model: expected one of \['first', 'second'\]"):
        session.predict("third", example)
    with pytest.raises(InputError, match="models: expected a model, .* got 'resnet'"):
        Session("resnet", CLASSES, photo(), [Batch(images(1))])  # type: ignore[arg-type]


def test_models_of_one_class_are_numbered():
    models = [made(TinyViT), made(TinyViT)]
    session = Session(models, CLASSES, photo(), [Batch(images(1))])
    assert list(session.models) == ["Model 1: TinyViT", "Model 2: TinyViT"]


def test_positions_are_neither_drawn_nor_removed():
    class Placed(TinyText):
        def forward(self, ids, places):
            return super().forward(ids) + places.float().mean()

    batch = Batch((torch.tensor([[1, 2, 3]]), torch.ones(1, 3)), None)
    session = Session(made(Placed), CLASSES, [text(), EmptyFeature("places")], [batch])
    why = session.explain("Placed", session.examples[0], GAE, {}, 0)
    curve = session.deletion("Placed", session.examples[0], why.attributions, 0)
    with torch.no_grad():
        emptied = made(Placed)(torch.tensor([[1, 0, 0]]), torch.ones(1, 3))
    assert float(curve.values[0, -1]) == pytest.approx(float(emptied[0, 0]), abs=1e-6)
