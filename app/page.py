"""The page: the tabs put together, their look, and the server."""

import os
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: it asks the network otherwise
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Gradio keeps the last 10,000 events, and at each new one makes statistics of all, which no page of ours shows.
os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9)}

import gradio as gr  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.gzip import GZipMiddleware  # noqa: E402

from app import figures  # noqa: E402
from app.data import Data  # noqa: E402
from app.guard import LOOPBACK, Guard  # noqa: E402
from app.history import History  # noqa: E402
from app.media import Media  # noqa: E402
from app.model import Models  # noqa: E402
from app.place import Place  # noqa: E402
from app.result import Result  # noqa: E402
from app.train import Training  # noqa: E402

TABS = ("data", "model", "train", "result", "runs")
# Whoever has gone to a tab while the page was loading stays there.
# A button that copies takes the text beside it; a browser gives no clipboard to pages of
# other machines without HTTPS: there the text is marked and copied as by hand.
LISTENERS = """<script>
document.addEventListener('click', async (e) => {
  if (e.target.closest?.('#tabs [role=tab]')) window.tabWasChosen = true;
  const button = e.target.closest?.('[data-copy]');
  if (!button) return;
  const text = button.closest('details, section').querySelector('pre');
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text.textContent);
  } else {
    getSelection().selectAllChildren(text);
    document.execCommand('copy');
  }
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = 'Copy'; }, 2000);
}, true);
</script>"""
GO_THERE = "(first) => window.tabWasChosen ? [] : {__type__: 'update', selected: first}"
STYLESHEET = Path(__file__).with_name("page.css")
PORT = 7860
MAX_UPLOAD = "2gb"


class PageError(ValueError):
    """A way of opening the page that is not possible; one sentence."""


def build(runs: Path) -> gr.Blocks:
    """The page over a folder of runs."""
    place = Place(runs)
    with gr.Blocks(title="QZO Studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        draft, run, known = gr.State(""), gr.State(""), gr.State("")  # known: of the draft's texts
        head, first = gr.HTML(figures.header(place.device())), gr.Textbox("data", visible=False)
        with gr.Tabs(overflow_behavior="wrap", elem_id="tabs") as tabs:
            with gr.Tab("Data", id="data"):
                Data(place).build(draft, known, tabs)
            with gr.Tab("Model", id="model") as model:
                Models(place).build(draft, model)
            with gr.Tab("Train", id="train") as train:
                Training(place).build(draft, known, run, tabs, train)
            with gr.Tab("Result", id="result") as result:
                Result(place).build(run, result)
            with gr.Tab("Runs", id="runs") as history:
                History(place).build(draft, run, tabs, history)

        def take_up(request: gr.Request) -> list:
            """Where the work stands: the draft that was changed last, and the run of the link, or one that runs."""
            jobs, asked = place.jobs, request.query_params.get("run", "")
            names = jobs.names()
            current = asked if asked in names else next(iter(jobs.live()), "") or next(iter(names), "")
            usual = "train" if asked in names or jobs.live() else "data"
            shown = request.query_params.get("tab", "")
            drafts = place.drafts.names()
            return [(drafts or [""])[0], current, shown if shown in TABS else usual, figures.header(place.device())]

        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(take_up, None, [draft, run, first, head], **quiet).then(None, first, tabs, js=GO_THERE)
    return page


def theme() -> gr.Theme:
    plain = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))  # the weights whose files have all letters
    return gr.themes.Soft(
        primary_hue="violet",
        neutral_hue="slate",
        radius_size="lg",
        font=[plain, "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],  # of the machine: one file less to fetch
    ).set(
        body_background_fill="#f6f6fb",
        body_background_fill_dark="#0b0e18",
        block_background_fill_dark="#141927",
        block_border_color_dark="#262d40",
        block_border_width="1px",
        block_shadow="none",
        block_shadow_dark="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_radius="14px",
        block_title_text_weight="700",
        block_title_text_color="#1b2033",
        block_title_text_color_dark="#eef0f8",
        block_label_text_color="#1b2033",
        block_label_text_color_dark="#eef0f8",
        block_info_text_color="#5a6275",
        block_info_text_color_dark="#a5aec2",
        input_background_fill_dark="#0f1422",
        input_background_fill_focus_dark="#0f1422",
        input_placeholder_color="#6b7285",
        input_placeholder_color_dark="#8a93ab",
        checkbox_background_color_dark="#0f1422",
        checkbox_label_background_fill_dark="#1a2032",
        checkbox_label_background_fill_hover_dark="#232b42",
        button_secondary_background_fill_dark="#1f273c",
        button_secondary_background_fill_hover_dark="#2a3450",
        button_secondary_border_color_dark="#333b54",
        input_border_width="1px",
        input_border_color="#d9dce8",
        input_border_color_dark="#333b54",
        input_shadow="none",
        input_shadow_dark="none",
        checkbox_border_color="#a9afc2",
        checkbox_border_color_dark="#5a6482",
        checkbox_label_border_width="1px",
        checkbox_label_border_color="#d9dce8",
        checkbox_label_border_color_dark="#333b54",
        checkbox_label_shadow="none",
        button_primary_background_fill="#5b4bd6",
        button_primary_background_fill_dark="#5b4bd6",
        button_primary_background_fill_hover="#4a3bc0",
        button_primary_background_fill_hover_dark="#6a5be0",
        checkbox_label_background_fill_selected="#5b4bd6",
        checkbox_label_background_fill_selected_dark="#5b4bd6",
        button_cancel_text_color="#b42318",
        button_cancel_text_color_dark="#ff8a7a",
        button_large_text_weight="700",
        button_medium_text_weight="700",
        button_small_text_weight="700",
    )


def serve(
    runs: Path, host: str = "127.0.0.1", port: int = PORT, auth: tuple[str, str] | None = None, wait: bool = True
) -> tuple[gr.Blocks, str]:
    """Open the page; with `wait` until it is stopped. Gives the page and its address.

    Raises PageError if the port is taken.
    """
    runs = Path(runs).resolve()
    runs.mkdir(parents=True, exist_ok=True)
    hosts = LOOPBACK if host in LOOPBACK else ()  # elsewhere the names are not known here; the password guards
    page = build(runs)
    guards = [
        Middleware(Guard, hosts=hosts, auth=auth),
        Middleware(Media, runs=runs),
        Middleware(GZipMiddleware, compresslevel=6),  # the page itself; Gradio's own files are packed already
    ]
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, ssr_mode=False, run_history=False, inbrowser=False,
            enable_monitoring=False, mcp_server=False, pwa=False, quiet=True, show_error=True, footer_links=[],
            max_file_size=MAX_UPLOAD, blocked_paths=[str(runs)], prevent_thread_lock=True, theme=theme(),
            css=STYLESHEET.read_text(encoding="utf-8"), head=LISTENERS, app_kwargs={"middleware": guards},
        )  # fmt: skip
    except OSError:  # what Gradio says at length: the port is taken, or the address is not of this machine
        raise PageError(f"port {port} of {host} cannot be had; choose another with --port") from None
    except ValueError as error:  # Gradio asks its own address whether the page is there, and gives up soon
        if "localhost" not in str(error):
            raise
        raise PageError(
            f"the page opened at port {port}, but did not answer in time: try again when the machine is less busy, and "
            "if a proxy is set, take this machine out of it (NO_PROXY=localhost,127.0.0.1)"
        ) from None
    if wait:
        print(f"QZO Studio is at {address}  (Ctrl-C closes the page; runs go on)", flush=True)
        page.block_thread()
    return page, address
