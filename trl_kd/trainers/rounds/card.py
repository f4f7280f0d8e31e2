"""The section of the model card for the student of `PbKDRounds`."""

import re
from typing import Any

from huggingface_hub import ModelCard

from trl_kd.trainers.common.card import PROCEDURE, cell, comparer, folder_of, insert, literal, plain
from trl_kd.trainers.rounds.folder import has_preference_term


def add_rounds_section(path: str, told: dict[str, Any]) -> None:
    """Adds to the card of the last round's student, copied to `path`, how the rounds went: what `rounds.json` holds."""
    card = ModelCard.load(path)
    card.text = card.text.replace('model="student"', f"model={literal(folder_of(path))}", 1)
    settings, final = told["settings"], told["final"]
    compared = comparer(settings["preference"])
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
        f"Each round sampled the student as it was, had its answers compared with its teacher's by {compared}, and trained "
        f"it on {grown}{uses}. Learning-rate schedule: {schedule}; optimizer in each round: "
        f"{settings['optimizer']}.",
        "",
        f"| {' | '.join(columns.values())} |",
        "|---" * len(columns) + "|",
    ]
    for record in told["rounds"]:
        values = (record.get(name) for name in columns)
        lines.append(f"| {' | '.join('' if value is None else cell(value) for value in values)} |")
    if final is not None and final["student_win_rate"] is not None:
        own = f"win rate against the teacher | {cell(final['student_win_rate'])} |"
        card.text = re.sub(r"win rate against the teacher, before this round \| \S+ \|", own, card.text, count=1)
        wins = f"{100 * final['student_win_rate']:.1f} % of {final['teacher_pairs']} comparisons with its teacher"
        lines += ["", f"This student, after the last round, wins {wins}, on the last round's prompts."]
    if final is not None and "ended" in final:
        lines += ["", plain(final["ended"])]
    steps = sum(record.get("steps", 0) for record in told["rounds"])
    card.text = re.sub(
        r"\| optimizer steps \| \d+ \|", f"| optimizer steps, of all rounds | {steps} |", card.text, count=1
    )
    seed = f"| `seed`, of the first round | {settings['seed']} |"
    card.text = re.sub(r"\| `seed` \| \d+ \|", seed, card.text, count=1)
    insert(card, PROCEDURE, "\n".join([*lines, ""]))
    card.save(path)
