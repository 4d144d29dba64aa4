"""`python -m benchmarks`: this project beside the PyTorch reference, on the same inputs, in one run."""
