"""A person's page: a small local web server that shows a state and takes judgements.

The state is one JSON object, the same for every browser that looks; server-sent events carry it
whenever it changes, so that a page that connects anew is at once where it should be. Only whoever
has the link with its token is let in, and requests of other sites' pages are refused.
"""

from __future__ import annotations

import asyncio
import json
import queue
import secrets
from importlib import resources
from threading import Thread

from tinylm.errors import InputError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import RedirectResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise InputError(
        "the page needs a web server: pip install 'tinylm[serve]', or judge in the terminal "
        "with --page none"
    ) from error

MOST = 16384  # bytes of a judgement: a character of a comment may need six
LONGEST = 2000  # characters of a comment
BEAT = 15  # seconds between signs of life, which tell the server who has gone
WORDS = ("tie", "skip", "undo")
FILES = {
    "/": ("page", "page.html", "text/html"),
    "/page.css": ("page", "page.css", "text/css"),
    "/page.js": ("page", "page.js", "text/javascript"),
    "/report.css": ("templates", "report.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def refusal(status: int, why: str) -> Response:
    return Response(why + "\n", status, HEADERS, "text/plain")


def in_link(host: str) -> str:
    """An address of IPv6 stands in brackets there."""
    return f"[{host}]" if ":" in host else host


class Page:
    """What a person is asked on in a browser; show and ask are called from the main thread."""

    def __init__(self, host: str, port: int):
        self.token = secrets.token_urlsafe(24)
        self.state = '{"phase": "writing", "answers": []}'  # to whoever looks before all else
        self.question, self.choices = None, 0  # what is asked now, among how many answers
        self.replies: queue.Queue[tuple[int | str, str]] = queue.Queue()
        self.looking: set[asyncio.Event] = set()  # one for each browser
        self.config = uvicorn.Config(
            self.application(host), host, port, loop="asyncio", http="h11", ws="none",
            lifespan="off", log_config=None, server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self.server = uvicorn.Server(self.config)

    # ---- for the judge -------------------------------------------------------------------------

    def open(self, progress) -> None:
        """Listen, and say where. Raises InputError where the address is taken."""
        host = self.config.host
        try:
            listening = self.config.bind_socket()
            listening.listen()  # from now on a browser waits, and is not turned away
        except (SystemExit, OSError):  # uvicorn itself would end the process
            raise InputError(
                f"{host}:{self.config.port} cannot be listened on: choose another --port or --host"
            ) from None
        port = listening.getsockname()[1]
        self.cookie = f"tinylm-{port}"
        self.loop = asyncio.new_event_loop()
        served = self.server.serve([listening])
        self.thread = Thread(target=self.loop.run_until_complete, args=(served,), daemon=True)
        self.thread.start()
        progress.say(f"Judge here:  http://{in_link(host)}:{port}/?token={self.token}", "bold")
        if host not in ("127.0.0.1", "localhost", "::1"):
            progress.say("Others can reach this address: whoever has the link can judge.", "yellow")

    def show(self, state: dict) -> None:
        """Every browser shows this from now on."""
        self.choices, self.question = len(state.get("answers", [])), state.get("question")
        self.state = json.dumps(state)
        self.loop.call_soon_threadsafe(self.wake)

    def wake(self) -> None:
        for event in self.looking:
            event.set()

    def ask(self) -> tuple[int | str, str]:
        """(number of the answer shown, or one of WORDS; comment), once somebody has judged."""
        return self.replies.get()

    def close(self) -> None:
        """End once every browser has the last state."""
        self.server.should_exit = True
        self.loop.call_soon_threadsafe(self.wake)
        self.thread.join(timeout=3)

    # ---- for the browser -----------------------------------------------------------------------

    def application(self, host: str) -> Starlette:
        anyone = host in ("0.0.0.0", "::")
        hosts = ["*"] if anyone else [in_link(host), "127.0.0.1", "localhost"]
        routes = [Route(path, self.guarded(self.file)) for path in FILES]
        routes.append(Route("/events", self.guarded(self.events)))
        routes.append(Route("/judge", self.guarded(self.judge), methods=["POST"]))
        return Starlette(
            routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
        )

    def guarded(self, handler):
        """The handler, for requests with the token and of our own page only."""

        async def checked(request: Request) -> Response:
            bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
            offered = [request.cookies.get(self.cookie, ""), bearer]
            asked = request.query_params.get("token", "")
            if request.url.path == "/" and self.known(asked):
                response = RedirectResponse("/", 303, HEADERS)
                response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
                return response
            if not any(map(self.known, offered)):
                return refusal(403, "Open the link that tinylm has printed: it carries a token.")
            origin = request.headers.get("origin")
            own = f"{request.url.scheme}://{request.headers.get('host')}"
            if origin != own and (origin or request.method == "POST"):
                return refusal(403, "This request is not of the page itself.")
            return await handler(request)

        return checked

    def known(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.token.encode())

    async def file(self, request: Request) -> Response:
        folder, name, kind = FILES[request.url.path]
        text = resources.files("tinylm").joinpath(folder, name).read_text(encoding="utf-8")
        return Response(text, 200, HEADERS, kind)

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self.states(), 200, HEADERS, "text/event-stream")

    async def states(self):
        """The state now and whenever it changes, as server-sent events, until the end."""
        changed, seen = asyncio.Event(), None
        self.looking.add(changed)
        try:
            while not (self.server.should_exit and seen is self.state):
                changed.clear()
                if seen is not self.state:
                    seen = self.state
                    yield f"data: {seen}\n\n"
                    continue
                try:
                    await asyncio.wait_for(changed.wait(), BEAT)
                except asyncio.TimeoutError:
                    yield ": still here\n\n"
        finally:
            self.looking.discard(changed)

    async def judge(self, request: Request) -> Response:
        """{"question", "choice", "comment"}: counts if it is about what is asked now."""
        body = b""
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST:
                    return refusal(413, f"A judgement has at most {MOST} bytes.")
        except ClientDisconnect:
            return refusal(400, "The rest of it is missing.")
        try:
            said = json.loads(body)
            question, choice, comment = (said[key] for key in ("question", "choice", "comment"))
        except (ValueError, KeyError, TypeError, RecursionError):
            return refusal(400, "Expected a JSON object with question, choice and comment.")
        picked = type(choice) is int and 0 <= choice < self.choices
        if not (picked or choice in WORDS) or not isinstance(comment, str):
            return refusal(400, f"A choice is the number of an answer or one of {WORDS}.")
        if question is None or question != self.question:
            return refusal(409, "That is not what is asked now.")
        self.question = None  # a second click on the same one comes too late
        self.replies.put((choice, comment[:LONGEST]))
        return Response(status_code=204, headers=HEADERS)
