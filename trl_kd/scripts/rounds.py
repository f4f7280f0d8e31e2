"""`trl-kd pbkd --rounds`: what the command adds to `PbKDRounds`, whose pairs are those of `trl-kd pairs`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, get_peft_config, get_quantization_config

from trl_kd.pairs.pairing import PairingSettings
from trl_kd.sampling.budget import BudgetExceeded
from trl_kd.sampling.server_errors import ServerError
from trl_kd.scripts.arguments import TrainingScriptArguments
from trl_kd.scripts.checks import check_model_source, check_training
from trl_kd.scripts.errors import InputError, bad_input, one_line
from trl_kd.scripts.pairs_arguments import PairsArguments
from trl_kd.scripts.pairs_build import (
    check_models,
    check_sampler,
    describe_prompts,
    load_prompts,
    make_preference,
    make_sampler,
)
from trl_kd.scripts.pairs_config import read_file
from trl_kd.scripts.training import model_init_kwargs, stopped_training
from trl_kd.trainers.common.teacher import Teacher
from trl_kd.trainers.pbkd.config import PbKDConfig


@dataclass
class PbKDScriptArguments(TrainingScriptArguments):
    """
    Arguments of `trl-kd pbkd` beside those of its model and its trainer.

    Parameters:
        rounds (`int`, *optional*):
            Rounds of sampling, labelling and training, in place of training on a dataset that exists.
        pairs_config (`str`, *optional*):
            YAML or JSON of the arguments of `trl-kd pairs`, without its student and `output_dir`: how pairs are made.
        prompts_per_round (`int`, *optional*):
            Prompts of each round; all of them by default.
        accumulate (`bool`, *optional*, defaults to `True`):
            Whether to train on the pairs of all rounds so far, or on the newest alone.
        reference (`str`, *optional*, defaults to `"start"`):
            Reference of each round: the `"start"`, or the student of the `"previous"` round.
        round_optimizer (`str`, *optional*):
            Whether each round's optimizer and λ begin `"fresh"`, or are `"carried"` on. By default as the rounds in
            `output_dir` were begun; in new ones `"carried"`, and `"fresh"` under FSDP and DeepSpeed.
        round_schedule (`str`, *optional*, defaults to `"all"`):
            Whether the learning rate's schedule goes over `"all"` rounds, or begins anew in each `"round"`.
    """

    rounds: int | None = field(
        default=None,
        metadata={
            "help": "Rounds of sampling the student, labelling and training, in place of a dataset that exists."
        },
    )
    pairs_config: str | None = field(
        default=None,
        metadata={
            "help": "With rounds: YAML or JSON of the arguments of trl-kd pairs, without its student and output_dir."
        },
    )
    prompts_per_round: int | None = field(
        default=None, metadata={"help": "With rounds: prompts of each round; all of them by default."}
    )
    accumulate: bool = field(
        default=True,
        metadata={
            "help": "With rounds: whether D is the pairs of all rounds so far; --no_accumulate: the newest alone."
        },
    )
    reference: str = field(
        default="start",
        metadata={
            "help": "With rounds: reference of each round, the start or the student of the previous round.",
            "choices": ["start", "previous"],
        },
    )
    round_optimizer: str | None = field(
        default=None,
        metadata={
            "help": "With rounds: whether each round's optimizer and dual variable begin fresh, or are carried on. By "
            "default as the rounds were begun; in new ones carried.",
            "choices": ["fresh", "carried"],
        },
    )
    round_schedule: str = field(
        default="all",
        metadata={
            "help": "With rounds: whether the learning rate's schedule goes over all rounds, or anew in each round.",
            "choices": ["all", "round"],
        },
    )


COMPANIONS = ("pairs_config", "prompts_per_round", "accumulate", "reference", "round_optimizer", "round_schedule")
_NOT_OF_ROUNDS = {
    **dict.fromkeys(("student", "student_column", "student_adapter", "student_model_init_kwargs"), "each round's student is "
                    "the one that it trains: drop it"),
    "output_dir": "the pairs are kept in `output_dir` of the training: drop it",
    **dict.fromkeys(("shard", "merge", "relabel", "dry_run"), "it is for `trl-kd pairs` alone: drop it"),
    **dict.fromkeys(("push_to_hub", "hub_dataset_id", "hub_private_repo"), "the pairs of rounds are not pushed: drop it"),
    "dataset_streaming": "rounds read the prompts again and again, in parts: drop it",
}  # fmt: skip
"""Arguments of `trl-kd pairs` that `pairs_config` may not set, and why."""


def check_companions(script_args: PbKDScriptArguments) -> None:
    """Raises for arguments that are for rounds, where there are none."""
    defaults = {f.name: f.default for f in fields(script_args)}
    for name in COMPANIONS:
        if getattr(script_args, name) != defaults[name]:
            raise InputError(
                f"`{name}` is {getattr(script_args, name)!r}, but `rounds` is not set: say how many, or drop it."
            )


def check_rounds(
    script_args: PbKDScriptArguments, training_args: PbKDConfig, model_args: ModelConfig, mixture: DatasetMixtureConfig
) -> None:
    """Raises for arguments of rounds that are missing or do not go together."""
    if script_args.rounds is not None and script_args.rounds < 1:
        raise InputError(f"`rounds` is {script_args.rounds}: it must be at least 1.")
    if script_args.pairs_config is None:
        raise InputError(
            "`pairs_config` is not set: rounds make their own pairs; give a YAML of `trl-kd pairs` that says of which "
            "prompts (`dataset_name`), teacher and `preference`."
        )
    for name, is_set in (
        ("dataset_name", script_args.dataset_name),
        ("dataset_config", script_args.dataset_config),
        ("dataset_streaming", script_args.dataset_streaming),
        ("datasets", mixture.datasets),
    ):
        if is_set:
            raise InputError(f"`{name}` is set, but with `rounds` the prompts are those of `pairs_config`: drop it.")
    if training_args.eval_strategy != "no":
        raise InputError(
            f"`eval_strategy` is {training_args.eval_strategy.value!r}, but rounds have no evaluation data here: use 'no', "
            "or `eval_dataset` of `trl_kd.PbKDRounds`."
        )
    if training_args.resume_from_checkpoint not in (None, "false", "False"):
        raise InputError(
            f"`resume_from_checkpoint` is {training_args.resume_from_checkpoint!r}, but rounds go on where they stopped by "
            "themselves: drop it."
        )
    check_training(training_args, model_args)
    assert model_args.model_name_or_path is not None
    check_model_source("model_name_or_path", model_args.model_name_or_path)
    Teacher.from_args(training_args, None)
    read_pairs_config(script_args, training_args, model_args)


def read_pairs_config(
    script_args: PbKDScriptArguments, training_args: PbKDConfig, model_args: ModelConfig
) -> PairsArguments:
    """The arguments of `trl-kd pairs` that `pairs_config` holds, with the student of the first round, checked."""

    def complete(args: PairsArguments) -> None:
        assert training_args.output_dir is not None
        args.student = model_args.model_name_or_path
        args.output_dir = str(Path(training_args.output_dir) / "round-1" / "pairs")

    assert script_args.pairs_config is not None
    return read_file(script_args.pairs_config, _NOT_OF_ROUNDS, complete)


def make_rounds(script_args: PbKDScriptArguments, training_args: PbKDConfig, model_args: ModelConfig) -> Any:
    """The `PbKDRounds` that the arguments describe; no weights are loaded for it."""
    from trl_kd.trainers.pbkd.counts import NothingTeaches
    from trl_kd.trainers.rounds.rounds import PbKDRounds
    from trl_kd.trainers.rounds.students import init_kwargs, round_seed

    class Rounds(PbKDRounds):
        """Input that is found to be bad on the way is one line too."""

        def trainer(self, number: int, data: Any) -> Any:
            with bad_input():
                try:
                    return super().trainer(number, data)
                except NothingTeaches as nothing:
                    if number == 1:
                        raise
                    end = nothing
            raise end  # of the rounds, which is no error

        def data(self, *args: Any) -> Any:
            with bad_input():
                return super().data(*args)

        def _compare(self, *args: Any) -> Any:
            with bad_input():
                return super()._compare(*args)

    pairs = read_pairs_config(script_args, training_args, model_args)
    pairs.reasoning = pairs.reasoning or training_args.reasoning  # type: ignore[assignment]
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    quantization, peft = get_quantization_config(model_args), get_peft_config(model_args)
    seed = 2 * pairs.seed + 1 if pairs.student_seed is None else pairs.student_seed

    def student(model: str, number: int) -> Any:
        options = init_kwargs(training_args, is_start=number == 1 or peft is not None)
        options |= {} if quantization is None else {"quantization_config": quantization}
        changed: dict[str, Any] = {"student_model_init_kwargs": options, "student_seed": round_seed(seed, number)}
        return make_sampler(replace(pairs, student=model, **changed), "student")

    name = model_args.model_name_or_path
    assert name is not None
    assert script_args.rounds is not None
    teacher, first = make_sampler(pairs, "teacher"), student(name, 1)
    check_models(pairs, {"teacher": teacher})
    check_sampler("model_name_or_path", name, first)
    chosen: dict[str, Any] = {
        key: getattr(script_args, key) for key in ("prompts_per_round", "accumulate", "reference")
    }
    chosen |= {"optimizer": script_args.round_optimizer, "schedule": script_args.round_schedule}
    pairing_seed = pairs.seed if pairs.pairing_seed is None else pairs.pairing_seed
    return Rounds(
        name,
        training_args,
        prompts=load_prompts(pairs),
        teacher=teacher,
        preference=make_preference(pairs, first),
        student=student,
        rounds=script_args.rounds,
        **chosen,
        **{key: getattr(pairs, key) for key in ("num_teacher_samples", "num_student_samples")},
        **PairingSettings(
            pairs.policy, pairs.max_pairs_per_prompt, pairs.truncated, pairing_seed, pairs.reasoning
        ).describe(),
        quantization_config=quantization,
        peft_config=peft,
        prompts_from=describe_prompts(pairs),
    )


_WORDS = {"`optimizer`": "`round_optimizer`", "`schedule`": "`round_schedule`"}
"""What `PbKDRounds` says in Python's words, and how the command says it."""


def checked_rounds(
    script_args: PbKDScriptArguments,
    training_args: PbKDConfig,
    model_args: ModelConfig,
    processes: int | None = None,
) -> Any:
    """As `make_rounds`, and compared with what `output_dir` holds; what is refused is said in the command's words. Where the
    rounds will run in other `processes` than these, it is said how many."""
    try:
        rounds = make_rounds(script_args, training_args, model_args)
        rounds.num_processes = processes or rounds.num_processes
        rounds.check()
    except ValueError as error:
        text = str(error)
        for theirs, ours in _WORDS.items():
            text = text.replace(theirs, ours)
        raise InputError(one_line(text)) from error
    return rounds


def run_rounds(script_args: PbKDScriptArguments, training_args: PbKDConfig, model_args: ModelConfig) -> int:
    """Runs the rounds, writes their report, and pushes the student where `push_to_hub` says so."""
    from accelerate import PartialState

    with bad_input():
        rounds = checked_rounds(script_args, training_args, model_args)
    with _said(), stopped_training(training_args.output_dir, goes_on=True):
        rounds.run()
    state = PartialState()
    if state.is_main_process:
        print(f"Model saved to {training_args.output_dir}.")
        _write_report(training_args.output_dir)
        if training_args.push_to_hub:
            print(f"Model pushed to the Hub: {rounds.push_to_hub()}.")
    state.destroy_process_group()
    return 0


@contextmanager
def _said() -> Iterator[None]:
    """What stops the rounds from outside is one line, and what there is, is kept."""
    try:
        yield
    except (BudgetExceeded, ServerError) as error:
        raise InputError(one_line(error)) from error
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept: the same command goes on from here.", file=sys.stderr)
        raise


def _write_report(output_dir: str | None) -> None:
    from trl_kd.evaluation.rounds_report import write_rounds_report

    assert output_dir is not None
    try:
        print(f"Report: {write_rounds_report(output_dir)}")
    except ImportError as error:  # the student is there, and the page can be made later
        print(f"No report page: {error}", file=sys.stderr)
