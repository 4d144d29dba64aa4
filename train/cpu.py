"""Compiler options that make programs faster on CPUs."""

import functools

import jax

_EIGEN_CONVOLUTIONS: dict[str, str | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"
}
# XLA's CPU compiler drops optimisation barriers. It then keeps values that should be recomputed, and recomputes for
# each reader values that should be written once, such as probabilities.
_KEEP_BARRIERS: dict[str, str | bool] = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def compiler_options(platform: str | None = None) -> dict[str, str | bool]:
    """The `compiler_options` for `jax.jit`; empty on platforms other than CPUs.

    Eigen computes convolutions, and YNNPACK matrix products only. Convolutions of the paper's 2-D network with 32
    or more channels then run at 140 to 180 GFLOP/s on two cores instead of 70 to 100 (jaxlib 0.10.2).

    Args:
        platform: the platform that the program will run on; JAX's default backend if missing.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    return _KEEP_BARRIERS | (_EIGEN_CONVOLUTIONS if _compiler_knows_ynnpack() else {})


@functools.cache
def _compiler_knows_ynnpack() -> bool:
    """Whether the compiler accepts the option. Options come and go with its versions, so try it."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        program = jax.jit(lambda: 0).lower()
    try:
        program.compile(compiler_options=_EIGEN_CONVOLUTIONS)
    except jax.errors.JaxRuntimeError:
        return False
    return True
