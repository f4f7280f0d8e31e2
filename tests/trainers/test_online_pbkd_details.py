"""Details of `OnlinePbKDTrainer` that whole trainings would not miss."""

import math

import pytest
import torch

from tests.trainers.online_cases import PAIRS, ROWS, Teacher, digits, logs_of, make
from trl_kd.pairs import pair_row
from trl_kd.pairs.prompts import PromptRow
from trl_kd.sampling import Answer
from trl_kd.trainers.online_pbkd.asking import PromptGroup


PROMPTS = [row["prompt"] for row in ROWS]


# ---- The reward model ----------------------------------------------------------------------------------------------------


def test_held_out_accuracy_is_of_the_climbed_head_and_in_the_warm_up_of_the_one_that_learns(tiny_dir, settings):
    learner = make(tiny_dir, settings, pairs=PAIRS, rm_held_out=0.5).learner
    torch.nn.init.normal_(learner.model.heads.mle.weight)
    learner.model.heads.adversary.weight.data = -learner.model.heads.mle.weight.data
    climbed = learner.held_out_accuracy()
    learner.warmed_up = False
    learns = learner.held_out_accuracy()
    assert climbed == pytest.approx(1 - learns)
    assert climbed != learns


def test_a_long_row_keeps_its_first_token_if_it_opens_every_row(tiny_dir, settings):
    learner = make(tiny_dir, settings, pairs=PAIRS, rm_max_length=5).learner
    bare = learner.encode("<unk>1234", "56", "stop")
    learner.tokenizer.bos_token = "<unk>"
    kept = learner.encode("<unk>1234", "56", "stop")
    assert len(bare) == len(kept) == 5
    assert kept == [learner.tokenizer.bos_token_id, *bare[1:]]


def test_a_reward_model_that_has_learnt_already_is_looked_at_before_a_step(tiny_dir, settings, monkeypatch):
    monkeypatch.setattr("trl_kd.trainers.online_pbkd.learner.LEAST_HELD_OUT", 1)
    learner = make(tiny_dir, settings, pairs=PAIRS, rm_held_out=0.5, rm_warmup_accuracy=0.9).learner
    learner.held_out_accuracy = lambda: 1.0
    learner.step = lambda *args, **kwargs: None
    assert learner.warm_up(None)["warmup_steps"] == 10  # at the second look


# ---- A batch -------------------------------------------------------------------------------------------------------------


def test_an_answer_that_was_cut_off_is_told_from_a_complete_one(tiny_dir, settings):
    trainer = make(tiny_dir, settings, preference_function=digits)
    end = trainer.processing_class.eos_token_id
    (group,) = trainer._ask(ROWS[:1] * 3, PROMPTS[:1] * 3, ["1", "2", ""], [[4, end], [5], []])
    assert [answer.finish_reason for answer in group.student] == ["stop", "length", "length"]


class OfOnes(Teacher):
    """Answers prompts that begin with a one."""

    def sample(self, requests):
        for request, sample, answer in super().sample(requests):
            yield request, sample, answer if request.prompt[0] == "1" else Answer(None, "content_filter")


def test_the_gap_is_that_of_prompts_which_the_teacher_answered(tiny_dir, settings):
    trainer = make(tiny_dir, settings, teacher=OfOnes(), preference_function=digits)
    learner = trainer.learner
    torch.nn.init.normal_(learner.model.heads.adversary.weight)
    trainer.model.eval()
    rewards = trainer._calculate_rewards(ROWS[:2], PROMPTS[:2], ["1", "+++"], [[4, 1], [5, 5, 5, 1]])[:, -1]
    theirs = learner.score([learner.encode(PROMPTS[0], "111", "stop")])
    assert rewards[0] != rewards[1]
    assert trainer._metrics["eval"]["pbkd/imitation_gap"] == [pytest.approx((theirs - rewards[0]).item(), abs=1e-5)]


def test_a_batch_tokenises_the_answer_of_a_teacher_once_for_the_gap(tiny_dir, settings):
    """What is in D is tokenised by itself."""
    trainer = make(tiny_dir, settings, adversary="discriminator", max_steps=1)
    encode, told = trainer.learner.encode, []
    trainer.learner.encode = lambda *row: told.append(row[:2]) or encode(*row)
    trainer.train()
    theirs = [row for row in told if {"prompt": row[0], "completion": row[1]} in ROWS]
    assert len(theirs) == len(set(theirs)) == 4


# ---- Imitation -----------------------------------------------------------------------------------------------------------


def test_imitation_is_a_mean_where_a_generation_is_used_in_several_steps(tiny_dir, settings):
    """Of the teacher's answers as far as the student's may go."""
    rows = [{**row, "completion": f"{row['completion']}12345678"} for row in ROWS[:4]]
    steps = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    settings |= {"learning_rate": 0.0, "max_steps": 2}
    trainer = make(tiny_dir, settings, rows, preference_function=digits, imitation_weight=0.5, **steps)
    trainer.train()
    nlls = []
    for row in rows:
        ids = trainer.processing_class(row["prompt"] + row["completion"][:6], return_tensors="pt")["input_ids"]
        logps = trainer.model(ids).logits[0, :-1].log_softmax(-1)
        nlls.append(-logps.gather(1, ids[0, 1:, None])[-6:].mean().item())
    logged = [log["pbkd/teacher_nll"] for log in logs_of(trainer)]
    assert sum(logged) / 2 == pytest.approx(sum(nlls) / 4, rel=1e-4)
    assert {log["pbkd/advantage"] for log in logs_of(trainer) if "pbkd/advantage" in log} == {1.0}  # it always wins


def test_answers_weigh_by_their_wins_in_the_batch(tiny_dir, settings):
    """Two of three answers of the student are beaten, a tie, all of them equal to the teacher's, a loss."""
    trainer = make(tiny_dir, settings, pairs=PAIRS, imitation_weight=1.0, imitation_radius=0.0)

    def group(*known, **scores):
        pairs = [pair_row("1+1=", "2", "2" if p == "equal" else str(i + 3), None if p == "equal" else p)
                 for i, p in enumerate(known)]  # fmt: skip
        row = PromptRow(0, "key", "1+1=", {})
        return PromptGroup(row, [0], [], Answer("2", "stop"), [pair | scores for pair in pairs])

    trainer._groups = [group(1.0, 1.0, 0.0), group(0.5), group("equal"), group(0.0, "equal"), group(0.75, None)]
    assert [weight for _, weight in trainer._weighed_groups()] == pytest.approx([1 / 3, 0.0, 1.0, 0.0, 0.5])
    assert trainer._metrics["train"]["pbkd/advantage"] == [pytest.approx((1 / 3 + 0 + 0 + 0.5) / 4)]

    trainer.args.imitation_radius = "theory"  # of the pairs so far
    known = len(trainer.learner.pool.train)
    tied = math.sqrt(1 - math.exp(-2 * math.log(known / 0.05) / known))
    trainer._groups = [group(0.5), group("equal")]
    assert [weight for _, weight in trainer._weighed_groups()] == pytest.approx([tied, 1.0])

    trainer.args.imitation_min_score = 2.0
    trainer._groups = [group(0.0, score_chosen=1.0, score_rejected=2.0), group(1.0, score_chosen=1.0)]
    assert [weight for _, weight in trainer._weighed_groups()] == [1.0, 0.0]


def test_answers_without_a_weight_are_no_rows_of_the_loss(tiny_dir, settings):
    """They are not run, and the mean is over the others' tokens."""
    trainer = make(tiny_dir, settings, pairs=PAIRS, imitation_weight=1.0, imitation_radius=0.0)
    rows = [PromptRow(i, str(i), prompt, {}) for i, prompt in enumerate(PROMPTS[:2])]
    lost = [pair_row(rows[0].prompt, "2", "33", 0.0)]
    trainer._groups = [
        PromptGroup(rows[0], [0, 1], [], Answer("2", "stop"), lost),
        PromptGroup(rows[1], [2, 3], [], Answer("55", "stop")),
    ]
    found = trainer._teacher_rows(4)
    assert found["teacher_advantage"].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert found["teacher_mask"].sum(1).tolist() == [0, 0, 7, 0]
    assert found["teacher_scale"].tolist() == [pytest.approx(1 / 3)] * 4


def test_the_generation_of_an_earlier_checkpoint_is_read(tiny_dir, settings):
    """Its rows had one weight each: the micro-batches by the number of prompts."""
    trainer = make(tiny_dir, settings, pairs=PAIRS, imitation_weight=1.0)
    labels = [torch.tensor([[-100, -100, 5, 1], [0, 0, 0, 0]]), torch.tensor([[-100, -100, 1, -100]] * 2)]
    labels[0][1] = -100
    weights = [torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.5])]
    buffer = [
        {"teacher_labels": label, "teacher_weight": weight} for label, weight in zip(labels, weights, strict=True)
    ]
    found = trainer._read_buffer(buffer)
    assert [batch["teacher_advantage"].tolist() for batch in found] == [[1.0, 0.0], [1.0, 1.0]]
    assert [batch["teacher_scale"].tolist() for batch in found] == [[0.5, 0.5]] * 2  # two micro-batches, four tokens
    assert trainer._read_buffer(found) is found
    assert trainer._read_buffer(None) is None
