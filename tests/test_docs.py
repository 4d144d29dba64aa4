"""The README's snippets run, the API page is that of the code, and every public function teaches."""

import importlib.util
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calib_jax

ROOT = Path(__file__).parent.parent
FUNCTIONS = [name for name in calib_jax.__all__ if inspect.isfunction(getattr(calib_jax, name))]


def snippets():
    """The README's Python blocks under the heading before each."""
    text = (ROOT / "README.md").read_text()
    found, title = {}, ""
    for heading, block in re.findall(
        r"^#+ ([^\n]+)$|^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL
    ):
        title = heading or title
        if block:
            found[f"{title} {sum(key.startswith(title) for key in found) + 1}"] = block
    return found


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


@pytest.mark.parametrize("name", snippets())
def test_snippets_of_the_readme_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    exec(compile(snippets()[name], f"README: {name}", "exec"), readers_names())


def test_the_readme_has_a_snippet_for_each_way_of_use():
    text = "\n".join(snippets().values())
    for word in ("optax.apply_updates", "nnx.Optimizer", "jax.vmap", "jax.shard_map", "fit_temperature"):
        assert word in text


def test_the_api_page_is_that_of_the_docstrings():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert make_api.PAGE.read_text() == make_api.page(), "run python docs/make_api.py"
    assert all(f"### `{name}`" in make_api.page() for name in calib_jax.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_of_functions_have_every_part(name):
    doc = inspect.getdoc(getattr(calib_jax, name))
    assert ">>>" in doc, "an example that runs"
    refers = "Arguments, results and errors are those of" in doc
    for part in ("Example:", *(() if refers else ("Args:", "Returns:"))):
        assert part in doc, part
