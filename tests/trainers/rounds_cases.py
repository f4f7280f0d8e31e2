"""Rounds on tiny models, made the same way by the tests, by processes that are killed, and by two processes at once."""

import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.pairs.fakes import Source
from trl_kd import PbKDConfig, PbKDRounds
from trl_kd.preferences import ScoredPreference
from trl_kd.sampling import SamplingSettings


PROMPTS = Dataset.from_dict({"prompt": [f"{number}+1=" for number in range(6)]})
SAMPLING = SamplingSettings(max_new_tokens=6, seed=1)


class Digits(ScoredPreference):
    """The text with more digits wins: the teacher's or the student's, as it falls out."""

    def describe(self):
        return {"prefers": "digits"}

    def score(self, prompts, completions, **columns):
        return [float(sum(character.isdigit() for character in text)) for text in completions]


class Teacher(Source):
    """Few digits or many, and dies where it is told to."""

    def __init__(self, log=None, dies_after=None):
        super().__init__("teacher", log)
        self.dies_after = dies_after

    def text(self, request, sample):
        if self.dies_after is not None and self.given >= self.dies_after:
            die()
        return super().text(request, sample).removeprefix("teacher says ")


class DiesAt(TrainerCallback):
    """Dies at a step of a round, which the trainer's folder tells."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if f"round-{self.number}" in args.output_dir and state.global_step == self.step:
            die()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def config(output_dir, **changed) -> PbKDConfig:
    settings = {
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "dual_init": 1.0,
        "save_steps": 2,
        "dataloader_pin_memory": False,
    }
    return PbKDConfig(str(output_dir), **settings | changed)


def make(output_dir, model, args=None, **changed) -> PbKDRounds:
    parts = {
        "prompts": PROMPTS,
        "teacher": Teacher(),
        "preference": Digits(),
        "student": SAMPLING,
        "rounds": 2,
        "num_student_samples": 2,
        "show_progress": False,
    }
    return PbKDRounds(str(model), config(output_dir, **(args or {})), **parts | changed)


def run_rank(rank, port, output_dir, model, settings):
    """One of two processes, as a launcher starts them."""
    begin_rank(rank, port)
    rounds = make(output_dir, model, settings, teacher=Teacher(f"{output_dir}.log"))
    assert rounds.args.world_size == 2, rounds.args.world_size
    assert rounds.args.distributed_state.distributed_type == "MULTI_CPU"
    rounds.run()
    torch.distributed.destroy_process_group()


def begin_rank(rank, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


class Broken(Teacher):
    """Raises instead of answering."""

    def text(self, request, sample):
        raise ConnectionAbortedError("the teacher is gone")


def lose_main_process(rank, port, output_dir, model, fate):
    """One of two processes, of which the main one meets its `fate`; the other writes down how it ends."""
    begin_rank(rank, port)
    teacher = {"killed": Teacher(dies_after=3), "error": Broken()}.get(fate, Teacher())
    rounds = make(output_dir, model, teacher=teacher)
    if rank == 0:
        if fate == "absent":
            raise SystemExit(1)
        if fate == "trained":
            rounds._tidy = lambda number: die()
        rounds.run()
    try:
        rounds.run()
    except BaseException as error:
        Path(f"{output_dir}.said").write_text(f"{type(error).__name__}: {error}")
