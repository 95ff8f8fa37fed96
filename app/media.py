"""The files that a browser may see, and nothing else: a table of what exists, asked by name.

/media/draft/<draft>/<thumb>       small copies of a draft's pictures
/media/example/<set>/<name>.webp   small copies of the pictures of a bundled set
/media/run/<run>/<file>            previews, comparisons, plot, recipe and styles of a run

No path of a request is ever joined before its parts were found in a listing or fit a pattern without separators.
"""

import functools
import mimetypes
import re
from pathlib import Path
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.drafts import EXAMPLES, Drafts, small
from app.jobs import Jobs

SHOWN = re.compile(r"previews/\d{6}(/\d{2,3})?\.png|plots/loss\.png|compare/[0-9a-f]{16}-\d{3}\.png")
TAKEN_HOME = re.compile(r"style(-journal)?\.safetensors|recipe\.toml")


def url(kind: str, name: str, file: str, version: object = "") -> str:
    """Where a browser finds a file; `version` changes the address of a file that can change."""
    mark = f"?v={version}" if version != "" else ""
    return f"media/{kind}/{quote(name, safe='')}/{quote(file)}{mark}"


@functools.cache
def thumbnail(picture: Path) -> bytes:
    """The small copy of a bundled picture, made once."""
    return small(picture, 160)


class Media:
    """ASGI middleware that answers /media/ and hands everything else on."""

    def __init__(self, app: ASGIApp, runs: Path):
        self.app, self.drafts, self.jobs = app, Drafts(runs), Jobs(runs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/media/"):
            return await self.app(scope, receive, send)
        asked = scope["path"].removeprefix("/media/").split("/", 2)
        headers = {"Cache-Control": "private, max-age=3600"}
        if picture := self.example(*asked):
            return await Response(thumbnail(picture), headers=headers, media_type="image/webp")(scope, receive, send)
        found = self.find(*asked)
        if found is None:
            return await PlainTextResponse("there is no such file", 404)(scope, receive, send)
        path, download = found
        try:  # as a whole: a file that a run replaces meanwhile must not be answered with the length of the one before
            content = await run_in_threadpool(path.read_bytes)
        except OSError:  # renamed or put away this moment
            return await PlainTextResponse("there is no such file", 404)(scope, receive, send)
        if download:
            headers = {
                "Cache-Control": "no-store",
                "Content-Disposition": f"attachment; filename*=UTF-8''{quote(download)}",
            }
        kind, _ = mimetypes.guess_type(path)
        await Response(content, headers=headers, media_type=kind or "application/octet-stream")(scope, receive, send)

    def example(self, kind: str = "", name: str = "", file: str = "") -> Path | None:
        """The picture of a bundled set, or None."""
        if kind != "example" or name not in EXAMPLES:
            return None
        return next((p for p in (EXAMPLES[name] / "images").glob("*.jpg") if f"{p.stem}.webp" == file), None)

    def find(self, kind: str = "", name: str = "", file: str = "") -> tuple[Path, str] | None:
        """(path, name to save it under or ""), or None for whatever may not be seen."""
        if kind == "draft" and re.fullmatch(r"[0-9a-f]{20}\.webp", file) and name in self.drafts.names():
            path = self.drafts.root / name / "thumbs" / file
            return (path, "") if path.is_file() and not path.is_symlink() else None
        if kind == "run" and (SHOWN.fullmatch(file) or TAKEN_HOME.fullmatch(file)) and name in self.jobs.names():
            path = self.jobs.runs / name / file
            inside = path.resolve().is_relative_to((self.jobs.runs / name).resolve())
            save_as = f"{name}-{file}" if TAKEN_HOME.fullmatch(file) else ""
            return (path, save_as) if path.is_file() and inside else None
        return None
