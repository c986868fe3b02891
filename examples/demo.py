"""Try a model in the browser: `python examples/demo.py --weights output/s3n/best`.

Drop a photograph on the page, and see what the model takes it for and where it looked. Without --weights it shows the
model of drawn birds that comes with the package. Each visitor's photographs stay in a gallery, to be looked at again.
Uploads and pictures lie in a temporary folder that is deleted at the end; nothing is sent anywhere. Only this computer
is answered (--host), and only under its own names (--allow-host).
"""

import argparse
import contextlib
import copy
import io
import math
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)


@contextlib.contextmanager
def direct_connections() -> Iterator[None]:
    """Without proxies: Gradio asks its own address whether it answers, and builds its clients when it is imported."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    os.environ.update(dict.fromkeys(before, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


with direct_connections():
    import gradio as gr
    import numpy as np
    import psutil
    import torch
    from gradio.processing_utils import check_all_files_in_cache
    from PIL import Image
    from starlette.datastructures import Headers
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
    from support.launching import accept_any_encoding, exiting_on

    from s3n_timm import S3N
    from s3n_timm.classifier import Classifier
    from s3n_timm.data import draw_bird
    from s3n_timm.images import read_image
    from s3n_timm.outputs import score_classes
    from s3n_timm.peaks import PARTITION_MODES

MAX_BYTES = 20 * 2**20  # of an upload
MAX_UPLOADS = 200 * 2**20  # bytes of all uploads and pictures together
MAX_PIXELS = 50_000_000  # of a photograph: 150 MB when decoded
AT_ONCE = 4  # requests that are computed at one time: a slow one does not stop the others
MAX_WAITING = 64  # requests that wait
CLASSES = 8  # of the drawn birds, as the model that comes with the package knows them
EXAMPLES = 6
MAX_GALLERY = 18  # photographs of one visitor, drawn birds among them

TITLE = "S3N: three looks at a photograph"
SENTENCE = (
    "The first finds peaks of evidence, the second magnifies what decides (orange), the third the rest (blue)."
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="s3n_test_resnet", metavar="FOLDER_OR_HUB",
                        help="folder of s3n_timm.save, or hf-hub:USER/NAME (%(default)s, which knows drawn birds)")
    parser.add_argument("--host", default="127.0.0.1", help="address to answer on, 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--allow-host", nargs="+", default=[], metavar="NAME",
                        help="further names under which browsers may ask, such as that of a reverse proxy")
    parser.add_argument("--port", type=int, help="the first free one from 7860 by default")
    return parser.parse_args(argv)


# the model


def adjust(model: S3N, threshold: float, width: float, partition: str) -> S3N:
    """A copy of a model for one request, so that no other sees its settings."""
    model = copy.deepcopy(model)
    model.configure(threshold=threshold, partition_eval=partition)
    with torch.no_grad():
        for branch in model.warped if model.config.attention == "sparse" else ():
            model.beta[branch].mul_(width)
    return model


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names of the classes, with their numbers where some are equal: the page keeps one bar per name."""
    if len(set(names)) == len(names):
        return list(names)
    return [f"{name} (class {label})" for label, name in enumerate(names)]


def explain(
        classifier: Classifier,
        photograph: str | Path,
        threshold: float,
        width: float,
        partition: str,
) -> tuple[dict[str, float], dict[str, float] | None, Image.Image]:
    """The probability of each class, the same by the original branch alone, and the picture of what the model saw.

    The original branch has read the photograph once, as a plain backbone does; None for a model that lacks it.

    Raises:
        ValueError: the file is not an image that the model can read.
    """
    image = read_image(photograph, classifier.mode)
    adjusted = copy.copy(classifier)
    adjusted.model = adjust(classifier.model, threshold, width, partition)
    adjusted.label_names = distinct_names(classifier.label_names)
    seen = adjusted.explain(image)  # once: bars and picture agree, also where the partition is drawn at random
    file = io.BytesIO()
    adjusted.draw(image, seen).savefig(file, dpi=120)
    answers = [None if logits is None else
               dict(zip(adjusted.label_names, score_classes(logits, classifier.multi_label)[0].tolist()))
               for logits in (adjusted.model.decide(seen.logits), seen.logits.original)]
    return answers[0], answers[1], Image.open(file)


# what reaches the page


class BoundedUploads:
    """ASGI middleware that bounds what requests store in a folder: the oldest files make room for new ones.

    Args:
        app: what answers.
        folder: where Gradio keeps uploads and pictures.
        kept: files that stay.
    """

    def __init__(self, app: Any, folder: Path, kept: Collection[Path]) -> None:
        self.app, self.folder, self.kept = app, folder, kept
        self.arriving = 0  # bytes of the requests that are being received

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdecimal():
            await PlainTextResponse("State the Content-Length.", 411)(scope, receive, send)
        elif self.arriving + int(length) > MAX_UPLOADS:
            await PlainTextResponse("Too many uploads at once: try again.", 413)(scope, receive, send)
        else:
            self.arriving += int(length)
            try:
                if int(length):
                    self.make_room()
                await self.app(scope, receive, send)
            finally:
                self.arriving -= int(length)

    def make_room(self) -> None:
        files = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # Gradio renames files as they are complete
                if path.is_file() and path not in self.kept:
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        excess = sum(size for _, size, _ in files) + self.arriving - MAX_UPLOADS
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def find_upload(upload: Any, folder: Path) -> str | None:
    """The path of an uploaded file. Requests name paths themselves: others than uploads must not be opened.

    Raises:
        gradio.Error: it is not a regular file in the folder of uploads; whether it exists is not told.
    """
    if upload is None:
        return None
    refusal = gr.Error("Upload the photograph: other files are not read.", print_exception=False)
    try:
        check_all_files_in_cache(upload.model_dump())
        path = Path(upload.path).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_file():
            return str(path)
    except (gr.Error, OSError, TypeError, ValueError):
        pass
    raise refusal


def own_names(host: str) -> list[str]:
    """What a browser may call this server; another name that leads here is an attack by DNS rebinding."""
    names = {host, "localhost", "127.0.0.1", "["}  # IPv6 addresses, which the middleware cuts at their first colon
    if host in ("0.0.0.0", "::"):
        addresses = [each.address for some in psutil.net_if_addrs().values() for each in some]
        names |= {socket.gethostname().lower(), socket.getfqdn().lower(), *addresses}
    return sorted(name for name in names if "*" not in name)


# the page


def draw_examples(folder: Path) -> list[str]:
    paths = [folder / f"bird {label + 1}.png" for label in range(EXAMPLES)]
    for label, path in enumerate(paths):
        draw_bird(np.random.default_rng(label), label % CLASSES, CLASSES, size=384).image.save(path)
    return [str(path) for path in paths]


def keep_local(move: Callable[..., Any]) -> Callable[..., Any]:
    """Gradio's function that stores what a request names, without the downloads from addresses of the web."""
    async def move_file(path: Any) -> Any:
        if path is not None and "://" in str(path):
            raise gr.Error("Upload the photograph: nothing is downloaded.", print_exception=False)
        return await move(path)

    return move_file


def add_photograph(photograph: str | None, shown: list[str]) -> tuple[list[str], list[str]]:
    """A visitor's gallery with a photograph more, twice: what is remembered and what the page shows.

    The newest comes first. The drawn birds, at the end, stay; of the others, the oldest makes room.
    """
    uploads, drawn = shown[:-EXAMPLES], shown[-EXAMPLES:]
    if photograph is not None and photograph not in shown:
        uploads = [photograph, *uploads][:MAX_GALLERY - EXAMPLES]
    shown = [*(path for path in uploads if Path(path).is_file()), *drawn]  # old ones are deleted, see BoundedUploads
    return shown, shown


def choose_photograph(shown: list[str], event: gr.SelectData) -> str:
    """The photograph at the position of the gallery that a visitor has clicked.

    Raises:
        gradio.Error: it is there no longer.
    """
    if event.index not in range(len(shown)) or not Path(shown[event.index]).is_file():
        raise gr.Error("This photograph is no longer kept: upload it again.", print_exception=False)
    return shown[event.index]


def create_page(classifier: Classifier, folder: Path, computing: threading.Semaphore) -> gr.Blocks:
    model = classifier.model
    sparse = bool(model.warped) and model.config.attention == "sparse"
    gated = bool(model.warped) and model.config.attention != "saliency"
    compared = bool(model.warped) and "O" in model.config.branches
    own = model.config.threshold
    paths = draw_examples(folder)

    def answer(photograph: str | None, threshold: float, width: float, partition: str) -> tuple[Any, Any, Any]:
        if photograph is None:
            return None, None, None
        try:
            with computing:
                return explain(classifier, photograph, threshold, width, partition)
        except ValueError as error:
            message = str(error).replace(photograph, Path(photograph).name)
            raise gr.Error(message, print_exception=False) from None

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\n{SENTENCE}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                photograph = gr.Image(
                    paths[0], type="filepath", sources=["upload", "clipboard"], label="Photograph", height=300,
                    buttons=[], elem_id="photograph",
                )
                # Gradio's own would open the file, turn it and write it anew: the file itself goes to the model
                photograph.preprocess = lambda upload: find_upload(upload, folder)
                photograph.async_move_resource_to_block_cache = keep_local(
                    photograph.async_move_resource_to_block_cache)
                gallery = gr.Gallery(
                    paths, columns=3, height=200, object_fit="cover", show_label=False, elem_id="gallery",
                    allow_preview=False, interactive=False, buttons=[],
                )
                shown = gr.State(paths)  # what a visitor's gallery holds; browsers send a position, never a path
                threshold = gr.Slider(
                    min(0.0, own), max(round(math.log(5), 2), own), own, step=0.01, visible=gated,
                    label="Entropy gate δ",
                    info=f"Surer first looks follow one class, others the top {model.config.topk}.",
                )
                width = gr.Slider(
                    0.25, 3, 1, step=0.05, visible=sparse, label="Attention width",
                    info="Times β₁ and β₂: how far a peak reaches.",
                )
                partition = gr.Dropdown(
                    list(PARTITION_MODES), value=model.partition, visible=sparse, label="Partition",
                    info="Which peaks go to which warp; probability and random draw anew each time.",
                )
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    chances, single = (
                        gr.Label(num_top_classes=5, label=label, show_heading=False, elem_id=name, visible=visible,
                                 min_width=240)
                        for label, name, visible in (
                            ("Prediction of all looks" if compared else "Prediction", "prediction", True),
                            ("Prediction of the first look alone", "single", compared),
                        ))
                picture = gr.Image(
                    label="What the model sees", format="png", buttons=["download", "fullscreen"], elem_id="picture")
        inputs, outputs = [photograph, threshold, width, partition], [chances, single, picture]
        options = dict(fn=answer, inputs=inputs, outputs=outputs, trigger_mode="always_last", show_progress="minimal",
                       concurrency_limit=AT_ONCE, concurrency_id="explain")
        private = dict(api_visibility="private", show_progress="hidden")
        uploaded = photograph.input(api_name="explain", **options)
        uploaded.success(add_photograph, [photograph, shown], [shown, gallery], **private)
        chosen = gallery.select(choose_photograph, shown, photograph, **private)
        for given in (uploaded, chosen):
            given.failure(lambda: (None, None, None, None), None, [photograph, *outputs], **private)
        chosen.success(api_visibility="private", **options)
        gr.on([page.load, *(each.change for each in inputs[1:])], api_visibility="private", **options)
    return page.queue(max_size=MAX_WAITING)


def main(argv: Sequence[str] | None = None) -> None:
    accept_any_encoding()
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # unwinds, so that the temporary folder goes
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # the classifier refuses more before it decodes them
    with exiting_on(ValueError, OSError), tempfile.TemporaryDirectory(prefix="s3n-demo-") as folder:
        classifier = Classifier(args.weights)
        if not isinstance(classifier.model, S3N):
            raise ValueError(f"{args.weights} is no S3N model, so it has no peaks and warps to show.")
        os.environ["GRADIO_TEMP_DIR"] = folder
        computing = threading.Semaphore(AT_ONCE)
        page = create_page(classifier, Path(folder), computing)
        theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
        middleware = [
            Middleware(TrustedHostMiddleware, [*own_names(args.host), *args.allow_host], www_redirect=False),
            Middleware(BoundedUploads, Path(folder), frozenset(Path(folder).rglob("*"))),
        ]
        with direct_connections():
            page.launch(
                server_name=args.host,
                server_port=args.port,
                max_file_size=MAX_BYTES,
                share=False,
                ssr_mode=False,
                run_history=False,
                footer_links=["gradio"],
                theme=theme.set(block_info_text_color="*neutral_500"),
                quiet=True,
                prevent_thread_lock=True,
                app_kwargs=dict(middleware=middleware),
            )
        print(f"Open {page.local_url} in a browser; Ctrl-C ends it.", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)  # waits for 5 seconds
            for _ in range(AT_ONCE):
                computing.acquire()  # a thread that still computes when the interpreter goes aborts the process
            page.server.close()  # what has been computed is written to the folder that is deleted next


if __name__ == "__main__":
    main()
