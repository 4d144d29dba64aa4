"""Networks: `registry` finds them by name, `unet`, `segresnet` and `unetr` are built from `blocks` and `layers`.

Each network has a config class in `configs`, which imports no Flax.
"""
