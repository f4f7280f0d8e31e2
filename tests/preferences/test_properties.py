"""What holds for every preference function, a user's own among them."""

import json

import pytest
import torch

from tests.conftest import make_model, make_tokenizer
from tests.preferences.test_reward_model import make_reward_model
from trl_kd.preferences.likelihood import TeacherLikelihood
from trl_kd.preferences.preference import ScoredPreference
from trl_kd.preferences.reward_function import RewardFunctionPreference
from trl_kd.preferences.reward_model import RewardModelPreference
from trl_kd.preferences.simple import LabelColumn, TeacherWins


def verify(prompts, completions, answer, **columns):
    return [
        None if wanted is None else float(text == wanted) for text, wanted in zip(completions, answer, strict=True)
    ]


async def verify_later(completions, answer, **columns):
    return verify(completions, completions, answer)


def user_prefers_the_number(prompts, first, second, *, answer, **columns):
    """A user's own: the response closer to the right number, soft by the distance."""
    labels = []
    for a, b, right in zip(first, second, answer, strict=True):
        try:
            near, far = abs(float(a) - float(right)), abs(float(b) - float(right))
        except (TypeError, ValueError):
            labels.append(None)
        else:
            labels.append(0.5 if near == far else far / (near + far))
    return labels


class UserScores(ScoredPreference):
    """A user's own that scores each response by itself."""

    def score(self, prompts, completions, **columns):
        return [None if "?" in text else float(len(text)) for text in completions]


PREFERENCES = {
    "teacher wins": TeacherWins,
    "labels": lambda: LabelColumn("label"),
    "verifier": lambda: RewardFunctionPreference(verify),
    "verifier, async and soft": lambda: RewardFunctionPreference(verify_later, scale=0.5),
    "two functions": lambda: RewardFunctionPreference([verify, verify_later], scale=2.0, reward_weights=[1.0, -0.5]),
    "reward model": lambda: RewardModelPreference(make_reward_model(), processing_class=make_tokenizer()),
    "likelihood": lambda: TeacherLikelihood(make_model(seed=3), processing_class=make_tokenizer()),
    "likelihood, soft sum": lambda: TeacherLikelihood(
        make_model(seed=3), scale=3.0, length_normalized=False, processing_class=make_tokenizer()
    ),
    "user's function": lambda: user_prefers_the_number,
    "user's scores": lambda: UserScores(scale=1.0),
}
ROWS = {
    "prompts": ["1+1=", "2+3=", "40+2=", "7-5=", "12+13=", "9*9=", "6/3=", "10-1="],
    "first": ["2", "6", "42", "2", "what?", "81", "3", "9"],
    "second": ["3", "5", "42", "2.0", "25", "8", "4", "a long answer, and wrong"],
    "first_source": ["teacher", "student", "teacher", "teacher", "student", "student", "teacher", "student"],
    "second_source": ["student", "teacher", "student", "student", "teacher", "student", "student", "teacher"],
    "answer": ["2", "5", "42", "2", "25", "81", None, "9"],
    "label": ["teacher", 0.25, "tie", None, "student", 1.0, 0.9, 0.0],
}
SWAPPED = {
    name: ROWS[{"first": "second", "second": "first"}.get(name.split("_")[0], name) + name[len(name.split("_")[0]) :]]
    for name in ROWS
}


@pytest.fixture(params=PREFERENCES, ids=lambda name: name.replace(" ", "_"))
def preference(request):
    return PREFERENCES[request.param]()


def test_a_probability_or_nothing(preference):
    labels = preference(**ROWS)
    assert len(labels) == len(ROWS["prompts"])
    assert all(label is None or (isinstance(label, float) and 0 <= label <= 1) for label in labels)
    assert any(label not in (None, 0.5) for label in labels)


def test_swapping_the_two_turns_the_label_around(preference):
    assert SWAPPED["first_source"] == ROWS["second_source"]
    labels = preference(**ROWS)
    expected = [None if label is None else pytest.approx(1 - label, abs=1e-12) for label in labels]
    assert preference(**SWAPPED) == expected


def test_one_by_one_equals_batched(preference):
    one_by_one = [
        preference(**{name: values[index : index + 1] for name, values in ROWS.items()})[0]
        for index in range(len(ROWS["prompts"]))
    ]
    expected = [None if label is None else pytest.approx(label, abs=1e-5) for label in preference(**ROWS)]
    assert one_by_one == expected


def test_equal_responses_tie(preference):
    labels = preference(**{**ROWS, "second": ROWS["first"]})
    if isinstance(preference, TeacherWins | LabelColumn):  # which do not read the texts
        assert labels == preference(**ROWS)
    else:
        assert set(labels) <= {0.5, None}
        assert 0.5 in labels


def test_equal_responses_tie_whatever_their_scores():
    """A model may score a text otherwise in another batch, in the last bits."""

    class Noisy(ScoredPreference):
        calls = 0

        def score(self, prompts, completions, **columns):
            self.calls += 1
            return [1.0 + 1e-7 * self.calls for _ in completions]

    assert Noisy()(["1+1=", "2+3="], ["2", "6"], ["2", "5"]) == [0.5, 0.0]


def test_nothing_gives_nothing(preference):
    assert preference(**{name: [] for name in ROWS}) == []


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("teacher wins", [5]),
        ("labels", [3, 5]),
        ("verifier", [6]),
        ("verifier, async and soft", [6]),
        ("user's function", [4, 6, 7]),
        ("user's scores", [4]),
        ("reward model", []),
        ("likelihood", []),
    ],
)
def test_null_where_nothing_is_known(name, unknown):
    labels = PREFERENCES[name]()(**ROWS)
    assert [index for index, label in enumerate(labels) if label is None] == unknown


@pytest.mark.parametrize("name", [name for name in PREFERENCES if not name.startswith("user's")])
def test_descriptions_are_json_and_the_same_each_time(name):
    described = PREFERENCES[name]().describe()
    assert json.loads(json.dumps(described)) == described
    assert isinstance(described["preference"], str)
    assert PREFERENCES[name]().describe() == described


def test_settings_that_change_labels_change_the_description():
    described = [json.dumps(make().describe()) for name, make in PREFERENCES.items() if not name.startswith("user's")]
    assert len(set(described)) == len(described)


def test_the_random_state_is_left_alone(preference):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    preference(**ROWS)
    assert torch.equal(torch.get_rng_state(), before)
