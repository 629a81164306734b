"""`evaluate` gives what its metrics give on the whole data set, however it is batched."""

import csv
import json

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, Saliency
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler

import captum_attn
from captum_attn import metrics
from captum_attn.evaluation import Batch, Column, Metric, evaluate
from tests.evaluation.models import Noisy, examples, linear

METRICS = ["aopc", "negative_auc", "segmentation", "pointing_game"]
QUIET = {"show_progress": False, "resamples": 500}


def run(model=None, dataset=None, methods=(InputXGradient, Noisy), what=METRICS, **options):
    model = model or linear()
    return evaluate(model, dataset or examples(), methods, what, **{**QUIET, **options})


def whole(data=None):
    images, labels, masks = zip(*(data or examples()), strict=True)
    return torch.stack(images), torch.tensor(labels), torch.stack(masks)


def test_every_number_is_that_of_the_whole_data_set():
    model, (images, labels, masks) = linear(), whole()
    found = run(model, batch_size=4)
    attributions = InputXGradient(model).attribute(images, target=labels)
    expected = {
        "aopc": metrics.aopc(model, images, attributions, labels).mean(),
        "negative_auc": metrics.perturbation_auc(
            model, images, attributions, labels, order="least"
        ).mean(),
        "pointing_game": metrics.pointing_game(attributions, masks).mean(),
    }
    total = metrics.segmentation(attributions, masks)
    expected |= {f"segmentation.{name}": value for name, value in total.compute().items()}
    assert set(found.columns) == set(expected)
    for column, value in expected.items():
        assert found.value("Input X Gradient", column).value == pytest.approx(
            float(value), abs=1e-6
        )
    mean_of_batches = float(total.ious.mean())  # what averaging early would have given
    merged = found.value("Input X Gradient", "segmentation.mIoU").value
    assert abs(merged - mean_of_batches) > 1e-3
    assert len(found) == 19


def test_what_was_kept_is_there_per_example_and_in_order():
    model, (images, labels, masks) = linear(), whole()
    attributions = InputXGradient(model).attribute(images, target=labels)
    found = run(model, batch_size=4)
    each = metrics.aopc(model, images, attributions, labels).numpy()
    assert np.allclose(found.examples("Input X Gradient", "aopc")["value"], each, atol=1e-12)
    counts = found.examples("Input X Gradient", "segmentation")["union"]
    assert (counts == metrics.segmentation(attributions, masks).union.numpy()).all()


def test_the_batches_do_not_matter():
    one, other = (run(methods=[InputXGradient], batch_size=size) for size in (1, 19))
    for column in one.columns:
        a, b = (r.value("Input X Gradient", column) for r in (one, other))
        assert a.value == pytest.approx(b.value, abs=1e-6)
        assert a.standard_error == pytest.approx(b.standard_error, abs=1e-6)


def test_loaders_streams_and_mappings_give_the_same():
    class Named(Dataset):
        def __len__(self):
            return 19

        def __getitem__(self, i):
            image, label, mask = examples()[i]
            return {"images": image, "labels": label, "masks": mask}

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(examples())

    expected = run(methods=[InputXGradient], batch_size=4)
    shuffled = DataLoader(examples(), batch_size=4, shuffle=True)
    random = {"r": metrics.RandomAttribution}
    by_name = run(dataset=Named(), methods=random, what=["pointing_game"], batch_size=4)
    plain = run(methods=random, what=["pointing_game"], batch_size=4)
    assert by_name.value("r", "pointing_game").value == plain.value("r", "pointing_game").value
    for dataset, size in ((shuffled, None), (Stream(), 4)):
        found = run(dataset=dataset, methods=[InputXGradient], batch_size=size)
        for column in expected.columns:
            assert found.values(column) == expected.values(column)
    assert len(run(dataset=Stream(), batch_size=4, limit=6)) == 6
    some = DataLoader(examples(), 2, sampler=SubsetRandomSampler([5, 1, 7]))
    assert len(run(dataset=some)) == 3


def test_labels_predictions_or_one_class():
    model, (images, labels, _) = linear(), whole()
    for target, meant in (
        ("label", labels), ("predicted", model(images).argmax(1)), (2, torch.full((19,), 2)),
    ):  # fmt: skip
        attributions = InputXGradient(model).attribute(images, target=meant)
        expected = metrics.aopc(model, images, attributions, meant).mean()
        found = run(model, methods=[InputXGradient], what="aopc", target=target, batch_size=5)
        assert found.value("Input X Gradient", "aopc").value == pytest.approx(float(expected))


def test_random_numbers_belong_to_the_batch_and_the_seed():
    alone = run(methods=[Noisy], what="aopc")
    torch.rand(3), np.random.rand(2)
    state = torch.get_rng_state()
    beside = run(methods=[InputXGradient, Noisy], what="aopc")
    for at in ("value", "low", "standard_error"):
        expected = getattr(alone.value("Noisy", "aopc"), at)
        assert getattr(beside.value("Noisy", "aopc"), at) == pytest.approx(expected, rel=1e-12)
    assert (torch.get_rng_state() == state).all()
    other = run(methods=[Noisy], what="aopc", seed=1)
    assert other.value("Noisy", "aopc").value != alone.value("Noisy", "aopc").value


def test_options_reach_the_methods_and_the_metrics():
    model, (images, labels, _) = linear(), whole()
    found = run(
        model,
        methods={"signed": (Saliency, {"abs": False}), "magnitude": Saliency},
        what={"few": ("aopc", {"steps": 3, "fill": "zero"}), "log": metrics.log_odds},
        perturbation={"fill": 0.25, "patch_size": 2},
    )
    signed = Saliency(model).attribute(images, target=labels, abs=False)
    few = metrics.aopc(model, images, signed, labels, steps=3, patch_size=2)
    log = metrics.log_odds(model, images, signed, labels, fill=0.25, patch_size=2)
    assert found.value("signed", "few").value == pytest.approx(float(few.mean()))
    assert found.value("signed", "log").value == pytest.approx(float(log.mean()))
    assert found.value("magnitude", "few").value != found.value("signed", "few").value


def test_own_functions_are_methods_and_metrics():
    def ones(images, target, additional):
        return torch.ones_like(images)

    def size(model, inputs, attributions, target, additional):
        return attributions.flatten(1).sum(1)

    def parts(model, inputs, attributions, target, additional):
        return {"a": torch.arange(len(inputs)), "b": torch.full((len(inputs),), 4)}

    ratio = Metric(parts, {"ratio": Column(lambda means: means["a"] / means["b"])})
    found = run(methods=ones, what={"size": size, "parts": ratio}, batch_size=19)
    assert found.value("ones", "size").value == 16
    assert found.value("ones", "parts.ratio").value == 9 / 4
    assert found.value("ones", "parts.ratio").better is None


def test_least_first_turns_round_what_is_better():
    found = run(what=["positive_auc", "negative_auc", "aopc", "insertion"],
                perturbation={"fill": "zero"})  # fmt: skip
    better = [found.value("Noisy", column).better for column in found.columns]
    assert better == ["lower", "higher", "higher", "higher"]
    assert Metric(len, METRIC.columns, options={"order": "least"}).better("value") == "lower"


METRIC = captum_attn.evaluation.METRICS["deletion"]


def test_randomised_models_and_the_chance_of_random_maps():
    model = linear()
    constant = lambda images, target, additional: images.clone()  # noqa: E731

    class Fixed:
        def attribute(self, inputs, target=None, **options):
            return constant(inputs, target, None)

    found = run(model, methods={"same": Fixed(), "ixg": InputXGradient},
                what="parameter_randomization")  # fmt: skip
    assert found.value("same", "parameter_randomization").value == pytest.approx(1)
    assert found.value("ixg", "parameter_randomization").value < 0.7
    many = examples(200)
    chance = run(model, many, [metrics.RandomAttribution], ["pointing_game"])
    value = chance.values("pointing_game")[0]
    area = float(torch.stack([m for _, _, m in many]).double().mean())
    assert abs(value.value - area) < 4 * value.standard_error


def test_batches_of_ones_own_with_options_and_text():
    words = torch.nn.Embedding(9, 4)
    head = torch.nn.Linear(4, 2)

    def model(input_ids, attention_mask):
        weight = attention_mask / attention_mask.sum(1, keepdim=True)
        return head((words(input_ids) * weight[..., None]).sum(1))

    def batch(rows):
        ids = torch.tensor(rows)
        rationales = torch.zeros_like(ids)
        rationales[:, 1] = 1
        inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        return Batch(inputs, torch.zeros(len(ids), dtype=torch.long),
                     truth={"rationales": rationales}, options={"removable": ids > 1})  # fmt: skip

    def second(inputs, target, additional):
        scores = torch.zeros(inputs["input_ids"].shape)
        scores[:, 1] = 1.0
        return {"input_ids": scores}

    data = [[1, 4, 5, 2], [1, 6, 0, 0], [1, 3, 8, 0]]
    with torch.no_grad():
        found = run(
            model, data, {"second": second}, ["comprehensiveness", "rationale_f1"],
            collate_fn=batch, batch_size=2,
        )  # fmt: skip
    assert found.value("second", "rationale_f1").value == 1
    ready = batch(data)
    expected = metrics.comprehensiveness(
        model, ready.inputs, second(ready.inputs, 0, None), 0, removable=ready.options["removable"]
    ).mean()
    assert found.value("second", "comprehensiveness").value == pytest.approx(float(expected))


def test_files_hold_what_is_printed(tmp_path):
    found = run(out=tmp_path / "new" / "folder")
    stored = json.loads((tmp_path / "new/folder/results.json").read_text())
    table = (tmp_path / "new/folder/table.md").read_text()
    assert table == f"{found}\n"
    assert stored["settings"]["seed"] == 0
    assert torch.__version__.startswith(stored["versions"]["torch"].split("+")[0])
    assert [tuple(v.values()) for v in stored["values"]] == [
        tuple(v) for c in found.columns for v in found.values(c)
    ]
    with open(tmp_path / "new/folder/differences.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.columns)
    difference = found.differences("aopc")[0]
    assert float(rows[0]["difference"]) == difference.difference
    a, b = (found.value(m, "aopc").value for m in found.methods)
    assert difference.difference == pytest.approx(a - b)
    row = next(line for line in table.splitlines() if line.startswith("| Input X Gradient"))
    value = found.value("Input X Gradient", "aopc")
    assert f"{value.value:.4f} ± {value.standard_error:.4f}" in row
    widths = {len(line) for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_the_table_fits_a_terminal():
    model = linear()
    found = run(model, examples(12), [InputXGradient], ["aopc", "log_odds"])
    narrow = found.table(45).split("\n\n")
    assert len(narrow) == 3 and all(len(line) <= 45 for t in narrow[:2] for line in t.splitlines())
    assert [table.split("|")[2].split()[0] for table in narrow[:2]] == ["aopc", "log_odds"]
    assert all("Input X Gradient" in table for table in narrow[:2])
    assert found.table(1000) == str(found) and len(str(found).split("\n\n")) == 2


def test_methods_by_their_names():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = torch.nn.Linear(8, 2)

        def forward(self, x):
            return self.head((x + self.attention(x, x, x)[0])[:, 0])

    data = [(torch.randn(4, 8), 1) for _ in range(3)]
    found = run(Model().eval(), data, ["GAE", ("T-Attr", {"start_layer": 0})], ["aopc"])
    assert list(found.methods) == ["GAE", "T-Attr"]


def test_signs_in_the_table():
    def perfect(images, target, additional):
        return InputXGradient(model).attribute(images, target=target)

    def opposite(images, target, additional):
        return -perfect(images, target, additional)

    model = linear()
    found = run(model, examples(60), [perfect, opposite, InputXGradient], ["aopc"])
    rows = {line.split("|")[1].strip(): line for line in str(found).splitlines() if "|" in line}
    equal_row = rows["perfect = Input X Gradient"]  # the same numbers are not shown twice
    assert equal_row.count("*") == 1 and "~" not in equal_row
    assert not set("*~") & set(rows["opposite"])
    equal = next(d for d in found.differences("aopc") if d.other == "Input X Gradient")
    assert (equal.difference, equal.low, equal.high, equal.p, equal.real) == (0, 0, 0, 1, False)
