"""The layout of the app: the tabs generate, edit and chat, and the history below."""

import hmac
from typing import Any

import gradio as gr
import gradio.themes
from fastapi import FastAPI
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from echo4o.serving.app.controls import Controls, build_controls
from echo4o.serving.app.examples import EDIT_EXAMPLES, PROMPTS, example_files
from echo4o.serving.app.handlers import Handlers, move
from echo4o.serving.app.history import Entry, History
from echo4o.serving.app.running import RunState
from echo4o.serving.engine import Engine

PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # programs use /v1
QUIET: dict[str, Any] = PRIVATE | {"show_progress": "hidden"}
CSS = """
.gradio-container { width: 100% !important; max-width: 1100px !important; margin: auto; }
.status { min-height: 1.6em; }
.results .grid-wrap { max-height: none !important; } /* gradio would cut large images at half of the window */
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  button.primary, button.secondary, button.stop { min-height: 44px; }
}
"""


_DELETE_COPIES = (600, 86_400)  # seconds: how often, and how old; gradio's copies of images that it has shown


def copy_of(entry: Entry) -> str:
    """A copy of an image in gradio's cache, from which the page may read: the history's folder stays private."""
    return save_file_to_cache(entry.file, get_upload_folder())


def mount_app(api: FastAPI, engine: Engine, key: str | None = None, history: History | None = None) -> FastAPI:
    """Add the app to the API's server at `/`. With a key, it asks for it as the password (any user name).

    Args:
        history: where images are kept; None: until the server ends.
    """

    def allowed(user: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), (key or "").encode())

    return gr.mount_gradio_app(
        api,
        build_page(engine, history=history),
        path="/",
        auth=allowed if key else None,
        auth_message="The password is the key of the server; the user name can be anything." if key else None,
        run_history=False,
        **launch_options(engine),
    )


def launch_options(engine: Engine) -> dict[str, Any]:
    """What the page looks like and accepts, for `mount_gradio_app` and `launch`."""
    return {
        "max_file_size": engine.model.limits.upload_bytes,
        "footer_links": [],
        "enable_monitoring": False,
        "ssr_mode": False,
        # Fonts of the machine: the page loads nothing from other servers.
        "theme": gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        "css": CSS,
    }


def build_page(engine: Engine, title: str | None = None, history: History | None = None) -> gr.Blocks:
    """The page of an engine."""
    return _Page(engine, history or History()).build(title or engine.model.source or "echo4o")


class _Page:
    """Builds the page and connects its parts."""

    def __init__(self, engine: Engine, history: History):
        self.model, self.history = engine.model, history
        self.handlers = Handlers(engine, self.history)

    def build(self, title: str) -> gr.Blocks:
        with gr.Blocks(title=f"echo4o: {title}", analytics_enabled=False, delete_cache=_DELETE_COPIES) as page:
            gr.Markdown(f"# {title}")
            self.token = gr.BrowserState("", storage_key="echo4o-visitor", secret=self.history.secret)
            self.shown = gr.Gallery(
                label="Your images, the newest first: select one for its settings",
                columns=6,
                height=220,
                object_fit="contain",
                fit_columns=False,
                interactive=False,
                render=False,
                elem_id="history",
                buttons=["fullscreen"],
            )
            with gr.Tabs():
                with gr.Tab("Generate", id="generate"):
                    generate = self._build_generate()
                if self.model.takes_references:
                    with gr.Tab("Edit", id="edit"):
                        self._build_edit()
                if self.model.can_chat:
                    with gr.Tab("Chat", id="chat"):
                        self._build_chat()
            self._build_history(*generate)
            page.load(self._visit, self.token, [self.token, self.shown], **QUIET)
        page.queue(default_concurrency_limit=None, max_size=self.model.limits.queue + 64)
        return page

    def _visit(self, token: str | None) -> tuple[str, list]:
        token = self.history.visitor(token)
        return token, self._gallery(token)

    def _cancel(self, request: gr.Request) -> None:
        self.handlers.cancel(request.session_hash or "")

    def _gallery(self, token: str) -> list[tuple[str, str]]:
        return [(copy_of(entry), entry.caption) for entry in self.history.entries(token)]

    # --- generate ---

    def _build_generate(self) -> tuple[Any, Controls]:
        prompt = gr.Textbox(
            label="Prompt",
            lines=3,
            placeholder="What the image shows",
            info="Shift + Enter generates" + ("; [image 1] stands for the first reference" * self.model.takes_inputs),
            elem_id="generate-prompt",
            autofocus=True,
        )
        files = self._build_references("generate") if self.model.takes_references else gr.State([])
        controls = build_controls(self.model, "generate")
        run = self._build_results("generate", "Generate", prompt, files, controls)
        prompt.submit(*run[0], **run[1])
        gr.Examples(PROMPTS, prompt, label="Examples", elem_id="generate-examples")
        return prompt, controls

    def _build_references(self, tab: str, label: str = "Reference images") -> gr.File:
        most = self.model.max_references
        with gr.Accordion(f"{label}{f' (up to {most})' if most else ''}", open=tab == "edit"):
            files = gr.File(
                file_count="multiple",
                file_types=[".png", ".jpg", ".jpeg", ".webp"],
                allow_reordering=True,
                label="Drop images here; drag their names to reorder",
                height=140,
                elem_id=f"{tab}-files",
            )
            thumbnails = gr.Gallery(
                label="In this order",
                columns=4,
                height=150,
                object_fit="contain",
                fit_columns=False,
                interactive=False,
                allow_preview=False,
                visible=False,
                elem_id=f"{tab}-thumbnails",
            )
            with gr.Row(visible=False) as order:
                number = gr.Number(1, label="Image", precision=0, minimum=1, min_width=80, elem_id=f"{tab}-number")
                earlier = gr.Button("Move earlier", size="sm", min_width=80, elem_id=f"{tab}-earlier")
                later = gr.Button("Move later", size="sm", min_width=80, elem_id=f"{tab}-later")
        files.change(
            lambda paths: (
                gr.update(
                    value=[(path, f"image {n}") for n, path in enumerate(paths or [], 1)], visible=bool(paths)
                ),
                gr.update(visible=len(paths or []) > 1),
            ),
            files,
            [thumbnails, order],
            **QUIET,
        )  # fmt: skip
        for button, by in ((earlier, -1), (later, 1)):

            def moved(paths, place, by=by):
                place, most = int(place or 1), len(paths or [])
                return move(paths, place, by), max(1, min(most, place + by))

            button.click(moved, [files, number], [files, number], **QUIET)
        return files

    def _build_results(self, tab: str, label: str, prompt: Any, files: Any, controls: Controls):
        """Buttons, progress and results of a tab; returns the arguments of its event, for other triggers."""
        with gr.Row():
            start = gr.Button(label, variant="primary", elem_id=f"{tab}-start")
            stop = gr.Button("Cancel", variant="secondary", elem_id=f"{tab}-cancel")
        status = gr.Markdown("", elem_id=f"{tab}-status", elem_classes="status")
        preview = gr.Image(
            label="Preview",
            visible=False,
            interactive=False,
            height=260,
            format="jpeg",
            buttons=["fullscreen"],
            elem_id=f"{tab}-preview",
        )
        results = gr.Gallery(
            label="Images",
            columns=2,
            height="auto",
            object_fit="contain",
            fit_columns=False,
            interactive=False,
            elem_id=f"{tab}-results",
            elem_classes="results",
            buttons=["fullscreen"],
        )

        def generate(values: dict, request: gr.Request):
            token = self.history.visitor(values[self.token])
            try:
                arguments = controls.read(values)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from None
            shown = -1
            page = request.session_hash or token
            for state, entries in self.handlers.generate(page, token, values[prompt], values[files], arguments):
                yield {self.token: token, **self._updates(state, entries, shown, token, status, preview, results)}
                shown = len(entries)

        inputs = {self.token, prompt, files, *controls.components.values()}
        event = (generate, inputs, [self.token, status, preview, results, self.shown])
        start.click(*event, **QUIET)
        stop.click(self._cancel, None, None, **QUIET)
        return event, QUIET

    def _updates(
        self, state: RunState, entries: list[Entry], shown: int, token: str, status, preview, results
    ) -> dict:
        updates: dict[Any, Any] = {status: state.line}
        running = state.preview is not None and not state.done
        updates[preview] = gr.update(value=state.preview if running else None, visible=running)
        if len(entries) != shown:
            updates[results] = [(copy_of(entry), f"seed {entry.seed}") for entry in entries]
            updates[self.shown] = self._gallery(token)
        return updates

    # --- edit ---

    def _build_edit(self) -> None:
        files = self._build_references("edit", "Images to edit or to combine")
        prompt = gr.Textbox(
            label="What to change",
            lines=2,
            placeholder="make it night",
            info="Shift + Enter edits",
            elem_id="edit-prompt",
        )
        controls = build_controls(self.model, "edit")

        run = self._build_results("edit", "Edit", prompt, files, controls)
        prompt.submit(*run[0], **run[1])
        again = gr.Button("Edit the newest image further", size="sm", elem_id="edit-again")
        again.click(
            lambda token: [copy_of(entry) for entry in self.history.entries(token)[:1]], self.token, files, **QUIET
        )
        examples = [[example_files()[:count], text] for count, text in EDIT_EXAMPLES]
        gr.Examples(examples, [files, prompt], label="Examples", elem_id="edit-examples")

    # --- chat ---

    def _build_chat(self) -> None:
        talk = gr.State([])
        shown = gr.Chatbot(label="Chat", height=380, buttons=["copy"], elem_id="chat-talk", feedback_options=None)
        box = gr.MultimodalTextbox(
            label="Question",
            show_label=False,
            placeholder="Ask something; add images with the button or by dropping them here",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            elem_id="chat-box",
        )
        with gr.Row():
            stop = gr.Button("Stop", size="sm", elem_id="chat-stop")
            clear = gr.Button("New conversation", size="sm", elem_id="chat-clear")

        def ask(message: dict, turns: list[dict], request: gr.Request):
            text, new = (message.get("text") or "").strip(), list(message.get("files") or [])
            files = [file for turn in turns for file in turn.get("files", [])] + new
            question = {"role": "user", "content": text, "files": new}
            yield gr.update(value=None), _messages([*turns, question]), turns
            answer = ""
            for answer in self.handlers.chat(request.session_hash or "", text, files, turns):
                yield gr.update(), _messages([*turns, question, _answer(answer)]), turns
            turns = [*turns, question, _answer(answer)]
            yield gr.update(), _messages(turns), turns

        box.submit(ask, [box, talk], [box, shown, talk], **QUIET)
        stop.click(self._cancel, None, None, **QUIET)
        clear.click(lambda: ([], []), None, [shown, talk], **QUIET)

    # --- history ---

    def _build_history(self, prompt: Any, controls: Controls) -> None:
        gr.Markdown("## History")
        self.shown.render()
        chosen = gr.State(None)
        with gr.Row(visible=False) as actions:
            reuse = gr.Button("Reuse prompt, seed and settings", size="sm", elem_id="history-reuse")
            download = gr.DownloadButton("Download with metadata", size="sm", elem_id="history-download")
        settings = gr.Code(
            language="json", label="Settings", visible=False, interactive=False, elem_id="history-settings"
        )
        clear = gr.Button("Clear the history", size="sm", elem_id="history-clear")

        def select(token: str, event: gr.SelectData):
            entries = self.history.entries(token)
            index = event.index if isinstance(event.index, int) else 0
            if not 0 <= index < len(entries):
                return None, gr.update(visible=False), gr.update(), gr.update(visible=False)
            entry = entries[index]
            return (
                entry.file.name,
                gr.update(visible=True),
                gr.update(value=copy_of(entry)),
                gr.update(value=entry.to_json(), visible=True),
            )

        def restore(token: str, name: str | None):
            entry = next((each for each in self.history.entries(token) if each.file.name == name), None)
            if entry is None:
                return {prompt: gr.update()}
            return {prompt: entry.prompt, **controls.restore(entry.seed, entry.settings)}

        def forget(token: str):
            self.history.clear(self.history.visitor(token))
            return [], None, gr.update(visible=False), gr.update(visible=False)

        self.shown.select(select, self.token, [chosen, actions, download, settings], **QUIET)
        reuse.click(restore, [self.token, chosen], [prompt, *controls.components.values()], **QUIET)
        clear.click(forget, self.token, [self.shown, chosen, actions, settings], **QUIET)


def _answer(text: str) -> dict:
    return {"role": "assistant", "content": text, "files": []}


def _messages(turns: list[dict]) -> list[dict]:
    """Turns as the Chatbot shows them: each file is a message of its own."""
    messages = []
    for turn in turns:
        messages += [{"role": turn["role"], "content": {"path": file}} for file in turn["files"]]
        if turn["content"]:
            messages.append({"role": turn["role"], "content": turn["content"]})
    return messages
