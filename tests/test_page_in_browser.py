"""The page of a report in headless Chromium.

There are no errors, requests or missing figures, tables sort, nothing overflows, and screen readers find their way.
"""

import html
import importlib.resources
import json
import re
import shutil
import subprocess

import pytest
from test_cli_report import write_folders

from calib_jax import cli

WIDTHS = (360, 1280)
PAPER = 688  # pixels of A4 between its margins; the page has its print style there
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"),
    *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
    "--enable-logging=stderr",
)

# Put before everything else of the page: errors are counted from the start, and any request is one.
FIRST = """<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.outerHTML)), true);
addEventListener("securitypolicyviolation", event => errors.push(`request of ${event.blockedURI}`));
console.error = (...words) => errors.push(words.join(" "));
</script>"""

# Put behind the page: what is there, and what the order of rows is after clicks.
LAST = """<script>
addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  const outside = [...document.querySelectorAll("body *")].filter(
    one => !one.parentElement.closest(".scroll") && one.getBoundingClientRect().right > width + 1);
  const found = {
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    outside: outside.map(one => one.outerHTML.slice(0, 90)),
    wide: [...document.querySelectorAll(".scroll")].filter(one => one.scrollWidth > one.clientWidth + 1)
      .map(one => one.outerHTML.slice(0, 90)),
    images: [...document.images].map(one => [one.alt, one.complete && one.naturalWidth > 0]),
    requests: performance.getEntriesByType("resource").map(one => one.name),
    tables: [...document.querySelectorAll("table.sortable")].map(table => {
      const column = Math.min(1, table.tHead.rows[0].cells.length - 1);
      const head = table.tHead.rows[0].cells[column];
      const cells = () => [...table.tBodies[0].rows].filter(row => !row.classList.contains("class"))
        .map(row => row.cells[column].textContent.trim());
      const orders = [cells()], sorts = [];
      for (let click = 0; click < 2; click++) {
        head.querySelector("button").click();
        orders.push(cells());
        sorts.push(head.getAttribute("aria-sort"));
      }
      return {orders, sorts};
    }),
    errors,
  };
  parent.postMessage(found, "*");
});
</script>"""

OUTER = """<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>
<script>
const found = {};
addEventListener("message", event => {
  found[event.data.width] = event.data;
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


# Put behind the page: what axe-core, which checks pages for accessibility, objects to.
AXE = """<pre id="found"></pre><script>
addEventListener("load", () => axe.run(document).then(({violations, passes}) => {
  const objections = violations.flatMap(rule => rule.nodes.map(node => `${rule.id}: ${node.html.slice(0, 90)}`));
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.getElementById("found").textContent = JSON.stringify({objections, dark, passed: passes.length});
}));
</script>"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder with the page of a report, `out/index.html`."""
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH: the page is not opened")
    root = tmp_path_factory.mktemp("browser")
    names = ("first", "a rather long name of a model_with_no_space_at_all_in_it_2d_fullres")
    arguments = write_folders(root, names, cases=4, classes=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib_jax.report.gains.SHOWN", ())
        assert cli.main(["report", *arguments, "--out", str(root / "out")]) == 0
    return root


def opened(root, file, *flags):
    """What a page writes into its element `found`, and the log of the browser."""
    command = [BROWSER, *FLAGS, *flags, f"--user-data-dir={root / 'profile'}", "--window-size=1400,2000"]
    done = subprocess.run(
        [*command, "--dump-dom", (root / file).as_uri()], capture_output=True, text=True, timeout=60
    )
    text = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert text, done.stderr[-2000:]
    return json.loads(html.unescape(text[1])), done.stderr


@pytest.fixture(scope="module")
def seen(root):
    """What the browser found at each width, and its log."""
    page = (root / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("<head>") == page.count("</body>") == 1
    page = page.replace("<head>", f"<head>{FIRST}").replace("</body>", f"{LAST}</body>")
    (root / "page.html").write_text(page, encoding="utf-8")
    assert page.count("@media print") == 1
    (root / "print.html").write_text(page.replace("@media print", "@media all"), encoding="utf-8")
    frames = "".join(
        f'<iframe src="{"print" if width == PAPER else "page"}.html" style="width:{width}px;height:900px;border:0">'
        "</iframe>"
        for width in (*WIDTHS, PAPER)
    )
    (root / "outer.html").write_text(OUTER + frames, encoding="utf-8")
    return opened(root, "outer.html")


def test_the_page_opens_without_errors_and_requests(seen):
    found, log = seen
    assert set(found) == {str(width) for width in (*WIDTHS, PAPER)}
    for one in found.values():
        assert one["errors"] == []
        assert all(request.startswith("data:") for request in one["requests"])
    assert not [line for line in log.splitlines() if "CONSOLE" in line]


def test_every_figure_is_there(seen):
    for one in seen[0].values():
        assert len(one["images"]) > 12
        assert [alt for alt, is_drawn in one["images"] if not is_drawn or not alt] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows(seen, width):
    one = seen[0][str(width)]
    assert one["width"] == width
    assert one["outside"] == []
    assert one["scroll"] == width


def test_nothing_is_cut_off_on_paper(seen):
    one = seen[0][str(PAPER)]
    assert one["outside"] == one["wide"] == []


def test_tables_sort_up_and_down(seen):
    def number(cell):
        return float(re.search(r"[-+.\d]+", cell.replace("\N{MINUS SIGN}", "-"))[0])

    tables, numeric = seen[0][str(WIDTHS[1])]["tables"], 0
    assert len(tables) >= 3
    for table in tables:
        before, up, down = table["orders"]
        assert table["sorts"] == ["ascending", "descending"]
        assert sorted(before) == sorted(up) == sorted(down)
        if all(re.match(r"[-+\N{MINUS SIGN}.]?\d", cell) for cell in before):
            assert [number(x) for x in up] == sorted(map(number, up))
            assert [number(x) for x in down] == sorted(map(number, down), reverse=True)
            numeric += 1
    assert numeric > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screen_readers_find_their_way(root, scheme):
    pytest.importorskip("axe_core_python", reason="install axe-core-python: accessibility is not checked")
    axe = (importlib.resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    page = (root / "out" / "index.html").read_text(encoding="utf-8")
    page = page.replace("</body>", f"<script>{axe}</script>{AXE}</body>")
    (root / "axe.html").write_text(page, encoding="utf-8")
    flags = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    found, _ = opened(root, "axe.html", *flags)
    assert found["dark"] == (scheme == "dark")
    assert found["passed"] > 20
    assert found["objections"] == []
