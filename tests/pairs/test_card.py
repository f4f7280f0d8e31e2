import pytest
import yaml
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from trl_kd.pairs import pair_row
from trl_kd.pairs.card import BEGIN, END, code, escape, flatten_settings, write_card
from trl_kd.pairs.statistics import PairStatistics


SETTINGS = {"teacher": {"model": "gpt_4o-mini", "temperature": 1.0, "stop": [], "extra": {}}, "seed": 3}
EVIL = (
    f"a | b `c` ``\n---\nlicense: mit\n---\n# Head\n```\n<script>alert(1)</script> {END} {BEGIN} [x](http://y) *z* \\"
)


def summary_of(count=4):
    statistics = PairStatistics()
    statistics.add_rows([pair_row(str(i), "t" * 9, "s", 1.0) for i in range(count)])
    return statistics.summary()


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_new_card(tmp_path):
    path = write_card(tmp_path, summary_of(), SETTINGS)
    text = path.read_text()
    data = DatasetCard.load(path).data
    assert data.license == "other"
    assert data.tags == ["trl-kd", "preference", "trl", "pbkd", "knowledge-distillation"]
    assert data.size_categories == ["n<1K"]
    assert data.configs == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}]
    for words in ("**Not chosen yet.**", "| `teacher.model` | `gpt_4o-mini` |", "| `seed` | `3` |", "2505.18952"):
        assert words in text
    for words in ("| pairs | 4 |", "> **Warning.** Length alone", "strict_only=True", "| `preference` |"):
        assert words in text
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_what_a_person_wrote_survives(tmp_path):
    path = write_card(tmp_path, summary_of(), SETTINGS)
    edited = path.read_text().replace("license: other", "license: cc-by-4.0").replace("**Not chosen yet.**", "CC BY.")
    path.write_text(edited + "\nThanks to all.\n")
    write_card(tmp_path, summary_of(2000), {"seed": 4})
    text = path.read_text()
    assert front_matter(text)["license"] == "cc-by-4.0"
    assert front_matter(text)["size_categories"] == ["1K<n<10K"]
    assert "CC BY." in text
    assert text.endswith("\nThanks to all.\n")
    assert "| `seed` | `4` |" in text
    assert "| pairs | 2,000 |" in text
    assert "`3`" not in text
    write_card(tmp_path, summary_of(2000), {"seed": 4})
    assert path.read_text() == text


def test_a_card_that_is_not_ours_is_kept(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Mine\n\nWords.\n")
    write_card(tmp_path, summary_of(), SETTINGS)
    write_card(tmp_path, summary_of(), SETTINGS)
    text = path.read_text()
    assert "# Mine\n\nWords.\n" in text
    assert front_matter(text)["configs"][0]["config_name"] == "default"
    assert text.count(BEGIN) == text.count(END) == 1


def test_a_lost_mark_loses_no_words(tmp_path):
    path = write_card(tmp_path, summary_of(), SETTINGS)
    path.write_text(path.read_text().replace(END, "My words."))
    for _ in range(2):
        write_card(tmp_path, summary_of(), SETTINGS)
        assert "My words." in path.read_text()
        assert path.read_text().count(END) == 1


def test_no_setting_breaks_the_card(tmp_path):
    settings = {EVIL: EVIL, "template": EVIL * 50, "list": [EVIL], "none": None, "empty": "", "odd": "\ud800\x00"}
    statistics = PairStatistics()
    statistics.add_answers(EVIL, [])
    for _ in range(2):
        path = write_card(tmp_path, statistics.summary(), settings)
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert front_matter(text)["license"] == "other"
    html = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    assert "<script" not in html
    assert 'href="http://y"' not in html
    assert html.count("<h1>") == 1
    rows = html[html.index("with these settings") : html.index("<h2>Loading")]
    assert rows.count("<tr>") == len(settings) + 1
    assert rows.count("<td>") == 2 * len(settings)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in rows


@pytest.mark.parametrize(
    "text", ["a", "a b", "x_y*z", "<b>", "`", "a|b", "\\", "a\nb", " a", "&amp;", "[a](b)", "~x~", "$x$"]
)
@pytest.mark.parametrize("shown", [code, escape])
def test_escaped_text_is_shown_as_it_is(text, shown):
    html = MarkdownIt("commonmark").enable("table").render(f"| a |\n|---|\n| {shown(text)} |\n")
    cell = html.split("<td>")[1].split("</td>")[0].replace("<code>", "").replace("</code>", "")
    plain = cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert plain == " ".join(text.split())


def test_settings_are_flat_short_and_name_no_folder(tmp_path):
    (tmp_path / "model").mkdir()
    settings = {"a": {"b": {"c": 1}, "d": {}}, "path": str(tmp_path / "model"), "text": "x\ny" * 400, "not_one": "/\n"}
    flat = dict(flatten_settings(settings))
    assert flat["a.b.c"] == "1"
    assert flat["a.d"] == "{}"
    assert flat["path"] == "model"
    assert flat["not_one"] == "/\\n"
    assert flat["text"].startswith("x\\ny")
    assert len(flat["text"]) < 540


@pytest.mark.parametrize(
    ("count", "size"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**9, "n>1B")]
)
def test_size(count, size, tmp_path):
    summary = summary_of() | {"pairs": summary_of()["pairs"] | {"total": count}}
    assert front_matter(write_card(tmp_path, summary, {}).read_text())["size_categories"] == [size]
