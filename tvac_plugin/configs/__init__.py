"""The blocks of a recipe: every setting with its bounds, its default and where the default comes from."""
