"""Keys among fields that users set freely are sent, and get into no file, no output and no log."""

import json
import logging
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.sampling.fault_server import FaultServer, Reply, chat, choice, error
from tests.scripts.test_pairs_options import COLUMNS
from trl_kd.pairs import load_pairs
from trl_kd.pairs.readonly_store import StoredAnswers
from trl_kd.pairs.store import _digest


pytest.importorskip("openai", reason="needs the extra `api`")

KEY, FIXED = "AIza-planted-{}", "fixed-0123456789"
ONE, OTHER = "one-0123456789", "other-0123456789"
BODIES = [
    {"headers": {"x-goog-key": KEY}},
    {"token": KEY, "api_key": KEY, "user": KEY},
    {"nested": [[{"deep": [{"er": [KEY, [KEY]]}]}], KEY]},
    {"provider": {"order": ["a"], "own": {"keys": [KEY]}}, "reasoning": {"effort": "low", "auth": [KEY]}},
    {"response_format": {"type": "json_object", "auth": {"token": KEY}}, "logit_bias": {"5": KEY}, "top_k": KEY},
    {"chat_template_kwargs": {"enable_thinking": False, "token": [{"x": KEY}]}, "stop": [{"key": KEY}]},
    {"reasoning": KEY, "provider": [KEY], "thinking": [[KEY]], "thinking_budget": [KEY]},
]


def planted(body, key):
    return json.loads(json.dumps(body).replace(KEY, key))


def script(body, number):
    """Answers, judges and refuses with all that it was sent."""
    sent = json.dumps(body)
    if "refused" in sent:
        return error(400, f"content policy: {sent}")
    if body["model"] == "judge":
        return chat(f"I was sent {sent}" if "3+1" in sent else "Verdict: A")
    return chat(*(choice(f"{place} of {sent}") for place in range(body.get("n", 1))))


def words(server, body, key, out="out"):
    """A command whose teacher, student and judge are servers, with a key in every free field of each."""
    given = json.dumps(planted(body, key))
    template = json.dumps({"enable_thinking": False, "auth": {"token": FIXED}})
    sources = [
        word
        for who in ("teacher", "student", "judge")
        for word in (f"--{who}_base_url", server.url, f"--{who}_extra_body", given, f"--{who}_max_retries", "0")
    ]
    return [
        *("pairs", "--dataset_name", "prompts.jsonl", "--output_dir", out),
        *("--teacher", "api:teacher", "--student", "api:student", "--preference", "judge:judge", *sources),
        *("--teacher_chat_template_kwargs", template, "--student_chat_template_kwargs", template),
    ]


def everything(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = [f"{i}+1=" for i in range(4)] + ["to be refused"]
    Path("prompts.jsonl").write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts))
    return tmp_path


@pytest.mark.parametrize("body", BODIES)
def test_a_key_is_in_no_output_and_may_change(folder, trl_kd, body, caplog):
    caplog.set_level(logging.DEBUG)
    is_compared = body in BODIES[4:]  # by a hash
    with FaultServer(script) as server:
        said = [trl_kd(*words(server, body, ONE), "--dry_run"), trl_kd(*words(server, body, ONE))]
        assert [done.code for done in said] == [0, 0], said[-1].err
        name = next(iter(body))
        assert server.bodies[0][name] == planted(body, ONE)[name]
        asked = server.count
        said.append(trl_kd(*words(server, body, OTHER)))
        assert (said[-1].code, server.count) == (2 if is_compared else 0, asked)
    printed = "".join(done.out + done.err for done in said) + caplog.text
    files = everything(folder / "out")
    assert not [key for key in (ONE, OTHER, FIXED) if key.encode() in files or key in printed]
    settings = json.loads(Path("out/settings.json").read_text())
    assert settings["teacher"]["extra"].keys() == settings["preference"]["extra"].keys() == body.keys()
    assert settings["student"]["chat_template_kwargs"]["enable_thinking"] is False
    assert len(load_pairs("out")) == 4


def test_a_number_that_is_a_secret_is_in_no_output(folder, trl_kd):
    body = {"pin": 98769876, "deep": [{"pin": 98769876}], "mine": 4096}
    with FaultServer(script) as server:
        done = trl_kd(*words(server, body, ONE))
        assert done.code == 0, done.err
        assert server.bodies[0]["pin"] == 98769876
    assert b"98769876" not in everything(folder / "out")
    assert "98769876" not in done.out + done.err
    answers = [row["chosen"] for row in load_pairs("out")]
    assert all(
        "***" in answer and "4096" in answer for answer in map(str, answers)
    )  # a setting may stand in an answer


def test_what_a_server_says_of_a_key_is_not_said_on(folder, trl_kd):
    with FaultServer(lambda body, number: Reply({"error": {"message": json.dumps(body)}}, 400)) as server:
        done = trl_kd(*words(server, BODIES[2], ONE))
    assert "***" in done.error
    assert ONE not in done.out + done.err
    assert ONE.encode() not in everything(folder / "out")


@pytest.mark.parametrize("value", ["{token: one-0123456789}", '{"token": "one-0123456789"', '["one-0123456789"]'])
def test_bad_json_is_not_shown(folder, trl_kd, value):
    done = trl_kd("pairs", "--dataset_name", "prompts.jsonl", "--output_dir", "out", *COLUMNS, "--preference", "judge:j",
                  "--judge_extra_body", value)  # fmt: skip
    assert "`judge_extra_body` must be a JSON object" in done.error
    assert ONE not in done.out + done.err


def test_a_key_that_an_earlier_version_stored_is_forgotten_and_nothing_is_asked_again(folder, trl_kd):
    """It stored all fields, in the settings, with each answer without a text, and in the key of the labels."""
    body, key = {"token": KEY, "top_k": 3}, ONE
    with FaultServer(script) as server:
        assert trl_kd(*words(server, body, key)).code == 0
        asked = server.count
        with closing(sqlite3.connect("out/answers.db")) as database, database:
            stored = {name: json.loads(value) for name, value in database.execute("SELECT name, value FROM settings")}
            now = _digest(stored["preference"])
            for name in ("teacher", "student", "preference"):
                stored[name]["extra"] = planted(body, key)
                text = json.dumps(stored[name])
                database.execute("UPDATE settings SET value = ? WHERE name = ?", (text, name))
            old = _digest(stored["preference"])
            for source, prompt, sample, cause in database.execute("SELECT * FROM nulls").fetchall():
                cause = json.dumps({**json.loads(cause), "extra": planted(body, key)}, sort_keys=True)
                place = (source, prompt, sample)
                database.execute(
                    "UPDATE nulls SET cause = ? WHERE source = ? AND prompt = ? AND sample = ?", (cause, *place)
                )
            database.execute("UPDATE labels SET preference = ?", (old,))
            for note in ("orders", "unreadable"):
                names = f"{note} {old.hex()}", f"{note} {now.hex()}"
                database.execute("UPDATE settings SET name = ? WHERE name = ?", names)
        written = json.loads(Path("out/settings.json").read_text())
        written |= {name: stored[name] for name in ("teacher", "student", "preference")}
        Path("out/settings.json").write_text(json.dumps(written))
        assert key.encode() in everything(folder / "out")

        dry = trl_kd(*words(server, body, OTHER), "--dry_run")
        assert dry.code == 0, dry.err
        asked = server.count
        with closing(StoredAnswers("out")) as reader:  # one that writes nothing finds the labels too
            reader.check_settings(stored)
            assert reader.label_count() == 4
        done = trl_kd(*words(server, body, OTHER))
        assert done.code == 0, done.err
        assert server.count == asked
        assert json.loads(Path("out/counts.json").read_text())["unreadable"]
    assert key.encode() not in everything(folder / "out")


# ---- The commands that train -----------------------------------------------------------------------------------------


def test_a_dry_run_names_options_of_loading_and_shows_no_key(trl_kd, base, teacher_dir):
    options = json.dumps({"dtype": "float32", "token": ONE, "proxies": {"deep": [ONE]}})
    done = trl_kd(*base, "--imitation", "token", "--teacher_model_name_or_path", teacher_dir,
                  "--teacher_model_init_kwargs", options, "--dry_run")  # fmt: skip
    assert done.code == 0, done.err
    assert "'dtype': 'float32', 'token': '(not stored)'" in done.out
    assert ONE not in done.out + done.err


@pytest.mark.parametrize(
    ("words", "is_shown"),
    [
        (("--model_init_kwargs", json.dumps({"token": ONE})), False),
        (("--model-init-kwargs=" + json.dumps({"storage": {"key": [ONE]}}),), False),
        (("--hub_token", ONE), False),
        (("--hub_token=" + ONE,), False),
        (("--run_name", "hf_" + ONE.replace("-", "")), False),
        (("--model_init_kwargs", '{"dtype": "float32"}', "--run_name", "it's"), True),
        (("--gradient_checkpointing_kwargs", '{"use_reentrant": false}'), True),
    ],
)
def test_a_command_that_resumes_holds_no_key_and_can_be_pasted(trl_kd, base, out, words, is_shown):
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "checkpoint-1" / "trainer_state.json").write_text("{}")
    refused = trl_kd(*base, *words)
    assert "holds checkpoint-1 of an earlier run" in refused.error
    resume, anew = refused.err.splitlines()[-2:]
    remove = f"rm -r -- {out}/checkpoint-[0-9]*"
    if is_shown:
        command = shlex.join(["trl-kd", *base, *words])
        assert resume == f"  resume: {command} --resume_from_checkpoint true"
        assert anew == f"  start over: {remove} && {command}"
    else:
        assert resume == "  resume: the same command with --resume_from_checkpoint true"
        assert anew == f"  start over: the same command, after: {remove}"
        assert ONE not in refused.err
        assert "***" not in refused.err


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("pairs", "teacher_extra_body: [1, KEY]"),
        ("pairs", "teacher_model_init_kwargs: [KEY]"),
        ("pbkd", 'model_init_kwargs: \'{"token": "KEY\''),
        ("pbkd", "model_init_kwargs: [KEY]"),
        ("pbkd", "model_init_kwargs: {1: KEY}"),
        ("pbkd", "hub_token: [KEY]"),
        ("pbkd", "hub_token: {a: KEY}"),
        ("pbkd", 'env: {A: "KEY\\0"}'),
        ("pbkd", "env: [KEY]"),
        ("online-pbkd", 'chat_template_kwargs: \'{"token": "KEY\''),
        ("online-pbkd", "chat_template_kwargs: [KEY]"),
        ("pbkd", "dataset_name: https://example.com/rows.jsonl?key=KEY"),
    ],
)
def test_a_value_of_the_wrong_kind_is_not_shown(folder, trl_kd, command, text):
    words = ("--model_name_or_path", "m") if command != "pairs" else ()
    Path("config.yaml").write_text(text.replace("KEY", ONE))
    done = trl_kd(command, *words, "--dataset_name", "prompts.jsonl", "--output_dir", "out", "--config", "config.yaml")
    if text.startswith("dataset_name"):
        done = trl_kd(command, *words, "--output_dir", "out", "--config", "config.yaml")
    assert f"`{text.partition(':')[0]}`" in done.error
    assert ONE not in done.out + done.err


@pytest.mark.parametrize(
    ("command", "name", "values"),
    [
        ("pbkd", "model_init_kwargs", ['{"token": "' + ONE]),
        ("pbkd", "model_init_kwargs", ["{token:", ONE + "}"]),
        ("pairs", "teacher_extra_body", ["{token:", ONE + "}"]),
        ("online-pbkd", "chat_template_kwargs", ['{"token": "' + ONE]),
    ],
)
def test_json_that_a_shell_has_split_is_not_shown(trl_kd, command, name, values):
    done = trl_kd(command, *(() if command == "pairs" else ("--model_name_or_path", "m")), f"--{name}", *values)
    assert f"`{name}`" in done.error
    assert ("single quotes" in done.error) == (len(values) > 1)
    assert ONE not in done.out + done.err
