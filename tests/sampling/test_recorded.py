"""What is recorded of fields that users set freely: those that are listed, and of others the name."""

import json

import pytest
import torch

from trl_kd.preferences.likelihood import TeacherLikelihood
from trl_kd.sampling import SamplingSettings
from trl_kd.sampling.local import LocalSampler
from trl_kd.sampling.recorded import (
    MODEL_FIELDS,
    NOT_STORED,
    REQUEST_FIELDS,
    hidden_texts,
    recorded,
    recorded_description,
)
from trl_kd.sampling.server_errors import hide_in
from trl_kd.sampling.vllm import VLLMSampler
from trl_kd.trainers.mm_pbkd.config import MMPbKDConfig
from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig
from trl_kd.trainers.pbkd.config import PbKDConfig


KEY = "planted-0123456789"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"top_k": 20, "seed": None, "ignore_eos": True}, None),
        ({"stop": ["\n", "END"], "reasoning_effort": "high", "guided_choice": ["yes", "no"]}, None),
        ({"provider": {"order": ["a/fp8"], "allow_fallbacks": False, "max_price": {"prompt": 1}}}, None),
        ({"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}}, None),
        ({"headers": {"a": KEY}, "b": KEY, "c": None}, {"headers": NOT_STORED, "b": NOT_STORED, "c": NOT_STORED}),
        ({"provider": {"sort": "price", "key": KEY}}, {"provider": {"sort": "price", "key": NOT_STORED}}),
    ],
)
def test_listed_fields_are_kept_and_others_named(given, kept):
    assert recorded(given, REQUEST_FIELDS) == (given if kept is None else kept)


def test_texts_of_free_objects_are_compared_and_not_shown():
    one, two = (
        recorded({"response_format": {"json_schema": {"name": name, "strict": True}}}, REQUEST_FIELDS)
        for name in (KEY, "another")
    )
    assert one != two
    assert KEY not in str(one)
    assert one["response_format"]["json_schema"]["strict"] is True
    assert recorded(one, REQUEST_FIELDS) == one  # what is read again from a folder


def test_descriptions_of_others_stay_as_they_are():
    theirs = {"name": "mine", "extra": {"token": "x"}}
    assert recorded_description(theirs) is theirs
    assert recorded_description({"sampler": "local", **theirs})["extra"] == {"token": NOT_STORED}


def test_what_is_hidden_of_a_request():
    own = {"model": KEY, "messages": [{"content": KEY}], "tools": [KEY]}
    fields = {
        "top_k": 3,
        "stop": [KEY],
        "a": ["one", {"b": "two"}],
        "response_format": {"type": "json_object", "x": KEY},
    }
    assert hidden_texts({**own, **fields}) == ["one", "two", KEY]
    numbers = {"pin": 98769876, "seed": 98769876, "mine": 4096, "flag": True, "deep": [[12345678]]}
    assert hidden_texts(numbers) == ["98769876", "12345678"]


def test_an_echo_may_be_a_number():
    echo = {"arguments": {"pin": 98769876, "n": 3, "x": 0.5, "flag": True, "none": None, "texts": ["pin 98769876"]}}
    hidden = {"pin": "***", "n": 3, "x": 0.5, "flag": True, "none": None, "texts": ["pin ***"]}
    assert hide_in(echo, ["98769876"], 8) == {"arguments": hidden}


OPTIONS = {"dtype": "float32", "token": KEY, "adapter_kwargs": {"deep": [[{"er": KEY}]]}, "quantization_config": None}


def test_options_of_loading(tiny_dir):
    settings = SamplingSettings()
    parts = [
        LocalSampler(tiny_dir, settings, model_init_kwargs=OPTIONS, chat_template_kwargs={"x": KEY}),
        VLLMSampler(
            tiny_dir, settings, chat_template_kwargs={"x": [KEY]}, hf_token=KEY, hf_overrides={"a": KEY}, extra=KEY
        ),
        TeacherLikelihood(tiny_dir, model_init_kwargs=OPTIONS),
    ]
    described = [part.describe() for part in parts]
    assert KEY not in json.dumps(described)
    assert described[0]["model_options"]["dtype"] == described[2]["model_init_kwargs"]["dtype"] == "float32"
    assert described[1]["model_options"]["extra"] == described[2]["model_init_kwargs"]["adapter_kwargs"] == NOT_STORED
    assert all(recorded_description(one) == one for one in described)


@pytest.mark.parametrize("config", [PbKDConfig, MMPbKDConfig, OnlinePbKDConfig])
def test_what_trackers_log_of_a_training(config, tmp_path):
    options = {**OPTIONS, "dtype": torch.float32}
    args = config(str(tmp_path), model_init_kwargs=options, use_cpu=True, bf16=False)
    assert KEY not in args.to_json_string()
    assert args.to_dict()["model_init_kwargs"] == {"dtype": "float32", "quantization_config": None}
    assert args.model_init_kwargs["token"] == KEY
    assert set(MODEL_FIELDS.rules) >= {"dtype", "quantization_config", "revision"}
