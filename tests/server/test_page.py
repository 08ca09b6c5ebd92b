"""The page in a browser: what is seen first, what a newcomer does, and what must never happen."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import serve
from tutelage import steering
from tutelage.base.spec import SteeringSpec
from tutelage.server.auth import Tokens
from tutelage.server.page_words import rules_said
from tutelage.trying import Try

WIDE, NARROW = (1280, 800), (390, 844)
TABS = ("Curves", "Steer", "Try", "Talk", "Batches", "Log", "Runs")

# a page that was opened before the server had read the stage's numbers says so, and is filled in later
READ = """() => { const loss = document.querySelector('[aria-label="loss"]')?.innerText ?? "reading";
    return !loss.includes("reading") && !/^–$/m.test(loss); }"""

# cards that hold more than they are wide
OVER = "[...document.querySelectorAll('.card')].filter((c) => c.scrollWidth > c.clientWidth).map((c) => c.ariaLabel)"


@pytest.fixture
def open_page(browser: Any, server: str, anna: dict[str, str]) -> Iterator[Any]:
    """`open_page("demo/code", size, scheme)`: the page of a stage, drawn. Errors in the browser fail the test."""
    contexts, wrong = [], list[str]()

    def open_(stage: str, size: tuple[int, int] = WIDE, scheme: str = "light", *, looks: bool = False) -> Any:
        view, headers = {"width": size[0], "height": size[1]}, {} if looks else anna
        context = browser.new_context(viewport=view, color_scheme=scheme, extra_http_headers=headers)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: (wrong.append("a script of a run's text was run"), dialog.dismiss()))
        page.on("request", lambda asked: wrong.append(asked.url) if outside(asked.url) else None)
        page.goto(f"{server}/stage/{stage}")
        page.wait_for_function("window.tutelage?.drawn")
        page.wait_for_function(READ)
        return page

    def outside(url: str) -> bool:
        return not url.startswith((server, server.replace("http", "ws"), "data:", "blob:"))

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


def press(page: Any, key: str) -> None:
    """A shortcut, with nothing focused that would take it."""
    page.evaluate("document.activeElement?.blur()")
    page.keyboard.press(key)


def wide(page: Any) -> tuple[int, int]:
    return tuple(page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]"))  # type: ignore[return-value]


# -- what is seen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_first_screen_says_it_all_without_scrolling(open_page: Any, size: tuple[int, int]) -> None:
    page = open_page("demo/code", size)
    shown = [page.get_by_role("region", name=name, exact=True) for name in ("loss", "what is being forgotten")]
    shown += [page.get_by_role("region", name=name, exact=True) for name in ("rate in use", "time left", "steer")]
    shown += [
        page.get_by_role("button", name=re.compile(name)) for name in ("^Pause", "^Lower the rate", "^Go back to tick")
    ]
    shown += [page.get_by_label("who is connected")]
    for part in shown:
        part = part.first
        part.wait_for()
        place = part.bounding_box()
        assert place["y"] >= 0 and place["y"] + place["height"] <= size[1], part
        assert place["x"] >= 0 and place["x"] + place["width"] <= size[0], part
    page.get_by_text("300 of 600 step").wait_for()
    words = page.locator(".first").inner_text()
    assert re.search(r"prose\s+3\.\d+\s+▲ \+0\.\d+ alarm", words) and "of 3.00e-3 at the schedule's peak" in words


def test_the_rate_on_the_page_is_that_of_the_folder(open_page: Any, runs: Path) -> None:
    page = open_page("demo/code")
    now = steering.controls(runs / "demo/code/1")
    rate = next(target["now"] for target in now["targets"] if target["path"] == "optim.lr")
    page.wait_for_function("document.querySelector('[aria-label=\"rate in use\"] .mid').innerText !== '–'")
    assert float(page.locator('[aria-label="rate in use"] .mid').inner_text()) == pytest.approx(rate, rel=5e-3)


def test_nothing_is_wider_than_a_telephone(open_page: Any) -> None:
    page = open_page("demo/code", NARROW)
    for i, name in enumerate(TABS):
        press(page, str(i + 1))
        page.get_by_role("region", name=name, exact=True).wait_for()
        page.wait_for_timeout(250)
        assert wide(page)[0] <= NARROW[0], name
        assert page.evaluate(OVER) == [], name  # a name of 100 characters is broken


def test_nan_is_a_mark_and_a_gap_and_breaks_no_chart(open_page: Any) -> None:
    page = open_page("demo/code")
    page.wait_for_function("""() => getElement(Number(document.querySelector('.spark')?.id.slice(1)))
        ?.chart?.getOption()?.series?.[0]?.data?.length""")
    found = page.evaluate("""() => {
        const id = Number(document.querySelector('.spark').id.slice(1));
        const drawn = getElement(id).chart.getOption().series[0];
        return {gaps: drawn.data.filter((p) => p[1] === null).length, points: drawn.data.length,
                marks: drawn.markLine.data.map((m) => m.label.formatter), 
                tip: tutelage.tip(id, [{axisValue: 151, value: [151, null], marker: "", seriesName: "x"}])};
    }""")
    assert found["gaps"] >= 1 and found["points"] > 250
    assert found["marks"].count("NaN") == 1 and found["marks"].count("▾") == 2
    assert "NaN 3 times, ticks 150 to 152" in found["tip"]


def test_text_of_a_run_is_shown_as_text(open_page: Any) -> None:
    page = open_page("demo/code")
    page.get_by_text("the loss leapt <b>far</b>").wait_for()
    press(page, "6")
    page.get_by_text("prose went <script>alert(1)</script>").first.wait_for()
    tip = page.evaluate("""() => tutelage.tip(Number(document.querySelector('.spark').id.slice(1)),
        [{axisValue: 80, value: [80, 1], marker: "", seriesName: "<img src=x onerror=alert(1)>"}])""")
    assert "<script" not in tip and "<img" not in tip and "alert" in tip


def test_every_action_says_on_the_curve_who_and_why(open_page: Any) -> None:
    page = open_page("demo/code")
    page.wait_for_function("""() => tutelage.tip(Number(document.querySelector('.spark').id.slice(1)),
        [{axisValue: 201, value: [201, 1], marker: "", seriesName: "loss"}])
        .includes("mei: mix weights code 0.8, base/prose 0.2 — more replay")""")  # marks come after the curves


def test_what_is_offered_is_what_the_trainer_takes(open_page: Any) -> None:
    page = open_page("demo/code")
    press(page, "2")
    mixture = page.get_by_role("region", name="mixture")
    mixture.get_by_text(re.compile(r"base/prose: a method takes [\d.]+% of every batch")).wait_for()
    assert mixture.get_by_role("textbox").count() == 1
    data = page.get_by_role("region", name="data", exact=True)
    data.get_by_label("Rows of").click()
    offered = page.get_by_role("option")
    offered.first.wait_for()
    assert offered.all_inner_texts() == ["code", "base/prose"]
    page.keyboard.press("Escape")
    assert data.get_by_role("button", name="Drop …").is_disabled()  # nothing would be left
    press(page, "1")
    page.wait_for_function("""() => [...document.querySelectorAll('.chart')].some((e) => {
        const drawn = getElement(Number(e.id.slice(1))).chart?.getOption().series ?? [];
        return drawn.map((s) => s.name).join() === 'in use,peak' && drawn[0].data.length > 100; })""")
    page = open_page("demo/base")
    press(page, "2")
    page.get_by_text("This stage is stopped: nothing here is changed").wait_for()
    page.get_by_text("the trainer ended at about tick 200 without a word").wait_for()


def test_runs_are_a_graph_that_leads_to_each_stage(open_page: Any) -> None:
    page = open_page("demo/code")
    press(page, "7")
    page.locator('svg.graph a[href="/stage/demo/base"]').click()
    page.wait_for_url("**/stage/demo/base")
    page.get_by_text("stopped", exact=True).first.wait_for()


def test_other_stages_are_laid_over_the_charts(open_page: Any) -> None:
    page = open_page("demo/code")
    page.get_by_label("Lay other stages over these").click()
    page.get_by_role("option", name="demo/base").click()
    page.wait_for_function("""() => [...document.querySelectorAll('.chart')].some((e) =>
        getElement(Number(e.id.slice(1))).chart?.getOption().series.some(
            (s) => s.name.endsWith('· demo/base') && s.data.length > 100))""")


def test_a_try_that_is_not_over_is_seen_by_whoever_loads_the_page_anew(open_page: Any, runs: Path) -> None:
    tried = Try("x1", runs / "demo/base/1", [{"do": "scale", "path": "optim.lr", "by": 0.5}], 4, "anna", tick=7)
    try:
        tried.state = "running"
        tried.write()
        page = open_page("demo/base")
        press(page, "3")
        page.get_by_text("A try from tick 7 is not over").wait_for()
        loss = {"mean": -0.1, "low": -0.2, "high": 0.0}
        tried.state, tried.result = "measured", {"steps": 4, "same_batches": 4, "loss": loss, "late": None}
        tried.write()
        page.get_by_role("button", name="Adopt").wait_for()
    finally:
        shutil.rmtree(tried.place)


def test_rules_are_said_in_sentences() -> None:
    rules = SteeringSpec(policy={"limits": {}}).model_dump(mode="json")
    assert rules_said(rules) == [
        "Agents: optim.lr × 0.5 to × 2 within 200step; at most 100 requests; rollback, reset, end stage, add source, drop "
        "source, branch wait for a person.",
        "Policies: no limits; at most 1,000 requests.",
        "What a person set is theirs for 200step.",
    ]
    assert rules_said({}) == [] and rules_said({"agent": {"budget": 3}}) == ["Agents: no limits; at most 3 requests."]


# -- who may, and by which means -----------------------------------------------------------------------------------------


def test_who_may_only_look_has_no_live_buttons(open_page: Any, runs: Path) -> None:
    page = open_page("demo/code", looks=True)
    page.get_by_text("nobody (looks)").wait_for()
    for name in ("^Pause", "^Lower the rate", "^Go back"):
        assert page.get_by_role("button", name=re.compile(name)).first.is_disabled()
    press(page, "p")
    page.get_by_text("a token of scope steer is needed").wait_for()
    assert not list((runs / "demo/code/1").glob("requests/*"))


def test_the_keyboard_reaches_everything_and_says_where_it_is(open_page: Any) -> None:
    page = open_page("demo/code")
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break  # once around
        seen.append(
            page.evaluate("document.activeElement.innerText || document.activeElement.getAttribute('aria-label')")
        )
        marked = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        assert page.evaluate(f"{marked} || !!document.activeElement.closest('.q-field--focused')"), seen
    order = [
        next(i for i, said in enumerate(seen) if said and said.startswith(name))
        for name in ("Skip", "Tutelage", "Pause", "Curves")
    ]
    assert order == sorted(order), seen
    press(page, "?")
    page.get_by_role("dialog").get_by_text("pause or resume").wait_for()
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, a, input, [role=tab]')].filter((e) => e.offsetParent &&
        !(e.innerText?.trim() || e.getAttribute('aria-label') || e.labels?.length || e.closest('label')))
        .map((e) => e.outerHTML.slice(0, 120))""")
    assert unnamed == []


def test_light_and_dark_follow_the_system_and_the_reader(open_page: Any) -> None:
    page = open_page("demo/code", scheme="dark")
    back = "getComputedStyle(document.body).backgroundColor"
    page.wait_for_function("document.body.classList.contains('body--dark')")
    dark = page.evaluate(back)
    press(page, "d")  # light
    page.wait_for_function("!document.body.classList.contains('body--dark')")
    assert page.evaluate(back) != dark
    page.reload()
    page.wait_for_function("window.tutelage?.drawn && !document.body.classList.contains('body--dark')")


def test_words_stand_out_from_what_they_stand_on() -> None:
    """WCAG AA: at least 4.5 to 1 for every pair of colors that the page puts together, in both looks."""
    css = (Path(steering.__file__).parent / "server" / "look.css").read_text(encoding="utf-8")
    looks = re.findall(r"body\.body--(light|dark) \{(.*?)\}", css, flags=re.DOTALL)
    assert [name for name, _ in looks] == ["light", "dark"]
    for name, text in looks:
        color = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", text))
        for on in ("page", "panel", "sunk"):
            for ink in ("ink", "soft", "accent", "good", "bad", "warn"):
                assert contrast(color[ink], color[on]) >= 4.5, (name, ink, on)
        for ink, on in (
            ("accent-ink", "accent"),
            ("panel", "bad"),
            ("bad", "bad-wash"),
            ("warn", "warn-wash"),
            ("accent", "wash"),
        ):
            assert contrast(color[ink], color[on]) >= 4.5, (name, ink, on)


def contrast(one: str, other: str) -> float:
    def light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# -- a newcomer's way -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_newcomer_sees_lowers_undoes_pauses_and_goes_on(open_page: Any, training: Path) -> None:
    wait_for_training(training)
    page = open_page("toy/one")
    status = page.get_by_role("status", name="last action")
    peak = target(training, "optim.base")

    press(page, "h")
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("cell", name=re.compile("^optim.lr")).first.wait_for()  # the effect, before it is sent
    assert "in use next step" in dialog.inner_text() and target(training, "optim.base") == peak
    dialog.get_by_label("Why").fill("too fast for me")
    dialog.get_by_role("button", name="Apply").click()
    status.get_by_text("Lower the rate to half: applied at tick").wait_for()
    assert target(training, "optim.base") == pytest.approx(peak / 2)
    (line,) = [entry for entry in steering.log(training) if entry["why"] == "too fast for me"]
    assert (line["by"], line["actor"], line["state"]) == ("anna", "person", "applied")

    status.get_by_role("button", name="Undo from now on").click()
    page.get_by_role("dialog").get_by_role("button", name="Apply").click()
    status.get_by_text("Undo from now on: applied at tick").wait_for()
    assert target(training, "optim.base") == pytest.approx(peak)

    page.get_by_role("button", name=re.compile("^Pause")).click()
    page.get_by_role("button", name=re.compile("^Resume")).wait_for()
    tick = steering.controls(training)["tick"]
    time.sleep(0.3)
    assert steering.controls(training)["tick"] == tick and steering.controls(training)["state"] == "paused"

    press(page, "4")
    page.get_by_label("Prompt").fill("the cat")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text(re.compile("speaks from the weights at tick")).wait_for()

    press(page, "b")
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("cell", name="weights").wait_for()
    assert dialog.get_by_role("button", name="Apply").is_disabled()  # risky: first say that it was read
    dialog.get_by_text("I have read what this does").click()
    dialog.get_by_role("button", name="Apply").click()
    status.get_by_text(re.compile("Back to the weights of tick .*applied at tick")).wait_for()

    press(page, "p")
    page.get_by_role("button", name=re.compile("^Pause")).wait_for()
    press(page, "6")
    page.get_by_text("too fast for me").wait_for()


@pytest.mark.slow
def test_a_change_is_tried_on_twins_and_a_branch_is_made_and_compared(
    open_page: Any, training: Path, runs: Path
) -> None:
    wait_for_training(training)
    page = open_page("toy/one")
    page.set_default_timeout(600_000)
    page.wait_for_function("!document.querySelector('.pill').innerText.includes('stopped')")
    press(page, "3")
    card = page.get_by_role("region", name="twins")
    card.get_by_label("steps each").fill("4")
    card.get_by_role("button", name="See what it costs").click()
    card.get_by_text("two twins of 4 steps from tick").wait_for()  # the cost is told, and nothing is paused yet
    assert steering.controls(training)["state"] == "running" and not list(training.parent.glob("tries/*/changed"))
    card.get_by_role("button", name="Try it").click()
    card.get_by_role("cell", name="loss", exact=True).or_(card.locator(".bad")).first.wait_for()
    assert "4 of 4 steps saw the same batch" in card.inner_text() and steering.controls(training)["state"] == "paused"
    card.get_by_role("button", name="Discard").click()
    card.get_by_text("Discarded").wait_for()
    assert steering.controls(training)["state"] == "running"

    page.get_by_label("Name of the branch").fill("slower")
    page.get_by_label("Changes, such as").fill("optim.lr=1e-4, until=5step")
    page.get_by_text("only write its recipe").click()
    page.get_by_role("button", name="Branch from here").click()
    page.get_by_text(re.compile("slower goes on from tick .*run it with")).wait_for()
    assert "lr: 0.0001" in (runs / "slower" / "slower.yaml").read_text(encoding="utf-8")

    page.get_by_role("region", name="compare").get_by_label("With").click()
    page.get_by_role("option", name="demo/code").click()
    page.get_by_text("Nothing was measured on both yet.").or_(page.get_by_text("Comparing")).first.wait_for()


def wait_for_training(folder: Path) -> None:
    for _ in range(3000):
        if (folder / "controls.json").exists() and steering.controls(folder)["tick"] >= 3:
            return
        time.sleep(0.1)
    raise AssertionError("the toy does not train")


def target(folder: Path, path: str) -> float:
    """What the trainer says: it is written before an answer is."""
    return float(next(t["now"] for t in steering.controls(folder)["targets"] if t["path"] == path))


# -- coming and going -------------------------------------------------------------------------------------------------


def held(server: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{server}/-/held", timeout=60) as answer:
        return dict(json.load(answer))


def test_an_open_page_shows_nothing_more_once_its_token_was_taken_back(browser: Any, server: str, runs: Path) -> None:
    token = Tokens(runs).make("leaves", scope="steer", actor="person")
    context = browser.new_context(extra_http_headers={"authorization": f"Bearer {token}"})
    page = context.new_page()
    page.goto(f"{server}/stage/demo/code")
    page.wait_for_function("window.tutelage?.drawn")
    Tokens(runs).drop("leaves")
    page.wait_for_function("!window.tutelage && document.body.innerText.includes('no such token')", timeout=30_000)
    context.close()


def test_viewers_come_and_go_and_leave_nothing_and_the_process_ends(browser: Any, runs: Path, tmp_path: Path) -> None:
    process, url = serve(runs, tmp_path / "server.log")
    try:
        context = browser.new_context()
        page = context.new_page()
        for _ in range(5):
            page.goto(f"{url}/stage/demo/code")
            page.wait_for_function("window.tutelage?.drawn")
        threads = held(url)["threads"]
        context.close()
        for _ in range(600):
            now = held(url)
            if not any(now[what] for what in ("pages", "present", "lives", "viewers")):
                break
            time.sleep(0.1)
        assert [now[what] for what in ("pages", "present", "lives", "viewers")] == [0, 0, 0, 0]
        assert now["threads"] <= threads
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) is not None
    finally:
        if process.poll() is None:
            process.kill()
    assert "Traceback" not in (tmp_path / "server.log").read_text(encoding="utf-8")
