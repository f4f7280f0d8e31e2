"""`PbKDRounds`: online preference-based knowledge distillation with the implicit reward, as a loop over what there is.

Each round samples the student as it is now, and its teacher, has the answers compared, adds the pairs to the data D, and
trains the student on it with `PbKDTrainer`.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import HfApi
from transformers import TrainerCallback

from trl_kd.pairs import build_pairs, load_pairs
from trl_kd.pairs.dataset import join_pairs
from trl_kd.pairs.fetched import FetchedAnswers
from trl_kd.preferences import Preference
from trl_kd.sampling import Sampler, SamplingSettings
from trl_kd.trainers.common.card import public_name
from trl_kd.trainers.common.checkpoints import last_checkpoint
from trl_kd.trainers.common.main_process import Claim, claim
from trl_kd.trainers.pbkd.config import PbKDConfig, settle_config
from trl_kd.trainers.pbkd.counts import NothingTeaches
from trl_kd.trainers.pbkd.trainer import PbKDTrainer
from trl_kd.trainers.rounds.card import add_rounds_section
from trl_kd.trainers.rounds.checks import check_rounds, describe_rounds, no_pairs, resume_rounds_usage
from trl_kd.trainers.rounds.folder import (
    CARD_RESULTS,
    ENDED,
    RECORD,
    SAMPLED,
    TRAINED,
    RoundsFolder,
    late_means,
    told_of_round,
)
from trl_kd.trainers.rounds.regret import count_equal, cumulative_regret, teacher_preferred
from trl_kd.trainers.rounds.students import (
    CARRIED,
    Carried,
    LastStepLogged,
    RoundTrainer,
    default_student,
    free,
    init_kwargs,
    load_adapter,
    load_reference,
)


class PbKDRounds:
    """
    Online preference-based knowledge distillation, from [Online Knowledge Distillation with Reward
    Guidance](https://huggingface.co/papers/2505.18952), with the student's implicit reward: rounds of sampling the current
    student, labelling its answers against the teacher's, growing the pairs, and training on them with [`PbKDTrainer`].

    Everything is kept in `args.output_dir`: `round-1/` with its `pairs/`, `student/` and `metrics.json`, and so on;
    `teacher/`, the teacher's answers, each asked for once; `rounds.json`, all of the metrics; and the last student itself.
    The same call goes on where it stopped, even after `kill -9`, and with more `rounds`.

    Example:

    ```python
    from datasets import Dataset
    from trl_kd import PbKDConfig, PbKDRounds
    from trl_kd.preferences.simple import TeacherWins
    from trl_kd.sampling import SamplingSettings
    from trl_kd.sampling.local import LocalSampler

    rounds = PbKDRounds(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=PbKDConfig("student", num_train_epochs=1),
        prompts=Dataset.from_dict({"prompt": ["1+1=", "2+3=", "40+2="]}),
        teacher=LocalSampler("Qwen/Qwen2.5-7B-Instruct", SamplingSettings(max_new_tokens=8)),
        preference=TeacherWins(),
        student=SamplingSettings(max_new_tokens=8, seed=1),
        rounds=3,
    )
    rounds.run()
    ```

    Args:
        model (`str`):
            The student at the start, a Hub id or a folder. It is the reference of every round, unless `reference` says else.
        args ([`PbKDConfig`]):
            Settings of each round's training: its number of steps or epochs is that of *one* round. `output_dir` is the
            folder of the whole. The seed of round k is `seed` + k − 1.
        prompts (`Dataset`):
            Rows with a `prompt`, text or messages, and any other columns, as in [`build_pairs`].
        teacher (`Sampler`):
            Who is imitated. Each of its answers is asked for once, and reused in every round that meets the prompt.
        preference (`Preference`):
            Who says which of two answers is better.
        student ([`SamplingSettings`] or `Callable[[str, int], Sampler]`, *optional*):
            How the student of a round is sampled: settings of a [`LocalSampler`], whose seed each round moves on, so that a
            prompt met again is answered anew; or a function of the model's name (a folder from the second round on) and the
            round's number 1, 2, … that returns a sampler.
        rounds (`int`, *optional*, defaults to `6`):
            How many.
        prompts_per_round (`int`, *optional*):
            Prompts of each round: consecutive parts of one order, drawn by `args.seed`, from the beginning again at its end.
            `None` takes all of them in each round.
        accumulate (`bool`, *optional*, defaults to `True`):
            Whether D is the pairs of all rounds so far, or those of the newest alone.
        reference (`str`, *optional*, defaults to `"start"`):
            π_ref of each round: the `"start"`, or the student of the `"previous"` round.
        optimizer (`str`, *optional*):
            Whether each round begins with a `"fresh"` optimizer and λ at `dual_init`, or moments and λ are `"carried"` on
            from the round before. By default as the rounds in `output_dir` were begun; in new ones `"carried"`, and
            `"fresh"` under FSDP and DeepSpeed.
        schedule (`str`, *optional*, defaults to `"all"`):
            Whether the learning rate runs through its schedule once over `"all"` rounds, warm-up in the first and decay to
            the last, or anew in each `"round"`; q of the imitation term likewise through its warm-up. With more `rounds`
            than before, it is the schedule of them all.
        num_teacher_samples, num_student_samples (`int`, *optional*, defaults to `1`):
            Answers of each to a prompt, in each round.
        eval_dataset (`Dataset`, *optional*), quantization_config, peft_config, callbacks (*optional*):
            As [`PbKDTrainer`] takes them; each round's trainer gets them. With LoRA the start stays as it is and its adapter
            goes on from round to round.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show bars, and print a line after each round.
        **pairs_options:
            Further arguments of [`build_pairs`]: `policy`, `max_pairs_per_prompt`, `truncated`, `seed`, `label_batch_size`,
            `prompts_from`.

    Raises:
        `ValueError`, `TypeError`: what cannot work, before any weight is loaded.
    """

    def __init__(
        self,
        model: str,
        args: PbKDConfig | None = None,
        *,
        prompts: Dataset,
        teacher: Sampler,
        preference: Preference,
        student: SamplingSettings | Callable[[str, int], Sampler] | None = None,
        rounds: int = 6,
        prompts_per_round: int | None = None,
        accumulate: bool = True,
        reference: Literal["start", "previous"] = "start",
        optimizer: Literal["fresh", "carried"] | None = None,
        schedule: Literal["all", "round"] = "all",
        num_teacher_samples: int = 1,
        num_student_samples: int = 1,
        eval_dataset: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        show_progress: bool = True,
        **pairs_options: Any,
    ):
        self.model = model
        self.args = settle_config(args, model)
        self.prompts = prompts
        self.preference = preference
        self.rounds = rounds
        self.prompts_per_round = prompts_per_round
        self.accumulate = accumulate
        self.reference = reference
        self.optimizer = optimizer
        self.schedule = schedule
        self.num_teacher_samples = num_teacher_samples
        self.num_student_samples = num_student_samples
        self.eval_dataset = eval_dataset
        self.quantization_config = quantization_config
        self.peft_config = peft_config
        self.callbacks = list(callbacks or [])
        self.show_progress = show_progress
        if self.args.reasoning is not None:
            pairs_options.setdefault("reasoning", self.args.reasoning)
        self.pairs_options = pairs_options
        self.num_processes = PartialState().num_processes
        self.folder = RoundsFolder(self.args.output_dir)
        if student is None or isinstance(student, SamplingSettings):
            settings = student or SamplingSettings(seed=1)
            student = default_student(settings, self.args, quantization_config, peft_config is not None)
        self.student = student
        looked_up = getattr(teacher, "is_lookup", True)  # anything else is refused below
        self.teacher: Any = teacher
        if not looked_up:
            made = [self.folder.round(1) / RECORD]
            self.teacher = FetchedAnswers(teacher, self.folder.teacher, num_teacher_samples, made=made)
        check_rounds(self)

    def run(self) -> dict[str, Any]:
        """
        Runs the rounds that are not finished, and saves the last student in `output_dir`. A round after the first in which
        no row teaches ends them: the student of the round before is the last.

        Returns:
            `dict[str, Any]`: What `rounds.json` holds: `rounds`, the metrics of each; `final`, the last student's own win
            rate; and `regret_coefficient`. See docs/rounds.md.

        Raises:
            `ValueError`: `output_dir` holds rounds of other settings; the message names what differs.
            `StoreError`: another run writes `output_dir`.
            `MainProcessEnded`: in another than the main process, which has ended.
        """
        with self._begun():
            for number in range(1, self.rounds + 1):
                if self.folder.stage(number) not in (TRAINED, ENDED):
                    self._sample(number)
                    self._train(number, self.data(number))
                if self.folder.stage(number) == ENDED:
                    break
            self._finish()
        return self._report()

    # ---- A round, step by step -------------------------------------------------------------------------------------

    def check(self) -> dict[str, Any]:
        """
        Compares these rounds with what `output_dir` holds, and returns their settings as `rounds.json` has them.

        Raises:
            `ValueError`: `output_dir` holds rounds of other settings; the message names what differs.
        """
        settings = describe_rounds(self)
        self.folder.check(settings, self.rounds)
        return settings

    def student_of(self, number: int) -> str:
        """The model that round `number` = 1, 2, … samples and then trains: the start, or what the round before has saved."""
        return self.model if number == 1 else str(self.folder.student(number - 1))

    def prompts_of(self, number: int) -> Dataset:
        """The prompts of a round."""
        if self.prompts_per_round is None:
            return self.prompts
        order = np.random.default_rng(self.args.seed).permutation(len(self.prompts))
        start = (number - 1) * self.prompts_per_round
        return self.prompts.select(order[np.arange(start, start + self.prompts_per_round) % len(order)])

    def data(self, number: int) -> Dataset:
        """D as round `number` trains on it: the pairs of all rounds so far, or its own. A `ValueError` if there is none."""
        numbers = range(1, number + 1) if self.accumulate else [number]
        data = join_pairs([self.folder.pairs(k) for k in numbers])
        if not len(data):
            raise no_pairs(self, number)
        return data

    def trainer(self, number: int, data: Dataset) -> PbKDTrainer:
        """The trainer of a round, ready to train the student of the one before on `data`."""
        given: dict[str, Any] = {"args": self._args(number), "train_dataset": data, "eval_dataset": self.eval_dataset}
        given |= {"callbacks": [*self.callbacks, LastStepLogged()], "quantization_config": self.quantization_config}
        make = self._full_trainer if self.peft_config is None else self._adapter_trainer
        trainer = make(self.student_of(number), number == 1, given)
        if self.schedule == "all":
            trainer.number, trainer.rounds = number, self.rounds
        if self.optimizer == "carried" and number > 1:
            carried = Carried(self.folder.round(number - 1) / CARRIED)
            carried.check(self.args)
            trainer.add_callback(carried)
            trainer.dual.load_state_dict(carried.state["dual"])
        name = self.teacher.describe().get("model")
        trainer.card_teacher = public_name(name) if name else None
        return trainer

    def _full_trainer(self, student: str, is_first: bool, given: dict[str, Any]) -> RoundTrainer:
        reference, ref_model = student if self.reference == "previous" else self.model, None
        if self.args.has_preference_term:
            ref_model = load_reference(reference, self.args, is_start=reference == self.model)
        trainer = RoundTrainer(student, ref_model, **given)
        trainer.model.config._name_or_path = self.model  # what its card is to call its base model
        return trainer

    def _adapter_trainer(self, student: str, is_first: bool, given: dict[str, Any]) -> RoundTrainer:
        ref_model = None  # which is the start, without its adapter
        if self.reference == "previous" and not is_first:
            ref_model = load_reference(self.model, self.args, is_start=True, adapter=student)
        trainer = RoundTrainer(self.model, ref_model, peft_config=copy.deepcopy(self.peft_config), **given)
        if not is_first:
            load_adapter(trainer.model, student)
        return trainer

    def _args(self, number: int) -> PbKDConfig:
        args = copy.copy(self.args)
        args.output_dir = str(self.folder.student(number))
        args.seed = self.args.seed + number - 1
        args.push_to_hub, args.resume_from_checkpoint = False, None
        args.model_init_kwargs = init_kwargs(self.args, is_start=number == 1 or self.peft_config is not None) or None
        return args

    def _sample(self, number: int) -> None:
        """Student and teacher answer the round's prompts, and the preference compares them."""
        folder = self.folder
        if PartialState().is_main_process and folder.stage(number) is None:
            told = self._compare(number, self.prompts_of(number), folder.pairs(number))
            rates = [record["teacher_preferred"] for record in [*folder.records(), told]]
            earlier = sum(record["new_pairs"] for record in folder.records()) if self.accumulate else 0
            told |= {"pairs": earlier + told["new_pairs"], "regret": cumulative_regret(rates)}
            folder.note(folder.round(number), {"round": number, "stage": SAMPLED, **told})
        self._claim.wait_until(lambda: folder.stage(number) is not None)

    def _compare(self, number: int, prompts: Dataset, output_dir: Path) -> dict[str, Any]:
        student = self.student(self.student_of(number), number)
        is_fetched = isinstance(self.teacher, FetchedAnswers)
        if is_fetched:
            self.teacher.fetch(prompts, self.show_progress)
        build_pairs(
            prompts,
            teacher=self.teacher,
            student=student,
            preference=self.preference,
            output_dir=output_dir,
            num_teacher_samples=self.num_teacher_samples,
            num_student_samples=self.num_student_samples,
            **{"show_progress": self.show_progress, **self.pairs_options},
        )
        summary = json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))
        rate, pairs = summary["teacher_win_rate"], load_pairs(output_dir)
        return {
            "prompts": len(prompts),
            "teacher_win_rate": rate,
            "student_win_rate": None if rate is None else 1 - rate,
            "teacher_win_interval": summary["teacher_win_interval"],
            "teacher_pairs": summary["teacher_pairs"],
            "equal_answers": count_equal(pairs),
            "teacher_preferred": teacher_preferred(pairs),
            "teacher_answers": self.teacher.count() if is_fetched else None,
            "new_pairs": summary["pairs"]["total"],
        }

    def _train(self, number: int, data: Dataset) -> None:
        """Trains a round's student, saves it with its card, and writes down how it went."""
        folder = self.folder
        try:
            trainer = self.trainer(number, data)
        except NothingTeaches as nothing:
            if number == 1:
                raise
            self._end(number, nothing.told)
            return
        trainer.train(resume_from_checkpoint=last_checkpoint(folder.student(number)))
        steps = trainer.state.global_step
        record = (folder.record(folder.round(number)) or {}) | late_means(trainer.state.log_history, steps)
        record |= {"stage": TRAINED, "steps": steps, "schedule_rounds": trainer.rounds}
        texts = trainer.text_counts.get("train")
        record["advantage"] = None if texts is None else texts.advantage
        trainer.save_model()
        trainer.card_results = {CARD_RESULTS[k]: record[k] for k in CARD_RESULTS if record[k] is not None}
        trainer.create_model_card(model_name=folder.path.name)
        if PartialState().is_main_process:
            if self.optimizer == "carried":
                Carried.save(trainer, folder.round(number) / CARRIED)
            folder.note(folder.round(number), record)
            self._tidy(number)
            self._say(record)
            self._report()
        free(trainer)
        self._claim.wait_until(lambda: folder.stage(number) == TRAINED)

    def _end(self, number: int, why: str) -> None:
        """Writes down that a round has nothing to teach. Its pairs have measured the student, which stays as it is."""
        folder = self.folder
        if PartialState().is_main_process:
            said = (
                f"No row of the data of round {number} teaches ({why}): the rounds end, and the student stays as it is"
            )
            record = folder.record(folder.round(number)) or {}
            folder.note(folder.round(number), record | {"stage": ENDED, "ended": f"{said}."})
        self._claim.wait_until(lambda: folder.stage(number) == ENDED)

    def _tidy(self, number: int) -> None:
        """Removes what was there to go on from, in a round that is finished; this one can still be done again."""
        for checkpoint in self.folder.student(number).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (self.folder.round(number - 2) / CARRIED).unlink(missing_ok=True)

    @property
    def hub_name(self) -> str:
        """The repository that `push_to_hub` pushes to."""
        return self.args.hub_model_id or self.folder.path.resolve().name

    def push_to_hub(self) -> str:
        """Pushes the last student, with its card and what the rounds said, as `args` has it; returns the repository's name.
        The folders of the rounds stay here."""
        args = self.args
        api = HfApi(token=args.hub_token)
        repo = api.create_repo(self.hub_name, private=args.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=self.folder.path,
            revision=args.hub_revision,
            ignore_patterns=["*/*", ".*", "_*"],
            commit_message="Student of rounds, by trl-kd",
        )
        return repo.repo_id

    # ---- Begin and end ---------------------------------------------------------------------------------------------

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """The folder, found to be that of these rounds, and claimed: nobody else writes it meanwhile."""
        self._settings = self.check()
        self._claim: Claim
        with claim(self.folder.path) as self._claim:
            if PartialState().is_main_process:
                self._report()
                for record in self.folder.records():
                    if record["stage"] == TRAINED:
                        self._tidy(record["round"])
                resume_rounds_usage(self)
            yield

    def _finish(self) -> None:
        """The last student answers the last round's prompts too, which nobody trains on, and is saved as the result. One
        that a further round has measured, and not trained, is saved as it is."""
        folder, number = self.folder, self.rounds + 1
        ended = folder.ended()
        if ended is not None and ended["round"] <= self.rounds:
            if PartialState().is_main_process:
                self._say(ended)
                folder.publish(ended["round"] - 1)
                add_rounds_section(str(folder.path / "README.md"), self._report())
            return
        place = folder.after(self.rounds)
        if PartialState().is_main_process:
            if folder.record(place) is None:
                told = self._compare(number, self.prompts_of(self.rounds), place / "pairs")
                folder.note(place, record := {"round": number, "stage": SAMPLED, **told})
                self._say(record)
            folder.publish(self.rounds)
            add_rounds_section(str(folder.path / "README.md"), self._report())
        self._claim.wait_until(lambda: folder.record(place) is not None)

    def _report(self) -> dict[str, Any]:
        if not PartialState().is_main_process:
            return self.folder.told(self._settings, self.rounds)
        return self.folder.report(self._settings, self.rounds)

    def _say(self, record: dict[str, Any]) -> None:
        if self.show_progress:
            print(told_of_round(record, self.rounds), flush=True)
