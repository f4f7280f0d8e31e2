"""The folder of rounds: what is where, what is finished, and the settings that it was begun with."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from trl_kd.pairs.differences import differences, listed
from trl_kd.pairs.places import written_whole
from trl_kd.sampling.recorded import recorded_settings
from trl_kd.trainers.common.config_checks import without_keys
from trl_kd.trainers.pbkd.config import PbKDConfig
from trl_kd.trainers.rounds.regret import regret_coefficient


RECORD, REPORT = "metrics.json", "rounds.json"
SAMPLED, TRAINED, ENDED = "sampled", "trained", "ended"
"""Stages of a round, as its record has them: its pairs are finished, its student is; or no row of them teaches, so that the
student that came into it is the last one."""

LOGGED = {
    "accuracy": "rewards/accuracies",
    "dual": "pbkd/dual",
    "imitation": "pbkd/imitation",
    "preference_nll": "pbkd/preference_nll",
}
"""What a round's record has of its trainer's logs."""

CARD_RESULTS = {
    "student_win_rate": "win rate against the teacher, before this round",
    "accuracy": "preference accuracy on the training pairs, in its second half",
}

_NOT_COMPARED = {
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug", "skip_memory_metrics", "push_to_hub"),
    *(
        "resume_from_checkpoint",
        "local_rank",
        "use_cpu",
        "do_train",
        "do_eval",
        "do_predict",
        "per_device_eval_batch_size",
    ),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "dataset_num_proc", "torch_empty_cache_steps"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *(
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
    ),
    *("include_for_metrics", "include_num_input_tokens_seen", "batch_eval_metrics", "prediction_loss_only"),
}
_OF_PAIRS = {
    *("model", "prompts", "teacher", "student", "preference", "pairs", "prompts_per_round", "seed"),
    *("num_teacher_samples", "num_student_samples", "quantization_config", "model_init_kwargs", "trust_remote_code"),
}
"""Settings that the first round's pairs depend on."""
_NOT_COMPARED_PREFIXES = ("logging_", "log_", "eval_", "save_", "hub_", "ddp_", "trackio_")


class RoundsFolder:
    """
    Where `PbKDRounds` keeps its work. A record is written whole or not at all, after what it speaks of.

    Args:
        path (`str` or `Path`):
            The `output_dir` of all rounds; made when first written to.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.teacher = self.path / "teacher"

    def round(self, number: int) -> Path:
        return self.path / f"round-{number}"

    def after(self, number: int) -> Path:
        """Where the student of a round is measured, as the last one."""
        return self.path / f"after-{number}"

    def pairs(self, number: int) -> Path:
        return self.round(number) / "pairs"

    def student(self, number: int) -> Path:
        return self.round(number) / "student"

    def record(self, place: Path) -> dict[str, Any] | None:
        """What is written of a round, or of the final measurement; `None` before its pairs are finished."""
        return _read(place / RECORD)

    def records(self) -> Iterator[dict[str, Any]]:
        """Those of the rounds, in order. One in which nothing teaches is none of them: it has measured the last student."""
        number = 1
        while (record := self.record(self.round(number))) is not None and record["stage"] != ENDED:
            yield record
            number += 1

    def ended(self) -> dict[str, Any] | None:
        """The record of the round in which nothing teaches any more, which comes after the last."""
        record = self.record(self.round(1 + sum(1 for _ in self.records())))
        return record if record is not None and record["stage"] == ENDED else None

    def note(self, place: Path, record: dict[str, Any]) -> None:
        write_json(place / RECORD, record)

    def stage(self, number: int) -> str | None:
        """How far a round has got: `None`, `SAMPLED`, `TRAINED` or `ENDED`."""
        return (self.record(self.round(number)) or {}).get("stage")

    @property
    def begun_with(self) -> dict[str, Any]:
        """The settings of the rounds that are here; empty where there are none."""
        settings = recorded_settings((_read(self.path / REPORT) or {}).get("settings", {}))
        return settings | without_keys(settings)

    def check(self, settings: dict[str, Any], rounds: int) -> None:
        """
        Compares today's settings, JSON, with those that the folder was begun with. Before anything is trained, those of
        training alone may change.

        Raises:
            `ValueError`: one has changed, or more rounds are there than are asked for; the message names the field.
        """
        before = self.begun_with or settings
        before = {"num_processes": settings["num_processes"]} | before  # which earlier versions did not write down
        compared = {*before, *settings} if self._has_trained() else _OF_PAIRS
        changes = [c for name in sorted(compared) for c in _changes(before, settings, name)]
        if changes:
            raise ValueError(
                f"`{self.path}` holds rounds that were made with other settings: set it back, or give another `output_dir`. "
                f"Only `rounds` may be raised. {listed(changes)}. A copy of the folder `teacher` in a new `output_dir` "
                "keeps the teacher's answers from being asked for again."
            )
        there = sum(1 for _ in self.records())
        if there > rounds:
            raise ValueError(
                f"`rounds` is {rounds}, but `{self.path}` holds {there}: ask for {there} at least, or give another "
                "`output_dir`."
            )

    def _has_trained(self) -> bool:
        return self.stage(1) == TRAINED or any(self.student(1).glob("checkpoint-*"))

    def told(self, settings: dict[str, Any], last: int) -> dict[str, Any]:
        """All records in one. `last` is the round after which the student is measured once more."""
        records = list(self.records())
        return {
            "settings": settings,
            "rounds": records,
            "final": self.record(self.after(last)) or self.ended(),
            "regret_coefficient": regret_coefficient([record["regret"] for record in records]),
        }

    def report(self, settings: dict[str, Any], last: int) -> dict[str, Any]:
        """Writes `rounds.json`, all records in one, and returns it."""
        told = self.told(settings, last)
        write_json(self.path / REPORT, told)
        return told

    def publish(self, number: int) -> None:
        """Copies the student of a round to the folder itself, so that it loads from there."""
        for file in sorted(self.student(number).iterdir()):
            if file.is_file():
                shutil.copy2(file, self.path / file.name)


def compared_settings(args: Any) -> dict[str, Any]:
    """The fields of a training config that decide what comes out, as JSON."""
    names = [f.name for f in fields(args) if f.name not in _NOT_COMPARED]
    values = {name: getattr(args, name) for name in names if not name.startswith(_NOT_COMPARED_PREFIXES)}
    return as_json(values | without_keys(values))


def as_json(value: Any) -> Any:
    """As it will be read again."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _changes(before: dict[str, Any], now: dict[str, Any], name: str) -> Iterator[str]:
    """What differs in one setting. Other versions of trl-kd, TRL or transformers have other fields: one that is new had its
    default before, and one that is gone cannot be set back."""
    if name in now:
        yield from differences(before.get(name, _default(name)), now[name], name)


def _default(name: str) -> Any:
    field = PbKDConfig.__dataclass_fields__.get(name)
    if field is None or field.default is MISSING:
        return None if field is None or field.default_factory is MISSING else as_json(field.default_factory())
    return as_json(field.default)


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"`{path}` is damaged ({error}): put a copy of it back, or move it away. Then a round is done again from the "
            f"answers that are stored, and `{REPORT}` is written anew, with today's settings."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as building:
        building.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def late_means(history: list[dict[str, Any]], steps: int) -> dict[str, float | None]:
    """What the logs of a round's trainer tell of the second half of its `steps`, by the names of `LOGGED`: means over steps,
    since the last log may cover one of them, but λ as it was last."""
    found: dict[str, float | None] = {}
    for told, name in LOGGED.items():
        logs = [(0, 0.0), *((entry["step"], entry[name]) for entry in history if name in entry)]
        late = [(step - before, value) for (before, _), (step, value) in pairwise(logs) if 2 * step > steps]
        found[told] = sum(n * value for n, value in late) / sum(n for n, _ in late) if late else None
        if told == "dual" and late:
            found[told] = late[-1][1]
    return found


def has_preference_term(settings: dict[str, Any]) -> bool:
    """Whether rounds of these settings train on preferences too, with a reference."""
    return bool(settings.get("dual_init") or settings.get("dual_learning_rate"))


def told_of_round(record: dict[str, Any], rounds: int) -> str:
    """A line on a round that is finished, or on the measurement after the last."""
    rate = record["student_win_rate"]
    wins = (
        "no pair has a known preference"
        if rate is None
        else f"the student wins {100 * rate:.1f} % against its teacher"
    )
    wins += f" where they differ, {record['equal_answers']:,} answers are equal"
    if record["stage"] == ENDED:
        return f"After {record['round'] - 1} rounds: {wins}. {record['ended']}"
    if record["stage"] != TRAINED:
        return f"After {rounds} rounds: {wins}."
    logged = {"accuracy": "accuracy", "dual": "λ", "advantage": "advantage", "imitation": "imitation"}
    values = [f"{name} {record[key]:.4g}" for key, name in logged.items() if record.get(key) is not None]
    pairs = f"D has {record['pairs']:,} pairs, {record['new_pairs']:,} of them new"
    told = [f"at its start {wins}", pairs, *values, f"regret {record['regret']:.3g}"]
    return f"Round {record['round']} of {rounds}: {', '.join(told)}."
