"""What becomes of the rows of a dataset, in numbers and words."""

from dataclasses import dataclass

from trl_kd.trainers.pbkd.config import PbKDConfig


@dataclass
class TextCounts:
    """
    What becomes of the rows of a dataset.

    Args:
        rows (`int`):
            Rows in all, in which a third `teacher` text is one.
        used (`int`):
            Rows whose teacher's text has a weight above 0.
        lost (`int`):
            Rows whose teacher's text has the weight 0.
        texts (`int`):
            Different texts of the teacher's, for different prompts, among those used.
        scored (`bool`):
            Whether scores decided, beside labels.
        training (`bool`):
            Whether rows that teach nothing are left out. An evaluation keeps them.
        unused (`int`, *optional*):
            Rows from which nothing is learnt, where the preference term is on: neither imitated nor with a known preference.
            `None` where it is off, so that these are all that are not imitated.
        advantage (`float`, *optional*):
            Mean weight of the teacher's texts that were compared with another one, those of weight 0 among them. `None` if
            there are none.
        student (`int`):
            Winning answers of the student's that are imitated too.
    """

    rows: int
    used: int
    lost: int
    texts: int
    scored: bool = False
    training: bool = True
    unused: int | None = None
    advantage: float | None = None
    student: int = 0

    @property
    def told(self) -> str:
        """One sentence without its full stop."""
        alone = self.unused is None
        why = "the teacher did not win" + (", or scores less than `imitation_min_score`" if self.scored else "")
        without = self.rows - self.used - self.lost
        fate = "left out" if self.training and alone else "of weight 0"
        left_out = [f"{self.lost:,} {fate}: {why}"] if self.lost else []
        left_out += [f"{without:,} {fate}: no text of the teacher's"] if without else []
        merged = (
            f" ({self.texts:,} different {'text' if self.texts == 1 else 'texts'})" if self.texts < self.used else ""
        )
        if self.training and self.unused:
            left_out.append(f"{self.unused:,} of them left out: no known preference either")
        if self.student:
            left_out.append(f"{self.student:,} winning answers of the student's teach too")
        return "; ".join(
            [f"{self.used:,} of {self.rows:,} rows {'teach' if alone else 'are imitated'}{merged}", *left_out]
        )

    def check(self, name: str, args: PbKDConfig) -> None:
        """Raises a `ValueError` if no row is left to train on."""
        if self.unused is not None and self.unused < self.rows:
            return
        if not self.used and not self.lost:
            raise ValueError(
                f"The {name} dataset has no text of the teacher's, and nothing else is learnt from, since `dual_init` and "
                "`dual_learning_rate` are 0: say who wrote what in `teacher_side`, or set `dual_init` above 0."
            )
        if not self.used and not self.student:
            raise nothing_teaches(name, args, self.told)


class NothingTeaches(ValueError):
    """Training data in which every text has the weight 0. In rounds it is no error: the student has caught up. `told` says
    how many rows there are, and why they teach nothing."""

    def __init__(self, message: str, told: str):
        super().__init__(message)
        self.told = told


def nothing_teaches(name: str, args: PbKDConfig, told: str = "") -> NothingTeaches:
    """What to say of training data in which every teacher's text has the weight 0."""
    least = args.imitation_min_score
    score = "" if least is None else f" and `imitation_min_score` = {least}"
    lower = "" if least is None else ", and lower `imitation_min_score` where there are scores"
    why = f": {told}" if told else ""
    return NothingTeaches(
        f"No row of the {name} dataset teaches with `imitation_radius` = {args.imitation_radius}{score}{why}. Raise the "
        f"radius ('inf' imitates all of the teacher's responses){lower}.",
        told,
    )


def nothing_known(name: str) -> ValueError:
    """What to say of training data without a known preference where nothing is imitated."""
    return ValueError(
        f"No row of the {name} dataset has a known `preference`, and nothing is imitated, since `imitation_weight` is 0: "
        "label the rows, or set a weight above 0."
    )
