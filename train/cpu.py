"""How programs are compiled to run faster on a CPU than by default."""

import functools

import jax

_EIGEN_CONVOLUTIONS: dict[str, str | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"
}
# XLA's CPU compiler drops barriers. It then keeps what was to be computed again, and computes several times what
# was to be written out once for all its readers, as probabilities are.
_KEEP_BARRIERS: dict[str, str | bool] = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def compiler_options(platform: str | None = None) -> dict[str, str | bool]:
    """What to give `jax.jit` as `compiler_options`; nothing on other platforms than CPUs.

    YNNPACK is left to matrix products, and Eigen computes convolutions: those of the paper's 2-D network
    with 32 and more channels at 140 to 180 GFLOP/s on two cores instead of 70 to 100 (jaxlib 0.10.2).

    Args:
        platform: of the devices that the program is for; by default JAX's own choice.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    return _KEEP_BARRIERS | (_EIGEN_CONVOLUTIONS if _compiler_knows_ynnpack() else {})


@functools.cache
def _compiler_knows_ynnpack() -> bool:
    """Asked of the compiler itself, since options come and go with its versions."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        program = jax.jit(lambda: 0).lower()
    try:
        program.compile(compiler_options=_EIGEN_CONVOLUTIONS)
    except jax.errors.JaxRuntimeError:
        return False
    return True
