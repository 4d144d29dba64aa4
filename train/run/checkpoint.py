"""Checkpoints: the training state and the position in the data, written together by Orbax."""

import contextlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
# Orbax raises these when a file cannot be read or written; its array store raises ValueError.
_FILE_ERRORS = (OSError, ValueError)
_READ_ERRORS = (*_FILE_ERRORS, KeyError, TypeError)
# Orbax reads the path of a checkpoint as a glob pattern, and Tensorstore as a URL. A path of these characters means
# the same to both as to the system.
_PLAIN_PATH = re.compile(r"[\w./ +,=@()-]*")


class Checkpoints:
    """The checkpoints of one run: the newest two, and the best one by `TrainingConfig.keep_best`.

    Saving runs in the background. Orbax writes each checkpoint beside its final name, renames it when it is
    complete and deletes older ones only then, so a killed run or a full disk leaves no half-written checkpoint.
    The first checkpoint of each process is read back and compared with what was saved. The folder may have any
    name.

    Args:
        folder: of the checkpoints.
        training: its `keep_best` says which checkpoint is the best.
        read_only: change nothing in the folder, which another process may be writing to.
    """

    def __init__(self, folder: Path, training: TrainingConfig, *, read_only: bool = False):
        self.folder = folder
        self._keeps_best = training.keep_best != "none"
        self._has_saved = False
        self._unread: _Saved | None = None  # the first checkpoint, until it is read back
        kept: list[Any] = [keeping.LatestN(_NEWEST)]
        if self._keeps_best:
            score = training.score
            kept.append(keeping.BestN(n=1, get_metric_fn=score, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            best_fn=training.score if self._keeps_best else None,
            preservation_policy=keeping.AnyPreservationPolicy(kept),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # those of killed runs
        )
        self._closing = contextlib.ExitStack()
        try:
            if not read_only:
                folder.mkdir(parents=True, exist_ok=True)
            self._path = self._closing.enter_context(_plain_path(folder))
            self._manager = ocp.CheckpointManager(self._path, options=options)
        except OSError as error:
            raise InputError(f"{folder} cannot be opened ({_reason(error)}).") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
            else:  # the exception being raised matters more than a failed checkpoint
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
        """Step of the best checkpoint; None if the run keeps no best one or none was validated."""
        step = self._manager.best_step() if self._keeps_best else None
        return step if step is not None and self._manager.metrics(step) else None

    def save(self, state: TrainState, data_state: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts to write a checkpoint.

        Args:
            state: the training state.
            data_state: the position of the data iterator.
            metrics: the validation of these weights; empty without one.

        Raises:
            InputError: this checkpoint or the one before cannot be written.
        """
        self.wait()
        parts = {name: part for name, part in state._asdict().items() if part is not None}
        if not self._has_saved and is_first():
            self._unread = _Saved.of(parts)
        self._has_saved = True
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(parts), data=ocp.args.JsonSave(data_state))
        try:
            self._manager.save(int(state.step), args=items, metrics=dict(metrics))
        except _FILE_ERRORS as error:
            raise self._not_written(error) from error

    def check(self) -> None:
        """Raises InputError if the last checkpoint failed; does not wait for one that is being written.

        Orbax's `check_for_errors` is no use here: it reports the failure before Orbax's own thread sees it,
        which then takes the checkpoint for written and deletes the ones that it was to replace.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint is written; reads the first one back.

        Raises:
            InputError: the checkpoint cannot be written, or cannot be read back.
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

    def _read_back(self, saved: "_Saved") -> None:
        """Compares the newest checkpoint with what was saved, in this process alone."""
        step = self.latest_step
        try:
            # `CheckpointManager.restore` would wait for the other processes.
            folder = epath.Path(self._path / str(step) / "state")
            found = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(saved.like))
            reason = "" if saved.equals(found) else "it holds other numbers than were saved"
        except _READ_ERRORS as error:
            reason = self._reason(error)
        if reason:
            raise InputError(
                f"Checkpoint {self.folder / str(step)} was written but cannot be read back ({reason}): choose "
                "another --out, on another file system."
            )

    def resume_point(self) -> str:
        """A phrase for where a resumed run starts: the newest complete checkpoint."""
        complete = [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]
        if not complete:
            return "from the start, since there is no checkpoint yet"
        return f"from step {max(complete)}, whose checkpoint is {self.folder / str(max(complete))}"

    def restore(self, like: TrainState, which: Which = "last") -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint's state, and the position of its data iterator.

        Args:
            like: arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and shardings to restore. A part
                that is None, such as `opt_state` where only the network is wanted, is not read.
            which: the newest checkpoint or the best one.

        Raises:
            InputError: there is no such checkpoint, or it does not fit `like`.
        """
        step = self._step(which)
        wanted = {name: part for name, part in like._asdict().items() if part is not None}
        item = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True),
            data=ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=items)
            # Orbax returns the leaves of `item` that the checkpoint lacks as they are.
            for path, leaf in jax.tree_util.tree_leaves_with_path(restored["state"]):
                if isinstance(leaf, jax.ShapeDtypeStruct):
                    raise KeyError(f"it lacks {jax.tree_util.keystr(path)}")
        except _READ_ERRORS as error:
            raise InputError(
                f"Checkpoint {self.folder / str(step)} could not be read ({self._reason(error)}): remove that "
                "folder to go on from the one before."
            ) from error
        return like._replace(**restored["state"]), restored["data"]

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


class _Saved(NamedTuple):
    """Identifies saved arrays.

    Attributes:
        like: arrays of the same shapes and dtypes that take no memory.
        checksums: of each array's values; None for random keys, and for arrays that this process cannot read whole.
    """

    like: Any
    checksums: list[int | None]

    @classmethod
    def of(cls, state: Any) -> "_Saved":
        return cls(jax.tree.map(_like, state), [_checksum(leaf) for leaf in jax.tree.leaves(state)])

    def equals(self, found: Any) -> bool:
        values = zip(self.checksums, jax.tree.leaves(found), strict=True)
        return all(checksum in (None, _checksum(leaf)) for checksum, leaf in values)


def _like(array: jax.Array) -> Any:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def _checksum(array: Any) -> int | None:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return None
    if isinstance(array, jax.Array) and not (array.is_fully_replicated or array.is_fully_addressable):
        return None
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """A path to `folder` that Orbax and Tensorstore take literally.

    Raises:
        InputError: the system offers no such path for this folder.
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
    """The first line of an exception's text, which Orbax may wrap into long ones."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    full = "No space left on device"
    return full if full in text else text.splitlines()[0][:200] if text else type(error).__name__
