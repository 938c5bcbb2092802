"""Speed, measured: `python -m benchmarks --help`. Ratios of things timed in turn in one run, medians of several."""
