"""The main job: train one network under several losses, and compare the results on held-out cases."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from calib_jax import LocalCalibration
from calib_jax.report import compare_models, format_table, write_report
from calib_jax.report.details import Details
from calib_jax.report.page import write_tables
from calib_jax.report.text import format_summary
from calib_jax.results import ModelResult, RepeatedResult, Result
from train.check import check_cases
from train.config import DataInfo, DeviceConfig, RunConfig, resolve_regions, to_json
from train.data import Dataset
from train.errors import InputError
from train.evaluate import evaluate, evaluate_posterior
from train.files import parsing, read_json, visible
from train.findings import Row, can_measure, details_of_rows, measure_rows, results_of_rows
from train.fit import fit
from train.inference import VolumePredictor, ensemble
from train.local_calibration import fit_local_calibration
from train.losses import parse_loss
from train.processes import is_first, on_first
from train.published import HEADER, rows_of, to_markdown, write_table
from train.published import Row as PublishedRow
from train.run.cases import KINDS, RunCases, as_kept, read_cases
from train.run.checkpoint import Which
from train.run.folder import claimed, command, open_run, versions, write_json, writing, written_whole
from train.run.load import load_run
from train.run.logs import divergence, read_log
from train.task import (
    Task,
    check_best_is_known,
    check_task,
    check_task_loss,
    open_cases_of,
    open_task,
    write_split,
)
from train.temperature import fit_temperature, temper

_TEMPERATURE = "temperatures (+T), fitted on validation cases"
TEMPERED = "+T"  # ends the name of a network whose logits are divided by its temperature
LOCAL = "+L"  # ends the name of a network whose probabilities are locally calibrated
# What an evaluation writes before its page.
_UNFINISHED = {
    *("config.json", "published.md", "published.json", "report.json", "results", "cases", "figures"),
    *("table.csv", "table.json", "metrics.csv", "cases.csv"),
}


def compare(
    config: RunConfig,
    losses: Sequence[str],
    folder: Path,
    *,
    seeds: Sequence[int] = (),
    temperature: bool = False,
    local: bool = False,
    ensembles: bool = False,
    pairs: bool = False,
    which: Which = "last",
    devices: DeviceConfig = DeviceConfig(),  # noqa: B008, it is frozen
    resume: bool = False,
    published: Sequence[PublishedRow] = (),
) -> Path:
    """Trains one network per loss and seed, evaluates all on the test cases, and writes tables, figures and a page.

    The first loss is the baseline. All networks of a seed start from the same weights and see the same batches
    in the same order with the same augmentation; only the loss differs.

    Args:
        config: of every run, except its loss.
        losses: names such as `dice` and `dice+ace`.
        folder: gets `<loss>/` (or `<loss>-seed<n>/`) for each run, `results/`, `cases/`, `table.csv`,
            `index.html` and `figures/`.
        seeds: to train every loss with; empty for the configuration's seed alone.
        temperature: also show each network with temperature scaling, fitted on the validation cases.
        local: also show each network with local calibration, fitted on the validation cases.
        ensembles: also show the mean probabilities of the seeds of each loss.
        pairs: also show the labels of the first loss's networks with the probabilities of every other loss's.
        which: weights to evaluate: the last or the best by `keep_best`.
        devices: to train on.
        resume: continue the comparison in `folder`, perhaps with more rows: what is trained and evaluated is read.
        published: figures to show beside those of the networks.

    Returns:
        Path of the page.

    Raises:
        InputError: options, data or folder are wrong.
        Stopped: a signal asked a run to stop. The run has saved a checkpoint.
    """
    parsed = [parse_loss(name) for name in losses]
    names = [loss.name for loss in parsed]
    for option, values in (("losses", names), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise InputError(
                f"--{option} {' '.join(map(str, values))} gives one of them twice: give each once."
            )
    for seed in seeds:
        dataclasses.replace(config.training, seed=seed)  # which checks it
    if ensembles and len(seeds) < 2:
        raise InputError("--ensembles averages the networks of several seeds: give two or more --seeds.")
    if pairs and len(losses) < 2:
        raise InputError("--pairs shows networks of two losses side by side: give two or more --losses.")
    task = open_task(config, devices)
    for loss in parsed:
        check_task_loss(task, loss)
    if temperature and not task.splits.val:
        raise InputError("--temperature is fitted on validation cases, but num_val is 0: hold some back.")
    if local and not task.splits.val:
        local = False
        if is_first():
            print(
                "note: there is no row with local calibration, which is fitted on validation cases (--num-val)."
            )
    if which == "best" and (config.training.keep_best == "none" or not task.splits.val):
        raise InputError("--checkpoint best needs --keep-best and validation cases (--num-val): give both.")
    if not published:
        check_best_is_known(task)
    plan = Plan(tuple(names), task.config, tuple(seeds), which, temperature, local, ensembles)
    kept = as_kept(task.config, folder, task.dataset, task.splits) if resume else task.config
    check = partial(check_task, task)
    open_run(folder, Trained(plan.losses, kept, plan.seeds, which), resume=resume, check=check)
    with claimed(folder):
        on_first(lambda: write_split(task, folder))
        results: list[Result] = []
        histories: dict[str, Mapping[str, Sequence[float]]] = {}
        folders: dict[str, Path] = {}
        for name in names:
            runs = plan.runs(folder, name)
            results += _results_of_loss(task, plan, name, folder, resume=resume)
            histories[name] = _mean_history([_history(run, task) for _, run in runs.values()])
            folders |= {f"{name} {seed}".rstrip(): run for seed, (_, run) in runs.items()}
        if pairs:
            results += _pairs(plan, {result.name: result for result in results})
        cases = read_cases(folder)
        remarks = _remarks(config, which, cases, folders) | _temperatures(folder)
        kind = KINDS["test"] if cases.complete else ""
        return _report(task.dataset, task.splits.test, folder, results, histories, remarks, published, kind)


@dataclass(frozen=True)
class Trained:
    """What a comparison trains, and which weights it evaluates: the same whenever it is resumed."""

    losses: tuple[str, ...]
    run: RunConfig
    seeds: tuple[int, ...] = ()
    which: Which = "last"


@dataclass(frozen=True)
class Plan(Trained):
    """A comparison: what it trains, and the rows that it shows."""

    temperature: bool = False
    local: bool = False
    ensembles: bool = False

    @property
    def endings(self) -> list[str]:
        """What ends the names of a network's rows."""
        return ["", *([TEMPERED] if self.temperature else []), *([LOCAL] if self.local else [])]

    def runs(self, folder: Path, loss: str) -> dict[str, tuple[RunConfig, Path]]:
        """Configuration and folder of each run of a loss, by seed (`seed 3`); a single run has the key ""."""
        runs = {}
        for seed in self.seeds or [self.run.training.seed]:
            training = dataclasses.replace(self.run.training, seed=seed)
            config = dataclasses.replace(self.run, loss=loss, training=training)
            ending = f"-seed{seed}" if self.seeds else ""
            runs[f"seed {seed}" if self.seeds else ""] = config, folder / f"{slug(loss)}{ending}"
        return runs


def evaluate_run(
    run: Path,
    data: str | None,
    split: str,
    out: Path | None,
    which: Which = "last",
    *,
    temperature: bool = False,
    local: bool = False,
    published: Sequence[PublishedRow] = (),
    resume: bool = False,
) -> Path:
    """Evaluates a trained run and writes its table, figures and page into `out`.

    Args:
        run: folder of the run.
        data: a data set; None for the run's own. Of the run's own data, wherever they lie, `split` is
            evaluated; of other data all cases that the run was not trained or validated on.
        split: `train`, `val` or `test`, of the run's own data set.
        out: a new folder, or one with an unfinished evaluation of the run; None for `evaluate-<split>` in the
            run's.
        which: weights to evaluate, the last or the best.
        temperature: also show the network with temperature scaling, fitted on the run's validation cases.
        local: also show the network with local calibration, fitted on the run's validation cases.
        published: figures to show beside its own.
        resume: replace a finished evaluation in the folder.

    Returns:
        Path of the page.

    Raises:
        InputError: run, data set, split or folder do not fit.
    """
    config, info, predict = load_run(run, which)
    if split not in KINDS:
        raise InputError(f"split is {split!r}: give train, val or test.")
    dataset, chosen = open_cases_of(run, config, info, split, data)
    resolve_regions(config.model, dataset)
    cases = read_cases(run)
    for option, wanted in (("--temperature", temperature), ("--local-calibration", local)):
        if wanted and not chosen.own:
            raise InputError(f"{option} is fitted on the run's own validation cases: leave out --data.")
        if wanted and not chosen.val:
            raise InputError(
                f"{run} has no validation cases to fit to, or {dataset.name} lacks some: leave out {option}."
            )
    ending = f"{split if chosen.own else dataset.name}{'' if which == 'last' else f'-{which}'}"
    folder = out or run / f"evaluate-{ending}"
    check = partial(check_cases, dataset, (*chosen.names, *(chosen.val if temperature or local else ())))
    unfinished = folder.exists() and {path.name for path in visible(folder)} <= _UNFINISHED
    open_run(folder, config, resume=resume or unfinished, check=check, data=to_json(DataInfo.of(dataset)))
    if is_first():
        for note in chosen.notes:
            print(f"note: {note}")
    remarks = _remarks(config, which, cases, {config.loss: run})
    if chosen.notes:
        remarks["note"] = "; ".join(chosen.notes)
    rows = [Row(config.loss, predict)]
    if temperature:
        value = fit_temperature(predict, dataset, chosen.val)
        remarks[_TEMPERATURE] = f"{float(value):.3f}"
        rows.append(Row(config.loss + TEMPERED, temper(predict, value)))
    if local:
        rows.append(Row(config.loss + LOCAL, predict, fit_local_calibration(predict, dataset, chosen.val)))
    if can_measure(dataset, chosen.names):
        study = measure_rows(rows, dataset, chosen.names)
        results = results_of_rows(study, dataset, predict.regions)
        details = partial(details_of_rows, study, results, dataset, predict.regions, folder)
    else:
        results = [evaluate(row.name, row.predict, dataset, chosen.names, row.local) for row in rows]
        details = None
    kind = KINDS[split] if cases.complete or split != "test" else ""
    return _report(dataset, chosen.names, folder, results, {}, remarks, published, kind, details)


def slug(loss: str) -> str:
    """The folder name of a loss.

    Example:
        >>> slug("dice+0.5*ace"), slug("dice+package.module:term(scale=2)")
        ('dice+0.5xace', 'dice+package.module-term(scale=2)')
    """
    return re.sub(r"[^\w.+=,()-]+", "-", loss.replace("*", "x"))


def _results_of_loss(task: Task, plan: Plan, name: str, folder: Path, *, resume: bool) -> list[Result]:
    """Trains and evaluates the networks of a loss: a result for each ending of the plan, then their ensemble's."""
    runs = plan.runs(folder, name)
    evaluated: list[list[ModelResult]] = []
    for seed, (config, run) in runs.items():
        make = partial(_trained, task, plan, config, run, resume=resume)
        evaluated.append(_evaluated(task, plan, name, seed, run, make, resume=resume))
    results: list[Result] = []
    for ending, repeats in zip(plan.endings, zip(*evaluated, strict=True), strict=True):
        by_seed = dict(zip(runs, repeats, strict=True))
        results.append(by_seed[""] if "" in by_seed else RepeatedResult(name + ending, by_seed))
    if plan.ensembles:
        averaged = f"{name}~{len(runs)}"
        make = partial(_ensemble, plan, [run for _, run in runs.values()])
        results += _evaluated(task, plan, averaged, "", folder / slug(averaged), make, resume=resume)
    return results


def _pairs(plan: Plan, results: Mapping[str, Result]) -> list[Result]:
    """The networks of the first loss, for labels, with those of every other loss, for probabilities."""
    first, *others = plan.losses
    kinds = ["", *([f"~{len(plan.seeds)}"] if plan.ensembles else [])]
    pairs = []
    for name, kind, ending in itertools.product(others, kinds, plan.endings):
        labels, probs = results[first + kind], results[f"{name}{kind}{ending}"]
        pairs.append(_paired(f"{labels.name}|{probs.name}", labels, probs))
    return pairs


def _paired(name: str, labels: Result, probs: Result) -> Result:
    """The result of two models, one for the labels and one for the probabilities."""
    if isinstance(probs, ModelResult):
        assert isinstance(labels, ModelResult)
        return dataclasses.replace(probs, name=name, dice=labels.dice)
    pairs = {
        seed: _paired(f"{name} {seed}", labels.repeats[seed], one) for seed, one in probs.repeats.items()
    }
    return RepeatedResult(name, pairs)  # type: ignore[arg-type]


def _trained(task: Task, plan: Plan, config: RunConfig, run: Path, *, resume: bool) -> VolumePredictor:
    """Trains a network, unless it is trained already."""
    predict = fit(dataclasses.replace(task, config=config), run, resume=resume, check=False)
    return load_run(run, plan.which)[2] if plan.which == "best" else predict


def _ensemble(plan: Plan, runs: Sequence[Path]) -> VolumePredictor:
    """The networks of several seeds, which are trained already."""
    return ensemble([load_run(run, plan.which)[2] for run in runs])


def _evaluated(
    task: Task,
    plan: Plan,
    name: str,
    seed: str,
    folder: Path,
    make: Callable[[], VolumePredictor],
    *,
    resume: bool,
) -> list[ModelResult]:
    """Evaluates a model on the test cases, also calibrated if the plan says so.

    A resumed comparison reads the evaluations that are there.

    Args:
        task: data and split.
        plan: what to evaluate.
        name: of the loss, to which the endings of the plan are added.
        seed: ends the names.
        folder: for the evaluations.
        make: makes the model.
        resume: whether evaluations that are there count.
    """
    names = {"": "test.npz", TEMPERED: "test-temperature.npz", LOCAL: "test-local.npz"}
    files = [folder / names[ending] for ending in plan.endings]
    if not (resume and all(file.exists() for file in files)):
        predict = make()
        folder.mkdir(exist_ok=True)
        _evaluate_into(files[0], f"{name} {seed}".rstrip(), predict, task)
        if plan.temperature:
            found = fit_temperature(predict, task.dataset, task.splits.val)
            kept = {"temperature": float(found)}
            on_first(lambda: write_json(folder / "temperature.json", kept))
            of_tempered = f"{name}{TEMPERED} {seed}".rstrip()
            _evaluate_into(folder / names[TEMPERED], of_tempered, temper(predict, found), task)
        if plan.local:
            calibration = fit_local_calibration(predict, task.dataset, task.splits.val)
            of_local = f"{name}{LOCAL} {seed}".rstrip()
            _evaluate_into(folder / names[LOCAL], of_local, predict, task, calibration)
    return [ModelResult.load(file) for file in files]


def _evaluate_into(
    file: Path, name: str, predict: VolumePredictor, task: Task, local: LocalCalibration | None = None
) -> None:
    """Evaluates a network on the test cases, unless the file exists. Prints what cannot be saved."""
    if file.exists():
        return
    result = evaluate(name, predict, task.dataset, task.splits.test, local)

    def save() -> None:
        try:
            with writing(file), written_whole(file) as partial:
                result.save(partial)
        except InputError:
            print(format_table(compare_models([result])))
            raise

    on_first(save)


def _report(
    dataset: Dataset,
    cases: Sequence[str],
    folder: Path,
    results: Sequence[Result],
    histories: Mapping[str, Mapping[str, Sequence[float]]],
    remarks: Mapping[str, str],
    published: Sequence[PublishedRow],
    kind: str,
    details: Callable[[], Details] | None = None,
) -> Path:
    """Prints the table, then writes it with the figures and the page: a full disk loses no figure."""
    reference = evaluate_posterior(dataset, cases, results[0].class_names)
    if not is_first():
        return folder / "index.html"
    compared = compare_models(results, reference=reference)
    print(format_table(compared, per_class=True))
    which = " ".join(filter(None, (str(len(cases)), kind, "cases")))
    rows = [row for result in results for row in rows_of(result)] + list(published)
    tables = {"Beside the published figures": [HEADER, *(row.cells() for row in rows)]} if published else {}
    if published:
        print(f"\nMean ± standard deviation over cases, beside what was published:\n\n{to_markdown(rows)}")
    with writing(folder):
        if published:
            write_table(folder, rows)
        found = details and details()
        if found:
            print(format_summary(found))
            write_tables(folder, compared, results)  # beside the files of a page with details
        return write_report(
            folder,
            results,
            title=f"Calibration on {dataset.name}: {which}",
            histories=histories,
            provenance={
                "command": command(),
                "data": f"{dataset.name}, {which} of {len(dataset)}",
                **({"not counted": "voxels that are labelled ignore"} if dataset.has_ignore else {}),
                **remarks,
                **versions(),
            },
            reference=reference,
            tables=tables,
            rows=compared,
            details=found,
        )


def _history(run: Path, task: Task) -> dict[str, list[float]]:
    """Training and validation curves of a run by epoch; the training loss is averaged over each epoch."""
    per_epoch = max(len(task.splits.train) // task.config.training.batch_size, 1)
    steps = read_log(run / "log.csv")
    epochs = [steps[start : start + per_epoch] for start in range(0, len(steps), per_epoch)]
    rows = [
        {
            "epoch": (epoch[-1]["step"] + 1) / per_epoch,
            "train_loss": float(np.mean([row.get("loss", np.nan) for row in epoch])),
        }
        for epoch in epochs
    ]
    rows += [
        {"epoch": row.pop("step") / per_epoch} | {f"val_{name.lower()}": value for name, value in row.items()}
        for row in read_log(run / "validation.csv")
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    rows.sort(key=lambda row: row["epoch"])
    return {name: [row.get(name, np.nan) for row in rows] for name in columns}


def _mean_history(histories: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """The mean of curves over the same steps, without the curves of logs that lost a line."""
    longest = max(len(history.get("epoch", ())) for history in histories)
    whole = [history for history in histories if len(history.get("epoch", ())) == longest]
    return {column: np.mean([history[column] for history in whole], axis=0).tolist() for column in whole[0]}


def _remarks(config: RunConfig, which: Which, cases: RunCases, runs: Mapping[str, Path]) -> dict[str, str]:
    """Lines for the page: which weights were evaluated, what they have seen, and whether training diverged."""
    remarks = {}
    if which == "best":
        remarks["checkpoint"] = f"best by {config.training.keep_best} on the validation cases"
    if not cases.complete:
        remarks["imported"] = "the weights may have been trained on these cases: nothing here tells"
    for name, run in runs.items():
        if sentence := divergence(read_log(run / "log.csv")):
            remarks[f"note on {name}"] = sentence
    return remarks


def _temperatures(folder: Path) -> dict[str, str]:
    """A line for the page with the temperatures of a comparison's networks, if there are any."""
    found = []
    for file in visible(folder, "*/temperature.json"):
        with parsing(file, "a temperature: remove it and --resume"):
            found.append(f"{file.parent.name} {float(read_json(file)['temperature']):.3f}")
    return {_TEMPERATURE: ", ".join(found)} if found else {}
