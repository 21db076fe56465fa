"""What the benchmarks share: inputs, options, reports, measuring, counted allocations, and the
peers behind one signature."""
