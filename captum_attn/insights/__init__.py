"""Dashboards: captum_attn's methods in Captum Insights, and a dashboard for every captum.

With captum 0.8, `register` adds the methods to `captum.insights`. Captum 0.9 dropped Captum
Insights; `AttributionVisualizer` here takes the same arguments, with any captum.
"""

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
from captum_attn.insights.register import register
from captum_attn.insights.visualizer import AttributionVisualizer

__all__ = [
    "AttributionVisualizer",
    "BaseFeature",
    "Batch",
    "EmptyFeature",
    "FeatureOutput",
    "GeneralFeature",
    "ImageFeature",
    "RegionFeature",
    "TextFeature",
    "register",
]
