"""A killed run goes on where it was; nothing that was finished is lost or done again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from captum.attr import InputXGradient, Saliency

from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation import evaluate
from tests.evaluation.models import Noisy, examples, linear

ROOT = Path(__file__).parents[2]


def run(model, out, dataset=None, methods=(InputXGradient, Noisy), resume=True, **options):
    options = {"batch_size": 4, "resamples": 500, "show_progress": False, **options}
    return evaluate(
        model, dataset or examples(), methods, ["aopc", "pointing_game"], out=out, resume=resume,
        **options,
    )  # fmt: skip


class Dies:
    """Explains as input times gradient until its model has been asked a number of times."""

    def __init__(self, model, after):
        self.method, self.left = InputXGradient(model), after

    def attribute(self, inputs, target):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.method.attribute(inputs, target=target)


def lines(out):
    return (out / "batches-0.jsonl").read_text().splitlines()


def test_nothing_is_done_twice_and_nothing_is_lost(tmp_path):
    whole = run(linear(), None, resume=False)
    model = linear()
    stopped = {"Input X Gradient": Dies(model, 3), "Noisy": Noisy}
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, methods=stopped)
    assert len(lines(tmp_path)) == 1 + 3
    kept = lines(tmp_path)
    again = linear()
    # A class and an object that stands in for it are other settings.
    with pytest.raises(OptionError, match=r"methods\.Input X Gradient"):
        run(again, tmp_path)
    header = json.loads(kept[0])
    header["settings"]["methods"] = whole.settings["methods"]
    text = "\n".join([json.dumps(header), *kept[1:], kept[3][:50]])  # the last is torn
    (tmp_path / "batches-0.jsonl").write_text(text)
    found = run(again, tmp_path)
    assert lines(tmp_path)[1:4] == kept[1:] and len(lines(tmp_path)) == 1 + 5
    for column in whole.columns:
        assert found.values(column) == whole.values(column)
        assert found.differences(column) == whole.differences(column)
    all_of_it = linear()
    run(all_of_it, None, resume=False)
    assert again.seen == all_of_it.seen * 7 / 19  # two batches, of four and of three
    finished = linear()
    assert str(run(finished, tmp_path)) == str(whole)
    assert finished.seen == 0


def test_a_real_kill(tmp_path):
    """SIGKILL in the middle of a batch."""
    code = f"""
import time
from captum_attn.evaluation.batches import BatchSource
from tests.evaluation.test_resume import run, linear, Noisy
batches = BatchSource.batches
def slowly(self, wanted):
    for i, batch in enumerate(batches(self, wanted)):
        if i == 2:
            time.sleep(600)
        yield batch
BatchSource.batches = slowly
run(linear(), {str(tmp_path)!r}, methods={{"n": Noisy}})
"""
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    path, end = tmp_path / "batches-0.jsonl", time.monotonic() + 200
    while not path.exists() or path.read_text().count("\n") < 3:
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    found = run(linear(), tmp_path, methods={"n": Noisy})
    assert found.values("aopc") == run(linear(), None, methods={"n": Noisy}, resume=False).values(
        "aopc"
    )


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 5}, "batch_size was 4 and is 5"),
        ({"limit": 6}, "limit was None and is 6"),
        ({"target": 1}, "target was 'label' and is 1"),
        ({"methods": (InputXGradient, Saliency)}, r"methods\.Saliency was None"),
        ({"perturbation": {"fill": 0.5}}, r"perturbation\.fill was None and is 0.5"),
        ({"dataset": examples()[1:]}, r"dataset\.first was"),
    ],
)
def test_other_settings_are_named_and_the_work_is_kept(tmp_path, changed, said):
    run(linear(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OptionError, match=said):
        run(linear(), tmp_path, **changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_weights_are_another_model(tmp_path):
    run(linear(), tmp_path)
    other = linear()
    with torch.no_grad():
        other.weight[0, 0] += 1e-3
    with pytest.raises(OptionError, match=r"model\.weights"):
        run(other, tmp_path)


def test_a_folder_with_results_is_not_gone_on_with_by_chance(tmp_path):
    run(linear(), tmp_path, resume=False)
    with pytest.raises(OptionError, match="has results already: resume=True"):
        run(linear(), tmp_path, resume=False)
    with pytest.raises(OptionError, match="nothing to go on with"):
        run(linear(), None)


def test_a_file_that_someone_changed(tmp_path):
    run(linear(), tmp_path)
    whole = lines(tmp_path)
    (tmp_path / "batches-0.jsonl").write_text("\n".join([whole[0], "{}", *whole[2:]]) + "\n")
    with pytest.raises(InputError, match="line 2 of .*batches-0.jsonl"):
        run(linear(), tmp_path)
    (tmp_path / "batches-0.jsonl").write_text("\n".join([whole[0], *whole[2:]]) + "\n")
    assert len(run(linear(), tmp_path)) == 19


def test_a_header_that_was_cut_short_is_written_anew(tmp_path):
    (tmp_path / "batches-0.jsonl").write_text('{"format": 2, "sett')
    run(linear(), tmp_path)
    assert json.loads(lines(tmp_path)[0])["settings"]["seed"] == 0
    assert len(lines(tmp_path)) == 6


def test_a_failed_first_batch_leaves_no_settings_behind(tmp_path):
    with pytest.raises(OptionError, match="steps"):
        evaluate(linear(), examples(), InputXGradient, {"a": ("aopc", {"steps": 0})}, out=tmp_path,
                 show_progress=False)  # fmt: skip
    run(linear(), tmp_path, resume=False)


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        run(linear(), tmp_path / "file")
    with pytest.raises(InputError, match="cannot write"):
        run(linear(), tmp_path / "file" / "below")
