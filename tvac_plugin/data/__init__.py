"""Training data: loaded, checked row by row, compared, batched, and mixed for a simulated user."""
