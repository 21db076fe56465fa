"""Options that several benchmarks have: each has one name and one meaning."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch


class Options(argparse.ArgumentParser):
    """What a benchmark can be asked for. Its description is the first line of the docstring."""

    def __init__(self, docstring: str) -> None:
        super().__init__(description=docstring.partition("\n")[0])

    def add_device(self) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.add_argument("--device", default=default)

    def add_dtype(self, without: str) -> None:
        """What is measured without the option."""
        help = f"(default: {without})"
        self.add_argument("--dtype", choices=["float32", "bfloat16"], help=help)

    def add_methods(self, methods: Iterable[str]) -> None:
        self.add_argument("--methods", nargs="+", choices=list(methods), default=list(methods))

    def add_sizes(self, tokens: int, vocabulary: int, features: int | list[int]) -> None:
        """N, V and D, by default as given; of the features several if a list is given."""
        self.add_argument("--tokens", type=int, default=tokens)
        self.add_argument("--vocabulary", type=int, default=vocabulary)
        several = "+" if isinstance(features, list) else None
        self.add_argument("--features", type=int, nargs=several, default=features)

    def add_processes(self) -> None:
        """Of a benchmark that takes each figure in a process of its own, see `measure`."""
        self.add_argument("--seconds", type=float, default=600, help="for each figure at most")
        self.add_argument("--here", help=argparse.SUPPRESS)

    def add_quick(self, what: str) -> None:
        self.add_argument("--quick", action="store_true", help=what)

    def add_items(self) -> None:
        """Of a benchmark that goes on with what its csv holds."""
        self.add_argument("--items", type=int, help="new ones to measure at most (default: all)")

    def add_tiny(self) -> None:
        """Of a benchmark for GPUs: what a CPU can do in seconds, to see that it runs."""
        self.add_argument("--tiny", action="store_true", help="sizes for a CPU; no results")

    def add_output(self, *files: str) -> None:
        self.add_argument("--output", type=Path, help=f"folder for {', '.join(files)}")
