"""Prompts, folders and models that are not what they should be, and what becomes of columns."""

import json
from pathlib import Path

import pytest

from tests.sampling.fault_server import FaultServer, chat
from trl_kd.pairs import load_pairs


SOURCES = ("--teacher_column", "t", "--student_column", "s")
WINS = ("--preference", "teacher_wins")
BASE = ("--dataset_name", "prompts.jsonl", "--output_dir", "out")

MODULE = """
def tokens(completions, completion_ids, **kwargs):
    return [None if ids is None else float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture
def pairs(tmp_path, monkeypatch, trl_kd):
    """Runs `trl-kd pairs` in a folder of its own, in which `prompts.jsonl` holds the rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "wrong.py").write_text("limit = undefined_name\ndef reward(completions):\n    return []\n")

    def run(*words, rows=None, name="prompts.jsonl"):
        if rows is None:
            rows = [{"prompt": f"{i}+1=", "t": "good", "s": "bad!"} for i in range(4)]
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return trl_kd("pairs", *words)

    return run


@pytest.mark.parametrize("output", [".", "data/.."])
def test_the_users_own_data_is_not_deleted(pairs, output):
    prompts = "data/prompts.jsonl"
    words = ("--dataset_name", prompts, "--output_dir", output, *SOURCES, *WINS)
    assert "holds `data/prompts.jsonl`, which no build of pairs has written" in pairs(*words, name=prompts).error
    assert Path(prompts).read_text().count("\n") == 4
    assert not Path("answers.db").exists()


@pytest.mark.parametrize(("name", "output"), [("repo", "repo"), ("repo", "repo/pairs"), (".", "pairs")])
def test_pairs_are_not_written_among_the_prompts(pairs, name, output):
    words = ("--dataset_name", name, "--output_dir", output, *SOURCES, *WINS)
    error = pairs(*words, name="repo/data/prompts.jsonl").error
    assert (
        f"in the folder {name!r} that `dataset_name` names" in error or "which no build of pairs has written" in error
    )
    assert not Path(output, "answers.db").exists()
    beside = pairs("--dataset_name", "repo", "--output_dir", "beside", *SOURCES, *WINS, name="repo/data/prompts.jsonl")
    assert beside.code == 0


@pytest.mark.parametrize("stream", [(), ("--dataset_streaming",)])
@pytest.mark.parametrize("place", [0, 2])
def test_a_null_prompt_is_no_message(pairs, place, stream):
    rows = [{"prompt": None if i == place else f"{i}+1=", "s": "bad!"} for i in range(4)]
    with FaultServer(lambda body, number: chat("hello")) as server:
        teacher = ("--teacher", "api:m", "--teacher_base_url", server.url)
        done = pairs(*BASE, *teacher, "--student_column", "s", *WINS, "--as_messages", *stream, rows=rows)
        assert not [body for body in server.bodies if not body["messages"][-1].get("content")]
    assert f"the column 'prompt' holds None in row {place}" in done.error
    assert pairs(*BASE, "--teacher_column", "s", "--student_column", "s", *WINS, "--max_prompts", "1").code == 0


def test_a_column_named_prompt_stays_beside_another(pairs):
    rows = [{"question": f"{i}+1=", "prompt": "by hand", "source_prompt": 1, "t": "a", "s": "b"} for i in range(4)]
    done = pairs(*BASE, *SOURCES, *WINS, "--prompt_column", "question", rows=rows)
    assert done.code == 0, done.err
    made = load_pairs("out")
    assert made["prompt"] == [row["question"] for row in rows]
    assert made["source_source_prompt"] == ["by hand"] * 4
    assert made["source_prompt"] == [1] * 4


def test_settings_and_card_say_where_the_prompts_come_from(pairs):
    assert pairs(*BASE, *SOURCES, *WINS, "--dataset_split", "train", "--max_prompts", "3").code == 0
    prompts = json.loads(Path("out/settings.json").read_text())["prompts"]
    assert prompts.pop("keys")
    assert prompts == {
        "dataset": "prompts.jsonl",
        "config": None,
        "split": "train",
        "column": "prompt",
        "as_messages": False,
        "max_prompts": 3,
        "rows": 3,
    }
    card = Path("out/README.md").read_text()
    for said in ("| `prompts.dataset` | `prompts.jsonl` |", "| `prompts.split` |", "| `prompts.column` | `prompt` |"):
        assert said in card


def test_a_verifier_gets_tokens_by_the_students_tokenizer_or_by_the_one_named(pairs, tiny_dir, caplog):
    verifier = ("--preference", "verifier:mine.py:tokens")
    assert pairs(*BASE, *SOURCES, *verifier).code == 0
    assert "takes `completion_ids`, which are None without a tokenizer" in caplog.text
    assert load_pairs("out")["preference"] == [None] * 4  # nobody has a tokenizer
    done = pairs(*BASE, *SOURCES, *verifier, "--preference_tokenizer", tiny_dir, "--relabel")
    assert done.code == 0, done.err
    row = load_pairs("out")[0]
    assert (row["score_chosen"], row["score_rejected"]) == (5.0, 5.0)  # four characters and the end token
    local = ("--teacher_column", "t", "--student", tiny_dir, "--student_max_new_tokens", "3")
    done = pairs(*BASE[:-1], "local", *local, *verifier)
    assert done.code == 0, done.err
    assert None not in load_pairs("local")["preference"]
    error = pairs(*BASE, *SOURCES, *WINS, "--preference_tokenizer", tiny_dir).error
    assert "`preference_tokenizer` is set" in error
    error = pairs(*BASE, *SOURCES, *verifier, "--preference_tokenizer", "nosuch/model").error
    assert "`preference_tokenizer` is 'nosuch/model', which cannot be loaded" in error


@pytest.mark.parametrize("model", ["nosuch/model", "gpt2", "vllm:nosuch/model"])
def test_a_model_that_is_missing_is_named(pairs, model):
    error = pairs(*BASE, "--teacher", model, "--student_column", "s", *WINS).error
    assert f"`teacher` is {model!r}, which cannot be loaded" in error
    assert not Path("out").exists()


def test_weights_that_are_missing_are_named(pairs, tiny_dir, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(tiny_dir).iterdir():
        if path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    (broken / "other.bin").write_bytes(b"")
    error = pairs(*BASE, "--teacher", str(broken), "--student_column", "s", *WINS).error
    assert f"The model {str(broken)!r} cannot be loaded" in error


def test_no_pairs_are_remarked_on_and_not_recommended(pairs):
    rows = [{"prompt": f"{i}+1=", "t": None, "s": "b"} for i in range(3)]
    rows[0]["t"] = ""  # or the column would have no type
    done = pairs(*BASE, *SOURCES, *WINS, rows=[{**row, "s": None if row["t"] == "" else "b"} for row in rows])
    assert done.code == 0
    assert "Warning: there is not a single pair in out" in done.err
    assert "trl-kd pbkd" not in done.out


@pytest.mark.parametrize("words", [("--policy", "all"), ("--relabel",), (*WINS,), ("--dataset_name", "x")])
def test_a_merge_takes_no_other_options(pairs, words):
    for i in range(2):
        assert pairs(*BASE[:-1], f"p{i}", *SOURCES, *WINS, "--shard", f"{i}/2").code == 0
    error = pairs("--merge", "p0", "p1", "--output_dir", "whole", *words).error
    assert f"`{words[0][2:]}` is set, but `merge` asks nobody" in error
    assert not Path("whole").exists()


def test_a_module_that_fails_is_one_sentence(pairs):
    error = pairs(*BASE, *SOURCES, "--preference", "verifier:wrong.py:reward").error
    assert "cannot load the function 'wrong.py:reward': NameError: name 'undefined_name' is not defined" in error
