"""Try a model in the browser: `python examples/demo.py --weights output/s3n/best`.

Drop a photograph on the page, and see what the model takes it for and where it looked. Without --weights it shows a
model of the drawn birds, which the first start trains and leaves in output/demo. Uploads and pictures lie in a
temporary folder that goes with the process; nothing is sent anywhere, and only this computer is answered (--host).
"""

import argparse
import copy
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import gradio as gr
    import numpy as np
    import torch
    from PIL import Image
    from support.launching import exiting_on

    from s3n_timm import S3N
    from s3n_timm.classifier import Classifier
    from s3n_timm.data import draw_bird
    from s3n_timm.draw import draw_explanation
    from s3n_timm.peaks import PARTITION_MODES
except ImportError as error:
    sys.exit(f'demo.py: {error.name or error} is missing: pip install -e ".[demo]"')

MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 50_000_000  # of a photograph: 150 MB when decoded
EMBEDDED = Path("output/demo")  # the model without --weights
TRAINING = ("--num-images", "2000", "--epochs", "8", "--checkpoint-hist", "1")
CLASSES = 4  # of the drawn birds
EXAMPLES = 6

TITLE = "S3N: three looks at a photograph"
SENTENCE = (
    "The first finds peaks of evidence, the second magnifies what decides (orange), the third the rest (blue)."
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", metavar="FOLDER_OR_HUB", help="folder of s3n_timm.save, or hf-hub:USER/NAME")
    parser.add_argument("--host", default="127.0.0.1", help="address to answer on, 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=int, help="the first free one from 7860 by default")
    return parser.parse_args(argv)


# the model


def train_embedded(folder: Path) -> Path:
    """The folder of a model of the drawn birds, trained if that has not been done before."""
    if not (folder / "results.json").is_file():  # what train.py writes last
        print(f"Training a small model on drawn birds, once: some three minutes on two CPU cores. It goes to {folder}.")
        script = Path(__file__).with_name("train.py")
        command = [sys.executable, script, *TRAINING, "--num-classes", str(CLASSES), "--output", folder, "--resume"]
        with tempfile.TemporaryDirectory(prefix="s3n-demo-") as cache:
            environment = os.environ | dict(HF_DATASETS_CACHE=cache)
            if subprocess.run(command, env=environment).returncode:
                raise ValueError("Training failed, for the reason above: mend it, or name a model with --weights.")
    return folder / "best"


def adjust(model: S3N, threshold: float, width: float, partition: str) -> S3N:
    """A copy of a model for one request, so that no other sees its settings."""
    model = copy.deepcopy(model)
    model.gate_options["threshold"] = threshold
    model.partition_eval = partition
    model.set_epoch(model.partition_warmup_epochs)  # a model saved during its warm-up would not listen
    with torch.no_grad():
        for branch in model.warped if model.attention == "sparse" else ():
            getattr(model, f"beta_{branch}").mul_(width)
    return model


def explain(
        classifier: Classifier,
        photograph: str | Path,
        threshold: float,
        width: float,
        partition: str,
) -> tuple[dict[str, float], Image.Image]:
    """The probability of each class, and the picture of what the model saw.

    Raises:
        ValueError: the file is no image that the model can read.
    """
    image = classifier.prepare(photograph)
    model = adjust(classifier.model, threshold, width, partition)
    seen = model.explain(image[None].to(next(model.parameters())))
    model.explain = lambda _: seen  # asked once: bars and picture agree, whatever the partition draws
    config, names = classifier.data_config, classifier.label_names
    figure = draw_explanation(model, image, config["mean"], config["std"], names)
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    chances = model.decide(seen.logits)[0].float().softmax(0).tolist()
    return dict(zip(names, chances)), Image.open(file)


# the page


def draw_examples(folder: Path) -> list[str]:
    paths = [folder / f"bird {label + 1}.png" for label in range(EXAMPLES)]
    for label, path in enumerate(paths):
        draw_bird(np.random.default_rng(label), label % CLASSES, CLASSES, size=384).image.save(path)
    return [str(path) for path in paths]


def create_page(classifier: Classifier, folder: Path) -> gr.Blocks:
    model = classifier.model
    sparse = bool(model.warped) and model.attention == "sparse"
    gated = bool(model.warped) and model.attention != "saliency"
    own = model.gate_options["threshold"]
    paths = draw_examples(folder)

    def answer(photograph: str | None, threshold: float, width: float, partition: str) -> tuple[Any, Any]:
        if photograph is None:
            return None, None
        try:
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
                photograph.preprocess = lambda upload: upload and upload.path
                examples = gr.Examples(paths, photograph, label="Drawn birds", cache_examples=False)
                threshold = gr.Slider(
                    min(0.0, own), max(round(math.log(5), 2), own), own, step=0.01, visible=gated,
                    label="Entropy gate δ",
                    info=f"Surer first looks follow one class, others the top {model.gate_options['topk']}.",
                )
                width = gr.Slider(
                    0.25, 3, 1, step=0.05, visible=sparse, label="Attention width",
                    info="Times β₁ and β₂: how far a peak reaches.",
                )
                partition = gr.Dropdown(
                    list(PARTITION_MODES), value=model.partition, visible=sparse, label="Partition",
                    info="Which peaks go to which warp; probability and random draw anew each time.",
                )
            with gr.Column(scale=5, min_width=480):
                chances = gr.Label(
                    num_top_classes=5, label="Prediction", show_heading=False, elem_id="prediction")
                picture = gr.Image(
                    label="What the model sees", format="png", buttons=["download", "fullscreen"], elem_id="picture")
        inputs, outputs = [photograph, threshold, width, partition], [chances, picture]
        options = dict(fn=answer, inputs=inputs, outputs=outputs, trigger_mode="always_last", show_progress="minimal")
        given = gr.on([page.load, photograph.input], api_name="explain", **options)
        given.failure(lambda: (None, None, None), None, [photograph, *outputs], api_visibility="private")
        examples.load_input_event.success(api_visibility="private", **options)
        gr.on([each.change for each in inputs[1:]], api_visibility="private", **options)
    return page


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # unwinds, so that the temporary folder goes
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # the classifier refuses more before it decodes them
    with exiting_on(ValueError, OSError), tempfile.TemporaryDirectory(prefix="s3n-demo-") as folder:
        classifier = Classifier.from_pretrained(args.weights or train_embedded(EMBEDDED))
        if not isinstance(classifier.model, S3N):
            raise ValueError(f"{args.weights} is no S3N model, so it has no peaks and warps to show.")
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = create_page(classifier, Path(folder))
        theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
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
        )
        print(f"Open {page.local_url} in a browser; Ctrl-C ends it.", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)  # a thread that still computes when the interpreter goes aborts the process


if __name__ == "__main__":
    main()
