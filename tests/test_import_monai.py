"""Weights of MONAI's networks as runs: imported, evaluated, predicted with, trained on; and what is refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from commands import refuses, run, write_msd
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import TINY_UNETR, make_segresnet, make_unet, make_unetr, patterned_state

from train.config import DataConfig, DataInfo, ModelConfig, RunConfig, read_config
from train.errors import InputError
from train.models.configs import UNetConfig, UNETRConfig
from train.monai.identify import find_network, fitting_options
from train.monai.import_run import load_weights
from train.monai.mapping import load_monai_weights, monai_names
from train.monai.weights import read_weights
from train.run.load import load_run

DTYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
SEGRESNET = ["--architecture", "segresnet", "--blocks-down", 1, 1]
SIZES = {"in_channels": 1, "out_channels": 2}


def safetensors(arrays: dict[str, np.ndarray], **changes: object) -> bytes:
    """A file's content; `changes` replace entries of the header."""
    header, data = {}, b""
    for name, array in arrays.items():
        start, data = len(data), data + array.tobytes()
        entry = {"dtype": DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [start, len(data)]}
        header[name] = entry
    text = json.dumps(header | changes).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(file: Path, arrays: dict[str, np.ndarray]) -> Path:
    file.write_bytes(safetensors(arrays))
    return file


@pytest.fixture(scope="module")
def segresnet() -> dict[str, np.ndarray]:
    """Weights of a SegResNet of 1 channel and 2 classes."""
    return patterned_state(make_segresnet(**SIZES, blocks_down=(1, 1)))


@pytest.fixture(scope="module")
def msd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small cases of one channel and two classes in the Decathlon's layout."""
    return write_msd(tmp_path_factory.mktemp("msd"), 4, (8, 9, 7), np.s_[2:6, 3:7, 2:5], np.eye(4))


@pytest.fixture(scope="module")
def imported(msd: Path, segresnet: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a SegResNet imported for `msd`."""
    folder = tmp_path_factory.mktemp("imported")
    file = write(folder / "model.safetensors", {f"module.{k}": v for k, v in segresnet.items()})
    data = ["--data", f"msd:{msd}", "--num-test", 2, "--num-val", 0]
    assert run("import-monai", file, *SEGRESNET, *data, "--out", folder / "run") == 0
    return folder / "run"


def test_imported_weights_are_the_runs(imported: Path, segresnet: dict[str, np.ndarray]) -> None:
    model = make_segresnet(**SIZES, blocks_down=(1, 1))
    load_monai_weights(model, segresnet)
    config, info, predict = load_run(imported)
    image = np.random.default_rng(0).normal(size=(*config.data.patch, 1)).astype(np.float32)
    np.testing.assert_allclose(predict(image), jax.nn.softmax(model(image[None])[0]), atol=1e-5)
    assert info.class_names == ("background", "box")


def test_evaluate_and_predict(imported: Path, msd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", imported) == 0
    assert "imported" in capsys.readouterr().out
    assert (imported / "evaluate-test" / "index.html").exists()
    out = imported / "predictions"
    assert run("predict", imported, "--images", msd / "imagesTr", "--out", out) == 0
    assert nib.load(out / "case_0_probs.nii.gz").shape == (8, 9, 7, 2)


def test_training_goes_on_from_imported_weights(imported: Path, msd: Path, tmp_path: Path) -> None:
    options = [
        "--data",
        f"msd:{msd}",
        "--num-test",
        2,
        "--num-val",
        0,
        "--batch-size",
        8,
        "--warmup-steps",
        1,
    ]
    out = tmp_path / "tuned"
    tiny_steps = ["--steps", 2, "--learning-rate", 1e-6, "--ace-delay", 0, "--ace-ramp", 0]
    assert run("fit", "--init", imported, *options, *tiny_steps, "--loss", "dice+ace", "--out", out) == 0
    config, _ = read_config(out)
    assert config.model.architecture == "segresnet"
    image = np.random.default_rng(0).normal(size=(*config.data.patch, 1)).astype(np.float32)
    before, after = (load_run(folder)[2](image) for folder in (imported, out))
    assert 0 < np.abs(before - after).max() < 1e-3


def test_init_of_another_network_or_data(
    imported: Path, msd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--init", imported, "--out", tmp_path / "out"]
    data = ["--data", f"msd:{msd}", "--num-test", 2, "--num-val", 0]
    assert "come from --init" in refuses(capsys, "fit", *options, *data, "--channels", 4, 8, "--strides", 2)
    assert "they must be the same" in refuses(capsys, "fit", *options, "--data", "phantom")
    assert not (tmp_path / "out").exists()


def test_without_a_data_set(
    segresnet: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "model.safetensors", segresnet)
    options = [file, *SEGRESNET, "--out", tmp_path / "run"]
    assert "either --data or --class-names" in refuses(capsys, "import-monai", *options)
    twice = ["--class-names", "background", "box", "box"]
    assert "names a class twice" in refuses(capsys, "import-monai", *options, *twice)
    classes = ["--class-names", "background", "box"]
    assert "give its --patch" in refuses(capsys, "import-monai", *options, *classes)
    assert not (tmp_path / "run").exists()
    assert run("import-monai", *options, *classes, "--patch", 8, 8, 8, "--intensities", -200, 300) == 0
    config, info = read_config(tmp_path / "run")
    assert (config.data.patch, info.class_names, info.intensity_range) == (
        (8, 8, 8),
        ("background", "box"),
        (-200, 300),
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--architecture", "unet"],
            ["holds a segresnet", "--init-filters 8 --blocks-down 1 1 --blocks-up 1"],
        ),
        ([*SEGRESNET[:-1], 2], ["down_layers.1.2.norm1.weight (and 5 more) is missing", "--blocks-down 1 1"]),
        ([*SEGRESNET, "--init-filters", 16], ["convInit.conv.weight has shape (8, 1, 3, 3, 3)", "(16,"]),
        ([*SEGRESNET, "--deep-supervision", 1], ["is missing", "left over", "--init-filters 8"]),
        ([*SEGRESNET, "--num-channels", 2], ["convInit.conv.weight has shape", "2 channels and 2 classes"]),
        ([*SEGRESNET, "--hidden-size", 8], ["hidden_size is an option of unetr"]),
        (["--architecture", "my.nets:make"], ["MONAI has no my.nets:make"]),
        ([*SEGRESNET, "--patch", 9, 8, 8], ["patch (9, 8, 8)", "(8, 8, 8)"]),
    ],
)
def test_options_that_do_not_fit(
    options: list[object],
    words: list[str],
    segresnet: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path / "model.safetensors", segresnet)
    patch = [] if "--patch" in options else ["--patch", 8, 8, 8]
    data = ["--class-names", "background", "box", *patch]
    message = refuses(capsys, "import-monai", file, *options, *data, "--out", tmp_path / "run")
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (
            lambda: make_unet(**SIZES, channels=(4, 6, 8), strides=(2, 2)),
            "--architecture unet --channels 4 6 8 --num-res-units 2",
        ),
        (
            lambda: make_unet(**SIZES, channels=(4, 6), strides=(2,), num_res_units=0, norm="batch"),
            "--architecture unet --norm batch --channels 4 6 --num-res-units 0",
        ),
        (
            lambda: make_segresnet(**SIZES, blocks_down=(1, 2, 1), blocks_up=(1, 2), deep_supervision=2),
            "--architecture segresnet --init-filters 8 --blocks-down 1 2 1 --blocks-up 1 2 --deep-supervision 2",
        ),
        (
            lambda: make_unetr(**SIZES, image_size=(16, 16), **TINY_UNETR),
            "--architecture unetr --feature-size 2 --hidden-size 8 --mlp-dim 12",
        ),
    ],
)
def test_options_told_from_weights(make: object, options: str) -> None:
    state = {f"net.{name}": array for name, array in patterned_state(jax.eval_shape(make)).items()}
    architecture, prefix, copies = find_network(state)
    assert (prefix, copies) == ("net.", [])
    assert fitting_options(architecture, {k.removeprefix(prefix): v for k, v in state.items()}) == options


def test_two_networks_in_one_file(segresnet: dict[str, np.ndarray]) -> None:
    assert find_network({"x": np.zeros(1)}) is None
    both = {f"{role}.{name}": array for role in ("student", "teacher") for name, array in segresnet.items()}
    with pytest.raises(ValueError, match=r"several networks, under student\., teacher\."):
        find_network(both)


# Files.


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", jnp.bfloat16])
def test_dtypes_become_float32(dtype: object, tmp_path: Path) -> None:
    values = np.array([[0.5, -1.25, 3.0]])
    read = read_weights(write(tmp_path / "w.safetensors", {"a": values.astype(dtype), "n": np.array(7)}))
    assert read["a"].dtype == np.float32
    np.testing.assert_array_equal(read["a"], values)
    assert read["n"] == 7


ARRAYS = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        safetensors(ARRAYS)[:40],
        safetensors(ARRAYS)[:-1],
        safetensors(ARRAYS) + b"\0",
        b"\x02" + b"\0" * 7 + b"{]",
        b"\x02" + b"\0" * 7 + b"[]",
        b"\x0d" + b"\0" * 7 + b'{"a":1,"a":2}',
        safetensors(ARRAYS, a=entry(dtype="F8_E4M3", shape=[2, 12])),
        safetensors(ARRAYS, a=entry(shape=[2, -3])),
        safetensors(ARRAYS, a=entry(data_offsets=[24, 0])),
        safetensors(ARRAYS, a=entry(data_offsets=[8, 32])),
        safetensors(ARRAYS, c=entry(data_offsets=[4, 28])),
        safetensors(ARRAYS, __metadata__=[1]),
    ],
)
def test_damaged_safetensors(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as safetensors .*: fetch it again") as refused:
        read_weights(file)
    assert str(refused.value).startswith(str(file))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value: float, unet: dict[str, np.ndarray], tmp_path: Path) -> None:
    state = {**unet, "model.0.residual.bias": np.array([1.0, 2.0, 3.0, value])}
    file = write(tmp_path / "w.safetensors", {f"net.{name}": array for name, array in state.items()})
    with pytest.raises(
        InputError, match=r"has net\.model\.0\.residual\.bias with values that are not finite"
    ):
        loaded(file)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("wrapped", [(), ("state_dict",), ("model",), ("network", "state_dict")])
def test_torch_checkpoints(wrapped: tuple[str, ...], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    kept: object = {name: torch.tensor(array) for name, array in ARRAYS.items()} | {
        "half": torch.ones(2, dtype=torch.bfloat16)
    }
    for name in reversed(wrapped):
        kept = {"epoch": 3, "optimizer": {"lr": 0.1}, name: kept}
    torch.save(kept, tmp_path / "w.ckpt")
    read = read_weights(tmp_path / "w.ckpt")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)
    assert read["half"].dtype == np.float32


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_no_code_is_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    witness = tmp_path / "witness"
    torch.save({"state_dict": {"a": torch.ones(1)}, "more": Malicious(witness)}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Malicious(witness)))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(InputError, match=r"holds more than weights|cannot be read as weights"):
            read_weights(tmp_path / name)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Malicious(witness)))
    assert witness.exists()  # so it would have been


def test_torch_files_that_are_none(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for name in ("cut.pt", "text.pt"):
        with pytest.raises(InputError, match=f"{name} (cannot be read|holds more)"):
            read_weights(tmp_path / name)
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds no weights by name"):
        read_weights(tmp_path / "list.pt")


def test_torch_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "w.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"needs PyTorch: install the extra `reference`, or convert it"):
        read_weights(tmp_path / "w.pt")


# What checkpoints hold beside the network, and sigmoids.


TINY = ["--channels", 4, 8, "--strides", 2]
CLASSES = ["--class-names", "background", "box", "--patch", 8, 8, 8]
CONFIG = RunConfig("imported", DataConfig("", patch=(8, 8, 8)), ModelConfig(network=UNetConfig((4, 8), (2,))))
INFO = DataInfo("none", ("background", "box"), num_channels=1, spatial_dims=3)


def small_unet(**options: object) -> nnx.Module:
    return make_unet(**{**SIZES, "channels": (4, 8), "strides": (2,), **options})


@pytest.fixture(scope="module")
def unet() -> dict[str, np.ndarray]:
    return patterned_state(jax.eval_shape(small_unet))


def loaded(file: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The weights that an import takes, by MONAI's names and in its order of axes, and its notes."""
    model = small_unet()
    notes = load_weights(model, file, CONFIG, INFO)
    names = monai_names(model)
    return {
        name: np.asarray(parameter[...]).transpose(np.argsort(axes) if axes else None)
        for name, (parameter, axes) in names
    }, notes


NAMES = st.text("abcxyz_", min_size=1, max_size=6)
PREFIXES = st.lists(
    st.sampled_from(["module", "_orig_mod", "net", "network", "model", "ema_model"]), max_size=3
)


@given(
    prefix=PREFIXES,
    wrappers=st.lists(st.sampled_from(["state_dict", "model", "net", "checkpoint"]), max_size=2),
    beside=st.dictionaries(
        st.lists(NAMES, min_size=2, max_size=3).map(lambda parts: ".".join(["beside", *parts])),
        st.sampled_from([np.float32(np.nan), np.zeros((2, 3), np.float32), np.array(7), np.ones(1, bool)]),
        max_size=5,
    ),
    optimizer=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_lies_beside_a_network(
    prefix: list[str],
    wrappers: list[str],
    beside: dict[str, np.ndarray],
    optimizer: bool,
    unet: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    """Under any prefix and wrapper the same weights are taken, and the rest is named."""
    torch = pytest.importorskip("torch")
    kept: dict[str, object] = {".".join([*prefix, name]): torch.tensor(unet[name]) for name in unet}
    kept |= {name: torch.tensor(array) for name, array in beside.items()}
    for wrapper in wrappers:
        kept = {
            wrapper: kept,
            "epoch": 3,
            "best": np.mean([0.8, 0.9]),
            "loss": np.zeros(2),
            "name": np.str_("a"),
        }
    if optimizer:
        kept = {"state_dict": kept, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2), "step": 1}}}}
    file = tmp_path / "w.pt"
    torch.save(kept, file)
    weights, notes = loaded(file)
    assert weights.keys() == unet.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(array, unet[name], err_msg=name)
    others = len(beside) + optimizer
    assert any("beside the network" in note for note in notes) == (others > 0)
    assert others <= 3 or any(f"and {others - 3} more beside" in note for note in notes)
    for name in list(beside)[:3] if not optimizer else []:
        assert any(name in note for note in notes)


def test_an_averaged_copy_is_left(unet: dict[str, np.ndarray], tmp_path: Path) -> None:
    plain = {f"net.{name}": array for name, array in unet.items()}
    copy = {f"net_ema.module.{name}": np.zeros_like(array) for name, array in unet.items()}
    weights, notes = loaded(write(tmp_path / "w.safetensors", {**copy, **plain}))
    np.testing.assert_array_equal(weights["model.0.residual.weight"], unet["model.0.residual.weight"])
    assert "a copy of the network under net_ema.module., averaged over training" in notes[0]
    alone, _ = loaded(write(tmp_path / "w.safetensors", copy))
    assert not alone["model.0.residual.weight"].any()


def test_unused_weights_of_old_networks_are_named(tmp_path: Path) -> None:
    options = {"feature_size": 2, "hidden_size": 8, "mlp_dim": 12, "num_heads": 2}
    state = patterned_state(jax.eval_shape(lambda: make_unetr(**SIZES, image_size=(16, 16, 16), **options)))
    unused = {
        "vit.patch_embedding.cls_token": np.zeros((1, 1, 8), np.float32),
        "encoder2.blocks.0.1.conv3.conv.weight": np.zeros((4, 4, 1, 1, 1), np.float32),
    }
    config = RunConfig(
        "imported", DataConfig("", patch=(16,) * 3), ModelConfig("unetr", network=UNETRConfig(**options))
    )
    model = make_unetr(**SIZES, image_size=(16, 16, 16), **options)
    notes = load_weights(model, write(tmp_path / "w.safetensors", state | unused), config, INFO)
    assert f"{', '.join(sorted(unused))}, which MONAI's unetr does not use" in notes[0]
    assert "2 heads of attention" in notes[1]


def test_what_weights_do_not_tell_is_said_and_kept(
    unet: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "w.safetensors", unet)
    assert run("import-monai", file, *TINY, *CLASSES, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["notes"]
    for words in ("strides 2", "adn_ordering='NDA'", "instance norm", "softmax (--activation)"):
        assert words in said
        assert words in kept[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "affine-instance"}, "give --norm affine-instance, or --norm group"),
        ({"norm": "batch"}, "give --norm batch"),
        ({"num_res_units": 1}, "its weights say --num-res-units 1"),
        ({"channels": (4, 6)}, "its weights say --channels 4 6"),
        ({"strides": (1,)}, "--strides with 1 at level 1"),
        ({"spatial_dims": 2}, "it is for 2-D images, the data are 3-D"),
    ],
)
def test_hints_say_what_differs_and_nothing_else(
    options: dict[str, object], words: str, tmp_path: Path
) -> None:
    state = patterned_state(jax.eval_shape(lambda: small_unet(**options)))
    with pytest.raises(InputError) as refused:
        load_weights(small_unet(), write(tmp_path / "w.safetensors", state), CONFIG, INFO)
    message = str(refused.value)
    assert words in message
    given = ("--architecture", "--channels 4 8", "--num-res-units 2", "--norm instance")
    assert not [option for option in given if option in message]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda name, array: None if name.endswith("adn.A.weight") else array,
            "it has no PReLU but another activation function",
        ),
        (
            lambda name, array: None if name.endswith("conv.bias") else array,
            "no bias (bias=False), which is not supported",
        ),
        (
            lambda name, array: np.zeros((*array.shape[:2], 5, 5, 5)) if array.ndim == 5 else array,
            "kernels of 5x5x5 voxels, and only 3 a side",
        ),
    ],
)
def test_hints_say_what_no_option_makes(
    change: Callable[[str, np.ndarray], np.ndarray | None],
    words: str,
    unet: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    changed = {name: change(name, array) for name, array in unet.items()}
    state = {name: array for name, array in changed.items() if array is not None}
    with pytest.raises(InputError) as refused:
        load_weights(small_unet(), write(tmp_path / "w.safetensors", state), CONFIG, INFO)
    message = str(refused.value)
    assert words in message
    given = ("--architecture", "--channels 4 8", "--num-res-units 2", "--norm instance")
    assert not [option for option in given if option in message]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_networks_saved_whole_and_archives_of_code(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Conv3d(1, 2, 3), tmp_path / "whole.pt")
    with pytest.raises(InputError, match=r"torch\.nn\.\S*Conv3d for one.*save the network's state_dict"):
        read_weights(tmp_path / "whole.pt")
    torch.jit.save(torch.jit.script(torch.nn.Conv3d(1, 2, 3)), tmp_path / "model.ts")
    with pytest.raises(InputError, match="is a TorchScript archive"):
        read_weights(tmp_path / "model.ts")


@pytest.mark.parametrize("names", [("tumour",), ("whole", "core", "enhancing")])
def test_sigmoids_of_monai(names: tuple[str, ...], msd: Path, tmp_path: Path) -> None:
    """Probabilities are the sigmoids that MONAI gives, alone and in the files that are predicted."""
    torch = pytest.importorskip("torch")
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    theirs = nets.UNet(3, 1, len(names), (4, 8), (2,), num_res_units=2).eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "w.pt")
    options = [*TINY, "--patch", 8, 8, 8, "--activation", "sigmoid", "--class-names", *names]
    assert run("import-monai", tmp_path / "w.pt", *options, "--out", tmp_path / "run") == 0
    config, _, predict = load_run(tmp_path / "run")
    assert config.model.regions == names
    image = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)
    with torch.no_grad():
        expected = torch.sigmoid(theirs(torch.tensor(image[..., 0])[None, None]))[0].numpy()
    np.testing.assert_allclose(predict(image), np.moveaxis(expected, 0, -1), atol=1e-5)
    out = tmp_path / "out"
    assert run("predict", tmp_path / "run", "--images", msd / "imagesTr", "--out", out) == 0
    probs, label = (nib.load(out / f"case_0_{what}.nii.gz") for what in ("probs", "label"))
    voxels = probs.get_fdata().reshape(8, 9, 7, len(names))
    np.testing.assert_array_equal(label.get_fdata().reshape(voxels.shape), voxels > 0.5)
    assert label.shape == (8, 9, 7) if len(names) == 1 else (8, 9, 7, 3)


def test_a_sigmoid_goes_all_the_way(msd: Path, tmp_path: Path) -> None:
    """Imported for a data set, evaluated, trained on."""
    state = patterned_state(jax.eval_shape(lambda: small_unet(out_channels=1)))
    file = write(tmp_path / "w.safetensors", state)
    data = ["--data", f"msd:{msd}", "--num-test", 2, "--num-val", 0]
    assert run("import-monai", file, *TINY, "--activation", "sigmoid", *data, "--out", tmp_path / "run") == 0
    assert read_config(tmp_path / "run")[0].model.regions == ("box",)
    assert run("evaluate", tmp_path / "run") == 0
    steps = ["--steps", 2, "--batch-size", 8, "--warmup-steps", 1, "--learning-rate", 1e-6]
    tuned = tmp_path / "tuned"
    assert run("fit", "--init", tmp_path / "run", *data, *steps, "--loss", "dice", "--out", tuned) == 0
    image = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)
    before, after = (load_run(folder)[2](image) for folder in (tmp_path / "run", tuned))
    assert before.shape[-1] == 1
    assert 0 < np.abs(before - after).max() < 1e-3


@pytest.mark.parametrize(
    ("outputs", "options", "words"),
    [
        (1, ["--class-names", "box"], "one output channel has no softmax: give --activation sigmoid"),
        (1, ["--class-names", "background", "box"], "has no softmax: give --activation sigmoid"),
        (2, ["--class-names", "background", "a", "b"], "Without a background they are no softmax"),
        (
            2,
            ["--activation", "sigmoid", "--class-names", "background", "a"],
            "there are 1 regions (the background",
        ),
        (
            2,
            ["--activation", "sigmoid", "--class-names", "a", "b", "c"],
            "2 output channels, but there are 3",
        ),
        (2, ["--activation", "sigmoid", "--class-names", "background"], "needs --class-names, one for each"),
        (2, ["--activation", "sigmoid", "--regions", "a", "--class-names", "a"], "in place of --regions"),
        (2, ["--regions", "a", "b", "--class-names", "a", "b"], "choose --activation sigmoid"),
        (2, ["--class-names", "a", "a"], "names a class twice"),
        (
            1,
            ["--activation", "sigmoid", "--regions", "a", "--data"],
            "The network's regions are a, Tiny has box",
        ),
    ],
)
def test_outputs_that_do_not_fit(
    outputs: int,
    options: list[str],
    words: str,
    msd: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = patterned_state(jax.eval_shape(lambda: small_unet(out_channels=outputs)))
    file = write(tmp_path / "w.safetensors", state)
    data = (
        [f"msd:{msd}", "--num-test", 2, "--num-val", 0] if options[-1] == "--data" else ["--patch", 8, 8, 8]
    )
    message = refuses(capsys, "import-monai", file, *TINY, *options, *data, "--out", tmp_path / "run")
    assert words in message
    assert not (tmp_path / "run").exists()
