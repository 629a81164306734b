"""Pictures of attributions, in the manner of `captum.attr.visualization`.

Every function but `attention_page`, whose page is clicked, returns a :class:`Picture`, a
matplotlib `Figure` that nothing has shown and that `save` writes as PNG, SVG, PDF or HTML. They
take the attributions of any method of Captum or of this library, for one example or for a batch,
and have Captum's options `sign` and `outlier_perc`.

Orange speaks for the target, purple against it; maps without a sign go from dark to light
(viridis). A map that is zero everywhere is drawn as empty, with a note in the picture and a
warning.
"""

from captum_attn.errors import MissingExtraError

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as missing:
    raise MissingExtraError(
        'captum_attn.visualization needs matplotlib: pip install "captum_attn[visualization]"'
    ) from missing

from captum_attn.visualization.attention_page import AttentionPage, attention_page
from captum_attn.visualization.detections import visualize_detections
from captum_attn.visualization.flow import visualize_heads, visualize_layers
from captum_attn.visualization.image_text import (
    visualize_image_text,
)
from captum_attn.visualization.images import visualize_image
from captum_attn.visualization.matrices import visualize_generation, visualize_matrix
from captum_attn.visualization.packed import unpack_patches
from captum_attn.visualization.picture import Picture
from captum_attn.visualization.signals import visualize_signal
from captum_attn.visualization.text import text_records, visualize_text
from captum_attn.visualization.words import Word, words_of
from captum_attn.visualization.words_on_image import visualize_words_on_image

__all__ = [
    "AttentionPage",
    "Picture",
    "Word",
    "attention_page",
    "text_records",
    "unpack_patches",
    "visualize_detections",
    "visualize_generation",
    "visualize_heads",
    "visualize_image",
    "visualize_image_text",
    "visualize_layers",
    "visualize_matrix",
    "visualize_signal",
    "visualize_text",
    "visualize_words_on_image",
    "words_of",
]
