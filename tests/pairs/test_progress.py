"""What is seen of a build while it runs: a local model's bar moves by tokens, from the first on."""

import pytest
import torch
from datasets import Dataset

from tests.conftest import make_tokenizer
from tests.pairs.fakes import Source
from tests.sampling.test_local import SETTINGS, Watched, make_brief_model
from trl_kd.pairs import build_pairs, progress
from trl_kd.pairs.fetched import FetchedAnswers
from trl_kd.preferences.simple import TeacherWins
from trl_kd.sampling.local import LocalSampler


PROMPTS = Dataset.from_list([{"prompt": f"{i}+1="} for i in range(6)])


@pytest.fixture
def seen(monkeypatch):
    """Bars, and each movement of one by tokens: how many tokens there are, of how many, and how many answers."""
    bars, moves = [], []
    made, moved = progress.TokenBar.__init__, progress.TokenBar.update

    def make(bar, *args):
        made(bar, *args)
        bars.append(bar)

    def move(bar, n=1):
        shown = moved(bar, n)
        moves.append((bar.n, bar.total, bar._done))
        return shown

    monkeypatch.setattr(progress.TokenBar, "__init__", make)
    monkeypatch.setattr(progress.TokenBar, "update", move)
    return bars, moves


def local(most=10**9):
    model = make_brief_model()
    watched = Watched(model, most, torch.OutOfMemoryError("CUDA out of memory."))
    return LocalSampler(model, SETTINGS, tokenizer=make_tokenizer()), watched


def build(folder, sampler, samples=2, **options):
    return build_pairs(
        PROMPTS, teacher=Source("teacher"), student=sampler, preference=TeacherWins(), num_student_samples=samples,
        output_dir=folder, **options,
    )  # fmt: skip


def tokens(sampler):
    from trl_kd.pairs.prompts import read_prompts
    from trl_kd.sampling import Request

    requests = [Request(row.key, row.prompt, (0, 1)) for rows in read_prompts(PROMPTS) for row in rows]
    return sum(answer.tokens for _, _, answer in sampler.sample(requests))


@pytest.mark.parametrize("most", [10**9, 5])
def test_the_bar_moves_by_tokens_before_any_answer_ends(tmp_path, seen, capsys, most):
    """Also where memory runs out, so that answers are begun anew."""
    bars, moves = seen
    sampler, watched = local(most)
    build(tmp_path, sampler)
    (bar,) = bars
    assert any(n > 0 and done == 0 for n, _, done in moves)
    assert moves[0][1] == 12 * SETTINGS.max_new_tokens
    assert all(0 <= n <= total for n, total, _ in moves)
    assert (max(rows for rows, _ in watched.shapes) > most) == (most == 5)
    assert bar.n == bar.total == tokens(local()[0])
    assert "tokens/s, 12 of 12 answers]" in capsys.readouterr().err
    assert sampler.on_tokens is None


def test_stored_answers_are_left_out_of_the_tokens(tmp_path, seen):
    bars, _ = seen
    build(tmp_path, local()[0], samples=1)
    build(tmp_path, local()[0], samples=2)
    first, second = bars
    assert second._done == 12
    assert second.n == second.total > 0
    assert first.n + second.n == tokens(local()[0])


def test_a_loop_and_a_stream_have_the_same_bar(tmp_path, seen, capsys):
    bars, moves = seen
    FetchedAnswers(local()[0], tmp_path / "teacher", 2).fetch(PROMPTS)
    assert moves[0][0] > 0
    assert bars[0].n == bars[0].total
    build_pairs(
        PROMPTS.to_iterable_dataset(), teacher=Source("teacher"), student=local()[0], preference=TeacherWins(),
        output_dir=tmp_path / "pairs",
    )  # fmt: skip
    assert bars[1].n > 0
    assert "tokens/s, 6 answers]" in capsys.readouterr().err


def test_a_hidden_bar_costs_nothing(tmp_path, seen, capsys):
    build(tmp_path, local()[0], show_progress=False)
    assert "tokens" not in capsys.readouterr().err
