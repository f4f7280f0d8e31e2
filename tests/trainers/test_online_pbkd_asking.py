"""What `OnlinePbKDTrainer` asks of teacher and preference function: once, of the student's own prompts, and in words where
nothing comes back."""

import logging
import os
import re
from contextlib import closing
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from tests.trainers.online_cases import PAIRS, ROWS, Teacher, digits, make, unchecked
from trl_kd.pairs import load_pairs
from trl_kd.pairs.batch_labelling import BatchPairs
from trl_kd.pairs.lock import lock_folder
from trl_kd.pairs.prompts import PromptRow, prompt_key
from trl_kd.pairs.readonly_store import StoredAnswers
from trl_kd.pairs.store import AnswerStore
from trl_kd.sampling import Answer
from trl_kd.sampling.budget import Usage
from trl_kd.trainers.online_pbkd.asking import fill_groups, group_rows
from trl_kd.trainers.online_pbkd.learner import WarmUpFailed


CHAT = [{"prompt": [{"role": "user", "content": row["prompt"]}], "completion": "7"} for row in ROWS]


class Paid:
    """Counts the comparisons that it is paid for, and fails after some."""

    def __init__(self, fails_after=None, usage=None):
        self.asked, self.fails_after = [], fails_after
        self.usage = usage or Usage()

    def describe(self):
        return {"prefers": "digits"}

    def __call__(self, prompts, first, second, **columns):
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise RuntimeError("no money left")
        self.asked += zip(map(str, prompts), first, second, strict=True)
        self.usage.requests += len(prompts)
        return digits(prompts, first, second)


# ---- Once ----------------------------------------------------------------------------------------------------------------


def test_no_comparison_is_paid_for_twice(tiny_dir, settings):
    failing = Paid(fails_after=1)
    with pytest.raises(RuntimeError, match="no money left"):
        make(tiny_dir, settings, preference_function=failing, teacher=Teacher()).train()
    again = Paid()
    trainer = make(tiny_dir, settings, preference_function=again, teacher=Teacher())
    trainer.train()
    assert failing.asked
    assert again.asked
    assert len(set(failing.asked + again.asked)) == len(failing.asked + again.asked)
    assert again.usage.requests == len(failing.asked + again.asked)  # its caps hold for both runs
    trainer.evaluate(trainer.train_dataset.select(range(4)))
    with closing(StoredAnswers(os.path.join(settings["output_dir"], "_online", "labels"))) as stored:
        stored.check_settings({"teacher": {}, "student": {}, "preference": again.describe()})
        assert stored.label_count() == len(set(failing.asked + again.asked))


def test_pairs_outlive_a_warm_up_that_failed(tiny_dir, settings, monkeypatch):
    unchecked(monkeypatch)
    trainer = make(tiny_dir, settings, preference_function=digits, rm_warmup_accuracy=0.9, rm_warmup_steps=2)
    with pytest.raises(WarmUpFailed):
        trainer.train()
    pairs = load_pairs(os.path.join(settings["output_dir"], "_online", "pairs"))
    assert pairs["rejected"] == [row["rejected"] for row in trainer.learner.pool.rows]
    assert len(pairs)


def test_a_client_of_teacher_and_judge_goes_on_from_the_sum(tmp_path):
    class Server(Teacher):
        def __init__(self, usage):
            super().__init__()
            self.usage = usage

        def sample(self, requests):
            for answered in super().sample(requests):
                self.usage.requests += 1
                yield answered

    rows = [PromptRow(i, prompt_key(f"{i}+1=", {}), f"{i}+1=", {}) for i in range(3)]
    usage = Usage()
    for expected in (6, 8):
        asker = BatchPairs(Server(usage), Paid(usage=usage), tmp_path)
        theirs = asker.teacher_answers(rows)
        assert asker.teacher_answers(rows) == theirs
        asker.pairs(rows, theirs, [[Answer("1", "stop")], [Answer("5", "stop")], [Answer("22", "stop")]][: len(rows)])
        asker.close()
        assert usage.requests == expected
        usage, rows = Usage(), [*rows[:2], replace(rows[2], key=prompt_key("9+1=", {}), prompt="9+1=")]


def test_what_a_teacher_said_is_not_read_again(tmp_path, monkeypatch):
    asker = BatchPairs(Teacher(), None, tmp_path)
    rows = [PromptRow(0, prompt_key("1+1=", {}), "1+1=", {})]
    first = asker.teacher_answers(rows * 2)
    monkeypatch.setattr("trl_kd.pairs.fetched.AnswerStore", None)
    monkeypatch.setattr("trl_kd.pairs.fetched.StoredAnswers", None)
    assert asker.teacher_answers(rows) == first[:1] == [Answer("111", "stop")]


def test_the_store_of_answers_is_opened_once_until_it_is_closed(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(AnswerStore, "_open", lambda store, open=AnswerStore._open: opened.append(1) or open(store))
    asker = BatchPairs(Teacher(), None, tmp_path)
    rows = [PromptRow(0, prompt_key(f"{i}+1=", {}), f"{i}+1=", {}) for i in range(4)]
    for row, times in zip(rows, (1, 1, 1, 2), strict=True):
        if row is rows[-1]:
            asker.close()
            asker.close()
            lock_folder(tmp_path / "teacher").close()
        assert asker.teacher_answers([row])[0].text == row.prompt[0] * 3
        assert len(opened) == times
    asker.close()


def test_a_warm_up_leaves_no_loader_half_read(tiny_dir, settings, monkeypatch):
    monkeypatch.setattr("trl_kd.trainers.online_pbkd.learner.LEAST_HELD_OUT", 1)
    options = {"rm_warmup_accuracy": 0.01, "rm_held_out": 0.5, "rm_steps": 10, "max_steps": 1}
    trainer = make(tiny_dir, settings, preference_function=digits, **options)
    active = []
    score = trainer.learner.score
    state = trainer.accelerator.gradient_state
    trainer.learner.score = lambda rows: active.append(state.active_dataloader) or score(rows)
    trainer.train()
    assert active
    assert all(loader is trainer.callback_handler.train_dataloader for loader in active)


# ---- The same prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_columns_that_the_student_would_not_see(tiny_dir, settings, column):
    rows = [{**row, column: {"shout": True}} for row in CHAT]
    with pytest.raises(ValueError, match=f"train dataset has a column '{column}'.*`args.chat_template_kwargs`"):
        make(tiny_dir, settings, rows, preference_function=digits)


def test_the_reward_model_reads_the_students_template(tiny_dir, settings):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.chat_template = "{{ '9' if shout }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = {"rows": CHAT, "preference_function": digits, "processing_class": tokenizer}
    quiet = make(tiny_dir, settings, **chat)
    loud = make(tiny_dir, settings, **chat, chat_template_kwargs={"shout": True})
    ids = [trainer.learner.encode(CHAT[0]["prompt"], "7", "stop") for trainer in (quiet, loud)]
    assert len(ids[1]) == len(ids[0]) + 1


# ---- Nothing -------------------------------------------------------------------------------------------------------------


class Silent(Teacher):
    def sample(self, requests):
        return ((request, sample, Answer(None, "content_filter")) for request, sample, _ in super().sample(requests))


def unknown(prompts, first, second, **columns):
    return [None] * len(prompts)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"teacher": Silent(), "preference_function": digits},
            r"answered none of the 4 prompts .*content_filter \(4\)",
        ),
        ({"preference_function": unknown}, "Of none of the .* a preference is known"),
        ({"preference_function": unknown, "pairs": PAIRS}, None),
        ({"preference_function": digits}, None),
    ],
    ids=["no answers", "no labels", "no labels beside given pairs", "all well"],
)
def test_nothing_to_learn_from_is_said_once(tiny_dir, settings, caplog, more, said):
    trainer = make(tiny_dir, settings, **more, max_steps=2)
    with caplog.at_level(logging.WARNING, "trl_kd.trainers.online_pbkd.data"):
        trainer.train()
    told = [record.message for record in caplog.records if record.name == "trl_kd.trainers.online_pbkd.data"]
    assert len(told) == (said is not None)
    if said is not None:
        assert re.search(said, told[0])


# ---- Equal prompts -------------------------------------------------------------------------------------------------------


def test_equal_prompts_are_compared_by_their_own_columns(tmp_path):
    class Named(Teacher):
        def sample(self, requests):
            return ((request, sample, Answer("teacher", "stop")) for request, sample, _ in super().sample(requests))

    def right(prompts, first, second, answer, **columns):
        """The teacher, who comes first, is always wrong."""
        return [0.0 if text == wanted else 0.5 for text, wanted in zip(second, answer, strict=True)]

    rows = [{"prompt": "Guess:", "answer": answer} for answer in ("1", "1", "2", "2")]
    groups = group_rows([(row, Answer(text, "stop")) for row, text in zip(rows, "1221", strict=True)])
    assert [group.places for group in groups] == [[0, 1], [2, 3]]
    teacher = Named()
    asker = BatchPairs(teacher, right, tmp_path)
    fill_groups(groups, asker)
    asker.close()
    assert [group.wins for group in groups] == [[0.0, 0.5], [0.0, 0.5]]
    assert teacher.asked == ["Guess:"]
