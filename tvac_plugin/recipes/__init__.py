"""Recipes as the user wrote them, read as plain data."""
