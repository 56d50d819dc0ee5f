"""What a defended training step costs next to a plain one: `axolotl tvac bench`."""
