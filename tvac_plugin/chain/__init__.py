"""The chain: alignment, a simulated user's attack and evaluation, declared in one YAML and run as subprocesses."""
