"""Networks by name: their options, networks from outside the project, and configurations of older versions."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import refuses, run, write_msd
from flax import nnx

from train.cli import parse
from train.config import ModelConfig, RunConfig, from_json, read_config, to_json
from train.errors import InputError
from train.models import registry
from train.models.configs import SegResNetConfig, UNetConfig, UNETRConfig
from train.run.load import load_run
from train.terms import TERMS

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "my_networks.py"
OLD_RUN = Path(__file__).parent / "old_runs" / "unet-0.1"
TINY = ["--data", "phantom2d", "--steps", 2, "--batch-size", 8, "--warmup-steps", 1, "--patch", 16, 16]
TINY += ["--num-test", 2, "--num-val", 0, "--loss", "dice"]
HEAVY = ("flax", "grain", "nibabel", "orbax", "matplotlib", "scipy", "jinja2", "tensorboardX")


@pytest.fixture
def my_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder on sys.path, with the example of the documentation in it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(EXAMPLE, folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return folder


# Imports.


def modules_after(program: str) -> set[str]:
    """The modules that a program has imported when it ends, in a fresh interpreter."""
    code = f"import sys\ntry:\n    {program}\nexcept SystemExit:\n    pass\nsys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("command", ["fit", "plan", "import-monai", "evaluate", ""])
def test_help_imports_nothing_heavy(command: str) -> None:
    """The parameters of the loss terms, which `fit --help` lists, come from the loss functions and so from jax."""
    found = modules_after(f"from train.cli import main; main({[*command.split(), '--help']})")
    assert "tyro" in found
    assert not found & {*HEAVY, *([] if command == "fit" else ["jax"])}


def test_help_lists_the_loss_terms(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("compare", "--help")
    printed = capsys.readouterr().out
    assert all(name in printed for name in TERMS)


def test_networks_import_neither_readers_of_data_nor_the_report() -> None:
    found = modules_after("import train.models.unet, train.models.segresnet, train.models.unetr")
    assert "flax" in found
    assert not found & {*HEAVY, "calib_jax"} - {"flax"}


# Options.


def test_only_options_of_the_chosen_network_are_offered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--architecture", "segresnet", "--help")
    offered = capsys.readouterr().out
    assert "--init-filters" in offered
    assert "--num-res-units" not in offered
    chosen = parse(["fit", "--architecture=segresnet", "--init-filters", "16"]).model
    assert chosen == ModelConfig("segresnet", network=SegResNetConfig(init_filters=16))


def test_another_architecture_than_the_recipes() -> None:
    recipe = ["--recipe", "followup_acdc_dice_ce"]
    assert parse(["fit", *recipe, "--architecture", "unet"]).model == ModelConfig(
        "unet", norm="affine-instance"
    )
    assert parse(["fit", *recipe, "--architecture", "my:make"]).model == ModelConfig("my:make")


NETWORK_IN_ONE_FILE = """
from dataclasses import dataclass
from flax import nnx
from train.models.registry import NetworkConfig

@dataclass(frozen=True)
class OneConvConfig(NetworkConfig):
    width: int = 3

    def make(self, *, in_channels, out_channels, spatial_dims, patch, dropout, rngs):
        size = (self.width,) * spatial_dims
        return nnx.Conv(in_channels, out_channels, size, rngs=rngs)
"""


def test_a_new_network_is_one_file_and_one_line(my_networks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (my_networks / "one_conv.py").write_text(NETWORK_IN_ONE_FILE)
    monkeypatch.setitem(registry.NETWORKS, "oneconv", "one_conv:OneConvConfig")
    model = parse(["fit", "--architecture", "oneconv", "--width", "5"]).model
    assert from_json(ModelConfig, to_json(model)) == model
    sizes = {"in_channels": 2, "out_channels": 3, "spatial_dims": 2, "patch": (8, 8), "rngs": nnx.Rngs(0)}
    assert registry.make_network(model, **sizes)(np.ones((1, 8, 8, 2), np.float32)).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--architecture", "vnet"],
            "architecture is 'vnet': give unet, segresnet, unetr, or package.module:factory",
        ),
        (["--init-filters", "4"], "init_filters is an option of segresnet, but the architecture is unet"),
        (
            ["--architecture", "my:make", "--norm", "group"],
            "norm is group, but a network from outside takes no --norm",
        ),
        (["--architecture", "my:make", "--dropout", "0.1"], "dropout is 0.1, but a network from outside"),
        (
            ["--architecture", "my:make", "--channels", "4"],
            "channels is an option of unet, but the architecture",
        ),
    ],
)
def test_options_of_another_network(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refuses(capsys, "fit", *arguments)


def test_config_of_another_architecture() -> None:
    with pytest.raises(InputError, match="network is a UNetConfig, but the architecture is segresnet"):
        ModelConfig("segresnet", network=UNetConfig())


# Networks from outside.


def test_a_users_network_fits_evaluates_and_resumes(my_networks: Path, tmp_path: Path) -> None:
    architecture, out = "my_networks:make(width=4)", tmp_path / "run"
    command = ["fit", "--architecture", architecture, *TINY, "--out", out]
    assert run(*command) == 0
    config, _, predict = load_run(out)
    assert config.model == ModelConfig(architecture)
    assert predict(np.zeros((20, 16, 2), np.float32)).shape == (20, 16, 4)
    assert run("evaluate", out) == 0
    assert (out / "evaluate-test" / "index.html").exists()
    assert run(*command, "--resume") == 0


FACTORIES = """
from flax import nnx
import jax.numpy as jnp

class Pooled(nnx.Module):
    def __init__(self, *, in_channels, out_channels, spatial_dims, patch, rngs):
        self.out_channels = out_channels
    def __call__(self, x):
        return jnp.ones((*x[:, ::2].shape[:-1], self.out_channels))

class Failing(Pooled):
    def __call__(self, x):
        raise ValueError("no such axis")

def nothing(*, in_channels, out_channels, spatial_dims, patch, rngs):
    return None

def needy(*, in_channels, out_channels, spatial_dims, patch, rngs, width):
    return Pooled(in_channels, out_channels)
"""


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("no_such_module:make", "module 'no_such_module' cannot be imported"),
        ("my_networks:build", "module 'my_networks' has no 'build'"),
        ("my_networks:make(depth=3)", "has no argument 'depth': it takes width"),
        ("my_networks:make(width=)", "arguments that cannot be read"),
        (
            "factories:Pooled",
            "logits of shape (1, 8, 16, 4) for images of shape (1, 16, 16, 2): it must give (1, 16",
        ),
        ("factories:Failing", "fails on images of shape (1, 16, 16, 2) (ValueError: no such axis)"),
        ("factories:nothing", "returns a NoneType: return a flax.nnx.Module"),
        ("factories:needy", "width"),
    ],
)
def test_a_users_network_that_does_not_fit(
    architecture: str, words: str, my_networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (my_networks / "factories.py").write_text(FACTORIES)
    sys.modules.pop("factories", None)
    out = tmp_path / "run"
    assert words in refuses(capsys, "fit", "--architecture", architecture, *TINY, "--out", out)
    assert not out.exists()


def test_a_users_network_says_what_divides_a_patch(
    my_networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patch = ["--patch", 15, 16, "--out", tmp_path / "run"]
    message = refuses(capsys, "fit", "--architecture", "my_networks:make", *TINY, *patch)
    assert (
        "patch (15, 16) is not divided by the network's strides, whose products along the axes are (2, 2)"
        in message
    )


# Runs of version 0.1.


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD_RUN, tmp_path / "old"))


def test_configurations_of_old_runs() -> None:
    config, info = read_config(OLD_RUN)
    assert config.model == ModelConfig("unet", network=UNetConfig((4, 8), (2,)))
    assert info.intensity_range is None
    kept: dict[str, Any] = json.loads((OLD_RUN / "config.json").read_text())["config"]
    flat = kept["model"] | {"architecture": "segresnet", "init_filters": 16, "blocks_up": [1, 2, 1]}
    segresnet = SegResNetConfig(init_filters=16, blocks_up=(1, 2, 1))
    assert from_json(ModelConfig, flat) == ModelConfig("segresnet", network=segresnet)
    flat = kept["model"] | {"architecture": "unetr", "hidden_size": 24, "norm": "group"}
    assert from_json(ModelConfig, flat) == ModelConfig(
        "unetr", norm="group", network=UNETRConfig(hidden_size=24)
    )
    oldest = {name: kept["model"][name] for name in ("channels", "strides", "num_res_units", "dropout")}
    assert from_json(ModelConfig, oldest) == config.model
    assert from_json(RunConfig, to_json(config)) == config


def test_intensity_range_of_old_runs(old_run: Path) -> None:
    file = old_run / "config.json"
    kept = json.loads(file.read_text())
    kept["data"]["window"] = [-100, 200]
    file.write_text(json.dumps(kept))
    assert read_config(old_run)[1].intensity_range == (-100, 200)


@pytest.mark.usefixtures("undrawn")
def test_an_old_run_evaluates_resumes_and_starts_another(
    old_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", old_run) == 0
    kept = json.loads((OLD_RUN / "config.json").read_text())["command"].split()
    command = [*kept[3:-4], "--batch-size", 8]
    options = kept[3 : kept.index("--loss")]
    resumed = [*options, "--loss", "dice+softace", "--out", old_run, "--resume"]
    config = json.loads((old_run / "config.json").read_text())
    config["config"]["training"] |= {"steps": 5, "batch_size": 8}  # as many as the tests have devices
    (old_run / "config.json").write_text(json.dumps(config))
    assert run(*resumed, "--steps", 5, "--batch-size", 8) == 0
    assert len((old_run / "log.csv").read_text().splitlines()) == 6
    data = command[1 : command.index("--channels")]
    more = ["--num-test", 3, "--num-val", 2, "--steps", 1, "--batch-size", 8, "--loss", "dice"]
    assert run("fit", *data, *more, "--init", old_run, "--out", tmp_path / "next") == 0
    assert read_config(tmp_path / "next")[0].model == read_config(OLD_RUN)[0].model
    message = refuses(capsys, "fit", *data, *more, "--init", old_run, "--num-res-units", 1)
    assert "num_res_units and the network's other options come from --init" in message


# 2-D networks on 3-D images.


def test_slices_are_those_of_the_2d_network() -> None:
    model = ModelConfig(network=UNetConfig(channels=(4, 8), strides=(2,)))
    sizes: Any = {"in_channels": 2, "out_channels": 3, "patch": (8, 6, 5)}
    slicewise = registry.make_network(
        dataclasses.replace(model, slices=True), **sizes, spatial_dims=3, rngs=nnx.Rngs(0)
    )
    planar = registry.make_network(model, **sizes | {"patch": (8, 6)}, spatial_dims=2, rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).normal(size=(2, 8, 6, 5, 2)).astype(np.float32)
    found = slicewise(image)
    assert found.shape == (2, 8, 6, 5, 3)
    for i in range(5):
        np.testing.assert_allclose(found[..., i, :], planar(image[..., i, :]), atol=1e-5)


def test_slices_train_on_patches_of_one_slice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_msd(tmp_path, 4, (11, 14, 9), np.s_[3:8, 4:10, 2:7], np.eye(4))
    command = [
        "fit",
        "--data",
        f"msd:{data}",
        "--steps",
        2,
        "--batch-size",
        8,
        "--channels",
        4,
        8,
        "--strides",
        2,
    ]
    command += ["--num-test", 1, "--num-val", 1, "--loss", "dice", "--slices"]
    out = tmp_path / "run"
    assert run(*command, "--patch", 8, 8, 1, "--out", out) == 0
    config = read_config(out)[0]
    assert config.data.patch == (8, 8, 1)
    assert load_run(out)[2](np.zeros((11, 14, 9, 1), np.float32)).shape == (11, 14, 9, 2)
    assert "(8, 8, 3) would be" in refuses(capsys, *command, "--patch", 9, 8, 3)
    assert "slices needs 3-D images" in refuses(capsys, "fit", *TINY, "--slices")
