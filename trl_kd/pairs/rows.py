"""A preference pair of a teacher's and a student's response, as a row that TRL and `PbKDTrainer` read."""

from typing import Any

from trl_kd.sampling import Text


def pair_row(prompt: Text, teacher: Text, student: Text, preference: float | None) -> dict[str, Any]:
    """Makes a row of preference data from a teacher's and a student's response to one prompt.

    Args:
        prompt (`str` or `list[dict]`):
            Prompt, plain text or messages.
        teacher (`str` or `list[dict]`):
            The teacher's response.
        student (`str` or `list[dict]`):
            The student's response.
        preference (`float`, *optional*):
            P(teacher's ≻ student's), in [0, 1]; `0.5` for a tie, `None` where nothing is known.

    Returns:
        `dict[str, Any]`: TRL's `prompt`, `chosen` and `rejected`, with
            - `preference` (`float` or `None`): P(chosen ≻ rejected), in [0.5, 1]. `None` where it is not known, or
              where the two texts are equal and there is nothing to prefer;
            - `teacher_side` (`str`): `"chosen"` or `"rejected"`, which of the two is the teacher's. On a tie it is
              `"chosen"`.

    Raises:
        `ValueError`: `preference` is outside [0, 1] or not a number.

    Example:

    ```python
    >>> from trl_kd.pairs import pair_row

    >>> pair_row("2+2=", teacher="5", student="4", preference=0.0)
    {'prompt': '2+2=', 'chosen': '4', 'rejected': '5', 'preference': 1.0, 'teacher_side': 'rejected'}
    ```
    """
    if preference is not None and not 0 <= preference <= 1:
        raise ValueError(
            f"`preference` is {preference!r}: it is P(teacher's ≻ student's), a number in [0, 1], or None if unknown."
        )
    if teacher == student:
        preference = None
    if preference is not None and preference < 0.5:
        chosen, rejected, preference, side = student, teacher, 1 - preference, "rejected"
    else:
        chosen, rejected, side = teacher, student, "chosen"
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "preference": None if preference is None else float(preference),
        "teacher_side": side,
    }
