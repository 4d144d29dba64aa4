"""Files of PyTorch weights as NumPy arrays, without running a line of what is in them."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import InputError
from train.safetensors import read_safetensors

# Where checkpoints keep the network's state, beside optimisers, epochs and the like.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net")


def read_weights(file: Path) -> dict[str, np.ndarray]:
    """The floating-point and integer arrays of a `.safetensors`, `.pt`, `.pth` or `.ckpt` file by name.

    safetensors need no other package; the rest is read by PyTorch (`weights_only=True`), which refuses code.

    Raises:
        InputError: if the file cannot be read, holds code or no weights, or a weight is not finite.
    """
    if not file.is_file():
        raise InputError(f"{file} is not a file: give a .safetensors, .pt, .pth or .ckpt file.")
    arrays = read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    weights = {name: _as_float32(array) for name, array in arrays.items()}
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise InputError(f"{file} has {name} with values that are not finite: the network is broken.")
    return weights


def _as_float32(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iub":
        return array
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        return array.astype(np.float32)


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"Reading {file} takes PyTorch: install the extra `reference`, or convert it to .safetensors."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} holds more than weights, code perhaps, and was not loaded: where you trust it, save its "
            "state_dict() alone."
        ) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{file} cannot be read as weights, or is cut off ({reason}): fetch it again."
        ) from error
    state = _state_dict(file, kept, torch.Tensor)
    return {name: _to_numpy(tensor) for name, tensor in state.items()}


def _state_dict(file: Path, kept: Any, tensor: type) -> Mapping[str, Any]:
    """The mapping of names to tensors, wherever a checkpoint has it."""
    while isinstance(kept, Mapping):
        if kept and all(isinstance(value, tensor) for value in kept.values()):
            return kept
        inner = [kept[name] for name in _WRAPPERS if isinstance(kept.get(name), Mapping)]
        if not inner:
            break
        kept = inner[0]
    raise InputError(
        f"{file} holds no weights by name: save a network's state_dict(), alone or under one of "
        f"{', '.join(_WRAPPERS)}."
    )


def _to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
