"""Checks for developers that take too long for the tests. README.md states what each one verifies and its duration."""
