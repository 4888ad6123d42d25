"""The page: real requests to the running tools/app.py, and a real browser that uses it."""

from __future__ import annotations

import contextlib
import csv
import gzip
import http.client
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest
from PIL import Image

from inference import load_captioner
from tests.conftest import paint, run, run_without
from tests.forked import Forked
from utils import pip

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

QUESTION = "what color is the square?"


class Server:
    """A running tools/app.py."""

    def __init__(self, process: Forked, port: int):
        self.process, self.port = process, port
        self.host = f"127.0.0.1:{port}"

    def ask(self, method: str, path: str, body=None, **headers: str):
        """Status, headers and body of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, response.headers, content

    def caption(self, photo, **query):
        """Status and answer of a request for captions."""
        status, _, content = self.ask("POST", "/caption?" + urlencode(query, True), photo)
        return status, json.loads(content)


# The page with shorter limits and slower captions, each of which is announced.
SLOWLY = """
import time
from tools import app
app.HEAD_SECONDS, app.BODY_SECONDS, app.CONNECTIONS = 1, 2, 100
quickly = app.write
def slowly(captioner, photo, query):
    print("captioning", flush=True)
    time.sleep(0.4)
    if query.get("seed") == "500":
        raise RuntimeError("a fault of ours")
    return quickly(captioner, photo, query)
app.write = slowly
app.main()
"""


@contextmanager
def running(checkpoint, *flags, script=("-m", "tools.app"), limits=None):
    flags = ("--checkpoint", checkpoint, "--port", 0, *flags)
    with Forked(*script, *flags, limits=limits) as process:
        said = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
        assert address, (said, process.communicate(1))
        yield Server(process, int(address.group(1)))


@pytest.fixture(scope="module")
def server(joint):
    with running(joint / "captioner_best_cider.safetensors", "--max_megabytes", "0.5") as server:
        yield server


@pytest.fixture(scope="module")
def captions_only(trained):
    with running(trained / "captioner_best_cider.safetensors") as server:
        yield server


@pytest.fixture(scope="module")
def photo(joint) -> bytes:
    return (joint / "images" / "000.png").read_bytes()


# --- Requests -------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(server):
    status, headers, content = server.ask("GET", "/")
    page = content.decode()
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    loads = re.findall(r"""(?:src|href|action)=["']?(?!data:)([^"'> ]+)|url\(|@import""", page)
    assert not loads
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    asked = re.findall(r"""request\(["'`]([^"'`]+)""", page)
    assert len(asked) == 3 and not [path for path in asked if path[0] == "/"]  # behind a prefix


def test_captions_are_those_of_the_captioner_with_a_map_for_each_word(server, joint, photo):
    status, answer = server.caption(photo, beam_size=3, maps="true")
    assert status == 200
    captioner = load_captioner(joint / "captioner_best_cider.safetensors")
    picture = captioner.encoder.open(joint / "images" / "000.png")
    _, expected = captioner.explain(picture, beam_size=3)
    assert [found["text"] for found in answer["captions"]] == [each.text for each in expected]
    scores = [found["score"] for found in answer["captions"]]
    assert scores == pytest.approx([each.hypothesis.score for each in expected], abs=1e-3)
    assert scores == sorted(scores, reverse=True)
    assert (answer["rows"], answer["columns"]) == (4, 4)
    assert answer["area"] == pytest.approx([0, 0, 1, 1], abs=0.01)
    for found in answer["captions"]:
        assert 0 < found["confidence"] <= 1
        assert [each["word"] for each in found["words"]] == found["text"].split()
        assert all(len(w["map"]) == 16 and max(w["map"]) == 255 for w in found["words"])
    plain = server.caption(photo, beam_size=3)[1]  # maps only when asked
    assert plain.keys() == {"captions", "others"} and plain["others"] == []
    for with_maps, without in zip(answer["captions"], plain["captions"], strict=True):
        assert without == {key: with_maps[key] for key in ("text", "score", "confidence")}


def test_other_ways_to_say_it_differ(server, photo):
    answer = server.caption(photo, others=4)[1]
    texts = [answer["captions"][0]["text"], *(found["text"] for found in answer["others"])]
    assert 2 <= len(texts) <= 5 and len(set(texts)) == len(texts)


def test_it_says_that_it_runs_and_has_samples(server):
    health = json.loads(server.ask("GET", "/health")[2])
    assert health["status"] == "ok" and health["max_megabytes"] == 0.5
    drawn = {server.ask("GET", f"/samples/{i}")[2] for i in range(health["samples"])}
    assert len(drawn) == health["samples"] > 2
    assert all(server.caption(drawing)[0] == 200 for drawing in drawn)
    for number in (health["samples"], "x", "9" * 5000):  # more digits than Python reads
        status, _, content = server.ask("GET", f"/samples/{number}")
        assert status == 404 and "samples" in json.loads(content)["error"]


def test_draws_follow_the_seed(server, photo):
    options = {"sample": "true", "temperature": 3, "top_p": 1, "beam_size": 4}
    one, again, other = (server.caption(photo, seed=seed, **options)[1] for seed in (1, 1, 2))
    assert len(one["captions"]) == 4
    python = server.caption(photo, seed=1, **options | {"sample": True})[1]  # sent as "True"
    assert python == one
    assert one == again != other


def test_questions_are_answered_where_they_were_learned(server, captions_only, photo):
    status, answer = server.caption(photo, question=QUESTION)
    assert status == 200 and answer["answers"][0]["text"] == "red"
    assert json.loads(server.ask("GET", "/health")[2])["tasks"] == ["captions", "questions"]
    status, answer = captions_only.caption(photo, question=QUESTION)
    assert status == 400 and "not trained for questions" in answer["error"]
    assert json.loads(captions_only.ask("GET", "/health")[2])["tasks"] == ["captions"]


@pytest.mark.parametrize(
    "query, expected",
    [
        ({"beam_size": 11}, "from 1 to 10"),
        ({"beam_size": 0}, "from 1 to 10"),
        ({"beam_size": "many"}, "beam_size must be"),
        ({"others": 10}, "others must be"),
        ({"temperature": "nan"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"temperature": 0.5}, "temperature changes nothing without sample=true"),
        ({"question": " "}, "empty"),
        ({"sample": "yes"}, "sample=yes is no option"),
        ({"beams": 3}, "beams=3 is no option"),
        ({"beam_size": "2.0"}, "a whole number from 1 to 10"),
        ({"question": ["is it red?", "where is it?"]}, "twice"),
    ],
)
def test_wrong_options_are_said(server, photo, query, expected):
    status, answer = server.caption(photo, **query)
    assert status == 400 and expected in answer["error"]


def test_files_that_are_no_pictures_get_a_friendly_answer(server, photo):
    for body in (b"", b"<html>", b"%PDF-1.7", photo[: len(photo) // 2]):
        status, answer = server.caption(body)
        assert status == 400 and "Try a JPEG or a PNG" in answer["error"]
        assert not re.search(r"BytesIO|0x|/|Traceback", answer["error"])
    form = b'--X\r\nContent-Disposition: form-data; name="f"\r\n\r\n' + photo + b"\r\n--X--\r\n"
    for kind in ("multipart/form-data; boundary=X", "Application/JSON"):
        status, _, content = server.ask("POST", "/caption", form, **{"Content-Type": kind})
        assert status == 400 and "not in a form" in json.loads(content)["error"]
    packed = server.ask("POST", "/caption", gzip.compress(photo), **{"Content-Encoding": "gzip"})
    assert packed[0] == 400 and b"compressed" in packed[2]
    assert server.caption(photo)[0] == 200


def test_large_bodies_are_refused_however_they_come(server, photo):
    large = bytes(600_000)
    parts = (large[i : i + 10_000] for i in range(0, len(large), 10_000))
    for body in (large, parts):  # with their length said before, and in chunks
        status, answer = server.caption(body)
        assert status == 413 and "larger than 0.5 MB" in answer["error"]
    padded = photo + bytes(499_000 - len(photo))
    assert server.caption(padded)[0] == 200


def test_foreign_names_and_foreign_pages_are_refused(server, photo):
    def status(method, path, **headers):
        body = photo if method == "POST" else None
        return server.ask(method, path, body, **headers)[0]

    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "[", ""):
        assert status("GET", "/", Host=host) == 403, host
        assert status("POST", "/caption", Host=host, Origin=f"http://{host}") == 403, host
    for host in (server.host, f"localhost:{server.port}", "[::1]"):
        assert status("GET", "/", Host=host) == 200, host
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://[{server.host}"):
        assert status("POST", "/caption", Origin=origin) == 403, origin
    assert status("POST", "/caption", Origin=f"http://{server.host}") == 200
    app = pytest.importorskip("tools.app")
    assert app.refuse("GET", {"host": "MyMac.local:8000"}, "MyMac.local") is None
    for site, expected in {"cross-site": 403, "same-site": 403, "same-origin": 200}.items():
        assert status("POST", "/caption", **{"Sec-Fetch-Site": site}) == expected
        assert status("GET", "/health", **{"Sec-Fetch-Site": site}) == expected
    # As a proxy passes it on that asks by the server's own address (Apache).
    proxied = {"Origin": "https://captions.example", "Sec-Fetch-Site": "same-origin"}
    assert status("POST", "/caption", **proxied) == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert status("GET", "/", **link) == 200 and status("POST", "/caption", **link) == 403
    assert status("GET", "/caption") == 405
    assert status("GET", "/../config.py") == status("GET", "/app.py") == 404


def test_many_at_once_are_all_answered_alike(server, photo):
    answers = at_once([lambda: server.caption(photo, beam_size=2)] * 8)
    assert len(answers) == 8 and all(answer == answers[0] for answer in answers)
    assert answers[0][0] == 200


# --- Load -----------------------------------------------------------------------------------


@pytest.fixture
def slow(joint):
    with running(joint / "captioner_best_cider.safetensors", script=("-c", SLOWLY)) as server:
        yield server


def said(server, *, errors=0) -> str:
    """End the page as Ctrl-C does; returns what it printed, where its errors are so many."""
    server.process.send_signal(signal.SIGINT)
    out, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 0 and err.count("Traceback") == errors, err
    return out


def head(size: int, path="/caption") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode()


def started(server, content: bytes) -> socket.socket:
    """A connection on which so much was sent, and that waits."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(content)
    return connection


def test_programs_and_proxies_are_answered_whatever_they_add_or_leave_out(slow, photo):
    """HAProxy asks how it is by HTTP/1.0, without a name; Java's client asks for another protocol
    with each photo; people write a slash too many."""
    with started(slow, b"GET /health HTTP/1.0\r\n\r\n") as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"
    wish = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAAB"}
    assert slow.ask("POST", "/caption", photo, **wish)[0] == 200
    status, _, answer = slow.ask("POST", "/caption/", photo)
    assert status == 404 and json.loads(answer)["error"]
    slow.process.send_signal(signal.SIGINT)
    _, err = slow.process.communicate(timeout=20)
    assert slow.process.returncode == 0 and err == ""


@pytest.mark.parametrize(
    "begun",
    [
        [b"", b"GET / HT", head(9), head(9) + b"half", head(9, "/nowhere") + b"half"],
        [head(9) + b"half"],
    ],
)
def test_half_open_connections_end_and_don_t_keep_others_out(slow, photo, begun):
    half = [started(slow, begun[i % len(begun)]) for i in range(250)]
    assert slow.caption(photo)[0] == 200
    for connection in half:
        with connection, contextlib.suppress(ConnectionResetError):
            while connection.recv(10_000):  # until the end, or the time-out's error
                pass
    assert said(slow)


def test_a_burst_of_connections_leaves_files_to_open(joint):
    limits = {resource.RLIMIT_NOFILE: 256}
    with running(joint / "captioner_best_cider.safetensors", limits=limits) as server:
        server.process.send_signal(signal.SIGSTOP)
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                connection = stack.enter_context(socket.socket())
                connection.setblocking(False)
                connection.connect_ex(("127.0.0.1", server.port))
            server.process.send_signal(signal.SIGCONT)
            assert server.ask("GET", "/health")[0] == 200
        said(server)


def test_who_left_is_not_captioned(slow, photo):
    whole = head(len(photo)) + photo
    for connection in [started(slow, whole) for _ in range(12)]:
        connection.close()
    started(slow, head(len(photo)) + photo[:20]).close()  # in the middle of its upload
    assert slow.caption(photo)[0] == 200
    assert said(slow).count("captioning") <= 3  # the first had its turn at once


def test_what_waits_is_bounded(joint):
    large = os.urandom(5_000_000)
    patient = SLOWLY.replace("= 1, 2,", "= 60, 60,")
    flags = joint / "captioner_best_cider.safetensors", "--max_megabytes", "5"
    with running(*flags, script=("-c", patient)) as slow:
        before = peak_megabytes(slow)
        answers = at_once([lambda: slow.ask("POST", "/caption", large)] * 40)
        assert {status for status, _, _ in answers} == {400, 503}
        assert all(h["Retry-After"] for status, h, _ in answers if status == 503)
        assert peak_megabytes(slow) - before < 150  # of 200 that were sent
        assert slow.caption(large)[0] == 400  # there is room again
        small = at_once([lambda: slow.ask("POST", "/caption", b"x")] * 40)
        assert 16 <= sum(status == 400 for status, _, _ in small) < 40
        said(slow)


def peak_megabytes(server) -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", read_proc(f"{server.process.pid}/status"))[1]) / 1024


def read_proc(name: str) -> str:
    path = Path("/proc", name)
    return path.read_text() if path.exists() else pytest.skip("only Linux tells this")


def at_once(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


def test_every_answer_has_the_headers(slow, photo):
    asked = {
        200: ("GET", "/", None),
        403: ("POST", "/caption", photo, "evil.example"),
        404: ("GET", "/nowhere", None),
        405: ("GET", "/caption", None),
        413: ("POST", "/caption", bytes(20_000_001)),
        500: ("POST", "/caption?seed=500", photo),
    }
    answers = {}
    for status, (method, path, body, *host) in asked.items():
        answers[status] = slow.ask(method, path, body, Host=(host or ["localhost"])[0])
    busy = at_once([lambda: slow.ask("POST", "/caption", photo)] * 30)
    answers[503] = next(answer for answer in busy if answer[0] == 503)
    with started(slow, b"no HTTP at all\r\n\r\n") as connection:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        answers[400] = answer.status, answer.headers, b"{}"
    for status, (got, headers, content) in answers.items():
        assert got == status
        assert "default-src 'none'" in headers["Content-Security-Policy"], status
        assert headers["X-Content-Type-Options"] == "nosniff" and "Server" not in headers
        assert status == 200 or "Traceback" not in content.decode()
    said(slow, errors=1)


def test_it_ends_at_once_whatever_waits(joint, photo):
    checkpoint, code = joint / "captioner_best_cider.safetensors", SLOWLY.replace("0.4", "1")
    with running(checkpoint, script=("-c", code)) as slow, ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(slow.caption, photo) for _ in range(12)]
        slow.process.stdout.readline()  # the first is being captioned
        time.sleep(0.3)
        begun = time.monotonic()
        said(slow)
        assert time.monotonic() - begun < 10  # the twelve take longer
        assert {answer.result()[0] for answer in answers} <= {200, 503}


# --- The command ----------------------------------------------------------------------------


def test_it_listens_on_this_machine_only_and_ends_quietly(joint):
    with running(joint / "captioner_best_cider.safetensors") as server:
        heard = run("-m", "tools.app", "--checkpoint", "absent.pt", "--port", server.port)
        assert heard.returncode == 1 and "--port" in heard.stderr
        table = read_proc("net/tcp").splitlines()
        (line,) = [x for x in table if f":{server.port:04X} 00000000:0000" in x]
        assert "0100007F:" in line  # 127.0.0.1
        server.process.send_signal(signal.SIGINT)
        _, errors = server.process.communicate(20)
        assert (server.process.returncode, errors) == (0, "")


def test_without_the_extra_it_says_what_to_install():
    result = run_without("uvicorn", "tools.app", "--checkpoint", "x.pt")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines() == [
        f"error: the page needs uvicorn: run {pip('requirements-app.txt')}"
    ]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "absent.pt"),
        (["--host", "é..com"], "can't listen on"),
        *((["--max_megabytes", x], "max_megabytes") for x in ("nan", "0", "inf")),
    ],
)
def test_a_missing_checkpoint_and_bad_flags_are_said(tmp_path, flags, expected):
    checkpoint = tmp_path / "absent.pt"
    result = run("-m", "tools.app", "--checkpoint", checkpoint, "--port", 0, *flags)
    assert result.returncode == 1 and expected in result.stderr
    assert "Traceback" not in result.stderr


# --- A browser ------------------------------------------------------------------------------

FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync use-fake-device-for-media-stream "
    "use-fake-ui-for-media-stream"
)


class Browser:
    """Chromium on the page."""

    def __init__(self, driver, width: int):
        self.driver = driver
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
        )

    def open(self, server: Server) -> None:
        self.driver.get(f"http://{server.host}/")

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        # In one call: the page may replace them at any moment.
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])]"
            ".filter((each) => each.offsetParent).map((each) => each.innerText)",
            selector,
        )

    def until(self, condition) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 30).until(lambda _: condition())

    def press(self, *keys: str):
        """Type, wherever the focus is; returns what has the focus then."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()
        return self.driver.switch_to.active_element

    def fits(self) -> None:
        wide = "const { scrollWidth, clientWidth } = document.documentElement;"
        wide += "return [scrollWidth, clientWidth]"  # innerWidth grows on a phone
        content, window = self.driver.execute_script(wide)
        assert content <= window

    def veil(self) -> list[int]:
        """How dark the veil over the photo is, 0 to 255, in the middle of each of 4 x 4 places."""
        return self.driver.execute_script(
            """const c = document.getElementById("heat"), pen = c.getContext("2d");
            return [...Array(16).keys()].map((i) => pen.getImageData(
                (i % 4 + .5) * c.width / 4, ((i >> 2) + .5) * c.height / 4, 1, 1).data[3]);"""
        )


@pytest.fixture(params=[1200, 375])
def browser(request, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("there is no chromium with chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in [*FLAGS.split(), f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{flag}")
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(chrome, request.param)
        severe = [x["message"] for x in chrome.get_log("browser") if x["level"] == "SEVERE"]
        # A file that is refused, or gone, is the one thing that may be logged.
        allowed = re.compile("status of 400|ERR_FILE_NOT_FOUND")
        assert [message for message in severe if not allowed.search(message)] == []
    finally:
        chrome.quit()


def test_a_browser_uses_the_page_with_the_keyboard_alone(browser, server, joint):
    from selenium.webdriver.common.keys import Keys

    browser.open(server)
    assert browser.press(Keys.TAB).get_attribute("id") == "file"
    browser.find("#file").send_keys(str(joint / "images" / "001.png"))
    browser.until(lambda: browser.texts("#written .word"))
    answer = server.caption((joint / "images" / "001.png").read_bytes(), maps="true")[1]
    best = answer["captions"][0]
    assert browser.texts("#written > .caption")[0].lower() == best["text"]
    assert "%" in browser.texts("#written .row .soft")[0]
    assert len(set(browser.texts(".others .caption"))) == len(browser.texts(".others .caption")) > 0
    assert browser.veil() == [0] * 16

    # On to the first word, which shows its attention, and from it to the next.
    focus = browser.driver.switch_to.active_element
    for _ in range(8):
        if focus.get_attribute("class") == "word":
            break
        focus = browser.press(Keys.TAB)
    for i, word in enumerate(best["words"][:3]):
        if i:
            focus = browser.press(Keys.ARROW_RIGHT)
        assert focus.get_attribute("textContent") == word["word"]
        assert focus.get_attribute("aria-pressed") == "true"
        assert f"“{word['word']}”" in browser.find("#status").text
        # The more the decoder looked at a place, the thinner the veil over it.
        expected = [255 * 0.74 - 0.5 * weight for weight in word["map"]]
        assert browser.veil() == pytest.approx(expected, abs=30)  # of 61 to 189; it is smoothed
    browser.press(Keys.ESCAPE)
    assert browser.veil() == [0] * 16
    browser.press(Keys.ENTER)
    assert focus.get_attribute("aria-pressed") == "true"

    browser.find("#question").send_keys(QUESTION, Keys.ENTER)
    browser.until(lambda: browser.texts("#asked .caption") == ["Green"])

    browser.find("summary").send_keys(Keys.ENTER)
    assert not browser.find("[name=temperature]").is_displayed()
    browser.find("[name=sample][value=true]").send_keys(Keys.SPACE)
    assert browser.find("[name=temperature]").is_displayed()
    everything = Keys.CONTROL + "a" + Keys.NULL
    browser.find("[name=temperature]").send_keys(everything, "1.5")
    browser.find("[name=others]").send_keys(everything, "2", Keys.ENTER)
    browser.until(lambda: len(browser.texts(".others .caption")) == 2)

    # What goes wrong is said where it was asked for, and what was answered stays.
    browser.find("[name=temperature]").send_keys(everything, "9")
    browser.find("#question").send_keys(QUESTION, Keys.ENTER)
    browser.until(lambda: "temperature" in browser.find("#ask-error").text)
    assert browser.texts("#asked .caption") == ["Green"]
    assert not browser.find("#captions-error").is_displayed()
    browser.fits()


def test_a_browser_captions_several_photos_copies_and_downloads(browser, server, joint, tmp_path):
    from selenium.webdriver.common.keys import Keys

    bad, large = tmp_path / "=bad.jpg", tmp_path / "large.jpg"
    bad.write_bytes(b"no picture")
    large.write_bytes(bytes(600_000))
    files = [joint / "images" / "000.png", bad, large, joint / "images" / "002.png"]
    browser.open(server)
    browser.find("#file").send_keys("\n".join(map(str, files)))
    browser.until(lambda: browser.find("#all-title").text == "All 4 photos")
    rows = browser.texts("#list li")
    assert "red" in rows[0].lower() and "blue" in rows[3].lower()
    assert "Try a JPEG" in rows[1] and "0.6 MB" in rows[2]
    browser.find("#list li:nth-child(2) button").send_keys(Keys.ENTER)
    assert "Try a JPEG" in browser.find("#captions-error").text
    browser.until(lambda: not browser.find("#stage").is_displayed())
    browser.find("#list li:nth-child(4) button").send_keys(Keys.ENTER)
    caption = browser.texts("#written > .caption")[0].lower()
    assert "blue" in caption and browser.find("#stage").is_displayed()

    browser.find("#written button").send_keys(Keys.ENTER)
    browser.find("#question").send_keys(Keys.CONTROL, "v")
    assert browser.find("#question").get_attribute("value") == caption

    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.driver.execute_cdp_cmd("Page.setDownloadBehavior", folder)
    browser.find("#csv").send_keys(Keys.ENTER)
    table = tmp_path / "captions.csv"
    browser.until(table.exists)
    with table.open(encoding="utf-8-sig", newline="") as lines:
        written = list(csv.DictReader(lines))
    assert table.read_bytes().startswith(b"\xef\xbb\xbf")  # or Excel takes it for Western
    names = ["'" * (file == bad) + file.name for file in files]  # or a spreadsheet would run it
    assert [row["file_name"] for row in written] == names
    assert written[3]["text"] == caption and 0 < float(written[3]["confidence"]) <= 1
    assert "Try a JPEG" in written[1]["error"] and not written[1]["text"]
    browser.fits()


def test_a_browser_drops_folders_and_says_what_is_no_file(browser, server, joint, tmp_path):
    folder, gone = tmp_path / "mine", tmp_path / "gone.png"
    (folder / "below").mkdir(parents=True)
    for copy in (folder / "b.png", folder / "below" / "b.png", gone):
        shutil.copy(joint / "images" / "000.png", copy)
    (folder / "b.txt").write_text("a caption")
    (folder / ".hidden").touch()

    def drop(*files, **item):
        data = {"files": [*map(str, files)], "items": [item] if item else []}
        for step in ("dragEnter", "dragOver", "drop"):
            where = {"type": step, "x": 100, "y": 150, "data": data | {"dragOperationsMask": 1}}
            browser.driver.execute_cdp_cmd("Input.dispatchDragEvent", where)

    browser.open(server)
    drop(mimeType="text/uri-list", data="https://example.org/dog.jpg")
    browser.until(lambda: "save it as a file" in browser.find("#photo-error").text)
    browser.driver.execute_script(
        """const real = fetch, later = () => new Promise((done) => setTimeout(done, 500));
        fetch = (...what) => later().then(() => real(...what));"""
    )
    drop(folder, gone)
    browser.until(lambda: len(browser.texts("#list li")) == 3)
    gone.unlink()
    browser.until(lambda: browser.find("#all-title").text == "All 3 photos")
    rows = [text.split("\n") for text in browser.texts("#list li")]
    assert [name for name, _ in rows] == ["mine/b.png", "mine/below/b.png", "gone.png"]
    assert "can't be read any more" in rows[2][1]
    browser.fits()


def test_a_browser_loses_nothing_on_the_way(browser, server, joint):
    """An address with a password, a server that starts again, a half-typed option, a second Enter,
    leaving."""
    from selenium.webdriver.common.keys import Keys

    leave = """const leaving = new Event("beforeunload", { cancelable: true });
    dispatchEvent(leaving); return leaving.defaultPrevented"""
    browser.driver.get(f"http://user:password@{server.host}/")
    browser.until(lambda: len(browser.driver.find_elements("css selector", "#samples img")) == 4)
    browser.driver.execute_script(
        """const real = fetch; let away = 2;
        fetch = (...what) => away-- > 0 ? Promise.reject(new TypeError()) : real(...what);
        const others = document.querySelector("[name=others]");
        others.value = "";
        others.dispatchEvent(new Event("input", { bubbles: true }));"""
    )
    assert not browser.driver.execute_script(leave)
    files = [joint / "images" / name for name in ("000.png", "002.png")]
    browser.find("#file").send_keys("\n".join(map(str, files)))
    browser.until(lambda: "trying again" in browser.texts("#list li")[0])
    browser.until(lambda: browser.find("#all-title").text == "All 2 photos")
    assert all("square" in text for text in browser.texts("#list li"))
    assert browser.driver.execute_script(leave)
    names = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    buttons = [x["name"]["value"] for x in names if x.get("role", {}).get("value") == "button"]
    assert "a" in buttons and "" not in buttons

    browser.driver.execute_script("document.querySelector('[name=others]').value = 2")
    browser.find("#question").send_keys(QUESTION, Keys.ENTER, Keys.ENTER)
    browser.until(lambda: browser.texts("#asked .word"))
    time.sleep(0.5)
    assert len(browser.texts("#asked li")) == 1
    browser.find("#csv").send_keys(Keys.ENTER)
    assert not browser.driver.execute_script(leave)
    narrow = {"width": 320, "height": 256, "deviceScaleFactor": 4, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    browser.fits()  # as in a window of 1280 at 400 %


def test_a_browser_says_what_a_proxy_answers_and_goes_on(browser, server, joint):
    """A proxy's limits, and the page that it sends to who is no longer logged in."""
    browser.open(server)
    browser.until(lambda: browser.find("#samples button"))
    browser.driver.execute_script(
        """const real = fetch, answers = [504, 413, 200], headers = { "Retry-After": 0.1 };
        fetch = (url, ...how) => answers.length && url.pathname == "/caption"
            ? Promise.resolve(new Response("<html>", { status: answers.shift(), headers }))
            : real(url, ...how);"""
    )
    files = [joint / "images" / name for name in ("000.png", "001.png", "002.png")]
    browser.find("#file").send_keys("\n".join(map(str, files)))
    browser.until(lambda: browser.find("#all-title").text == "All 3 photos")
    large, login, captioned = browser.texts("#list li")
    assert "413: this photo is too large" in large and "200: reload" in login
    assert "square" in captioned


def test_a_browser_says_that_it_looks_and_that_the_server_is_away(browser, server, joint):
    from selenium.webdriver.common.keys import Keys

    def faint() -> list[str]:  # what can hardly be read
        return browser.driver.execute_script(
            """const own = (x) => getComputedStyle(x).opacity;
            const opacity = (x) => x ? own(x) * opacity(x.parentElement) : 1;
            return [...document.querySelectorAll("#captions *, #ask *")]
                .filter((x) => x.offsetParent && opacity(x) < .7).map((x) => x.textContent);"""
        )

    browser.open(server)
    browser.until(lambda: browser.find("#samples button"))
    browser.driver.execute_script(  # each request waits to be let through, or is refused
        """const real = fetch, headers = { "Retry-After": 0.1 };
        window.next = null;
        fetch = (url, ...how) => url.pathname != "/caption" ? real(url, ...how)
            : new Promise((done) => { next = done; }).then((status) => status
                ? new Response("{}", { status, headers }) : real(url, ...how));"""
    )

    def let(status: int) -> None:  # the request that waits
        browser.until(lambda: browser.driver.execute_script("return !!next"))
        browser.driver.execute_script("next(arguments[0]); next = null", status)

    browser.find("#file").send_keys(str(joint / "images" / "000.png"))
    browser.until(lambda: browser.find("#written").text == "Looking…")
    assert faint() == []
    let(400)
    browser.until(lambda: "answered 400" in browser.find("#captions-error").text)
    again = "document.querySelector('#options').requestSubmit()"
    browser.driver.execute_script(again)
    browser.until(lambda: browser.find("#written").text == "Looking…")
    assert not browser.find("#captions-error").is_displayed()
    let(0)
    browser.until(lambda: browser.texts("#written .word"))
    browser.driver.execute_script(again)  # what was written stays, and can be read
    browser.until(lambda: browser.texts("#written .row .soft") == ["Looking…"])
    assert browser.texts("#written .word") and faint() == []
    let(503)
    browser.until(lambda: "trying again" in browser.texts("#written .row .soft")[0])
    let(0)
    browser.until(lambda: "%" in browser.texts("#written .row .soft")[0])

    word = browser.find("#written .word")
    browser.find("#question").send_keys(QUESTION, Keys.ENTER)
    browser.until(lambda: browser.texts("#asked p") == ["Looking…"])
    assert browser.texts("#asked .soft") == [QUESTION]
    let(503)
    browser.until(lambda: "trying again" in browser.texts("#asked p")[0])
    let(0)
    browser.until(lambda: browser.texts("#asked .caption") == ["Red"])
    assert browser.find("#asked").get_attribute("aria-live") == "polite"
    answer = browser.find("#asked .word")
    browser.find("#question").send_keys("why?", Keys.ENTER)
    let(400)
    browser.until(lambda: "answered 400" in browser.find("#ask-error").text)
    assert browser.texts("#asked p") == ["Red"]
    assert browser.find("#question").get_attribute("value") == "why?"
    assert word.is_displayed() and answer.is_displayed()  # who reads them keeps his place
    browser.fits()


def test_a_browser_reads_captions_from_the_right(browser, server, joint):
    from selenium.webdriver.common.keys import Keys

    browser.open(server)
    browser.until(lambda: browser.find("#samples button"))
    browser.driver.execute_script(
        """const real = fetch, text = "כלב שחור רץ.";
        const words = text.split(" ").map((word) => ({ word, map: [255] }));
        const found = [{ text, words, confidence: 0.9 }];
        const answer = { rows: 1, columns: 1, area: [0, 0, 1, 1], answers: found, others: [] };
        fetch = (url, ...how) => url.pathname != "/caption" ? real(url, ...how)
            : Promise.resolve(Response.json({ ...answer, captions: found }));"""
    )
    files = [joint / "images" / name for name in ("000.png", "002.png")]
    browser.find("#file").send_keys("\n".join(map(str, files)))
    browser.until(lambda: browser.find("#all-title").text == "All 2 photos")
    browser.find("#question").send_keys("יש כלב?", Keys.ENTER)
    browser.until(lambda: browser.texts("#asked .word"))
    browser.find("#question").send_keys("יש כלב?")
    # Its full stop and its question mark stand on the left.
    for place in ("#list span span", "#written .caption", "#question", "#asked .soft"):
        assert browser.find(place).value_of_css_property("direction") == "rtl", place

    first, second, _ = browser.driver.find_elements("css selector", "#written .word")
    browser.driver.execute_script("arguments[0].focus()", first)
    assert browser.press(Keys.ARROW_LEFT) == second and browser.press(Keys.ARROW_RIGHT) == first
    go_back = """const keys = { key: "ArrowLeft", altKey: true, bubbles: true, cancelable: true };
    return document.activeElement.dispatchEvent(new KeyboardEvent("keydown", keys));"""
    assert browser.driver.execute_script(go_back)  # left to the browser
    browser.fits()


def test_a_browser_shows_what_is_chosen_in_high_contrast_and_an_example_in_the_dark(
    browser, server, joint
):
    def system(name: str, value: str) -> None:
        media = {"features": [{"name": name, "value": value}]}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    browser.open(server)
    files = [joint / "images" / name for name in ("000.png", "002.png")]
    browser.find("#file").send_keys("\n".join(map(str, files)))
    browser.until(lambda: browser.find("#all-title").text == "All 2 photos")
    word, other, *_ = browser.driver.find_elements("css selector", "#written .word")
    browser.driver.execute_script("arguments[0].click()", word)
    system("forced-colors", "active")
    rows = browser.driver.find_elements("css selector", "#list button")
    for pair in ((word, other), rows):
        shots = [Image.open(io.BytesIO(x.screenshot_as_png)).convert("RGB") for x in pair]
        assert len({max(shot.getcolors(1 << 24))[1] for shot in shots}) == 2  # what is behind it
    system("prefers-color-scheme", "dark")
    example = "return getComputedStyle($('question'), '::placeholder').color"
    assert browser.driver.execute_script(example) == "rgb(173, 163, 151)"  # Chromium's is 3.6 : 1


def test_a_browser_lists_photos_to_ask_about_without_captions(browser, server, joint):
    browser.open(server)
    browser.until(lambda: browser.find("#samples button"))
    browser.driver.execute_script("health.tasks = ['questions']")
    files = [joint / "images" / name for name in ("000.png", "002.png")]
    browser.find("#file").send_keys("\n".join(map(str, files)))
    browser.until(lambda: browser.find("#all-title").text == "All 2 photos")
    assert browser.texts("#list li") == ["000.png", "002.png"]
    assert browser.find("#ask").is_displayed() and not browser.find("#csv").is_displayed()
    browser.find("#question").send_keys(QUESTION + "\n")
    browser.until(lambda: browser.texts("#asked .word"))
    assert browser.find("#hint").is_displayed()
    browser.find("#asked .word").click()
    assert "Bright" in browser.find("#status").text


def test_a_browser_tries_a_drawing_with_the_mouse(browser, captions_only):
    browser.open(captions_only)
    browser.until(lambda: len(browser.driver.find_elements("css selector", "#samples img")) > 2)
    browser.fits()
    browser.find("#samples button").click()
    browser.until(lambda: browser.texts("#written .word"))
    word = browser.find("#written .word:nth-child(2)")
    word.click()
    assert word.get_attribute("aria-pressed") == "true" and max(browser.veil()) > 60
    word.click()
    assert word.get_attribute("aria-pressed") == "false"
    browser.fits()


def test_a_browser_takes_a_photo_with_the_camera(browser, captions_only):
    browser.open(captions_only)
    browser.driver.execute_script(  # two presses, and a photo before the camera gave a picture
        """const devices = navigator.mediaDevices, use = devices.getUserMedia;
        const open = shot.showModal;
        window.used = [];
        devices.getUserMedia = async (how) => {
            const stream = await use.call(devices, how);
            used.push(...stream.getTracks());
            return stream;
        };
        shot.showModal = () => { open.call(shot); $("shoot").click(); };
        $("camera").click();
        $("camera").click();"""
    )
    browser.until(lambda: browser.find("#shoot").is_displayed())
    ready = "return document.querySelector('video').videoWidth"
    browser.until(lambda: browser.driver.execute_script(ready))
    browser.find("#shoot").click()
    browser.until(lambda: browser.texts("#written .word"))
    assert browser.find("#no-questions").is_displayed() and not browser.find("#ask").is_displayed()
    on = "return used.map((track) => track.readyState)"
    browser.until(lambda: browser.driver.execute_script(on) == ["ended", "ended"])


def test_a_browser_shows_the_report(browser, tmp_path):
    """On a phone too nothing stands beside the page: a long name, bullets on the right."""
    evaluate = pytest.importorskip("evaluate")
    paint("red", "left", 1).save(tmp_path / "a.png")
    captions, references = {"a.png": "כלב."}, {"a.png": ["כלב שחור רץ."]}
    summary = "captioner_epoch_12_val_loss_2.9137.safetensors, split 'val'"
    report = tmp_path / "report.html"
    evaluate.write_report(report, tmp_path, captions, references, {"a.png": 1.0}, summary)
    browser.driver.get(report.as_uri())
    browser.fits()
    room = "return parseFloat(getComputedStyle(document.querySelector('ul')).paddingRight)"
    assert browser.driver.execute_script(room) >= 16


def test_a_photo_that_lies_on_its_side_is_seen_as_it_is_shown(server):
    upright = paint("red", "right", 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    answers = []
    for picture, more in (
        (upright, {}),
        (upright.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
    ):
        file = io.BytesIO()
        picture.save(file, "png", **more)
        answers.append(server.caption(file.getvalue()))
    assert answers[0] == answers[1] and answers[0][0] == 200
