"""`python -m benchmarks`: this project and the PyTorch reference on the same inputs, in one run."""
