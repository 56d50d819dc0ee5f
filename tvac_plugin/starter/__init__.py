"""The way in: from a recipe that somebody has to a chain that tells whether a defense helps it."""
