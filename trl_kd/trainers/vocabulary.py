"""White-box distillation compares distributions token by token: both models must number the same tokens alike."""

from typing import Any


_PROBE = "Zoë said: “x² + 3 = 7, so x = ±2.”\n\tdef f(n):\n        return n << 2  # 你好, мир 🙂"


def check_same_vocabulary(student: Any, teacher: Any) -> None:
    """
    Raises when two tokenizers do not give the same token the same id.

    Args:
        student (`PreTrainedTokenizerBase`):
            The student's tokenizer.
        teacher (`PreTrainedTokenizerBase`):
            The teacher's tokenizer.

    Raises:
        `ValueError`: names the first id whose token differs, or the probe text that is split differently.
    """
    advice = "Distil through texts instead (`imitation='sequence'`), or take a teacher of the student's family."
    ours, theirs = ({index: token for token, index in t.get_vocab().items()} for t in (student, teacher))
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise ValueError(
                f"The teacher has another vocabulary than the student: token {index} is {theirs.get(index)!r} for the "
                f"teacher ({len(theirs)} tokens) and {ours.get(index)!r} for the student ({len(ours)} tokens). {advice}"
            )
    ours_ids, theirs_ids = (t(_PROBE, add_special_tokens=False)["input_ids"] for t in (student, teacher))
    if ours_ids != theirs_ids:
        first = next((i for i, (a, b) in enumerate(zip(ours_ids, theirs_ids, strict=False)) if a != b), 0)
        raise ValueError(
            "Teacher and student have the same vocabulary but split text differently: token "
            f"{first} of a probe text is {theirs.get(theirs_ids[first])!r} for the teacher and "
            f"{ours.get(ours_ids[first])!r} for the student. {advice}"
        )
