"""The comparison of benchmarks/token_efficiency.py: a world, the methods, and what is made of their
results."""
