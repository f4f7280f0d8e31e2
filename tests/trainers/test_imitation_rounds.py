"""Rounds without the preference term: no reference, one warm-up of q over all, a report without what is not there."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.trainers.rounds_cases import make
from trl_kd.evaluation.report import render
from trl_kd.evaluation.rounds_report import make_page
from trl_kd.trainers import rounds as rounds_module


OFF = {"dual_init": 0.0, "imitation_radius": "inf", "imitation_q_warmup": 0.5, "max_steps": 3, "save_strategy": "no"}


class Kept(TrainerCallback):
    """Keeps what each round's trainer logs."""

    def __init__(self):
        self.q, self.rewards = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "pbkd/q" in logs:
            self.q.append(logs["pbkd/q"])
        self.rewards += [name for name in logs if "rewards/" in name]


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_rounds_load_no_reference_and_share_one_warm_up(adapter, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds_module, "load_reference", lambda *args, **kwargs: pytest.fail("a reference was loaded"))
    kept = Kept()
    given = {"callbacks": [kept], "peft_config": adapter}
    told = make(tmp_path / "out", tiny_dir, args=OFF, **given).run()
    assert kept.q == pytest.approx([0.5 * min(1, step / 3) for step in range(6)])
    assert not kept.rewards
    for record in told["rounds"]:
        assert record["imitation"] > 0
        assert record["accuracy"] is record["preference_nll"] is record["dual"] is None
    assert "accuracy" in render(make_page(told, "student"))
    assert json.loads((tmp_path / "out" / "rounds.json").read_text())["settings"]["imitation_radius"] == float("inf")
    again = make(tmp_path / "out", tiny_dir, args=OFF, **given).run()  # nothing is left to do
    assert again["rounds"] == told["rounds"]
    if adapter is None:
        weights = [load_file(tmp_path / "out" / f"round-{k}" / "student" / "model.safetensors") for k in (1, 2)]
        assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_pairs_of_all_rounds_are_one_text_a_prompt(tiny_dir, tmp_path):
    rounds = make(tmp_path / "out", tiny_dir, args=OFF)
    row = {"prompt": "1+1=", "chosen": "2", "rejected": "3", "preference": 1.0, "teacher_side": "chosen"}
    other = {**row, "chosen": "4", "rejected": "2", "preference": 1.0, "teacher_side": "rejected"}
    trainer = rounds.trainer(1, Dataset.from_list([row, other, row, row]))
    assert len(trainer.train_dataset) == 1
    assert trainer.text_counts["train"].used == 4


def test_the_student_before_is_no_reference(tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="`reference` is 'previous', which only the preference term uses"):
        make(tmp_path / "out", tiny_dir, args=OFF, reference="previous")
