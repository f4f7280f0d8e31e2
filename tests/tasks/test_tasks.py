import random
import re

import pytest
from transformers import AutoTokenizer

from trl_kd.tasks import SPLITS, TASKS, Question, Task, load_task, split_of
from trl_kd.tasks.models import make_model, make_tokenizer


def _double(rng: random.Random) -> Question:
    number = rng.randrange(50)
    return Question(f"2*{number}=", str(2 * number))


SMALL = Task("double", "Twice a number.", _double, "0123456789*=", 4)


@pytest.mark.parametrize("name", TASKS)
class TestBundledTasks:
    def test_splits_are_disjoint_and_free_of_repeats(self, name):
        splits = {
            split: [q.prompt for seed in (0, 1) for q in TASKS[name].questions(split, 500, seed)] for split in SPLITS
        }
        for split, prompts in splits.items():
            assert all(split_of(prompt) == split for prompt in prompts)
        assert len(set().union(*splits.values())) == sum(len(set(prompts)) for prompts in splits.values())
        once = TASKS[name].questions("test", 500, 0)
        assert len({q.prompt for q in once}) == 500

    def test_the_seed_decides(self, name):
        task = TASKS[name]
        assert task.questions("train", 50, 3) == task.questions("train", 50, 3)
        assert task.questions("train", 50, 3) == task.questions("train", 80, 3)[:50]
        assert task.questions("train", 50, 3) != task.questions("train", 50, 4)

    def test_has_room_for_the_demo(self, name):
        for split, count in (("pretraining", 10_000), ("train", 2000), ("test", 1000), ("validation", 800)):
            assert len(TASKS[name].questions(split, count, 0)) == count

    def test_fits_its_alphabet_and_length(self, name):
        task = TASKS[name]
        questions = task.questions("train", 500, 0)
        assert set("".join(q.prompt + q.answer for q in questions)) <= set(task.alphabet)
        assert max(len(q.answer) for q in questions) == task.max_response_tokens - 1

    def test_verifies(self, name):
        task = TASKS[name]
        for question in task.questions("train", 50, 0):
            assert task.verify(question, question.answer)
            assert task.verify(question, f" {question.answer}\n")
            assert not task.verify(question, question.answer + "0")
            assert not task.verify(question, question.answer[:-1])
            assert not task.verify(question, "")


def test_running_sums_answer_is_every_total():
    for prompt, answer in TASKS["running_sums"].questions("train", 200, 0):
        numbers = [int(number) for number in re.findall(r"[+-]?\d+", prompt)]
        assert answer == ",".join(str(sum(numbers[: i + 1])) for i in range(1, len(numbers)))


def test_addition_answer_is_the_reversed_sum():
    for prompt, answer in TASKS["addition"].questions("train", 200, 0):
        a, b = prompt.rstrip("=").split("+")
        assert int(answer[::-1]) == int(a) + int(b)
        assert len(answer) == 4


def test_score_has_the_signature_of_a_reward_function():
    scores = SMALL.score(prompts=["2*3=", "2*4="], completions=["6", "6"], answer=["6", "8"], other=[None, None])
    assert scores == [1.0, 0.0]


def test_own_verifier():
    task = Task("any", "Any even number.", _double, "0123456789*=", 4, verify=lambda q, text: text.endswith("0"))
    assert task.score(["2*3="], ["10"], ["6"]) == [1.0]


def test_too_few_questions():
    with pytest.raises(ValueError, match=r"'double' has only about \d+ different questions in its test split"):
        SMALL.questions("test", 100, 0)
    with pytest.raises(ValueError, match="`split` is 'dev'"):
        SMALL.questions("dev", 1, 0)


def test_load_task(tmp_path):
    assert load_task("addition", TASKS) is TASKS["addition"]
    file = tmp_path / "mine.py"
    file.write_text("from trl_kd.tasks import TASKS\nTASK = TASKS['addition']\nOTHER = 3\n")
    assert load_task(f"{file}:TASK", TASKS) is TASKS["addition"]
    for name, message in [
        ("additoin", "no task 'additoin': the bundled tasks are running_sums, addition"),
        (f"{file}:NONE", "cannot load task"),
        (f"{file}:OTHER", "is a int, not a"),
        (f"{tmp_path}/none.py:TASK", "no file"),
        ("no_such_module:TASK", "No module named 'no_such_module'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_task(name, TASKS)


class TestTokenizer:
    def test_one_token_a_character_and_back(self, tmp_path):
        make_tokenizer("0123+=").save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        ids = tokenizer("12+3=<eos>")["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) == 7
        assert tokenizer.decode(ids, skip_special_tokens=True) == "12+3="
        assert tokenizer("9")["input_ids"] == [tokenizer.bos_token_id, tokenizer.unk_token_id]

    def test_chat_reads_as_plain_text(self):
        tokenizer = make_tokenizer("0123+=")
        messages = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
        chat = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert chat == tokenizer("1+2=3<eos>")["input_ids"]


def test_model_depends_on_its_seed_only():
    tokenizer = make_tokenizer("01")
    first, again, other = (make_model(tokenizer, 16, 1, seed).lm_head.weight for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)
