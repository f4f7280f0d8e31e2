"""The model card's account of a distillation: what taught the student, on what, how, and what came of it."""

import json
import os
import re
import textwrap
from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCard

from trl_kd import __version__
from trl_kd.pairs.card import code, escape


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

OF_TRAINING = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed")
OF_IMITATION = ("imitation_radius", "imitation_q", "imitation_q_warmup", "imitation_min_score")
"""Fields that the tables of several methods have."""

MODEL, DATASET = "trl-kd-model-name", "trl-kd-dataset-name"
"""What TRL's template is given in place of names, which it puts into Markdown as they are; `put_names` puts them in."""

PROCEDURE, _VERSIONS = "## Training procedure", "### Framework versions"


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
    card.text = card.text.replace(f"# Model Card for {MODEL}", f"# Model Card for {plain(model_name)}", 1)
    if base is None or not _is_id(base) or os.path.isdir(base):
        card.data.base_model = None
        for written in (base, None):
            card.text = card.text.replace(f"[{written}](https://huggingface.co/{written})", code(public_name(base)), 1)
    if dataset_name is not None:
        names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
        card.data.datasets = dataset_name
        links = (f"[{n}](https://huggingface.co/datasets/{n})" if _is_id(n) else code(n) for n in names)
        card.text = card.text.replace(f"[{DATASET}](https://huggingface.co/datasets/{DATASET})", ", ".join(links), 1)
    card.text = card.text.replace('model="None"', f"model={literal(folder_of(path))}", 1)
    card.save(path)


def folder_of(path: str) -> str:
    return os.path.basename(os.path.dirname(os.path.abspath(path)))


def _is_id(name: str) -> bool:
    """Whether a name can be that of a repository of the Hub, which no Markdown is made of."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name, re.ASCII) is not None


def literal(text: str) -> str:
    """A text as Python writes it, on one line."""
    return json.dumps(text, ensure_ascii=False)


def plain(text: Any) -> str:
    """A text as Markdown that shows it and does nothing else, on one line. An underscore within a word does nothing."""
    return re.sub(r"(?<=[A-Za-z0-9])\\_(?=[A-Za-z0-9])", "_", escape(str(text)))


def insert(card: ModelCard, heading: str, text: str, after: bool = False) -> None:
    """Puts a text before a heading of TRL's, or behind it."""
    both = f"{heading}\n\n{text}" if after else f"{text}\n{heading}"
    card.text = re.sub(rf"^{heading}$", lambda _: both, card.text, count=1, flags=re.MULTILINE)


def comparer(described: dict[str, Any]) -> str:
    """Who compared answers, of what a preference function says of itself."""
    kind = described.get("preference", described.get("name", "a function"))
    model, functions = described.get("model"), described.get("functions")
    names = [public_name(model)] if model else [str(function.get("name")) for function in functions or []]
    return code(str(kind)) + (f" ({', '.join(map(plain, names))})" if names else "")


def add_sections(path: str, trainer: Any, data: list[str], settings: tuple[str, ...]) -> None:
    card = ModelCard.load(path)
    insert(card, PROCEDURE, "\n".join(_sections(trainer, data, settings)))
    insert(card, _VERSIONS, _versions(), after=True)
    card.save(path)


def _sections(trainer: Any, data: list[str], settings: tuple[str, ...]) -> list[str]:
    lines = ["## Distillation", "", *data, "| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | {cell(setting(trainer.args, name))} |" for name in settings]
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
        lines += ["| result | value |", "|---|---|", *(f"| {cell(k)} | {cell(v)} |" for k, v in results.items()), ""]
    else:
        lines += ["No evaluation was run in this training.", ""]
    return lines


def setting(args: Any, name: str) -> Any:
    """The value of a field that the training uses."""
    return args.final_imitation_q if name == "imitation_q" else getattr(args, name)


def _versions() -> str:
    """Of what TRL's card does not name."""
    return "\n".join([f"- trl-kd: {__version__}", *(f"- {name}: {version(name)}" for name in ("accelerate", "peft"))])


def _last_evaluation(trainer: Any) -> dict[str, Any]:
    entries = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    last = [entry for entry in entries if entry["step"] == entries[-1]["step"]]  # one entry for each evaluation set
    return {
        name: value
        for entry in last
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(_NO_RESULTS)
    }


def cell(value: Any) -> str:
    return plain(f"{value:.6g}" if isinstance(value, float) else value)


def public_name(name: str | None) -> str:
    """A Hub id as it is; of a folder the last part, since a card is read elsewhere."""
    if not name:
        return "a model without a name"
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
