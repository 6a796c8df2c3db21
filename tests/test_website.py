"""What book/_ext/website.py and figures.py add to the pages, and the line that switches on what needs an address."""

import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "https://github.com/someone/somebook"
TEXT = "This page has a first paragraph that is long enough to describe it, with <signs> & all."


PAPER = """@article{ho2020ddpm,
  title = {Denoising}, journal = {Papers}, author = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter}, year = {2020},
  url = {https://arxiv.org/abs/2006.11239}
}
"""
GLOSSARY = """# Glossary

## guidance scale <a id="term-guidance-scale"></a>, CFG <a id="term-cfg"></a>

How loud. [Chapter 01](01_one.ipynb).
"""
CITED = "[Ho et al. 2020](https://arxiv.org/abs/2006.11239)"
PLAIN = f"""## More

As {CITED} say ({CITED}), [the paper](https://arxiv.org/abs/2006.11239) has a [scale](glossary.md#term-cfg), which
[exercise 1.1](#ch01-ex1) asks for; `{CITED}` is code.

> **Note.** So it is,
> and so it stays.
"""
EXERCISE = """### Exercise 1.1. How *loud*? <a id="ch01-ex1"></a>

Say it:

```python
say("it")
```
"""


def fold(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def configuration(address: str, base: str) -> dict:
    """The book's own configuration, as Jupyter Book hands it to Sphinx, with these two addresses."""
    from jupyter_book.config import get_final_config

    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    assert config["repository"]["url"] == config["html"]["baseurl"] == "", "no public address yet"
    config["repository"]["url"], config["html"]["baseurl"] = address, base
    config["bibtex_bibfiles"] = ["book/references.bib"]
    for key in ("html_static_path", "templates_path"):
        config["sphinx"]["config"][key] = [str(ROOT / path) for path in config["sphinx"]["config"][key]]
    config["sphinx"]["extra_extensions"] = ["sphinx_exercise"]
    final, _ = get_final_config(user_yaml=config, cli_config={"latex_individualpages": False})
    return {key: value for key, value in final.items() if key != "latex_documents"}


def build(folder: Path, address: str = "", base: str = "") -> dict[str, str]:
    """A book of one page and one chapter -> the HTML of its pages."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    source = folder / "source"
    (source / "book").mkdir(parents=True)
    plt.figure(figsize=(8, 2)).savefig(source / "book" / "wide.png", dpi=100)
    plt.close()
    (source / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\n"
        "chapters: [{file: book/01_one}, {file: book/glossary}, {file: book/references}]\n",
        "utf-8",
    )
    (source / "book" / "references.bib").write_text(PAPER, "utf-8")
    (source / "book" / "references.md").write_text("# Bibliography\n\nMade from a file.\n", "utf-8")
    (source / "book" / "glossary.md").write_text(GLOSSARY, "utf-8")
    (source / "book" / "index.md").write_text(f'# A "title" & more\n\n{TEXT}\n\n![words for it](wide.png)\n', "utf-8")
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
    drawn = nbformat.v4.new_output("display_data", {"image/png": picture(source / "book" / "wide.png")})
    notebook.cells = [
        nbformat.v4.new_markdown_cell(f"# One\n\n{TEXT}"),
        nbformat.v4.new_code_cell("draw()", outputs=[drawn], execution_count=1),
        nbformat.v4.new_markdown_cell("*A curve, as it falls.*\n\nThe curve falls quickly. Then it rises."),
        nbformat.v4.new_code_cell("draw()", outputs=[drawn], execution_count=2),
        nbformat.v4.new_markdown_cell("## Next"),
        nbformat.v4.new_code_cell(
            "draw()", outputs=[drawn], execution_count=3, metadata={"mystnb": {"image": {"alt": "Three red apples"}}}
        ),
    ]
    notebook.cells += [
        nbformat.v4.new_markdown_cell(PLAIN),
        nbformat.v4.new_markdown_cell(EXERCISE, metadata={"tags": ["exercise"]}),
        nbformat.v4.new_code_cell("# Solution 1.1\nanswer()", metadata={"tags": ["solution"]}),
        nbformat.v4.new_markdown_cell(fold("Solution", "Because `so`."), metadata={"tags": ["solution"]}),
        nbformat.v4.new_markdown_cell(f"**Question 1.** Why?\n\n{fold('Answer', '**a).** Yes.')}"),
    ]
    nbformat.write(notebook, source / "book" / "01_one.ipynb")
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    try:
        with docutils_namespace():
            overrides = configuration(address, base)
            out = folder / "html"
            app = Sphinx(source, None, out, folder / "trees", "html", overrides, status=None, warningiserror=True)
            app.build()
    finally:
        sys.path.remove(str(ROOT / "book" / "_ext"))
    assert app.statuscode == 0
    return {path.stem: path.read_text("utf-8") for path in (out / "book").glob("*.html")}


def picture(path: Path) -> str:
    import base64

    return base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    return build(tmp_path_factory.mktemp("without"))


@pytest.fixture(scope="module")
def with_address(tmp_path_factory):
    return build(tmp_path_factory.mktemp("with"), ADDRESS, "https://someone.github.io/somebook/")


def test_without_an_address_no_button_leads_nowhere(without):
    for page in without.values():
        assert "github" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
        assert not re.search("colab|mybinder|source-repository-button|source-edit-button|thebe", page)
    assert "This notebook (.ipynb)" in without["01_one"]
    assert "This notebook" not in without["index"]


def test_an_address_switches_on_all_buttons(with_address):
    chapter = with_address["01_one"]
    assert "https://colab.research.google.com/github/someone/somebook/blob/main/book/01_one.ipynb" in chapter
    assert "https://mybinder.org/v2/gh/someone/somebook/main?urlpath=lab/tree/book/01_one.ipynb" in chapter
    assert f'href="{ADDRESS}/edit/main/book/01_one.ipynb"' in chapter
    assert f'href="{ADDRESS}"' in chapter and f"{ADDRESS}/issues/new" in chapter
    assert "This notebook (.ipynb)" in chapter
    assert "colab" not in with_address["index"] and f'href="{ADDRESS}/edit/main/book/index.md"' in with_address["index"]


def test_cards(without, with_address):
    def tags(page: str) -> dict[str, str]:
        return dict(re.findall(r'<meta (?:property|name)="([\w:]+)" content="([^"]*)"', page))

    card = tags(without["index"])
    assert card["og:title"] == "A “title” &amp; more"
    assert (
        card["og:description"]
        == card["description"]
        == TEXT.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    assert card["og:image"] == "../_static/cover.png" and "og:url" not in card and card["og:type"] == "website"
    card = tags(with_address["01_one"])
    assert card["og:image"] == "https://someone.github.io/somebook/_static/cover.png"
    assert card["og:url"] == "https://someone.github.io/somebook/book/01_one.html" and card["og:type"] == "article"


def test_drawn_figures_get_words_and_room(without):
    images = re.findall(r'<img alt="([^"]*)"', without["01_one"].split("<article")[1])
    assert images == ["Figure. A curve, as it falls.", "Figure. The curve falls quickly.", "Three red apples"]
    assert re.search(
        r"<figure>.*?</div>\s*<figcaption>A curve, as it falls.</figcaption>", without["01_one"], re.DOTALL
    )
    assert without["01_one"].count('class="wide-figure docutils container"') == 3
    assert '<p class="wide-figure"><img alt="words for it"' in without["index"]


def test_plain_markdown_becomes_boxes_and_references(without):
    """book/_ext/one_source.py: what the website makes of tagged cells and plain links."""
    article = re.sub(r"\s+", " ", without["01_one"].split("<article")[1])
    text = re.sub(r"<[^>]+>", "", article)
    assert "As Ho et al. [2020] say [Ho et al., 2020], the paper has a scale, which exercise 1.1 asks for" in text
    assert "[Ho et al. 2020](https://arxiv.org/abs/2006.11239) is code" in text
    assert article.count('href="references.html#') == 2 and 'href="glossary.html#term-guidance-scale"' not in article
    assert 'href="glossary.html#term-CFG"' in article and 'href="#ch01-ex1"' in article
    assert re.search(r'class="admonition note">.{1,60}Note</p> <p>So it is, and so it stays.', article)
    assert re.search(r'class="exercise admonition" id="ch01-ex1"', article)
    assert "Exercise 1.1 (How loud?)" in text and "Solution to Exercise 1.1 (How loud?)" in text
    solution = article.split('class="solution dropdown')[1]
    assert "Because" in solution and "answer" in solution and "# Solution 1.1" not in text
    assert re.search(r'class="dropdown quiz admonition".{1,60}Answer</p>', article) and "&lt;details" not in article
    assert "Denoising" in without["references"] and '<dt id="term-CFG">' in without["glossary"]
