"""What bad input gets: what was expected, what was found, and which example it was."""

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import captum_attn
from captum_attn.errors import InputError, OptionError, TargetError
from captum_attn.evaluation import evaluate
from tests.evaluation.models import examples, linear


def run(dataset=None, methods=InputXGradient, metrics="aopc", model=None, **options):
    options = {"show_progress": False, "batch_size": 4, "resamples": 200, **options}
    dataset = examples() if dataset is None else dataset
    return evaluate(model or linear(), dataset, methods, metrics, **options)


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("dataset", [[], Nothing()])
def test_an_empty_data_set(dataset):
    with pytest.raises(InputError, match="data set is empty"):
        run(dataset)


@pytest.mark.parametrize("label", [3, -1])
def test_labels_beyond_the_classes(label):
    rows = examples()
    rows[6] = (rows[6][0], label, rows[6][2])
    with pytest.raises(TargetError, match=f"0 to 2, as the model has 3 classes, got {label} for "
                                          "example 6"):  # fmt: skip
        run(rows)


def test_no_labels():
    images = [image for image, *_ in examples()]
    with pytest.raises(TargetError, match="has no labels"):
        run(images)
    assert len(run(images, target="predicted")) == 19
    with pytest.raises(OptionError, match="target: expected"):
        run(target="labels")


def test_nan_maps_name_the_example_and_finished_work_is_kept(tmp_path):
    def broken(images, target, additional):
        found = images.clone()
        found[(images == examples()[9][0]).flatten(1).all(1)] = torch.nan
        return found

    with pytest.raises(InputError, match=r"broken, batch 2.*the attributions of example 9 have"):
        run(methods=broken, out=tmp_path)
    assert len((tmp_path / "batches-0.jsonl").read_text().splitlines()) == 1 + 2


def test_nan_outputs_and_nan_measures():
    rows = examples()
    rows[5] = (torch.full((1, 4, 4), torch.nan), *rows[5][1:])
    with pytest.raises(InputError, match="output of example 5 has NaN"):
        run(rows)

    def nan(model, inputs, *_):
        return torch.full((len(inputs),), torch.nan)

    with pytest.raises(InputError, match="Gradient, nan, batch 0.*example 0 got NaN"):
        run(metrics=nan)


def test_masks_of_another_size():
    rows = [(image, label, mask[:3]) for image, label, mask in examples()]
    with pytest.raises(InputError, match=r"pointing_game, batch 0.*expected the shape \(4, 4, 4\)"):
        run(rows, metrics="pointing_game")
    rows = examples()
    rows[6] = (*rows[6][:2], rows[6][2][:3])
    with pytest.raises(InputError, match="examples 4 to 7 cannot be read, or do not make a batch"):
        run(rows, metrics="pointing_game")
    with pytest.raises(InputError, match="the data set has no 'masks'"):
        run(examples(masks=False), metrics="pointing_game")


def test_steps_of_zero():
    with pytest.raises(OptionError, match="aopc, batch 0.*steps: expected a whole number of at "):
        run(metrics=[("aopc", {"steps": 0})])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"metrics": "aopcc"}, "metrics: expected some of"),
        ({"metrics": []}, "metrics: expected at least one"),
        ({"metrics": ["aopc", "aopc"]}, "two named 'aopc'"),
        ({"metrics": [3]}, "expected a name, a function or a Metric"),
        ({"metrics": [("aopc", 3)]}, r"expected \(metric, options\)"),
        ({"methods": []}, "methods: expected at least one"),
        ({"methods": [InputXGradient] * 2}, "two named 'Input X Gradient'"),
        ({"methods": ["GenericAtention"]}, "methods: neither .* did you mean 'GenericAttention'"),
        ({"methods": [3]}, "methods: expected Captum Attribution classes"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"limit": 0}, "limit: expected"),
        ({"resamples": 3}, "resamples: expected"),
        ({"confidence": 95}, "confidence: expected"),
        ({"model": linear().train()}, "train mode"),
    ],
)
def test_options_that_mean_nothing(options, said):
    with pytest.raises(OptionError, match=said):
        str(run(**options))


@pytest.mark.parametrize(
    "method, options, said",
    [
        (
            captum_attn.GenericAttention,
            {"power": 2},
            "options of Generic Attention .*, got 'power'",
        ),
        (
            captum_attn.GenericAttention,
            {"normalize": "no"},
            "normalize: expected one of ",
        ),
        (captum_attn.RawAttention, {"layer": 0.5}, "layer: expected an int or a str"),
        (IntegratedGradients, {"steps": 3}, "got 'steps'; did you mean 'n_steps'"),
    ],
)
def test_options_of_methods_are_held_to_their_types_before_the_model_runs(method, options, said):
    class Never(torch.nn.Module):
        def forward(self, images):
            raise AssertionError("the model ran")

    with pytest.raises(OptionError, match=said):
        run(methods=[(method, options)], model=Never().eval())


def test_data_that_is_no_data_set():
    with pytest.raises(InputError, match="expected a torch Dataset"):
        run(iter(examples()))
    with pytest.raises(InputError, match="list of 4 parts: expected inputs"):
        run([(*row, 1) for row in examples()])
    with pytest.raises(InputError, match="third part has"):
        run([(*row[:2], {"mask": row[2]}) for row in examples()])
    with pytest.raises(InputError, match="groups: expected one per example"):
        run(examples(), collate_fn=lambda rows: (
            torch.stack([r[0] for r in rows]), torch.tensor([r[1] for r in rows]),
            {"groups": ["a"]}))  # fmt: skip


def test_loaders_that_have_shared_out_already():
    share = DistributedSampler(examples(), num_replicas=2, rank=0)
    with pytest.raises(OptionError, match="DistributedSampler"):
        run(DataLoader(examples(), 4, sampler=share), batch_size=None)
    with pytest.raises(OptionError, match="the DataLoader's own"):
        run(DataLoader(examples(), 4))
    with pytest.raises(OptionError, match="a sampler of its own"):
        run(DataLoader(examples(), batch_sampler=[[0, 3], [1]]), batch_size=None)


def test_attributions_that_fit_nothing():
    with pytest.raises(InputError, match="expected attributions of 4 examples"):
        run(methods={"m": lambda images, *_: images[:1]})
    with pytest.raises(InputError, match="expected attributions, got str"):
        run(methods={"m": lambda images, *_: "map"})
    with pytest.raises(InputError, match="m, aopc, batch 0.*fit no input"):
        run(methods={"m": lambda images, *_: images[..., :2]})
    with pytest.raises(InputError, match="expected 'value' for each of 4"):
        run(metrics=lambda *_: torch.ones(1))
    with pytest.raises(InputError, match="expected a tensor with one value per example"):
        run(metrics=lambda *_: "good")
