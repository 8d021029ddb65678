"""Damaged files of every kind that the project reads; see __main__.py."""
