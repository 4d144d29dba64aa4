"""The main job: the same network from the same weights under several losses, side by side on held-out cases."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib_jax.report import ModelResult, compare_models, format_table, write_report
from train.config import DataInfo, RunConfig, check_same_data, to_json
from train.data import Dataset, open_dataset, read_splits, write_splits
from train.errors import InputError
from train.evaluate import evaluate, evaluate_posterior
from train.fit import Task, fit, load_run, open_task
from train.logs import read_log
from train.losses import parse_loss
from train.runs import command, open_run, versions


def compare(config: RunConfig, losses: Sequence[str], folder: Path, *, resume: bool = False) -> Path:
    """Trains one network per loss, evaluates all on the test cases and writes tables, figures and a page.

    The first loss is the baseline. Every network starts from the same weights and sees the same batches in
    the same order with the same augmentation: only the loss differs.

    Args:
        config: of every run, but for its loss.
        losses: names such as `dice` and `dice+ace`.
        folder: `<loss>/` for each run, `results/`, `cases/`, `table.csv`, `index.html`, `figures/`.
        resume: go on with what is in `folder`.

    Returns:
        The page.
    """
    names = [parse_loss(name).name for name in losses]
    if len(set(names)) < len(names):
        raise InputError(f"--losses {' '.join(names)} names a loss twice: give each of them once.")
    task = open_task(config)
    open_run(folder, Plan(tuple(names), task.config), resume=resume)
    write_splits(folder / "splits.json", task.splits)
    results = [_result(task, name, folder, resume) for name in names]
    histories = {name: _history(folder / slug(name), task) for name in names}
    return _report(task.dataset, task.splits.test, folder, results, histories)


@dataclass(frozen=True)
class Plan:
    """What a comparison is made of."""

    losses: tuple[str, ...]
    run: RunConfig


def evaluate_run(run: Path, data: str | None, split: str, out: Path | None) -> Path:
    """Evaluates a trained run and writes its table, figures and page into `out`.

    Args:
        run: folder of the run.
        data: another data set than the run's, of which all cases are evaluated; None for the run's own.
        split: `train`, `val` or `test`, of the run's own data set.
        out: a new folder; None for `evaluate-<split>` in the run's.

    Raises:
        InputError: if the run, the data set, the split or the folder do not fit.
    """
    config, info, predict = load_run(run)
    dataset = open_dataset(data or config.data.data)
    found = DataInfo.of(dataset)
    check_same_data(data or config.data.data, found, run, info)
    if split not in ("train", "val", "test"):
        raise InputError(f"split is {split!r}: give train, val or test.")
    own = data in (None, config.data.data)
    cases = getattr(read_splits(run / "splits.json"), split) if own else dataset.case_names
    if not cases:
        raise InputError(f"The {split} split of {run} holds no case: choose another --split.")
    folder = out or run / f"evaluate-{split if own else found.name}"
    open_run(folder, config, resume=False, data=to_json(found))
    result = evaluate(config.loss, predict, dataset, cases)
    return _report(dataset, cases, folder, [result], {})


def slug(loss: str) -> str:
    """A loss's name as a folder's."""
    return loss.replace("*", "x")


def _result(task: Task, loss: str, folder: Path, resume: bool) -> ModelResult:
    """One loss trained and evaluated on the test cases, or read if it already was."""
    run = folder / slug(loss)
    done = run / "test.npz"
    if resume and done.exists():
        return ModelResult.load(done)
    config = dataclasses.replace(task.config, loss=loss)
    predict = fit(dataclasses.replace(task, config=config), run, resume=resume)
    result = evaluate(loss, predict, task.dataset, task.splits.test)
    result.save(done)
    return result


def _report(
    dataset: Dataset,
    cases: Sequence[str],
    folder: Path,
    results: Sequence[ModelResult],
    histories: Mapping[str, Mapping[str, Sequence[float]]],
) -> Path:
    """Prints the table and writes it with the figures and the page."""
    reference = evaluate_posterior(dataset, cases)
    page = write_report(
        folder,
        results,
        title=f"Calibration on {dataset.name}: {len(cases)} held-out cases",
        histories=histories,
        provenance={
            "command": command(),
            "data": f"{dataset.name}, {len(cases)} cases held out of {len(dataset)}",
            **versions(),
        },
        reference=reference,
    )
    print(format_table(compare_models(results, reference=reference), per_class=True))
    return page


def _history(run: Path, task: Task) -> dict[str, list[float]]:
    """Training and validation curves of a run by epoch: the training loss averaged over each epoch."""
    per_epoch = max(len(task.splits.train) // task.config.training.batch_size, 1)
    rows = [
        {
            "epoch": (chunk[-1]["step"] + 1) / per_epoch,
            "train_loss": float(np.mean([r["loss"] for r in chunk])),
        }
        for chunk in _chunks(read_log(run / "log.csv"), per_epoch)
    ]
    rows += [
        {"epoch": row.pop("step") / per_epoch} | {f"val_{name.lower()}": value for name, value in row.items()}
        for row in read_log(run / "validation.csv")
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    rows.sort(key=lambda row: row["epoch"])
    return {name: [row.get(name, np.nan) for row in rows] for name in columns}


def _chunks(rows: Sequence[dict[str, float]], size: int) -> list[Sequence[dict[str, float]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
