"""Evaluation of checkpoints: harmful score, over-refusal, accuracy on the user's task, each with its interval."""
