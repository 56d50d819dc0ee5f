"""A real language model with a benign topic in the place of harm, and data to align, attack and evaluate it."""
