"""
Checks of a training command that need no dataset and no weights: what is missing, and which paths are not there.

What imports PEFT, and with it bitsandbytes, is imported where it is used: `trl-kd pairs` with a server needs neither.
"""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_kd.pairs.places import check_files
from trl_kd.sampling.names import looks_like_path
from trl_kd.scripts.arguments import PreferenceScriptArguments, TrainingScriptArguments
from trl_kd.scripts.errors import InputError, bad_input, one_line
from trl_kd.scripts.paths import check_name, nearest_folder
from trl_kd.trainers.common.checkpoints import last_checkpoint


def check_arguments(
    script_args: TrainingScriptArguments, training_args: Any, model_args: Any, mixture: Any, rows: str
) -> None:
    """Raises for arguments that are missing or do not go together, and settles `resume_from_checkpoint`. `rows` says what
    the dataset has: "pairs" or "prompts"."""
    from trl_kd.scripts.ranges import check_ranges

    if not mixture.datasets and not script_args.dataset_name:
        raise InputError(
            f"neither `dataset_name` nor `datasets` is set: give the {rows}, a Hub id, a folder or a file, or a mixture."
        )
    if mixture.datasets and script_args.dataset_name:
        raise InputError(
            f"`dataset_name` is {script_args.dataset_name!r}, and `datasets` is set too: drop one of them."
        )
    if (script_args.dataset_streaming or mixture.streaming) and training_args.max_steps < 1:
        raise InputError("`max_steps` is not set, and a stream has no length: say how many steps to train.")
    check_training(training_args, model_args)
    check_ranges(mixture)
    training_args.resume_from_checkpoint = _checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)


def check_training(training_args: Any, model_args: Any) -> None:
    """Raises for settings of training and model that do not go together, whatever is trained on."""
    from trl_kd.scripts.ranges import check_ranges
    from trl_kd.trainers.common.config_checks import check_schedule

    check_ranges(training_args)
    check_ranges(model_args)
    if training_args.per_device_train_batch_size < 1:
        raise InputError(
            f"`per_device_train_batch_size` is {training_args.per_device_train_batch_size}: it must be at least 1."
        )
    check_schedule(training_args)
    _check_quantization(model_args)
    teacher: Any = getattr(training_args, "teacher_model_init_kwargs", None) or {}
    if any(name.startswith("load_in_") for name in teacher) and find_spec("bitsandbytes") is None:
        raise InputError(
            "`teacher_model_init_kwargs` asks for a quantised teacher, which needs bitsandbytes: pip install 'trl-kd[bnb]'."
        )
    _check_reporting(training_args.report_to)
    check_attention("attn_implementation", model_args.attn_implementation)
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        check_attention(name, (getattr(training_args, name, None) or {}).get("attn_implementation"))
    _check_packages(training_args)
    _check_optimizer(training_args)
    if training_args.save_strategy == "best" and training_args.metric_for_best_model is None:
        raise InputError(
            "`save_strategy` is 'best', and `metric_for_best_model` is not set: name the metric, such as 'loss', or use "
            "'steps' or 'epoch'."
        )
    check_output_dir(training_args.output_dir)


def check_preference_dataset(script_args: PreferenceScriptArguments) -> None:
    """Raises where its companions are set without it."""
    if script_args.preference_dataset is not None:
        return
    for name, default in (("preference_dataset_config", None), ("preference_dataset_split", "train")):
        if getattr(script_args, name) != default:
            raise InputError(
                f"`{name}` is {getattr(script_args, name)!r}, but `preference_dataset` is not set: give the pairs, "
                "or drop it."
            )


def _check_quantization(model_args: ModelConfig) -> None:
    field = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit" if model_args.load_in_8bit else None
    if field is None:
        return
    if not model_args.use_peft:
        raise InputError(
            f"`{field}` is True, but quantised weights cannot be trained: add `use_peft`, or drop `{field}`."
        )
    if find_spec("bitsandbytes") is None:
        raise InputError(f"`{field}` is True, which needs bitsandbytes: pip install 'trl-kd[bnb]'.")


def _check_reporting(names: list[str]) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    unknown = next((name for name in names if name not in INTEGRATION_TO_CALLBACK), None)
    if unknown is not None:
        close = get_close_matches(unknown, INTEGRATION_TO_CALLBACK, n=1)
        meant = f"did you mean {close[0]!r}?" if close else "drop it."
        raise InputError(
            f"`report_to` is {unknown!r}, which is none of {', '.join(INTEGRATION_TO_CALLBACK)}, all and none: {meant}"
        )
    known = set(INTEGRATION_TO_CALLBACK) - {"flyte", "kubeflow"}  # which the function below does not look for
    missing = [name for name in names if name in known and name not in get_available_reporting_integrations()]
    if missing:
        raise InputError(f"`report_to` is {missing[0]!r}, which is not installed: install it, or use 'none'.")


def _check_packages(training_args: Any) -> None:
    from transformers.utils import is_liger_kernel_available

    if training_args.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("`use_liger_kernel` is True, which needs its package: pip install liger-kernel, or drop it.")
    if getattr(training_args, "use_vllm", False) and find_spec("vllm") is None:
        raise InputError("`use_vllm` is True, which needs vLLM: pip install 'trl-kd[vllm]', or drop it.")


def _check_optimizer(training_args: Any) -> None:
    """Raises where transformers knows, without a model, that it cannot make the optimizer: for want of its package, say."""
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(training_args)
    except (ImportError, ValueError, TypeError, LookupError, AttributeError) as error:
        if "need to pass a" in str(error):  # the model, which some are made of
            return
        name = getattr(training_args.optim, "value", training_args.optim)
        raise InputError(f"`optim` is {name!r}, which cannot be used: {one_line(error)}") from error


def check_attention(field: str, name: Any) -> None:
    """Raises for an implementation of attention that is not there, or whose package is not. `field` asks for it."""
    if isinstance(name, dict):  # of parts of the model
        for part in name.values():
            check_attention(field, part)
        return
    if name is None:
        return
    if not isinstance(name, str):
        raise InputError(f"`{field}` asks for attention by {name!r}: it must be a name, such as 'sdpa'.")
    from transformers import AttentionInterface
    from transformers import utils as parts

    version = re.fullmatch(r"(?:paged\|)?flash_attention_(\d)", name)
    where = f"`{field}` asks for attention by {name!r}" if field != "attn_implementation" else f"`{field}` is {name!r}"
    if "/" in name or version is not None:
        is_there = version is not None and getattr(parts, f"is_flash_attn_{version[1]}_available", lambda: False)()
        if not is_there and find_spec("kernels") is None:
            needed = "kernels" if version is None else "flash-attn and a GPU, or kernels"
            raise InputError(f"{where}, which needs the package {needed}: install it, or use 'sdpa'.")
    elif name not in (known := ["eager", *AttentionInterface().valid_keys()]):
        raise InputError(f"{where}, which is none of {', '.join(known)}: use one of them, or drop it.")


_WRITTEN_LAST = ("README.md", "config.json", "model.safetensors", "rounds.json", "rounds.html", "report.html")
"""Files that commands write in the end, when a folder of that name would cost the whole run."""


def check_output_dir(output_dir: str) -> None:
    """Raises unless `output_dir` can be written to. It is not created: a check must leave no trace."""
    if not output_dir:
        raise InputError("`output_dir` is empty: give a folder.")
    check_name("output_dir", output_dir)
    path = Path(output_dir).absolute()
    try:
        for link in (place for place in [path, *path.parents] if place.is_symlink() and not place.exists()):
            raise InputError(
                f"`output_dir` is {output_dir!r}, but {str(link)!r} is a link to {str(link.readlink())!r}, which is not "
                "there: make that folder, or choose another."
            )
        path = nearest_folder(path)
        if not path.is_dir():
            raise InputError(f"`output_dir` is {output_dir!r}, but {path.name!r} is a file: choose another folder.")
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"`output_dir` is {output_dir!r}, which cannot be written to ({error.strerror}): choose another folder."
        ) from error
    with bad_input():
        check_files(Path(output_dir), _WRITTEN_LAST)


def _checkpoint(value: Any, output_dir: str) -> str | None:
    """`resume_from_checkpoint` as the trainer wants it; "true" is the last checkpoint of `output_dir`."""
    if value is None or str(value).lower() in ("false", "none", "null", ""):
        return None
    if str(value).lower() == "true":
        last = last_checkpoint(Path(output_dir))
        if last is None:
            raise InputError(
                f"`resume_from_checkpoint` is true, but `output_dir` = {output_dir!r} has no checkpoint that was "
                "saved in full: drop it, or name the folder of one."
            )
        return last
    if not (Path(value) / "trainer_state.json").is_file():
        raise InputError(
            f"`resume_from_checkpoint` is {value!r}, which is not the folder of a checkpoint (there is no "
            "trainer_state.json in it): name one, or 'true' for the last one."
        )
    return str(value)


def check_model_source(field: str, name: str, adapters: bool = False) -> None:
    """Raises when the model that `field` names is a path to nothing, or a folder without a model. Where `adapters` are not
    taken, an adapter alone is none."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if not (path / "adapter_config.json").is_file():
                raise InputError(
                    f"`{field}` is the folder {name!r}, which holds no model: there is no config.json in it."
                )
            if not adapters:
                raise InputError(
                    f"`{field}` is the folder {name!r}, which holds an adapter: merge it into its base model first "
                    "(`merge_and_unload` of PEFT), and save that."
                )
        elif not any(file.suffix in (".safetensors", ".bin", ".gguf") for file in path.iterdir()):
            raise InputError(f"`{field}` is the folder {name!r}, which holds no weights (*.safetensors).")
    elif path.exists():
        raise InputError(f"`{field}` is {name!r}, a file: give the folder of a model, or a Hub id.")
    elif looks_like_path(name):
        raise InputError(f"`{field}` is {name!r}: no such folder.")


def hub_name(training_args: Any) -> str:
    """The repository that a student is pushed to."""
    return training_args.hub_model_id or Path(training_args.output_dir).absolute().name


def check_push(training_args: Any) -> None:
    """Raises where a student is to be pushed, and could not be in the end."""
    # Under a launcher one process asks: the Hub answers this question a limited number of times
    if training_args.push_to_hub and os.environ.get("RANK", "0") == "0":
        field = "hub_model_id" if training_args.hub_model_id else "output_dir"
        value = getattr(training_args, field)
        check_hub(hub_name(training_args), field, value, "hub_model_id", training_args.hub_token)


def check_hub(name: str, field: str, value: Any, own_field: str, token: str | None = None) -> None:
    """Raises if nothing could be pushed in the end: the repository's `name`, which `field` = `value` gives and `own_field`
    could, is none, or nobody is logged in."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"`{field}` is {value!r}, which names no repository of the Hub: set `{own_field}`. {one_line(error)}"
        ) from error
    try:
        HfApi().whoami(token=token)
    except OSError as error:  # no token, one that is not valid any more, or no way to the Hub
        raise InputError(
            "`push_to_hub` is true, but the Hub does not let you in: log in by `hf auth login`, or drop it. "
            f"{one_line(error)}"
        ) from error


def read_model(field: str, name: str, options: Mapping[str, Any], load: Callable[[], Any] = lambda: None) -> Any:
    """Checks the files of a model that `field` names, of which no weights are read, and returns its tokenizer or processor,
    which `load` gives."""
    from trl_kd.sampling.model_files import check_files, check_tokens, read_config, reading_tokenizer

    try:
        rows = check_files(name, read_config(name, options), options)
        with reading_tokenizer(name):
            processor = load()
        if processor is not None:
            check_tokens(getattr(processor, "tokenizer", processor), rows)
    except (OSError, ValueError) as error:
        raise model_error(field, name, error) from error
    return processor


def model_error(field: str, name: str, error: BaseException, adapters: bool = False) -> InputError:
    """What went wrong with the model that `field` names, said so that the field can be found."""
    while isinstance(error, OSError) and type(error) is type(error.__cause__):
        error = error.__cause__  # without the name that it was given on the way
    try:
        check_model_source(field, name, adapters)
    except InputError as clearer:
        return clearer
    return InputError(f"`{field}` is {name!r}, which cannot be loaded: {one_line(error)}")
