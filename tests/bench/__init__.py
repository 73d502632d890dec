"""Measurements, run by ``make bench``: what they print goes into the documentation, and nothing asserts on a clock."""
