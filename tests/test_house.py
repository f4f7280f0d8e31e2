"""Promises of the package as a whole."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from inspect import Parameter, getsource, signature
from pathlib import Path
from types import SimpleNamespace

import pytest
from trl import DistillationTrainer, DPOTrainer, RLOOTrainer

import trl_kd
from trl_kd import MMPbKDTrainer, OnlinePbKDTrainer, PbKDTrainer, _trl
from trl_kd._trl import tested
from trl_kd._trl.seams import ATTRIBUTES, SEAMS, temporarily


ROOT = Path(__file__).parents[1]


def test_import_is_lazy():
    heavy = "{'torch', 'trl', 'transformers', 'datasets', 'accelerate', 'peft'}"
    code = f"import sys, trl_kd; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve():
    for name in trl_kd.__all__:
        assert getattr(trl_kd, name) is not None
    with pytest.raises(AttributeError, match="the public names are MMPbKDConfig"):
        _ = trl_kd.NoSuchTrainer


def test_private_names_of_trl_are_touched_in_one_place_and_exist():
    for path in Path(_trl.__file__).parent.glob("*.py"):
        for module, name in re.findall(r'require\("([\w.]+)", "(\w+)"\)', path.read_text()):
            assert tested.require(module, name) is not None


def test_a_private_name_that_is_gone_is_one_clear_sentence():
    with pytest.raises(
        ImportError, match=r"`trl.models.no_such_name` is gone in trl .* tested with trl>=1.16.0,<1.17"
    ):
        tested.require("trl.models", "no_such_name")
    with pytest.raises(ImportError, match="is gone"):
        tested.require("trl.no_such_module", "name")
    with pytest.raises(ImportError, match="DPOTrainer.no_such_method` is gone"):
        tested.require_methods(DPOTrainer, ("no_such_method",))


def our_classes(trainer: type) -> list[type]:
    return [owner for owner in trainer.__mro__ if owner.__module__.startswith("trl_kd.")]


TRAINERS = [(PbKDTrainer, DPOTrainer), (MMPbKDTrainer, DistillationTrainer), (OnlinePbKDTrainer, RLOOTrainer)]


@pytest.mark.parametrize(("trainer", "parent"), TRAINERS)
def test_seams_are_as_trl_has_them(trainer, parent):
    found = {name: ", ".join([*signature(getattr(parent, name)).parameters][1:]) for name in SEAMS[parent.__name__]}
    assert found == SEAMS[parent.__name__], f"{parent.__name__} has other parameters than `seams.SEAMS` says"
    inherited = {name for owner in parent.__mro__ for name in vars(owner)}
    ours = {n for owner in our_classes(trainer) for n, value in vars(owner).items() if callable(value)}
    unlisted = {name for name in ours & inherited if not name.startswith("__")} - found.keys()
    assert not unlisted, f"{trainer.__name__} overrides {unlisted} of {parent.__name__}: list them in `seams.SEAMS`"


@pytest.mark.parametrize(("trainer", "parent"), TRAINERS)
def test_attributes_are_as_trl_has_them(trainer, parent):
    theirs = "".join(getsource(o) for o in parent.__mro__ if o.__module__.startswith(("trl.", "transformers.")))
    gone = [name for name in ATTRIBUTES[parent.__name__] if not re.search(rf"self\.{name}\b", theirs)]
    assert not gone, f"{parent.__name__} has no attribute {gone} any more, see `seams.ATTRIBUTES`"
    sources = "".join(getsource(owner) for owner in our_classes(trainer))
    read = set(re.findall(r"(?:self|super\(\))\.(_\w+)", sources))
    ours = set(re.findall(r"self\.(_\w+)(?:: [^=\n]+)? = ", sources)) | {
        n for o in our_classes(trainer) for n in vars(o)
    }
    private = {name for name in read if re.search(rf"self\.{name}\b|def {name}\b", theirs)}
    listed = {*ATTRIBUTES[parent.__name__], *SEAMS[parent.__name__]}
    unlisted = private - listed - (ours - set(re.findall(r"self\.(_\w+)(?:: [^=\n]+)? = ", theirs)))
    assert not unlisted, f"{trainer.__name__} reads {unlisted} of {parent.__name__}: list them in `seams.ATTRIBUTES`"


@pytest.mark.parametrize(("trainer", "parent"), TRAINERS)
def test_constructors_are_annotated_as_trls_are(trainer, parent):
    ours, theirs = (signature(owner.__init__).parameters for owner in (trainer, parent))
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in list(ours.items())[1:]:
        assert parameter.annotation is not Parameter.empty, name
        if name in theirs and name != "reward_funcs":  # which may be left out here
            assert parameter.annotation == theirs[name].annotation, name
    assert (ROOT / "trl_kd/py.typed").is_file()


def test_every_import_is_declared():
    found = set()
    for path in (ROOT / "trl_kd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.match(r"[\w-]+", one)[0].lower().replace("-", "_") for one in declared} | {"yaml"}
    assert {"pyyaml", "torch"} <= names
    assert found - names - set(sys.stdlib_module_names) - {"trl_kd"} == {"deepspeed"}  # accelerate's own extra


def test_attributes_are_put_back_after_an_error():
    owner = SimpleNamespace(a=1, b=[2])
    former = owner.b
    with pytest.raises(ZeroDivisionError), temporarily(owner, a=0, b=None):
        1 / owner.a
    assert owner.a == 1
    assert owner.b is former


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0.0"])
def test_an_untested_trl_warns(version):
    with pytest.warns(UserWarning, match=rf"trl {version} is outside the range .*trl>=1.16.0,<1.17"):
        tested.warn_if_untested(version)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("version", ["1.16.0", "1.16.3", "1.16.1.dev0"])
def test_a_tested_trl_does_not(version):
    tested.warn_if_untested(version)


def test_sources_name_no_unstable_class_and_no_private_import():
    for path in (ROOT / "trl_kd").rglob("*.py"):
        text = path.read_text()
        assert "trl.experimental" not in text, path
        if path.parent.name != "_trl":
            private = re.findall(
                r"^\s*from (?:trl|transformers)(?:\.[\w.]+)? import .*\b_[a-z]\w*", text, re.MULTILINE
            )
            assert not private, (path, private)


def test_versions_agree():
    constraints = (ROOT / "constraints.txt").read_text()
    low = tested.TESTED_TRL[0].removeprefix(">=")
    assert f"trl=={low}" in constraints
    assert f'"trl{",".join(tested.TESTED_TRL)}"'.replace(".0,", ",") in (ROOT / "pyproject.toml").read_text()


def test_no_trainer_of_trl_is_imported_below_the_trainers():
    below = "trl_kd.losses.moments, trl_kd.sampling.local, trl_kd.sampling.vllm, trl_kd.preferences.likelihood"
    code = f"import sys, {below}; print([name for name in sys.modules if name.endswith('_trainer')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["PbKDConfig", "MMPbKDConfig", "OnlinePbKDConfig"])
def test_training_arguments_of_earlier_versions_find_their_class(name):
    former = {"PbKDConfig": "pbkd", "MMPbKDConfig": "mm_pbkd", "OnlinePbKDConfig": "online_pbkd"}[name]
    module = import_module(f"trl_kd.trainers.{former}_config")  # as pickled in their `training_args.bin`
    assert getattr(module, name) is getattr(trl_kd, name)
