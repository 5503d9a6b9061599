"""Images: on disk, as tensors, and the record in their metadata. The only folder that uses Pillow."""

from mrflow_sched.images.convert import from_pictures, to_pil
from mrflow_sched.images.files import load_image, open_image, read_png_text, save_png

__all__ = ["from_pictures", "load_image", "open_image", "read_png_text", "save_png", "to_pil"]
