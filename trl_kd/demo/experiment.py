"""The demo's experiment: one task and one seed, from an untrained teacher to distilled students."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_kd import __version__
from trl_kd.demo.methods import (
    FLIPPED,
    LEARNING_RATES,
    METHODS,
    VERIFIED,
    WHITE_BOX,
    Recipe,
    flip_labels,
    recipe,
)
from trl_kd.demo.stage import MARKER, stage
from trl_kd.evaluation.callback import ExactMatchCallback
from trl_kd.evaluation.metrics import Accuracy, exact_match
from trl_kd.pairs import build_pairs, load_pairs
from trl_kd.preferences.reward_function import RewardFunctionPreference
from trl_kd.sampling import SamplingSettings
from trl_kd.sampling.local import LocalSampler
from trl_kd.tasks import SPLITS, Question, Task
from trl_kd.tasks.models import make_model, make_tokenizer
from trl_kd.trainers.common.checkpoints import ending, last_checkpoint
from trl_kd.trainers.mm_pbkd.trainer import MMPbKDTrainer
from trl_kd.trainers.pbkd.trainer import PbKDTrainer


NAMES = METHODS | VERIFIED | WHITE_BOX

SAVE_STEPS = 200
"""Steps between two checkpoints, from which a stage that was cut off goes on."""


class NoWinner(ValueError):
    """No pair of a task has a winner."""


@dataclass(frozen=True)
class DemoSettings:
    """
    What the experiment does, apart from its task and its seed.

    Parameters:
        prompts (`int`): Questions that teacher and student answer for distillation.
        steps (`int`): Optimizer steps of each method.
        batch_size (`int`): Rows a step.
        learning_rate (`float`): Peak learning rate of each method, decayed to 0 linearly.
        learning_rates (`dict[str, float]`): The same of methods for which another one is better.
        flipped (`float`): Share of the strict labels that are flipped where methods learn from wrong labels.
        teacher_accuracy, start_accuracy (`float`): Share of right sampled answers at which pretraining stops.
        teacher_size, student_size (`tuple[int, int]`): Width and number of layers.
        pretraining_questions (`int`): Questions with right answers that both learn from before.
        pretraining_steps (`int`): Most optimizer steps of pretraining.
        pretraining_batch_size (`int`): Rows a step of pretraining.
        pretraining_learning_rate (`float`): Learning rate of pretraining, constant after 50 steps.
        test_questions (`int`): Unseen questions of the final table.
        test_samples (`int`): Answers sampled for each of them.
        temperatures (`tuple[float, ...]`): Those of which the best on validation questions is tested too.
        curve_questions (`int`): Validation questions at each point of a learning curve, and for each temperature.
        curve_every (`int`): Steps between two points.
    """

    prompts: int = 2000
    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 1e-3
    learning_rates: dict[str, float] = field(default_factory=lambda: dict(LEARNING_RATES))
    flipped: float = 0.2
    teacher_accuracy: float = 0.8
    start_accuracy: float = 0.35
    teacher_size: tuple[int, int] = (64, 2)
    student_size: tuple[int, int] = (40, 2)
    pretraining_questions: int = 10_000
    pretraining_steps: int = 4000
    pretraining_batch_size: int = 64
    pretraining_learning_rate: float = 1.5e-3
    test_questions: int = 1000
    test_samples: int = 4
    temperatures: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0)
    curve_questions: int = 300
    curve_every: int = 50


class Cell:
    """One task and one seed of the experiment, in a folder of its own.

    Args:
        task ([`Task`]): Task.
        seed (`int`): Seed of everything: weights, questions, samples, order of the data.
        settings ([`DemoSettings`]): Settings.
        folder (`Path`): Where the stages keep their files.
        make_bar (`Callable`, *optional*): Makes a progress bar, a callback, of a title and `goal`, the accuracy at
            which training stops or `None`.
        flipped (`bool`, *optional*, defaults to `False`): Whether methods learn from pairs of which a share has flipped
            labels. Teacher, start and pairs are the same; the students have a folder of their own.
        split (`str`, *optional*, defaults to `"test"`): Questions on which models are measured. `"validation"` takes others
            than those of the learning curves.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        settings: DemoSettings,
        folder: Path,
        make_bar: Callable[..., TrainerCallback] | None = None,
        flipped: bool = False,
        split: str = "test",
    ):
        self.task = task
        self.seed = seed
        self.settings = settings
        self.folder = folder
        self.make_bar = make_bar
        self.flipped = flipped
        self.split = split

    def run(self, methods: Iterable[str] = METHODS) -> dict[str, Any]:
        """Runs what is missing, and returns the results of every stage by its name."""
        results = {
            "teacher": stage(self.folder / "teacher", self._teacher),
            "start": stage(self.folder / "start", self._start),
            "pairs": stage(self.folder / "pairs", self._pairs),
        }
        for method in methods:
            results[method] = stage(self.stage_folder(method), partial(self._distil, method))
        return results

    def compare(self, white_box: bool = False) -> dict[str, Any]:
        """Runs what the demo shows. What a method learnt from labels of which a share is flipped is in its `flipped`."""
        results = self.run([*METHODS, *(WHITE_BOX if white_box else ())])
        wrong = Cell(self.task, self.seed, self.settings, self.folder, self.make_bar, flipped=True, split=self.split)
        found = wrong.run(FLIPPED)
        for method in FLIPPED:
            results[method]["flipped"] = found[method]
        return results

    def stage_folder(self, name: str) -> Path:
        """Where a stage keeps its files."""
        shared = not self.flipped or name in ("teacher", "start", "pairs")
        return self.folder / name if shared else self.folder / "flipped" / name

    def model_folder(self, name: str) -> Path:
        """Where the model of a stage is saved."""
        return self.stage_folder(name) / f"{self.task.name}-{name.replace('_', '-')}"

    # ---- Stages ----------------------------------------------------------------------------------------------------

    def _teacher(self, folder: Path) -> dict[str, Any]:
        return self._pretrain(folder, "teacher", self.settings.teacher_size, self.settings.teacher_accuracy, 2)

    def _start(self, folder: Path) -> dict[str, Any]:
        return self._pretrain(folder, "student", self.settings.student_size, self.settings.start_accuracy, 1)

    def _pretrain(self, folder: Path, title: str, size: tuple[int, int], accuracy: float, offset: int) -> dict:
        settings = self.settings
        tokenizer = make_tokenizer(self.task.alphabet)
        seed = 10 * self.seed + offset
        questions = self.task.questions("pretraining", settings.pretraining_questions, seed)
        rows = [{"prompt": q.prompt, "completion": q.answer} for q in questions]
        trainer = ending(SFTTrainer)(
            model=make_model(tokenizer, *size, seed=seed),
            args=self._arguments(
                SFTConfig,
                folder,
                seed=seed,
                max_steps=settings.pretraining_steps,
                per_device_train_batch_size=settings.pretraining_batch_size,
                learning_rate=settings.pretraining_learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=50,
                max_length=128,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=self._callbacks(f"{title} learns {self.task.name}", tokenizer, stop_at=accuracy),
        )
        return self._train_and_test(trainer, folder)

    def _pairs(self, folder: Path) -> dict[str, Any]:
        questions = self.task.questions("train", self.settings.prompts, self.seed)
        teacher, start = (
            LocalSampler(
                str(self.model_folder(name)),
                SamplingSettings(max_new_tokens=self.task.max_response_tokens, seed=10 * self.seed + number),
            )
            for number, name in enumerate(("teacher", "start"))
        )
        build_pairs(
            Dataset.from_dict(columns(questions)),
            teacher=teacher,
            student=start,
            preference=RewardFunctionPreference(self.task.score),
            output_dir=folder,
            show_progress=self.make_bar is not None,
        )
        summary = json.loads((folder / "summary.json").read_text())
        if summary["pairs"]["strict"] == 0:
            raise NoWinner(
                f"task {self.task.name!r}, seed {self.seed}: none of {len(questions)} pairs has a winner, so there is "
                "nothing that DPO could learn from. Let the teacher and the start differ more in accuracy, or take "
                "an easier task."
            )
        return summary["pairs"] | {"teacher_win_rate": summary["teacher_win_rate"]}

    def _distil(self, method: str, folder: Path) -> dict[str, Any]:
        return self._train_and_test(self.trainer(method, folder), folder)

    def trainer(self, method: str, folder: Path, callbacks: Iterable[TrainerCallback] = (), **changed) -> Any:
        """Ready to train the start by a method, with some of its settings changed."""
        settings = self.settings
        model, tokenizer = load(self.model_folder("start"))
        found = self.recipe(method, self.rows())
        told = self.task.name + (", wrong labels" if self.flipped else "")
        shared = {
            "per_device_train_batch_size": settings.batch_size,
            "learning_rate": self.learning_rate(method),
            "max_steps": settings.steps,
        }
        return ending(found.trainer)(
            model=model,
            args=self._arguments(found.config, folder, seed=self.seed, **{**shared, **found.settings, **changed}),
            train_dataset=found.data,
            processing_class=tokenizer,
            callbacks=[*self._callbacks(f"{NAMES.get(method, method)} on {told}", tokenizer), *callbacks],
            **found.arguments,
        )

    def rows(self) -> list[dict[str, Any]]:
        """The pairs, with the labels that methods learn from."""
        rows = load_pairs(self.folder / "pairs").to_list()
        return flip_labels(rows, self.settings.flipped, self.seed) if self.flipped else rows

    def learning_rate(self, method: str) -> float:
        """Of a method, at its peak."""
        return self.settings.learning_rates.get(method, self.settings.learning_rate)

    def recipe(self, method: str, rows: list[dict[str, Any]]) -> Recipe:
        """How to distil; benchmarks add ways of their own."""
        return recipe(method, rows, self.model_folder("teacher"), self.task)

    # ---- What they share -------------------------------------------------------------------------------------------

    def _arguments(self, config_class, folder: Path, **settings) -> Any:
        return config_class(
            output_dir=str(self.model_folder(folder.name)),
            logging_steps=10,
            save_steps=SAVE_STEPS,
            save_total_limit=1,
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            **settings,
        )

    def _callbacks(self, title: str, tokenizer, stop_at: float | None = None) -> list[TrainerCallback]:
        curve = ExactMatchCallback(
            tokenizer,
            columns(self.task.questions("validation", self.settings.curve_questions, self.seed)),
            self.task.score,
            self.task.max_response_tokens,
            # Pretraining is looked at more often, to stop close to its goal
            every=self.settings.curve_every // (1 if stop_at is None else 2),
            stop_at=stop_at,
        )
        return [curve] + ([self.make_bar(title, goal=stop_at)] if self.make_bar else [])

    def _train_and_test(self, trainer, folder: Path) -> dict[str, Any]:
        trainer.remove_callback(PrinterCallback)
        model_folder = self.model_folder(folder.name)
        trainer.train(resume_from_checkpoint=last_checkpoint(model_folder))
        tested = self._test(trainer.model, trainer.processing_class)
        if isinstance(trainer, (PbKDTrainer, MMPbKDTrainer)):
            trainer.card_results = self._card_results(tested)
        trainer.save_model()
        trainer.create_model_card(model_name=model_folder.name)
        self._explain_card(model_folder / "README.md")
        for checkpoint in model_folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return tested | {"steps": trainer.state.global_step, "log": trainer.state.log_history}

    def _card_results(self, tested: dict[str, Any]) -> dict[str, float | str]:
        others = {
            name: json.loads((self.folder / stage / MARKER).read_text())
            for name, stage in (("its start", "start"), ("its teacher", "teacher"))
        }
        return {
            f"{measure} exact match of {name} on {tested['questions']} unseen questions": result[measure]
            for measure in ("sampled", "greedy")
            for name, result in {"this model": tested, **others}.items()
        }

    def _explain_card(self, path: Path) -> None:
        """Says in the card that TRL wrote what the model is, and asks it a question that it was made for."""
        card = path.read_text(encoding="utf-8")
        question = self.task.questions("validation", 1, self.seed)[0]
        about = (
            f"A toy made by `trl-kd demo` (task `{self.task.name}`, seed {self.seed}), with one token a character. "
            f"It knows this task and nothing else: {self.task.description} Asked `{question.prompt}`, it should say "
            f"`{question.answer}`. It was trained on text that a program made, and is for looking at, not for "
            "use.\n\n"
        )
        card = re.sub(r'^question = ".*"$', lambda _: f"question = {question.prompt!r}", card, flags=re.MULTILINE)
        path.write_text(card.replace("## Quick start", f"{about}## Quick start", 1), encoding="utf-8")

    def _test(self, model, tokenizer) -> dict[str, Any]:
        settings = self.settings

        def measure(questions: list[Question], **how) -> tuple[Accuracy, list[str]]:
            arguments = (columns(questions), self.task.score, self.task.max_response_tokens)
            return exact_match(model, tokenizer, *arguments, seed=self.seed, **how)

        others = self.task.questions("validation", settings.curve_questions, self.seed)
        at = {t: measure(others, samples=settings.test_samples, temperature=t)[0] for t in settings.temperatures}
        temperature = max(at, key=lambda t: at[t].value)
        skipped = settings.curve_questions if self.split == "validation" else 0
        questions = self.task.questions(self.split, skipped + settings.test_questions, self.seed)[skipped:]
        sampled, answers = measure(questions, samples=settings.test_samples)
        best, _ = measure(questions, samples=settings.test_samples, temperature=temperature)
        greedy, greedy_answers = measure(questions, samples=0)
        values: dict[str, Any] = {}
        for name, found in {"sampled": sampled, "greedy": greedy, "best": best}.items():
            values |= {name: found.value, f"{name}_interval": [found.low, found.high]}
        return values | {
            "temperature": temperature,
            "questions": sampled.questions,
            "answers": answers[:10],
            "greedy_answers": greedy_answers[:10],
        }


def fingerprint(task: Task, settings: DemoSettings) -> dict[str, Any]:
    """Everything on which the results of a task depend but its seeds: settings, versions, and the task itself."""
    questions = json.dumps([task.questions(split, 20, seed=0) for split in SPLITS])
    return {
        **asdict(settings),
        "questions": hashlib.sha256(questions.encode()).hexdigest()[:12],
        "trl-kd": __version__,
        **{name: version(name) for name in ("trl", "transformers", "torch")},
    }


def columns(questions: list[Question]) -> dict[str, list[str]]:
    """Questions as columns `prompt` and `answer`."""
    return {name: [getattr(question, name) for question in questions] for name in Question._fields}


def load(folder: Path):
    """Loads a model and its tokenizer from a folder of this experiment."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
