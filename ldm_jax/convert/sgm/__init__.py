"""Stable Diffusion XL in the layout of its authors (generative-models, "sgm")."""
