"""Run by torchrun in two processes: an evaluation over both, in every way that they can meet.

Writes what each process returned, and which batches it computed.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from captum.attr import InputXGradient
from torch.utils.data import IterableDataset

from captum_attn.evaluation import evaluate
from tests.evaluation.models import Noisy, examples, linear


class Stream(IterableDataset):
    def __iter__(self):
        return iter(examples())


def found(model, out=None, dataset=None, resume=False):
    return evaluate(
        model, dataset or examples(), [InputXGradient, Noisy], ["aopc", "segmentation"],
        batch_size=4, out=out, resume=resume, show_progress=False, resamples=500,
    ).as_dict()  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    told = linear()
    result = {
        "by environment": found(told, folder / "both"),
        "own share": told.seen,
        "a stream": found(linear(), dataset=Stream()),
    }
    again = linear()
    result["resumed"] = found(again, folder / "half", resume=True)
    result["left"] = again.seen
    dist.init_process_group("gloo")
    result["in a group"] = found(linear())
    result["group is left"] = dist.is_initialized()
    dist.destroy_process_group()
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
