"""Speed of the kernels, measured as docs/kernels.md describes: ``python -m benchmarks.bench_infonce``."""
