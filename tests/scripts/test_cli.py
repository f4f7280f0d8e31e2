"""The `trl-kd` command itself: answers at once, and says what it does not know."""

import subprocess
import sys
import time

import pytest

import trl_kd
from trl_kd.scripts import cli
from trl_kd.scripts.errors import InputError, bad_input, one_line, report


HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "yaml", "numpy")


def test_help_imports_nothing_heavy_and_answers_within_a_second():
    program = (
        "import sys; from trl_kd.scripts.cli import main; code = main(['--help']); "
        f"print('loaded:', [m for m in {HEAVY} if m in sys.modules]); sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 1
    assert "loaded: []" in done.stdout
    assert all(command in done.stdout for command in cli.COMMANDS)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help(argv, capsys):
    assert cli.main(argv) == 0
    assert "usage: trl-kd COMMAND" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"trl-kd {trl_kd.__version__}\n"


@pytest.mark.parametrize(
    ("word", "advice"), [("pbdk", "did you mean 'pbkd'?"), ("demos", "did you mean 'demo'?"), ("xyz", "--help")]
)
def test_an_unknown_command_is_one_line_with_the_closest(word, advice, capsys):
    assert cli.main([word, "--beta", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"unknown command '{word}'" in error
    assert advice in error


def test_a_command_gets_its_arguments_and_gives_its_exit_code(monkeypatch):
    seen = []
    module = type("module", (), {"main": staticmethod(lambda argv: seen.append(argv) or 3)})
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    assert cli.main(["--traceback", "demo"]) == 3
    assert cli.main(["demo", "--traceback", "--seeds", "2"]) == 3
    assert seen == [[], ["--seeds", "2"]]  # `--traceback` is for `trl-kd` itself


class TestErrors:
    def fail(self, error):
        def command():
            with bad_input():
                raise error

        return command

    @pytest.mark.parametrize(
        "error", [ValueError("a\n  b"), OSError("a b"), ImportError("a b"), NotImplementedError("a b")]
    )
    def test_refused_input_is_one_line(self, error, capsys):
        assert report(self.fail(error), "prog") == 2
        assert capsys.readouterr().err == "prog: error: a b\n"

    def test_a_bug_keeps_its_traceback(self):
        with pytest.raises(RuntimeError):
            report(self.fail(RuntimeError("bug")), "prog")
        with pytest.raises(ValueError, match="outside"):  # after training has begun
            report(lambda: int("outside"), "prog")

    def test_the_traceback_is_shown_when_asked_for(self, capsys):
        assert report(self.fail(ValueError("a b")), "prog", with_traceback=True) == 2
        error = capsys.readouterr().err
        assert "Traceback" in error
        assert error.endswith("prog: error: a b\n")

    def test_an_interrupt_is_not_a_traceback(self, capsys):
        def interrupted():
            raise KeyboardInterrupt

        assert report(interrupted, "prog") == 130
        assert capsys.readouterr().err == "\nprog: interrupted\n"

    def test_other_ranks_are_silent(self, monkeypatch, capsys):
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert report(self.fail(ValueError("a b")), "prog") == 2
        assert capsys.readouterr().err == ""

    def test_no_credentials(self):
        text = one_line(InputError("https://me:secret@host/x with hf_abcdefghijklmnop"))
        assert text == "https://***@host/x with hf_***"
        assert len(one_line("x" * 5000)) < 1000
