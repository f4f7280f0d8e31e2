"""What becomes of reasoning in answers, and of reasons why a third text ended."""

import logging

import pytest
from datasets import Dataset

from tests.conftest import make_tokenizer, save_tiny
from tests.pairs.fakes import Longer, Source
from trl_kd.pairs import build_pairs
from trl_kd.pairs.pairing import PairingSettings, make_candidates
from trl_kd.sampling import Answer, SamplingSettings
from trl_kd.sampling.column import ColumnSampler
from trl_kd.sampling.local import LocalSampler


PROMPTS = Dataset.from_list([{"prompt": f"{i}+1="} for i in range(3)])


class Thinking(Source):
    """Thinks before it answers, and is cut off while it thinks about the last prompt."""

    def text(self, request, sample):
        return "<think>\nhm, or 7?\n</think>\n\n2" if request.prompt[0] != "2" else "<think>\nhm"


class Seen(Longer):
    """Remembers what it has compared."""

    def __init__(self):
        super().__init__()
        self.texts = set()

    def score(self, prompts, completions, **columns):
        self.texts.update(completions)
        return super().score(prompts, completions, **columns)


def build(folder, **options):
    parts = {"teacher": Thinking("teacher"), "student": Source("student"), "preference": Seen()}
    return build_pairs(PROMPTS, output_dir=folder, show_progress=False, **{**parts, **options})


@pytest.mark.parametrize("reasoning", [None, "keep", "strip"])
def test_reasoning_is_taken_out_before_labelling_if_asked_to(tmp_path, reasoning):
    preference = Seen()
    pairs = build(tmp_path, preference=preference, reasoning=reasoning)
    theirs = [row["chosen"] if row["teacher_side"] == "chosen" else row["rejected"] for row in pairs]
    whole = "<think>\nhm, or 7?\n</think>\n\n2"
    if reasoning == "strip":
        assert theirs == ["2", "2"]  # of the third answer nothing is left
        assert not any("<think>" in text for text in preference.texts)
    else:
        assert theirs == [whole, whole, "<think>\nhm"]
    # The answers themselves are stored as they came: another call may say otherwise, and asks nobody
    silent = Thinking("teacher", fail_after=0)
    again = build(tmp_path, teacher=silent, student=Source("student", fail_after=0), reasoning=None)
    assert len(again) == 3


def test_error_stops_before_more_is_asked_and_keeps_what_was_answered(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(
        ValueError, match="`reasoning` is 'error', and the teacher's answer to the prompt '...=' holds"
    ):
        build(tmp_path / "pairs", teacher=Thinking("teacher", log=str(log), window=1), reasoning="error")
    assert len(log.read_text().splitlines()) == 1
    assert len(build(tmp_path / "pairs", teacher=Thinking("teacher", log=str(log), window=1))) == 3
    assert len(log.read_text().splitlines()) == 3


def test_error_looks_at_answers_that_are_there_already(tmp_path):
    """Of a column, and of an earlier run: nothing is asked."""
    rows = [{"prompt": f"{i}+1=", "ours": "<think>hm</think>2" if i == 2 else "2"} for i in range(3)]
    log = tmp_path / "log"
    student = Source("student", log=str(log))
    parts = {"teacher": ColumnSampler("ours"), "student": student, "preference": Seen(), "show_progress": False}
    with pytest.raises(ValueError, match="the teacher's answer to the prompt '2.1=' holds a `<think>` block"):
        build_pairs(Dataset.from_list(rows), output_dir=tmp_path / "column", reasoning="error", **parts)
    assert not log.exists()
    build(tmp_path / "stored")
    with pytest.raises(ValueError, match="the teacher's answer to the prompt '0.1=' holds a `<think>` block"):
        build(tmp_path / "stored", reasoning="error")


def test_messages_and_calls_of_tools():
    called = [{"role": "assistant", "content": "<think>add</think>", "tool_calls": [{"function": {"name": "add"}}]}]
    said = [{"role": "assistant", "content": "<think>hm</think>2"}]
    nothing = [{"role": "assistant", "content": "<think>hm"}]
    answers = [Answer(text, "stop") for text in (called, said, nothing)]
    texts = [one.text for one in make_candidates([{"role": "user", "content": "1"}], answers, [], reasoning="strip")]
    assert [text[0]["content"] for text in texts] == ["", "2"]
    assert texts[0][0]["tool_calls"]


def test_settings_say_it_where_it_is_set():
    with pytest.raises(ValueError, match="`reasoning` is 'drop'"):
        PairingSettings(reasoning="drop")
    assert "reasoning" not in PairingSettings().describe()
    assert PairingSettings(reasoning="strip").describe()["reasoning"] == "strip"


class Cut(Source):
    def sample(self, requests):
        for request, sample, answer in super().sample(requests):
            yield request, sample, Answer(answer.text, "length", answer.tokens)


def test_a_third_text_says_why_it_ended(tmp_path):
    """Of a pair of the student's own answers, beside which the teacher's is imitated."""
    shorter = Longer()
    pairs = build(
        tmp_path,
        teacher=Cut("t"),
        student=Source("student says a lot and more"),
        preference=shorter,
        policy="all",
        num_student_samples=2,
        max_pairs_per_prompt=1,
    )
    third = [row for row in pairs if row["teacher"] is not None]
    assert all(row["teacher_finish_reason"] == "length" for row in third)
    assert all(row["teacher_finish_reason"] is None for row in pairs if row["teacher"] is None)
    assert third


def test_a_second_bos_token_is_told_of_before_anything_is_asked(tmp_path, caplog):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    folder = save_tiny(tmp_path / "model", tokenizer)
    prompts = Dataset.from_list([{"prompt": f"<unk>{i}+1="} for i in range(2)] + [{"prompt": "2+1="}])
    local = LocalSampler(folder, SamplingSettings(max_new_tokens=2))
    with caplog.at_level(logging.WARNING):
        parts = {"teacher": Source("teacher"), "student": local, "preference": Longer()}
        build_pairs(prompts, output_dir=tmp_path / "pairs", show_progress=False, **parts)
    assert "2 of the first 3 prompts begin with '<unk>', and the tokenizer of the student" in caplog.text
