"""Trainings that earlier code has begun go on from their checkpoints, to the numbers that the earlier code came to.

Where the loss is another one now, the first step after the checkpoint shows that nothing was lost: weights, data and λ.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import TrainerCallback

from tests.compat.cases import (
    BROKEN_AT,
    FIXTURES,
    OF_THE_LOSS,
    OTHER_LOSS,
    STEPS,
    TRAININGS,
    asked,
    expected,
    numbers_of,
    read_training,
    run,
    serving,
    unpack,
    weights_file,
)
from trl_kd import MMPbKDConfig, MMPbKDTrainer, OnlinePbKDConfig, OnlinePbKDTrainer, PbKDConfig, PbKDTrainer
from trl_kd.pairs import load_pairs
from trl_kd.preferences.reward_function import RewardFunctionPreference, load_function
from trl_kd.sampling import SamplingSettings
from trl_kd.sampling.server import ServerSampler


@pytest.fixture
def folder(request, tmp_path, monkeypatch) -> Path:
    """The unpacked fixture of the case, as the current folder: what it holds has relative names."""
    if request.node.callspec.params["name"] == "online_pbkd":
        pytest.importorskip("openai", reason="needs the extra `api`")
    unpack(request.node.callspec.params["name"], tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(name: str, found: dict, weights: dict) -> None:
    """Within what another CPU, or another order of sums, may change. Later code may log more."""
    wanted = expected(name)["out"]
    assert [entry["step"] for entry in found["logs"]] == list(range(1, STEPS + 1))
    if name == "online_pbkd":
        return check_up_to_the_student(found, wanted)
    steps = STEPS if name not in OTHER_LOSS else BROKEN_AT + 1
    for entry, former in list(zip(found["logs"], wanted["logs"], strict=True))[:steps]:
        changed = OF_THE_LOSS if name in OTHER_LOSS and former["step"] > BROKEN_AT else set()
        same = {key: value for key, value in former.items() if key not in changed}
        assert {key: entry.get(key) for key in same} == pytest.approx(same, rel=1e-4, abs=1e-6, nan_ok=True)
    assert found["dual"][:steps] == pytest.approx(wanted["dual"][:steps], rel=1e-6)
    if name in OTHER_LOSS:
        assert len(found["dual"]) == len(wanted["dual"])
        return
    assert_close(weights, load_file(FIXTURES / f"{name}.safetensors"), rtol=0, atol=1e-6)


def check_up_to_the_student(found: dict, wanted: dict) -> None:
    """Of a run whose imitation term has become a mean over tokens, so that the student goes another way: the logs from
    before the checkpoint, the rest of the generation that was under way, and the pairs."""
    of_student = ("loss", "grad_norm", "pbkd/imitation_nll")
    for entry, former in zip(found["logs"][:BROKEN_AT], wanted["logs"], strict=False):
        assert {key: entry.get(key) for key in former} == pytest.approx(former, rel=1e-4, abs=1e-6, nan_ok=True)
    under_way = {key: value for key, value in wanted["logs"][BROKEN_AT].items() if key not in of_student}
    assert {key: found["logs"][BROKEN_AT][key] for key in under_way} == pytest.approx(under_way, rel=1e-4, abs=1e-6)
    for entry, former in zip(found["logs"][BROKEN_AT:], wanted["logs"][BROKEN_AT:], strict=True):
        for name in {"pbkd/dataset_size", "completions/mean_length"} & former.keys():
            assert entry[name] == former[name], name
        assert 0 < entry["pbkd/imitation"] < entry["pbkd/teacher_nll"] < 10
    assert found["dual"] == pytest.approx(wanted["dual"], rel=1e-2)


@pytest.mark.parametrize("name", TRAININGS)
def test_the_command_goes_on(name, folder):
    with serving() as server:
        run([*TRAININGS[name].arguments("out"), "--resume_from_checkpoint", "true"])
    check(name, read_training("out"), load_file(weights_file("out")))
    assert asked(server) == expected(name)["out"]["asked"]


class Steps(TrainerCallback):
    """The steps that are taken, counted from 0."""

    def __init__(self):
        self.begun: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun.append(state.global_step)


def make(name: str):
    """What the YAML file of the fixture says, in Python."""
    settings = yaml.safe_load(Path(f"{name}.yaml").read_text(encoding="utf-8")) | {"output_dir": "out"}
    config = {"mm_pbkd": MMPbKDConfig, "online_pbkd": OnlinePbKDConfig}.get(name, PbKDConfig)
    args = config(**{key: value for key, value in settings.items() if key in config.__dataclass_fields__})
    if name == "mm_pbkd":
        rows, pairs = (
            load_dataset("json", data_files=f"{file}.jsonl", split="train") for file in ("answers", "pairs")
        )
        return MMPbKDTrainer("./start", args.teacher_model_name_or_path, args, rows, preference_dataset=pairs)
    if name == "online_pbkd":
        return OnlinePbKDTrainer(
            "./start",
            args=args,
            train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
            teacher=ServerSampler("teacher", settings=SamplingSettings(max_new_tokens=6, seed=6)),
            preference_function=RewardFunctionPreference(load_function("rewards.py:digits"), scale=1.0),
        )
    lora = LoraConfig(r=2, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapter = {"peft_config": lora} if name == "pbkd_lora" else {}
    args = replace(args, dual_init=1.0)
    return PbKDTrainer("./start", args=args, train_dataset=load_pairs("pairs"), **adapter)


@pytest.mark.parametrize("name", TRAININGS)
def test_python_goes_on(name, folder):
    with serving() as server:
        trainer, steps = make(name), Steps()
        trainer.add_callback(steps)
        trainer.train(resume_from_checkpoint=f"out/checkpoint-{BROKEN_AT}")
    assert steps.begun == list(range(BROKEN_AT, STEPS))
    trainer.save_model("saved")
    found = {"logs": numbers_of(trainer.state.log_history), "dual": trainer.dual.history}
    check(name, found, load_file(weights_file("saved")))
    assert asked(server) == expected(name)["out"]["asked"]
