import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from dpt.choosing_rules import candidate_seeds
from dpt.demo import __main__ as demo
from dpt.demo import studio as studios
from dpt.demo.studio import Stopped, Studio, in_steps
from dpt.drawing import Artist
from dpt.images import with_boxes
from dpt.sampling_settings import Sampling
from tests.browser import open_browser

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def studio(shapes_dpt):
    return Studio(Artist.load("shapes", shapes_dpt), Sampling(guidance_scale=3.0, num_inference_steps=4))


def test_both_pictures_with_the_score_after_every_step(studio):
    seen = list(studio.draw("a red circle", 3, 0.05, "latent", "the circle"))
    assert len(seen) == 4 + 1 + 4 + 1 + 1
    assert [len(points) for _, _, points, _, _ in seen] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 8]
    assert seen[3][0] is None
    assert seen[4][0].shape == (128, 128, 3)
    plain, corrected, points, found, say = seen[-2]
    assert found == []
    assert (plain != corrected).any()
    assert {arm for _, _, arm in points} == {"plain", "corrected"}
    assert "done" in say
    assert (seen[-1][0] != plain).any()  # boxes on it
    assert "corrected: lime " in seen[-1][-1]
    for words, message in (
        (("  ", 0, 0.0, "latent", ""), "prompt is empty"),
        ((None, 0, 0.0, "latent", ""), "prompt is empty"),
        (("a star", 1e30, 0.0, "latent", ""), "seed is 1e"),
        (("a star", None, 0.0, "latent", ""), "seed is None"),
        (("a \ud800", 0, 0.0, "latent", ""), r"the prompt is 'a \\ud800', which is no UTF-8 text"),
        (("a star", 0, 0.0, "latent", "\udcff"), r"the phrase is '\\udcff', which is no UTF-8 text"),
        (("a star", 0, None, "latent", ""), "length is empty"),
        (("a star", 0, 0.0, "latent", "", 0), "candidates is 0; it must be a number from 1 to 8"),
        (("a star", 0, 0.0, "latent", "", 9), "candidates is 9"),
        (("a star", 0, 0.0, "latent", "", None), "candidates is None"),
        (("a star", 0, 0.0, "latent", "", 2, 0), "choose at is 0; it must be a fraction of the steps"),
        (("a star", 0, 0.0, "latent", "", 2, 1.5), "choose at is 1.5"),
        (("a star", 0, 0.0, "latent", "", 2, None), "choose at is None"),
        (("a star", 0, 0.1, "latent", "", 2, 1.0), "no step behind it is corrected"),
    ):
        with pytest.raises(ValueError, match=message):
            next(studio.draw(*words))
    *_, (_, _, _, _, say) = studio.draw("a dog", 0, 0.0, "latent", "")
    assert "only knows shapes" in say


def test_dropped_candidates_are_shown_and_the_kept_one_is_what_its_seed_draws(studio):
    seen = list(studio.draw("a red circle", 3, 0.05, "latent", "", 3, 0.5))
    assert len(seen) == (4 + 1 + 1) + (4 + 1)  # the choice is made once
    plain, corrected, points, candidates, say = seen[-1]
    assert [len(shown) for _, _, _, shown, _ in seen[:3]] == [0, 0, 3]
    captions = [caption for _, caption in candidates]
    seeds = candidate_seeds(3, 3)
    scores = [float(caption.split(": ")[1].removesuffix(", kept")) for caption in captions]
    kept = seeds[int(np.argmax(scores))]
    assert [caption.split(": ")[0] for caption in captions] == [f"seed {seed}" for seed in seeds]
    assert [caption.endswith(", kept") for caption in captions] == [seed == kept for seed in seeds]
    assert say == f"corrected: done; 3 candidates, kept seed {kept} after step 2 of 4"
    assert all(image.shape == plain.shape for image, _ in candidates)
    *_, (alone, _, trace, _, _) = studio.draw("a red circle", kept, 0.0, "latent", "")
    chosen = studio.sampling.changed(correction_norm=0.05, correction_target="latent", candidates=3, choose_at=(0.5,))
    (at_once,) = studio.artist.draw(["a red circle"], [3], chosen)
    assert np.abs(at_once.image.astype(int) - corrected).max() <= 1  # as when one drawing chooses and corrects
    assert np.abs(alone.astype(int) - plain).max() <= 1
    lines = [[score for _, score, arm in found if arm == "plain"] for found in (points, trace)]
    assert lines[0] == pytest.approx(lines[1], abs=1e-4)
    assert (corrected != plain).any()


def test_boxes_are_sorted_and_drawn(studio):
    image = np.full((128, 128, 3), 240, np.uint8)
    boxes = studio.artist.find(image, "the red circle")
    assert [score for score, _ in boxes] == sorted((score for score, _ in boxes), reverse=True)
    drawn = with_boxes(image, [([0.5, 0.5, 0.5, 0.5], "lime")])
    assert (drawn[64, 32] == [0, 255, 0]).all()


def test_whoever_leaves_stops_their_drawing():
    reached, stopped = [], threading.Event()

    def work(report):
        try:
            for k in range(10_000):
                time.sleep(0.001)
                report(k)
                reached.append(k)
        except Stopped:
            stopped.set()
            raise

    steps = in_steps(work)
    assert next(steps) == 0
    steps.close()
    assert stopped.wait(5)
    assert len(reached) < 1000
    assert list(in_steps(lambda report: (report(1), 2)[1])) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        list(in_steps(lambda report: 1 / 0))


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind((demo.LOOPBACK, 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dpt", "none-such"], "--dpt none-such is not there"),
        (["--dpt", "somebody/none-such"], "somebody/none-such is neither a path here nor to be had from the hub"),
        (["--model", "\udcff"], "--model is '\\udcff', which is no UTF-8 text"),
        (["--model", "none-such"], "it is neither a file nor a folder here"),
        (["--model", "sd14"], "no adapter is known"),
        (["--dpt", "ckpt/shapes"], "ckpt/shapes"),
    ],
)
def test_bad_input_is_one_line_and_ends_the_page(words, said, free_port, capsys, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.chdir(ROOT)
    assert demo.main(["--port", str(free_port), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    with socket.socket() as closed:
        assert closed.connect_ex((demo.LOOPBACK, free_port)) != 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "--steps: '0'; it must be a whole number at least 1 and at most 500"),
        (["--scale", "-1"], "--scale: '-1'; it must be a number at least 0 and below 1000"),
        (["--scale", "nan"], "--scale: 'nan'; it must be a number at least 0 and below 1000"),
        (["--port", "99999"], "--port: '99999'; it must be a whole number at least 1 and at most 65,535"),
        (["--port", "0"], "--port: '0'; it must be a whole number"),
    ],
)
def test_numbers_out_of_range(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(words)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_port_in_use_and_an_interruption(free_port, capsys, monkeypatch):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind((demo.LOOPBACK, free_port))
        taken.listen()
        assert demo.main(["--port", str(free_port)]) == 2
    assert f"--port {free_port} is in use" in capsys.readouterr().err

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load", lambda args: None)
    monkeypatch.setattr(demo, "wait_forever", interrupted)
    assert demo.main(["--port", str(free_port)]) == 130  # while the page is served
    monkeypatch.setattr(demo, "load", interrupted)
    assert demo.main(["--port", str(free_port)]) == 130  # while the model is loaded
    assert capsys.readouterr().err == "\ninterrupted\n" * 2


def test_the_page_needs_no_slow_imports():
    code = "import sys, dpt.demo.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture
def url(studio):
    pytest.importorskip("gradio")
    opening = Future()
    page = demo.make_page("shapes", opening)
    _, url, _ = page.launch(server_name=demo.LOOPBACK, server_port=None, prevent_thread_lock=True, quiet=True)
    torch.set_num_threads(1)
    opening.set_result(studio)
    yield url
    page.close()


def test_the_page_in_a_browser(url, studio, monkeypatch):
    driver = open_browser()
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def status():
        return driver.find_element(By.CSS_SELECTOR, "#status textarea, #status input").get_attribute("value")

    try:
        driver.get(url)
        wait = WebDriverWait(driver, 60)
        wait.until(lambda d: status() == "ready")
        driver.find_element(By.ID, "draw").click()
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#corrected img"))
        wait.until(lambda d: status() == "corrected: done")
        assert driver.find_elements(By.CSS_SELECTOR, "#plain img")
        assert driver.find_elements(By.CSS_SELECTOR, "#trace svg, #trace canvas")
        assert "corrected" in driver.find_element(By.ID, "trace").text  # gradio draws no line that is not in its legend
        assert not driver.find_elements(By.ID, "candidates")
        count = driver.find_element(By.CSS_SELECTOR, "#count input")
        count.clear()
        count.send_keys("2\t")
        wait.until(lambda d: d.find_elements(By.ID, "candidates"))
        driver.find_element(By.ID, "draw").click()
        wait.until(lambda d: len(d.find_elements(By.CSS_SELECTOR, "#candidates img")) == 2)
        wait.until(lambda d: status().startswith("corrected: done; 2 candidates"))
        monkeypatch.setattr(studio, "sampling", studio.sampling.changed(num_inference_steps=500))
        driver.find_element(By.ID, "draw").click()
        wait.until(lambda d: "of 500" in status())
        driver.get("about:blank")  # whoever leaves stops their drawing
        wait.until(lambda d: all(thread.name != studios.THREAD for thread in threading.enumerate()))
    finally:
        driver.quit()


def test_the_api_takes_candidates_and_says_what_is_wrong_with_them(url):
    client = pytest.importorskip("gradio_client").Client(url, verbose=False)
    words = ("a red circle", 0, 0.0, "latent", "")
    *_, gallery, say = client.predict(*words, 2, 0.5, api_name="/run")
    assert [entry["caption"].endswith(", kept") for entry in gallery].count(True) == 1
    assert say.startswith("corrected: done; 2 candidates, kept seed ")
    for wrong, message in (((0, 0.5), "error: candidates is 0; "), ((2, 1.5), "error: choose at is 1.5; ")):
        assert client.predict(*words, *wrong, api_name="/run")[-1].startswith(message)


def test_two_users_are_served_one_after_the_other(url):
    client = pytest.importorskip("gradio_client")
    jobs = [
        client.Client(url, verbose=False).submit("a red circle", seed, 0.0, "latent", "", api_name="/run")
        for seed in (0, 1)
    ]
    for job in jobs:
        assert job.result(timeout=60)[-1] == "corrected: done"
