"""`trl-kd pairs --dry_run`: one answer of each source, and what the rest would take."""

import hashlib
import json
import re

import pytest

from tests.sampling.fault_server import FaultServer, chat
from trl_kd.pairs import load_pairs


pytest.importorskip("openai", reason="needs the extra `api`")

MODULE = """
import json

def right(prompts, completions, answer, **kwargs):
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(text == truth) for text, truth in zip(texts, answer)]

def noted(prompts, first, second, **columns):
    with open("noted.jsonl", "a") as file:
        for row in zip(prompts, first, second, columns["answer"], columns["first_finish_reason"]):
            file.write(json.dumps(row) + "\\n")
    return [1.0] * len(prompts)
"""

VERIFIER = ("--preference", "verifier:mine.py:right")
COLUMNS = ("--teacher_column", "t", "--student_column", "s")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i % 18}+1=", "answer": str(i % 18 + 1), "t": str(i + 1), "s": "no"} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


@pytest.fixture
def pairs(trl_kd):
    return lambda *words: trl_kd("pairs", "--dataset_name", "prompts.jsonl", "--output_dir", "pairs", *words)


def says(body, number):
    """One choice, whatever `n` says, by what is asked alone."""
    if body["model"] == "judge":
        return chat("Verdict: A", tokens=6)
    question = body["messages"][-1]["content"]
    return chat(f"{body['model'][0]}{question}{body['seed'] % 1000}", tokens=8)


def servers(server, *names):
    words = []
    for name in names:
        words += ["--preference", "judge:judge"] if name == "judge" else [f"--{name}", f"api:{name}"]
        words += [f"--{name}_base_url", server.url]
    return words


def table(done):
    """The rows of the table, each with what stands under it."""
    assert done.code == 0, done.err
    rows, name = {}, None
    for line in done.out.splitlines()[1:-1]:
        found = re.match(r"  (\w[\w ]*?)?  +(.*)", line)
        name = found[1] or name
        rows.setdefault(name, []).append(found[2])
    return rows


def contents(folder):
    """Every file of a folder but the index of the log, which SQLite keeps for those who read at one time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith("-shm")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_one_answer_of_each_and_nothing_is_written(folder, tiny_dir, pairs):
    words = ("--teacher_column", "t", "--student", tiny_dir, "--student_max_new_tokens", "3", *VERIFIER)
    rows = table(pairs(*words, "--num_student_samples", "4", "--dry_run"))
    assert rows["prompts"] == ["20"]
    assert rows["shown"] == ["row 0: 0+1="]
    assert rows["teacher"] == ["1"]
    assert re.fullmatch(r"72 answers to ask of 80: at most .*, about 216 tokens", rows["student"][1])
    assert rows["preference"][0] == "P(teacher ≻ student) = 1 (scores 1 and 0)"
    assert rows["preference"][1].startswith("at most 100 scores to get: about a second")
    assert rows["in all"][0].startswith("at most")
    assert not (folder / "pairs").exists()


def test_tokens_time_and_cost_of_teacher_student_and_judge(folder, pairs):
    prices = ("--price_in", "1000", "--price_out", "100000", "--max_concurrency", "2")

    def slow(body, number):
        reply = says(body, number)
        reply.delay = 1.0 if body["model"] == "student" else 0.0
        return reply

    with FaultServer(slow) as server:
        words = (*servers(server, "teacher", "student", "judge"), *prices, "--num_student_samples", "3")
        rows = table(pairs(*words, "--dry_run"))
        assert [body["model"] for body in server.bodies] == ["teacher", "student", "judge", "judge"]
        assert "n" not in server.bodies[1]
    # 2 prompt and 8 completion tokens an answer, at 0.001 and 0.1 each; a verdict takes two requests of 2 and 6 tokens
    assert re.fullmatch(r"18 answers to ask of 20: about .*, about 180 tokens, cost about 14\.44", rows["teacher"][1])
    # 54 answers of a second each, two at once
    taken = re.fullmatch(
        r"54 answers to ask of 60: about (\d+) s, about 540 tokens, cost .* 43\.31", rows["student"][1]
    )
    assert 27 <= int(taken[1]) < 80
    assert rows["preference"][0] == "P(teacher ≻ student) = 0.5"
    assert re.fullmatch(r"at most 60 labels to get: .*, about 960 tokens, cost about 72\.24", rows["preference"][1])
    assert re.search(r"about 1,680 tokens, cost about 129\.98", rows["in all"][0])
    assert not (folder / "pairs").exists()


def test_only_what_is_missing_is_counted_and_asked(folder, pairs):
    with FaultServer(says) as server:
        words = (*servers(server, "teacher", "student"), *VERIFIER, "--num_student_samples", "2")
        assert (
            pairs(*words, "--max_requests", "25").code == 2
        )  # the teacher is done, and 25 answers of the student are there
        before, asked = contents(folder / "pairs"), server.count
        assert asked == 43
        rows = table(pairs(*words, "--dry_run"))
        assert server.count == asked + 1
        assert rows["teacher"][1] == "all answers are stored"
        assert rows["teacher"][0].startswith("t")
        assert rows["student"][1].startswith("11 answers to ask of 40")
        asked_for = server.bodies[-1]["messages"][-1]["content"]
        assert rows["shown"][0].endswith(f": {asked_for}")
        assert asked_for in rows["teacher"][0]
        assert contents(folder / "pairs") == before
        # The answer that was shown is one that is missing: the build asks for it, as for ten others
        shown = server.bodies[-1]["seed"]
        assert pairs(*words).code == 0
        rest = server.bodies[asked + 1 :]
        assert len(rest) == 11
        assert shown in [body["seed"] for body in rest]
        asked = server.count
        rows = table(pairs(*words, "--dry_run"))
        assert server.count == asked
        assert rows["preference"][1] == "all labels are stored"
        changed = pairs(*words, "--dry_run", "--teacher_temperature", "0.5")
        assert "holds answers of another teacher" in changed.error


def test_the_preference_gets_what_the_build_gives_it(folder, pairs):
    with FaultServer(says) as server:
        words = (*servers(server, "teacher", "student"), "--as_messages", "--preference", "function:mine.py:noted")
        assert pairs(*words, "--dry_run").code == 0
        (shown,) = (folder / "noted.jsonl").read_text().splitlines()
        assert pairs(*words).code == 0
    prompt, first, *_ = json.loads(shown)
    assert prompt == [{"role": "user", "content": "0+1="}]
    assert first[0]["role"] == "assistant"
    assert shown in (folder / "noted.jsonl").read_text().splitlines()[1:]


def test_a_shard_is_counted_by_itself(folder, pairs):
    with FaultServer(says) as server:
        words = (*servers(server, "teacher"), "--student_column", "s", *VERIFIER)
        counts = []
        for index in range(2):
            rows = table(pairs(*words, "--shard", f"{index}/2", "--dry_run"))
            row, prompt = re.fullmatch(r"row (\d+): (.*)", rows["shown"][0]).groups()
            assert server.bodies[-1]["messages"][-1]["content"] == prompt == f"{int(row)}+1="
            counts.append((int(rows["prompts"][0]), int(rows["teacher"][1].split()[0])))
    assert tuple(map(sum, zip(*counts, strict=True))) == (20, 18)
    assert 0 not in counts[0] + counts[1]


def test_a_stream_is_counted_at_its_start(folder, pairs, monkeypatch):
    monkeypatch.setattr("trl_kd.scripts.pairs_dry_run.COUNTED", 7)
    with FaultServer(says) as server:
        words = (*servers(server, "teacher"), "--student_column", "s", *VERIFIER, "--dataset_streaming", "true")
        rows = table(pairs(*words, "--dry_run"))
    assert rows["prompts"] == ["7 (a stream: what stands below is for these, of the first 7)"]
    assert rows["teacher"][1].startswith("7 answers to ask")


@pytest.mark.parametrize("case", ["truncated", "equal", "refused"])
def test_a_pair_that_has_no_label(case, folder, pairs):
    def script(body, number):
        return chat(
            {"message": {"content": "no"}, "finish_reason": "content_filter" if case == "refused" else "length"}
        )

    words = ("--truncated", "drop") if case == "truncated" else ()
    with FaultServer(script) as server:
        rows = table(pairs(*servers(server, "teacher"), "--student_column", "s", *VERIFIER, *words, "--dry_run"))
    said = "null: the texts are equal" if case == "equal" else "no pair to label"
    assert rows["preference"][0].startswith(said)
    if case == "refused":
        assert rows["teacher"][0].startswith('no answer (content_filter): {"finish_reason"')


def test_columns_cost_nothing_and_are_shown(folder, pairs):
    rows = table(pairs(*COLUMNS, "--preference", "teacher_wins", "--dry_run"))
    assert (rows["teacher"], rows["student"]) == (["1"], ["no"])
    assert rows["preference"] == ["P(teacher ≻ student) = 1"]
    assert rows["in all"] == ["about a second"]


def test_a_merge_has_nothing_to_try(folder, pairs, trl_kd):
    assert pairs(*COLUMNS, *VERIFIER).code == 0
    done = trl_kd("pairs", "--merge", "pairs", "--output_dir", "whole", "--dry_run")
    assert "`dry_run` is set, but `merge` asks nobody" in done.error
    assert len(load_pairs("pairs")) == 20
    assert not (folder / "whole").exists()
