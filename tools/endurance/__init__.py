"""What the check_*.py of long and interrupted runs have in common."""
