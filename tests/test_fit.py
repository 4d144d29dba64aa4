"""The training loop: what follows a step."""

import pytest

from train.config import TrainingConfig
from train.fit import Due, what_is_due


@pytest.mark.parametrize(
    ("options", "can_validate", "validations", "checkpoints"),
    [
        ({}, True, [3, 6, 9, 10], [3, 6, 9, 10]),  # four times in a run
        ({}, False, [], [3, 6, 9, 10]),
        ({"validate_every": 4, "checkpoint_every": 3}, True, [4, 8, 10], [3, 6, 9, 10]),
        (
            {"validate_every": 4, "checkpoint_every": 3, "keep_best": "ace"},
            True,
            [4, 8, 10],
            [3, 4, 6, 8, 9, 10],
        ),
    ],
)
def test_what_is_due_in_a_run_of_ten_steps(
    options: dict, can_validate: bool, validations: list[int], checkpoints: list[int]
) -> None:
    training = TrainingConfig(steps=10, **options)
    due = {done: what_is_due(training, done, can_validate=can_validate) for done in range(1, 11)}
    assert [done for done in due if due[done].validation] == validations
    assert [done for done in due if due[done].checkpoint] == checkpoints
    assert [done for done in due if due[done].log] == checkpoints


def test_metrics_are_logged_now_and_then_and_before_a_stop() -> None:
    training = TrainingConfig(steps=1000)
    assert what_is_due(training, 39, can_validate=True) == Due(False, False, False)
    assert what_is_due(training, 40, can_validate=True) == Due(True, False, False)
    assert what_is_due(training, 41, can_validate=True, stopping=True) == Due(True, False, True)
