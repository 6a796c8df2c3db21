"""Stable Diffusion, built from an empty file: each module here was written in one chapter of the book.

Follow a prompt on its way: tokenizer -> clip -> unet -> vae, with schedule, ddpm and guidance in between;
pipeline joins them. Importing this package alone loads nothing heavy; import the module that you need.
"""

__version__ = "0.1.0"
