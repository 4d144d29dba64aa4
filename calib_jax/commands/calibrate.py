"""`calib-jax calibrate`: better probabilities without training."""

import argparse
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_jax._notes import warnings_as_notes
from calib_jax._probabilities import as_logits, as_probs, entropy, finite_log
from calib_jax.commands import options as shared
from calib_jax.commands._calibration import METHODS, Calibration

if TYPE_CHECKING:
    from calib_jax.predictions import Case, Predictions

_DESCRIPTION = """\
Mends probabilities without training. `fit` finds the parameters of a calibrator on cases with labels that the model
was not trained on, such as a validation fold. `apply` changes the probabilities of other cases and writes them in
the format that they came in. Label maps stay as they are.

`fit` needs all cases at once, so it keeps nothing when it is stopped. `apply` writes each case whole or not at all,
and the same command goes on where it was stopped.
"""
_EXAMPLE = """\
examples:
  calib-jax calibrate fit --probs fold_0/validation --labels labelsTr --out calibration.npz
  calib-jax calibrate apply --probs predictions --params calibration.npz --out calibrated --uncertainty

`calib-jax calibrate fit --help` and `calib-jax calibrate apply --help` explain the options.
"""
_FIT = """\
examples:
  calib-jax calibrate fit --probs fold_0/validation --labels labelsTr --out calibration.npz
  calib-jax calibrate fit --probs monai_out --labels labelsTr --method local-free --out calibration.npz

methods:
  temperature        one number for all voxels
  class-temperature  one number for each predicted class
  vector             scale and offset of each class
  dirichlet          a linear map of the log-probabilities
  isotonic           a rising curve for each class
  local              a small network that sees the probabilities around a voxel (and the images, if given)
  local-free         the same, but its probabilities may contradict the label map, which stays
"""
_APPLY = """\
example:
  calib-jax calibrate apply --probs predictions --params calibration.npz --out calibrated --uncertainty
"""

# Voxels that are calibrated at a time. All slabs have this size, so that one program is compiled.
_SLAB = 1 << 18


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of both commands."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLE
    actions = parser.add_subparsers(dest="action", metavar="fit | apply", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    fit = actions.add_parser(
        "fit", help="find the parameters on cases with labels", epilog=_FIT, formatter_class=raw
    )
    fit.add_argument("--out", type=Path, required=True, metavar="FILE", help="file of the parameters, .npz")
    fit.add_argument("--method", choices=METHODS, default="temperature", help="default: temperature")
    fit.add_argument(
        "--max-values",
        type=int,
        default=1 << 26,
        metavar="N",
        help="probabilities to keep in memory; of more, a random part of each case's voxels is used. Local "
        "calibration keeps none: it reads whole cases, one after the other (default: 2^26)",
    )
    shared.add_folders(fit, images="which local calibration then sees too; other methods do not use them")
    apply = actions.add_parser(
        "apply", help="mend the probabilities of cases", epilog=_APPLY, formatter_class=raw
    )
    apply.add_argument("--params", type=Path, required=True, metavar="FILE", help="file that `fit` wrote")
    apply.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the new files")
    apply.add_argument(
        "--uncertainty",
        action="store_true",
        help="also write CASE_uncertainty: the entropy of the classes in nats, for regions summed over them",
    )
    images = f"for a calibration that sees them, and {shared.FOR_THE_GRID}"
    shared.add_folders(apply, labels=False, images=images)
    shared.add_jobs(apply)


def run(options: argparse.Namespace) -> int:
    """Fits or applies a calibrator."""
    return _fit(options) if options.action == "fit" else _apply(options)


def _fit(options: argparse.Namespace) -> int:
    import jax
    import numpy as np

    from calib_jax._case_loop import for_each_case
    from calib_jax.calibrators import CALIBRATORS
    from calib_jax.predictions.arrays import stem

    if options.out.suffix.lower() != ".npz" or options.out.is_dir():
        raise ValueError(f"--out {options.out} must be the name of a file that ends in .npz.")
    if options.max_values < 1:
        raise ValueError(f"--max-values must be at least 1; got {options.max_values}.")
    predictions = _one_model(options)
    if options.method.startswith("local"):
        return _fit_local(options, predictions)
    method, names = CALIBRATORS[options.method], predictions.class_names
    per_case = options.max_values // len(predictions.case_names) // len(names)
    found: list[tuple[np.ndarray, np.ndarray]] = []

    def work(name: str) -> None:
        case = predictions.read(name, parts=("labels",))
        found.append(_sampled(case, max(per_case, 1), seed=len(found)))

    outcome = for_each_case([(name,) for name in predictions.case_names], work)
    probs = np.concatenate([probs for probs, _ in found])
    labels = np.concatenate([labels for _, labels in found])
    found.clear()
    if not len(probs):
        raise ValueError(f"{options.labels} has a label in no voxel: there is nothing to fit to.")
    problems = list(_problems(probs, labels, regions=predictions.regions))
    params, before, after = [], 0.0, 0.0
    for log_probs, ids in problems:
        batches = _in_batches(log_probs, ids)
        with warnings_as_notes(f"fitting {options.method}"):
            params.append(jax.device_get(method.fit(batches)))
        before += _likelihood(log_probs, ids)
        after += sum(
            _likelihood(np.asarray(jax.nn.log_softmax(method.apply(logits, params[-1]))), labels)
            * (labels >= 0).sum()
            for logits, labels in batches
        ) / len(ids)
    Calibration(options.method, names, predictions.regions, tuple(params)).save(options.out)
    print(
        f"{stem(options.out)}: {options.method}{_in_words(params[0]) if len(params) == 1 else ''}, "
        f"negative log-likelihood {before:.5f} -> {after:.5f} on {len(outcome.found)} cases\n"
        f"Wrote {options.out}"
    )
    return outcome.status


def _fit_local(options: argparse.Namespace, predictions: "Predictions") -> int:
    """Fits a local calibration, which sees whole cases, one after the other."""
    import numpy as np

    from calib_jax._case_loop import FAULTS, Progress, sentence
    from calib_jax.calibrators import CALIBRATORS
    from calib_jax.commands import _cases

    regions, names = predictions.regions, predictions.case_names
    faults: dict[str, str] = {}
    spacings: list[tuple[float, ...]] = []

    def batches() -> Iterator[tuple[Any, ...]]:
        for done, name in enumerate(names, 1):
            if name in faults:
                continue
            try:
                case = predictions.read(name, parts=("labels", "image"))
                image = _cases.image_of(case, options.images) if options.images is not None else None
            except FAULTS as error:
                faults[name] = sentence(error, name)
                progress.say(f"fault: {faults[name]}")
                continue
            spacings.append(case.spacing)
            labels = np.asarray(case.labels, np.float32 if regions else np.int32)
            where = None if case.where is None else case.where[None]
            yield as_logits(case.probs, regions=regions)[None], labels[None], where, image
            progress(done, len(names))

    with Progress() as progress:
        for _ in batches():  # the first case that can be read tells the spacing
            break
        if not spacings:
            raise ValueError("no case could be read, see the sentences above.")
        spacing = spacings[0] if max(spacings[0]) > 1.01 * min(spacings[0]) else ()
        with warnings_as_notes(f"fitting {options.method}"):
            params = CALIBRATORS[options.method].fit(batches, regions=regions, spacing=spacing)
    Calibration(options.method, predictions.class_names, regions, (params,)).save(options.out)
    print(f"{options.method} calibration of {len(names) - len(faults)} cases\nWrote {options.out}")
    return 1 if faults else 0


def _apply(options: argparse.Namespace) -> int:
    import numpy as np

    from calib_jax.commands import _cases
    from calib_jax.predictions import PredictionError, write_probabilities
    from calib_jax.predictions.names import UNCERTAINTY, case_name
    from calib_jax.predictions.writing import write_volume

    shared.check_jobs(options)
    calibration = Calibration.load(options.params)
    _cases.check_out(options)
    predictions = _one_model(options)
    if (
        len(predictions.class_names) != len(calibration.class_names)
        or predictions.regions != calibration.regions
    ):
        kinds = {True: "regions", False: "classes"}
        raise ValueError(
            f"{options.params} was fitted to {len(calibration.class_names)} {kinds[calibration.regions]} "
            f"({', '.join(calibration.class_names)}), and the predictions have {len(predictions.class_names)} "
            f"{kinds[predictions.regions]} ({', '.join(predictions.class_names)}): fit to predictions of this kind."
        )

    needs_image = calibration.method.startswith("local") and len(calibration.params[0].weights.image) > 0

    def work(name: str) -> list[Path]:
        case = predictions.read(name, parts=("image",) if needs_image else ())
        template = predictions.template(name)
        path = _cases.path_in(options.out, template)
        written = _cases.copy_label(template, path) or _cases.write_label(
            template, path, case.probs, predictions
        )
        probs = case.probs if case.probs.flags.writeable else case.probs.copy(order="K")
        if calibration.method.startswith("local"):
            image = _cases.image_of(case, options.images) if needs_image else None
            _calibrate_locally(probs, calibration, image)
        else:
            _calibrate(probs, calibration)
        if not np.isfinite(probs).all():
            raise PredictionError(f"{template.files[0]} gets probabilities that are not finite: fit again.")
        written += write_probabilities(path, probs, template)
        if options.uncertainty:
            nats = np.concatenate([entropy(x, regions=calibration.regions) for x, _ in _slabs(probs)])
            ending = (
                ".nii.gz" if template.reference.grid is not None else ".tif" if nats.ndim == 2 else ".npy"
            )
            target = path.with_name(f"{case_name(path) or path.parent.name}{UNCERTAINTY}{ending}")
            write_volume(target, nats, template.reference)
            written.append(target)
        return written

    settings = ["apply", hashlib.sha256(options.params.read_bytes()).hexdigest(), options.uncertainty]
    return _cases.write_cases(options, predictions, work, settings=settings)


def _one_model(options: argparse.Namespace) -> "Predictions":
    if len(options.probs) > 1:
        raise ValueError("--probs names several folders: calibrate one after the other.")
    predictions = shared.open_folders(options)
    shared.print_notices(predictions)
    return predictions


def _sampled(case: "Case", most: int, *, seed: int) -> tuple[Any, Any]:
    """Probabilities and labels `[voxels, ...]` of a case's labelled voxels, or of a random part of them."""
    import numpy as np

    assert case.labels is not None
    where = np.ones(case.probs.shape[:-1], bool) if case.where is None else case.where
    if (voxels := int(where.sum())) > most:
        where = where & (np.random.default_rng(seed).random(where.shape, np.float32) < most / voxels)
    probs = np.stack([case.probs[..., index][where] for index in range(case.probs.shape[-1])], axis=-1)
    return probs, case.labels[where]


def _problems(probs: Any, labels: Any, *, regions: bool) -> Iterator[tuple[Any, Any]]:
    """Log-probabilities `[voxels, classes]` and class ids: one problem, or one of two classes for each region."""
    if not regions:
        yield finite_log(probs), labels
        return
    import numpy as np

    for index in range(probs.shape[-1]):
        inside = probs[:, index]
        yield finite_log(np.stack([1 - inside, inside], -1)), labels[:, index].astype(np.int32)


def _in_batches(log_probs: Any, ids: Any) -> list[tuple[Any, Any]]:
    """Batches of one size. The last is filled with voxels without a label, which do not count."""
    import numpy as np

    size = min(_SLAB, _round_up(len(ids)))
    missing = -len(ids) % size
    log_probs = np.concatenate([log_probs, np.zeros((missing, log_probs.shape[1]), np.float32)])
    ids = np.concatenate([ids, np.full(missing, -1, ids.dtype)])
    return list(
        zip(log_probs.reshape(-1, 1, size, log_probs.shape[1]), ids.reshape(-1, 1, size), strict=True)
    )


def _likelihood(log_probs: Any, ids: Any) -> float:
    """Mean negative log-likelihood of the labelled voxels."""
    import numpy as np

    log_probs, ids = log_probs.reshape(-1, log_probs.shape[-1]), ids.reshape(-1)
    counted = np.flatnonzero(ids >= 0)
    return -float(log_probs[counted, ids[counted]].mean(dtype=np.float64)) if len(counted) else 0.0


def _calibrate(probs: Any, calibration: Calibration) -> None:
    """Changes probabilities in place, slab by slab: each voxel by itself."""
    import numpy as np

    calibrated = _compiled(calibration.method)
    for slab, size in _slabs(probs):
        flat = slab.reshape(-1, slab.shape[-1])
        columns = [np.stack([1 - p, p], -1) for p in flat.T] if calibration.regions else [flat]
        changed = []
        for column, params in zip(columns, calibration.params, strict=True):
            padded = np.zeros((size, column.shape[1]), np.float32)
            padded[: len(column)] = finite_log(column)
            changed.append(np.asarray(calibrated(padded, params))[: len(column)])
        new = np.stack([change[:, 1] for change in changed], -1) if calibration.regions else changed[0]
        slab[...] = new.reshape(slab.shape)


def _calibrate_locally(probs: Any, calibration: Calibration, image: Any) -> None:
    """Changes probabilities in place, from those around each voxel."""
    import numpy as np

    from calib_jax.calibrators import CALIBRATORS

    (params,) = calibration.params
    options = {} if image is None else {"image": image}
    logits = as_logits(probs, regions=calibration.regions)[None]
    calibrated = np.asarray(CALIBRATORS[calibration.method].apply(logits, params, **options))[0]
    for (slab, _), (new, _) in zip(_slabs(probs), _slabs(calibrated), strict=True):
        slab[...] = as_probs(new, regions=calibration.regions)


def _slabs(array: Any) -> Iterator[tuple[Any, int]]:
    """Views of some rows of an array `[*spatial, channels]`, and a size in voxels that fits all of them."""
    plane = array[0, ..., 0].size
    rows = max(_SLAB // plane, 1)
    size = _round_up(min(rows, len(array)) * plane)
    for start in range(0, len(array), rows):
        yield array[start : start + rows], size


@functools.cache
def _compiled(method: str) -> Any:
    """From log-probabilities and parameters to calibrated probabilities, compiled once for each size."""
    import jax

    from calib_jax.calibrators import CALIBRATORS

    apply = CALIBRATORS[method].apply
    return jax.jit(lambda log_probs, params: jax.nn.softmax(apply(log_probs, params)))


def _round_up(size: int) -> int:
    """The next power of two, so that cases of many sizes need few programs."""
    return 1 << (size - 1).bit_length()


def _in_words(params: Any) -> str:
    """The parameter, if there is only one."""
    import numpy as np

    return f" {float(params):.4g}" if not isinstance(params, tuple | dict) and np.ndim(params) == 0 else ""
