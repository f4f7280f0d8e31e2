"""Parts that are none, that are coroutines, that fail, or that do less than is asked for."""

import asyncio

import pytest
from datasets import Dataset

from tests.conftest import make_tokenizer, save_tiny
from tests.pairs.fakes import Column, Source
from trl_kd.pairs import build_pairs
from trl_kd.preferences.likelihood import TeacherLikelihood
from trl_kd.preferences.reward_function import RewardFunctionPreference
from trl_kd.preferences.simple import TeacherWins
from trl_kd.sampling import Answer, SamplingSettings
from trl_kd.sampling.column import ColumnSampler
from trl_kd.sampling.local import LocalSampler


def build(folder, data=None, **options):
    data = data or Dataset.from_list([{"prompt": f"{i}?", "t": "longer", "s": "short"} for i in range(3)])
    parts = {"teacher": Column("t"), "student": Column("s"), "preference": TeacherWins(), "show_progress": False}
    return build_pairs(data, output_dir=folder, **{**parts, **options})


class Bare:
    def sample(self, requests):
        yield from ((request, sample, Answer("x")) for request in requests for sample in request.samples)


class Undescribed(Bare):
    is_lookup = False


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"teacher": "api:gpt"}, r"`teacher` is the text 'api:gpt': give an object, such as ServerSampler"),
        ({"student": Bare()}, r"`student` is a Bare, which has no `is_lookup`, `describe`"),
        ({"teacher": Undescribed()}, r"`teacher` is a Undescribed, which has no `describe`"),
        (
            {"preference": "teacher_wins"},
            r"`preference` is the text 'teacher_wins': give an object, such as TeacherWins",
        ),
        ({"preference": 3}, r"`preference` is a int, which has no `__call__`"),
    ],
)
def test_what_is_no_part_is_said(tmp_path, part, said):
    with pytest.raises(TypeError, match=said):
        build(tmp_path / "out", **part)
    assert not (tmp_path / "out").exists()


async def longer(prompts, first, second, **columns):
    await asyncio.sleep(0.01)
    return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


def test_a_preference_may_be_a_coroutine_function(tmp_path):
    assert build(tmp_path / "plain", preference=longer)["preference"] == [1.0] * 3

    async def cell():
        return build(tmp_path / "inside", preference=longer)

    assert asyncio.run(cell())["preference"] == [1.0] * 3


def bad_number(completions, **kwargs):
    return [float("abc") for _ in completions]


async def bad_argument(completions, **kwargs):
    return [len(3) for _ in completions]


def bad_preference(prompts, first, second, **columns):
    return None


@pytest.mark.parametrize(
    ("preference", "kind", "said"),
    [
        (
            RewardFunctionPreference(bad_number),
            ValueError,
            r"function .*\.bad_number failed with ValueError: could not",
        ),
        (
            RewardFunctionPreference(bad_argument),
            TypeError,
            r"function .*\.bad_argument failed with TypeError: object of",
        ),
        (bad_preference, TypeError, r"function .*\.bad_preference failed with TypeError: 'NoneType'"),
    ],
)
def test_a_function_that_fails_is_named(tmp_path, preference, kind, said):
    with pytest.raises(kind, match=said):
        build(tmp_path, preference=preference)


def test_greedy_answers_to_one_prompt_are_remarked_on(tmp_path, caplog):
    greedy = Source("student")
    greedy.settings = SamplingSettings(temperature=0)
    greedy.describe = lambda: {"name": "greedy"}
    build(tmp_path / "one", student=greedy)
    assert not caplog.text
    build(tmp_path / "four", student=greedy, num_student_samples=4)
    assert "The student is asked for 4 answers to each prompt at temperature 0" in caplog.text


def test_answers_of_a_column_that_are_left_over_are_remarked_on_once(tmp_path, caplog):
    data = Dataset.from_list([{"prompt": f"{i}?", "t": "a", "s": ["b", "c", "d"]} for i in range(3)])
    build(tmp_path / "all", data, student=ColumnSampler("s"), num_student_samples=3)
    assert not caplog.text
    build(tmp_path / "one", data, student=ColumnSampler("s"))
    assert caplog.text.count("The column 's' has a row with 3 answers, of which 1 are used") == 1


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None, "tool_calls": []}])
def test_a_message_that_says_nothing_is_refused(tmp_path, message):
    rows = [
        {"prompt": [{"role": "user", "content": "1?"}], "t": "a", "s": "b"},
        {"prompt": [message], "t": "a", "s": "b"},
    ]
    with pytest.raises(
        ValueError, match=r"Row 1 of the prompts: message 0 of `prompt`, of the role 'user', has neither"
    ):
        build(tmp_path, Dataset.from_list(rows))


def test_a_whole_conversation_is_no_answer(tmp_path):
    """UltraFeedback's own files have them, beside prompts that are text."""
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "4"}]
    for prompt, way_out in (("?", r'\[-1\]\["content"\]'), (said[:1], r"\[-1:\]")):
        rows = [{"prompt": prompt, "chosen": said, "rejected": said}]
        with pytest.raises(
            ValueError, match=rf"Row 0 of the prompts, for the teacher: the column 'chosen' .*{way_out}"
        ):
            build_pairs(
                Dataset.from_list(rows),
                teacher=ColumnSampler("chosen"),
                student=ColumnSampler("rejected"),
                preference=TeacherWins(),
                output_dir=tmp_path / "a",
                show_progress=False,
            )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("who", ["student", "preference"])
@pytest.mark.parametrize("place", [0, 5, 150])
def test_a_role_that_a_template_refuses_is_named_before_anything_is_asked(tmp_path, place, who):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}u?"
    )
    model = save_tiny(tmp_path / "model", tokenizer)
    question = [{"role": "user", "content": "?"}]
    rows = [{"prompt": question}] * place + [{"prompt": [{"role": "system", "content": "Be brief."}, *question]}]
    log = tmp_path / "log"
    student = LocalSampler(model, SamplingSettings(max_new_tokens=2)) if who == "student" else Source("student", log)
    with pytest.raises(ValueError, match=rf"Row {place} of .* {who}: its chat template refuses `prompt`.*role `user`"):
        build_pairs(
            Dataset.from_list(rows),
            teacher=Source("teacher", log),
            student=student,
            preference=TeacherWins() if who == "student" else TeacherLikelihood(model),
            output_dir=tmp_path / "a",
            show_progress=False,
        )
    assert not log.exists()
    assert not (tmp_path / "a").exists()
