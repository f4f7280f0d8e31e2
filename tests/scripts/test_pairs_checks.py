"""What is wrong with functions, columns, tools and the Hub's login is found before a model loads or a request is made."""

import json

import pytest

from tests.conftest import make_tokenizer, save_tiny
from tests.sampling.fault_server import FaultServer, chat


pytest.importorskip("openai", reason="needs the extra `api`")

MODULE = """
def narrow(prompts, completions):
    return [0.0] * len(prompts)

def wants(prompts, completions, difficulty, **kwargs):
    return [0.0] * len(prompts)

async def later(prompts, completions, trainer_state):
    return [0.0] * len(prompts)

def two(first, second):
    return [0.5] * len(first)

def keyless(prompts, first, second):
    return [0.5] * len(first)

class Scores:
    def score(self, prompts, completions):
        return [0.0] * len(prompts)

    def __call__(self, prompts, first, second, **columns):
        return [0.5] * len(prompts)

scores = Scores()
"""


@pytest.fixture
def refused(tmp_path, monkeypatch, trl_kd):
    """Runs `trl-kd pairs` with a teacher behind a server and returns the line that refuses it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODULE)

    def run(*words, rows=None, dry=False, **columns):
        rows = [{"prompt": f"{i}+1=", "s": "1", **columns} for i in range(3)] if rows is None else rows
        (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        teacher = () if "--teacher_column" in words else ("--teacher", "api:m", "--teacher_base_url")
        student = () if "--student" in words else ("--student_column", "s")
        preference = () if "--preference" in words else ("--preference", "teacher_wins")
        with FaultServer(lambda body, number: chat("hello")) as server:
            teacher = (*teacher, server.url) if teacher else ()
            base = ("--dataset_name", "prompts.jsonl", "--output_dir", "out", *teacher, *student, *preference)
            done = trl_kd("pairs", *base, *words, *(("--dry_run",) if dry else ()))
            assert server.count == 0
        assert not (tmp_path / "out").exists()
        return done.error

    return run


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("preference", "said"),
    [
        ("verifier:mine.py:narrow", ["mine.narrow cannot be called: got an unexpected keyword", "`**kwargs`"]),
        ("verifier:mine.py:wants", ["mine.wants", "missing a required argument: 'difficulty'", "columns"]),
        ("verifier:mine.py:later", ["mine.later", "unexpected keyword"]),
        ("function:mine.py:two", ["mine.two", "too many positional arguments", "prompts, first, second and"]),
        ("function:mine.py:keyless", ["mine.keyless", "unexpected keyword argument", "first_source"]),
        ("function:mine.py:scores", ["mine.Scores.score", "unexpected keyword argument"]),
        ("column:label", ["no column 'label' to read labels from: the rows have answer, s"]),
        ("column:answer", ["The column 'answer' holds '2'"]),
    ],
)
def test_a_preference_that_cannot_be_asked(preference, said, dry, refused):
    line = refused("--preference", preference, answer="2", dry=dry)
    for text in said:
        assert text in line


@pytest.mark.parametrize(
    ("words", "columns", "said"),
    [
        (
            ("--teacher_column", "prompt"),
            {},
            "`teacher_column` is 'prompt', the column of the prompts: name one with answers",
        ),
        (
            ("--teacher_column", "question", "--prompt_column", "question"),
            {"question": "?"},
            "`teacher_column` is 'question', the column of the prompts",
        ),
        (
            ("--teacher_column", "prompt", "--prompt_column", "question"),
            {"question": "?"},
            "`teacher_column` is 'prompt', the column of the prompts",
        ),
        (("--prompt_column", "nothing"), {}, "`prompt_column` is 'nothing': the dataset has 'prompt', 's'"),
        ((), {"s": 7}, "Row 0 of the prompts, for the student: The column 's' holds '7'"),
        ((), {"s": [{"role": "assistant", "content": "1"}]}, "list of messages, but the prompt is text"),
    ],
)
def test_columns_that_hold_no_answers(words, columns, said, refused):
    assert said in refused(*words, **columns)


@pytest.mark.parametrize("tools", ["{not json", '{"name": "one"}', '["one"]', ["one"]])
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_tools_that_are_none(tools, kind, refused):
    prompt = "hi" if kind == "text" else [{"role": "user", "content": "hi"}]
    none = None if isinstance(tools, str) else []
    rows = [{"prompt": prompt, "s": "1", "tools": none}, {"prompt": prompt, "s": "1", "tools": tools}]
    line = refused(rows=rows)
    assert "Row 1 of the prompts: `tools` is" in line
    assert "JSON schemas" in line


def test_a_model_that_takes_no_such_prompts_is_said_before_the_other_is_asked(refused, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    student = save_tiny(tmp_path / "student", tokenizer)
    line = refused("--student", student, "--as_messages")
    assert "Row 0 of the prompts, for the student: The prompts are messages, but the tokenizer" in line
    teacher = ("--teacher_column", "s", "--preference", f"likelihood:{student}")
    assert "chat template" in refused(*teacher, "--as_messages")
    messages = [{"prompt": [{"role": "user", "content": "hi"}], "s": "1"}]
    assert "plain text" in refused("--teacher_completions", rows=messages)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), ["`push_to_hub` is true", "`hf auth login`"]),
        (("--hub_dataset_id", "me/my pairs"), ["`hub_dataset_id` is 'me/my pairs'"]),
        (("--output_dir", "my pairs"), ["`output_dir` is 'my pairs'", "set `hub_dataset_id`"]),
    ],
)
@pytest.mark.parametrize("token", [None, "hf_abcdefghijklmnop"])
def test_a_push_that_could_not_be(token, words, said, refused, monkeypatch, tmp_path):
    """Without a token nobody is logged in; with one the Hub cannot be reached, since tests are offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    line = refused("--push_to_hub", *words)
    for text in said:
        assert text in line
    assert "hf_abcdefghijklmnop" not in line


def test_settings_that_changed_are_said_in_words_of_the_command_line(tmp_path, monkeypatch, trl_kd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODULE.replace("completions):", "completions, **kwargs):"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "t": "2", "s": "3"}')
    words = ("pairs", "--dataset_name", "prompts.jsonl", "--teacher_column", "t", "--student_column", "s")
    words = (*words, "--output_dir", "out", "--preference", "verifier:mine.py:narrow")
    assert trl_kd(*words).code == 0
    line = trl_kd(*words, "--preference_scale", "2").error
    assert "or say `--relabel` to keep the answers" in line
    assert "`preference.scale` was None and is 2.0" in line
    assert trl_kd(*words, "--preference_scale", "2", "--relabel").code == 0
