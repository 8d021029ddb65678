"""Fuzzing: reads damaged files of every kind; see __main__.py."""
