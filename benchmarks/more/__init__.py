"""Benchmarks of single questions: a cross-entropy beside its peers, sampling engines beside each
other."""
