"""Parts of `PbKDRounds`: what is refused before weights load, the regret view, and answers that are fetched once."""

import json

import pytest
from datasets import Dataset, Value
from peft import LoraConfig

from tests.conftest import refuse_weights
from tests.pairs.fakes import Source
from tests.trainers.rounds_cases import PROMPTS, Teacher, make
from trl_kd.pairs.fetched import FetchedAnswers
from trl_kd.preferences.simple import LabelColumn
from trl_kd.sampling import Answer
from trl_kd.sampling.budget import Usage
from trl_kd.sampling.column import ColumnSampler
from trl_kd.trainers.common.checkpoints import last_checkpoint
from trl_kd.trainers.rounds.folder import late_means
from trl_kd.trainers.rounds.regret import count_equal, cumulative_regret, regret_coefficient, teacher_preferred


@pytest.mark.parametrize(
    ("args", "changed", "said"),
    [
        ({}, {"rounds": 0}, "`rounds` is 0"),
        ({}, {"rounds": 1.5}, "`rounds` is 1.5"),
        ({}, {"num_teacher_samples": 0}, "`num_teacher_samples` is 0"),
        ({}, {"prompts_per_round": 7}, "`prompts_per_round` is 7, but there are 6 prompts"),
        ({}, {"prompts": PROMPTS.select([])}, "`prompts` is empty"),
        ({}, {"prompts": PROMPTS.to_iterable_dataset()}, "`prompts` is a IterableDataset"),
        ({}, {"prompts": PROMPTS.rename_column("prompt", "question")}, "no column 'prompt'"),
        ({}, {"reference": "end"}, "`reference` is 'end'"),
        ({}, {"schedule": "each"}, "`schedule` is 'each': use 'all' or 'round'"),
        (
            {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 1},
            {"eval_dataset": PROMPTS},
            "`schedule` is 'all', but `lr_scheduler_type` is 'greedy'",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, {}, "'warmup_stable_decay', with `lr_scheduler_kwargs` = {}"),
        ({"lr_scheduler_kwargs": {"power": 2}}, {"schedule": "round"}, "`lr_scheduler_kwargs` = {'power': 2}"),
        ({}, {"optimizer": "new"}, "`optimizer` is 'new'"),
        ({}, {"policy": "some"}, "`policy` is 'some'"),
        ({}, {"shard": (0, 2)}, "`shard` is no argument"),
        ({}, {"polici": "all"}, "`polici` is no argument"),
        ({}, {"teacher": "gpt"}, "`teacher` is the text 'gpt'"),
        ({}, {"preference": LabelColumn("label")}, "`preference` reads the column 'label'"),
        ({}, {"student": lambda model, number: ColumnSampler("a")}, "`student` looks its answers up"),
        ({"eval_strategy": "steps"}, {}, "`eval_strategy` is 'steps', but `eval_dataset` is not given"),
        (
            {"eval_strategy": "steps"},
            {"eval_dataset": PROMPTS},
            "The eval dataset lacks the column 'chosen' and 'rejected'",
        ),
        ({}, {"peft_config": LoraConfig(init_lora_weights="pissa")}, "`init_lora_weights` = 'pissa'"),
        ({}, {"model": "no/such/folder"}, "`model` is 'no/such/folder'"),
    ],
)  # fmt: skip
def test_bad_input_before_weights(args, changed, said, tiny_dir, tmp_path, monkeypatch):
    refuse_weights(monkeypatch)
    with pytest.raises((ValueError, TypeError, OSError)) as error:
        make(tmp_path / "out", changed.pop("model", tiny_dir), args, **changed)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_quantized_start_cannot_be_its_own_reference_later(tiny_dir, tmp_path):
    kwargs = {"model_init_kwargs": {"load_in_4bit": True}}
    with pytest.raises(ValueError, match="`reference` is 'previous', but the start is quantized"):
        make(tmp_path, tiny_dir, kwargs, reference="previous", peft_config=LoraConfig(r=2))


def test_each_round_has_a_seed_of_its_own(tiny_dir, tmp_path):
    rounds = make(tmp_path, tiny_dir, {"seed": 5})
    assert [rounds._args(number).seed for number in (1, 2, 3)] == [5, 6, 7]


def test_regret():
    assert cumulative_regret([0.75, None, 0.25, 1.0]) == 0.5
    assert regret_coefficient([]) is None
    rows = [
        ("a", "a", None, "student"),
        ("a", "b", 1.0, "student"),
        ("a", "a", None, "teacher"),
        ("a", "b", None, "student"),
    ]
    names = ("chosen", "rejected", "preference", "rejected_source")
    pairs = [
        {**dict(zip(names, row, strict=True)), "chosen_source": "teacher", "teacher_side": "chosen"} for row in rows
    ]
    assert count_equal(Dataset.from_list(pairs)) == 1
    assert teacher_preferred(Dataset.from_list(pairs)) == 0.75
    # Each answer as often as the student gave it: the teacher's own five times, a worse one once
    pairs[0]["student_count"], pairs[1]["student_count"] = 5, 1
    pairs[2]["student_count"] = pairs[3]["student_count"] = 7
    assert teacher_preferred(Dataset.from_list(pairs)) == pytest.approx((5 * 0.5 + 1) / 6)
    lost = {**pairs[1], "teacher_side": "rejected", "student_count": 2}
    assert teacher_preferred(Dataset.from_list([*pairs[:2], lost])) == pytest.approx((5 * 0.5 + 1) / 8)
    assert teacher_preferred(Dataset.from_list(pairs[3:]).cast_column("preference", Value("float64"))) is None
    assert regret_coefficient([0.3 * k**0.5 for k in range(1, 9)]) == pytest.approx(0.3)


def test_fetched_answers_keep_the_teachers_usage(tmp_path):
    class Paid(Source):
        def __init__(self):
            super().__init__("teacher", tmp_path / "log")
            self.usage = Usage()

        def _answer(self, waiting):
            for answer in super()._answer(waiting):
                self.usage.requests += 1
                yield answer

    for rows, asked in ((range(4), 4), (range(2, 6), 2), (range(6), 0)):
        teacher = Paid()
        assert (
            FetchedAnswers(teacher, tmp_path / "teacher", 1).fetch(PROMPTS.select(rows), show_progress=False) == asked
        )
    assert teacher.usage.requests == 6
    fetched = FetchedAnswers(Paid(), tmp_path / "teacher", 1)
    assert fetched.count() == 6
    with pytest.raises(ValueError, match="holds answers of another teacher"):
        FetchedAnswers(Source("other"), tmp_path / "teacher", 1).fetch(PROMPTS, show_progress=False)


def test_a_checkpoint_in_part_is_none(tmp_path):
    for step, text in (
        (2, '{"global_step": 2, "max_steps": 5}'),
        (4, '{"global_step"'),
        (5, '{"global_step": 5, "max_steps": 5}'),
    ):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-10").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_a_record_tells_of_a_rounds_second_half_and_of_its_last_dual():
    """Where the last log covers a single step."""
    logs = [(4, 0.0, 1.0), (8, 0.5, 2.0), (9, 1.0, 3.0)]
    history = [{"rewards/accuracies": a, "pbkd/dual": d, "step": step} for step, a, d in logs]
    found = late_means([*history, {"train_loss": 1.0, "step": 9}], steps=9)
    assert found == {"accuracy": pytest.approx(0.6), "dual": 3.0, "imitation": None, "preference_nll": None}


@pytest.mark.parametrize("name", ["round-2/metrics.json", "rounds.json"])
def test_a_damaged_record_is_named(name, tiny_dir, tmp_path):
    for number in (1, 2):
        (tmp_path / f"round-{number}").mkdir()
        (tmp_path / f"round-{number}/metrics.json").write_text('{"stage": "trained"}')
    (tmp_path / name).write_text("garbage")
    with pytest.raises(ValueError, match=f"{name}` is damaged .*: .* move it away"):
        make(tmp_path, tiny_dir).check()


def test_a_folder_of_another_version_has_other_fields(tiny_dir, tmp_path):
    """A field that the earlier version lacked had its default; one that this version lacks cannot be set back."""
    rounds = make(tmp_path, tiny_dir)
    settings = rounds.check()
    former = {
        name: value for name, value in settings.items() if name not in ("weight_decay", "loss_type", "max_length")
    }
    (tmp_path / "round-1").mkdir()
    (tmp_path / "round-1/metrics.json").write_text('{"stage": "trained"}')
    (tmp_path / "rounds.json").write_text(json.dumps({"settings": former | {"an_old_field": False}}))
    assert rounds.check() == settings
    with pytest.raises(ValueError, match=r"`weight_decay` was 0\.0 and is 0\.5"):
        make(tmp_path, tiny_dir, {"weight_decay": 0.5}).check()


def test_the_token_of_loading_is_written_nowhere_and_may_change(tiny_dir, tmp_path):
    token = "hf_secretsecretsecret"
    settings = {"max_steps": 1, "save_steps": 1, "model_init_kwargs": {"token": token, "dtype": "float32"}}
    make(tmp_path, tiny_dir, settings, rounds=1).run()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "rounds.json"} <= {path.name for path in files}
    assert [path for path in files if token.encode() in path.read_bytes()] == []
    settings["model_init_kwargs"]["token"] = "hf_anotheranother"
    rounds = make(tmp_path, tiny_dir, settings, rounds=1)
    assert rounds.check()["model_init_kwargs"] == {"dtype": "float32"}
    assert rounds.args.model_init_kwargs["token"] == "hf_anotheranother"


class Silent(Source):
    def sample(self, requests):
        return ((request, sample, Answer(None, "content_filter")) for request, sample, _ in super().sample(requests))


def test_a_teacher_that_answers_nothing(tiny_dir, tmp_path):
    said = (
        r"Round 1 has no pairs to train on: the teacher answered 0 of 6 times, the student answered 12 of 12 times, 12 "
        r"of them cut off\. The teacher is \{'name': 'mute'\}; where it did not answer, the finish reasons are "
        r"content_filter \(6\)"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            make(tmp_path, tiny_dir, teacher=Silent("mute")).run()


def test_answers_that_are_cut_off_and_dropped(tiny_dir, tmp_path):
    said = "12 of them cut off.* are dropped .`truncated` = 'drop'.: give more `max_new_tokens`, or 'keep'"
    with pytest.raises(ValueError, match=said):
        make(tmp_path, tiny_dir, truncated="drop").run()


def test_a_prompt_that_fills_max_length(tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="`max_length` is 4, and the shortest of the first 6 prompts has 4 tokens"):
        make(tmp_path, tiny_dir, {"max_length": 4})


def test_a_student_is_no_name(tiny_dir, tmp_path):
    with pytest.raises(TypeError, match="`student` is 'start': give `SamplingSettings`, or a function"):
        make(tmp_path, tiny_dir, student="start")


def test_training_may_change_before_there_is_any(tiny_dir, tmp_path):
    """A setting on which it fails costs no answer."""
    teacher = Teacher()
    rounds = make(tmp_path, tiny_dir, teacher=teacher, peft_config=LoraConfig(target_modules=["nowhere"]))
    with pytest.raises(ValueError, match="nowhere"):
        rounds.run()
    asked = teacher.given
    assert asked == len(PROMPTS)
    with pytest.raises(ValueError, match="`num_student_samples` was 2 and is 1.*A copy of the folder `teacher`"):
        make(tmp_path, tiny_dir, num_student_samples=1).run()
    make(tmp_path, tiny_dir, {"learning_rate": 2e-2}, teacher=teacher).run()
    assert teacher.given == asked
    with pytest.raises(ValueError, match="`learning_rate` was 0.02 and is 0.01"):
        make(tmp_path, tiny_dir).run()
