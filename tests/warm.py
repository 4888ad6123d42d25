"""What `forked.py` has done once, and not by each program: it imports this before it forks."""

import gc

from PIL import Image
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import evaluate  # noqa: F401
import inference  # noqa: F401
import train  # noqa: F401

__import__("torch._dynamo")  # which the first optimizer loads
__import__("transformers.models.vit.modeling_vit")
__import__("transformers.models.vit.image_processing_pil_vit")
Image.init()
get_checkpoint_conversion_mapping("vit")  # compiles hundreds of patterns
gc.freeze()  # so that a fork's collector touches, and so copies, nothing of this
