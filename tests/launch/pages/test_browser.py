"""Proves that a page works in a browser: switches, sorting, filters, keyboard, print, and no request.

Opens a page in a headless Chromium (apt-get install chromium); skipped where there is none. 10 s.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.pages.runs import write_runs_page
from tests.support.chromium import Browser, find_chromium, open_chromium
from tests.support.page_runs import NUM_RESPONSES, make_run, make_running

pytestmark = pytest.mark.full
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>bold</b>"
PHONE, DESK = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is here: apt-get install chromium")
    with open_chromium(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a finished run, with a hostile response, and of a running one."""
    folder = tmp_path_factory.mktemp("page")
    runs = [make_run(folder / "done", [HOSTILE]), make_running(folder / "running")]
    write_runs_page(runs, folder / "page.html")
    return folder / "page.html"


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    """The page on a desk; at the end nothing was asked for or complained about."""
    browser.show(*DESK)
    browser.open(page)
    yield browser
    assert browser.list_faults() == []
    assert browser.list_requests() == [page.resolve().as_uri()]


def list_visible(browser: Browser, chart: str) -> list[bool]:
    """Return which traces of a chart are shown."""
    return browser.run(f"document.querySelector('#{chart} .plot').data.map((t) => t.visible)")


def test_a_switch_hides_and_shows_its_line(opened: Browser) -> None:
    drawn = "document.querySelectorAll('#loss .scatterlayer .trace').length"
    assert list_visible(opened, "loss") == [True, True]
    assert opened.run(drawn) == 2
    opened.run("document.querySelectorAll('#loss .switches input')[1].click()")
    assert list_visible(opened, "loss") == [True, False]
    assert opened.run(drawn) == 1
    # By keyboard: focus the switch and press space.
    opened.run("document.querySelectorAll('#loss .switches input')[1].focus()")
    opened.press(" ", 32, " ")
    assert list_visible(opened, "loss") == [True, True]


def test_all_and_none_switch_every_line(opened: Browser) -> None:
    buttons = "document.querySelectorAll('#effective-rank .switches button')"
    opened.run(f"{buttons}[1].click()")
    assert set(list_visible(opened, "effective-rank")) == {False}
    opened.run(f"{buttons}[0].click()")
    assert set(list_visible(opened, "effective-rank")) == {True}


def test_a_choice_shows_another_figure(opened: Browser) -> None:
    first = opened.run("document.querySelector('#spectra .plot').data[0].y")
    opened.run(
        "(() => { const s = document.querySelector('#spectra select'); s.value = '1';"
        " s.dispatchEvent(new Event('change')); })()"
    )
    assert opened.run("document.querySelector('#spectra .plot').data[0].y") != first


def test_a_column_is_sorted_up_and_down_with_empty_cells_last(opened: Browser) -> None:
    column = (
        "[...document.querySelectorAll('#results thead button')]"
        ".find((b) => b.textContent === 'steps')"
    )
    names = "[...document.querySelectorAll('#results tbody th')].map((h) => h.textContent)"
    sort = f"{column}.closest('th').getAttribute('aria-sort')"
    opened.run(f"{column}.focus()")
    opened.press("Enter", 13, "\r")
    assert (opened.run(names), opened.run(sort)) == (["running", "done"], "ascending")
    opened.press("Enter", 13, "\r")
    assert (opened.run(names), opened.run(sort)) == (["done", "running"], "descending")


def set_filter(browser: Browser, name: str, value: str) -> str:
    """Set a filter of the generations, and return what the page says then."""
    browser.run(
        f"(() => {{ const f = document.getElementById('filters'); f.elements.{name}.value = {value!r};"
        " f.requestSubmit(); })()"
    )
    return browser.run("document.getElementById('shown').textContent")


def test_generations_are_filtered_and_shown_bit_by_bit(opened: Browser) -> None:
    items = "document.querySelectorAll('#problems > li').length"
    assert opened.run(items) == 25
    opened.run("document.getElementById('more').click()")
    assert opened.run(items) == 50
    whole = set_filter(opened, "grade", "")
    assert whole == f"Showing 25 of {NUM_RESPONSES} problems ({2 * NUM_RESPONSES} responses)."
    assert set_filter(opened, "grade", "ungraded").endswith(f"({NUM_RESPONSES} responses).")
    set_filter(opened, "grade", "right")
    badges = (
        "[...new Set([...document.querySelectorAll('#problems .badge')].map((b) => b.textContent))]"
    )
    assert opened.run(badges) == ["✓ right"]
    assert set_filter(opened, "text", "no such text") == "Nothing passes these filters."
    set_filter(opened, "grade", "")
    assert set_filter(opened, "text", "ONERROR").startswith("Showing 1 of 1 problems")


def test_a_hostile_response_is_shown_and_does_nothing(opened: Browser) -> None:
    shown = opened.run("document.querySelector('#problems .response .text').textContent")
    assert shown == HOSTILE
    assert opened.run("document.title") == "Runs: done, running"
    assert opened.run("document.querySelectorAll('#problems img, #problems b').length") == 0


def test_the_policy_lets_no_script_and_no_request_in(browser: Browser, page: Path) -> None:
    browser.open(page)
    added = "document.body.append(Object.assign(document.createElement('script'), {text: 'x = 1'}))"
    browser.run(added)
    assert browser.run("typeof x") == "undefined"
    failed = browser.run("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
    assert failed == "refused"
    refused = [fault for fault in browser.list_faults() if "Content Security Policy" in fault]
    assert any("inline script" in fault for fault in refused)
    assert any("127.0.0.1:9" in fault for fault in refused)
    browser.show(*DESK)


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Browser, page: Path, dark: bool
) -> None:
    browser.show(*PHONE, dark=dark, phone=True)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") == PHONE[0]
    paper, ink = browser.run(
        "(() => { const s = getComputedStyle(document.body);"
        " return [s.backgroundColor, getComputedStyle(document.querySelector('.plot text')).fill]; })()"
    )
    brightness = [sum(map(int, text[4:-1].split(","))) for text in (paper, ink)]
    assert (brightness[0] < brightness[1]) == dark
    assert browser.list_faults() == []


def test_it_prints_on_light_paper_with_charts_that_fit(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    browser.show(*DESK, dark=True)
    browser.open(page)
    browser.run(
        "window.addEventListener('beforeprint', () => { window.printed ="
        " document.querySelector('#loss .main-svg').getBoundingClientRect().width; })"
    )
    browser.print_pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert browser.run("window.printed") <= 182 / 25.4 * 96  # A4 without its margins, CSS pixels
    # Afterwards the chart is as wide as the window allows again.
    assert (
        browser.run("document.querySelector('#loss .main-svg').getBoundingClientRect().width") > 900
    )
    assert browser.list_faults() == []
