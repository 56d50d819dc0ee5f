"""Tasks for lm-evaluation-harness: one YAML each, with the scoring rules they name."""
