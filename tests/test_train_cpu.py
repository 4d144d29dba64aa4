"""How programs are compiled for CPUs."""

import re

import jax
import jax.numpy as jnp
import pytest

from calib_jax import segmentation_loss_parts
from train import cpu


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_convolutions_are_left_to_eigen() -> None:
    """A convolution that YNNPACK is to compute is the body of a fusion that names it."""
    options = cpu.compiler_options("cpu")
    if "xla_cpu_experimental_ynn_fusion_type" not in options:
        pytest.skip("this compiler does not know YNNPACK")
    program = jax.jit(convolution, compiler_options=options).lower(
        jnp.zeros((4, 24, 24, 32)), jnp.zeros((3, 3, 32, 32))
    )
    text = program.compile().as_text()
    assert re.search(r"^ENTRY.*\n(.*\n)*.* convolution\(", text, re.MULTILINE)
    assert "ynn_fusion" not in text.replace("xla_cpu_experimental_ynn_fusion_type", "")


def test_a_compiler_that_does_not_know_the_option_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_EIGEN_CONVOLUTIONS", {"xla_cpu_of_the_future": "YES"})
    cpu._compiler_knows_ynnpack.cache_clear()
    try:
        assert "xla_cpu_of_the_future" not in cpu.compiler_options("cpu")
    finally:
        cpu._compiler_knows_ynnpack.cache_clear()


def test_probabilities_are_written_once() -> None:
    """One fusion puts the classes together, for Dice, mL1-ACE and their gradients."""
    logits, labels = jnp.zeros((2, 64, 64, 48, 3)), jnp.zeros((2, 64, 64, 48), jnp.int32)

    def loss(logits: jax.Array) -> jax.Array:
        return jnp.stack([*segmentation_loss_parts(logits, labels, ["dice", "ace"]).values()]).sum()

    program = jax.jit(jax.value_and_grad(loss), compiler_options=cpu.compiler_options("cpu")).lower(logits)
    entry = program.compile().as_text().split("\nENTRY")[1]
    assert len(re.findall(r"%\S*concatenate\S* = ", entry)) == 1


@pytest.mark.parametrize("platform", ["cuda", "gpu", "tpu"])
def test_other_platforms_are_left_alone(platform: str) -> None:
    assert cpu.compiler_options(platform) == {}
