"""What tools/benchmark.py is made of: models that do their real work, their inputs, clocks, and the report."""
