"""The demo's table: its rows, its columns, and what stands in them."""

from statistics import mean, stdev
from typing import Any


NAMES = {
    "teacher": "Teacher",
    "start": "Student, start",
    "seqkd": "SeqKD",
    "seqkd_dft": "SeqKD with dft",
    "sft_chosen": "SFT on chosen",
    "dpo": "DPO",
    "dpo_sft": "DPO + sft",
    "pbkd": "PbKD (ours)",
}
"""Rows of the table, in its order."""

WHITE_BOX_NAMES = {
    "forward_kl": "Forward KL",
    "reverse_kl": "On-policy reverse KL",
    "mm": "MM, no preferences",
    "mm_pbkd": "MM-PbKD (ours)",
}
"""Further rows of `--white_box`: these students read the teacher's distributions."""

LABEL_FREE = ("seqkd", "seqkd_dft")
"""Rows that wrong labels do not change, since they read none."""

MEASURES = {"sampled": "sampled", "best": "best temp.", "greedy": "greedy"}
"""Columns of the table: at temperature 1, at the temperature that is best on validation questions, and greedy."""


def rows(seeds: list[dict[str, Any]]) -> dict[str, str]:
    """The models that there are results of, and their names, in the order of the table."""
    return {key: name for key, name in (NAMES | WHITE_BOX_NAMES).items() if key in seeds[0]}


def text_table(seeds: list[dict[str, Any]]) -> str:
    """The table of one task, for a terminal.

    Args:
        seeds (`list[dict]`):
            Results of each seed, stage by stage.
    """
    names = rows(seeds)
    width = max(map(len, names.values()))
    cells = [["", *MEASURES.values(), "wrong labels"]]
    cells += [[name, *(spread(seeds, key, m) for m in MEASURES), flipped(seeds, key)] for key, name in names.items()]
    lines = [f"  {name:<{width}}" + "".join(f"  {cell:>19}" for cell in row) for name, *row in cells]
    note = f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else "with 95 % interval"
    return "\n".join(
        [
            *lines,
            f"  ({note}; sampled at temperature 1, at the temperature that is best on validation questions, and greedy;",
            "  wrong labels: sampled, after training on pairs of which a fifth of the labels is flipped)",
        ]
    )


def flipped(seeds: list[dict[str, Any]], key: str) -> str:
    """Sampled accuracy after learning from partly wrong labels, or a dash for what does not learn from pairs' labels."""
    if "flipped" in seeds[0][key]:
        return spread([{key: seed[key]["flipped"]} for seed in seeds], key, "sampled")
    return spread(seeds, key, "sampled") if key in LABEL_FREE else "–"


def spread(seeds: list[dict[str, Any]], key: str, measure: str) -> str:
    """An accuracy in per cent: with its interval for one seed, as mean ± standard deviation for several."""
    values = [seed[key][measure] for seed in seeds]
    if len(values) > 1:
        return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f} %"
    low, high = seeds[0][key][f"{measure}_interval"]
    return f"{100 * values[0]:.1f} % ({100 * low:.0f} to {100 * high:.0f})"
