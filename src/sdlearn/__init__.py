"""Stable Diffusion, built from an empty file; each module was written in a chapter.

Follow a prompt on its way: tokenizer -> clip -> unet -> vae, with schedule, prediction,
samplers and guidance in between; pipeline joins them, and minimal is the whole of it in
thirty lines. Importing this package alone loads nothing heavy; import what you need.
"""

__version__ = "0.1.0"
