import hashlib
import json

import numpy as np
import pytest
from PIL import Image

import evaluate
from dpt.evaluation.report import page
from dpt.files import append_line
from tests.browser import open_browser

HOSTILE = '</script><img src=x onerror=alert(1)> & "quotes"'


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two arms with verdicts, boxes and traces, and names that a page must not take for markup."""
    root, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    for k, arm in enumerate(("base", "own")):
        (root / arm / "samples").mkdir(parents=True)
        for number, (prompt, category) in enumerate([("a red circle", "single"), (HOSTILE, "other")]):
            file = f"samples/{number}.png"
            Image.fromarray(rng.integers(0, 255, (128, 128, 3)).astype(np.uint8)).save(root / arm / file)
            record = {"file": file, "prompt": prompt, "category": category, "seed": 0, "scores": [0.1, 0.2, 0.15]}
            append_line(root / arm / "metadata.jsonl", record)
            label = "correct" if k == number else "misaligned"
            verdict = {
                "file": file,
                "sha256": hashlib.sha256((root / arm / file).read_bytes()).hexdigest(),
                "label": label,
                "reason": "<b>why</b>",
                "objects": [["red circle", 0.5, 0.5, 0.2, 0.2]],
            }
            append_line(root / arm / "oracle.jsonl", verdict)
    return root


@pytest.fixture(scope="module")
def report(folders):
    arms = [str(folders / arm) for arm in ("base", "own")]
    assert evaluate.main(["table", *arms, "--output", str(folders / "t")]) == 0
    figure = folders / "curves.png"
    Image.new("RGB", (20, 10), "red").save(figure)
    command = ["report", *arms, "--tables", str(folders / "t/table.json")]
    output = folders / "report.html"
    assert evaluate.main([*command, "--figures", str(figure), "--output", str(output)]) == 0
    return output


def test_the_page_stands_alone_and_takes_nothing_for_markup(report):
    text = report.read_text()
    assert text.count("<script") == 2
    assert "onerror" in text
    assert "<img src=x" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert {row["prompt"] for row in data["rows"]} == {"a red circle", HOSTILE}
    assert data["tables"][0]["rows"][0][0] == "base"
    assert data["tables"][0]["title"].endswith("/t: arms")  # two folders, so that two experiments' tables differ
    assert page({"title": "</script>"}).count("</script>") == 2


def test_bad_files_are_one_line(folders, tmp_path, capsys):
    base = ["report", str(folders / "base"), "--output", str(tmp_path / "r.html")]
    (tmp_path / "bad.png").write_text("x")
    for more, message in (
        (["--figures", str(tmp_path / "bad.png")], "bad.png is no picture"),
        (["--tables", str(tmp_path / "bad.png")], "bad.png is no table.json"),
        (["--seeds", "7"], "no pictures of the seeds [7]"),
    ):
        assert evaluate.main([*base, *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert evaluate.main(["report", str(folders / "base"), str(folders / "base"), *base[2:]]) == 2


@pytest.fixture(scope="module")
def browser():
    driver = open_browser()
    yield driver
    driver.quit()


def test_filters_gallery_and_keyboard_in_a_browser(report, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def find(name):
        return browser.find_element(By.ID, name)

    def rows():
        return [row.text for row in browser.find_elements(By.CSS_SELECTOR, ".prompt")]

    browser.get(report.as_uri())
    assert rows() == ["a red circle", HOSTILE]
    assert not browser.find_elements(By.CSS_SELECTOR, "#gallery img[src='x']")
    WebDriverWait(browser, 10).until(lambda _: browser.find_element(By.CSS_SELECTOR, ".cell img").get_attribute("src"))
    Select(find("category")).select_by_value("single")
    assert rows() == ["a red circle"]
    Select(find("category")).select_by_value("")
    Select(find("winner")).select_by_value("own")
    assert rows() == [HOSTILE]
    Select(find("winner")).select_by_value("")
    Select(find("arm")).select_by_value("base")
    Select(find("verdict")).select_by_value("misaligned")
    assert rows() == [HOSTILE]
    Select(find("verdict")).select_by_value("")
    find("text").send_keys("CIRCLE")
    assert rows() == ["a red circle"]
    assert find("count").text == "1 of 2 prompts and seeds"
    browser.find_element(By.CSS_SELECTOR, ".cell").send_keys(Keys.ENTER)
    assert find("dialog").get_attribute("open")
    assert find("dialog-title").text == "a red circle (base)"
    assert find("reason").text == "correct: <b>why</b>"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#large rect")) == 1
    assert browser.find_elements(By.CSS_SELECTOR, "#trace polyline")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert find("dialog-title").text == "a red circle (own)"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not find("dialog").get_attribute("open")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
