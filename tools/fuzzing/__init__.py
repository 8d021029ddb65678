"""Damaged files of every kind that the project reads; see tools/fuzz.py."""
