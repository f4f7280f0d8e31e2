"""Rounds without the preference term: no reference, one warm-up of q over all, a report without what is not there."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.trainers.rounds_cases import make
from trl_kd.evaluation.report import render
from trl_kd.evaluation.rounds_report import make_page
from trl_kd.trainers.rounds import rounds as rounds_module


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
        assert record["advantage"] == 1.0
    page = render(make_page(told, "student"))
    assert "accuracy" not in page
    assert "reference is" not in page
    assert "ℓ_q per token" in page
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| round | prompts | pairs trained on | student wins, before it | equal answers | mean advantage |" in card
    assert "as the reference" not in card
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


# ---- The optimizer -----------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Interrupts the second round."""

    def on_step_begin(self, args, state, control, **kwargs):
        if "round-2" in args.output_dir and state.global_step == 2:
            raise InterruptedError


def test_an_interruption_changes_nothing_and_moments_are_carried(tiny_dir, tmp_path):
    settings = OFF | {"save_strategy": "steps", "save_steps": 1, "student_wins": "gated"}
    told = make(tmp_path / "one", tiny_dir, args=settings).run()
    with pytest.raises(InterruptedError):
        make(tmp_path / "two", tiny_dir, args=settings, callbacks=[Stop()]).run()
    assert list((tmp_path / "two/round-2/student").glob("checkpoint-2"))
    assert make(tmp_path / "two", tiny_dir, args=settings).run() == told
    assert told["settings"]["optimizer"] == "carried"
    fresh = make(tmp_path / "fresh", tiny_dir, args=settings, optimizer="fresh").run()
    assert fresh["rounds"][0]["imitation"] == told["rounds"][0]["imitation"]
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "fresh")}
    for name, weight in weights["one"].items():
        assert torch.equal(weight, weights["two"][name]), name
    assert any(not torch.equal(weight, weights["fresh"][name]) for name, weight in weights["one"].items())


def test_rounds_that_were_begun_fresh_go_on_so(tiny_dir, tmp_path):
    make(tmp_path / "out", tiny_dir, args=OFF, optimizer="fresh", rounds=1, schedule="round").run()
    told = make(tmp_path / "out", tiny_dir, args=OFF, schedule="round").run()
    assert told["settings"]["optimizer"] == "fresh"
    assert not list(tmp_path.glob("out/round-*/carried.pt"))
    with pytest.raises(ValueError, match="`optimizer` was 'fresh' and is 'carried'"):
        make(tmp_path / "out", tiny_dir, args=OFF, schedule="round", optimizer="carried").run()


def test_a_dual_above_0_is_not_carried_into_rounds_without_the_term(tiny_dir, tmp_path):
    make(tmp_path / "out", tiny_dir, args=OFF, rounds=1).run()
    path = tmp_path / "out/round-1/carried.pt"
    state = torch.load(path, weights_only=True)
    state["dual"]["value"] = 0.5
    torch.save(state, path)
    rounds = make(tmp_path / "out", tiny_dir, args=OFF)
    with pytest.raises(ValueError, match="carried on with λ = 0.5, and the preference term is off"):
        rounds.trainer(2, rounds.data(1))


# ---- The end ----------------------------------------------------------------------------------------------------------


class Turning:
    """The teacher wins in the first rounds, and then never again."""

    def __init__(self, rounds: int):
        self.left = rounds

    def describe(self):
        return {"prefers": "whom it likes"}

    def __call__(self, prompts, first, second, **columns):
        self.left -= 1
        return [float(self.left >= 0)] * len(prompts)


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_a_round_in_which_nothing_teaches_ends_them(adapter, tiny_dir, tmp_path, capsys):
    args, out = OFF | {"imitation_radius": 0.0}, tmp_path / "out"
    options = {"accumulate": False, "rounds": 4, "show_progress": True, "peft_config": adapter}
    told = make(out, tiny_dir, args=args, preference=Turning(2), **options).run()
    assert [record["stage"] for record in told["rounds"]] == ["trained"] * 2
    assert (told["final"]["round"], told["final"]["stage"], told["final"]["student_win_rate"]) == (3, "ended", 1.0)
    said = "No row of the data of round 3 teaches (0 of "
    assert said in told["final"]["ended"]
    assert (
        f"After 2 rounds: the student wins 100.0 % against its teacher where they differ, 0 answers are equal. {said}"
        in (capsys.readouterr().out)
    )
    assert not (out / "round-3/student").exists()
    assert not (out / "round-4").exists()
    assert not list(out.glob("after-*"))
    name = "model.safetensors" if adapter is None else "adapter_model.safetensors"
    last, result = (load_file(folder / name) for folder in (out / "round-2/student", out))
    assert all(torch.equal(weight, result[key]) for key, weight in last.items())
    for text in (render(make_page(told, "student")), (out / "README.md").read_text()):
        assert said in text
    assert make(out, tiny_dir, args=args, preference=Turning(0), **options).run() == told  # it stays so


def test_nothing_to_teach_from_the_beginning_is_an_error(tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="No row of the train dataset teaches with `imitation_radius` = 0.0: 0 of "):
        make(tmp_path / "out", tiny_dir, args=OFF | {"imitation_radius": 0.0}, preference=Turning(0)).run()


# ---- The student's wins ------------------------------------------------------------------------------------------------


def test_comparisons_of_all_rounds_tell_the_students_wins(tiny_dir, tmp_path, caplog):
    """Two answers a round are too few, and those of two rounds are enough."""
    args = OFF | {"student_wins": "gated", "imitation_radius": 0.05}
    with caplog.at_level(logging.WARNING):
        make(tmp_path / "out", tiny_dir, args=args, preference=Turning(1), rounds=3).run()
    said = [line for line in caplog.messages if "rows teach" in line]
    assert "winning answers" not in "".join(said[:2])  # p̄ = ½ after the second
    assert "winning answers of the student's teach too" in said[-1]
