"""The reward model of `OnlinePbKDTrainer`, from a checkpoint or from the student."""

import os
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from trl_kd._trl.models import get_config_model_id
from trl_kd.preferences.tokens import is_conversational
from trl_kd.rewards.reward_model import RewardModel, classifier, from_student, zero_head
from trl_kd.sampling.causal import check_kind
from trl_kd.sampling.loading import check_loaded, keep_gradients, load_model
from trl_kd.sampling.model_errors import named
from trl_kd.sampling.model_files import check_model, read_config, tokenizer_reason
from trl_kd.sampling.names import looks_like_path
from trl_kd.sampling.weight_files import MissingWeights
from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig


logger = get_logger(__name__)

_HEADS = ("lm_head.", "score.", "classifier.")


def load_reward_model(
    source: str | PreTrainedModel | None, tokenizer: Any, student: Any, args: OnlinePbKDConfig
) -> RewardModel:
    """
    Args:
        source (`str` or `PreTrainedModel`, *optional*):
            A sequence-classification model of one label, which is changed, or where it is; or where a causal language model
            is, which gets a head that is zero. `None`: such a head on the student as it starts, without adapters.
        tokenizer (`PreTrainedTokenizerBase`):
            The reward model's. It gets a padding token if it has none.
        student (`PreTrainedModel` or `PeftModel`):
            The student.
        args (`OnlinePbKDConfig`):
            Settings.
    """
    # Adapters alone are trained in float32 beside a backbone of less
    whole: dict[str, Any] = {} if args.rm_lora_r else {"dtype": torch.float32}
    # Of a stream of its own, so that the student's is TRL's
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        if source is None:
            model = _from_student(student, args, whole.get("dtype", student.dtype))
        elif isinstance(source, str):
            options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
            options |= {"num_labels": 1, "output_loading_info": True, **whole}
            model, found = AutoModelForSequenceClassification.from_pretrained(source, **options)
            name, _ = classifier(model)
            if f"{name}.weight" in found["missing_keys"]:
                config = AutoConfig.from_pretrained(source, trust_remote_code=args.trust_remote_code)
                if not _is_language_model(config):
                    raise ValueError(
                        f"`reward_model` is {source!r}, a classifier without its head: there is no `{name}.weight` among "
                        f"its weights{_other_names(found)}. Give one that has it."
                    )
                if any(not key.startswith(f"{name}.") for key in found["missing_keys"]):
                    # Layers before the head, under other names in the language model: they would be random
                    model = _from_language_model(source, model.dtype, args)
                zero_head(model)
                found = {**found, "missing_keys": set()}
                logger.info(f"The reward model's head starts at zero: {source} has none.")
            with named(f"`reward_model` is {source!r}, which"):
                check_loaded(source, model, found, options)
        else:
            model = source
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            model.enable_input_require_grads()
        keep_gradients(model)
        return RewardModel(model, args.reward_bound, args.rm_lora_r, tokenizer.pad_token_id)


def _from_language_model(source: str, dtype: torch.dtype, args: OnlinePbKDConfig) -> PreTrainedModel:
    options = {"trust_remote_code": args.trust_remote_code, "dtype": dtype, "device_map": None}
    return from_student(load_model(source, options), dtype, args.trust_remote_code)


def _other_names(found: dict[str, Any]) -> str:
    unexpected = sorted(found["unexpected_keys"])
    return f", but {', '.join(unexpected[:3])}" if unexpected else ""


def check_reward_model(
    source: str | PreTrainedModel | None, tokenizer: Any, datasets: dict[str, Any], args: OnlinePbKDConfig
) -> Any:
    """
    Args:
        source (`str` or `PreTrainedModel`, *optional*):
            See `load_reward_model`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The reward model's, where it is given.
        datasets (`dict[str, Dataset or None]`):
            What it is to read, by the names that users know.
        args (`OnlinePbKDConfig`):
            Settings.

    Returns:
        `PreTrainedTokenizerBase`, *optional*: its tokenizer; `None` for the student's.

    Raises:
        `ValueError`: the reward model has another number of labels than one, or no tokenizer that can render the rows; or
            ZeRO-3 would split it.
        `OSError`: it is nowhere.
    """
    if args.adversary != "off" and is_deepspeed_zero3_enabled():
        raise ValueError(
            "`deepspeed` is ZeRO-3, which splits every model that is loaded, and each process needs a whole reward model: "
            "use ZeRO-2, or DDP with LoRA."
        )
    if source is not None:
        name = _check_source(source, args)
        tokenizer = _load_tokenizer(name, args) if tokenizer is None else tokenizer
        if isinstance(source, str):
            with named(f"`reward_model` is {source!r}, which"):
                try:
                    check_model(source, {"trust_remote_code": args.trust_remote_code}, tokenizer)
                except (
                    MissingWeights
                ) as error:  # heads are looked at when it is loaded, whatever class the config names
                    if not all(name.startswith(_HEADS) for name in error.names):
                        raise
    if tokenizer is None:
        return None
    for dataset_name, dataset in datasets.items():
        messages = dataset is not None and is_conversational(next(iter(dataset)))
        if messages and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"The {dataset_name} holds messages, but the reward model's tokenizer, of {tokenizer.name_or_path!r}, has "
                "no chat template: set its `chat_template` and give it last in `reward_processing_classes`, one more than "
                "there are reward functions, or give the rows as text."
            )
    return tokenizer


def _check_source(source: str | PreTrainedModel, args: OnlinePbKDConfig) -> str:
    """Its name, which is empty for a model that was made in memory."""
    config: Any
    if isinstance(source, str):
        if looks_like_path(source) and not os.path.isdir(source):
            raise OSError(f"`reward_model` is {source!r}: no such folder.")
        if os.path.isfile(os.path.join(source, "adapter_config.json")):
            raise ValueError(
                f"`reward_model` is {source!r}, an adapter: merge it into its base model first (`merge_and_unload` of "
                "PEFT), and save that."
            )
        with named(f"`reward_model` is {source!r}, which"):
            name, config = source, read_config(source, {"trust_remote_code": args.trust_remote_code})
    else:
        name, config = get_config_model_id(source.config), source.config
    if isinstance(source, str) and _is_language_model(config):
        check_kind(
            config, config.architectures or [], f"The language model {name!r}, of which `reward_model` is to be made,"
        )
        return name
    # A model in memory keeps the classes of the checkpoint that it began as, until it is saved
    kinds = (config.architectures or []) if isinstance(source, str) else [type(source).__name__]
    if config.num_labels != 1 or not any("SequenceClassification" in kind for kind in kinds):
        raise ValueError(
            f"`reward_model` is {name!r}, with the classes {kinds} and {config.num_labels} labels: give a "
            "sequence-classification checkpoint with one label, a causal language model's name, or None for the student."
        )
    return name


def _is_language_model(config: Any) -> bool:
    """Whether a checkpoint is a causal language model's of a kind that can have a classifier's head."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    kinds = {names} if isinstance(names, str) else set(names)
    can_classify = config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    return can_classify and not kinds.isdisjoint(config.architectures or [])


def _load_tokenizer(name: str, args: OnlinePbKDConfig) -> Any:
    fix = "give it last in `reward_processing_classes`, one more than there are reward functions."
    if not name:
        raise ValueError(f"`reward_model` is a model of no checkpoint, so that its tokenizer is unknown: {fix}")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # those of `tokenizers` have no class of their own
        raise ValueError(
            f"The tokenizer of `reward_model`, {name!r}, cannot be loaded: {fix} {tokenizer_reason(name, error)}"
        ) from error


def _from_student(student: Any, args: OnlinePbKDConfig, dtype: torch.dtype) -> PreTrainedModel:
    if is_peft_model(student):
        student = student.get_base_model()
        logger.info("The reward model starts from the student without its adapters.")
    if not getattr(student, "is_quantized", False):
        return from_student(student, dtype, args.trust_remote_code)
    # Its weights as they are do not fit into another model: they are loaded as TRL loads them
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    options |= {"quantization_config": student.config.quantization_config, "dtype": dtype, "num_labels": 1}
    options.pop("device_map", None)  # it is moved to the trainer's device
    model = AutoModelForSequenceClassification.from_pretrained(get_config_model_id(student.config), **options)
    zero_head(model)
    return model
