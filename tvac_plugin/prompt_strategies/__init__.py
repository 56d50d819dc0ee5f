"""Prompt strategies that recipes name by `type:`, for corpora in formats Axolotl does not know."""
