"""What is written trains as it is: with `PbKDTrainer`, and strictly with TRL's own `DPOTrainer`."""

import inspect
import re

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer, reward_trainer

from tests.pairs.fakes import Column, Pairwise
from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.pairs import build_pairs, load_pairs
from trl_kd.pairs.dataset import RESERVED, join_pairs
from trl_kd.preferences.simple import TeacherWins


STRENGTHS = {"t": 3.0, "a": 1.0, "b": 3.0, "c": 0.0}


def build(folder, conversational, policy):
    def prompt(text):
        return (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] if conversational else text
        )

    data = Dataset.from_list(
        [
            {
                "prompt": prompt(f"{i}+1="),
                "t": "t",
                "s": ["a", "b", "c", "t", "d"],
                "messages": "not to be read",
                "image": 0,
            }
            for i in range(4)
        ]
    )
    return build_pairs(
        data,
        teacher=Column("t"),
        student=Column("s"),
        preference=Pairwise(STRENGTHS),
        output_dir=folder,
        num_student_samples=5,
        policy=policy,
        show_progress=False,
    )


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("policy", ["teacher_vs_student", "best_vs_worst", "all"])
def test_pbkd_trains_on_it(tmp_path, tiny_dir, settings, conversational, policy):
    pairs = build(tmp_path / "pairs", conversational, policy)
    trainer = PbKDTrainer(model=tiny_dir, args=PbKDConfig(**{**settings, "max_steps": 1}), train_dataset=pairs)
    assert trainer.train().global_step == 1
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("policy", ["teacher_vs_student", "all"])
def test_dpo_trains_on_the_strict_rows(tmp_path, tiny_dir, settings, conversational, policy):
    build(tmp_path / "pairs", conversational, policy)
    strict = load_pairs(tmp_path / "pairs", strict_only=True)
    assert set(strict["preference"]) == {0.75, 1.0}
    trainer = DPOTrainer(model=tiny_dir, args=DPOConfig(**{**settings, "max_steps": 1}), train_dataset=strict)
    assert trainer.train().global_step == 1


def test_strict_only_drops_ties_and_nulls(tmp_path):
    pairs = build(tmp_path, False, "teacher_vs_student")
    assert sorted({str(preference) for preference in pairs["preference"]}) == ["0.5", "0.75", "1.0", "None"]
    strict = load_pairs(tmp_path, strict_only=True)
    assert strict.to_list() == [row for row in pairs if row["preference"] not in (0.5, None)]
    assert {row["rejected"]: row["preference"] for row in strict} == {"a": 0.75, "c": 1.0}


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished pairs"):
        load_pairs(tmp_path)
    data = Dataset.from_dict({"prompt": ["q"], "t": ["t"], "s": ["t"]})
    options = {
        "teacher": Column("t"),
        "student": Column("s"),
        "preference": Pairwise(STRENGTHS),
        "show_progress": False,
    }
    assert len(build_pairs(data, output_dir=tmp_path, **options)) == 1
    with pytest.raises(ValueError, match="No row of .* has a winner"):
        load_pairs(tmp_path, strict_only=True)


def test_a_dataset_written_anew_is_read_anew(tmp_path):
    first = build(tmp_path, False, "teacher_vs_student")
    second = build(tmp_path, False, "best_vs_worst")
    assert len(first) != len(second)
    assert load_pairs(tmp_path).to_list() == second.to_list()


@pytest.mark.parametrize("module", [dpo_trainer, reward_trainer])
def test_every_column_that_trl_reads_is_reserved(module):
    """From the installed source: names that its dataset preparation or its collators read from a row."""
    read = set(re.findall(r'example(?:s\[0\])?(?:\.pop|\.get)?[\[(]"(\w+)"', inspect.getsource(module)))
    some = {
        dpo_trainer: {"prompt_ids", "image", "images", "ref_chosen_logps"},
        reward_trainer: {"margin", "chosen_ids"},
    }
    assert some[module] <= read
    assert read - RESERVED <= {"prompt", "tools", "chat_template_kwargs"}


def test_folders_are_joined_whatever_fields_their_messages_have(tmp_path):
    def answered(folder, prompts):
        call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
        rows = []
        for text in prompts:
            answer = {"role": "assistant", "content": text, **({"tool_calls": [call]} if text == "call" else {})}
            student = [{"role": "assistant", "content": "?"}]
            rows.append(
                {"prompt": [{"role": "user", "content": text}], "t": [answer], "s": student, "level": len(text)}
            )
        build_pairs(
            Dataset.from_list(rows),
            teacher=Column("t"),
            student=Column("s"),
            preference=TeacherWins(),
            output_dir=folder,
            show_progress=False,
        )
        return folder

    with_calls, without = answered(tmp_path / "a", ["call", "plain"]), answered(tmp_path / "b", ["other"])
    assert join_pairs([without]).to_list() == load_pairs(without).to_list()
    for folders in ([with_calls, without], [without, with_calls]):
        joined = join_pairs(folders)
        chosen = {row["prompt"][0]["content"]: row["chosen"][0] for row in joined}
        assert list(chosen) == [row["prompt"][0]["content"] for folder in folders for row in load_pairs(folder)]
        assert chosen["call"]["tool_calls"][0]["function"]["name"] == "add"
        assert "tool_calls" not in chosen["plain"] | chosen["other"]
        assert joined.features["level"].dtype == "int64"
        assert len(joined) == 3
