"""A report page in one file: no network, no scripts, readable on a phone and in the dark."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trl_kd.evaluation.charts import LineChart


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows.

    Parameters:
        header (`Sequence[str]`):
            Names of the columns.
        rows (`Sequence[Sequence[str]]`):
            Cells. What follows a line break in a cell is set small beneath it.
        highlighted (`int`, *optional*):
            Row that is set off from the others.
        caption (`str`, *optional*, defaults to `""`):
            What stands above it.
        bars (`Sequence[float]`, *optional*, defaults to `()`):
            A share in [0, 1] for each row, drawn as a bar beneath it.
        words (`bool`, *optional*, defaults to `False`):
            Whether its cells are words, set on the left, rather than numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    highlighted: int | None = None
    caption: str = ""
    bars: Sequence[float] = ()
    words: bool = False


@dataclass(frozen=True)
class Answer:
    """What one model said to a question.

    Parameters:
        model (`str`):
            Name of the model.
        text (`str`):
            Its answer.
        right (`bool`):
            Whether the answer is right.
    """

    model: str
    text: str
    right: bool


@dataclass(frozen=True)
class Sample:
    """A question, its right answer, and what each model said."""

    prompt: str
    answer: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Parameters:
        title (`str`):
            Heading.
        text (`Sequence[str]`, *optional*):
            Paragraphs.
        tables (`Sequence[Table]`, *optional*), charts (`Sequence[LineChart]`, *optional*), \
samples (`Sequence[Sample]`, *optional*):
            What it shows, in this order.
        folded (`bool`, *optional*, defaults to `False`):
            Whether it is closed at first.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[LineChart] = ()
    samples: Sequence[Sample] = ()
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A report page; all its texts are plain text and are escaped.

    Parameters:
        title (`str`):
            Title.
        lead (`Sequence[str]`):
            Opening paragraphs.
        sections (`Sequence[Section]`, *optional*):
            Parts.
        footer (`str`, *optional*, defaults to `""`):
            Last line.
    """

    title: str
    lead: Sequence[str]
    sections: Sequence[Section] = field(default_factory=list)
    footer: str = ""


def render(page: Page) -> str:
    """Renders a page as one HTML document.

    Raises:
        `ImportError`: Jinja is not installed; the message names the extra.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("the report page needs Jinja: pip install 'trl-kd[report]'.") from error
    environment = Environment(
        loader=PackageLoader("trl_kd.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(page=page)


def write_report(path: Path, page: Page) -> None:
    """Renders a page into a file."""
    path.write_text(render(page), encoding="utf-8")
