"""What the runs of `make_fixtures.py` start from: models, data and the YAML files of their arguments."""

import json
from pathlib import Path
from typing import Any

import yaml
from cases import BROKEN_AT, NULLS, STEPS, run


QUESTIONS = {
    "1+1=": "2",
    "2+3=": "5",
    "40+2=": "42",
    "7-5=": "2",
    "12+13=": "25",
    "9*9=": "81",
    "6/3=": "2",
    "100-1=": "99",
}
REWARDS = """\
def digits(completions, **columns):
    return [float(sum(character.isdigit() for character in str(text))) for text in completions]


def shorter(prompts, first, second, **columns):
    sizes = [(len(str(a)), len(str(b))) for a, b in zip(first, second)]
    return [0.5 if a == b else float(a < b) for a, b in sizes]
"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]

SERVER = {"teacher": "api:teacher", "student": "api:student", "max_concurrency": 1, "seed": 3}
LOCAL = {
    "teacher": "./teacher",
    "student": "./start",
    "seed": 3,
    "teacher_max_new_tokens": 6,
    "student_max_new_tokens": 6,
}
PAIRS_CONFIGS: dict[str, dict[str, Any]] = {
    "server": SERVER | {"dataset_name": "questions.jsonl", "num_student_samples": 2, "preference": "teacher_wins"},
    "judged": SERVER | {"dataset_name": "plain.jsonl", "preference": "judge:judge"},
    "scored": SERVER
    | {
        "dataset_name": "plain.jsonl",
        "num_teacher_samples": 2,
        "num_student_samples": 3,
        "policy": "best_vs_worst",
        "preference": "verifier:rewards.py:digits",
        "preference_scale": 1.0,
    },
    "truncated": SERVER
    | {
        "dataset_name": "plain.jsonl",
        "teacher": "api:teacher-cut",
        "student": "api:student-cut",
        "num_student_samples": 2,
        "teacher_max_new_tokens": 3,
        "student_max_new_tokens": 3,
        "preference": "verifier:rewards.py:digits",
    },
    "messages": SERVER
    | {
        "dataset_name": "chats.jsonl",
        "num_student_samples": 2,
        "teacher_system_prompt": "Be brief.",
        "teacher_chat_template_kwargs": '{"enable_thinking": false}',
        "preference": "function:rewards.py:shorter",
    },
    "tool_calls": SERVER | {"dataset_name": "calls.jsonl", "preference": "teacher_wins"},
    "likelihood": LOCAL
    | {"dataset_name": "plain.jsonl", "preference": "likelihood:./teacher", "preference_scale": 1.0},
    "reward_model": LOCAL | {"dataset_name": "plain.jsonl", "preference": "reward_model:./reward"},
}

TRAINING = {
    "model_name_or_path": "./start",
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "max_steps": STEPS,
    "save_steps": BROKEN_AT,
    "learning_rate": 0.003,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 2,
    "seed": 3,
}
MOVING = {"dual_learning_rate": 0.5, "preference_nll_target": 0.1, "confidence_radius": 0.05}
LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]}
TRAINING_CONFIGS: dict[str, dict[str, Any]] = {
    "pbkd": TRAINING | MOVING | {"dataset_name": "pairs", "gradient_accumulation_steps": 2},
    "pbkd_lora": TRAINING
    | LORA
    | {"dataset_name": "pairs", "imitation": "token", "teacher_model_name_or_path": "./teacher"},
    "mm_pbkd": TRAINING
    | {
        "dual_learning_rate": 0.5,
        "confidence_radius": 0.05,
        "teacher_model_name_or_path": "./teacher",
        "dataset_name": "answers.jsonl",
        "preference_dataset": "pairs.jsonl",
        "lmbda": 0.5,
        "max_completion_length": 6,
        "q_head": "mlp",
        "q_warmup_steps": 2,
    },
    # A generation is of two steps and used twice: step 3 is in its middle
    "online_pbkd": TRAINING
    | {
        "dataset_name": "prompts.jsonl",
        "pairs_config": "pairs.yaml",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "num_generations": 2,
        "max_completion_length": 6,
        "imitation_weight": 0.2,
        "rm_lora_r": 2,
        "rm_learning_rate": 0.01,
        "rm_steps": 2,
        "rm_warmup_accuracy": 0.0,
    },
}
ROUNDS_CONFIG = (
    TRAINING
    | MOVING
    | {
        "rounds": 2,
        "pairs_config": "pairs.yaml",
        "prompts_per_round": 4,
        "round_optimizer": "carried",
        "max_steps": 4,
        "save_steps": 2,
    }
)
ASKING_TEACHER = {
    "teacher": "api:teacher",
    "teacher_max_new_tokens": 6,
    "max_concurrency": 1,
    "preference": "verifier:rewards.py:digits",
    "preference_scale": 1.0,
    "seed": 3,
}


def save_models(with_reward: bool) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.conftest import make_tokenizer, save_tiny

    save_tiny(Path("start"), num_hidden_layers=1)
    save_tiny(Path("teacher"), seed=1, num_hidden_layers=1)
    if not with_reward:
        return
    config = LlamaConfig.from_pretrained("teacher", num_labels=1, architectures=None)
    LlamaForSequenceClassification(config).save_pretrained("reward")
    make_tokenizer().save_pretrained("reward")


def write_lines(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def write_configs(configs: dict[str, dict[str, Any]]) -> None:
    for name, config in configs.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def prepare(fixture: str) -> None:
    """The inputs of a fixture, in the current folder."""
    save_models(with_reward=fixture == "pairs")
    Path("rewards.py").write_text(REWARDS, encoding="utf-8")
    plain = [{"prompt": question, "answer": answer} for question, answer in QUESTIONS.items()]
    if fixture == "pairs":
        nulls = [{"prompt": prompt, "answer": ""} for prompt in NULLS]
        more = [{"prompt": "Größe — 大きさ?", "answer": "ü"}, plain[0]]  # the second is there twice
        write_lines("questions.jsonl", [*plain[:3], *nulls[:3], *plain[3:6], *nulls[3:], *plain[6:], *more])
        write_lines("plain.jsonl", plain)
        write_lines("calls.jsonl", [plain[0], {"prompt": "Weather in Rome?", "answer": ""}, plain[1]])
        write_lines("chats.jsonl", chats())
        write_configs(PAIRS_CONFIGS)
    elif fixture.startswith("rounds"):
        write_lines("prompts.jsonl", [{"prompt": question} for question in list(QUESTIONS)[:6]])
        # Answers of the student end by a letter, not by their length: a cut one has no end to learn
        student = {"student_stop": list("abcdefghijklmnopqrstuvwxyz"), "student_max_new_tokens": 60}
        pairs = {"dataset_name": "prompts.jsonl", "num_student_samples": 2} | student
        write_configs({"rounds": ROUNDS_CONFIG, "pairs": ASKING_TEACHER | pairs})
    else:
        write_configs({fixture: TRAINING_CONFIGS[fixture]})
    if fixture.startswith("pbkd"):
        wrong = ["3", "six", "42", "3", "2.5", "8", "20", "101!"]
        write_lines("answered.jsonl", [row | {"s": text} for row, text in zip(plain, wrong, strict=True)])
        words = ("--teacher_column", "answer", "--student_column", "s", "--preference_scale", "1.0")
        run(["pairs", "--dataset_name", "answered.jsonl", "--output_dir", "pairs", *words,
             "--preference", "verifier:rewards.py:digits"])  # fmt: skip
    elif fixture == "mm_pbkd":
        rows = [{"prompt": question, "completion": answer} for question, answer in QUESTIONS.items()]
        write_lines("answers.jsonl", rows)
        write_lines("pairs.jsonl", [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a * b + 7)}
                                    for a in range(5) for b in range(4)])  # fmt: skip
    elif fixture == "online_pbkd":
        write_lines("prompts.jsonl", [{"prompt": f"{number}+1="} for number in range(16)])
        write_configs({"pairs": ASKING_TEACHER})


def chats() -> list[dict[str, Any]]:
    """Conversations of several kinds: the optional columns are null in some rows."""

    def user(text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    kwargs = {"style": "plain"}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
    rows = [
        {"prompt": [user("1+1=")], "tools": None, "chat_template_kwargs": None},
        {
            "prompt": [{"role": "system", "content": "Count."}, user("2+3=")],
            "tools": None,
            "chat_template_kwargs": kwargs,
        },
        {"prompt": [user("Weather in Rome?")], "tools": TOOLS, "chat_template_kwargs": None},
        {
            "prompt": [
                user("And in Rome?"),
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "name": "weather", "content": "Rain."},
            ],
            "tools": TOOLS,
            "chat_template_kwargs": kwargs,
        },
        {
            "prompt": [user("7-5="), {"role": "assistant", "content": "2"}, user("Sure?")],
            "tools": None,
            "chat_template_kwargs": None,
        },
    ]
    return [*rows, *({"prompt": [user(text)], "tools": None, "chat_template_kwargs": None} for text in QUESTIONS)]
