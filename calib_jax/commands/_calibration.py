"""A fitted calibrator as a file of `calib-jax calibrate`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

METHODS = ("temperature", "class-temperature", "vector", "dirichlet", "isotonic", "local", "local-free")
"""The names in `calib_jax.calibrators.CALIBRATORS`, which takes long to import."""

_FORMAT = 1


class Calibration(NamedTuple):
    """A fitted calibrator.

    Attributes:
        method: its name.
        class_names: of the predictions.
        regions: whether these are regions, each with parameters of its own for region and rest.
        params: one pytree of arrays; of regions one for each, or one for all if the calibration is local.
    """

    method: str
    class_names: tuple[str, ...]
    regions: bool
    params: tuple[Any, ...]

    def save(self, path: Path) -> None:
        """Writes the parameters as `.npz`."""
        import numpy as np

        import calib_jax
        from calib_jax.predictions.writing import written_whole

        arrays: list[Any] = []
        tree = json.dumps([_as_json(params, arrays) for params in self.params])
        with written_whole(path) as partial, open(partial, "wb") as file:
            np.savez(
                file,
                format=np.array(_FORMAT),
                version=np.array(calib_jax.__version__),
                method=np.array(self.method),
                class_names=np.array(self.class_names, np.str_),
                regions=np.array(self.regions),
                tree=np.array(tree),
                **{f"param_{number}": array for number, array in enumerate(arrays)},
            )

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Reads a file that `save` wrote.

        Raises:
            ValueError: it is none.
        """
        import numpy as np

        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                if file["format"] != _FORMAT:
                    raise ValueError(f"its format is {file['format']}, and this version reads {_FORMAT}")
                method = str(file["method"])
                if method not in METHODS:
                    raise ValueError(f"its method is {method!r}, and this version knows {', '.join(METHODS)}")
                params = tuple(_from_json(tree, file) for tree in json.loads(str(file["tree"])))
                return cls(method, tuple(file["class_names"].tolist()), bool(file["regions"]), params)
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist: give a file that `calibrate fit` wrote.") from error
        except Exception as error:  # whatever a broken file raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} was not written by `calibrate fit` ({reason}): fit again.") from error


# Parameters as JSON and arrays: a local calibration, or a pytree of tuples with or without names.


def _as_json(params: Any, arrays: list[Any]) -> Any:
    import numpy as np

    if dataclasses.is_dataclass(params):
        local: Any = params
        static = {"keeps_labels": local.keeps_labels, "regions": local.regions, "spacing": local.spacing}
        return {"local": static, "weights": _as_json(local.weights, arrays)}
    if hasattr(params, "_fields"):
        return {"fields": [[name, _as_json(getattr(params, name), arrays)] for name in params._fields]}
    if isinstance(params, Sequence):
        return [_as_json(value, arrays) for value in params]
    arrays.append(np.asarray(params))
    return len(arrays) - 1


def _from_json(tree: Any, arrays: Mapping[str, Any]) -> Any:
    from collections import namedtuple

    if isinstance(tree, int):
        return arrays[f"param_{tree}"]
    if isinstance(tree, list):
        return tuple(_from_json(value, arrays) for value in tree)
    if "local" in tree:
        from calib_jax._local_network import LocalCalibration, LocalWeights

        static, weights = tree["local"], LocalWeights(*_from_json(tree["weights"], arrays))
        return LocalCalibration(
            weights, bool(static["keeps_labels"]), bool(static["regions"]), tuple(static["spacing"])
        )
    names = [name for name, _ in tree["fields"]]
    return namedtuple("Parameters", names)(*(_from_json(value, arrays) for _, value in tree["fields"]))
