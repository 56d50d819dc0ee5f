"""Trainers with a defense mixed in; import the one you need from its module."""
