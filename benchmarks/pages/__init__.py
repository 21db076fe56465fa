"""The generator of every table in README, docs and examples."""
