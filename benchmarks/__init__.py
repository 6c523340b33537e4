"""What `lm` costs, measured against bare JAX and PyTorch; see `benchmarks/README.md`."""
