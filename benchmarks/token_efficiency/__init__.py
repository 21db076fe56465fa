"""The comparison of benchmarks/token_efficiency/run.py: a world, the methods, and what is
made of their results."""
