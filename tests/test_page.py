"""The page of a results store: what it says, and what it does in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.reports.base import report_of
from experiments.reports.curves import curves
from experiments.reports.text import cells
from experiments.store import Run, Slot, Store

page = pytest.importorskip("experiments.reports.html_page")  # of the extra `report`
command = pytest.importorskip("scripts.html_page")
ROOT = Path(__file__).parents[1]
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


def info(experiment: str, method: str, setting: str, finished: str, **more: Any) -> dict[str, Any]:
    return {
        "experiment": experiment,
        "method": method,
        "setting": setting,
        "note": None,
        "overrides": [],
        "identity": "0",
        "seeds": [3, 4],
        "iterations": 2,
        "dataset": {"name": "mnist", "holdout": 0, "sha256": "abc"},
        "machine": "a machine",
        "versions": {"torch": "2"},
        "commit": "c0ffee",
        "seconds": 61.5,
        "diverged": {},
        "finished": finished,
    } | more


def put(root: Path, rows: list[dict[str, Any]], said: dict[str, Any], **tables: list[dict[str, Any]]) -> Run:
    identity = f"{len(list(root.glob('runs/*/*'))):012x}"
    slot = Slot(root, said["experiment"], f"{said['method']}-{said['setting']}", identity)
    frames = {name: pd.DataFrame(content) for name, content in tables.items()}
    return slot.complete({"optimizer": {"step_size": 0.25}}, rows, said | {"identity": identity}, frames)


def history(*finals: float | None, iterations: int = 2, **measured: float) -> list[dict[str, Any]]:
    """Rows of replicas that end at these accuracies; None: diverged after the first iteration."""
    return [
        {
            "iteration": i,
            "replica": r,
            "seed": 3 + r,
            "seconds": 1.5 * i,
            "test_accuracy": (final or 0) * i / iterations,
        }
        | {name: value * (i + 1) for name, value in measured.items()}
        for i in range(iterations + 1)
        for r, final in enumerate(finals)
        if final is not None or i == 0
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Runs of several tasks, one of them replaced, one with an override, one interrupted; a search."""
    root = tmp_path / "results"
    put(root, history(80.0, 82.0), info("mnist_shallow", "sgd", "tuned", "2026-01-01T10:00:00+00:00"))
    put(root, history(90.0, 93.0), info("mnist_shallow", "sgd", "tuned", "2026-01-02T10:00:00+00:00"))
    diverged = info("mnist_shallow", "block_admm", "tuned", "2026-01-03T10:00:00+00:00", diverged={"1": 1})
    put(root, history(97.0, None, kkt=0.1, residual_1=0.0), diverged)
    put(root, history(91.0, 95.0), info("mnist_deep10", "adam", "kaiming", "2026-01-04T10:00:00+00:00"))
    other = info("mnist_deep10", "adam", "mine", "2026-01-05T10:00:00+00:00", overrides=["optimizer.step_size=2"])
    put(root, history(50.0, 60.0), other)
    for method, size in (("block_admm", 2e7), ("online_block_admm", 1e6)):
        sizes = [{"quantity": name, "bytes": size} for name in ("theta", "z", "peak")]
        put(root, sizes, info("memory", method, "tuned", "2026-01-06T10:00:00+00:00"))
    face = {"replica": 0, "seed": 3, "verification": 90.0}
    probe = {"replica": 0, "seed": 3, "attribute": "Male", "positives": 3, "majority": 50.0}
    probe |= {"balanced_accuracy": 81.25, "accuracy": 82.0, "auc": 83.0}
    put(
        root,
        [face | {"iteration": 0}],
        info("lfw_proxy", "raw", "default", "2026-01-07", labels="proxy"),
        probes=[probe],
    )
    started = root / "runs/.partial/feed/started.json"
    started.parent.mkdir(parents=True)
    started.write_text(json.dumps(info("fashion_mnist", "dladmm", "tuned", "")))
    started.with_name("checkpoint.pt").write_bytes(b"")
    now = time.time()
    for path in (started, started.with_name("checkpoint.pt"), started.parent):
        os.utime(path, (now, now - 601))
    search = "setting,optimizer.step_size,held-out,seeds,iterations,samples held out\ntuned,0.1,97.5,1,2,10\n"
    search += "tuned,null,96.5,1,2,10\n"
    (root / "searches").mkdir()
    (root / "searches/mnist_deep10_online_block_admm.csv").write_text(search)
    return root


def written(root: Path) -> str:
    return page.html_page(page.read_store(root))  # type: ignore[no-any-return]


def rows(html: str, part: str) -> list[tuple[str, list[str]]]:
    """(run, texts of the cells) of the rows of a section; the first cell, which leads to the run, comes last."""
    section = html.split(f'<section id="{part}"', 1)[1].split("</section>", 1)[0]
    found = re.findall(r'<tr [^>]*data-run="([^"]*)">(.*?)</tr>', section, re.DOTALL)
    texts = [(run, re.findall(r"<td([^>]*)>(.*?)</td>", row)) for run, row in found]
    texts = [(run, sorted(row, key=lambda cell: "run" in cell[0])) for run, row in texts]
    return [(run, [unescape(re.sub("<.*?>", "", cell)) for _, cell in row]) for run, row in texts]


def test_each_table_is_the_report_s_and_each_row_leads_to_its_run(root: Path) -> None:
    html = written(root)
    assert '<tr><th scope="col" class="run">run</th>' in html  # first, where it stays and covers no column
    for experiment in ("mnist_shallow", "mnist_deep10", "memory"):
        table = report_of(experiment).table(Store(root).runs(experiment))
        shown = rows(html, experiment)
        assert [texts[:-1] for _, texts in shown] == cells(table)
        for run, texts in shown:
            assert html.count(f'id="{run}"') == 1 and f'href="#{run}"' in html and texts[-1] == run.split("-")[-1]
    (sgd,) = (texts for _, texts in rows(html, "mnist_shallow") if texts[0] == "SGD")
    assert sgd[2:5] == ["95.29", "91.50", "2.12"]  # of 90 and 93
    names = [run.split("/")[1] for run, _ in rows(html, "mnist_deep10")]
    assert names == ["adam-kaiming-000000000003", "adam-mine-000000000004"]
    attributes = [texts for run, texts in rows(html, "lfw_proxy") if "Male" in texts]
    assert attributes[0][1:4] == ["3.00", "50.00", "81.25"] and "of all runs below" in html


def test_overrides_that_all_rows_share_are_named_once(tmp_path: Path) -> None:
    for day, (method, own) in enumerate((("sgd", []), ("adam", ["dtype=float64"])), start=1):
        said = info("mnist_shallow", method, "tuned", f"2026-01-0{day}", overrides=["iterations=2", *own])
        put(tmp_path, history(80.0, 82.0), said)
    html = written(tmp_path)
    settings = {texts[0]: texts[1] for _, texts in rows(html, "mnist_shallow")}
    assert settings == {"SGD": "reduced tuned", "Adam": "reduced tuned, dtype=float64"}
    assert html.count("<caption><span>Finished runs, the newest first, iterations=2<") == 1
    assert "<figcaption>All curves: iterations=2. Mean" in html


@pytest.mark.long
def test_the_committed_results_have_the_numbers_of_their_own_page() -> None:
    html = written(ROOT / "results")
    lines = (ROOT / "results/README.md").read_text().splitlines()
    stated = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| Fig")]
    assert stated == [texts[: len(stated[0])] for _, texts in rows(html, "numbers")][: len(stated)]
    assert "| minus SGD [95 %] |" in lines[lines.index("## mnist_shallow") + 6] and ">minus SGD [95 %]</th>" in html
    for name in ("mnist_shallow", "mnist_deep20", "convergence", "memory", "mnist_walltime"):
        table = pd.read_csv(ROOT / f"results/tables/{name}.csv")
        assert [texts[0] for _, texts in rows(html, name)] == list(table.iloc[:, 0])
        assert html.count(f'alt="{name}: ') == 1


def test_the_newest_runs_come_first_with_the_paper_s_number(root: Path) -> None:
    newest = rows(written(root), "newest")
    assert [texts[0] for _, texts in newest] == sorted((texts[0] for _, texts in newest), reverse=True)
    said = {(texts[1], *run.split("/")[1].split("-")[:2], texts[3]): texts[4:8] for run, texts in newest}
    assert said["mnist_shallow", "sgd", "tuned", "tuned"] == ["91.50", "2.12", "95.29", "test accuracy, %"]
    replaced = said["mnist_shallow", "sgd", "tuned", "tuned, replaced by a newer run"]
    assert replaced == ["81.00", "1.41", "95.29", "test accuracy, %"]
    assert said["mnist_shallow", "block_admm", "tuned", "tuned, 1 of 2 seeds diverged"][0] == "97.00"
    assert said["memory", "online_block_admm", "tuned", "tuned"] == ["20.00", "–", "10.00", "times less than batch"]
    assert said["lfw_proxy", "raw", "default", "default, proxy"][0] == "81.25"
    assert len(newest) == 8


def test_runs_that_make_one_row_replace_one_another_in_nothing(root: Path) -> None:
    """Each is shown with its own number, and leads to the others."""
    more = [row | {"seed": 5} for row in history(84.0)]
    added = put(root, more, info("mnist_shallow", "sgd", "tuned", "2026-01-08T10:00:00+00:00", seeds=[5]))
    html = written(root)
    newest = {run: texts[3:6] for run, texts in rows(html, "newest") if "sgd" in run}
    (first, second) = (
        run.name
        for run in Store(root).runs("mnist_shallow")
        if run.info["finished"][:10] in ("2026-01-01", "2026-01-02")
    )
    assert newest == {
        added.name: ["tuned", "84.00", "–"],
        second: ["tuned", "91.50", "2.12"],
        first: ["tuned, replaced by a newer run", "81.00", "1.41"],
    }
    assert html.count(f"<dt>in one row with</dt><dd>{added.name}</dd>") == 1
    assert html.count(f"<dt>in one row with</dt><dd>{second}</dd>") == 1


def test_a_run_says_where_it_comes_from(root: Path) -> None:
    html = unescape(written(root))
    entry = html.split('id="mnist_shallow/block_admm-tuned-000000000002"')[1].split("</pre>")[0]
    for said in (
        f"<dd>{root}/runs/mnist_shallow/block_admm-tuned-000000000002</dd>",
        "<dt>identity</dt><dd>000000000002</dd>",
        "<dt>commit</dt><dd>c0ffee</dd>",
        "<dt>seeds</dt><dd>3, 4</dd>",
        "<dt>diverged</dt><dd>seed 4 after iteration 1</dd>",
        "<dt>machine</dt><dd>a machine</dd>",
        "<dt>training</dt><dd>61.5 s</dd>",
        "step_size: 0.25",
    ):
        assert said in entry


def test_what_is_under_way_and_searched_for_is_shown(root: Path) -> None:
    html = written(root)
    ((_, texts),) = rows(html, "under-way")
    assert texts[:3] == ["fashion_mnist", "dladmm", "tuned"] and texts[5:7] == ["0:10:01 ago", "none"]
    assert 'data-experiment="mnist_deep10" data-method="online_block_admm"' in html
    found = [texts for _, texts in rows(html, "searches")]
    assert found == [["tuned", "0.1", "97.5", "1", "2", "10"], ["tuned", "null", "96.5", "1", "2", "10"]]
    held_out = {"dataset": {"name": "mnist", "holdout": 5, "sha256": "abc"}}
    held_out |= {"overrides": ["dataset.holdout=5", "optimizer.eta=2"]}
    run = put(root, history(70.0, 71.0), info("mnist_deep10", "sgd", "tuned", "2026-01-08", **held_out))
    searched = dict(rows(written(root), "searches"))
    assert searched[run.name] == ["tuned", "2", "70.50", "2", "2", "5", run.name.split("-")[-1]]


def test_plots_have_every_quantity_of_a_history(root: Path) -> None:
    runs = Store(root).runs("mnist_shallow")
    plot = page.interactive_plot(curves(runs))
    assert list(plot["quantities"]) == ["test_accuracy", "kkt", "residual_1"]
    admm, sgd = plot["curves"]
    assert (admm["colour"], sgd["colour"], sgd["paper"]) == ("#0072b2", "#000000", 95.29)
    assert sgd["iteration"] == [0, 1, 2] and sgd["seconds"] == [0.0, 1.5, 3.0]
    assert sgd["measured"]["test_accuracy"]["mean"] == [0.0, 45.75, 91.5]
    assert sgd["measured"]["test_accuracy"]["std"][2] == pytest.approx(2.12132)
    assert not report_of("memory").has_curves
    assert page.numbers([float("nan"), float("inf"), 1 / 3]) == [None, None, 0.333333]


def damage(run: Run, file: str, content: str | None) -> None:
    (run.folder / file).unlink() if content is None else (run.folder / file).write_text(content)


DAMAGE = [
    ("run.json", '{"experiment":', "JSONDecodeError"),
    ("run.json", "{}", "KeyError"),
    ("run.json", None, "FileNotFoundError"),
    ("history.csv", "", "EmptyDataError"),
    ("history.csv", "iteration,replica,test_accuracy\n0,0,10\n", "last iteration of 0 of 2 seeds only"),
    ("config.yaml", None, "FileNotFoundError"),
]


def test_damaged_runs_are_named_and_left_out(root: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    days = range(1, 1 + len(DAMAGE))
    runs = [put(root, history(11.11, 11.11), info("mnist_shallow", "adam", "tuned", f"2026-02-0{day}")) for day in days]
    for run, (file, content, _) in zip(runs, DAMAGE, strict=True):
        damage(run, file, content)
    monkeypatch.setattr("sys.argv", ["page", str(root), "--out", str(tmp_path / "deep/er/page.html")])
    command.main()
    html = unescape((tmp_path / "deep/er/page.html").read_text())
    errors = capsys.readouterr().err
    for run, (_, _, problem) in zip(runs, DAMAGE, strict=True):
        assert re.search(f"<li><code>{run.folder}</code>: .*{problem}", html)
        assert f"warning: {run.folder} is damaged and left out: " in errors
    assert "11.11" not in html and len(rows(html, "mnist_shallow")) == 2


def test_a_damaged_note_of_a_start_is_shown(root: Path) -> None:
    (root / "runs/.partial/feed/started.json").write_text("{")
    ((_, texts),) = rows(written(root), "under-way")
    assert texts[:5] == ["–", "–", "–", "feed", "damaged"]


def test_each_store_has_a_page_of_its_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    Path("outputs/runs").mkdir(parents=True)
    for store in ("outputs", f"{root}/", "."):
        monkeypatch.setattr("sys.argv", ["page", store])
        command.main()
    names = [f"report-{name}.html" for name in (root.name, root.parent.name, "outputs")]
    assert sorted(path.name for path in Path("outputs").glob("*.html")) == sorted(names)


def test_an_empty_store_says_so_and_a_missing_one_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    assert "There is no finished run in" in written(tmp_path)
    monkeypatch.setattr("sys.argv", ["page", str(tmp_path / "reslts")])
    with pytest.raises(SystemExit, match=r"error: there is no folder .*reslts"):
        command.main()


def test_what_a_store_says_is_escaped(root: Path) -> None:
    evil = "</script><script>document.title='x'</script>"
    said = info("mnist_shallow", "adam", "tuned", "2026-02-01", note=evil, overrides=[f"optimizer.x={evil}"])
    put(root, history(90.0, 91.0), said)
    html = written(root)
    assert evil not in html and "&lt;/script&gt;&lt;script&gt;document.title" in html


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no chromium or no chromedriver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1300,1000",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, root: Path) -> Any:
    """The page of the small store, from the disk."""
    path = root.parent / "report.html"
    path.write_text(written(root), encoding="utf-8")
    browser.get(path.as_uri())
    return browser


def seen(browser: Any, selector: str) -> list[str]:
    """`data-run` of those elements that are not hidden, nor in something hidden."""
    script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length)"
    return browser.execute_script(f"{script}.map(e => e.dataset.run ?? e.id)", selector)  # type: ignore[no-any-return]


def drawn(browser: Any, experiment: str, of: str = "data.filter(t => t.visible === true).map(t => t.meta)") -> Any:
    return browser.execute_script(f"return document.querySelector('#{experiment} .canvas').{of}")


def eventually(read: Any, expected: Any) -> None:
    deadline = time.monotonic() + 10
    while read() != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert read() == expected


def test_the_page_opens_without_errors_or_requests(opened: Any) -> None:
    assert drawn(opened, "mnist_shallow") and opened.title.startswith("Block-ADMM")
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = [one["request"]["url"] for one in sent if one["documentURL"] == opened.current_url]
    assert [url for url in urls if not url.startswith("data:")] == [opened.current_url]


def test_filters_show_what_is_asked_for(opened: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    everything = seen(opened, "[data-run]"), seen(opened, "section.experiment")
    assert set(everything[1]) == {"mnist_shallow", "mnist_deep10", "memory", "lfw_proxy"}
    choice = Select(opened.find_element(By.ID, "experiment"))
    choice.select_by_value("mnist_deep10")
    assert seen(opened, "section.experiment") == ["mnist_deep10"]
    assert {run.split("/")[0] for run in seen(opened, "#newest tr[data-run]")} == {"mnist_deep10"}
    assert seen(opened, "#under-way tr[data-run]") == []
    choice.select_by_value("")
    box = opened.find_element(By.CSS_SELECTOR, "#methods [value=sgd]")
    box.send_keys(Keys.SPACE)  # by keyboard
    assert seen(opened, "section.experiment") == ["mnist_shallow"]
    shown = {run for run in seen(opened, "tr[data-run], details.run") if run}
    assert shown == {f"mnist_shallow/sgd-tuned-{n:012x}" for n in (0, 1)}
    assert set(drawn(opened, "mnist_shallow")) == {"mnist_shallow/sgd-tuned-000000000001"}
    assert opened.find_element(By.ID, "count").text == "2 of 8 runs"
    opened.find_element(By.CSS_SELECTOR, "#methods [value=block_admm]").click()
    assert seen(opened, "section.experiment") == ["mnist_shallow", "memory"]
    opened.find_element(By.CSS_SELECTOR, "[type=reset]").click()
    eventually(lambda: (seen(opened, "[data-run]"), seen(opened, "section.experiment")), everything)
    opened.find_element(By.ID, "words").send_keys("seed 4 after")
    assert set(seen(opened, "details.run")) == {"mnist_shallow/block_admm-tuned-000000000002"}


def test_a_link_opens_its_run(opened: Any) -> None:
    from selenium.webdriver.common.by import By

    link = opened.find_element(By.CSS_SELECTOR, "#newest tr[data-run*=raw] a")
    run = opened.find_element(By.ID, link.get_attribute("href").split("#")[1])
    assert run.get_attribute("open") is None
    opened.execute_script("arguments[0].click()", link)
    eventually(lambda: run.get_attribute("open"), "true")


def test_curves_are_toggled_zoomed_and_chosen(opened: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    part = opened.find_element(By.ID, "mnist_shallow")
    opened.execute_script("document.documentElement.style.scrollBehavior = 'auto'; arguments[0].scrollIntoView()", part)
    both = {"mnist_shallow/block_admm-tuned-000000000002", "mnist_shallow/sgd-tuned-000000000001"}
    assert set(drawn(opened, "mnist_shallow")) == both
    part.find_element(By.CSS_SELECTOR, ".legendtoggle").click()  # Block-ADMM is the first
    eventually(lambda: set(drawn(opened, "mnist_shallow")), {"mnist_shallow/sgd-tuned-000000000001"})
    time.sleep(0.5)  # else it is a double click
    part.find_element(By.CSS_SELECTOR, ".legendtoggle").click()
    eventually(lambda: set(drawn(opened, "mnist_shallow")), both)

    def abscissae() -> list[float]:
        return drawn(opened, "mnist_shallow", "layout.xaxis.range.map(Number)")  # type: ignore[no-any-return]

    before = abscissae()
    ground = part.find_element(By.CSS_SELECTOR, ".nsewdrag")
    ActionChains(opened).move_to_element(ground).click_and_hold().move_by_offset(120, 80).release().perform()
    eventually(lambda: before[0] < abscissae()[0] < abscissae()[1] < before[1], True)
    Select(part.find_element(By.CSS_SELECTOR, ".against")).select_by_value("seconds")
    assert drawn(opened, "mnist_shallow", "layout.xaxis.title.text") == "training time (s)" and abscissae()[1] >= 3.0
    Select(part.find_element(By.CSS_SELECTOR, ".quantity")).select_by_value("kkt")
    assert drawn(opened, "mnist_shallow", "layout.yaxis.type") == "log"
    assert drawn(opened, "mnist_shallow", "data.map(t => t.uid)") == ["band0", "mean0"]
    assert drawn(opened, "mnist_shallow", "data[1].y") == [0.1, 0.2, 0.3]
    assert opened.get_log("browser") == []


def test_on_a_phone_only_tables_scroll_sideways_and_a_finger_on_a_plot_scrolls_the_page(
    browser: Any, root: Path
) -> None:
    long = {"overrides": ["optimizer.theta_update.betas=" + 20 * "0.9,"], "note": 20 * "long", "machine": 30 * "m"}
    put(root, history(91.0, 95.0), info("mnist_deep10", "sgd", "tuned", "2026-01-09", **long))
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    path = root.parent / "report.html"
    path.write_text(written(root), encoding="utf-8")
    browser.get(path.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    for element in ("document.documentElement", "document.body"):
        assert browser.execute_script(f"return {element}.scrollWidth") == phone["width"]
    widths = "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect().right)"
    for selector in ("figure img", ".scroll", "caption span", "select", ".canvas"):
        rights = browser.execute_script(widths, selector)
        assert rights and max(rights) <= phone["width"]
    assert max(browser.execute_script(widths, "table")) > phone["width"]  # inside of .scroll

    style = "document.documentElement.style.scrollBehavior = 'auto'"
    browser.execute_script(f"{style}; document.querySelector('#mnist_shallow .canvas').scrollIntoView()")
    before = drawn(browser, "mnist_shallow", "layout.yaxis.range.map(Number)")
    top = browser.execute_script("return scrollY")
    for kind, y in (("Start", 220), *(("Move", y) for y in range(210, 100, -10)), ("End", None)):
        points = [{"x": 200, "y": y}] if y else []
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    eventually(lambda: browser.execute_script("return scrollY") > top, True)
    assert drawn(browser, "mnist_shallow", "layout.yaxis.range.map(Number)") == before
