"""Where a command's rows come from: the Hub, a saved folder, a folder of files, or one file."""

import glob
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets as hf_datasets
from datasets import Dataset, DatasetDict, IterableDataset, Value, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from trl_kd.sampling.names import looks_like_path
from trl_kd.scripts.data_files import TEXT_FILES, check_encoding, check_kinds, infer_features
from trl_kd.scripts.errors import InputError, one_line
from trl_kd.scripts.paths import check_name


_READ = {"prompt", "chosen", "rejected", "teacher", "completion", "preference", "teacher_side"}
"""Columns that have a meaning here."""

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_datasets(
    script_args: ScriptArguments, mixture: DatasetMixtureConfig, with_eval: bool
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Loads the rows to train on, and those to evaluate on.

    Args:
        script_args ([`~trl.ScriptArguments`]):
            `dataset_name` is a Hub id, a folder written by `save_to_disk`, a folder of data files, or a data file.
        mixture ([`~trl.DatasetMixtureConfig`]):
            A mixture of datasets in place of `dataset_name`.
        with_eval (`bool`):
            Whether the evaluation split is needed.

    Returns:
        The training dataset, and the evaluation dataset or `None`.

    Raises:
        `InputError`: no such source, no such split, or a file that cannot be read.
    """
    source = "`datasets`" if mixture.datasets else f"`dataset_name` = {script_args.dataset_name!r}"
    try:
        splits = _load_mixture(mixture) if mixture.datasets else _load_named(script_args)
    except InputError:
        raise
    except Exception as error:  # `datasets` wraps what goes wrong in a file in exceptions of its own
        raise _unreadable(source, error) from error
    check_depth(splits, source)
    train, test = script_args.dataset_train_split, script_args.dataset_test_split
    if mixture.datasets:
        train = "train"  # TRL's mixtures know no other name
    elif len(splits) == 1 and train == "train":
        train = next(iter(splits))  # the only one there is
    train_dataset = _split(splits, train, "dataset_train_split", source)
    if not with_eval:
        return train_dataset, None
    if mixture.datasets:
        if test not in splits:
            raise InputError(
                "`eval_strategy` asks for evaluation, but `datasets` has no test split: set `test_split_size`."
            )
    elif train == test:
        raise InputError(
            f"`dataset_test_split` is {test!r}, the very split that is trained on: {source} has no other."
        )
    return train_dataset, _split(splits, test, "dataset_test_split", source)


def _split(splits: Any, name: str, field: str, source: str) -> Any:
    if name not in splits:
        hint = " or set `eval_strategy` to 'no'" if field == "dataset_test_split" else ""
        raise InputError(
            f"`{field}` is {name!r}, but {source} has the splits {', '.join(map(repr, splits))}: name one of "
            f"them{hint}."
        )
    return splits[name]


def load_split(
    name: str,
    config: str | None,
    split: str,
    streaming: bool,
    field: str = "dataset_name",
    split_field: str = "dataset_split",
) -> Dataset | IterableDataset:
    """Loads one split of a Hub id, a folder written by `save_to_disk`, a folder of data files, or a data file.

    Raises:
        `InputError`: no such source, no such split, or a file that cannot be read. It names the `field` or `split_field`.
    """
    source = f"`{field}` = {name!r}"
    try:
        splits = _load(name, config, streaming, field)
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(source, error) from error
    check_depth(splits, source)
    if len(splits) == 1 and split == "train":
        split = next(iter(splits))  # the only one there is
    return _split(splits, split, split_field, source)


def load_prompts(
    script_args: ScriptArguments, mixture: DatasetMixtureConfig, with_eval: bool, with_completions: bool
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """As `load_datasets`, for prompts. Pairs will do; `with_completions`, their `completion` is what the teacher wrote."""
    train_dataset, eval_dataset = load_datasets(script_args, mixture, with_eval)
    if with_completions:
        train_dataset = _teacher_texts(train_dataset)
        eval_dataset = None if eval_dataset is None else _teacher_texts(eval_dataset)
    return train_dataset, eval_dataset


def _teacher_texts(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    first: dict[str, Any] = next(iter(dataset), {})
    if "completion" in first or not {"chosen", "rejected", "teacher_side"} <= first.keys():
        return dataset
    features = dataset.features
    if features is not None:  # said outright, since the first rows may hold nothing but nulls
        features = features.copy()
        features |= {"completion": features["chosen"], "completion_finish_reason": Value("string")}
    return dataset.map(_teacher_text, features=features)


def _teacher_text(row: dict[str, Any]) -> dict[str, Any]:
    side = row["teacher_side"] or "teacher"
    return {"completion": row.get(side), "completion_finish_reason": row.get(f"{side}_finish_reason")}


def load_preferences(script_args: Any) -> Dataset | None:
    """Loads the pairs that `preference_dataset` and its companions name, where they do.

    Raises:
        `InputError`: no such source, no such split, or a file that cannot be read.
    """
    if script_args.preference_dataset is None:
        return None
    return load_split(
        script_args.preference_dataset,
        script_args.preference_dataset_config,
        script_args.preference_dataset_split,
        streaming=False,
        field="preference_dataset",
        split_field="preference_dataset_split",
    )


def _unreadable(source: str, error: Exception) -> InputError:
    cause = error.__cause__ if error.__cause__ is not None else error
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return InputError(f"{source} is empty: it needs at least one row.")
    return InputError(f"{source} could not be loaded: {one_line(cause)}")


def _load_named(script_args: ScriptArguments) -> Any:
    assert script_args.dataset_name is not None
    return _load(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)


def _load_mixture(mixture: DatasetMixtureConfig) -> Any:
    folders = [Path(entry.path) for entry in mixture.datasets if Path(entry.path).is_dir()]
    files = [(file, f"`datasets` has {str(folder)!r}") for folder in folders for file in _text_files(folder)]
    local = [
        replace(entry, path=_without_patterns(Path(entry.path))) if Path(entry.path).is_dir() else entry
        for entry in mixture.datasets
    ]
    with _checked(files, mixture.streaming):
        return get_dataset(replace(mixture, datasets=local))


def _text_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in TEXT_FILES and file.stat().st_size)


@contextmanager
def _checked(files: list[tuple[Path, str]], streaming: bool) -> Iterator[None]:
    """
    Around the loading of `files`, each with what names it: says where one is wrong if that fails.

    A stream would fail in the middle of a training, at the row that is wrong: its files are read before it begins.
    """
    for file, source in files:
        check_encoding(file, source)
    json_files = [(file, source) for file, source in files if BUILDERS[file.suffix] == "json"]
    try:
        for file, source in json_files if streaming else ():
            check_kinds(file, source)
        yield
    except InputError:
        raise
    except Exception:
        for file, source in json_files:
            check_kinds(file, source)
        raise


def _load(name: str, config: str | None, streaming: bool, field: str = "dataset_name") -> Any:
    options: dict[str, Any] = {"streaming": streaming}
    path = Path(name)
    if path.exists():
        check_name(field, name)
        path = path.absolute()  # `datasets` expands a `~` that is the beginning of a name
    if path.is_file():
        builder = BUILDERS.get(path.suffix)
        if builder is None:
            raise InputError(f"`{field}` is the file {name!r}: its name must end in {', '.join(BUILDERS)}.")
        return _load_file(path, builder, f"`{field}` is {name!r}", options)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _load_saved(path, streaming, field)
        if not any(file.suffix in BUILDERS for file in path.rglob("*")):
            raise InputError(
                f"`{field}` is the folder {name!r}, which holds neither a saved dataset nor "
                f"{', '.join(BUILDERS)} files."
            )
        return _load_folder(path, f"`{field}` is {name!r}", name=config, cache_dir=_cache_of(path), **options)
    if looks_like_path(name) or path.suffix in BUILDERS:
        raise InputError(f"`{field}` is {name!r}: no such file or folder.")
    try:
        return load_dataset(name, name=config, **options)
    except (OSError, ValueError) as error:
        raise InputError(
            f"`{field}` is {name!r}: there is no such file or folder here, and as a dataset of the Hub it cannot "
            f"be loaded: {one_line(error)}"
        ) from error


def _load_file(path: Path, builder: str, source: str, options: dict[str, Any]) -> Any:
    if path.suffix in TEXT_FILES or not path.stat().st_size:
        check_encoding(path, source)
    options |= {"data_files": glob.escape(str(path))}
    if builder != "json":
        return load_dataset(builder, **options)
    if options["streaming"]:
        check_kinds(path, source)
    try:
        splits = load_dataset(builder, **options)
    except Exception:
        check_kinds(path, source)
        return load_dataset(builder, features=infer_features(path, source), **options)
    if any(_is_mixed(split) for split in splits.values()):
        check_kinds(path, source, _READ)
    return splits


def _load_folder(path: Path, source: str, **options: Any) -> Any:
    files = [(file, source) for file in _text_files(path)]
    with _checked(files, options["streaming"]):
        splits = load_dataset(_without_patterns(path), **options)
    if any(_is_mixed(split) for split in splits.values()):
        for file, _ in files:
            if BUILDERS[file.suffix] == "json":
                check_kinds(file, source, _READ)
    return splits


_DEEPEST = 20


def check_depth(splits: Any, source: str) -> None:
    """Raises for a column that is nested deeper than anybody writes: to copy it or to store it fails, at some depth."""
    for split in splits.values():
        for name, feature in (split.features or {}).items():
            levels, waiting = 0, [feature]
            while waiting and levels <= _DEEPEST:
                levels += 1
                waiting = [inner for part in waiting for inner in _inner(part)]
            if waiting:
                raise InputError(f"{source}: the column `{name}` is nested deeper than {_DEEPEST} levels: drop it.")


def _inner(feature: Any) -> list[Any]:
    """The features that a feature of `datasets` consists of."""
    if isinstance(feature, dict):
        return list(feature.values())
    if isinstance(feature, list | tuple):
        return list(feature)
    return [feature.feature] if hasattr(feature, "feature") else []


def _is_mixed(split: Dataset | IterableDataset) -> bool:
    """Whether a column that is read here may hold values of several kinds, which new releases of `datasets` keep as JSON."""
    features = split.features or {}
    return any(type(features.get(name)).__name__ == "Json" for name in _READ)


def _cache_of(path: Path) -> str:
    """
    Where `datasets` shall cache a folder as it is now. By itself it tells folders that have a card apart by their last names
    and cards alone, and hands out the rows of another folder of that name, or those from before a change.
    """
    state = [str(path.resolve())]
    for file in sorted(path.rglob("*")):
        if file.suffix in BUILDERS:
            state += [str(file), str(file.stat().st_size), str(file.stat().st_mtime_ns)]
    name = hashlib.sha256("\n".join(state).encode()).hexdigest()[:16]
    return str(Path(hf_datasets.config.HF_DATASETS_CACHE) / "trl-kd" / name)


def _without_patterns(path: Path) -> str:
    """The folder, or one of links to its files if `datasets` would read the folder's own name as a pattern: a shell's, or
    the template and regular expression that it makes of the place of what it caches."""
    if not re.search(r"[*?\[\]\n(){}+|^$\\]", str(path.resolve())):
        return str(path)
    links = Path(_cache_of(path)) / "links"
    for file in path.rglob("*"):
        if file.is_file():
            link = links / file.relative_to(path)
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # of an earlier run, or another process
                link.symlink_to(file.resolve())
    return str(links)


def _load_saved(path: Path, streaming: bool, field: str) -> Any:
    try:
        saved = load_from_disk(_without_patterns(path))
    except IndexError as error:  # how `datasets` says that a split was saved without rows
        raise InputError(f"`{field}` is {str(path)!r}, which is empty: it needs at least one row.") from error
    splits = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    return {name: split.to_iterable_dataset() for name, split in splits.items()} if streaming else splits
