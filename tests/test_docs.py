"""Snippets of README and documentation run, the API pages are complete, and every public function teaches."""

import inspect
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calib_jax

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FUNCTIONS = [name for name in calib_jax.__all__ if inspect.isfunction(getattr(calib_jax, name))]


def blocks(language):
    """Blocks of code by page and number."""
    return {
        f"{page.relative_to(ROOT)} {number}": block
        for page in PAGES
        for number, block in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        )
    }


def readers_names():
    """What the reader of a snippet is said to have: a network, a batch of images and labels, logits."""
    key = jax.random.key(0)
    images = jax.random.normal(key, (8, 16, 16, 2))
    labels = (images[..., 0] > 0).astype(jnp.int32) + (images[..., 1] > 1)
    params = {"kernel": 0.1 * jax.random.normal(key, (2, 3)), "bias": jnp.zeros(3)}

    def apply(params, images):
        return images @ params["kernel"] + params["bias"]

    logits = 3 * jax.random.normal(jax.random.key(1), (*labels.shape, 3)) + jax.nn.one_hot(labels, 3)
    batches = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]
    return {
        "images": images,
        "labels": labels,
        "logits": logits,
        "probs": np.asarray(jax.nn.softmax(logits)),
        "params": params,
        "apply": apply,
        "batches": batches,
        "dice_loss": jnp.float32(0),
    }


@pytest.mark.parametrize("name", blocks("python"))
def test_snippets_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    exec(compile(blocks("python")[name], name, "exec"), readers_names())
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")


def test_the_pages_have_a_snippet_for_each_way_of_use():
    text = "\n".join(blocks("python").values())
    for word in (
        "optax.apply_updates",
        "nnx.Optimizer",
        "jax.vmap",
        "jax.shard_map",
        "fit_temperature",
        "where=",
    ):
        assert word in text


def test_the_api_pages_have_every_public_name():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = re.findall(r"^\.\. (?:autofunction|autoclass|py:data):: (\w+)$", text, flags=re.MULTILINE)
    assert set(calib_jax.__all__) <= set(documented)
    assert len(documented) == len(set(documented))


def test_pages_link_to_files_that_exist():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_of_functions_have_every_part(name):
    doc = inspect.getdoc(getattr(calib_jax, name))
    assert ">>>" in doc, "an example that runs"
    refers = "Arguments, results and errors are those of" in doc
    for part in ("Example:", *(() if refers else ("Args:", "Returns:"))):
        assert part in doc, part
