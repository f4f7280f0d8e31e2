"""Whole trainings with `OnlinePbKDTrainer`: what grows, what is saved and resumed, what evaluation leaves alone."""

import logging
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TrainerCallback

from tests.trainers.online_cases import PAIRS, ROWS, Teacher, digits, equal, logs_of, make, unchecked, weights_of
from trl_kd.pairs import load_pairs
from trl_kd.trainers.online_pbkd.learner import WarmUpFailed
from trl_kd.trainers.online_pbkd.pool import PairPool
from trl_kd.trainers.online_pbkd.watch import HackingWatch


CHAT = [
    {"prompt": [{"role": "user", "content": row["prompt"]}], "completion": [{"role": "assistant", "content": "7"}]}
    for row in ROWS
]
METRICS = ["dataset_size", "dual", "imitation_gap", "rm_accuracy", "rm_nll_adv", "rm_nll_mle", "teacher_win_rate"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"adversary": "mle", "rows": CHAT},
        {"adversary": "discriminator", "preference_function": None},
        {"imitation_weight": 0.5, "rm_steps": 2, "rm_lora_r": 2},
        {"reward_funcs": lambda completions, **kw: [float(len(c)) for c in completions], "reward_weights": [0.1, 1.0]},
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
    ],
    ids=["pbkd", "mle on messages", "discriminator", "imitation", "reward functions", "LoRA"],
)
def test_it_trains(tiny_dir, settings, more):
    trainer = make(tiny_dir, settings, **{"preference_function": digits, **more})
    student, reward = weights_of(trainer.model), weights_of(trainer.learner.model)
    trainer.train()
    logs = logs_of(trainer)
    assert len(logs) == 3
    assert all(log["loss"] == log["loss"] for log in logs)
    assert not equal(student, weights_of(trainer.model))
    assert not equal(reward, weights_of(trainer.learner.model))
    if more.get("preference_function", digits) is not None:
        assert [log["pbkd/dataset_size"] for log in logs] == sorted({log["pbkd/dataset_size"] for log in logs})
    if not more:
        assert {f"pbkd/{name}" for name in METRICS} | {"pbkd/violation"} <= logs[-1].keys()
        assert len(trainer.dual.history) == 3
    if "reward_weights" in more:
        assert trainer.reward_func_names[-1] == "reward_model"
        assert logs[0]["reward"] == pytest.approx(
            0.1 * logs[0]["rewards/<lambda>/mean"] + logs[0]["rewards/reward_model/mean"], rel=1e-5
        )


def test_a_student_in_four_bits_learns_after_it_has_answered(tiny_dir, settings, monkeypatch):
    """And so does its reward model. On some CPUs bitsandbytes packs layers that answer, for inference alone."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    options = {"peft_config": LoraConfig(r=2, target_modules="all-linear"), "rm_lora_r": 2, "max_steps": 3}
    options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    trainer = make(tiny_dir, settings, eval_rows=ROWS[:4], preference_function=digits, **options)
    trainer.evaluate()
    models = (trainer.model, trainer.learner.model)
    before = [p.detach().clone() for model in models for p in model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for model in models for p in model.parameters() if p.requires_grad]
    moved = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    assert all(moved), f"{moved.count(False)} of {len(moved)} have not moved"


def test_the_teacher_is_asked_once_a_prompt(tiny_dir, settings):
    teacher = Teacher()
    trainer = make(tiny_dir, settings, teacher=teacher, preference_function=digits, max_steps=6)
    trainer.train()
    assert sorted(teacher.asked) == sorted({row["prompt"] for row in ROWS})
    again = Teacher()
    make(tiny_dir, settings, teacher=again, preference_function=digits, max_steps=2).train()
    assert again.asked == []


def test_pairs_are_of_the_batch(tiny_dir, settings):
    trainer = make(
        tiny_dir, settings, teacher=Teacher(), preference_function=digits, max_steps=1, log_completions=True
    )
    trainer.train()
    seen = set(
        zip(trainer._logs["prompt"], trainer._logs["completion"], trainer._logs["extra"]["teacher"], strict=True)
    )
    for row in trainer.learner.pool.rows:
        theirs, ours = (
            row[s] for s in (("chosen", "rejected") if row["teacher_side"] == "chosen" else ("rejected", "chosen"))
        )
        assert (row["prompt"], ours, theirs) in seen
        assert theirs == row["prompt"][0] * 3
        if row["preference"] is not None:
            assert row["preference"] == digits([""], [row["chosen"]], [row["rejected"]])[0]


def test_given_pairs_stay_without_a_preference_function(tiny_dir, settings):
    trainer = make(tiny_dir, settings, pairs=PAIRS)
    trainer.train()
    assert len(trainer.learner.pool) == len(PAIRS)
    assert "pbkd/teacher_win_rate" not in logs_of(trainer)[-1]


# ---- Evaluation ----------------------------------------------------------------------------------------------------------


def test_evaluation_leaves_reward_model_and_pairs_alone(tiny_dir, settings):
    trainer = make(tiny_dir, settings, eval_rows=ROWS[:4], preference_function=digits, pairs=PAIRS, rm_held_out=0.3)
    reward, dual, size = weights_of(trainer.learner.model), trainer.dual.value, len(trainer.learner.pool)
    found = trainer.evaluate()
    assert equal(reward, weights_of(trainer.learner.model))
    assert (trainer.dual.value, trainer.dual.history, len(trainer.learner.pool)) == (dual, [], size)
    assert 0 <= found["eval_pbkd/teacher_win_rate"] <= 1
    assert 0 <= found["eval_pbkd/rm_held_out_accuracy"] <= 1
    assert "eval_pbkd/imitation_gap" in found


def test_hacking_is_said_once(caplog):
    watch = HackingWatch()
    with caplog.at_level(logging.WARNING):
        for reward, rate in ((0, 0.5), (1, 0.4), (2, 0.3), (1.5, 0.2), (2, 0.1)):
            watch.look("eval", reward, rate)
        assert not caplog.records
        watch.look("eval", 3, 0.05)
        watch.look("eval", 4, 0.04)
        watch.look("eval", 5, 0.03)
    assert [record.message.count("exploits the reward model") for record in caplog.records] == [1]


# ---- Warm-up -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(monkeypatch):
    """Pairs whose preferred text is the longer: easily learnt."""
    monkeypatch.setattr("trl_kd.trainers.online_pbkd.learner.LEAST_HELD_OUT", 10)
    return [{"prompt": f"{i}+{j}=", "chosen": "777", "rejected": "1"} for i in range(10) for j in range(10)]


WARM = {"rm_warmup_accuracy": 0.9, "rm_held_out": 0.3, "rm_learning_rate": 0.03}


def test_the_student_waits_for_the_reward_model(tiny_dir, settings, many):
    trainer = make(tiny_dir, settings, pairs=many, max_steps=1, **WARM)
    trainer.train()
    log = logs_of(trainer)[0]
    assert log["pbkd/rm_held_out_accuracy"] >= 0.9
    assert 0 < log["pbkd/warmup_steps"] <= 1000
    assert trainer.learner.warmed_up


def test_the_adversary_begins_with_steps_of_the_usual_size(tiny_dir, settings, many):
    trainer = make(tiny_dir, settings, pairs=many, max_steps=1, rm_steps=3, **WARM)
    seen = []
    warm_up = trainer.learner.warm_up
    step = trainer.learner.step

    def watched(theirs, ours, moves=True):
        assert trainer.model.training  # or the warm-up's answers would count as an evaluation's
        before = trainer.learner.model.heads.adversary.weight.detach().clone()
        found = step(theirs, ours, moves)
        moved = (trainer.learner.model.heads.adversary.weight - before).abs().max().item()
        seen.append((moves, moved / trainer.args.rm_learning_rate))
        return found

    trainer.learner.step = watched
    trainer.learner.warm_up = lambda grow: warm_up(lambda: None)
    trainer.train()
    assert [size for moves, size in seen if not moves] == [0.0] * (len(seen) - 3)
    assert len(seen) > 8
    for _, size in seen[-3:]:
        assert 0 < size < 1.2


def test_a_reward_model_that_has_not_learnt_stops_the_run(tiny_dir, settings, many):
    coins = [{**row, "chosen": "12"[i % 2], "rejected": "21"[i % 2]} for i, row in enumerate(many)]
    trainer = make(tiny_dir, settings, pairs=coins, **WARM, rm_warmup_steps=12)
    before = weights_of(trainer.model)
    with pytest.raises(WarmUpFailed, match=r"After `rm_warmup_steps` = 12 .* held-out pairs rightly"):
        trainer.train()
    assert equal(before, weights_of(trainer.model))


def test_too_few_held_out_pairs_stop_the_run(tiny_dir, settings, monkeypatch):
    unchecked(monkeypatch)
    trainer = make(tiny_dir, settings, preference_function=digits, **WARM, rm_warmup_steps=3)
    with pytest.raises(WarmUpFailed, match="held out and no ties: it takes 100"):
        trainer.train()
    assert len(trainer.learner.pool) > 0  # it grew, without a step of the student


def test_pairs_held_out_are_never_drawn():
    pool = PairPool(0.3, 0)
    pool.add([{**pair, "preference": 1.0} for pair in PAIRS * 3])
    held = {pool.rows[place]["prompt"] for place in pool.held_out}
    assert 0 < len(held) < len({pair["prompt"] for pair in PAIRS})
    drawn = [pool.rows[place]["prompt"] for _ in range(50) for place in pool.draw(30, 0.5)]
    assert drawn
    assert not held & set(drawn)


def test_no_text_of_a_held_out_prompt_is_learnt_from(tiny_dir, settings):
    trainer = make(tiny_dir, settings, preference_function=digits, rm_held_out=0.999999, max_steps=2)
    before = weights_of(trainer.learner.model)
    trainer.train()
    assert trainer.learner.pool.held_out
    assert not trainer.learner.pool.train
    assert equal(before, weights_of(trainer.learner.model))


def test_fields_without_a_value_change_nothing_of_what_is_held_out(tmp_path):
    pools = [PairPool(0.5, 0) for _ in range(3)]
    for pool, name in ((pools[0], {}), (pools[1], {"name": None})):
        for i in range(20):
            prompt = [{"role": "user", "content": str(i), **(name if i else {"name": "Ann"})}]
            pool.add([{"prompt": prompt, "chosen": "1", "rejected": "2", "preference": 1.0}])
    pools[0].save(tmp_path)
    pools[2].load(tmp_path, pools[0].state_dict())
    assert 0 < len(pools[0].held_out) < 20
    for other in pools[1:]:
        assert pools[0].held_out == other.held_out
        assert pools[0].rows == other.rows


def test_a_teacher_answers_messages_with_fields_without_a_value(tiny_dir, settings):
    rows = [{"prompt": [{**row["prompt"][0], "name": None}]} for row in CHAT]
    rows[0]["prompt"][0]["name"] = "Ann"
    trainer = make(
        tiny_dir,
        settings,
        rows=rows,
        teacher=Teacher(),
        preference_function=digits,
        teacher_column="none",
        max_steps=1,
    )
    trainer.train()
    assert len(trainer.learner.pool)


def test_a_share_of_what_is_drawn_is_fresh():
    pool = PairPool(0.0, 0)
    pool.add([{**pair, "preference": 1.0} for pair in PAIRS])
    pool.add([{"prompt": "new", "chosen": str(i), "rejected": "", "preference": 1.0} for i in range(4)])
    pool.add([{"prompt": "unknown", "chosen": "1", "rejected": "2", "preference": None}])
    assert pool.fresh == []
    pool.fresh = pool.train[-4:]
    for _ in range(10):
        drawn = [pool.rows[place] for place in pool.draw(8, 0.5)]
        assert len(drawn) == 8
        assert sum(row["prompt"] == "new" for row in drawn) == 4
        assert len({(row["prompt"], row["chosen"]) for row in drawn}) == 8


# ---- Checkpoints ---------------------------------------------------------------------------------------------------------

RESUMED = {
    "plain": {},
    "in the middle of a generation": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 8,
        "num_iterations": 2,
        "max_steps": 7,
    },
    "imitation and LoRA": {"imitation_weight": 2.0, "rm_lora_r": 2, "rm_steps": 2},
    "a later epoch": {"max_steps": 7, "save_steps": 5},
}


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_bit_equal(tiny_dir, settings, tmp_path, case):
    common = {**settings, "save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    rows = ROWS * 2
    found = {}
    for name in ("whole", "resumed"):
        options = {"preference_function": digits, "output_dir": str(tmp_path / name), **RESUMED[case]}
        trainer = make(tiny_dir, common, rows, **options)
        if name == "resumed":
            first = make(tiny_dir, common, rows, **options)
            saved = first.args.save_steps
            first.add_callback(StopAt(saved))
            first.train()
            trainer.train(resume_from_checkpoint=os.path.join(options["output_dir"], f"checkpoint-{saved}"))
        else:
            trainer.train()
        learner = trainer.learner
        logs = [{k: v for k, v in log.items() if "time" not in k} for log in logs_of(trainer)]
        moments = [v for s in learner.optimizer.state.values() for v in s.values()]
        found[name] = (weights_of(trainer.model), weights_of(learner.model), moments, learner, logs)
    whole, resumed = found["whole"], found["resumed"]
    for i in range(3):
        assert equal(whole[i], resumed[i])
    assert whole[3].pool.rows == resumed[3].pool.rows
    assert whole[3].pool.draw(5, 0.5) == resumed[3].pool.draw(5, 0.5)
    assert whole[3].dual.history == resumed[3].dual.history
    assert whole[4] == resumed[4]


def test_a_checkpoint_of_another_reward_model_is_refused(tiny_dir, settings):
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tiny_dir, settings, preference_function=digits).train()
    other = make(tiny_dir, settings, preference_function=digits, rm_lora_r=2)
    with pytest.raises(ValueError, match="of another reward model: resume with the `reward_model` and `rm_lora_r`"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("adversary", ["pbkd", "mle"])
def test_reward_model_and_pairs_are_of_use_afterwards(tiny_dir, settings, rank, adversary):
    trainer = make(tiny_dir, settings, preference_function=digits, rm_lora_r=rank, adversary=adversary)
    trainer.train()
    trainer.save_model()
    folder = os.path.join(settings["output_dir"], "_online")
    loaded = AutoModelForSequenceClassification.from_pretrained(os.path.join(folder, "reward_model")).eval()
    ids = trainer.learner.encode("1+1=", "2", "stop")
    output = loaded(torch.tensor([ids])).logits
    assert output.shape == (1, 1)
    assert 5 * torch.tanh(output / 5).item() == pytest.approx(trainer.learner.score([ids]).item(), abs=1e-5)
    pairs = load_pairs(os.path.join(folder, "pairs"))
    assert len(pairs) == len(trainer.learner.pool)
    assert {"prompt", "chosen", "rejected", "preference", "teacher_side"} <= set(pairs.column_names)
    trainer.train()  # it goes on undisturbed


def test_a_reward_model_is_of_use_again(tiny_dir, settings):
    """What one run has saved is where another begins, whole or with adapters."""
    first = make(tiny_dir, settings, preference_function=digits)
    first.train()
    first.save_model()
    saved = os.path.join(settings["output_dir"], "_online", "reward_model")
    for rank in (0, 2):
        second = make(tiny_dir, settings, preference_function=digits, reward_model=saved, rm_lora_r=rank)
        ids = first.learner.encode("1+1=", "2", "stop")
        assert second.learner.score([ids]).item() == pytest.approx(first.learner.score([ids]).item(), abs=1e-5)
        second.train()


def test_a_student_in_bfloat16(tiny_dir, settings):
    init = {"model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make(tiny_dir, settings, preference_function=digits, rm_lora_r=2, imitation_weight=0.1, **init)
    trainer.train()
    dtypes = {p.dtype for p in trainer.learner.model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert trainer.learner.model.model.base_model.model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_the_card_says_how(tiny_dir, settings):
    trainer = make(tiny_dir, settings, teacher=Teacher(), preference_function=digits, rm_held_out=0.5)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="student")
    card = Path(settings["output_dir"], "README.md").read_text(encoding="utf-8")
    held_out = f"preference pairs, {len(trainer.learner.pool.held_out)} of them held out."
    for said in (
        held_out,
        "Teacher: first operand",
        "compared with the student's by `tests.trainers.online_cases.digits`",
        "The reward model started from the student.",
        "% of the newest held-out ones rightly",
        "`adversary` | pbkd",
        "λ (dual variable), last value",
        "2505.18952",
    ):
        assert said in card
    assert "imitation_radius" not in card
