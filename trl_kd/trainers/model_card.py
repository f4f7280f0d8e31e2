"""The model card's account of a distillation: what taught the student, on what, how, and what came of it."""

import os
import textwrap
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from trl_kd import __version__
from trl_kd._trl import get_config_model_id


if TYPE_CHECKING:
    from trl_kd.trainers.mm_pbkd_trainer import MMPbKDTrainer
    from trl_kd.trainers.online_pbkd_trainer import OnlinePbKDTrainer
    from trl_kd.trainers.pbkd_trainer import PbKDTrainer

PAPER = {
    "title": "Online Knowledge Distillation with Reward Guidance",
    "id": "2505.18952",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{jia2025online,
            title   = {{Online Knowledge Distillation with Reward Guidance}},
            author  = {Chen Jia},
            year    = 2025,
            journal = {arXiv preprint arXiv:2505.18952}
        }"""),
}
"""The method's paper, as TRL's model cards cite it."""

_NO_RESULTS = ("_runtime", "_per_second", "_num_tokens", "_model_preparation_time")

_PBKD_SETTINGS = (
    "imitation_weight",
    "imitation",
    "beta",
    "loss_type",
    "loss_weights",
    "dual_init",
    "dual_learning_rate",
    "dual_max",
    "confidence_radius",
    "preference_nll_target",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "seed",
)
_MM_PBKD_SETTINGS = (
    "lmbda",
    "beta",
    "off_policy_beta",
    "kl_coef",
    "moment_coef",
    "state_gradient",
    "imitation_weight",
    "temperature",
    "q_head",
    "q_bound",
    "q_learning_rate",
    "q_steps",
    "q_warmup_steps",
    "dual_init",
    "dual_learning_rate",
    "dual_max",
    "confidence_radius",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "seed",
)
_ONLINE_SETTINGS = (
    "adversary",
    "imitation_weight",
    "beta",
    "temperature",
    "num_generations",
    "reward_bound",
    "rm_lora_r",
    "rm_learning_rate",
    "rm_steps",
    "rm_fresh_share",
    "dual_init",
    "dual_learning_rate",
    "dual_max",
    "confidence_radius",
    "learning_rate",
    "generation_batch_size",
    "max_completion_length",
    "seed",
)


def add_pbkd_sections(path: str, trainer: "PbKDTrainer") -> None:
    """Adds to the card that TRL wrote at `path`: teacher, preference data, settings, results and versions."""
    _add_sections(path, trainer, _pbkd_data(trainer), _PBKD_SETTINGS)


def add_mm_pbkd_sections(path: str, trainer: "MMPbKDTrainer") -> None:
    """As `add_pbkd_sections`, for a student matched to its teacher's distributions."""
    pairs = trainer.preference_rows
    said = f"{pairs} preference pairs held the Q-function." if pairs else "No preferences: moment matching alone."
    lines = [f"Teacher: {public_name(trainer.teacher.name)}, by its distribution at each token. {said}", ""]
    _add_sections(path, trainer, lines, _MM_PBKD_SETTINGS)


def add_online_sections(path: str, trainer: "OnlinePbKDTrainer") -> None:
    """As `add_pbkd_sections`, for a student that climbed a reward model."""
    parts, learner = trainer.parts, trainer.learner
    if parts.teacher is None:
        teacher = f"the column `{trainer.args.teacher_column}`" if parts.needs_teacher else "none"
    else:
        described = parts.teacher.describe()
        teacher = public_name(described.get("model")) if described.get("model") else str(described.get("sampler"))
    lines = [f"Teacher: {teacher}.", ""]
    if learner is not None:
        held_out = f", {len(learner.pool.held_out)} of them held out" if learner.holds_out else ""
        lines += [f"In the end there were {len(learner.pool)} preference pairs{held_out}.", ""]
    _add_sections(path, trainer, lines, _ONLINE_SETTINGS)


def add_rounds_section(path: str, told: dict[str, Any]) -> None:
    """Adds to the card of the last round's student, copied to `path`, how the rounds went: what `rounds.json` holds."""
    card = ModelCard.load(path)
    name = os.path.basename(os.path.dirname(os.path.abspath(path)))
    card.text = card.text.replace('model="student"', f'model="{name}"', 1)
    header = ("round", "prompts", "pairs trained on", "student wins, before it", "accuracy", "λ")
    lines = [
        "## Rounds",
        "",
        "Each round sampled the student as it was, compared its answers with its teacher's, and trained on the pairs.",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for record in told["rounds"]:
        values = (record[k] for k in ("round", "prompts", "pairs", "student_win_rate", "accuracy", "dual"))
        lines.append(f"| {' | '.join('' if value is None else _cell(value) for value in values)} |")
    final = told["final"]
    if final is not None and final["student_win_rate"] is not None:
        wins = f"{100 * final['student_win_rate']:.1f} % of {final['teacher_pairs']} comparisons with its teacher"
        lines += ["", f"This student, after the last round, wins {wins}, on the last round's prompts."]
    card.text = card.text.replace("## Training procedure", "\n".join([*lines, "", "## Training procedure"]), 1)
    card.save(path)


def _add_sections(path: str, trainer: Any, data: list[str], settings: tuple[str, ...]) -> None:
    card = ModelCard.load(path)
    # TRL names neither a base model in a folder nor a repository that does not exist yet
    start = public_name(get_config_model_id(trainer.model.config))
    card.text = card.text.replace("[None](https://huggingface.co/None)", f"`{start}`", 1)
    card.text = card.text.replace(
        'model="None"', f'model="{os.path.basename(os.path.normpath(trainer.args.output_dir))}"', 1
    )
    card.text = card.text.replace(
        "## Training procedure", "\n".join(_sections(trainer, data, settings)) + "\n## Training procedure", 1
    )
    card.text = card.text.replace("### Framework versions\n", f"### Framework versions\n\n{_versions()}", 1)
    card.save(path)


def _pbkd_data(trainer: "PbKDTrainer") -> list[str]:
    """Who taught the student, and on what."""
    lines, teacher = [], trainer.teacher
    if teacher is not None:
        lines += [f"Teacher: {public_name(teacher.name)}, by its distribution at each token.", ""]
    else:
        name = f"{trainer.card_teacher}, " if trainer.card_teacher else ""
        lines += [f"Teacher: {name}known by its responses in the preference data.", ""]
    if not trainer.row_counts:
        lines += ["The data was streamed, and not counted.", ""]
    for name, counts in trainer.row_counts.items():
        lines += [
            f"{name.capitalize()} data: {counts.rows} rows, of which {counts.teacher} with a response of the teacher's; "
            f"preference known for {counts.known} ({counts.soft} soft labels or ties), unknown for {counts.null}.",
            "",
        ]
    return lines


def _sections(trainer: Any, data: list[str], settings: tuple[str, ...]) -> list[str]:
    lines = ["## Distillation", "", *data, "| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(getattr(trainer.args, name))} |" for name in settings]
    dual = trainer.dual
    lines += [
        f"| λ (dual variable), last value | {dual.value:.6g} |",
        f"| ζ (radius of the confidence set) | {dual.radius:.6g} |",
        f"| optimizer steps | {trainer.state.global_step} |",
        "",
        "## Results",
        "",
    ]
    results = trainer.card_results or _last_evaluation(trainer)
    if results:
        lines += ["| result | value |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in results.items()), ""]
    else:
        lines += ["No evaluation was run in this training.", ""]
    return lines


def _versions() -> str:
    """Of what TRL's card does not name."""
    return "\n".join([f"- trl-kd: {__version__}", *(f"- {name}: {version(name)}" for name in ("accelerate", "peft"))])


def _last_evaluation(trainer: "PbKDTrainer") -> dict[str, Any]:
    entries = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    last = [entry for entry in entries if entry["step"] == entries[-1]["step"]]  # one entry for each evaluation set
    return {
        name: value
        for entry in last
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(_NO_RESULTS)
    }


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def public_name(name: str | None) -> str:
    """A Hub id as it is; of a folder the last part, since a card is read elsewhere."""
    if not name:
        return "a model without a name"
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
