"""Options of `trl-kd pairs` that reach a server, a sampler or the pairing; those in vain; and caps over several runs."""

import json
import re

import pytest

from tests.sampling.fault_server import FaultServer, chat
from trl_kd.pairs import load_pairs
from trl_kd.scripts.pairs_arguments import PairsArguments
from trl_kd.scripts.pairs_build import make_preference, make_sampler


pytest.importorskip("openai", reason="needs the extra `api`")

COLUMNS = ("--teacher_column", "t", "--student_column", "s")
WINS = ("--preference", "teacher_wins")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=", "t": str(i + 1), "s": str(i)} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def command(*words, output_dir="pairs"):
    return ("pairs", "--dataset_name", "prompts.jsonl", "--output_dir", output_dir, *words)


def says(body, number):
    """A teacher continues plain text, a student chats, and a judge continues a template, for its answer A."""
    if body["model"] == "judge":
        return chat({"text": " A", "finish_reason": "stop"})
    if body["model"] == "teacher":
        return chat({"text": f"by the teacher {number}", "finish_reason": "stop"})
    return chat("by the student")


def test_every_option_reaches_its_server(folder, trl_kd):
    (folder / "template.txt").write_text("{prompt} A: {first} B: {second} Verdict:")
    (folder / "pairs.yaml").write_text(
        "student_extra_body: {top_k: 7, seed: null}\nstudent_chat_template_kwargs: {enable_thinking: false}\n"
    )
    with FaultServer(says) as server:
        done = trl_kd(
            *command("--config", "pairs.yaml", "--max_prompts", "1", "--preference", "judge:judge"),
            *("--teacher", "api:teacher", "--teacher_base_url", server.url, "--teacher_completions"),
            *("--teacher_extra_body", '{"min_p": 0.1}', "--teacher_seed", "5"),
            *("--student", "api:student", "--student_base_url", server.url),
            *("--judge_base_url", server.url, "--judge_completions", "--judge_template", "template.txt"),
            *("--judge_extra_body", '{"stop": ["\\n"]}', "--judge_max_new_tokens", "3", "--judge_temperature", "0.5"),
        )
    assert done.code == 0, done.err
    teacher, student, *judge = server.bodies
    assert server.paths == ["/v1/completions", "/v1/chat/completions", "/v1/completions", "/v1/completions"]
    assert (teacher["prompt"], teacher["min_p"]) == ("0+1=", 0.1)
    assert (student["top_k"], student["chat_template_kwargs"]) == (7, {"enable_thinking": False})
    assert "seed" not in student
    for body in judge:
        assert body["prompt"].endswith("Verdict:")
        assert (body["stop"], body["max_tokens"], body["temperature"]) == (["\n"], 3, 0.5)
    assert load_pairs("pairs")["preference"] == [0.5]  # it says A in both orders
    assert re.search(r"requests to the judge +2 \(4 prompt and 20 completion tokens\)", done.out)


def test_options_become_parts():
    args = PairsArguments(
        teacher="api:t", teacher_base_url=["http://a/v1"], teacher_timeout=7.0, teacher_max_retries=2,
        student="vllm:s", student_chat_template_kwargs='{"x": 1}', student_seed=11, seed=3,
        preference="judge:j", judge_base_url=["http://b/v1"], judge_timeout=8.0, judge_max_retries=0,
    )  # fmt: skip
    teacher, student, judge = make_sampler(args, "teacher"), make_sampler(args, "student"), make_preference(args)
    assert (teacher.client.timeout, teacher.client.max_retries) == (7.0, 2)
    assert (judge.client.timeout, judge.client.max_retries) == (8.0, 0)
    assert (teacher.settings.seed, student.settings.seed) == (6, 11)
    assert student._template_options == {"x": 1}


def test_own_prices_go_before_the_shared_ones():
    args = PairsArguments(
        teacher="api:t", teacher_price_in=3.0, student="api:s", student_price_in=0.0, student_price_out=0.0,
        preference="judge:j", judge_price_out=7.0, price_in=1.0, price_out=2.0, max_cost=5.0,
    )  # fmt: skip
    parts = make_sampler(args, "teacher"), make_sampler(args, "student"), make_preference(args)
    budgets = [part.client.budget for part in parts]
    assert [(budget.price_in, budget.price_out) for budget in budgets] == [(3.0, 2.0), (0.0, 0.0), (1.0, 7.0)]


def test_a_cap_on_money_needs_a_price_of_each(folder, trl_kd):
    words = ("--teacher", "api:t", "--student_column", "s", "--preference", "judge:j", "--max_cost", "1")
    said = trl_kd(*command(*words, "--teacher_price_in", "1", "--teacher_price_out", "0")).error
    assert "`preference` is 'judge:j': `max_cost` is 1.0 without prices" in said


def test_the_pairing_seed_draws_other_pairs_of_the_same_answers(folder, trl_kd):
    rows = [{"prompt": f"{i}", "t": [f"t{j}" for j in range(6)], "s": [f"s{j}" for j in range(6)]} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = command(
        *COLUMNS, *WINS, "--num_teacher_samples", "6", "--num_student_samples", "6", "--max_pairs_per_prompt", "1"
    )
    made = []
    for seed in ((), ("--pairing_seed", "1"), ("--pairing_seed", "0"), ("--seed", "1")):
        assert trl_kd(*words, *seed).code == 0
        made.append(load_pairs("pairs").to_list())
    assert made[0] == made[2] != made[1] == made[3]


@pytest.mark.parametrize("value", ["{top_k: 20}", "[1]", "'a'", ""])
@pytest.mark.parametrize(
    ("words", "example"),
    [
        (("--teacher", "api:t", "--student_column", "s", *WINS, "--teacher_extra_body"), "top_k"),
        (("--teacher_column", "t", "--student", "x", *WINS, "--student_chat_template_kwargs"), "enable_thinking"),
        ((*COLUMNS, "--preference", "judge:j", "--judge_extra_body"), "top_k"),
        ((*COLUMNS, "--preference", "likelihood:x", "--preference_model_init_kwargs"), "load_in_4bit"),
    ],
)
def test_bad_json_is_one_clear_line(folder, trl_kd, words, example, value):
    said = trl_kd(*command(*words, value)).error
    assert f'`{words[-1][2:]}` must be a JSON object, such as \'{{"{example}"' in said
    assert not (folder / "pairs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*COLUMNS, *WINS, "--teacher_timeout", "5"), "`teacher_timeout` is set, but `teacher` is None: .*api:MODEL"),
        ((*COLUMNS, *WINS, "--student_completions"), "`student_completions` is set, .*api:MODEL"),
        ((*COLUMNS, *WINS, "--student_api_key_env", "K"), "`student_api_key_env` is set, .*api:MODEL"),
        (
            ("--teacher", "x", "--student_column", "s", *WINS, "--teacher_extra_body", "{}"),
            "`teacher_extra_body` is set, but `teacher` is 'x'",
        ),
        (
            ("--teacher", "vllm:x", "--student_column", "s", *WINS, "--teacher_max_retries", "1"),
            "`teacher_max_retries` is set, but `teacher` is 'vllm:x'",
        ),
        (
            (*COLUMNS, *WINS, "--student_seed", "1"),
            "`student_seed` is set, but the answers are those in the column 's': drop it",
        ),
        ((*COLUMNS, *WINS, "--teacher_chat_template_kwargs", "{}"), "`teacher_chat_template_kwargs` is set, .*'t'"),
        ((*COLUMNS, *WINS, "--teacher_temperature", "0"), "`teacher_temperature` is set, but .*'t'"),
        (
            (*COLUMNS, *WINS, "--judge_temperature", "1"),
            "`judge_temperature` is set, but `preference` is 'teacher_wins': it is for judge, drop it",
        ),
        ((*COLUMNS, *WINS, "--judge_base_url", "http://x/v1"), "`judge_base_url` is set, but `preference`"),
        (
            (*COLUMNS, *WINS, "--student_price_in", "1"),
            "`student_price_in` is set, but `student` is None: .*api:MODEL",
        ),
        ((*COLUMNS, *WINS, "--judge_price_out", "1"), "`judge_price_out` is set, but `preference`"),
        (
            (*COLUMNS, *WINS, "--preference_scale", "2"),
            "`preference_scale` is set, .*verifier or reward_model or likel",
        ),
        ((*COLUMNS, *WINS, "--max_requests", "2"), "`max_requests` is set, but no server is asked: drop it"),
    ],
)
def test_options_in_vain_are_refused(folder, trl_kd, words, said):
    assert re.search(said, trl_kd(*command(*words)).error)
    assert not (folder / "pairs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--teacher_timeout", "0"), "`teacher` is 'api:t': `teacher_timeout` is 0.0: it must be above 0 seconds"),
        (("--teacher_top_p", "2"), "`teacher` is 'api:t': `teacher_top_p` is 2.0"),
        (
            ("--teacher_completions", "--teacher_chat_template_kwargs", '{"x": 1}'),
            "`teacher_chat_template_kwargs` needs a chat: leave it out, or set `teacher_completions` to false",
        ),
        (("--teacher_max_retries", "x"), "`teacher_max_retries` is 'x': it must be a whole number"),
    ],
)
def test_values_that_cannot_be(folder, trl_kd, words, said):
    assert said in trl_kd(*command("--teacher", "api:t", "--student_column", "s", *WINS, *words)).error


def test_caps_hold_over_runs(folder, trl_kd):
    def run(cap):
        words = ("--teacher", "api:teacher", "--teacher_base_url", server.url, "--teacher_completions")
        return trl_kd(*command(*words, "--student_column", "s", *WINS, "--max_requests", cap))

    with FaultServer(says) as server:
        assert "`max_requests` = 4 is reached: 4 requests" in run("4").error
        assert "`max_requests` = 4 was reached by former runs into the same folder" in run("4").error
        assert server.count == 4
        assert run("6").code == 0
    assert server.count == 6
    assert json.loads((folder / "pairs" / "summary.json").read_text())["usage"]["teacher"]["requests"] == 6


def test_help_says_each_option_in_a_line_or_two(trl_kd):
    done = trl_kd("pairs", "--help")
    assert done.code == 0
    for word in ("extra_body", "timeout", "max_retries", "completions", "price_in", "price_out"):
        for who in ("teacher", "student", "judge"):
            assert f"--{who}_{word}" in done.out
    assert "null drops one" in done.out


def test_keys_of_a_launcher_are_not_for_this_command(folder, trl_kd):
    assert "accelerate" not in trl_kd("pairs", "--help").out
    assert "accelerate" in trl_kd("pbkd", "--help").out
    assert "unknown key `--num_processes`" in trl_kd(*command(*COLUMNS, *WINS, "--num_processes", "2")).error
    said = trl_kd(*command(*COLUMNS, *WINS, "--num_proceses", "2")).error
    assert "unknown key `--num_proceses`" in said
    assert "num_processes" not in said
    (folder / "pairs.yaml").write_text("num_processes: 2\n")
    said = trl_kd(*command(*COLUMNS, *WINS, "--config", "pairs.yaml")).error
    assert "unknown key `num_processes` in pairs.yaml" in said
