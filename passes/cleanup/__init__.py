"""Lossless clean-up of a graph."""
