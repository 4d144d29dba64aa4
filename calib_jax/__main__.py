"""`python -m calib_jax`: the console script `calib-jax`."""

import sys

from calib_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
