"""What a defended training step costs next to a plain one: `axolotl tvac bench`."""

DEFAULT_SEED = 165
"""Decides among others which layers T-Vaccine draws, and so how well a few draws stand for the distribution."""
