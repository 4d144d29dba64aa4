"""Checkpoints: the training state and the position in the data, together, by Orbax."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as keeping

from train.config import TrainingConfig
from train.errors import InputError
from train.step import TrainState

Which = Literal["last", "best"]
_NEWEST = 2
# What Orbax raises where a file cannot be read or written; its array store says ValueError.
_FILE_ERRORS = (OSError, ValueError)


class Checkpoints:
    """The checkpoints of one run: the newest two, and the best by the run's `keep_best`.

    Saving goes on in the background while training does. Each checkpoint is written beside its final name and
    renamed when complete, and older ones go only then: a killed run or a full disk leaves none half done.

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
        try:
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        except OSError as error:
            raise InputError(f"{folder} cannot be opened ({_reason(error)}).") from error
        self._training = training

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except InputError:
            if kind is None:  # else the first failure is the one to tell of
                raise
        finally:
            self._manager.close()

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
        try:
            self._manager.save(step, args=items, metrics=dict(metrics))
        except _FILE_ERRORS as error:
            raise self._not_written(error) from error

    def check(self) -> None:
        """Raises InputError if the checkpoint that is being written has failed; waits for nothing."""
        try:
            self._manager.check_for_errors()
        except _FILE_ERRORS as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Waits until what is being written is complete.

        Raises:
            InputError: if it cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except _FILE_ERRORS as error:
            raise self._not_written(error) from error

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
                f"Checkpoint {self.folder / str(step)} could not be read ({_reason(error)}): remove that folder "
                "to go on from the one before."
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
            f"A checkpoint could not be written into {self.folder} ({_reason(error)}): make room, or make the "
            f"folder writable, and --resume, which goes on {self.resume_point()}."
        )


def _reason(error: Exception) -> str:
    """The first line of what went wrong, which Orbax may wrap into long ones."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    full = "No space left on device"
    return full if full in text else text.splitlines()[0][:200] if text else type(error).__name__
