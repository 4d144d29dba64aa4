"""What importing the library imports, and that its annotated shapes are those it works with."""

import json
import os
import subprocess
import sys
import textwrap

HEAVY = {
    "PIL",
    "absl.app",
    "beartype",
    "SimpleITK",
    "calib_jax.commands",
    "calib_jax.plots",
    "calib_jax.predictions",
    "calib_jax.report",
    "flax",
    "grain",
    "jinja2",
    "matplotlib",
    "monai",
    "nibabel",
    "optax",
    "orbax",
    "pandas",
    "scipy",
    "tensorflow",
    "torch",
    "tqdm",
    "train",
    "tyro",
}


def run(program):
    """Standard output of a Python program in a fresh interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_costs_little_more_than_importing_jax():
    """Neither an extra is imported nor optax, which takes longer than all of the library."""
    program = "import json, sys, calib_jax; calib_jax.mL1_ace; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run(program)))
    assert {"calib_jax", "jax", "jaxtyping"} <= loaded
    by_jax = set(json.loads(run("import json, sys, jax; print(json.dumps(sorted(sys.modules)))")))
    assert not HEAVY & (loaded - by_jax)


def test_names_are_there_before_they_are_used():
    program = """
        import sys, calib_jax
        print("jax" in sys.modules, "mL1_ace" in dir(calib_jax), calib_jax.binning.__name__)
        try:
            calib_jax.nothing
        except AttributeError as error:
            print(error)
        from calib_jax import *
        print(mL1_ace.__module__)
    """
    assert run(program).splitlines() == [
        "False True calib_jax.binning",
        "module 'calib_jax' has no attribute 'nothing'",
        "calib_jax.losses",
    ]


def test_help_of_the_console_script_loads_no_jax():
    program = """
        import sys
        from calib_jax.cli import main
        try:
            main({arguments})
        except SystemExit:
            print("jax" in sys.modules)
    """
    for arguments in (["--help"], ["report", "--help"], ["triage", "--help"]):
        assert run(program.format(arguments=arguments)).splitlines()[-1] == "False"


def test_import_starts_no_device():
    """The number of devices can be set afterwards, which JAX refuses once it has looked for them."""
    program = """
        import calib_jax, jax
        calib_jax.mL1_ace
        jax.config.update("jax_num_cpu_devices", 3)
        print(jax.device_count("cpu"))
    """
    assert run(program).strip() == "3"


def test_every_public_name_exists_and_is_documented():
    import calib_jax

    assert len(set(calib_jax.__all__)) == len(calib_jax.__all__)
    for name in calib_jax.__all__:
        assert getattr(calib_jax, name).__doc__, name


def test_annotated_shapes_hold_at_run_time():
    """Under beartype, right calls pass and a call that breaks an annotation does not."""
    run(
        """
        import jaxtyping

        modules = [f"calib_jax.{name}" for name in ("binning", "errors", "losses", "metrics", "reliability")]
        with jaxtyping.install_import_hook(modules, "beartype.beartype"):
            import calib_jax as cj
            cj.mL1_ace  # the first name that is used imports the modules

        import jax, jax.numpy as jnp, numpy as np

        ids = np.zeros((2, 4, 5), np.int32)
        probs = np.full((2, 4, 5, 3), 0.3, np.float32)
        options = dict(include_background=False, class_weights=np.ones(2, np.float32))
        for labels in (ids, jnp.asarray(ids), ids.astype(np.uint8), probs):
            jax.eval_shape(lambda: cj.mL1_ace(probs, labels, **options))
        for where in (ids == 0, np.ones(probs.shape, bool)):
            jax.eval_shape(lambda: jax.tree.leaves(cj.bin_statistics(probs, ids, where=where)))
        jax.eval_shape(lambda: cj.mL1_mce(jnp.asarray(probs, jnp.bfloat16), ids, reduction="none"))
        jax.eval_shape(jax.grad(lambda x: cj.segmentation_loss(x, ids)), probs)
        jax.eval_shape(jax.vmap(lambda x, y: cj.mL1_ece(x[None], y[None])), probs, ids)
        jax.eval_shape(lambda: cj.dice_score(ids, ids, num_classes=3))
        jax.eval_shape(lambda: cj.dice_score(probs, ids, num_classes=3))

        count = np.ones((2, 3, 20), np.int32)
        stats = cj.BinStatistics(count, probs.sum() * count.astype(np.float32), count.astype(np.float32))
        errors = cj.average_calibration_error, cj.expected_calibration_error, cj.maximum_calibration_error
        for function in (*errors, cj.reliability_curve, cj.reliability_histogram):
            jax.eval_shape(lambda: jax.tree.leaves(function(stats)))
            jax.eval_shape(lambda traced: jax.tree.leaves(function(traced)), stats)
        for error in errors:
            jax.eval_shape(error, stats.sum())

        try:
            jax.eval_shape(lambda: cj.brier_score(ids, ids))
        except jaxtyping.TypeCheckError:
            pass
        else:
            raise AssertionError("the annotations were not checked")
        """
    )
