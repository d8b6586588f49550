"""The page on which a person judges: who is let in, what it shows, and a real browser on it."""

import http.client
import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
from urllib.parse import urlsplit

import pytest
from commands import command, python, weights
from persons import REPLIES, arguments, judge, judgements

from tinylm import report
from tinylm.errors import InputError
from tinylm.page import HEADERS, LONGEST, MOST, Page

EVIL = "<script>document.title = 'evil'</script><img src=x onerror=\"document.title = 'evil'\">"
ASKED = {
    "phase": "asking", "question": 7, "messages": [{"role": "user", "content": f"Hi {EVIL}"}],
    "answers": ["Hello.", EVIL, ""], "at": 1, "of": 2, "round": 2, "rounds": 9, "judged": 1,
    "undo": True, "cut": 1, "history": [{"round": 1, "kl": 0.1, "win": None}],
    "fixed": [{"prompt": EVIL, "before": EVIL, "now": "Well.", "new": True}],
}  # fmt: skip


class Told:
    """A Progress that remembers what it was told."""

    said = ""

    def say(self, text, style=""):
        self.said += text + "\n"


@pytest.fixture
def page():
    page, told = Page("127.0.0.1", 0), Told()
    page.open(told)
    page.link = re.search(r"http://\S+", told.said)[0]
    page.show(ASKED)
    yield page
    page.close()


def ask(page, method, path, body=None, **headers):
    """(status, headers, body) of a request that has the token and the right origin."""
    place = urlsplit(page.link)
    own = {"Origin": f"http://{place.netloc}", "Authorization": f"Bearer {page.token}"}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    sent = {name: value for name, value in {**own, **headers}.items() if value is not None}
    connection.request(method, path, body if body is None else json.dumps(body), sent)
    reply = connection.getresponse()
    events = reply.headers.get_content_type() == "text/event-stream"
    found = reply.status, reply.headers, reply.readline() if events else reply.read()
    connection.close()
    return found


CHOICE = {"question": 7, "choice": 1, "comment": "good"}


def test_a_judgement_arrives(page):
    assert ask(page, "POST", "/judge", CHOICE)[0] == 204
    assert page.ask() == (1, "good")


def test_the_link_s_token_becomes_a_cookie(page):
    status, headers, _ = ask(page, "GET", f"/?token={page.token}", Authorization=None, Origin=None)
    cookie = headers["Set-Cookie"]
    assert (status, headers["Location"]) == (303, "/")
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    found = ask(page, "GET", "/", Authorization=None, Origin=None, Cookie=cookie.split(";")[0])
    assert found[0] == 200


@pytest.mark.parametrize("path", ["/", "/events", "/page.js", "/?token=wrong"])
@pytest.mark.parametrize("token", [None, "Bearer ", "Bearer wrong", "Bearer é"])
def test_without_the_token_nothing_is_shown(page, path, token):
    token = token and token.encode().decode("latin-1")
    assert ask(page, "GET", path, Authorization=token)[0] == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": None},
        {"Host": "evil.example"}, {"Authorization": None},
    ],
)  # fmt: skip
def test_what_other_pages_send_does_not_count(page, headers):
    """Not even with the token; nor under another name, as after DNS rebinding."""
    assert ask(page, "POST", "/judge", CHOICE, **headers)[0] in (400, 403)
    assert page.replies.empty()


@pytest.mark.parametrize(
    "body, status",
    [
        ({**CHOICE, "comment": "x" * MOST}, 413),
        ({**CHOICE, "choice": 3}, 400),
        ({**CHOICE, "choice": -1}, 400),
        ({**CHOICE, "choice": True}, 400),
        ({**CHOICE, "choice": "delete"}, 400),
        ({**CHOICE, "choice": [1]}, 400),
        ({**CHOICE, "comment": 1}, 400),
        ({"choice": 1}, 400),
        ([1], 400),
        (None, 400),
        ({**CHOICE, "question": 6}, 409),
        ({**CHOICE, "question": None}, 409),
    ],
)
def test_nonsense_is_refused(page, body, status):
    assert ask(page, "POST", "/judge", body)[0] == status
    assert page.replies.empty()


def test_a_comment_of_any_characters_is_let_in(page):
    """JSON writes a control character as six bytes."""
    comment = "\x1b" * LONGEST
    assert ask(page, "POST", "/judge", {**CHOICE, "comment": comment})[0] == 204
    assert page.ask() == (1, comment)


def test_a_question_is_answered_once(page):
    """A second click, or a second browser, comes too late."""
    assert [ask(page, "POST", "/judge", CHOICE)[0] for _ in range(2)] == [204, 409]
    assert page.replies.qsize() == 1


def test_every_reply_forbids_foreign_content(page):
    for path in ("/", "/page.js", "/page.css", "/report.css", "/events"):
        _, headers, _ = ask(page, "GET", path)
        assert all(headers[name] == value for name, value in HEADERS.items())
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page_files())


def page_files() -> str:
    from importlib import resources

    files = resources.files("tinylm.page").iterdir()
    return "".join(f.read_text() for f in files if f.name.startswith("page."))


def test_the_state_is_sent_at_once(page):
    line = ask(page, "GET", "/events")[2]
    assert json.loads(line.removeprefix(b"data: ")) == ASKED


def test_a_browser_that_goes_away_in_the_middle_is_no_error(page, caplog):
    place = urlsplit(page.link)
    with socket.create_connection((place.hostname, place.port)) as gone:
        head = f"Host: {place.netloc}\r\nOrigin: http://{place.netloc}\r\nContent-Length: 99\r\n"
        gone.sendall(f"POST /judge HTTP/1.1\r\n{head}Authorization: Bearer ".encode())
        gone.sendall(f"{page.token}\r\n\r\n{{".encode())
        assert ask(page, "GET", "/")[0] == 200  # the server is busy with both now
    assert ask(page, "POST", "/judge", CHOICE)[0] == 204
    page.close()
    assert page.ask() == (1, "good")
    assert not caplog.text


def test_a_request_that_names_no_host():
    """HTTP/1.0 needs none; with the address 0.0.0.0, any is let in."""
    page = Page("0.0.0.0", 0)
    page.open(told := Told())
    port = urlsplit(re.search(r"http://\S+", told.said)[0]).port
    for method, code in (("GET", b"200"), ("POST", b"405")):
        with socket.create_connection(("127.0.0.1", port)) as asking:
            asking.sendall(f"{method} / HTTP/1.0\r\nCookie: x={page.token}; ".encode())
            asking.sendall(f"tinylm-{port}={page.token}\r\n\r\n".encode())
            assert asking.recv(12).split()[1] == code
    page.close()


def test_a_port_that_is_taken(page):
    with pytest.raises(InputError, match="--port"):
        Page("127.0.0.1", urlsplit(page.link).port).open(Told())


def test_without_the_web_server_it_names_what_to_install(assistant, tmp_path):
    program = (
        "import sys\n"
        "sys.modules['starlette'] = sys.modules['uvicorn'] = None\n"
        "from tinylm import cli\n"
        "sys.exit(cli.run(sys.argv[1:]))\n"
    )
    given = arguments(assistant, tmp_path / "run", "--page", "serve")
    done = python(program, *given, cwd=tmp_path, code=2)
    assert "pip install 'tinylm[serve]'" in done.stderr
    assert not (tmp_path / "run").exists()


# ---- a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("there is no chromium here")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    context = browser.new_context(viewport={"width": 1180, "height": 900})
    tab = context.new_page()
    tab.wrong = []
    tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
    lost = "net::ERR"  # the browser's own word where a server is gone
    tab.on(
        "console", lambda m: m.type == "error" and lost not in m.text and tab.wrong.append(m.text)
    )
    yield tab
    context.close()
    assert not tab.wrong


def test_what_is_said_is_text_and_never_markup(page, tab):
    tab.goto(page.link)
    tab.wait_for_selector(".answer")
    assert tab.locator(".answer p").all_inner_texts()[:2] == ["Hello.", EVIL]
    assert tab.locator("#prompt").inner_text() == f"Hi {EVIL}"
    assert tab.locator("#fixed h3, #fixed .before").all_inner_texts() == [EVIL, EVIL]
    assert tab.locator("img, main script").count() == 0
    assert tab.title() == "Which is best? · tinylm"
    assert page.token not in tab.url


def test_keys_and_clicks(page, tab):
    """Everything can be done with the keyboard alone, and with the pointer alone."""
    tab.goto(page.link)
    tab.wait_for_selector("body.asking .answer")
    numbers = itertools.count(8)

    def after(act) -> tuple:
        act()
        reply = page.replies.get(timeout=10)
        number = next(numbers)
        page.show({**ASKED, "question": number})
        tab.wait_for_selector(f"main[data-number='{number}']")
        return reply

    key = tab.keyboard.press
    assert after(lambda: key("3")) == (2, "")
    assert after(lambda: key("t")) == ("tie", "")
    assert after(lambda: key("S")) == ("skip", "")
    assert after(lambda: key("u")) == ("undo", "")
    # in other layouts
    for typed, place, meant in (("е", "KeyT", "tie"), ("é", "Digit2", 1), ("s", "KeyO", "skip")):
        event = f"new KeyboardEvent('keydown', {{key: '{typed}', code: '{place}'}})"
        assert after(lambda e=event: tab.evaluate(f"document.dispatchEvent({e})")) == (meant, "")
    assert after(lambda: tab.click(".answer >> nth=1")) == (1, "")
    assert after(lambda: tab.click("[data-choice=tie]")) == ("tie", "")
    key("c")
    tab.keyboard.type("2 is too long, 1 not")  # digits in a comment choose nothing
    key("Escape")
    assert after(lambda: key("1")) == (0, "2 is too long, 1 not")
    assert after(lambda: key("1")) == (0, "")  # the comment is gone
    tab.focus(".answer >> nth=2")
    assert after(lambda: key("Enter")) == (2, "")
    key("4")  # there is no fourth answer
    assert page.replies.empty()


def test_what_is_undone_leaves_the_comment_for_the_next_judgement(page, tab):
    tab.goto(page.link)
    tab.wait_for_selector("body.asking .answer")
    for number, key in ((8, "u"), (9, "1")):
        tab.keyboard.press("c")
        tab.keyboard.type("so ")
        tab.keyboard.press("Escape")
        tab.keyboard.press(key)
        said = page.replies.get(timeout=10)
        page.show({**ASKED, "question": number})
        tab.wait_for_selector(f"main[data-number='{number}']")
    assert said == (0, "so so ")


def test_a_key_that_is_held_down_judges_once(page, tab):
    tab.goto(page.link)
    tab.wait_for_selector("body.asking .answer")
    tab.focus("[data-choice=skip]")
    tab.keyboard.down("Enter")
    assert page.replies.get(timeout=10) == ("skip", "")
    page.show({**ASKED, "question": 8})
    tab.wait_for_selector("main[data-number='8']")
    tab.keyboard.down("Enter")  # as the keyboard repeats it
    tab.keyboard.up("Enter")
    tab.keyboard.press("1")
    assert page.replies.get(timeout=10) == (0, "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(page, tab, scheme):
    tab.set_viewport_size({"width": 400, "height": 800})
    tab.emulate_media(color_scheme=scheme)
    long = {"prompt": "x" * 300, "before": "", "now": "x" * 300, "new": True}
    page.show({**ASKED, "answers": ["x" * 300, "short"], "of": 300, "fixed": [long]})
    tab.goto(page.link)
    tab.wait_for_selector(".answer")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    assert tab.locator(".steps .now").bounding_box()["width"] > 0
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 246)"
    assert light == (scheme == "light")


def test_what_is_written_from_right_to_left_ends_at_the_left(page, tab):
    page.show({**ASKED, "messages": [{"role": "user", "content": "\u0634\u0643\u0631\u0627!"}]})
    tab.goto(page.link)
    tab.wait_for_selector(".answer")
    place = """i => { const range = document.createRange(), text = by("prompt").firstChild;
      range.setStart(text, i); range.setEnd(text, i + 1);
      return range.getBoundingClientRect().x }"""
    assert tab.evaluate(place, 4) < tab.evaluate(place, 0)


def test_a_report_card_fits_a_phone(tab, tmp_path):
    long = "x" * 300
    measure = {"name": long, "value": 1, "low": 0, "high": 1, "n": 3, "chance": None}
    claim = {"title": long, "says": long, "holds": True, "measures": [measure]}
    (tmp_path / "claims.json").write_text(json.dumps([claim]))
    shares = {"right": 0.5, "wrong": 0.3, "idk": 0.2, "n": 20}
    results = {"sets": {"known": "things"}, "stages": {long: {"known": shares}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    tab.set_viewport_size({"width": 400, "height": 800})
    tab.goto(report.write([tmp_path]).as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_run_in_the_browser(tab, assistant, tmp_path):
    """The same replies as in the terminal, some of them after a kill -9: the same bits."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert judge(assistant, whole, REPLIES).returncode == 0
    running, link = serve(assistant, out)
    reply(tab, link, REPLIES[:4])
    running.kill()
    running.wait()
    tab.wait_for_selector("body.stopped")
    assert judgements(out) == 4
    running, link = serve(assistant, out, "--resume")
    reply(tab, link, REPLIES[4:])
    tab.wait_for_selector("body.done")
    assert "Thank you" in tab.inner_text("#prompt")
    assert running.wait(timeout=60) == 0
    assert weights(out) == weights(whole)


def test_ctrl_c_while_the_page_waits(tab, assistant, tmp_path):
    running, link = serve(assistant, tmp_path / "run")
    reply(tab, link, [])
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 75
    tab.wait_for_selector("body.stopped")
    assert "--resume" in tab.inner_text("#prompt")


def serve(assistant, out, *more):
    """The command with its page: (process, link)."""
    running = subprocess.Popen(
        command(*arguments(assistant, out, "--page", "serve", *more)),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in running.stderr:
        found = re.search(r"http://\S+", line)
        if found:
            return running, found[0]
    raise AssertionError("no link was printed")


def reply(tab, link, lines):
    """Judge with the keyboard as the lines would in the terminal."""
    tab.goto(link)
    tab.wait_for_selector("body.asking")
    for i, line in enumerate(lines):
        key, _, comment = line.partition(" ")
        asked = tab.get_attribute("main", "data-number")
        tab.fill("#comment", comment, force=True)
        tab.keyboard.press("Escape")
        tab.keyboard.press(key)
        tab.wait_for_selector(f"main:not([data-number='{asked}'])")
        if i + 1 < len(lines):
            tab.wait_for_selector("body.asking")
