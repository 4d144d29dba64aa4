"""The commands of `calib-jax`, one module each: `add_arguments(parser)` and `run(options) -> exit status`.

A module imports nothing heavy before `run`, so that `--help` is fast.
"""
