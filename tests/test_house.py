"""Promises of the package as a whole."""

import ast
import re
import subprocess
import sys
import tomllib
from inspect import Parameter, signature
from pathlib import Path

import pytest
from trl import DistillationTrainer, DPOTrainer, RLOOTrainer

import trl_kd
from trl_kd import MMPbKDTrainer, OnlinePbKDTrainer, PbKDTrainer, _trl
from trl_kd.trainers.checkpoints import EndsAtLastStep
from trl_kd.trainers.dual_checkpoints import DualCheckpoints
from trl_kd.trainers.imitation_step import ImitationStep
from trl_kd.trainers.preference_step import PreferenceStep


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
    for module, name in re.findall(r'require\("([\w.]+)", "(\w+)"\)', Path(_trl.__file__).read_text()):
        assert _trl.require(module, name) is not None


def test_a_private_name_that_is_gone_is_one_clear_sentence():
    with pytest.raises(
        ImportError, match=r"`trl.models.no_such_name` is gone in trl .* tested with trl>=1.16.0,<1.17"
    ):
        _trl.require("trl.models", "no_such_name")
    with pytest.raises(ImportError, match="is gone"):
        _trl.require("trl.no_such_module", "name")
    with pytest.raises(ImportError, match="DPOTrainer.no_such_method` is gone"):
        _trl.require_methods(_trl.DPOTrainer, ("no_such_method",))


def test_every_method_of_trl_that_is_overridden_is_listed():
    inherited = {name for owner in _trl.DPOTrainer.__mro__ for name in vars(owner)}
    owners = (PbKDTrainer, ImitationStep, PreferenceStep, DualCheckpoints, EndsAtLastStep)
    ours = {name for owner in owners for name in vars(owner) if callable(vars(owner)[name])}
    overridden = {name for name in ours & inherited if not name.startswith("__")}
    assert overridden == {*_trl.DPO_SEAMS, "create_model_card", "evaluate", "save_model"}  # the latter are public


@pytest.mark.parametrize(
    ("trainer", "parent"),
    [(PbKDTrainer, DPOTrainer), (MMPbKDTrainer, DistillationTrainer), (OnlinePbKDTrainer, RLOOTrainer)],
)
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


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0.0"])
def test_an_untested_trl_warns(version):
    with pytest.warns(UserWarning, match=rf"trl {version} is outside the range .*trl>=1.16.0,<1.17"):
        _trl.warn_if_untested(version)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("version", ["1.16.0", "1.16.3", "1.16.1.dev0"])
def test_a_tested_trl_does_not(version):
    _trl.warn_if_untested(version)


def test_sources_name_no_unstable_class_and_no_private_import():
    for path in (ROOT / "trl_kd").rglob("*.py"):
        text = path.read_text()
        assert "trl.experimental" not in text, path
        if path.name != "_trl.py":
            private = re.findall(
                r"^\s*from (?:trl|transformers)(?:\.[\w.]+)? import .*\b_[a-z]\w*", text, re.MULTILINE
            )
            assert not private, (path, private)


def test_versions_agree():
    constraints = (ROOT / "constraints.txt").read_text()
    low = _trl.TESTED_TRL[0].removeprefix(">=")
    assert f"trl=={low}" in constraints
    assert f'"trl{",".join(_trl.TESTED_TRL)}"'.replace(".0,", ",") in (ROOT / "pyproject.toml").read_text()
