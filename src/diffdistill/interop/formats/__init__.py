"""Whose networks foreign checkpoints hold: EDM, ADM, latent diffusion and Stable Diffusion."""
