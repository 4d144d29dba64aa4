"""Sums over voxels that stay exact at any size.

`exact` adds float32 pairs. `voxels` sums over the voxels of each image. `totals` encodes sums over a data set.

`bins` says what is summed in bins; `cpu`, `gpu`, `gpu_kernel` and `tpu` sum it. Each of these four equals
`jax.ops.segment_sum` over the bins of every image and class, but is faster and more exact: a float32 counter stops
at 2^24, and a running float32 sum of equal numbers drifts long before that. `host` sums one image in NumPy, where
compiling a program for each new shape would take longer than the sum.
"""
