"""Checkpoints: the training state and the position in the data, together, by Orbax."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.errors import InputError
from train.step import TrainState


class Checkpoints:
    """The checkpoints of one run, newest two kept; saving goes on in the background while training does.

    Each is written beside its final name and renamed when complete, so a killed run leaves none half done.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts to write a checkpoint of `state` and of where the data iterator stands."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data_state)
        )
        self._manager.save(int(state.step), args=items)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, in the shapes and shardings of `like`.

        Raises:
            InputError: if there is none, or it does not fit the model.
        """
        step = self.latest_step
        if step is None:
            raise InputError(f"{self.folder} holds no checkpoint: train first.")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"Checkpoint {self.folder / str(step)} could not be read ({reason}): remove that folder to go "
                "on from the one before."
            ) from error
        return TrainState(**restored["state"]), restored["data"]
