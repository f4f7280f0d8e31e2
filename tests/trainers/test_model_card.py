"""Names in model cards are shown and do nothing else, whatever they are."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard

from tests.trainers.mm_cases import make as make_mm
from tests.trainers.online_cases import digits
from tests.trainers.online_cases import make as make_online
from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.trainers.rounds.card import add_rounds_section


HOSTILE = (
    'a](http://x) <script>alert("1")</script> `b` | *c* _d_ ~~e~~ $f$ {{ g }} \\ %s "h" \'i\'\n## Training procedure\n'
    "```\n---\n### Framework versions\nwin rate against the teacher, before this round | 1 |"
)
FILE_NAME = HOSTILE.replace("/", "-")[:200]
PLAIN = "plain"


class Teacher:
    is_lookup = True
    needs_names = ()

    def __init__(self, name: str):
        self.name = name

    def describe(self):
        return {"sampler": "mine", "model": self.name}

    def sample(self, requests):
        return iter(())


def preference(name: str):
    def compare(prompts, first, second, **columns):
        return digits(prompts, first, second, **columns)

    compare.describe = lambda: {"preference": name, "model": name}
    return compare


def pbkd_card(name, folder, tiny_dir, teacher_dir, pairs, settings) -> None:
    trainer = PbKDTrainer(
        model=tiny_dir,
        args=PbKDConfig(**settings),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset={name: Dataset.from_list(pairs)},
    )
    trainer.card_teacher = name
    trainer.card_results = {name: name, "exact match": 0.5}
    finish(trainer, name)


def mm_card(name, folder, tiny_dir, teacher_dir, pairs, settings) -> None:
    trainer = make_mm(tiny_dir, teacher_dir, settings)
    trainer.teacher.name = name
    trainer.card_results = {name: name}
    finish(trainer, name)


def online_card(name, folder, tiny_dir, teacher_dir, pairs, settings) -> None:
    trainer = make_online(tiny_dir, settings, teacher=Teacher(name), preference_function=preference(name))
    trainer.args.teacher_column = name
    trainer.parts.reward_model = name
    trainer.card_results = {name: name}
    finish(trainer, name)
    trainer.parts.teacher = None
    trainer.create_model_card(model_name=name, dataset_name=name)


def finish(trainer, name) -> None:
    trainer.model.config._name_or_path = name
    trainer.args.eos_token = name
    trainer.args.seed = name  # settings are shown as they are
    trainer.create_model_card(model_name=name, dataset_name=name)


def outline(card: str) -> tuple[list[str], list[int], int]:
    """Headings, cells of each row of a table, and fences: what a name must not change."""
    headings = [line for line in card.splitlines() if re.match(r"#+ |Citation|-{3}", line)]
    rows = [len(re.findall(r"(?<!\\)\|", line)) for line in card.splitlines() if line.startswith("|")]
    return headings[1:], rows, len(re.findall(r"^ *```", card, re.MULTILINE))


def check(path: Path, plain: Path, name: str) -> None:
    card = ModelCard.load(path)
    text = card.text
    assert text.lstrip().startswith("# Model Card for a\\](http://x)")
    assert outline(text)[1:] == outline(ModelCard.load(plain).text)[1:]
    _, *ours = [line for line in text.splitlines() if line.startswith("#") and not line.startswith("# Model Card")]
    _, *theirs = [
        line for line in ModelCard.load(plain).text.splitlines() if line.startswith("#") and "Card for" not in line
    ]
    assert ours == theirs
    program = text.split("```python\n")[1].split("\n```")[0]
    call = next(n for n in ast.walk(ast.parse(program)) if isinstance(n, ast.Call) and n.keywords)
    assert call.keywords[0].value.value == path.parent.name
    body = text.replace(program, "")
    for harmful in ("<script", "](http://x)", " *c*", "~~e~~", " $f$"):
        assert not re.search(rf"(?<!\\){re.escape(harmful)}", body), harmful
    front = yaml.safe_load(path.read_text(encoding="utf-8").split("\n---\n")[0])
    assert front["model_name"] == name
    assert front["datasets"] == name
    assert "base_model" not in front


@pytest.mark.parametrize("make", [pbkd_card, mm_card, online_card])
def test_names_are_shown_and_do_nothing(make, tiny_dir, teacher_dir, pairs, settings, tmp_path):
    paths = []
    for name, folder in ((HOSTILE, FILE_NAME), (PLAIN, PLAIN)):
        given = {**settings, "output_dir": str(tmp_path / folder)}
        make(name, tmp_path / folder, tiny_dir, teacher_dir, pairs, given)
        paths.append(tmp_path / folder / "README.md")
    check(*paths, HOSTILE)


def test_names_in_the_account_of_rounds(tmp_path):
    cards = []
    for name, folder in ((HOSTILE, FILE_NAME), (PLAIN, PLAIN)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "README.md"
        path.write_text('---\ntags: []\n---\n\n# Model Card for student\n\nmodel="student"\n\n## Training procedure\n')
        record = {"round": 1, "prompts": name, "pairs": name, "steps": 1}
        told = {
            "settings": {
                "preference": {"preference": name, "functions": [{"name": name}]},
                **{"accumulate": True, "reference": "start", "schedule": "all", "optimizer": "fresh", "seed": 1},
                "training": {"dual_init": 0.0, "dual_learning_rate": 0.0},
            },
            "rounds": [record],
            "final": {"student_win_rate": None, "ended": name},
        }
        add_rounds_section(str(path), told)
        cards.append(ModelCard.load(path).text)
    assert outline(cards[0])[1] == outline(cards[1])[1]
    hostile = [line for line in cards[0].splitlines() if line.startswith("#")]
    assert hostile == [line for line in cards[1].splitlines() if line.startswith("#")]
    assert "<script" not in re.sub(r"^model=.*$", "", cards[0], flags=re.MULTILINE)  # in code it is a text of Python
