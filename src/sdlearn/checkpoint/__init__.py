"""Every format of Stable Diffusion 1's checkpoints <-> our models."""
