"""The cases of a run: which ones it has seen, and which ones it may be evaluated on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.config import IMPORTED, RunConfig, from_json, read_config
from train.data import Dataset
from train.data.layouts import LAYOUTS
from train.data.splits import Splits, read_splits
from train.errors import InputError
from train.files import parsing, read_json
from train.processes import is_first
from train.run.folder import write_json
from train.run.identity import CaseId, CaseIndex, identify

_FILE = "cases.json"
KINDS = {"train": "training", "val": "validation", "test": "held-out"}


@dataclass(frozen=True)
class RunCases:
    """The cases that the weights of a run may have seen, and the cases that it holds out.

    Attributes:
        own: all cases of the run's data set.
        initial: training and validation cases of the runs that its weights come from.
        complete: whether `own` and `initial` are all cases seen; False where weights were imported.
        trained: whether the run was trained on its own split; False for an imported run.
    """

    own: tuple[CaseId, ...]
    initial: tuple[CaseId, ...] = ()
    complete: bool = True
    trained: bool = True

    def write(self, run: Path) -> None:
        """Writes the cases into a run's folder, unless it has them: a resumed run may lack its initial run."""
        if not (run / _FILE).exists():
            own, initial = (
                [[case.name, sorted(case.images)] for case in cases] for cases in (self.own, self.initial)
            )
            flags = {"complete": self.complete, "trained": self.trained}
            write_json(run / _FILE, {"own": own, "initial": initial, **flags})


def read_cases(run: Path) -> RunCases:
    """The cases of the run in `run`; for runs that kept none, the names in its split.

    Raises:
        InputError: the cases cannot be read.
    """
    file = run / _FILE
    if not file.exists():
        splits = read_splits(run / "splits.json") if (run / "splits.json").exists() else Splits((), (), ())
        trained = read_config(run)[0].loss != IMPORTED
        own = tuple(map(CaseId, (*splits.train, *splits.val, *splits.test)))
        return RunCases(own, complete=trained, trained=trained)
    with parsing(file, "a list of a run's cases: remove it to recognise cases by their names"):
        kept = read_json(file)
        own, initial = (
            tuple(CaseId(name, frozenset(images)) for name, images in kept[key]) for key in ("own", "initial")
        )
        return RunCases(own, initial, bool(kept["complete"]), bool(kept["trained"]))


@dataclass(frozen=True)
class Choice:
    """The cases that a run is evaluated on.

    Attributes:
        names: of the cases in the data set.
        own: whether they belong to the run's own data set.
        val: the run's validation cases in the data set.
        notes: sentences that a reader of the results must know.
    """

    names: tuple[str, ...]
    own: bool
    val: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def choose_cases(run: Path, cases: RunCases, dataset: Dataset, split: str, *, given: str | None) -> Choice:
    """Chooses the cases of `dataset` to evaluate a run on.

    If the data are the run's own data set, or a part of it, under whatever names, these are the cases of
    `split`. Of other data these are all cases that the run was not trained or validated on.

    Args:
        run: its folder.
        cases: of the run.
        dataset: the data to evaluate on.
        split: `train`, `val` or `test`.
        given: the data set as the user named it; None for the run's own.

    Raises:
        InputError: no case is left, or `split` is not that of the data.
    """
    splits = read_splits(run / "splits.json") if given is None or cases.own else Splits((), (), ())
    if given is None:
        return _own_choice(run, cases, dataset, splits, split)
    ids, own, initial = identify(dataset), CaseIndex(cases.own), CaseIndex(cases.initial)
    own_names = {case.name for case in cases.own}
    split_of = {name: part for part in KINDS for name in getattr(splits, part)}
    # The splits of the run's cases that each case is the same as; "" for a case of the run without a split.
    parts = {case.name: {split_of.get(known.name, "") for known in own.find(case)} for case in ids}
    namesakes = [case.name for case in ids if not parts[case.name] and case.name in own_names]
    if any(parts.values()):  # some cases are the run's, so namesakes are its cases with rewritten files
        parts |= {name: {split_of.get(name, "")} for name in namesakes}
        namesakes = []
    trained = {name for name, found in parts.items() if found & {"train", "val"} and cases.trained}
    seen = trained | {case.name for case in ids if initial.find(case)}
    if all(parts.values()) and any(found - {""} for found in parts.values()):
        return _part_of_own(run, splits, parts, seen, split, given)
    if split != "test":
        raise InputError(
            f"--split {split} is a split of the run's own data set, and {given} is other data: leave it out."
        )
    return _unseen(run, [case.name for case in ids], seen, namesakes, given)


def _own_choice(run: Path, cases: RunCases, dataset: Dataset, splits: Splits, split: str) -> Choice:
    """The cases of the run's split, by name."""
    names = getattr(splits, split)
    known, found = {case.name: case for case in cases.own}, {case.name: case for case in identify(dataset)}
    if not names:
        raise InputError(f"The {split} split of {run} holds no case: choose another --split.")
    if missing := [name for name in names if name not in found]:
        raise InputError(
            f"{_count(missing)} of {run}'s {split} split not in {dataset.name} ({_some(missing)}): give the folder "
            "that holds them as --data."
        )
    changed = [name for name in names if name in known and not known[name].is_same(found[name])]
    note = f"{_count(changed)} with other images than when {run} was trained: {_some(changed)}"
    return Choice(names, True, splits.val, (note,) if changed else ())


def _part_of_own(
    run: Path, splits: Splits, parts: Mapping[str, set[str]], seen: set[str], split: str, given: str
) -> Choice:
    """The cases of a split among those of the run's own data set; `parts` holds the splits of each case."""
    names = [
        name for name, found in parts.items() if split in found and not (split == "test" and name in seen)
    ]
    if not names:
        raise InputError(
            f"{given} holds {_count(parts)} of {run}'s own data set ({_some(parts)}), but none of its {split} "
            "split: choose another --split, or leave out --data."
        )
    size = len(getattr(splits, split))
    note = f"{given} lacks {size - len(names)} of the {size} cases of {run}'s {split} split"
    val = tuple(name for name, found in parts.items() if "val" in found)
    all_val = val if len(val) == len(splits.val) else ()
    return Choice(tuple(names), True, all_val, (note,) if len(names) < size else ())


def _unseen(run: Path, names: Sequence[str], seen: set[str], namesakes: Sequence[str], given: str) -> Choice:
    """The cases of other data that the run has not seen."""
    left_out = [name for name in names if name in seen]
    if len(left_out) == len(names):
        raise InputError(
            f"{run} was trained or validated on every case of {given} ({_some(left_out)}): give data that it has "
            "not seen."
        )
    notes = {
        f"{_count(left_out)} of {given} left out, since the run was trained or validated on them": left_out,
        f"{_count(namesakes)} of {given} with the name of a case of {run}, but other images, taken as another "
        "case": namesakes,
    }
    told = tuple(f"{note}: {_some(about)}" for note, about in notes.items() if about)
    return Choice(tuple(name for name in names if name not in seen), False, (), told)


def cases_for(dataset: Dataset, init: str = "") -> RunCases:
    """The cases to keep with a run on `dataset` whose weights come from the run in `init`, if any."""
    if not init:
        return RunCases(identify(dataset))
    cases = read_cases(Path(init))
    seen = _seen(Path(init), cases, "train", "val")
    return RunCases(identify(dataset), (*cases.initial, *seen), cases.complete)


def check_initial(run: Path, cases: RunCases, dataset: Dataset, splits: Splits) -> None:
    """Checks that the run whose weights training starts from has not seen the test cases.

    Raises:
        InputError: the run was trained or validated on a test case.
    """
    ids = {case.name: case for case in identify(dataset)}

    def seen(names: Sequence[str], *parts: str) -> list[str]:
        known = CaseIndex((*cases.initial, *_seen(run, cases, *parts)))
        return [name for name in names if known.find(ids[name])]

    if test := seen(splits.test, "train", "val"):
        raise InputError(
            f"--init {run} was trained or validated on {_count(test)} of this command's test split "
            f"({_some(test)}): split the data as that run did, with --splits {run / 'splits.json'} or its options."
        )
    val = seen(splits.val, "train")
    if val and is_first():
        print(
            f"note: --init {run} was trained on {_count(val)} of this command's validation split ({_some(val)}), "
            "whose figures will look better than those of the test split."
        )


def note_duplicates(dataset: Dataset, splits: Splits) -> None:
    """Prints which test cases have the images of a training or validation case with another name."""
    ids = {case.name: case for case in identify(dataset)}
    seen = CaseIndex(replace(ids[name], name="") for name in (*splits.train, *splits.val) if ids[name].images)
    twice = [name for name in splits.test if seen.find(ids[name])]
    if twice and is_first():
        print(
            f"note: {_count(twice)} of the test split with the same images as training or validation cases of "
            f"other names, and so not held out: {_some(twice)}"
        )


def as_kept(config: RunConfig, folder: Path, dataset: Dataset, splits: Splits) -> RunConfig:
    """Replaces options by those of the run or comparison to resume in `folder`, where both mean the same.

    Paths may be spelt differently, data may lie elsewhere, and options that only make training faster may
    differ.

    Raises:
        InputError: the cases are split differently.
    """
    try:
        kept = read_json(folder / "config.json")
        directory = Path(kept.get("directory", ""))
        before: RunConfig = from_json(RunConfig, kept["config"].get("run", kept["config"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return config  # `open_run` reports the fault
    same = {name: getattr(before.data, name) for name in ("cache_dir", "loader_threads", "prefetch")}
    if (folder / "splits.json").exists():
        if read_splits(folder / "splits.json") != splits:
            raise InputError(
                f"{folder / 'splits.json'} splits the cases differently from this command: give the data and the "
                "options that the run was started with."
            )
        same["splits"] = before.data.splits
    known = {case.name: case for case in read_cases(folder).own if case.images}
    ids = identify(dataset)
    if resolved(before.data.data, directory) == resolved(config.data.data) or (
        len(known) == len(ids) and all(id.name in known and known[id.name].is_same(id) for id in ids)
    ):
        same["data"] = before.data.data
    init = config.init
    if config.init and before.init and (directory / before.init).resolve() == Path(config.init).resolve():
        init = before.init
    return replace(config, data=replace(config.data, **same), init=init)


def resolved(data: str, directory: Path = Path()) -> str:
    """The name of a data set; the path of LAYOUT:PATH is resolved from `directory`."""
    kind, _, path = data.partition(":")
    return f"{kind}:{(directory / Path(path).expanduser()).resolve()}" if kind in LAYOUTS and path else data


def own_data(run: Path, data: str) -> str:
    """The data set that `run` calls `data`, resolved from the folder that the run was started in if it is there."""
    directory = read_json(run / "config.json").get("directory", "")
    found = resolved(data, Path(directory))
    return found if Path(found.partition(":")[2]).exists() else resolved(data)


def _seen(run: Path, cases: RunCases, *parts: str) -> list[CaseId]:
    """The cases in these parts of a run's split, if the run was trained on its split."""
    if not (cases.own and cases.trained):
        return []
    splits = read_splits(run / "splits.json")
    names = {name for part in parts for name in getattr(splits, part)}
    return [case for case in cases.own if case.name in names]


def _some(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


def _count(names: Sequence[str] | Mapping[str, Any]) -> str:
    return f"{len(names)} case{'s' if len(names) != 1 else ''}"
