"""What other rooms use of this one, beside the pictures: images, boxes and regions on them."""

from captum_attn.visualization._arrays import image_list
from captum_attn.visualization._panels import draw_box
from captum_attn.visualization._regions import checked_boxes, draw_regions

__all__ = ["checked_boxes", "draw_box", "draw_regions", "image_list"]
