"""What preferences say of the teacher's completions, which `MMPbKDTrainer` imitates."""

import logging
from dataclasses import replace

import pytest
from datasets import Dataset

from tests.trainers.mm_cases import ROWS, logs_of, make, nats, unpadded
from trl_kd import MMPbKDConfig
from trl_kd.trainers.common.imitation_weights import PairWeights


def of_prompts(**found) -> list[tuple[float, bool]]:
    """Advantages of ROWS, by the place of their prompts."""
    return [found.get(f"row{i}", (1.0, False)) for i in range(len(ROWS))]


def test_completions_are_found_among_pairs_by_prompt_and_text(settings):
    args = MMPbKDConfig(**settings, lmbda=0.0, imitation_weight=1.0, imitation_radius=0.0)
    questions = [row["prompt"] for row in ROWS]
    pairs = [
        {"prompt": questions[0], "chosen": "2", "rejected": "3", "preference": 0.9},
        {"prompt": questions[0], "chosen": "4", "rejected": "2", "preference": 0.4},
        {"prompt": questions[1], "chosen": "7", "rejected": "5", "preference": 1.0},
        {"prompt": questions[2], "chosen": "41", "rejected": "43", "preference": 1.0},  # of other texts
        {"prompt": questions[3], "chosen": "2", "rejected": "5", "preference": 0.5},  # as the first text, elsewhere
    ]
    weights = PairWeights(Dataset.from_list(pairs), args)
    expected = of_prompts(row0=(pytest.approx(2 * 0.75 - 1), True), row1=(0.0, True), row3=(0.0, True))
    assert [weights.of(row) for row in ROWS] == expected
    assert weights.of({"prompt": questions[0]}) == (1.0, False)  # to be sampled
    lengths = [len(row["completion"]) + 1 for row in ROWS]
    used = [(0.5, lengths[0]), (1.0, lengths[2]), *((1.0, n) for n in lengths[4:])]
    mean = sum(a * n for a, n in used) / sum(n for _, n in used)
    assert weights.mean(Dataset.from_list(ROWS), lambda row: len(row["completion"]) + 1) == pytest.approx(mean)
    assert weights.mean(Dataset.from_list(ROWS).to_iterable_dataset(), len) == 1
    assert weights.mean(Dataset.from_list(ROWS[:1]), None) == pytest.approx(0.5)  # one weight cancels

    wide = PairWeights(Dataset.from_list(pairs), replace(args, imitation_radius="inf"))
    assert {wide.of(row)[0] for row in ROWS} == {1.0}
    theory = PairWeights(Dataset.from_list(pairs), replace(args, imitation_radius="theory"))
    assert 0 < theory.of(ROWS[3])[0] < 1


def test_scores_of_completions_decide_where_they_are_asked_for(settings):
    args = MMPbKDConfig(**settings, lmbda=0.0, imitation_weight=1.0, imitation_min_score=2.0)
    pair = {"prompt": ROWS[0]["prompt"], "chosen": "3", "rejected": "2", "preference": 1.0}
    for score, weight in ((2.0, 1.0), (1.5, 0.0)):
        pairs = Dataset.from_list([{**pair, "score_chosen": 9.0, "score_rejected": score}])
        assert PairWeights(pairs, args).of(ROWS[0]) == (weight, True)


def test_a_label_counts_as_often_as_the_student_gave_its_answer(settings):
    args = MMPbKDConfig(**settings, lmbda=0.0, imitation_weight=1.0, imitation_radius=0.0)
    pair = {"prompt": ROWS[0]["prompt"], "chosen": "2", "rejected": "3", "preference": 1.0, "student_count": 3}
    lost = {**pair, "rejected": "4", "preference": 0.0, "student_count": 1}
    weights = PairWeights(Dataset.from_list([pair, lost]), args)
    assert weights.of(ROWS[0]) == (pytest.approx(0.5), True)


@pytest.mark.parametrize("other", [{"chosen": ROWS[0]["completion"]}, {"preference": None}])
def test_scores_of_pairs_without_a_label_count_too(other, tiny_dir, teacher_dir, settings):
    """Equal responses, or a judge that failed: Q learns nothing of them."""
    pair = {"prompt": ROWS[0]["prompt"], "chosen": "0", "rejected": ROWS[0]["completion"], "preference": 1.0}
    pairs = [{**pair, "score_chosen": 0.0, "score_rejected": 0.0, **other}]
    options = {"lmbda": 0.0, "moment_coef": 0.0, "imitation_weight": 1.0, "imitation_min_score": 0.5}
    trainer = make(tiny_dir, teacher_dir, settings, pairs=pairs, **options)
    assert trainer.pair_weights.of(ROWS[0])[0] == 0.0
    assert trainer.pair_weights.pairs == 0


def test_how_many_completions_the_pairs_know_is_said(tiny_dir, teacher_dir, settings, caplog):
    options = {"lmbda": 0.0, "moment_coef": 0.0, "imitation_weight": 1.0, "imitation_radius": 0.0}
    for blank, said in (
        ("", "1 of 8 completions stand in the pairs; 1 of weight 0"),
        (" ", "none of 8 completions stands in the pairs, so that all are imitated alike"),
    ):
        row = {"prompt": ROWS[0]["prompt"] + blank, "chosen": "0", "rejected": ROWS[0]["completion"]}
        with caplog.at_level(logging.WARNING):
            trainer = make(tiny_dir, teacher_dir, settings, pairs=[row], **options)
        assert f"Of the teacher's completions: {said}." in caplog.text
        trainer.create_model_card()
        with open(f"{settings['output_dir']}/README.md") as file:
            assert f"1 preference pairs weighed the teacher's completions, which were imitated: {said}." in file.read()


def test_messages_are_found_whatever_fields_other_rows_have(settings):
    args = MMPbKDConfig(**settings, lmbda=0.0, imitation_weight=1.0)
    ask, say = [{"role": "user", "content": "1"}], [{"role": "assistant", "content": "2"}]
    pair = {"chosen": [*ask, {"role": "assistant", "content": "3"}], "rejected": [*ask, *say], "preference": 1.0}
    weights = PairWeights(Dataset.from_list([pair]), args)  # the prompt stands in both
    row = {"prompt": [{**ask[0], "name": None}], "completion": [{**say[0], "tool_calls": None}]}
    assert weights.of(row) == (0.0, True)


def test_pairs_weigh_completions_without_a_q_function(tiny_dir, teacher_dir, settings):
    """The first half of the completions has lost, and is not imitated."""
    pairs = [{"prompt": row["prompt"], "chosen": "0", "rejected": row["completion"]} for row in ROWS[:4]]
    options = {"lmbda": 0.0, "moment_coef": 0.0, "kl_coef": 0.0, "imitation_weight": 2.0, "imitation_q": 0.0}
    options |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    options |= {"imitation_radius": 0.0, "learning_rate": 0.0}
    trainer = make(tiny_dir, teacher_dir, settings, pairs=pairs, **options)
    trainer.train()
    batch, logged = trainer.batches[0], logs_of(trainer)[0]
    ours, total, tokens = nats(trainer.model, batch), 0.0, 0
    kept = [row["prompt"] for row in ROWS[4:]]
    for row, prompt in enumerate(unpadded(batch, "prompt")):
        if trainer.processing_class.decode(prompt) not in kept:
            continue
        for t, word in enumerate(unpadded(batch, "completion")[row]):
            total, tokens = total - float(ours[row, t, word]), tokens + 1
    assert sorted(batch["advantage"]) == [0.0] * 4 + [1.0] * 4
    assert logged["mmpbkd/advantage"] == 0
    means = [logged["mmpbkd/teacher_nll"], logged["mmpbkd/imitation"]]
    assert means == pytest.approx([total / tokens] * 2, rel=1e-5)
    assert logged["loss"] == pytest.approx(2 * total / tokens, rel=1e-5)
