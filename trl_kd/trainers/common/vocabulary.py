"""White-box distillation compares distributions token by token: both models must number the same tokens alike."""

from itertools import zip_longest
from typing import Any

from accelerate.logging import get_logger
from transformers import AutoConfig


logger = get_logger(__name__)

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
    advice = (
        "Distil through texts (`PbKDTrainer` with `imitation='sequence'`), or take a teacher of the student's family."
    )
    ours, theirs = ({index: token for token, index in t.get_vocab().items()} for t in (student, teacher))
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise ValueError(
                f"The teacher has another vocabulary than the student: token {index} is {theirs.get(index)!r} for the "
                f"teacher ({len(theirs)} tokens) and {ours.get(index)!r} for the student ({len(ours)} tokens). {advice}"
            )
    ours_ids, theirs_ids = (t(_PROBE, add_special_tokens=False)["input_ids"] for t in (student, teacher))
    if ours_ids != theirs_ids:
        pairs = zip_longest(ours_ids, theirs_ids)  # one may end before the other
        first, (our_id, their_id) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            "Teacher and student have the same vocabulary but split text differently: token "
            f"{first} of a probe text is {theirs.get(their_id)!r} for the teacher and "
            f"{ours.get(our_id)!r} for the student. {advice}"
        )


def vocabulary_size(model: Any, args: Any, revision: str | None) -> int:
    """Rows of the output embedding of a model, or of one that is named and not loaded yet, from its config."""
    if isinstance(model, str):
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
    else:
        config = model.config
    return config.get_text_config().vocab_size


def shared_rows(student: int, teacher: int, tokens: int) -> int | None:
    """
    How many rows of two output embeddings stand for the same tokens: families pad theirs to different sizes.

    Args:
        student, teacher (`int`):
            Rows of the output embeddings.
        tokens (`int`):
            Tokens of the tokenizer that both have.

    Returns:
        `int` or `None`: the rows that enter both softmaxes; `None` if the sizes are equal, and whole rows are compared.

    Raises:
        `ValueError`: an embedding is too small for the tokenizer.
    """
    if student == teacher:
        return None
    if min(student, teacher) < tokens:
        raise ValueError(
            f"The teacher's vocabulary has {teacher} rows and the student's {student}, for {tokens} tokens: they do not "
            "number the same tokens. Distil through texts instead (`PbKDTrainer` with `imitation='sequence'`)."
        )
    logger.info(f"Only the {tokens} tokens that student and teacher share enter their softmaxes.")
    return tokens
