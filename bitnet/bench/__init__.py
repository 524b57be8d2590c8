"""Measurements of speed, each behind a correctness gate."""
