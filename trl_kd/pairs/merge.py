"""Pieces that several machines built become one dataset, row for row what one machine would have built."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features

from trl_kd.pairs.dataset import FIXED, TEXTS, PairWriter, data_files, load_pairs
from trl_kd.pairs.folder import check_folder
from trl_kd.pairs.json_messages import as_json, is_json, json_columns, rows_of
from trl_kd.pairs.lock import lock_folder
from trl_kd.pairs.places import read_json_file
from trl_kd.pairs.report import SETTINGS, PairReport
from trl_kd.sampling.recorded import recorded_settings


_AT_ONCE = 5000
"""Rows of each piece that are held at once."""


def merge_shards(folders: Sequence[str | Path], output_dir: str | Path) -> Dataset:
    """
    Makes one dataset of the pieces that [`build_pairs`] wrote with `shard=(i, n)`, with their statistics, card and page.

    The pieces are left as they are, and keep the answers: to build again with other pairing options, build the pieces and
    merge them again.

    Args:
        folders (sequence of `str` or `Path`):
            The output folders of all n pieces, in any order.
        output_dir (`str` or `Path`):
            Another folder, for the whole.

    Returns:
        `Dataset`: The rows that one run without `shard` writes, in its order.

    Raises:
        `ValueError`: a piece is missing or there twice, or was built with other settings than the first, or from
        other prompts; or `output_dir`
        holds files of somebody else's.
        `FileNotFoundError`: a piece is not finished.
    """
    pieces = [Path(folder) for folder in folders]
    settings = _common_settings(pieces)
    if Path(output_dir).resolve() in [piece.resolve() for piece in pieces]:
        raise ValueError(f"`output_dir` is {str(output_dir)!r}, which is one of the pieces: give another folder.")
    if Path(output_dir, "answers.db").is_file():
        raise ValueError(
            f"`output_dir` is {str(output_dir)!r}, which holds the answers of a build: give another folder."
        )
    check_folder(output_dir)
    report = PairReport(settings["pairing"]["seed"])
    for piece in pieces:
        report.add_counts(piece)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    with lock_folder(output_dir):
        features = Features.from_arrow_schema(pq.read_schema(_largest(pieces)))
        writer = PairWriter(output_dir, dict(features))
        columns = [name for name in features if name in TEXTS or name in FIXED]
        try:
            for table in _in_order(pieces):
                report.add_rows(rows_of(table.select(columns)))
                writer.write_table(table)
        except BaseException:
            writer.abandon()
            raise
        writer.close(features)
        report.write(output_dir, settings)
    return load_pairs(output_dir)


def _common_settings(folders: list[Path]) -> dict[str, Any]:
    if not folders:
        raise ValueError("There is nothing to merge: name the folders of all pieces.")
    found: dict[int, Path] = {}
    first: dict[str, Any] = {}
    count = 0
    for folder in folders:
        data_files(folder)
        settings = recorded_settings(read_json_file(folder / SETTINGS))
        shard = settings.pop("shard")
        if shard is None:
            raise ValueError(f"`{folder}` is not a piece: it was built without `shard`.")
        if not found:
            first, count = settings, shard[1]
        if _fingerprint(settings) != _fingerprint(first):
            raise ValueError(
                f"`{folder}` was built from other prompts than `{folders[0]}` (`prompts` in `{SETTINGS}` of both): build "
                "all pieces from the same dataset."
            )
        if settings | {"prompts": None} != first | {"prompts": None} or shard[1] != count:
            different = [name for name in settings if name != "prompts" and settings[name] != first.get(name)] or [
                "number of pieces"
            ]
            raise ValueError(
                f"`{folder}` was built with other settings than `{folders[0]}`: {', '.join(different)} (see `{SETTINGS}` in "
                "both)."
            )
        if shard[0] in found:
            raise ValueError(
                f"`{folder}` and `{found[shard[0]]}` are the same piece, {shard[0]} of {count}: name one."
            )
        found[shard[0]] = folder
    missing = sorted(set(range(count)) - set(found))
    if missing:
        raise ValueError(f"Of the {count} pieces, {', '.join(map(str, missing))} (counted from 0) are not named.")
    return {**first, "shard": None}


def _fingerprint(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Which prompts a piece is of. Not where they were: two machines may have one dataset at two places."""
    prompts = settings.get("prompts", {})
    return prompts.get("rows"), prompts.get("keys")


def _largest(folders: list[Path]) -> str:
    """A file of the piece with the most rows, whose types say most."""
    return data_files(max(folders, key=lambda folder: sum(pq.read_metadata(f).num_rows for f in data_files(folder))))[
        0
    ]


def _in_order(folders: list[Path]) -> Iterator[pa.Table]:
    """All rows by `source_row`, some thousands at a time; rows of one prompt stay in the order that they have."""
    schemas = [pq.read_schema(path) for folder in folders for path in data_files(folder)]
    in_json = json_columns(
        field.name for schema in schemas for field in schema if field.name in TEXTS and is_json(field.type)
    )
    readers = [_tables(folder, in_json) for folder in folders]
    waiting: list[pa.Table | None] = [next(reader, None) for reader in readers]
    while any(table is not None for table in waiting):
        # Everything up to the first end of what is loaded can be put in order. A prompt lies in one piece, and may go on
        # behind that end: its rows are in order there
        bound = min(table["source_row"][-1].as_py() for table in waiting if table is not None)
        ready = []
        for place, table in enumerate(waiting):
            if table is None:
                continue
            count = pc.sum(pc.less_equal(table["source_row"], bound)).as_py()
            ready.append(table.slice(0, count))
            rest = table.slice(count)
            waiting[place] = rest if len(rest) else next(readers[place], None)
        merged = pa.concat_tables(ready, promote_options="permissive")
        position = pa.array(range(len(merged)))
        order = pc.sort_indices(
            pa.table({"row": merged["source_row"], "position": position}),
            sort_keys=[("row", "ascending"), ("position", "ascending")],
        )
        yield merged.take(order)


def _tables(folder: Path, in_json: set[str]) -> Iterator[pa.Table]:
    for path in data_files(folder):
        for batch in pq.ParquetFile(path).iter_batches(_AT_ONCE):
            if len(batch):
                table = pa.table(batch)
                for name in in_json.intersection(table.column_names):
                    table = table.set_column(table.column_names.index(name), name, as_json(table[name]))
                yield table
