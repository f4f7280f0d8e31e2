"""README and docs: their Python blocks run, their links lead somewhere."""

import re
import shlex
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset

from trl_kd import MMPbKDConfig, OnlinePbKDConfig
from trl_kd.scripts import mm_pbkd, online_pbkd, pbkd
from trl_kd.scripts.arguments import Parsed, parse
from trl_kd.scripts.errors import InputError
from trl_kd.scripts.pairs_arguments import PairsArguments


ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


COMMANDS = {
    "pbkd": pbkd.DATACLASSES,
    "mm-pbkd": mm_pbkd.DATACLASSES,
    "online-pbkd": online_pbkd.DATACLASSES,
    "pairs": (PairsArguments,),
}


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        fenced = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), re.DOTALL | re.MULTILINE)
        for number, (_, code) in enumerate(fenced):
            found.append(pytest.param(textwrap.dedent(code), id=f"{page.name}-{number}"))
    return found


def commands() -> list:
    """Every `trl-kd pbkd`, `mm-pbkd`, `online-pbkd` and `pairs` line of bash blocks, in words, without a launcher."""
    found = []
    for block in blocks("bash"):
        (code,) = block.values
        for number, line in enumerate(code.replace("\\\n", " ").splitlines()):
            words = shlex.split(line, comments=True)
            if "trl-kd" in words:
                command, *rest = words[words.index("trl-kd") + 1 :]
                if command in COMMANDS:
                    found.append(pytest.param(command, rest, id=f"{block.id}-{number}-{command}"))
    return found


def parsed(command: str, words: list[str]) -> Parsed:
    """What the command's own parser reads."""
    return parse(COMMANDS[command], words, f"trl-kd {command}")


def run(code: str, folder: str, **names) -> dict:
    """Runs a page's code with a tiny model for one of the Hub, on CPU, for two steps; all else is as it stands there."""
    code = re.sub(r'"Qwen/Qwen2.5-[\w.]+-Instruct"', repr(folder), code)
    here = 'use_cpu=True, bf16=False, max_steps=2, report_to="none", output_dir='
    code = re.sub(r'(PbKD|DPO)Config\("', rf'\1Config({here}"', code)
    space = {"__name__": "page", **names}
    exec(compile(code, "page", "exec"), space)
    return space


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tiny_dir, tmp_path, monkeypatch):
    if "import ray" in code:
        pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    run(code, tiny_dir)


@pytest.mark.parametrize(("sign", "name"), [("-", "DPOTrainer"), ("+", "PbKDTrainer")])
def test_both_sides_of_the_diff_run(sign, name, tiny_dir, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = "".join(line[1:] + "\n" for line in diff.splitlines() if line[:1] in (sign, " "))
    trainer = run(code, tiny_dir, pairs=Dataset.from_list(pairs))["trainer"]
    assert type(trainer).__name__ == name
    assert trainer.state.global_step == 2


def test_a_diff_says_the_same_on_every_page():
    imports = [[line for line in block.values[0].splitlines() if "import" in line] for block in blocks("diff")]
    assert {len(lines) for lines in imports} == {2}
    replacements = {tuple(lines) for lines in imports}
    assert len({before for before, _ in replacements}) == len(replacements)


@pytest.mark.parametrize(("command", "words"), commands())
def test_commands_are_understood(command, words, tmp_path, monkeypatch):
    """By the command's own parser, from the repository's root, with the YAML files that the pages show."""
    (tmp_path / "pairs.yaml").write_text("{}")  # a name for what other commands of its page say
    for block in blocks("yaml"):
        (code,) = block.values
        if named := re.match(r"# ([\w.]+\.yaml)\n", code):
            (tmp_path / named[1]).write_text(code)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    read = parsed(command, words)
    if command == "pairs":  # which no launcher starts
        assert not read.launch_args


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_blocks_are_understood(code, tmp_path):
    path = tmp_path / "page.yaml"
    path.write_text(code)
    keys = set(re.findall(r"^(\w+):", code, re.MULTILINE))
    named = {"# mm_": "mm-pbkd", "# online_": "online-pbkd", "# pairs": "pairs"}
    command = next((command for start, command in named.items() if code.startswith(start)), "pbkd")
    values = parsed(command, ["--config", str(path)]).values
    assert keys
    for key in keys:
        assert any(getattr(found, key, None) not in (None, []) for found in values), key


def test_there_are_commands_and_a_wrong_one_is_noticed():
    """A pattern that finds nothing finds nothing wrong."""
    found = [param.values for param in commands()]
    assert {command for command, _ in found} == set(COMMANDS)
    assert len(found) >= 8
    for command in COMMANDS:
        with pytest.raises(InputError, match="unknown key `--output_dri`: did you mean `output_dir`"):
            parsed(command, ["--output_dri", "student"])


@pytest.mark.parametrize(("page", "config"), [("white_box", MMPbKDConfig), ("online", OnlinePbKDConfig)])
def test_a_page_has_every_setting_with_its_default(page, config):
    text = (ROOT / f"docs/{page}.md").read_text().partition("## Settings")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| `")]
    told = {}
    for names, defaults in rows:
        names = re.findall(r"`(\w+)`", names)
        values = defaults.split(", ") if ", " in defaults else [defaults] * len(names)
        told |= {name: value.strip('`"') for name, value in zip(names, values, strict=True)}
    ours = {f.name: str(f.default) for f in fields(config) if f.name not in config.__base__.__dataclass_fields__}
    assert ours == {name: value for name, value in told.items() if not name.startswith("teacher_model_")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_no_machine_path_and_no_team_talk():
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"/(?:work|root|home|tmp)/\w", text), page
