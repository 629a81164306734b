"""Dashboards: captum_attn's methods in Captum Insights, and a dashboard for every captum.

With captum 0.8, `register` adds the methods to `captum.insights`. Captum 0.9 dropped Captum
Insights; `AttributionVisualizer` here takes the same arguments, with any captum.
`DetectionVisualizer` and `GenerationVisualizer` are the same for a detector and a language model.
"""

from typing import TYPE_CHECKING

from captum_attn._on_demand import on_demand

if TYPE_CHECKING:
    from captum_attn.insights.features import (
        BaseFeature,
        Batch,
        EmptyFeature,
        FeatureOutput,
        GeneralFeature,
        ImageFeature,
        RegionFeature,
        TextFeature,
    )
    from captum_attn.insights.registration import register
    from captum_attn.insights.visualizer import (
        AttributionVisualizer,
        DetectionVisualizer,
        GenerationVisualizer,
    )

__all__ = [
    "AttributionVisualizer",
    "BaseFeature",
    "Batch",
    "DetectionVisualizer",
    "EmptyFeature",
    "FeatureOutput",
    "GeneralFeature",
    "GenerationVisualizer",
    "ImageFeature",
    "RegionFeature",
    "TextFeature",
    "register",
]

_HOMES = {"register": "registration"} | dict.fromkeys(
    ("AttributionVisualizer", "DetectionVisualizer", "GenerationVisualizer"), "visualizer"
)
_features = [name for name in __all__ if name not in _HOMES]
__getattr__, __dir__ = on_demand(__name__, {**dict.fromkeys(_features, "features"), **_HOMES})
