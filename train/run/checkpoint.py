"""Checkpoints: the training state and the position in the data, together, by Orbax."""

import contextlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as keeping

from train.config import TrainingConfig
from train.errors import InputError
from train.processes import is_first
from train.step import TrainState

Which = Literal["last", "best"]
_NEWEST = 2
# What Orbax raises where a file cannot be read or written; its array store says ValueError.
_FILE_ERRORS = (OSError, ValueError)
# Orbax takes the path of a checkpoint for a pattern of files, and Tensorstore for a URL. Neither sees anything but
# a name in these characters.
_PLAIN_PATH = re.compile(r"[\w./ +,=@()-]*")


class Checkpoints:
    """The checkpoints of one run: the newest two, and the best by the run's `keep_best`.

    Saving goes on in the background while training does. Each checkpoint is written beside its final name and
    renamed when complete, and older ones go only then: a killed run or a full disk leaves none half done.

    The first checkpoint of each process is read back as soon as it is complete and compared with what was saved.
    Folders may have any name.

    Args:
        folder: of the checkpoints.
        training: says what `best` means.
        read_only: leave the folder as it is, which another process may be writing to.
    """

    def __init__(self, folder: Path, training: TrainingConfig, *, read_only: bool = False):
        self.folder = folder
        self._keeps_best = training.keep_best != "none"
        newest, best = (
            keeping.LatestN(_NEWEST),
            keeping.BestN(n=1, get_metric_fn=training.score, keep_checkpoints_without_metrics=False),
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=training.score if self._keeps_best else None,
            preservation_policy=keeping.AnyPreservationPolicy(
                [newest, best] if self._keeps_best else [newest]
            ),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of runs that were killed while they wrote one
        )
        self._closing = contextlib.ExitStack()
        try:
            if not read_only:
                folder.mkdir(parents=True, exist_ok=True)
            self._path = self._closing.enter_context(_plain_path(folder))
            self._manager = ocp.CheckpointManager(self._path, options=options)
        except OSError as error:
            raise InputError(f"{folder} cannot be opened ({_reason(error)}).") from error
        self._training = training
        self._has_saved = False
        self._unread: TrainState | None = (
            None  # the first checkpoint's `_fingerprints`, until it is read back
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
            else:  # the failure that is being raised is the one to tell of
                with contextlib.suppress(InputError):
                    self._wait_written()
        finally:
            self._manager.close()
            self._closing.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint; None if none is kept as such, or none was validated."""
        step = self._manager.best_step() if self._keeps_best else None
        return step if step is not None and self._manager.metrics(step) else None

    def save(self, state: TrainState, data_state: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts to write a checkpoint of `state` and of where the data iterator stands.

        Args:
            state: of the run.
            data_state: of the iterator.
            metrics: of a validation of these very weights; none without one.

        Raises:
            InputError: if it, or the one before, cannot be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data_state)
        )
        self.wait()
        step = int(state.step)
        if not self._has_saved and is_first():
            self._unread = jax.tree.map(_Fingerprint.of, state)
        self._has_saved = True
        try:
            self._manager.save(step, args=items, metrics=dict(metrics))
        except _FILE_ERRORS as error:
            raise self._not_written(error) from error

    def check(self) -> None:
        """Raises InputError if the last checkpoint has failed; does not wait for one that is being written.

        Not by Orbax's `check_for_errors`: told of the failure before its own thread is, that would take the
        checkpoint for written and remove those that it was to replace.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until what is being written is complete, and reads the first checkpoint back.

        Raises:
            InputError: if it cannot be written, or cannot be read.
        """
        self._wait_written()
        saved, self._unread = self._unread, None
        if saved is not None:
            self._read_back(saved)

    def _wait_written(self) -> None:
        try:
            self._manager.wait_until_finished()
        except _FILE_ERRORS as error:
            raise self._not_written(error) from error

    def _read_back(self, saved: TrainState) -> None:
        """Compares the newest checkpoint with what was saved, on the host of this process alone."""
        step = self.latest_step
        like = jax.tree.map(lambda fingerprint: fingerprint.like, saved._asdict())
        try:
            # The manager's own `restore` would wait for the other processes.
            folder = epath.Path(self._path / str(step) / "state")
            found = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(like))
            equal = jax.tree.map(lambda fingerprint, leaf: fingerprint.fits(leaf), saved._asdict(), found)
            reason = "" if jax.tree.all(equal) else "it holds other numbers than were saved"
        except (*_FILE_ERRORS, KeyError, TypeError) as error:
            reason = self._reason(error)
        if reason:
            raise InputError(
                f"Checkpoint {self.folder / str(step)} was written but cannot be read back ({reason}): choose "
                "another --out, on another file system."
            )

    def resume_point(self) -> str:
        """In words, where a resumed run starts: at the newest complete checkpoint."""
        complete = sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())
        if not complete:
            return "from the start, since there is no checkpoint yet"
        return f"from step {complete[-1]}, whose checkpoint is {self.folder / str(complete[-1])}"

    def restore(self, like: TrainState, which: Which = "last") -> tuple[TrainState, dict[str, Any]]:
        """A checkpoint, the newest or the best, in the shapes and shardings of `like`.

        Raises:
            InputError: if there is none, or it does not fit the model.
        """
        step = self._step(which)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except (*_FILE_ERRORS, KeyError, TypeError) as error:
            raise InputError(
                f"Checkpoint {self.folder / str(step)} could not be read ({self._reason(error)}): remove that "
                "folder to go on from the one before."
            ) from error
        return TrainState(**restored["state"]), restored["data"]

    def _step(self, which: Which) -> int:
        if which == "best" and not self._keeps_best:
            raise InputError(
                f"{self.folder} keeps no best checkpoint: train with --keep-best, or use the last one."
            )
        step = self.latest_step if which == "last" else self.best_step
        if step is None:
            kind = "checkpoint" if which == "last" else "validated checkpoint"
            raise InputError(f"{self.folder} holds no {kind}: train it first, or --resume its training.")
        return step

    def _not_written(self, error: Exception) -> InputError:
        return InputError(
            f"A checkpoint could not be written into {self.folder} ({self._reason(error)}): make room, or make the "
            f"folder writable, and --resume, which goes on {self.resume_point()}."
        )

    def _reason(self, error: Exception) -> str:
        return _reason(error).replace(str(self._path), str(self.folder))


@dataclass(frozen=True)
class _Fingerprint:
    """What tells the values of an array from others; `like` is an array of its shape and dtype."""

    like: Any
    checksum: int | None

    @classmethod
    def of(cls, array: jax.Array) -> "_Fingerprint":
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return cls(jax.ShapeDtypeStruct(array.shape, array.dtype), None)
        like = np.broadcast_to(np.zeros((), array.dtype), array.shape)
        # Of an array that is spread over several processes, each has its part only.
        return cls(
            like, _checksum(array) if array.is_fully_replicated or array.is_fully_addressable else None
        )

    def fits(self, array: Any) -> bool:
        return self.checksum is None or self.checksum == _checksum(array)


def _checksum(array: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """A path to `folder` in which Orbax and Tensorstore see a name and nothing else.

    Raises:
        InputError: where the system has no such path for the name that the folder has.
    """
    path = folder.absolute()
    if _PLAIN_PATH.fullmatch(str(path)):
        yield path
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        plain = Path(f"/proc/self/fd/{descriptor}")
        if not plain.is_dir():
            raise InputError(
                f"{folder} cannot hold checkpoints on this system: choose another --out, whose whole path "
                f"{str(path)!r} has letters, digits, spaces and ._-+,=@() only."
            )
        yield plain
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """The first line of what went wrong, which Orbax may wrap into long ones."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    full = "No space left on device"
    return full if full in text else text.splitlines()[0][:200] if text else type(error).__name__
