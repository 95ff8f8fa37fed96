"""Who may talk to the page: hosts, origins, a password where it is asked for, and headers for the browser.

A page on 127.0.0.1 can be reached by any web site that the browser has open: through a name that points there (DNS
rebinding) and by forms that post across sites. Both end here, before anything else is asked.
"""

import base64
import hmac
import time
from collections import defaultdict, deque

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
TRIES, WINDOW = 8, 60.0  # wrong passwords of one address, and the seconds after which they are forgotten
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    # scripts and styles inline: Gradio's own page is made of them
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
}


class Guard:
    """ASGI middleware around everything that the server answers. `auth` is (name, password), or None for nobody."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] = LOOPBACK, auth: tuple[str, str] | None = None):
        self.app, self.hosts, self.auth = app, hosts, auth
        self.wrong: defaultdict[str, deque[float]] = defaultdict(deque)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if refusal := self.refuse(scope):
            return await refusal(scope, receive, with_headers)
        await self.app(scope, receive, with_headers)

    def refuse(self, scope: Scope) -> PlainTextResponse | None:
        """The answer to a request that goes no further, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts and name not in self.hosts:
            return PlainTextResponse("this page does not answer to that host name", 400)
        origin = headers.get("origin", "")
        foreign = headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and (
            foreign or (origin and origin.split("://")[-1] != host)
        ):
            return PlainTextResponse("requests from other sites are refused", 403)
        if self.auth is None:
            return None
        address = (scope.get("client") or ("",))[0]
        wrong, now = self.wrong[address], time.monotonic()
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
        return PlainTextResponse("a name and a password, please", 401, {"WWW-Authenticate": 'Basic realm="QZO Studio"'})
