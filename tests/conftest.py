"""Tiny models and pairs, made on the spot: no test reaches the network."""

import importlib.util
import logging
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Several test processes share the cores: without this their threads spin against each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


torch.set_num_threads(1)

OLDEST = (
    *("compat/test_pairs.py", "compat/test_trainings.py", "pairs/", "preferences/test_judge.py", "responses/"),
    *("sampling/test_server.py", "test_house.py", "trainers/test_pbkd_responses.py"),
    *("trainers/test_pbkd_data.py", "trainers/test_mm_pbkd_input.py", "trainers/test_online_pbkd_input.py"),
    *("trainers/test_pbkd_equals_dpo.py", "trainers/test_mm_pbkd_equals.py", "trainers/test_online_pbkd_equals.py"),
    *("trainers/test_bf16.py", "trainers/test_rounds_parts.py"),
    *("scripts/test_pbkd_run.py", "scripts/test_pbkd_input.py", "scripts/test_mm_pbkd_run.py"),
    *("scripts/test_online_pbkd.py", "scripts/test_rounds.py"),
    *("sampling/test_model_files.py", "scripts/test_bad_models.py", "scripts/test_data_files.py"),
)
"""Tests that run with the lower bounds of the dependencies too: data and stores, servers, parity with TRL's trainers, and
training by the commands."""


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    for item in items:
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("distributed")
        if not is_long and item.path.relative_to(Path(__file__).parent).as_posix().startswith(OLDEST):
            item.add_marker("oldest")


CHARACTERS = "0123456789+-*/=?!., abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + '?' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a?{% endif %}"
)


def make_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token a character, after `<pad>`, `<eos>` and `<unk>`."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(seed: int = 0, vocab_size: int | None = None, **settings) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size or len(CHARACTERS) + 3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **{
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            **settings,
        },
    )
    return LlamaForCausalLM(config)


def save_tiny(folder: Path, tokenizer=None, **settings) -> str:
    """Saves a tiny model with its tokenizer; `DPOTrainer` reloads its reference from the folder."""
    make_model(**settings).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("teacher"), seed=1, hidden_size=24)


@pytest.fixture
def pairs() -> list[dict]:
    """Rows of different lengths, in TRL's standard preference format."""
    questions = ["1+1=", "2+3=", "40+2=", "7-5=", "12+13=", "9*9=", "6/3=", "100-1="]
    right = ["2", "5", "42", "2", "25", "81", "2", "99"]
    wrong = ["3", "six", "4", "3", "2.5", "8", "20", "101!"]
    return [{"prompt": q, "chosen": c, "rejected": r} for q, c, r in zip(questions, right, wrong, strict=True)]


@pytest.fixture
def settings(tmp_path) -> dict:
    """Training arguments under which CPU runs are exact and quiet."""
    return {
        "output_dir": str(tmp_path / "out"),
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }


def refuse_weights(monkeypatch, owner: Any = LlamaForCausalLM) -> None:
    """Lets a class load no weights. In rehearsal, of shapes and without a name, it goes on loading."""
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def in_rehearsal(cls, name, *args, **options):
        assert name is None, "weights are loaded"
        return load(cls, name, *args, **options)

    monkeypatch.setattr(owner, "from_pretrained", classmethod(in_rehearsal))


@pytest.fixture(autouse=True)
def unpacked_four_bits(monkeypatch):
    """On CPUs with AVX512-BF16 bitsandbytes packs 4-bit layers when they first answer, where widths that 64 does not divide
    fail: tiny models, on such a machine alone. Tests of what is trained turn it on again."""
    if importlib.util.find_spec("bitsandbytes"):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)


@pytest.fixture(autouse=True)
def audible_libraries():
    """The demo silences its libraries for the whole process; a test that reads their messages must not depend on it."""
    for name in ("trl", "trl_kd", "accelerate"):
        logging.getLogger(name).setLevel(logging.NOTSET)
