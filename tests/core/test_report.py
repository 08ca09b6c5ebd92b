"""The report of made-up runs: numbers checked by hand, gaps and broken values shown as what they are."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tests.core.fabricate import CODE, DEMO, PROSE, REPLAY, demo, eval_row, graph_of, train_rows, write_stage
from tutelage.core import diagram, ledger, pictures, report, transfer
from tutelage.core.ledger import Point
from tutelage.core.record import dumps

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Checker(HTMLParser):
    """Every element closed in order, every id once, nothing fetched from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.headings = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(text):
    page = Checker()
    page.feed(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text and "<script" not in text and not re.search(r"url\((?!#)", text)
    assert page.headings[0] == 1 and max(page.headings) <= 3
    return text


@pytest.fixture
def graph(tmp_path):
    return demo(tmp_path / "runs")


def test_the_matrix_holds_every_source_after_every_stage(graph):
    data = report.gather(graph)
    assert data["forgetting_matrix"] == {
        "base": {"prose": 2.0, "code": 3.0},
        "code--low": {"prose": 2.30, "code": 2.20},
        "code--rewarmed": {"prose": 2.80, "code": 1.90},
        "code--replay": {"prose": 2.20, "code": 1.95},
        "merged": {"prose": 2.25, "code": 2.10},
    }
    assert data["filled"] == {"base": {"code": "code--low"}}  # not measured by base itself: read where code began
    assert data["scale"] == "one seed (0), 1.00 M parameters"


def test_transfer_is_the_literatures_with_signs_turned(graph):
    found = report.gather(graph)["transfer"]["code--rewarmed"]
    assert found["final_average"] == pytest.approx((2.80 + 1.90) / 2)
    assert found["backward_transfer"] == pytest.approx(2.0 - 2.8)
    assert found["forgetting"] == pytest.approx(0.8)
    assert found["forward_transfer"] == pytest.approx(8.0 - 3.0)  # fresh weights at 8, before code at 3
    merged = report.gather(graph)["transfer"]["merged"]
    assert merged["forgetting"] == pytest.approx(((2.25 - 2.0) + (2.10 - 1.90)) / 2)


def test_forgetting_is_from_the_best_and_backward_transfer_from_when_it_was_learned():
    found = transfer.transfer(
        ["a", "b", "c"],
        matrix={"a": {"x": 2.0}, "b": {"x": 1.5, "y": 1.0}, "c": {"x": 1.8, "y": 1.3, "z": 1.0, "own": 2.5}},
        learned={"x": "a", "y": "b", "z": "c", "own": None},
        first={"own": 2.4},
        ahead={"y": 3.0},
        begun={},
    )
    assert found["by_source"]["backward_transfer"] == pytest.approx({"x": 0.2, "y": -0.3, "own": -0.1})
    assert found["by_source"]["forgetting"] == pytest.approx({"x": 0.3, "y": 0.3, "own": 0.1})
    assert found["forward_transfer"] is None
    assert found["unmeasured"] == ["y", "z"]


def test_dip_and_recovery_are_of_the_earlier_source(graph):
    fell = report.gather(graph)["dips"]["code--replay"]["prose"]
    assert (fell["start"], fell["worst"], fell["end"], fell["worst_at_tokens"]) == (2.0, 2.5, 2.2, 1e6)
    assert fell["recovered"] == pytest.approx(0.6)
    assert "code" not in report.gather(graph)["dips"]["code--replay"]
    assert transfer.dip([2.0, 1.9], [0, 1])["recovered"] is None


def test_arms_at_equal_compute_show_what_a_method_takes_back(graph):
    (group,) = report.gather(graph)["arms"]
    assert [arm["arm"] for arm in group["arms"]] == ["code--low", "code--rewarmed", "code--replay"]
    assert group["budgets_differ"] == {"flops": False, "tokens": False}
    by = {arm["arm"]: arm for arm in group["arms"]}
    assert by["code--low"]["forgetting"]["prose"] == pytest.approx(0.3)
    assert by["code--low"]["taken_back"]["prose"] == pytest.approx(1 - 0.3 / 0.8)
    (pair,) = group["added"]  # low differs in its rate too, so it is no pair
    assert (pair["baseline"], pair["arm"], pair["methods"]) == ("code--rewarmed", "code--replay", ["continual/replay"])
    assert pair["sources"]["prose"]["taken_back"] == pytest.approx(0.75)
    assert pair["price"] == pytest.approx({"code": 0.05})


def test_unequal_budgets_are_said_and_read_at_the_smallest(graph, tmp_path):
    folder = graph.nodes["code--low"].folder
    shutil.rmtree(folder)
    rows = [eval_row(0, {"prose": 2.0, "code": 3.0}), *train_rows(tokens=4e6, flops=4e12)]
    rows += [eval_row(5, {"prose": 2.2, "code": 2.6}, tokens=1e6, flops=1e12)]
    rows += [eval_row(10, {"prose": 2.4, "code": 2.0}, tokens=4e6, flops=4e12, final=True)]
    write_stage(folder, rows)
    data = report.write(graph, tmp_path / "out")
    (group,) = data["arms"]
    assert group["budgets_differ"] == {"flops": True, "tokens": True}
    low = next(arm for arm in group["arms"] if arm["arm"] == "code--low")
    assert low["at_equal"]["code"] == pytest.approx(2.6 - (2.6 - 2.0) / 3)  # at 2e12, a third of the way from 1e12
    assert "Budgets differ" in (tmp_path / "out/report.html").read_text()


def test_stages_with_another_start_are_no_arms(tmp_path):
    stages = {**DEMO, "other": {"start": {"model_type": "gpt2"}, "data": CODE, "until": "2Mtok"}}
    del stages["code--low"], stages["code--rewarmed"], stages["merged"]
    assert report.gather(graph_of(tmp_path, stages))["arms"] == []


def test_a_number_that_unknown_text_makes_too_low_is_marked_everywhere(tmp_path):
    """Only in its own cells: another tokenizer may know the same text."""
    stages = {name: DEMO[name] for name in ("base", "code--low", "code--replay")}
    graph = graph_of(tmp_path / "runs", stages)
    share = {"unknown/prose": 0.125}
    for name, values in (("base", share), ("code--low", {}), ("code--replay", share)):
        rows = [eval_row(0, {"prose": 8.0, "code": 8.0}, values={**values}), *train_rows()]
        write_stage(
            tmp_path / f"runs/demo/{name}/1", [*rows, eval_row(10, {"prose": 2.0}, final=True, values={**values})]
        )
    data = report.write(graph, tmp_path / "out")
    assert data["unknown"] == {"base": {"prose": 0.125}, "code--replay": {"prose": 0.125}}
    assert json.loads((tmp_path / "out/report.json").read_text())["unknown"] == data["unknown"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/forgetting_matrix.csv").read_text())))
    assert [row["unknown/prose"] for row in rows] == ["0.125", "", "0.125"] and rows[0]["prose"] == "2.0"
    text = checked((tmp_path / "out/report.html").read_text())
    assert text.count("12.5% of its bytes are not known") == 2 and "bits per byte are too low" in text
    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(report.short(data))
    shown = console.export_text()
    assert shown.count("2.000†") == 2 and "† prose: the tokenizer has no tokens for 12.5%" in shown


def test_everything_written_says_the_same(graph, tmp_path):
    data = report.write(graph, tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text())["forgetting_matrix"] == data["forgetting_matrix"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/forgetting_matrix.csv").read_text())))
    assert [row["stage"] for row in rows] == list(DEMO)
    assert (rows[2]["prose"], rows[2]["code"]) == ("2.8", "1.9")
    arms = list(csv.DictReader(io.StringIO((tmp_path / "out/arms.csv").read_text())))
    assert {(row["arm"], row["source"]) for row in arms} >= {("code--replay", "prose"), ("code--low", "code")}
    text = checked((tmp_path / "out/report.html").read_text())
    for said in ("one seed (0), 1.00 M parameters", "75.0%", "left out 9 of 12", "25.0%", "def &lt;b&gt;"):
        assert said in text
    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(report.short(data))
    shown = console.export_text()
    assert "takes back 75% of what code--rewarmed forgot of prose" in shown
    assert "alarm: code--rewarmed forgets prose (step 10)" in shown
    assert data["unknown"] == {} and "†" not in shown + text and "unknown" not in rows[0]
    assert "3 of 12 measurements kept" in shown


def test_the_same_numbers_give_the_same_page(graph, tmp_path):
    report.write(graph, tmp_path / "one")
    report.write(graph, tmp_path / "two")
    assert (tmp_path / "one/report.html").read_bytes() == (tmp_path / "two/report.html").read_bytes()


def test_nan_partial_failed_and_absent_stages_are_shown_as_such(tmp_path):
    graph = graph_of(tmp_path / "runs", DEMO)
    home = tmp_path / "runs/demo"

    def broken(step):
        return float("nan") if step > 5 else 3.0

    rows = [eval_row(0, {"prose": float("inf")}), *train_rows(loss=broken)]
    write_stage(home / "base/1", [*rows, eval_row(10, {"prose": float("nan")}, final=True)])
    write_stage(home / "code--low/1", [eval_row(0, {"prose": 2.0, "code": 3.0}), *train_rows()], done=False)
    write_stage(home / "code--rewarmed/1", [], done=False)
    (home / "code--rewarmed/1/error.txt").write_text("Traceback\nRuntimeError: boom <&>")
    data = report.write(graph, tmp_path / "out", failed={"merged": "no such file"})
    states = {name: stage["state"] for name, stage in data["stages"].items()}
    assert states == {
        "base": "done",
        "code--low": "partial",
        "code--rewarmed": "failed",
        "code--replay": "not run",
        "merged": "failed",
    }
    assert set(data["forgetting_matrix"]) == {"base"}
    assert json.loads((tmp_path / "out/report.json").read_text())["forgetting_matrix"]["base"]["prose"] == "nan"
    text = checked((tmp_path / "out/report.html").read_text())
    assert "boom &lt;&amp;&gt;" in text and "(partial)" in text and ">nan<" in text
    Console(file=io.StringIO()).print(report.short(data))


def test_a_report_of_nothing_is_a_page(tmp_path):
    data = report.write(graph_of(tmp_path, DEMO), tmp_path / "out")
    assert data["forgetting_matrix"] == {}
    checked((tmp_path / "out/report.html").read_text())


def test_steering_is_listed_with_who_and_why(graph, tmp_path):
    acts = [
        {"id": "1", "tick": 3, "by": "ann", "do": [{"do": "scale", "path": "optim.lr", "by": 0.5}], "why": "too <hot>"}
    ]
    acts += [{"id": "2", "tick": 4, "by": "engine", "do": [{"do": "until", "total": {}}]}]
    lines = "".join(json.dumps(act) + "\n" for act in acts)
    (graph.nodes["code--low"].folder / "journal.jsonl").write_text(lines)
    data = report.write(graph, tmp_path / "out")
    (entry,) = data["stages"]["code--low"]["steering"]
    assert (entry["by"], entry["why"], entry["tick"]) == ("ann", "too <hot>", 3)
    text = (tmp_path / "out/report.html").read_text()
    assert "too &lt;hot&gt;" in text and "scale path optim.lr, by 0.5" in text


def test_data_under_one_name_and_another_are_told_apart(tmp_path):
    stages = {
        "first": {"start": {"model_type": "llama"}, "data": {"mine": "a.txt"}, "until": "1Mtok"},
        "second": {"start": "first", "data": {"mine": "b.txt"}, "until": "1Mtok"},
    }
    graph = graph_of(tmp_path / "runs", stages)
    write_stage(graph.nodes["first"].folder, [*train_rows(), eval_row(10, {"mine": 1.0}, final=True)])
    ends = {"mine": 3.0, "first.mine": 1.5}  # as a stage names its columns: its own first
    write_stage(graph.nodes["second"].folder, [*train_rows(), eval_row(10, ends, final=True)])
    data = report.gather(graph)
    assert data["forgetting_matrix"] == {"first": {"mine": 1.0}, "second": {"mine": 1.5, "second.mine": 3.0}}
    assert data["transfer"]["second"]["forgetting"] == pytest.approx(0.5)


def test_what_an_outside_model_keeps_counts_from_before_the_first_step(tmp_path):
    stage = {"start": "somewhere/model", "data": CODE, "keep": PROSE, "methods": REPLAY, "until": "1Mtok"}
    graph = graph_of(tmp_path / "runs", {"domain": stage})
    rows = [eval_row(0, {"prose": 1.0, "code": 2.0}, values={"kl/prose": 0.0}), *train_rows()]
    rows += [eval_row(10, {"prose": 1.2, "code": 1.5}, values={"kl/prose": 0.3}, final=True)]
    write_stage(graph.nodes["domain"].folder, rows)
    data = report.write(graph, tmp_path / "out")
    assert data["transfer"]["domain"]["forgetting"] == pytest.approx(0.2)
    assert data["kl"] == {"domain": {"prose": 0.3}}
    assert "Distance from the start model" in (tmp_path / "out/report.html").read_text()


def test_tables_and_data_stages_are_shown(tmp_path):
    stages = {
        "written": {"start": "somewhere/model", "make": "synth/self"},
        "law": {"measure": ["probe/some"], "of": ["written"]},
    }
    graph = graph_of(tmp_path / "runs", stages)
    for name in stages:
        write_stage(graph.nodes[name].folder, [])
    (graph.nodes["written"].artifact / "counts.json").write_text('{"rows": 12000, "from": "a"}')
    (graph.nodes["law"].artifact / "table").mkdir()
    (graph.nodes["law"].artifact / "table/table.json").write_text('{"written": {"x": 1.5, "y": "nan"}}')
    report.write(graph, tmp_path / "out")
    text = checked((tmp_path / "out/report.html").read_text())
    assert "rows 12.0 k" in text and "1.500" in text


# -- a stage's folder -------------------------------------------------------------------------------------------------


def test_seconds_add_up_over_restarts(tmp_path):
    rows = train_rows(steps=4, seconds=8.0)  # 2 4 6 8
    rows[2]["seconds"], rows[3]["seconds"] = 1.0, 3.0  # a new process from the third step on
    book = ledger.read(write_stage(tmp_path / "s", rows))
    assert book.cost()["seconds"] == 4.0 + 3.0
    assert book.seconds_at(3) == 5.0


def test_the_most_memory_that_a_stage_held_is_told_and_a_stage_that_told_none_has_none(tmp_path):
    rows = [row | {"memory": 1e9, "memory_peak": 2e9 if i == 3 else 1e9} for i, row in enumerate(train_rows())]
    assert ledger.read(write_stage(tmp_path / "s", rows)).cost()["memory"] == 2e9, "a resumed process counts from anew"
    assert ledger.read(write_stage(tmp_path / "t", train_rows())).cost()["memory"] is None


def test_a_thorough_measurement_joins_the_curve_with_the_rows_that_all_have(tmp_path):
    end = eval_row(10, {"prose": 2.0}, values={"bits_per_byte@32/prose": 2.1}, final=True)
    book = ledger.read(write_stage(tmp_path / "s", [eval_row(0, {"prose": 3.0}), end]))
    assert [p.bits for p in book.curve("prose")] == [3.0, 2.1]
    assert book.final == {"prose": 2.0}


def test_what_a_rollback_took_back_is_left_out_of_budgets():
    points = [Point(s, t, f, 0, b) for s, t, f, b in [(0, 0, 0, 3), (2, 20, 2, 9), (1, 10, 3, 2), (2, 20, 4, 1)]]
    assert [p.bits for p in ledger.rising(points, lambda p: p.tokens)] == [3, 2, 1]
    assert ledger.read_at(points, 15, key=lambda p: p.tokens) == pytest.approx(1.5)
    assert ledger.read_at(points, 21, key=lambda p: p.tokens) is None
    assert ledger.first_at(points, 1.5, key=lambda p: p.tokens) == pytest.approx(15)
    assert ledger.first_at(points, 0.5, key=lambda p: p.tokens) is None


def test_a_line_cut_by_a_crash_is_left_out(tmp_path):
    folder = write_stage(tmp_path / "s", train_rows(steps=2))
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write('{"kind": "tra')
    assert len(ledger.read(folder).train) == 2


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_layers_follow_the_longest_way():
    stages = {name: {"inputs": inputs} for name, inputs in {"a": [], "b": ["a"], "c": ["a"], "d": ["a", "b"]}.items()}
    assert diagram.layers(stages) == {"a": (0, 0), "b": (1, 0), "c": (1, 1), "d": (2, 0)}


def test_a_picture_takes_the_pages_color_and_survives_broken_numbers():
    text = pictures.lines({"a": [(0, 1), (1, float("nan")), (2, 2)], "b": []}, name="t", x="x", y="y", title="<t>")
    assert "currentColor" in text and pictures.INK not in text
    assert text == pictures.lines({"a": [(0, 1), (1, "nan"), (2, 2)], "b": []}, name="t", x="x", y="y", title="<t>")


def test_five_seeds_of_forgetting_become_a_picture_of_its_own(tmp_path):
    rows = [
        {
            "base": {"prose": 2.0},
            "code--rewarmed": {"prose": 2.8 + s / 50, "code": 1.9},
            "code--replay": {"prose": 2.2, "code": 1.95},
        }
        for s in range(5)
    ]
    data = {"seeds": [1, 2, 3, 4, 5], "matrix": rows, "size": "1 M parameters", "tokens": "4 M tokens"}
    pictures.forgetting_seeds(data, tmp_path / "forgetting.svg")
    text = (tmp_path / "forgetting.svg").read_text()
    assert text.startswith("<svg xmlns=") and "prefers-color-scheme" in text and "5 seeds" in text


# -- a long stage -----------------------------------------------------------------------------------------------------


READ = """
import json, resource, sys
from pathlib import Path
from tutelage.core import ledger

def held():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = held()
book = ledger.read(Path(sys.argv[1]))
grown = held() - before
seconds = [point.seconds for point in book.curve("prose")]
found = {"rows": len(book.train), "shares": book.train.shares(), "curve": book.train.curve(), "at": book.train.at(250_001)}
print(json.dumps({"grown": grown, "seconds": seconds, "cost": book.cost(), **found}))
"""


@pytest.mark.slow
def test_half_a_million_rows_are_summed_up_in_the_memory_of_a_few(tmp_path):
    steps, folder = 500_000, tmp_path / "long"
    write_stage(folder, [], done=False)
    row = (
        '{"kind":"train","tick":%d,"step":%d,"tokens":%d,"samples":%d,"epochs":0.1,"flops":%d,"loss":%s,'
        '"lr":0.01,"length":60,"rows":2,"padding":0.25,"weights":{"a":%s,"b":0.5},"seconds":%s}\n'
    )
    with open(folder / "metrics.jsonl", "w") as handle:
        for i in range(1, steps + 1):
            loss, share = '"nan"' if i == 7 else "2.0", "0.5" if i % 2 else "1.5"
            handle.write(row % (i, i, 100 * i, 2 * i, 1000 * i, loss, share, i % 300_000 / 100))  # resumed once
            if i % 100_000 == 0:
                handle.write(dumps(eval_row(i, {"prose": 1.0}, texts={"sample/0": "x" * 1000})) + "\n")
    done = subprocess.run([sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["grown"] < 16e6 < (folder / "metrics.jsonl").stat().st_size / 5
    assert (found["rows"], found["cost"]["tokens"], found["cost"]["padding"]) == (
        steps,
        100 * steps,
        pytest.approx(0.25),
    )
    assert found["shares"] == {"a": pytest.approx(1.0), "b": pytest.approx(0.5)}
    assert found["cost"]["seconds"] == pytest.approx(2999.99 + 2000.0)
    assert found["seconds"] == pytest.approx([1000.0, 2000.0, 2999.99, 3999.99, 4999.99])
    assert 100 <= len(found["curve"]) <= 200 and found["curve"][-1] == [100 * steps, 2.0]
    assert found["at"] == pytest.approx(2500.0, rel=1e-3)


def test_a_loss_curve_is_thinned_by_means_of_neighbors(tmp_path):
    book = ledger.read(write_stage(tmp_path / "s", train_rows(steps=500, tokens=500, loss=float)))
    curve = book.train.curve()
    assert len(curve) == 125 and curve[0] == [4, 2.5] and curve[-1] == [500, 498.5]
    assert len(ledger.read(tmp_path / "s", until=150).train.curve()) == 150
