"""Reads files of PyTorch weights as NumPy arrays. No code in a file is ever run."""

import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import InputError, describe

# torch.compile, FSDP and activation checkpointing insert these into the names of modules.
_WRAPPED = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_weights(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.safetensors`, `.pt`, `.pth` or `.ckpt` file by name; floating-point ones as float32.

    PyTorch must be installed for all but `.safetensors`. It reads with `weights_only=True`, which refuses code. If
    several mappings of a checkpoint hold arrays, as those of a network and its optimiser do, names begin with the
    mapping's name: `state_dict.model.0.conv.weight`.

    Raises:
        InputError: if the file cannot be read, or holds code or no weights.
    """
    if not file.is_file():
        raise InputError(f"{file} is not a file: give a .safetensors, .pt, .pth or .ckpt file.")
    arrays = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    return {_WRAPPED.sub("", name): _as_float32(array) for name, array in arrays.items()}


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118, it is no dictionary
    except Exception as error:  # a damaged header, or a dtype that NumPy lacks
        raise InputError(
            f"{file} cannot be read as safetensors ({describe(error)}): fetch it again, or convert its tensors to "
            "float32."
        ) from error


def _as_float32(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iub":
        return array
    with np.errstate(over="ignore"):  # an infinite value is refused later
        return array.astype(np.float32)


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"Reading {file} needs PyTorch: install the extra `reference`, or convert it to .safetensors."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(_numpy_globals()):
                kept = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{refused[1]} for one" if refused else "code perhaps"
        raise InputError(
            f"{file} holds more than weights, {what}, and was not loaded, since loading could run code: if you "
            "trust the file, load it with the program that made it and save the network's state_dict() alone."
        ) from error
    except Exception as error:
        if "TorchScript" in str(error):
            raise InputError(
                f"{file} is a TorchScript archive, which is code: load it with torch.jit.load and save its "
                "state_dict()."
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{file} cannot be read as weights, or is cut off ({reason}): fetch it again."
        ) from error

    def is_array(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized

    tensors = dict(_arrays(kept, is_array))
    if not tensors:
        raise InputError(
            f"{file} holds no weights by name: save a network's state_dict(), alone or in a dictionary."
        )
    # A mapping that only wraps another one adds nothing to the names.
    while len({path[0] for path in tensors}) == 1 and all(len(path) > 1 for path in tensors):
        tensors = {path[1:]: tensor for path, tensor in tensors.items()}
    return {".".join(path): _to_numpy(tensor) for path, tensor in tensors.items()}


def _arrays(kept: Any, is_array: Callable[[Any], bool]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The arrays in nested mappings, with the keys that lead to them."""
    for name, value in kept.items() if isinstance(kept, Mapping) else ():
        if is_array(value):
            yield (str(name),), value
        else:
            yield from (((str(name), *path), array) for path, array in _arrays(value, is_array))


def _numpy_globals() -> list[Any]:
    """The functions and types that pickles of NumPy 1 and 2 name; none of them runs code from the file."""
    functions: dict[str, Any] = {
        "scalar": np.float64(0).__reduce__()[0],
        "_reconstruct": np.zeros(1).__reduce__()[0],
    }
    named = [
        (function, f"numpy.{core}.multiarray.{name}")
        for name, function in functions.items()
        for core in ("core", "_core")
    ]
    codes = f"?US{np.typecodes['AllInteger']}{np.typecodes['AllFloat']}"
    return [*named, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in codes}]


def _to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
