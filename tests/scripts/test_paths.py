"""Paths in arguments: any name works in every command, and `~` means one thing from the beginning to the end."""

import json
import os
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from trl_kd.demo import experiment
from trl_kd.pairs import load_pairs
from trl_kd.scripts import demo, mm_pbkd, online_pbkd, paths, pbkd
from trl_kd.scripts.arguments import parse
from trl_kd.scripts.checks import check_output_dir
from trl_kd.scripts.data import load_datasets, load_split
from trl_kd.scripts.errors import InputError
from trl_kd.scripts.pairs_arguments import PairsArguments
from trl_kd.scripts.paths import resolved


HOSTILE = "run: [1] *?#%41\n{ä,漢}~'\"$(x)\\"
"""A name that a pattern, an address, a shell and Markdown would each read in their own way."""
NAMES = [
    "run[1]",
    "[!a]",
    "a*b",
    "a?b",
    "a b",
    "a#b",
    "a%41b",
    "a\nb",
    "-x",
    "~x",
    "ä漢",
    "{a,b}",
    "{a}{a}",
    "a(b",
    "a+++b",
    "a:b",
    "a'b",
    'a"b',
    "a\\b",
]

DIGITS = """
def digits(completions, **columns):
    return [float(sum(character.isdigit() for character in text)) for text in completions]
"""
TRAINING = (
    *("--bf16", "false", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", "1"),
    *("--per_device_train_batch_size", "4", "--gradient_checkpointing", "false"),
)
ONLINE = (
    *("--num_generations", "2", "--max_completion_length", "4"),
    *("--rm_lora_r", "0", "--rm_learning_rate", "1e-2", "--rm_warmup_accuracy", "0"),
)


@pytest.fixture
def furnished(tiny_dir, teacher_dir, pairs):
    """Puts models, rows and a verifier into a folder, and returns what each command is told of it when the folder is
    written as `name`."""

    def furnish(folder: Path, name: str) -> dict[str, list[str]]:
        for source, model in (("student", tiny_dir), ("teacher", teacher_dir)):
            shutil.copytree(model, folder / source)
        rows = [json.dumps({**row, "completion": row["chosen"]}) for row in pairs]
        (folder / "rows.jsonl").write_text("\n".join(rows))
        (folder / "data").mkdir()
        (folder / "data" / "train.jsonl").write_text("\n".join(rows))
        (folder / "digits.py").write_text(DIGITS)
        asking = {
            "teacher": f"{name}/teacher",
            "preference": f"verifier:{name}/digits.py:digits",
            "teacher_max_new_tokens": 4,
        }
        of_rounds = asking | {"dataset_name": f"{name}/rows.jsonl", "student_max_new_tokens": 4}
        (folder / "online.yaml").write_text(yaml.safe_dump(asking))
        (folder / "rounds.yaml").write_text(yaml.safe_dump(of_rounds))
        (folder / "pairs.yaml").write_text(yaml.safe_dump(of_rounds | {"student": f"{name}/student"}))
        student = ("--model_name_or_path", f"{name}/student", *TRAINING)
        teacher = ("--teacher_model_name_or_path", f"{name}/teacher", "--max_completion_length", "4")
        return {
            "pairs": ["pairs", "--config", f"{name}/pairs.yaml"],
            "pbkd": ["pbkd", "--dataset_name", f"{name}/data", *student],
            "rounds": ["pbkd", "--rounds", "1", "--pairs_config", f"{name}/rounds.yaml", *student],
            "mm-pbkd": [
                *("mm-pbkd", "--dataset_name", f"{name}/rows.jsonl", "--preference_dataset", f"{name}/data"),
                *(*student, *teacher, "--q_warmup_steps", "1"),
            ],
            "online-pbkd": [
                *("online-pbkd", "--dataset_name", f"{name}/data", "--pairs_config", f"{name}/online.yaml"),
                *(*student, *ONLINE),
            ],
        }

    return furnish


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


COMMANDS = ("pairs", "pbkd", "rounds", "mm-pbkd", "online-pbkd")


def finish(trl_kd, words: list[str], folder: Path) -> None:
    """Runs a command to its end; pairs that it has made can be read."""
    done = trl_kd(*words)
    assert done.code == 0, done.err
    assert (folder / "README.md").is_file()
    for made in folder.rglob("answers.db"):
        if (made.parent / "data").is_dir():
            assert len(load_pairs(made.parent))


# ---- Commands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_any_name(trl_kd, furnished, tmp_path, command):
    folder = tmp_path / HOSTILE
    folder.mkdir()
    words = furnished(folder, str(folder))[command]
    finish(trl_kd, [*words, "--output_dir", str(folder / "out")], folder / "out")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_home_folder(trl_kd, furnished, tmp_path, home, monkeypatch, command):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = furnished(home, "~")[command]
    finish(trl_kd, [*words, "--output_dir", "~/out"], home / "out")
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_names_like_options_and_users(trl_kd, furnished, tmp_path, home, monkeypatch, command):
    (tmp_path / "~here").mkdir()
    monkeypatch.chdir(tmp_path / "~here")
    words = furnished(tmp_path / "~here", "../~here")[command]
    finish(trl_kd, [*words, "--output_dir=-x:{y,z}"], tmp_path / "~here" / "-x:{y,z}")
    if command in ("pairs", "pbkd"):
        finish(trl_kd, [*words, "--output_dir", "./~y"], tmp_path / "~here" / "~y")


def test_the_command_that_pairs_print_can_be_pasted(trl_kd, furnished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = furnished(tmp_path, ".")["pairs"]
    for name in ("-x", "a b"):
        printed = re.search(r"\((trl-kd pbkd .*), or", trl_kd(*words, f"--output_dir={name}").out)
        _, command, *rest = shlex.split(printed[1])
        assert trl_kd(command, *rest, "--model_name_or_path", "./student", *TRAINING, "--dry_run").code == 0


def test_the_demo(monkeypatch, home):
    told = []
    monkeypatch.setattr(demo, "run", lambda folder, **options: told.append((folder, options["tasks"])))
    demo.main(["--output_dir", "~/x", "--tasks", "~/task.py:TASK"])
    demo.main(["--output_dir=-x"])
    demo.main([])
    expected = [(f"{home}/x", [f"{home}/task.py:TASK"]), ("-x", ["running_sums"])]
    assert told == [*expected, ("runs/demo", ["running_sums"])]


# ---- Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("~", "{home}"),
        ("~/x", "{home}/x"),
        ("reward_model:~/x", "reward_model:{home}/x"),
        ("vllm:~/x", "vllm:{home}/x"),
        ("verifier:~/x.py:f", "verifier:{home}/x.py:f"),
        ("api:~/x", "api:~/x"),  # a model of a server
        ("./~x", "{here}/~x"),
        ("a/../~x", "{here}/~x"),
        ("x~", "x~"),
        ("owner/name", "owner/name"),
        ("run[1]", "run[1]"),
        ("", ""),
    ],
)
def test_a_path_is_resolved_once(home, value, expected):
    found = resolved("model_name_or_path", value)
    assert found == expected.format(home=home, here=os.getcwd())
    assert resolved("model_name_or_path", found) == found


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("~no_such_user/y", ["`output_dir` is '~no_such_user/y'", "no user 'no_such_user'", "'./~no_such_user/y'"]),
        ("a\0b", ["`output_dir` is 'a\\x00b'", "NUL"]),
        ("a\udcffb", ["`output_dir` is", "not UTF-8"]),
        ("", ["`output_dir` is empty"]),
        ("a::b", ["`output_dir` is 'a::b'", "address"]),
        ("s3://bucket/x", ["`output_dir` is 's3://bucket/x'", "a folder of this machine"]),
        ("x" * 300, ["`output_dir` is", "no path can be (File name too long)"]),
        (
            "dangling",
            ["`output_dir` is 'dangling'", "dangling' is a link to 'nowhere', which is not there: make that"],
        ),
    ],
)
def test_what_no_folder_can_be_called(trl_kd, furnished, tmp_path, monkeypatch, value, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.setattr(demo, "_finish", None)
    monkeypatch.setattr(experiment.Cell, "compare", None)  # nothing is begun
    commands = furnished(tmp_path, ".")
    for words in (commands["pairs"], commands["pbkd"], ["demo"]):
        error = trl_kd(*words, f"--output_dir={value}").error
        assert all(part in error for part in said), error


@pytest.mark.parametrize("types", [pbkd.DATACLASSES, mm_pbkd.DATACLASSES, online_pbkd.DATACLASSES, (PairsArguments,)])
def test_every_path_is_known_as_one(types):
    words = re.compile(r"(?<!configuration )\b(folder|file|path|checkpoint|adapter)s?\b", re.IGNORECASE)
    named = {
        f.name
        for owner in types
        for f in fields(owner)
        if "str" in str(f.type) and not f.name.endswith("_kwargs") and words.search(str(f.metadata.get("help")))
    }
    assert named <= paths.FIELDS | {"save_strategy"}


def test_a_file_of_arguments(trl_kd, home, tmp_path):
    (home / "c.yaml").write_text("output_dir: ~/out\ndatasets: [~/a, {path: ~/b, data_files: ~/c}]\nmerge: x\n")
    parsed = parse(
        (PairsArguments, DatasetMixtureConfig), ["--config=~/c.yaml", "--merge", "~/m", "n"], "x", is_launched=False
    )
    args, mixture = parsed.values
    assert (args.output_dir, args.merge) == (f"{home}/out", [f"{home}/m", "n"])
    assert [entry.path for entry in mixture.datasets] == [f"{home}/a", f"{home}/b"]
    assert mixture.datasets[1].data_files == f"{home}/c"


# ---- Data ----------------------------------------------------------------------------------------------------------------


def read(source: str, streaming: bool) -> list[dict]:
    """Rows of a dataset, of which a change is looked up in the cache where there is one."""
    split = load_split(source, None, "train", streaming)
    if streaming:
        return list(split)
    assert list(split.map(dict)) == list(split.map(dict)) == list(split)
    return list(split)


@pytest.mark.parametrize("name", NAMES)
def test_rows_from_a_folder_of_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    given = f"./{name}"
    folder = Path(given)
    folder.mkdir()
    rows = [{"prompt": "1+1="}, {"prompt": "1+2="}]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).save_to_disk((folder / "saved").absolute())
    for streaming in (False, True):
        for source in (f"{given}/{name}.jsonl", f"{given}/saved"):
            assert read(source, streaming) == rows
    shutil.rmtree(folder / "saved")
    if (other := name.translate({42: "x", 63: "x"})) != name:  # which a pattern would match too
        shutil.copytree(folder, tmp_path / other)
    if "\n" in name:
        (folder / f"{name}.jsonl").rename(folder / "rows.jsonl")  # of a folder, `datasets` never finds such a file
    for streaming in (False, True):
        assert read(given, streaming) == rows
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(path=resolved("datasets", given))])
    assert list(load_datasets(pbkd.PbKDScriptArguments(), mixture, with_eval=False)[0]) == rows
    (folder / "more.jsonl").write_text(json.dumps({"prompt": "1+3="}))
    assert len(list(load_split(given, None, "train", streaming=False))) == 3  # not from a cache
    (folder / "more.jsonl").unlink()
    assert len(list(load_split(given, None, "train", streaming=False))) == 2


def test_an_address_is_no_file(tmp_path):
    (tmp_path / "a::b").mkdir()
    with pytest.raises(InputError, match="`preference_dataset` is .*a::b.* address"):
        load_split(str(tmp_path / "a::b"), None, "train", streaming=False, field="preference_dataset")
    check_output_dir(str(tmp_path / "a:b"))
