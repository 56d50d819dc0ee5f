"""Evaluation of checkpoints: harmful score, over-refusal, accuracy and benign retention, each with its interval."""
