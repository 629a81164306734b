"""An evaluation over a data set: many methods side by side, measured on the same batches.

`evaluate` explains every batch with every method, holds the attributions to every metric, and
keeps what was found per example. The table, its standard errors and which differences are real
are computed from that at the end, so batches, processes and interrupted runs add up exactly.
"""

from typing import TYPE_CHECKING

from captum_attn._on_demand import on_demand

if TYPE_CHECKING:
    from captum_attn.evaluation.batches import Batch
    from captum_attn.evaluation.data import ImageFolder, TextFile
    from captum_attn.evaluation.measures import METRICS, Column, Metric
    from captum_attn.evaluation.results import Results
    from captum_attn.evaluation.run import evaluate
    from captum_attn.evaluation.statistics import Difference, Value

__all__ = [
    "METRICS",
    "Batch",
    "Column",
    "Difference",
    "ImageFolder",
    "Metric",
    "Results",
    "TextFile",
    "Value",
    "evaluate",
]

_HOMES = {
    "METRICS": "measures", "Batch": "batches", "Column": "measures", "Difference": "statistics",
    "ImageFolder": "data", "Metric": "measures", "Results": "results", "TextFile": "data",
    "Value": "statistics", "evaluate": "run",
}  # fmt: skip


__getattr__, __dir__ = on_demand(__name__, _HOMES)
