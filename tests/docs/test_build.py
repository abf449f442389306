"""The site is built, with every warning an error, and finds nothing on the network to load."""

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.docs.pages import DOCS, page_names

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo")),
    reason='needs the docs extra: pip install -c requirements/constraints.txt -e ".[docs]"',
)


def build(source, output, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-d", str(output / "trees"), *options]
    return subprocess.run(
        [*command, str(source), str(output / "html")], capture_output=True, text=True, timeout=300, check=False
    )


def test_the_site_is_built_without_a_warning(tmp_path):
    done = build(DOCS, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    html = tmp_path / "html"
    pages = {path.relative_to(html).as_posix() for path in html.rglob("*.html")}
    assert {name.replace(".md", ".html") for name in page_names()} <= pages
    assert (html / "searchindex.js").exists()
    for name in pages:
        text = (html / name).read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:)?//[^"]*"', text)
        assert not loaded, f"{name} loads something from the network: {loaded}"
    reference = (html / "configuration.html").read_text(encoding="utf-8")
    assert "parallel.expert_parallel_size" in reference


def test_a_broken_link_is_an_error(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "conf.py").write_text((DOCS / "conf.py").read_text(encoding="utf-8"), encoding="utf-8")
    (source / "static").mkdir()
    (source / "static/tables.css").write_text("", encoding="utf-8")
    (source / "index.md").write_text("# Title\n\n[nowhere](nowhere.md)\n", encoding="utf-8")
    done = build(source, tmp_path)
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
