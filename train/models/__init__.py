"""Networks: `registry` finds them by name, `unet`, `segresnet` and `unetr` are built from `blocks` and `layers`.

Each network has a config class of its own, such as `unet_config.UNetConfig`. Config classes import no Flax.
"""
