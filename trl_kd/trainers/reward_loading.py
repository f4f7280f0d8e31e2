"""The reward model of `OnlinePbKDTrainer`, from a checkpoint or from the student."""

from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from trl_kd._trl import get_config_model_id
from trl_kd.rewards.reward_model import RewardModel, from_student
from trl_kd.trainers.online_pbkd_config import OnlinePbKDConfig


logger = get_logger(__name__)


def load_reward_model(
    source: str | PreTrainedModel | None,
    student: Any,
    student_tokenizer: Any,
    args: OnlinePbKDConfig,
    quantization_config: Any = None,
) -> tuple[RewardModel, Any]:
    """
    Args:
        source (`str` or `PreTrainedModel`, *optional*):
            A sequence-classification model of one label, or where it is. `None`: the student as it starts.
        student (`PreTrainedModel` or `PeftModel`):
            The student.
        student_tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        args (`OnlinePbKDConfig`):
            Settings.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            How the student is quantised, and then a reward model that starts from it.

    Returns:
        `tuple[RewardModel, PreTrainedTokenizerBase]`: the reward model and its tokenizer.
    """
    tokenizer = student_tokenizer
    # Adapters alone are trained in float32 beside a backbone of less
    whole: dict[str, Any] = {} if args.rm_lora_r else {"dtype": torch.float32}
    # Of a stream of its own, so that the student's is TRL's
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        if source is None:
            model = _from_student(student, quantization_config, whole.get("dtype", student.dtype))
        elif isinstance(source, str):
            options = {"trust_remote_code": args.trust_remote_code}
            model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **options, **whole)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        else:
            model = source
            tokenizer = AutoTokenizer.from_pretrained(get_config_model_id(source.config))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            model.enable_input_require_grads()
        reward = RewardModel(model, args.reward_bound, args.rm_lora_r, tokenizer.pad_token_id)
    return reward, tokenizer


def check_reward_model(source: str | PreTrainedModel | None, args: OnlinePbKDConfig) -> None:
    """
    Raises:
        `ValueError`: the reward model has another number of labels than one.
        `OSError`: it is nowhere.
    """
    if source is None:
        return
    config: Any
    if isinstance(source, str):
        try:
            name, config = source, AutoConfig.from_pretrained(source, trust_remote_code=args.trust_remote_code)
        except OSError as error:
            raise OSError(f"`reward_model` is {source!r}, which cannot be loaded: {error}") from error
    else:
        name, config = get_config_model_id(source.config), source.config
    classifier = any("SequenceClassification" in kind for kind in config.architectures or [type(source).__name__])
    if config.num_labels != 1 or not classifier:
        raise ValueError(
            f"`reward_model` is {name!r}, with the classes {config.architectures} and {config.num_labels} labels: give a "
            "sequence-classification checkpoint with one label, or None to start from the student."
        )


def _from_student(student: Any, quantization_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    if is_peft_model(student) or getattr(student, "is_quantized", False):
        name = get_config_model_id(student.config)
        logger.info(f"The reward model starts from {name}, without the student's adapters.")
        quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype=dtype, **quantized)
    return from_student(student, dtype)
