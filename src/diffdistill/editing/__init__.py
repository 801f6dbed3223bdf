"""Editing of images or latents with any denoiser, solver and noise levels: students of few steps included."""

from diffdistill.editing.encoding import encode, style_transfer
from diffdistill.editing.image_to_image import Start, image_to_image, noised
from diffdistill.editing.inpainting import Known, inpaint

__all__ = ["Known", "Start", "encode", "image_to_image", "inpaint", "noised", "style_transfer"]
