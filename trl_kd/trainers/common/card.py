"""The model card's account of a distillation: what taught the student, on what, how, and what came of it."""

import json
import os
import re
import textwrap
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from trl_kd import __version__
from trl_kd._trl import get_config_model_id
from trl_kd.pairs.card import code, escape
from trl_kd.pairs.labels import describe_preference
from trl_kd.trainers.rounds.folder import has_preference_term


if TYPE_CHECKING:
    from trl_kd.trainers.mm_pbkd.trainer import MMPbKDTrainer
    from trl_kd.trainers.online_pbkd.trainer import OnlinePbKDTrainer
    from trl_kd.trainers.pbkd.trainer import PbKDTrainer

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

_OF_TRAINING = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed")
_OF_IMITATION = ("imitation_radius", "imitation_q", "imitation_q_warmup", "imitation_min_score")
_IMITATION_SETTINGS = (
    *("imitation_weight", "imitation", *_OF_IMITATION, "student_wins"),
    *_OF_TRAINING,
)
"""Of a run without the preference term."""
_PBKD_SETTINGS = (
    *("beta", "loss_type", "loss_weights", "dual_init", "dual_learning_rate", "dual_max", "confidence_radius"),
    "preference_nll_target",
    *_IMITATION_SETTINGS,
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


MODEL, DATASET = "trl-kd-model-name", "trl-kd-dataset-name"
"""What TRL's template is given in place of names, which it puts into Markdown as they are; `put_names` puts them in."""

_PROCEDURE, _VERSIONS = "## Training procedure", "### Framework versions"


def put_names(path: str, model_name: str, dataset_name: str | list[str] | None, base: str | None) -> None:
    """
    Puts names into the card that TRL wrote at `path`, so that each is shown and does nothing else.

    Args:
        path (`str`):
            The card, made with `MODEL` and `DATASET` for names.
        model_name (`str`):
            Name of the student.
        dataset_name (`str` or `list[str]`, *optional*):
            Datasets of the Hub that it was trained on.
        base (`str`, *optional*):
            What its config calls the model that it started from, an id of the Hub or a folder, which may be gone.
    """
    card = ModelCard.load(path)
    card.data.model_name = model_name
    card.text = card.text.replace(f"# Model Card for {MODEL}", f"# Model Card for {_plain(model_name)}", 1)
    if base is None or not _is_id(base) or os.path.isdir(base):
        card.data.base_model = None
        for written in (base, None):
            card.text = card.text.replace(f"[{written}](https://huggingface.co/{written})", code(public_name(base)), 1)
    if dataset_name is not None:
        names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
        card.data.datasets = dataset_name
        links = (f"[{n}](https://huggingface.co/datasets/{n})" if _is_id(n) else code(n) for n in names)
        card.text = card.text.replace(f"[{DATASET}](https://huggingface.co/datasets/{DATASET})", ", ".join(links), 1)
    card.text = card.text.replace('model="None"', f"model={_literal(_folder_of(path))}", 1)
    card.save(path)


def _folder_of(path: str) -> str:
    return os.path.basename(os.path.dirname(os.path.abspath(path)))


def _is_id(name: str) -> bool:
    """Whether a name can be that of a repository of the Hub, which no Markdown is made of."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name, re.ASCII) is not None


def _literal(text: str) -> str:
    """A text as Python writes it, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _plain(text: Any) -> str:
    """A text as Markdown that shows it and does nothing else, on one line. An underscore within a word does nothing."""
    return re.sub(r"(?<=[A-Za-z0-9])\\_(?=[A-Za-z0-9])", "_", escape(str(text)))


def _insert(card: ModelCard, heading: str, text: str, after: bool = False) -> None:
    """Puts a text before a heading of TRL's, or behind it."""
    both = f"{heading}\n\n{text}" if after else f"{text}\n{heading}"
    card.text = re.sub(rf"^{heading}$", lambda _: both, card.text, count=1, flags=re.MULTILINE)


def add_pbkd_sections(path: str, trainer: "PbKDTrainer") -> None:
    """Adds to the card that TRL wrote at `path`: teacher, preference data, settings, results and versions."""
    settings = _IMITATION_SETTINGS if trainer.imitates_alone else _PBKD_SETTINGS
    _add_sections(path, trainer, _pbkd_data(trainer), settings)


def add_mm_pbkd_sections(path: str, trainer: "MMPbKDTrainer") -> None:
    """As `add_pbkd_sections`, for a student matched to its teacher's distributions."""
    pairs = trainer.preference_rows
    said = f"{pairs} preference pairs held the Q-function." if pairs else "No preferences: moment matching alone."
    lines = [f"Teacher: {_plain(public_name(trainer.teacher.name))}, by its distribution at each token. {said}", ""]
    weights = trainer.pair_weights
    if weights is not None and weights.pairs:
        counts = "" if trainer.answer_counts is None else f": {trainer.answer_counts.told}"
        lines += [
            f"{weights.pairs} preference pairs weighed the teacher's completions, which were imitated{counts}.",
            "",
        ]
    _add_sections(path, trainer, lines, _MM_PBKD_SETTINGS + (() if weights is None else _OF_IMITATION))


def add_online_sections(path: str, trainer: "OnlinePbKDTrainer") -> None:
    """As `add_pbkd_sections`, for a student that climbed a reward model."""
    parts, learner = trainer.parts, trainer.learner
    if parts.teacher is None:
        teacher = f"the column {code(trainer.args.teacher_column)}" if parts.needs_teacher else "none"
    else:
        described = parts.teacher.describe()
        named = public_name(described.get("model")) if described.get("model") else str(described.get("sampler"))
        teacher = _plain(named)
    lines = [f"Teacher: {teacher}.", ""]
    if parts.preference is not None:
        lines += [
            f"Its answers were compared with the student's by {_comparer(describe_preference(parts.preference))}.",
            "",
        ]
    if learner is not None:
        start = parts.reward_model
        name = start if start is None or isinstance(start, str) else get_config_model_id(start.config)
        lines += [
            f"The reward model started from {'the student' if start is None else _plain(public_name(name))}.",
            "",
        ]
        held_out = f", {len(learner.pool.held_out)} of them held out" if learner.holds_out else ""
        lines += [f"In the end there were {len(learner.pool)} preference pairs{held_out}.", ""]
        logged = [entry for entry in trainer.state.log_history if "pbkd/rm_held_out_accuracy" in entry]
        if logged:
            rate = f"{100 * logged[-1]['pbkd/rm_held_out_accuracy']:.1f} %"
            lines += [f"At the last log it ordered {rate} of the newest held-out ones rightly.", ""]
    _add_sections(path, trainer, lines, _ONLINE_SETTINGS + (_OF_IMITATION if trainer.args.imitates else ()))


def add_rounds_section(path: str, told: dict[str, Any]) -> None:
    """Adds to the card of the last round's student, copied to `path`, how the rounds went: what `rounds.json` holds."""
    card = ModelCard.load(path)
    card.text = card.text.replace('model="student"', f"model={_literal(_folder_of(path))}", 1)
    settings, final = told["settings"], told["final"]
    comparer = _comparer(settings["preference"])
    grown = "the pairs of all rounds so far" if settings["accumulate"] else "the pairs of that round"
    reference = "the start" if settings["reference"] == "start" else "the student of the round before"
    schedule = "one over all rounds" if settings["schedule"] == "all" else "anew in each round"
    columns = {"round": "round", "prompts": "prompts", "pairs": "pairs trained on"}
    columns |= {"student_win_rate": "student wins, before it", "equal_answers": "equal answers"}
    uses = ""
    if has_preference_term(settings):
        uses = f", with {reference} as the reference"
        columns |= {"accuracy": "accuracy", "dual": "λ"}
    columns |= {"advantage": "mean advantage"}
    lines = [
        "## Rounds",
        "",
        f"Each round sampled the student as it was, had its answers compared with its teacher's by {comparer}, and trained "
        f"it on {grown}{uses}. Learning-rate schedule: {schedule}; optimizer in each round: "
        f"{settings['optimizer']}.",
        "",
        f"| {' | '.join(columns.values())} |",
        "|---" * len(columns) + "|",
    ]
    for record in told["rounds"]:
        values = (record.get(name) for name in columns)
        lines.append(f"| {' | '.join('' if value is None else _cell(value) for value in values)} |")
    if final is not None and final["student_win_rate"] is not None:
        own = f"win rate against the teacher | {_cell(final['student_win_rate'])} |"
        card.text = re.sub(r"win rate against the teacher, before this round \| \S+ \|", own, card.text, count=1)
        wins = f"{100 * final['student_win_rate']:.1f} % of {final['teacher_pairs']} comparisons with its teacher"
        lines += ["", f"This student, after the last round, wins {wins}, on the last round's prompts."]
    if final is not None and "ended" in final:
        lines += ["", _plain(final["ended"])]
    steps = sum(record.get("steps", 0) for record in told["rounds"])
    card.text = re.sub(
        r"\| optimizer steps \| \d+ \|", f"| optimizer steps, of all rounds | {steps} |", card.text, count=1
    )
    seed = f"| `seed`, of the first round | {settings['seed']} |"
    card.text = re.sub(r"\| `seed` \| \d+ \|", seed, card.text, count=1)
    _insert(card, _PROCEDURE, "\n".join([*lines, ""]))
    card.save(path)


def _comparer(described: dict[str, Any]) -> str:
    """Who compared answers, of what a preference function says of itself."""
    kind = described.get("preference", described.get("name", "a function"))
    model, functions = described.get("model"), described.get("functions")
    names = [public_name(model)] if model else [str(function.get("name")) for function in functions or []]
    return code(str(kind)) + (f" ({', '.join(map(_plain, names))})" if names else "")


def _add_sections(path: str, trainer: Any, data: list[str], settings: tuple[str, ...]) -> None:
    card = ModelCard.load(path)
    _insert(card, _PROCEDURE, "\n".join(_sections(trainer, data, settings)))
    _insert(card, _VERSIONS, _versions(), after=True)
    card.save(path)


def _pbkd_data(trainer: "PbKDTrainer") -> list[str]:
    """Who taught the student, and on what."""
    lines, teacher = [], trainer.teacher
    if teacher is not None:
        lines += [f"Teacher: {_plain(public_name(teacher.name))}, by its distribution at each token.", ""]
    else:
        name = f"{_plain(trainer.card_teacher)}, " if trainer.card_teacher else ""
        lines += [f"Teacher: {name}known by its responses in the preference data.", ""]
    if not trainer.row_counts:
        lines += ["The data was streamed, and not counted.", ""]
    for name, counts in trainer.row_counts.items():
        named = f", of which {counts.teacher} with a response of the teacher's"
        lines += [
            f"{_plain(name.capitalize())} data: {counts.rows} rows{'' if name in trainer.unnamed_teacher else named}; "
            f"preference known for {counts.known} ({counts.soft} soft labels or ties), unknown for {counts.null}.",
            "",
        ]
    for name, texts in trainer.text_counts.items():
        lines += [f"Of the {_plain(name)} data {texts.told}.", ""]
    if trainer.unnamed_teacher and trainer.args.imitation_weight:
        told = " and ".join(map(_plain, trainer.unnamed_teacher))
        lines += [
            f"No column of the {told} data names the teacher: every chosen answer was taken as the teacher's.",
            "",
        ]
    return lines


def _sections(trainer: Any, data: list[str], settings: tuple[str, ...]) -> list[str]:
    lines = ["## Distillation", "", *data, "| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(setting(trainer.args, name))} |" for name in settings]
    dual = trainer.dual
    if hasattr(trainer, "text_counts") and trainer.args.imitation_weight:
        lines += [
            f"| ζ (radius of each pair's confidence set) | {trainer.imitation_radius:.6g} |",
            f"| ā (mean weight of the teacher's responses) | {trainer.mean_advantage:.6g} |",
        ]
    if not getattr(trainer, "imitates_alone", False):
        lines += [
            f"| λ (dual variable), last value | {dual.value:.6g} |",
            f"| ζ (radius of the confidence set) | {dual.radius:.6g} |",
        ]
    lines += [
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


def setting(args: Any, name: str) -> Any:
    """The value of a field that the training uses."""
    return args.final_imitation_q if name == "imitation_q" else getattr(args, name)


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
    return _plain(f"{value:.6g}" if isinstance(value, float) else value)


def public_name(name: str | None) -> str:
    """A Hub id as it is; of a folder the last part, since a card is read elsewhere."""
    if not name:
        return "a model without a name"
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
