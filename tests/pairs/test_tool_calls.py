"""Calls of tools are written as they were given, whatever their arguments."""

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset, List, load_dataset

from tests.pairs.fakes import Source
from trl_kd.pairs import build_pairs, load_pairs, merge_shards
from trl_kd.pairs.dataset import PairWriter, join_pairs
from trl_kd.preferences.simple import TeacherWins
from trl_kd.sampling import Answer


MIX = [
    {},
    {"a": 1},
    {"a": "x"},
    {"a": [1]},
    '{"a": ',
    {"b": 1.0, "a": "é"},
    {"a": 2**70},
    {"a": {"b": []}},
    '{"a": 1}',
    {"a": 1},
]
KEPT = [*MIX[:6], '{"a": 1180591620717411303424}', *MIX[7:]]


class Calls(Source):
    """Calls with the arguments `mix[i]` for the prompt `i`; text where that is `None`."""

    def __init__(self, mix):
        super().__init__("teacher")
        self.mix = mix

    def sample(self, requests):
        for request in requests:
            arguments = self.mix[int(request.prompt[0]["content"])]
            yield request, 0, Answer([said(arguments)], "tool_calls", 3)


class Texts(Source):
    def text(self, request, sample):
        return [{"role": "assistant", "content": "I cannot."}]


def said(arguments):
    if arguments is None:
        return {"role": "assistant", "content": "No."}
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def prompts(count):
    return Dataset.from_list([{"prompt": [{"role": "user", "content": str(i)}]} for i in range(count)])


def build(mix, folder, data=None, **options):
    options = {"student": Texts("student"), "preference": TeacherWins(), "show_progress": False} | options
    return build_pairs(data or prompts(len(mix)), teacher=Calls(mix), output_dir=folder, **options)


def arguments(message):
    return message["tool_calls"][0]["function"]["arguments"] if message.get("tool_calls") else None


def same(found, wanted):
    """Types and order of keys, too."""
    assert repr(found) == repr(wanted)


@pytest.mark.parametrize("mix", [MIX, MIX[::-1], [{}, {}], [{"a": 1}, {"a": 2.5}], [{}, {"a": [1]}]])
def test_arguments_come_back(mix, tmp_path):
    wanted = [KEPT[MIX.index(one)] if one in MIX else one for one in mix]
    for made in (build(mix, tmp_path), build(mix, tmp_path), load_pairs(tmp_path)):
        same([arguments(row["chosen"][0]) for row in made], wanted)
    files = load_dataset("parquet", data_files=str(tmp_path / "data" / "*.parquet"), split="train")
    same([row["chosen"] for row in files], [[said(one)] for one in wanted])


def test_calls_that_come_late(tmp_path):
    mix = [None] * 1100 + MIX
    made = build(mix, tmp_path)
    same([row["chosen"] for row in made], [[said(one)] for one in [None] * 1100 + KEPT])
    assert made[0]["rejected"] == [{"role": "assistant", "content": "I cannot."}]
    assert made.features["chosen"] == made.features["rejected"]


def test_calls_in_the_prompts_of_a_stream(tmp_path):
    def generate():
        for i, one in enumerate(MIX[:4]):
            yield {"prompt": [{"role": "user", "content": str(i)}, said(one)]}

    made = build([None] * 4, tmp_path, IterableDataset.from_generator(generate))
    same([arguments(row["prompt"][1]) for row in made], MIX[:4])


def test_calls_without_arguments_in_the_prompts(tmp_path):
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "0"}, said({})]}])
    made = build([None], tmp_path, data)
    assert arguments(made[0]["prompt"][1]) == {}


def test_no_calls_are_written_as_before(tmp_path):
    made = build([None, None], tmp_path)
    assert isinstance(made.features["chosen"], List)
    assert set(made.features["chosen"].feature) == {"role", "content"}


def test_pieces_with_and_without_calls(tmp_path):
    data = prompts(12)
    whole = build([None] * 12, tmp_path / "plain", data)
    pieces = [tmp_path / "0", tmp_path / "1"]
    build([None] * 12, pieces[0], data, shard=(0, 2))
    second = build([*MIX, *MIX][:12], pieces[1], data, shard=(1, 2))
    with_calls = {row["source_row"]: row["chosen"] for row in second}
    assert 0 < len(with_calls) < 12
    for order in (pieces, pieces[::-1]):
        merged = merge_shards(order, tmp_path / f"merged-{order[0].name}")
        same(
            [row["chosen"] for row in merged],
            [with_calls.get(row["source_row"], row["chosen"]) for row in whole],
        )
        joined = join_pairs(order)
        assert len(joined) == 12
        same({row["source_row"]: row["chosen"] for row in joined if row["chosen"][0].get("tool_calls")}, with_calls)


def test_rows_are_saved_in_batches_of_any_kind(tmp_path):
    writer = PairWriter(tmp_path)
    for one in (None, {}, None, {"a": 1}):
        row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [said(one)], "rejected": [said(None)]}
        writer.write([row | {"teacher": None}])
    writer.close()
    rows = list(load_pairs(tmp_path))
    same([arguments(row["chosen"][0]) for row in rows], [None, {}, None, {"a": 1}])
    assert pq.read_schema(next((tmp_path / "data").iterdir())).metadata
