"""What is known of a model: where its parts are, and how to read, perturb and freeze them."""
