"""Who may talk to the page: hosts, origins, a password where it is asked for, and headers for the browser.

A page on 127.0.0.1 can be reached by any web site that the browser has open: through a name that points there (DNS
rebinding) and by forms that post across sites. Both end here, before anything else is asked.
"""

import base64
import hmac
import time
from collections import deque

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
TRIES, WINDOW = 8, 60.0  # wrong passwords of one address, and the seconds after which they are forgotten
ADDRESSES = 1000  # that are remembered for their wrong passwords
UPLOADS = "/gradio_api/upload"
MAX_UPLOAD, MAX_BODY = 2 * 2**30 + 2**20, 8 * 2**20  # bytes of a request that uploads, and of any other
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    # scripts and styles inline: Gradio's own page is made of them
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
}


class _TooMuch(Exception):
    """A request's body is longer than what is taken."""


class Guard:
    """ASGI middleware around everything that the server answers. `auth` is (name, password), or None for nobody."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] = LOOPBACK, auth: tuple[str, str] | None = None):
        self.app, self.hosts, self.auth = app, hosts, auth
        self.wrong: dict[str, deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the page uses none
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        most, taken, begun = MAX_UPLOAD if scope["path"] == UPLOADS else MAX_BODY, 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:  # also where no length was given, or a wrong one
                raise _TooMuch
            return message

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message).update(HEADERS)
                if taken > most:  # the rest is not even read
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        refusal = self.refuse(scope) or self.refuse_length(scope, most)
        try:
            await (refusal or self.app)(scope, counted, with_headers)
        except _TooMuch:
            if not begun:
                await _too_much(most)(scope, receive, with_headers)

    def refuse_length(self, scope: Scope, most: int) -> PlainTextResponse | None:
        """The answer to a request that says itself that it is too long, or None."""
        length = Headers(scope=scope).get("content-length", "0")
        return _too_much(most) if not length.isdecimal() or int(length[:20]) > most else None

    def refuse(self, scope: Scope) -> PlainTextResponse | None:
        """The answer to a request that goes no further, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts and name not in self.hosts:
            return PlainTextResponse("this page does not answer to that host name", 400)
        origin = headers.get("origin", "")
        foreign = headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
        # a link from elsewhere may open the page, and names no origin; a script of another site does
        if (foreign and scope["method"] not in ("GET", "HEAD")) or (origin and origin.split("://")[-1] != host):
            return PlainTextResponse("requests from other sites are refused", 403)
        if self.auth is None:
            return None
        address = (scope.get("client") or ("",))[0]
        wrong, now = self.wrong.get(address, deque()), time.monotonic()
        while wrong and now - wrong[0] > WINDOW:
            wrong.popleft()
        if len(wrong) >= TRIES:
            return PlainTextResponse("too many wrong passwords; wait a minute", 429)
        given = headers.get("authorization", "")
        expected = "Basic " + base64.b64encode(":".join(self.auth).encode()).decode()
        if hmac.compare_digest(given.encode(), expected.encode()):
            return None
        if given:
            wrong.append(now)
            self.wrong.pop(address, None)  # the address that failed last is remembered longest
            self.wrong[address] = wrong
            if len(self.wrong) > ADDRESSES:
                del self.wrong[next(iter(self.wrong))]
        return PlainTextResponse("a name and a password, please", 401, {"WWW-Authenticate": 'Basic realm="QZO Studio"'})


def _too_much(most: int) -> PlainTextResponse:
    says = f"that is more than {most // 2**20} MB, which is the most that is taken"
    return PlainTextResponse(says, 413, {"Connection": "close"})
