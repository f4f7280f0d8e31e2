"""Pairs of `MMPbKDTrainer`: their order, and which of them are held out."""

import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tests.conftest import make_tokenizer, save_tiny
from tests.trainers.mm_cases import PAIRS, ROWS, make
from trl_kd import MMPbKDConfig
from trl_kd.trainers.common.held_out import hold_out
from trl_kd.trainers.mm_pbkd.data import PairBatches


def test_pairs_come_in_an_order_of_their_own_each_once_an_epoch(tiny_dir, teacher_dir, settings):
    trainer = make(tiny_dir, teacher_dir, settings, pairs=PAIRS, pair_held_out=0.25, pair_batch_size=6)
    pairs = trainer.adversary.pairs
    stream = torch.random.get_rng_state()
    drawn = [row for _ in range(5) for batch in pairs.draw() for row in chosen(batch)]
    held_out = [row for batch in pairs.held_out() for row in chosen(batch)]
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert pairs.seen == len(drawn) == 30
    first, second = drawn[:15], drawn[15:]
    assert sorted(first) == sorted(second) != first != second
    assert sorted(first + held_out) == sorted(f"{row['prompt']}{row['chosen']}<eos>" for row in PAIRS)


def test_prompts_are_held_out_with_all_their_pairs(tmp_path, teacher_dir, settings):
    """A coin for each prompt says whether the teacher's text, which its pairs share, is preferred: there is nothing to learn
    but by heart, and what is known by heart must not pass for accuracy."""
    rng = random.Random(0)

    def word() -> str:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4))

    pairs = []
    for _ in range(100):
        prompt, teacher, wins = word() + "=", word(), rng.random() < 0.5
        for student in (word() for _ in range(4)):
            texts = (teacher, student) if wins else (student, teacher)
            pairs.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
    student = save_tiny(tmp_path / "wide", hidden_size=96)
    options = {"pairs": pairs, "pair_held_out": 0.5, "pair_batch_size": 64, "per_device_train_batch_size": 64}
    trainer = make(student, teacher_dir, settings, rows=ROWS * 8, q_learning_rate=1.0, **options)
    adversary = trainer.adversary
    for _ in range(60):
        seen = adversary.step(moments=False)
    assert seen["accuracy"] > 0.95
    assert adversary.pairs.strict == 200
    assert 0.35 < adversary.held_out_accuracy() < 0.65


def test_whole_prompts_up_to_the_wanted_number_of_pairs():
    """Prompts 0, 1 and 2 have one, two and three pairs."""
    dataset = Dataset.from_dict({"prompt_ids": [[2, 2], [1], [2, 2], [0], [1], [2, 2]]})
    found = {wanted: hold_out(dataset, [0, 3, 1, 2, 4, 5], wanted) for wanted in range(7)}
    assert found == {
        0: ([], [0, 3, 1, 2, 4, 5]),
        1: ([3], [0, 1, 2, 4, 5]),  # prompt 2 comes first and is too much
        2: ([3], [0, 1, 2, 4, 5]),
        3: ([0, 2, 5], [3, 1, 4]),
        4: ([0, 3, 2, 5], [1, 4]),
        5: ([0, 3, 2, 5], [1, 4]),
        6: ([0, 3, 1, 2, 4, 5], []),
    }
    unique = Dataset.from_dict({"prompt_ids": [[i] for i in range(6)]})
    assert hold_out(unique, [4, 2, 0, 1, 5, 3], 2) == ([4, 2], [0, 1, 5, 3])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_process_measures_as_many_pairs(processes, settings):
    """Pairs that do not come out even are measured by none, nor learnt from."""
    rows = {"prompt_ids": [[i // 5] for i in range(40)], "chosen_ids": [[i] for i in range(40)]}
    rows |= {"rejected_ids": [[50]] * 40, "preference": [1.0] * 40}
    args = MMPbKDConfig(**settings, pair_held_out=0.3, pair_batch_size=6)
    held, learnt = [], []
    for rank in range(processes):
        here = SimpleNamespace(num_processes=processes, process_index=rank)
        pairs = PairBatches(Dataset.from_dict(rows), args, here, pad_token_id=60)
        assert pairs.strict == 10 // processes * processes
        held.append([ids[1] for batch in pairs.held_out() for ids in first_of_pairs(batch)])
        learnt += [ids[1] for _ in range(5) for batch in pairs.draw() for ids in first_of_pairs(batch)]
    assert {len(rows) for rows in held} == {10 // processes}
    measured = {row for rows in held for row in rows}
    assert len(measured) == 10 // processes * processes
    assert len(set(learnt)) == len(learnt) == 30
    assert not {row // 5 for row in measured} & {row // 5 for row in learnt}


def first_of_pairs(batch) -> list[list[int]]:
    return batch["input_ids"].chunk(2)[0].tolist()


def test_drawing_orders_an_epoch_once(tiny_dir, teacher_dir, settings, monkeypatch):
    trainer = make(tiny_dir, teacher_dir, settings, pairs=PAIRS, pair_held_out=0.25, pair_batch_size=4)
    pairs, ordered = trainer.adversary.pairs, []
    order = pairs._permutation
    monkeypatch.setattr(pairs, "_permutation", lambda count, epoch: (ordered.append(epoch), order(count, epoch))[1])
    for _ in range(11):  # 44 of 3 times 15
        pairs.draw()
    assert ordered == [1, 2, 3]
    pairs.seen = 4  # as in a checkpoint
    again = [row for batch in pairs.draw() for row in chosen(batch)]
    other = make(tiny_dir, teacher_dir, settings, pairs=PAIRS, pair_held_out=0.25, pair_batch_size=4).adversary.pairs
    assert [[row for batch in other.draw() for row in chosen(batch)] for _ in range(2)][1] == again


def test_equal_responses_are_left_out_and_this_is_said_once(tiny_dir, teacher_dir, settings, caplog):
    """Whatever their label; where it is null nothing was lost."""
    labels = {0: 1.0, 3: 0.5, 7: None}
    pairs = [
        {**row, "preference": labels.get(i, 1.0), "rejected": row["chosen" if i in labels else "rejected"]}
        for i, row in enumerate(PAIRS)
    ]
    with caplog.at_level("INFO"):
        found = make(tiny_dir, teacher_dir, settings, pairs=pairs, pair_held_out=0.0).adversary.pairs
    assert len(found) == found.size * 4 + 1 == 17
    assert caplog.text.count("In 2 of 20 rows of the preference dataset both responses are equal") == 1
    assert "teacher" not in caplog.text  # nobody imitates the chosen responses
    kept = [row for i, row in enumerate(PAIRS) if i not in labels]
    other = make(tiny_dir, teacher_dir, settings, pairs=kept, pair_held_out=0.0).adversary.pairs
    assert [[chosen(b) for b in found.draw()] for _ in range(5)] == [
        [chosen(b) for b in other.draw()] for _ in range(5)
    ]


def chosen(batch) -> list[str]:
    """Prompts with their chosen responses, which come before those with the rejected ones."""
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return [make_tokenizer().decode(row) for row in rows[: len(rows) // 2]]
