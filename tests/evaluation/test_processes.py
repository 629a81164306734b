"""Two processes give the numbers of one, to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.evaluation.models import linear
from tests.evaluation.two_processes import Stream, found

ROOT = Path(__file__).parents[2]
if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)


@pytest.fixture(scope="module")
def alone():
    return found(linear())


@pytest.fixture(scope="module")
def both(tmp_path_factory, alone):
    """What two processes found, one of whose folders has half of the batches already."""
    folder = tmp_path_factory.mktemp("processes")
    whole = found(linear(), folder / "half")
    lines = (folder / "half/batches-0.jsonl").read_text().splitlines(keepends=True)
    (folder / "half/batches-0.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    assert whole == alone
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", "-m", "tests.evaluation.two_processes"]  # fmt: skip
    done = subprocess.run(
        [*torchrun, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank-{i}.json").read_text()) for i in (0, 1)]


def test_both_return_the_numbers_of_one(both, alone):
    _, processes = both
    expected = json.loads(json.dumps(alone))
    assert expected["examples"] == 19
    for process in processes:
        for way in ("by environment", "in a group", "resumed"):
            assert process[way] == expected, way
        stream = process["a stream"]
        assert stream["values"] == expected["values"]
        assert stream["differences"] == expected["differences"]
        assert process["group is left"]
    assert found(linear(), dataset=Stream())["values"] == alone["values"]


def test_each_computes_its_own_share(both):
    folder, (first, second) = both
    lines = [(folder / f"both/batches-{i}.jsonl").read_text().splitlines()[1:] for i in (0, 1)]
    numbers = [[json.loads(line)["batch"] for line in own] for own in lines]
    assert numbers == [[0, 2, 4], [1, 3]]
    per_example = first["own share"] / 11  # examples 0-3, 8-11, 16-18
    assert second["own share"] == 8 * per_example
    # Two of five batches were there, whole; the torn one is done again.
    assert first["left"] == pytest.approx((4 + 3) * per_example)
    assert second["left"] == pytest.approx(4 * per_example)
    stored = json.loads((folder / "both/results.json").read_text())
    assert stored == first["by environment"]
