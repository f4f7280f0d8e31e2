"""What is suggested in place of an unknown key."""

import pytest

from trl_kd.scripts import mm_pbkd, online_pbkd, pbkd
from trl_kd.scripts.arguments import _Parser, launch_options
from trl_kd.scripts.pairs_arguments import PairsArguments
from trl_kd.scripts.suggestions import ALIASES, advice


TYPES = {
    "pbkd": pbkd.DATACLASSES,
    "mm-pbkd": mm_pbkd.DATACLASSES,
    "online-pbkd": online_pbkd.DATACLASSES,
    "pairs": (PairsArguments,),
}


@pytest.fixture(scope="module")
def keys():
    """The keys of each command."""
    parsers = {name: _Parser(types, name, is_launched=False) for name, types in TYPES.items()}
    return {name: [action.dest for action in parser._actions] for name, parser in parsers.items()}


def test_the_table_names_keys_that_there_are(keys):
    known = {key for some in keys.values() for key in some} | {"config"}
    assert {name for groups in ALIASES.values() for group in groups for name in group} <= known
    assert not {alias for alias in ALIASES if all(alias in some for some in keys.values())}


@pytest.mark.parametrize(
    ("command", "key", "meant"),
    [
        ("pairs", "model", "student"),
        ("pairs", "teacher_model", "teacher"),
        ("pairs", "batch_size", "max_concurrency"),
        ("pairs", "num_samples", "num_student_samples"),
        ("pairs", "hub_repo_id", "hub_dataset_id"),
        ("pairs", "max_tokens_", "max_tokens"),
        ("mm-pbkd", "max_new_tokens", "max_completion_length"),
        ("mm-pbkd", "preferences", "preference_dataset"),
        ("online-pbkd", "teacher", "pairs_config"),
        ("online-pbkd", "rm", "reward_model_name_or_path"),
        ("online-pbkd", "Learning-Rate", "learning_rate"),
        ("pbkd", "warmup_ratio", "warmup_steps"),
        ("pbkd", "evaluation_strategy", "eval_strategy"),
        ("pbkd", "max_seq_length", "max_length"),
        ("pbkd", "torch_dtype", "dtype"),
        ("pbkd", "teacher_model_revison", "teacher_model_revision"),
        ("pbkd", "beta1", "adam_beta1"),
        ("online-pbkd", "beta2", "adam_beta2"),
        ("pbkd", "seq_len", "max_length"),
        ("pbkd", "precision", "bf16"),
        ("pbkd", "stream", "dataset_streaming"),
        ("pairs", "stream", "dataset_streaming"),
        ("mm-pbkd", "kl_coeff", "kl_coef"),
        ("pbkd", "kl_coeff", "beta"),
        ("pbkd", "learningrate", "learning_rate"),
        ("pbkd", "optmi", "optim"),
        ("pbkd", "remove_unused", "remove_unused_columns"),
        ("pbkd", "gradient_accumulation_step", "gradient_accumulation_steps"),
        ("pbkd", "gradient_check", "gradient_checkpointing` or `gradient_checkpointing_kwargs"),
        ("pbkd", "ds_config", "deepspeed` or `accelerate_config"),
        ("online-pbkd", "deepspeed_config", "deepspeed` or `accelerate_config"),
        ("mm-pbkd", "quantization", "load_in_4bit` or `load_in_8bit"),
        ("mm-pbkd", "bits", "load_in_4bit` or `load_in_8bit"),
        ("mm-pbkd", "lambda", "dual_init` or `lmbda"),
        ("pbkd", "lambda", "dual_init"),
        ("pairs", "max_new_tokens", "teacher_max_new_tokens` or `student_max_new_tokens"),
        ("pairs", "base_url", "teacher_base_url` or `student_base_url` or `judge_base_url"),
    ],
)
def test_what_is_meant(keys, command, key, meant):
    assert advice(key, keys[command]) == f"did you mean `{meant}`?"


@pytest.mark.parametrize(
    ("commands", "key"),
    [
        (("mm-pbkd", "online-pbkd", "pairs", "pbkd"), "max_prompt_length"),
        (("mm-pbkd", "online-pbkd", "pairs"), "max_length"),
        (("mm-pbkd", "online-pbkd", "pairs"), "max_seq_length"),
        (("mm-pbkd", "online-pbkd", "pairs"), "model_max_length"),
        (("pbkd", "mm-pbkd", "online-pbkd"), "ref_model"),
        (("mm-pbkd", "online-pbkd"), "label_smoothing"),
        (("mm-pbkd", "online-pbkd", "pairs"), "reference"),
        (("pairs",), "text_column"),
        (("pairs",), "ds_config"),
        (("pairs",), "quantization"),
        (("pairs",), "teacher_top_k"),
        (("pairs",), "teacher_min_new_tokens"),
        (("pbkd", "mm-pbkd"), "rm_learning_rate"),
        (("pbkd", "online-pbkd"), "q_learning_rate"),
        (("pbkd",), "adam_beta3"),
        (("pbkd",), "load_in_2bit"),
        (("pbkd",), "hub_dataset_id"),
    ],
)
def test_another_quantity_is_not_meant(keys, commands, key):
    assert {advice(key, keys[command]) for command in commands} == {None}


def test_a_beginning_that_few_keys_have(keys):
    assert advice("rounds_", keys["pbkd"]) == "did you mean `rounds`?"
    assert advice("imitation_q_", keys["pbkd"]) == "did you mean `imitation_q_warmup`?"
    assert advice("Seed", keys["pbkd"]) == "did you mean `seed`?"
    assert advice("round_", keys["pbkd"]) == "did you mean `round_optimizer` or `round_schedule`?"
    assert advice("teacher_", keys["pairs"]) != "did you mean `teacher_adapter`?"


def test_nothing_near_is_not_said(keys):
    assert advice("qqqqqqq", keys["pbkd"]) is None
    assert "WANDB_PROJECT" in advice("wandb_project", keys["pbkd"])


def test_a_launchers_flag_is_never_suggested(trl_kd, base):
    from_launcher = {option.lstrip("-").replace("-", "_") for option in launch_options()}
    parser = _Parser(pbkd.DATACLASSES, "pbkd", is_launched=True)
    own = {action.dest for action in parser._actions}
    for name in sorted(from_launcher - own):
        for typo in (f"{name}s", name[:-1]):
            told = parser._advice(typo)
            assert f"`{name}`" not in told, told
    assert "local_rank" not in parser._advice("local_ranks")
