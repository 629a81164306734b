"""Measures that hold any Captum attribution to account.

Faithfulness runs on one perturbation engine (`perturbation_curve`); localisation, detection and
text compare with what people marked; sanity says what an explanation has to beat. All of them take
the attributions of any Captum method, in Captum's style, and give a tensor with one number per
example, or counts (`segmentation`, `coco_results`) that add up exactly over batches and processes.
"""

from captum_attn.metrics.bridge import quantus_explain_func
from captum_attn.metrics.coco import coco_average_precision, coco_bootstrap, coco_results
from captum_attn.metrics.concentration import relevance_rank, sparseness, top_k_intersection
from captum_attn.metrics.detection import (
    DetectedQueries,
    detections,
    query_masks,
    segment_detections,
)
from captum_attn.metrics.fills import Blur, Constant, Fill, Hide, Mean, NoisyLinear, Remove
from captum_attn.metrics.insertion import deletion, insertion
from captum_attn.metrics.localization import (
    Segmentation,
    energy_inside,
    pointing_game,
    segmentation,
)
from captum_attn.metrics.perturbation import (
    TO_90,
    TO_100,
    Curve,
    abpc,
    aopc,
    log_odds,
    perturbation_auc,
    perturbation_curve,
)
from captum_attn.metrics.places import place_hit, place_rank, place_share
from captum_attn.metrics.rationales import (
    Spans,
    rationale_auprc,
    rationale_f1,
    rationale_iou_f1,
    rationale_spans,
)
from captum_attn.metrics.saco import saco
from captum_attn.metrics.sanity import (
    ParameterRandomization,
    RandomAttribution,
    parameter_randomization,
)
from captum_attn.metrics.sensitivity import sensitivity_n
from captum_attn.metrics.thresholds import binary_map, otsu_threshold
from captum_attn.metrics.token_removal import comprehensiveness, sufficiency, token_removal_auc

__all__ = [
    "TO_90",
    "TO_100",
    "Blur",
    "Constant",
    "Curve",
    "DetectedQueries",
    "Fill",
    "Hide",
    "Mean",
    "NoisyLinear",
    "ParameterRandomization",
    "RandomAttribution",
    "Remove",
    "Segmentation",
    "Spans",
    "abpc",
    "aopc",
    "binary_map",
    "coco_average_precision",
    "coco_bootstrap",
    "coco_results",
    "comprehensiveness",
    "deletion",
    "detections",
    "energy_inside",
    "insertion",
    "log_odds",
    "otsu_threshold",
    "parameter_randomization",
    "perturbation_auc",
    "perturbation_curve",
    "pointing_game",
    "quantus_explain_func",
    "query_masks",
    "place_hit",
    "place_rank",
    "place_share",
    "rationale_auprc",
    "rationale_f1",
    "rationale_iou_f1",
    "rationale_spans",
    "relevance_rank",
    "saco",
    "segment_detections",
    "segmentation",
    "sensitivity_n",
    "sparseness",
    "sufficiency",
    "token_removal_auc",
    "top_k_intersection",
]
