"""`PbKDRounds`: what a round does, what is kept, and that it goes on from wherever it was stopped."""

import copy
import json
import multiprocessing
import os
import shutil
import socket
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainerCallback

from tests.pairs.fakes import Source
from tests.trainers.rounds_cases import PROMPTS, SAMPLING, DiesAt, Digits, Teacher, config, die, make, run_rank
from trl_kd import PbKDTrainer
from trl_kd.pairs import StoreError, build_pairs, load_pairs
from trl_kd.pairs.lock import lock_folder
from trl_kd.sampling.budget import Usage
from trl_kd.sampling.local import LocalSampler
from trl_kd.trainers.rounds.folder import RoundsFolder
from trl_kd.trainers.rounds.students import Carried


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": True}


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def assert_same(ones: dict[str, torch.Tensor], twos: dict[str, torch.Tensor]) -> None:
    assert ones.keys() == twos.keys()
    for name, weight in ones.items():
        assert torch.equal(weight, twos[name]), name


@pytest.fixture(scope="module")
def processes():
    """Starts processes by forking one that has imported everything, or imports would take most of a test's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainers.test_rounds"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_dir):
    """Two rounds of all prompts, never interrupted, and what they said."""
    folder = tmp_path_factory.mktemp("whole")
    log = folder / "asked.log"
    rounds = make(folder / "out", tiny_dir, teacher=Teacher(log))
    return folder / "out", rounds.run(), log


class TestRound:
    def test_what_it_leaves(self, whole, tiny_dir):
        out, told, _ = whole
        for number in (1, 2):
            assert {path.name for path in (out / f"round-{number}").iterdir()} == {
                *("pairs", "student", "metrics.json", "carried.pt")
            }
            assert not list((out / f"round-{number}/student").glob("checkpoint-*"))
        assert json.loads((out / "rounds.json").read_text()) == told
        assert told["rounds"] == [json.loads((out / f"round-{n}/metrics.json").read_text()) for n in (1, 2)]
        start, first, second = (
            weights(Path(tiny_dir)),
            weights(out / "round-1/student"),
            weights(out / "round-2/student"),
        )
        assert not torch.equal(start["lm_head.weight"], first["lm_head.weight"])
        assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])

    def test_the_last_student_is_the_result(self, whole):
        out, told, _ = whole
        assert_same(weights(out), weights(out / "round-2/student"))
        AutoModelForCausalLM.from_pretrained(out)
        assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
        card = (out / "README.md").read_text()
        for said in ("# Model Card for out", "## Distillation", "## Rounds", "| 2 | 6 |", 'model="out"'):
            assert said in card, said
        assert "| optimizer steps, of all rounds | 10 |" in card
        assert "| `seed`, of the first round | 42 |" in card
        assert f"| win rate against the teacher | {told['final']['student_win_rate']:.6g} |" in card
        assert "on the pairs of all rounds so far, with the start as the reference" in card

    def test_the_teacher_is_asked_once(self, whole):
        _, told, log = whole
        asked = Counter(log.read_text().splitlines())
        assert len(asked) == len(PROMPTS)
        assert set(asked.values()) == {1}
        assert [record["teacher_answers"] for record in told["rounds"]] == [6, 6]

    def test_the_student_answers_anew(self, whole):
        out, _, _ = whole

        def answers(folder):
            found = []
            for row in load_pairs(folder / "pairs"):
                side = "chosen" if row["chosen_source"] == "student" else "rejected"
                found.append(row[side])
            return found

        rounds = [answers(out / name) for name in ("round-1", "round-2", "after-2")]
        assert rounds[0] != rounds[1] != rounds[2]
        teachers = [
            {row["prompt"]: row[row["teacher_side"]] for row in load_pairs(out / name / "pairs")}
            for name in ("round-1", "round-2", "after-2")
        ]
        assert teachers[0] == teachers[1] == teachers[2]

    def test_metrics(self, whole):
        out, told, _ = whole
        rates, pairs = [], 0
        for record in [*told["rounds"], told["final"]]:
            rows = load_pairs(
                out / ("after-2" if record["stage"] == "sampled" else f"round-{record['round']}") / "pairs"
            )
            known = [row for row in rows if row["preference"] is not None]
            wins = [r["preference"] if r["teacher_side"] == "chosen" else 1 - r["preference"] for r in known]
            assert record["teacher_win_rate"] == pytest.approx(sum(wins) / len(wins))
            assert record["student_win_rate"] == pytest.approx(1 - sum(wins) / len(wins))
            assert record["new_pairs"] == len(rows)
            equal = sum(row["chosen"] == row["rejected"] for row in rows)
            assert record["equal_answers"] == equal == len(rows) - len(known)
            # Each answer as often as the student gave it
            of_known = sum(row["student_count"] * win for row, win in zip(known, wins, strict=True))
            ties = sum(row["student_count"] for row in rows if row["preference"] is None)
            preferred = (of_known + ties / 2) / sum(row["student_count"] for row in rows)
            assert record["teacher_preferred"] == pytest.approx(preferred)
            if record["stage"] == "trained":
                rates.append(preferred)
                pairs += len(rows)
                assert record["pairs"] == pairs
                assert record["regret"] == pytest.approx(sum(rate - 0.5 for rate in rates))
                assert (record["dual"], record["steps"]) == (1.0, 5)
                assert 0 <= record["accuracy"] <= 1
        assert 0 < rates[0] < 1, "the fakes decide nothing"
        c = (told["rounds"][0]["regret"] + told["rounds"][1]["regret"] * 2**0.5) / 3
        assert told["regret_coefficient"] == pytest.approx(c)
        assert told["final"]["round"] == 3

    def test_one_alone_is_the_offline_method(self, tiny_dir, tmp_path):
        """`build_pairs`, then `PbKDTrainer`: the same pairs, the same weights."""
        out = tmp_path / "out"
        make(out, tiny_dir, rounds=1).run()
        pairs = build_pairs(
            PROMPTS,
            teacher=Teacher(),
            student=LocalSampler(tiny_dir, SAMPLING),
            preference=Digits(),
            output_dir=tmp_path / "pairs",
            num_student_samples=2,
            show_progress=False,
        )
        assert load_pairs(out / "round-1/pairs").to_list() == pairs.to_list()
        trainer = PbKDTrainer(tiny_dir, args=config(tmp_path / "student"), train_dataset=pairs)
        trainer.train()
        trainer.save_model()
        assert_same(weights(out / "round-1/student"), weights(tmp_path / "student"))


def test_parts_of_the_prompts_in_turn(tiny_dir, tmp_path):
    rounds = make(tmp_path, tiny_dir, prompts_per_round=4)
    parts = [rounds.prompts_of(number)["prompt"] for number in (1, 2, 3)]
    assert [len(set(part)) for part in parts] == [4, 4, 4]
    order = [prompt for part in parts for prompt in part]
    assert set(order[:6]) == set(PROMPTS["prompt"])
    assert order == order[:6] * 2
    assert order[:6] != PROMPTS["prompt"]
    assert make(tmp_path, tiny_dir, prompts_per_round=4).prompts_of(2)["prompt"] == parts[1]
    assert make(tmp_path, tiny_dir, {"seed": 7}, prompts_per_round=4).prompts_of(1)["prompt"] != parts[0]
    assert make(tmp_path, tiny_dir).prompts_of(5)["prompt"] == PROMPTS["prompt"]


def test_newest_pairs_alone(whole, tiny_dir):
    out, told, _ = whole
    new = [record["new_pairs"] for record in told["rounds"]]
    assert len(make(out, tiny_dir).data(2)) == sum(new)
    assert make(out, tiny_dir, accumulate=False).data(2).to_list() == load_pairs(out / "round-2/pairs").to_list()


class TestReference:
    @pytest.mark.parametrize(("reference", "expected"), [("start", None), ("previous", "round-1/student")])
    def test_of_all_weights(self, reference, expected, whole, tiny_dir):
        out, _, _ = whole
        rounds = make(out, tiny_dir, reference=reference)
        trainer = rounds.trainer(2, rounds.data(2))
        is_ours = weights(Path(tiny_dir) if expected is None else out / expected)
        assert_same(trainer.ref_model.state_dict(), is_ours)
        assert_same(trainer.model.state_dict(), weights(out / "round-1/student"))

    def test_of_an_adapter(self, tiny_dir, tmp_path):
        rounds = make(tmp_path / "out", tiny_dir, peft_config=LoraConfig(**LORA))
        rounds.run()
        saved = weights(tmp_path / "out/round-1/student", "adapter_model.safetensors")
        for reference in ("start", "previous"):
            rounds = make(tmp_path / "out", tiny_dir, reference=reference, peft_config=LoraConfig(**LORA))
            trainer = rounds.trainer(2, rounds.data(2))
            mine = {
                name.replace(".default", ""): w for name, w in trainer.model.state_dict().items() if "lora" in name
            }
            assert_same(mine, saved)
            batch = next(iter(trainer.get_train_dataloader()))
            ours = trainer._reference_logps(
                {k: v for k, v in batch.items() if k not in ("preference", "teacher_side")}
            )
            model = LlamaForCausalLM.from_pretrained(tiny_dir)
            if reference == "previous":
                model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/round-1/student")
            expected = PbKDTrainer(
                str(tiny_dir), model, args=config(tmp_path / "other"), train_dataset=rounds.data(2)
            )._reference_logps({k: v for k, v in batch.items() if k not in ("preference", "teacher_side")})
            torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
        final = weights(tmp_path / "out", "adapter_model.safetensors")
        assert any(not torch.equal(final[name], saved[name]) for name in saved)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert any("lora" in name for name, _ in loaded.named_parameters())
        assert "| 2 | 6 |" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_one_schedule_over_all_rounds(kind, tiny_dir, tmp_path):
    """Learning rates, as used and as logged, are those of one training of as many steps; or those of each round alone."""
    rates: list[float] = []
    logged: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.extend([logs["learning_rate"]] if "learning_rate" in logs else [])

    settings = {"lr_scheduler_type": kind, "warmup_steps": 4}
    rounds = make(tmp_path / "all", tiny_dir, settings, rounds=3, callbacks=[Watch()])
    rounds.run()
    over_all = rates.copy()
    assert logged == over_all
    rates.clear()
    args = config(tmp_path / "long", **settings | {"max_steps": 15})
    PbKDTrainer(str(tiny_dir), args=args, train_dataset=rounds.data(1), callbacks=[Watch()]).train()
    assert over_all == pytest.approx(rates, rel=1e-12)
    rates.clear()
    make(tmp_path / "each", tiny_dir, settings, rounds=2, schedule="round", callbacks=[Watch()]).run()
    assert rates[:5] == rates[5:]
    assert rates[0] == 0.0


def test_a_schedule_that_becomes_longer_is_said(tiny_dir, tmp_path, caplog):
    caplog.set_level("WARNING", logger="trl_kd")
    make(tmp_path, tiny_dir, rounds=1).run()
    make(tmp_path, tiny_dir, rounds=1).run()
    assert not caplog.messages
    make(tmp_path, tiny_dir, rounds=2).run()
    assert (
        caplog.text.count("1 of the rounds are finished, with a learning rate that has gone through its schedule.")
        == 1
    )
    caplog.clear()
    told = make(tmp_path, tiny_dir, rounds=2).run()
    assert [record["schedule_rounds"] for record in told["rounds"]] == [1, 2]
    assert not caplog.messages


@pytest.mark.parametrize("schedule", ["all", "round"])
def test_a_carried_optimizer(schedule, tiny_dir, tmp_path, monkeypatch):
    """Of an adapter, with a moving λ; and an interruption changes nothing."""
    moving = {"dual_learning_rate": 0.5, "preference_nll_target": 0.01, "lr_scheduler_type": "linear"}
    options = {"optimizer": "carried", "prompts_per_round": 4, "schedule": schedule}
    began, ended = [], []
    begin, save = Carried.on_train_begin, Carried.save

    def beginning(self, args, state, control, optimizer=None, **kwargs):
        rates = [group["lr"] for group in optimizer.param_groups]
        begin(self, args, state, control, optimizer=optimizer, **kwargs)
        assert [group["lr"] for group in optimizer.param_groups] == rates
        began.append((state.global_step, rates[0], copy.deepcopy(optimizer.state_dict()["state"])))

    def saving(trainer, path):
        ended.append((trainer.optimizer.state_dict()["state"], trainer.dual.value, len(trainer.dual.history)))
        save(trainer, path)

    monkeypatch.setattr(Carried, "on_train_begin", beginning)
    monkeypatch.setattr(Carried, "save", staticmethod(saving))
    told = make(tmp_path / "one", tiny_dir, moving, **options, peft_config=LoraConfig(**LORA)).run()
    (steps, rate, state), (moments, dual, _) = began[0], ended[0]
    assert (len(began), steps, rate) == (1, 0, pytest.approx(1e-2 if schedule == "round" else 5e-3))
    assert moments.keys() == state.keys()
    for key in moments:
        assert_same(moments[key], state[key])
    assert dual != 1.0
    assert ended[1][2] == 10  # λ's history is that of both rounds
    assert {path.parent.name for path in tmp_path.glob("one/round-*/carried.pt")} == {"round-1", "round-2"}

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if "round-2" in args.output_dir and state.global_step == 3:
                raise InterruptedError

    parts = {"peft_config": LoraConfig(**LORA), **options}
    with pytest.raises(InterruptedError):
        make(tmp_path / "two", tiny_dir, moving, callbacks=[Stop()], **parts).run()
    assert make(tmp_path / "two", tiny_dir, moving, **parts).run() == told
    assert began[-1][0] == 2  # from a checkpoint
    name = "adapter_model.safetensors"
    assert_same(weights(tmp_path / "one", name), weights(tmp_path / "two", name))
    assert ended[3][1:] == ended[1][1:]
    # The last round can be done again, one before it cannot
    (tmp_path / "two/round-2/metrics.json").unlink()
    assert make(tmp_path / "two", tiny_dir, moving, **parts).run() == told
    (tmp_path / "two/round-2/metrics.json").unlink()
    (tmp_path / "two/round-1/carried.pt").unlink()
    with pytest.raises(ValueError, match=r"there is no `.*carried.pt`.* with a copy of the folder `teacher`"):
        make(tmp_path / "two", tiny_dir, moving, **parts).run()


# ---- Stopped and gone on -----------------------------------------------------------------------------------------------


def run_until_death(out, model, point):
    """One run that ends at one point, or not at all."""
    options = {}
    if point == "teacher":
        options["teacher"] = Teacher(dies_after=3)
    elif point == "student":
        answer = LocalSampler._answer
        count = []
        LocalSampler._answer = lambda *args: die() if len(count) > 4 else (count.append(0), answer(*args))[1]
    elif isinstance(point, tuple):
        options["callbacks"] = [DiesAt(*point)]
    elif point in ("before", "after"):  # what the round's record says it is
        note = RoundsFolder.note

        def deadly(folder, place, record):
            if record["stage"] == "sampled" or point == "after":
                note(folder, place, record)
            if record["stage"] == "trained":
                die()

        RoundsFolder.note = deadly
    else:
        RoundsFolder.publish = lambda *args: die()
    make(out, model, **options).run()


POINTS = ["teacher", "student", (1, 1), (1, 3), "before", "after", (2, 4), "publishing"]


def test_kill_9_anywhere(processes, whole, tiny_dir, tmp_path):
    expected, told, _ = whole
    out = tmp_path / "out"
    for point in POINTS:
        process = processes.Process(target=run_until_death, args=(out, tiny_dir, point))
        process.start()
        process.join()
        assert process.exitcode == -9, point
    assert make(out, tiny_dir).run() == told
    assert not list(out.glob("round-*/student/checkpoint-*"))
    for name in ("round-1", "round-2"):
        assert_same(weights(out / name / "student"), weights(expected / name / "student"))
    for name in ("round-1", "round-2", "after-2"):
        assert load_pairs(out / name / "pairs").to_list() == load_pairs(expected / name / "pairs").to_list()
    assert_same(weights(out), weights(expected))


class Paid(Digits):
    """Counts what it is asked, as a judge behind a server does."""

    def __init__(self):
        super().__init__()
        self.usage, self.own = Usage(), 0

    def score(self, prompts, completions, **columns):
        self.own += len(completions)
        self.usage.requests += len(completions)
        return super().score(prompts, completions, **columns)


def test_more_rounds_later(tiny_dir, tmp_path_factory, tmp_path):
    expected = tmp_path_factory.mktemp("expected")
    told = make(expected, tiny_dir, schedule="round").run()
    judges = [Paid(), Paid()]
    first = make(tmp_path, tiny_dir, rounds=1, schedule="round", preference=judges[0]).run()
    assert first["final"]["round"] == 2
    assert (
        first["final"]["student_win_rate"]
        == json.loads((tmp_path / "after-1/metrics.json").read_text())["student_win_rate"]
    )
    later = make(tmp_path, tiny_dir, rounds=2, schedule="round", preference=judges[1]).run()
    assert later == told
    assert judges[1].usage.requests == judges[0].own + judges[1].own  # caps hold for all rounds together
    assert min(judge.own for judge in judges) > 0
    assert_same(weights(tmp_path), weights(expected))
    before = (tmp_path / "round-2/student/model.safetensors").stat().st_mtime_ns
    assert make(tmp_path, tiny_dir, rounds=2, schedule="round").run() == told  # nothing is left to do
    assert (tmp_path / "round-2/student/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"`rounds` is 1, but .* holds 2"):
        make(tmp_path, tiny_dir, rounds=1, schedule="round").run()


@pytest.mark.parametrize(
    ("args", "changed", "said"),
    [
        ({"learning_rate": 2e-2}, {}, "`learning_rate` was 0.01 and is 0.02"),
        ({}, {"accumulate": False}, "`accumulate` was True and is False"),
        ({}, {"teacher": Source("teacher")}, None),
        ({}, {"teacher": Source("other")}, "`teacher.name` was 'teacher' and is 'other'"),
        ({}, {"prompts": PROMPTS.select(range(5))}, "`prompts.rows` was 6 and is 5"),
        ({}, {"num_student_samples": 3}, "`num_student_samples` was 2 and is 3"),
        ({"logging_steps": 2, "save_steps": 4}, {}, None),
    ],
)
def test_changed_settings(args, changed, said, whole, tiny_dir, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    rounds = make(tmp_path / "out", tiny_dir, args, **changed)
    if said is None:
        assert rounds.run()["rounds"] == whole[1]["rounds"]
    else:
        with pytest.raises(ValueError, match="Only `rounds` may be raised") as error:
            rounds.run()
        assert said in str(error.value)


def test_one_process_at_a_time(tiny_dir, tmp_path):
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out"), pytest.raises(StoreError, match=f"written by process {os.getpid()}"):
        make(tmp_path / "out", tiny_dir).run()


@pytest.mark.distributed
def test_two_processes_equal_one(processes, tiny_dir, tmp_path):
    exact = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    make(tmp_path / "one", tiny_dir, exact).run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    halves = exact | {"per_device_train_batch_size": 2}
    both = [processes.Process(target=run_rank, args=(k, port, tmp_path / "two", tiny_dir, halves)) for k in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    asked = Counter((tmp_path / "two.log").read_text().splitlines())
    assert set(asked.values()) == {1}  # by one of the two
    for name in ("round-1/pairs", "round-2/pairs"):
        assert load_pairs(tmp_path / "two" / name).to_list() == load_pairs(tmp_path / "one" / name).to_list()
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], weight, rtol=1e-4, atol=1e-5)
