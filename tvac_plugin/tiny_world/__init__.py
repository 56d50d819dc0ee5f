"""The embedded default: a made-up language, a base model that knows it, and data to align, attack and judge it."""
