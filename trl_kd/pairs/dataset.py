"""Pairs on disk: Parquet files that appear whole or not at all, how they are read, and how pieces become one."""

import glob
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, Json, LargeList, List, Value, concatenate_datasets

from trl_kd.pairs.full_disk import full_disk_said
from trl_kd.pairs.json_messages import JSON_TYPE, as_json, have_calls, is_json, json_columns, to_json_array


DATA = "data"
TEXTS = ("prompt", "chosen", "rejected", "teacher")
FIXED = {
    "preference": pa.float64(),
    "teacher_side": pa.string(),
    "score_chosen": pa.float64(),
    "score_rejected": pa.float64(),
    "chosen_source": pa.string(),
    "rejected_source": pa.string(),
    "chosen_finish_reason": pa.string(),
    "rejected_finish_reason": pa.string(),
    "teacher_finish_reason": pa.string(),
    "student_count": pa.int64(),
    "source_row": pa.int64(),
}
"""Columns of ours besides `TEXTS`, and their types."""

RESERVED = {
    *("chosen", "rejected", "teacher", *FIXED),
    *("messages", "completion", "completions", "text", "label", "labels", "conversations", "image", "images"),
    *("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "input_ids", "attention_mask", "completion_mask"),
    *("assistant_masks", "position_ids", "token_type_ids", "mm_token_type_ids", "pixel_values", "seq_lengths"),
    *("ref_chosen_logps", "ref_rejected_logps", "margin"),
    *("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
}
"""Names that TRL's trainers or ours read, or that are written here: the source's own columns of these names are renamed."""

_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_GROUP_ROWS, _GROUP_BYTES, _FILE_ROWS = 10_000, 2**25, 200_000


def renamed(columns: Iterable[str], used_up: Iterable[str] = ()) -> dict[str, str]:
    """New names of the source's own columns, without those `used_up` as answers: `RESERVED` ones get a prefix."""
    own = [name for name in columns if name != "prompt" and name not in set(used_up)]
    names: dict[str, str] = {}
    for name in own:
        new = name
        while new in RESERVED or (new != name and new in own):
            new = f"source_{new}"
        names[name] = new
    return names


class PairWriter:
    """
    Writes rows to `data/train-*.parquet` of a folder. They appear there when all of them are written, in place of what was
    there before.

    Types of the source's own columns are those of `features`. Where these are not known (a stream), and for the fields of
    messages, they are taken from the values, and widened when later ones need it. Messages that call tools are written as
    JSON (`datasets.Json`), so that arguments of any shape come back as they were.

    Args:
        folder (`str` or `Path`):
            The output folder.
        features (`dict[str, Any]`, *optional*):
            Known features of columns, by their new names.
    """

    def __init__(self, folder: str | Path, features: dict[str, Any] | None = None):
        self.folder = Path(folder).absolute()  # of a relative name such as "s3:" pyarrow makes an address
        self.rows = 0
        self._features = {name: _writable(feature) for name, feature in (features or {}).items()}
        self._building = self.folder / f"{DATA}.building"
        self._files: list[tuple[Path, pa.Schema]] = []
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None
        self._waiting: list[pa.Table] = []
        self._file_rows = 0
        with full_disk_said(self.folder):
            shutil.rmtree(self._building, ignore_errors=True)
            self._building.mkdir(parents=True)

    def write(self, rows: list[dict[str, Any]], columns: dict[str, list[Any]] | None = None) -> None:
        """Adds rows, all of the same columns, and further columns of theirs."""
        if rows:
            self.write_table(self._table({name: [row[name] for row in rows] for name in rows[0]} | (columns or {})))

    def write_table(self, table: pa.Table) -> None:
        """Adds rows that are Arrow already."""
        self._fit(table.schema)
        self._waiting.append(table)
        self.rows += len(table)
        waiting = sum(map(len, self._waiting))
        if waiting >= _GROUP_ROWS or sum(part.nbytes for part in self._waiting) >= _GROUP_BYTES:
            self._flush()

    def close(self, columns: Iterable[str] = ()) -> None:
        """Puts the files in their place. `columns` are those of an empty dataset."""
        with full_disk_said(self.folder):
            self._flush()
            if self._schema is None:
                types = {"prompt": pa.string(), **dict.fromkeys(TEXTS, pa.string()), **FIXED}
                self._fit(pa.schema({name: types.get(name, pa.null()) for name in (*columns, *types)}))
            if not self._files:
                self._open()
            self._close_file()
            for number, (path, schema) in enumerate(self._files):
                final = self._building / f"train-{number:05d}-of-{len(self._files):05d}.parquet"
                if schema.equals(self._schema):
                    path.rename(final)
                else:
                    self._rewrite(path, final)
            data, former = self.folder / DATA, self.folder / f"{DATA}.former"
            shutil.rmtree(former, ignore_errors=True)
            if data.exists():
                data.rename(former)
            self._building.rename(data)
            shutil.rmtree(former, ignore_errors=True)

    def abandon(self) -> None:
        """Gives up what was written. What was in place before stays."""
        if self._writer is not None:
            self._writer.close()
        shutil.rmtree(self._building, ignore_errors=True)

    def _table(self, columns: dict[str, list[Any]]) -> pa.Table:
        is_plain_text = isinstance(columns["prompt"][0], str)
        arrays = {}
        for name, values in columns.items():
            feature = self._features.get(name)
            if name in FIXED:
                arrays[name] = pa.array(values, FIXED[name])
            elif name in TEXTS and feature is None:
                if not is_plain_text and have_calls(values):
                    arrays[name] = to_json_array(values)
                else:
                    # No type is given to messages: Arrow would leave out, in silence, the fields that it does not name
                    arrays[name] = pa.array(values, pa.string() if is_plain_text else None)
            elif feature is None:
                arrays[name] = _inferred(values, name)
            elif _is_plain(feature):
                arrays[name] = pa.array(values, Features({name: feature}).arrow_schema.field(name).type)
            else:
                encoded = Dataset.from_dict({name: values}, features=Features({name: feature}))
                arrays[name] = encoded.data.table[name].combine_chunks()
        return pa.table(arrays)

    def _fit(self, schema: pa.Schema) -> None:
        """Widens the schema to hold another batch; what is written already is rewritten in the end."""
        if self._schema is None:
            is_messages = pa.types.is_nested(schema.field("chosen").type)
            texts = {name: _MESSAGES for name in TEXTS[1:] if is_messages and name in schema.names}
            wider = _unify([schema, pa.schema(texts)])
        else:
            wider = _unify([self._schema, schema])
        if self._schema is None or not wider.equals(self._schema.remove_metadata()):
            self._flush()
            self._close_file()
            inferred = Features.from_arrow_schema(wider)
            in_json = {name for name in TEXTS if name in wider.names and is_json(wider.field(name).type)}
            features = Features(
                inferred | {n: f for n, f in self._features.items() if n in wider.names and n not in in_json}
            )
            self._schema = wider.with_metadata(features.arrow_schema.metadata)

    def _flush(self) -> None:
        if not self._waiting:
            return
        with full_disk_said(self.folder):
            if self._writer is None:
                self._open()
            assert self._writer is not None
            table = pa.concat_tables([_as_schema(part, self._schema) for part in self._waiting])
            self._writer.write_table(table, row_group_size=len(table))
        self._waiting = []
        self._file_rows += len(table)
        if self._file_rows >= _FILE_ROWS:
            self._close_file()

    def _open(self) -> None:
        path = self._building / f"{len(self._files):05d}.parquet"
        self._writer = pq.ParquetWriter(path, self._schema)
        self._files.append((path, self._schema))
        self._file_rows = 0

    def _close_file(self) -> None:
        if self._writer is not None:
            with full_disk_said(self.folder):
                self._writer.close()
        self._writer = None

    def _rewrite(self, path: Path, final: Path) -> None:
        with pq.ParquetWriter(final, self._schema) as writer:
            for batch in pq.ParquetFile(path).iter_batches(_GROUP_ROWS):
                writer.write_table(_as_schema(pa.table(batch), self._schema))
        path.unlink()


def _writable(feature: Any) -> Any:
    """A feature with JSON in place of objects without fields, which Parquet cannot hold."""
    if isinstance(feature, dict):
        return {name: _writable(inner) for name, inner in feature.items()} or Json()
    if isinstance(feature, List) and feature.length == -1:
        return List(_writable(feature.feature))
    return feature


def _is_plain(feature: Any) -> bool:
    """Whether values of a feature are what Arrow makes an array of: no images, classes or JSON."""
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, List | LargeList):
        return _is_plain(feature.feature)
    return isinstance(feature, Value)


def _inferred(values: list[Any], name: str) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise ValueError(_untyped(name, error)) from error


def _unify(schemas: list[pa.Schema]) -> pa.Schema:
    in_json = json_columns(
        field_.name for schema in schemas for field_ in schema if field_.name in TEXTS and is_json(field_.type)
    )
    schemas = [
        pa.schema([field_.with_type(JSON_TYPE) if field_.name in in_json else field_ for field_ in schema])
        for schema in schemas
    ]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(_untyped("", error)) from error


def _untyped(name: str, error: Exception) -> str:
    which = f"The column {name!r}" if name else "A column"
    return (
        f"{which} of the prompts has values of different types ({error}): give its type with `prompts.cast_column`, or "
        "leave it out with `prompts.remove_columns`."
    )


def _as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    arrays = []
    for field_ in schema:
        if field_.name in table.column_names:
            column = table[field_.name]
            if is_json(field_.type) and field_.name in TEXTS:
                column = as_json(column)
            arrays.append(column if column.type == field_.type else column.cast(field_.type))
        else:
            arrays.append(pa.nulls(len(table), field_.type))
    return pa.table(arrays, schema=schema)


def data_files(folder: str | os.PathLike) -> list[str]:
    """
    The Parquet files of a folder of pairs, in order.

    Raises:
        `FileNotFoundError`: there are none.
    """
    files = sorted(str(path) for path in (Path(folder).absolute() / DATA).glob("train-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"`{folder}` holds no finished pairs (`{DATA}/train-*.parquet`): build them first, or run the same command "
            "again if it was interrupted."
        )
    return files


def load_pairs(output_dir: str | os.PathLike, strict_only: bool = False) -> Dataset:
    """
    Reads the pairs of a folder that [`build_pairs`] or [`merge_shards`] wrote.

    Args:
        output_dir (`str` or `Path`):
            The folder.
        strict_only (`bool`, *optional*, defaults to `False`):
            Whether to leave out ties and rows without a preference. TRL's own `DPOTrainer` needs it: it does not know the
            column `preference`, and takes every row's chosen response for better. A soft label is as good as a hard one to
            it. `PbKDTrainer` uses all rows, each by its label.

    Returns:
        `Dataset`: Rows as described in [`build_pairs`].

    Raises:
        `FileNotFoundError`: the folder holds no finished pairs.
        `ValueError`: `strict_only`, and no row has a winner.
    """
    files = data_files(output_dir)
    if sum(pq.read_metadata(file).num_rows for file in files):
        dataset = Dataset.from_parquet([glob.escape(file) for file in files])  # a name is not a pattern
        assert isinstance(dataset, Dataset)
    else:  # a piece without pairs, which the other way of reading refuses
        dataset = Dataset(pq.read_table(files[0]))
    if strict_only:
        is_strict = pc.fill_null(pc.greater(dataset.data.column("preference"), 0.5), False)
        strict = np.flatnonzero(is_strict.to_numpy())
        if not len(strict):
            raise ValueError(
                f"No row of `{output_dir}` has a winner (`preference` above ½): DPO has nothing to learn."
            )
        dataset = dataset.select(strict)
    return dataset


def join_pairs(folders: Sequence[str | os.PathLike]) -> Dataset:
    """
    Reads the pairs of several folders, one after another.

    Fields of messages that only some of them have (the `tool_calls` of an answer, say) are null in the others.

    Args:
        folders (sequence of `str` or `os.PathLike`):
            Folders that [`build_pairs`] wrote from prompts of the same columns.
    """
    parts = [load_pairs(folder) for folder in folders]
    if all(part.features == parts[0].features for part in parts):
        return concatenate_datasets(parts)
    wider = _unify([part.features.arrow_schema for part in parts])
    inferred = Features.from_arrow_schema(wider)
    known = {name: feature for name, feature in parts[0].features.items() if not isinstance(feature, List | dict)}
    schema = wider.with_metadata(Features(inferred | known).arrow_schema.metadata)
    return Dataset(pa.concat_tables([_as_schema(part.data.table, schema) for part in parts]))
