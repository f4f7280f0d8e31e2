"""The folders in `fixtures/`, how to resume each, and what to read of the result.

`make_fixtures.py` runs this module with the code that writes the fixtures, and stores the results. The tests run it with the
present code, and compare.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.sampling.fault_server import FaultServer, Reply, chat, choice, error


FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Run:
    """
    One output folder of a fixture.

    Parameters:
        command (`str`): Command of `trl-kd`.
        config (`str`): Name of the YAML file of its arguments, without the ending.
        words (`tuple[str, ...]`): Further arguments.
        dies_at (`int`, *optional*): Number of the request, from 0, at which the process that wrote it was killed; it is
            finished without.
    """

    command: str
    config: str
    words: tuple[str, ...] = ()
    dies_at: int | None = None

    def arguments(self, output_dir: str) -> list[str]:
        return [self.command, "--config", f"{self.config}.yaml", "--output_dir", output_dir, *self.words]


PAIRS = {
    "finished": Run("pairs", "server"),
    "interrupted": Run("pairs", "server", dies_at=14),
    "shard-0": Run("pairs", "server", ("--shard", "0/2")),
    "shard-1": Run("pairs", "server", ("--shard", "1/2")),
    "judged": Run("pairs", "judged"),
    "judged-interrupted": Run("pairs", "judged", dies_at=25),
    "scored": Run("pairs", "scored"),
    "truncated": Run("pairs", "truncated"),
    "messages": Run("pairs", "messages"),
    "messages-interrupted": Run("pairs", "messages", dies_at=9),
    "likelihood": Run("pairs", "likelihood"),
    "reward_model": Run("pairs", "reward_model"),
}
"""The folders of the fixture `pairs`."""

REFUSED = {"tool-calls": Run("pairs", "tool_calls")}
"""A further one, which the code that wrote it refuses itself: it stores a call of a tool as the answer to a text."""

TRAININGS = {
    "pbkd": Run("pbkd", "pbkd", ("--dual_init", "1")),
    "pbkd_lora": Run("pbkd", "pbkd_lora", ("--dual_init", "1")),
    "mm_pbkd": Run("mm-pbkd", "mm_pbkd"),
    "online_pbkd": Run("online-pbkd", "online_pbkd"),
}
"""Fixtures of one checkpoint each, in `out`: `BROKEN_AT` of `STEPS` steps are done."""

STEPS, BROKEN_AT = 6, 3

OTHER_LOSS = ("pbkd", "pbkd_lora")
"""Of these the imitation term has another form since they were written, so that what they learn after that differs."""
OF_THE_LOSS = {"loss", "grad_norm", "pbkd/imitation", "pbkd/teacher_logps", "pbkd/lagrangian"}
OF_TRAINED_ROUNDS = {"imitation", "preference_nll", "accuracy", "dual"}

ROUNDS = {
    "after-one": Run("pbkd", "rounds", ("--dual_init", "1")),
    "in-sampling": Run("pbkd", "rounds", ("--dual_init", "1"), dies_at=5),
    "in-training": Run("pbkd", "rounds", ("--dual_init", "1")),
}
"""The folders of the fixture `rounds`: killed after round 1 of 2, and in the sampling and in the training of round 2."""


def unpack(name: str, folder: Path) -> None:
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")


def expected(name: str) -> dict[str, Any]:
    """What the code that wrote a fixture made of it."""
    return json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))


# ---- The server --------------------------------------------------------------------------------------------------------

NULLS: dict[str, Callable[[], Reply]] = {
    "A filtered question": lambda: chat(choice(None, "content_filter")),
    "A refused question": lambda: chat(
        {"message": {"role": "assistant", "content": None, "refusal": "I will not."}, "finish_reason": "stop"}
    ),
    "An empty question": lambda: chat(choice(None)),
    "A question that is too long": lambda: error(400, "This model's maximum context length is 4096 tokens."),
    "A question against the policy": lambda: Reply(
        {"error": {"message": "It is not allowed.", "code": "content_policy_violation"}}, 400
    ),
    "A bad question": lambda: error(400, "The prompt cannot be read."),
}
"""Prompts that the teacher does not answer, and what it says."""

CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}


def reply(body: dict[str, Any], number: int) -> Reply:
    """What each model says depends on what it is asked alone."""
    model, content = body["model"], body["messages"][-1]["content"]
    if model == "judge":
        return chat("I cannot say." if "7-5=" in content else f"Verdict: {'ABC'[int(_digest(content), 16) % 3]}")
    if model == "teacher" and content in NULLS:
        return NULLS[content]()
    if model == "teacher" and content.startswith("Weather"):
        message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        return chat({"message": message, "finish_reason": "tool_calls"})
    texts = [_digest(f"{model}/{content}/{body['seed']}/{place}")[:3] for place in range(body.get("n") or 1)]
    reasons = ["length" if model.endswith("-cut") and "02468".find(text[0]) >= 0 else "stop" for text in texts]
    return chat(*map(choice, texts, reasons), tokens=3)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def serving(script: Callable[[dict[str, Any], int], Reply] = reply) -> Iterator[FaultServer]:
    """The server, as that of the environment: no address stands in a fixture."""
    before = {name: os.environ.get(name) for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY")}
    with FaultServer(script) as server:
        os.environ |= {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "none"}
        try:
            yield server
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def asked(server: FaultServer) -> list[list[Any]]:
    """What a server was asked: model, the last message (a long one as a hash), seed and number of answers, sorted."""
    said = [(body, body["messages"][-1]["content"]) for body in server.bodies]
    return sorted(
        [body["model"], text if len(text) < 100 else _digest(text)[:16], body.get("seed") or 0, body.get("n") or 1]
        for body, text in said
    )


# ---- Running and reading -----------------------------------------------------------------------------------------------


def run(words: list[str]) -> None:
    """A command of `trl-kd`, in this process and in the current folder."""
    from trl_kd.scripts import cli

    code = cli.main(words)
    assert code == 0, f"{words} ended with {code}"


def lora_rounds(output_dir: str) -> Any:
    """Rounds of an adapter, in Python: those of the fixture `rounds_lora`."""
    from datasets import load_dataset
    from peft import LoraConfig

    from trl_kd import PbKDConfig, PbKDRounds
    from trl_kd.preferences.reward_function import RewardFunctionPreference, load_function
    from trl_kd.sampling import SamplingSettings
    from trl_kd.sampling.server import ServerSampler

    settings = yaml.safe_load(Path("rounds.yaml").read_text(encoding="utf-8"))
    settings |= {"output_dir": output_dir, "dual_init": 1.0}
    stop = yaml.safe_load(Path("pairs.yaml").read_text(encoding="utf-8"))["student_stop"]
    return PbKDRounds(
        "./start",
        PbKDConfig(**{key: value for key, value in settings.items() if key in PbKDConfig.__dataclass_fields__}),
        prompts=load_dataset("json", data_files="prompts.jsonl", split="train"),
        teacher=ServerSampler("teacher", settings=SamplingSettings(max_new_tokens=6)),
        preference=RewardFunctionPreference(load_function("rewards.py:digits"), scale=1.0),
        student=SamplingSettings(max_new_tokens=60, stop=tuple(stop), seed=1),
        rounds=2,
        prompts_per_round=4,
        reference="previous",
        num_student_samples=2,
        peft_config=LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        show_progress=False,
    )


def read_pairs(output_dir: str) -> dict[str, Any]:
    from trl_kd.pairs import load_pairs

    summary = json.loads(Path(output_dir, "summary.json").read_text(encoding="utf-8"))
    usage = {who: [of["requests"], of["completion_tokens"]] for who, of in summary.get("usage", {}).items()}
    return {"rows": list(load_pairs(output_dir)), "usage": usage}


def read_training(output_dir: str) -> dict[str, Any]:
    """Logs and λ at the end."""
    checkpoint = Path(output_dir, f"checkpoint-{STEPS}")
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    dual = json.loads((checkpoint / "pbkd_dual.json").read_text(encoding="utf-8"))
    return {"logs": numbers_of(history), "dual": dual["history"]}


def numbers_of(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Logs of steps, without what the machine and its load decide."""
    unequal = ("time", "runtime", "per_second", "flos", "num_tokens", "epoch")
    return [
        {name: value for name, value in entry.items() if not name.endswith(unequal)}
        for entry in history
        if "loss" in entry
    ]


def read_rounds(output_dir: str) -> dict[str, Any]:
    told = json.loads(Path(output_dir, "rounds.json").read_text(encoding="utf-8"))
    return {name: told[name] for name in ("rounds", "final", "regret_coefficient")}


def weights_file(output_dir: str) -> Path:
    """The weights that a training has saved."""
    return next(
        path
        for name in ("adapter_model.safetensors", "model.safetensors")
        if (path := Path(output_dir, name)).is_file()
    )
