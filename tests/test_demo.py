"""examples/demo.py as its users meet it: a real process, over HTTP and in Chromium."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import timm
import torch
from helpers import call
from PIL import Image
from timm.models import save_for_hf

from s3n_timm import S3N, save
from s3n_timm.classifier import Classifier
from s3n_timm.data import draw_bird
from s3n_timm.peaks import PARTITION_MODES

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[demo]"')
import gradio
import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

SCRIPT = Path(__file__).parents[1] / "examples" / "demo.py"
PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "cub50" / "images"
NAMES = ["blue jay", "grey wagtail", "great tit", "red kite", "green finch", "black swift", "house sparrow"]
DETERMINISTIC = [mode for mode in PARTITION_MODES if mode not in ("probability", "random")]
MEGABYTE = 2**20


class Server(NamedTuple):
    url: str
    process: psutil.Process
    root: Path  # holds its home, its working folder and the system's temporary folder, and nothing of ours


def start(root, *args, **variables):
    folders = {name: root / name for name in ("home", "work", "tmp")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO", "HF_", "XDG"))}
    environment |= dict(
        HOME=str(folders["home"]), TMPDIR=str(folders["tmp"]), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1", PYTHONIOENCODING="utf-8",
    ) | variables
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folders["work"],
        env=environment,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Open http"):
            return Server(line.split()[1], process, root)
    raise AssertionError("".join(lines))


def stop(server):
    server.process.send_signal(signal.SIGTERM)
    text, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, text
    assert str(SCRIPT) not in text, text  # a traceback through it; Gradio prints its own for forged requests


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    model = S3N("test_resnet", num_classes=len(NAMES), backbone_args=dict(output_stride=16), threshold=1.5).eval()
    config = dict(input_size=(3, 96, 96), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9, interpolation="bicubic")
    return save(model, tmp_path_factory.mktemp("weights"), label_names=NAMES, data_config=config)


@pytest.fixture(scope="module")
def server(weights, tmp_path_factory):
    server = start(tmp_path_factory.mktemp("server"), "--weights", weights)
    yield server
    stop(server)


@pytest.fixture(scope="module")
def ask(server, tmp_path_factory):
    """A request over HTTP: the probability of each class that the page names, and the picture."""
    client = Client(
        server.url, verbose=False, analytics_enabled=False, download_files=tmp_path_factory.mktemp("downloads"))

    def call(path, threshold=1.5, width=1.0, partition="expected"):
        label, _, picture = client.predict(
            handle_file(str(path)), threshold, width, partition, api_name="/explain")
        with Image.open(picture["path"] if isinstance(picture, dict) else picture) as file:
            return {each["label"]: each["confidence"] for each in label["confidences"]}, np.array(file)

    return call


@pytest.fixture(scope="module")
def script():
    import demo

    return demo


@pytest.fixture
def bird(tmp_path):
    path = tmp_path / "bird.png"
    draw_bird(np.random.default_rng(1), 1, 4, 200).image.save(path)
    return path


def expected(weights, path, threshold=1.5, width=1.0, partition="expected"):
    """The five largest probabilities of a model of our own that has those settings."""
    model = timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
    model.configure(threshold=threshold, partition_eval=partition)
    with torch.no_grad():
        for beta in model.beta.values():
            beta *= width
        top = model(Classifier.from_pretrained(weights).prepare(path)[None]).softmax(1)[0].topk(5)
    return {NAMES[label]: chance for label, chance in zip(top.indices.tolist(), top.values.tolist())}


# over HTTP


@pytest.mark.parametrize("settings", [
    dict(width=0.3),
    dict(width=3),
    dict(threshold=0),
    *(dict(partition=mode) for mode in DETERMINISTIC),
    dict(threshold=0, width=2, partition="extreme"),
])
def test_answer_is_that_of_a_model_with_the_settings(ask, weights, bird, settings):
    answer, picture = ask(bird, **settings)
    assert answer == pytest.approx(expected(weights, bird, **settings), abs=1e-4)
    assert picture.shape[1] > 800
    assert picture.std() > 20


def test_settings_change_the_picture_and_last_for_one_request(ask, bird):
    before, picture = ask(bird)
    for settings in (dict(width=0.3), dict(threshold=0), dict(partition="all")):
        after, other = ask(bird, **settings)
        assert (other != picture).any(), settings
        assert after != before, settings
    again, same = ask(bird)
    assert again == before
    assert (same == picture).all()


def test_requests_at_once_do_not_disturb_each_other(ask, weights, bird):
    settings = [dict(width=width, partition=mode) for width in (0.5, 2) for mode in DETERMINISTIC]
    with ThreadPoolExecutor(len(settings)) as pool:
        answers = list(pool.map(lambda each: ask(bird, **each)[0], settings))
    for each, answer in zip(settings, answers):
        assert answer == pytest.approx(expected(weights, bird, **each), abs=1e-4), each


@pytest.mark.parametrize("partition", ["probability", "random"])
def test_drawn_partition_answers(ask, bird, partition):
    answer, _ = ask(bird, partition=partition)
    assert set(answer) <= set(NAMES)


def test_model_reads_the_file_itself(ask, weights, bird, tmp_path):
    upright = Image.open(bird)
    turned, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = 6  # turn it to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert ask(turned)[0] == ask(bird)[0]
    for name, mode in (("inks.jpg", "CMYK"), ("grey.tif", "L"), ("palette.gif", "P")):
        path = tmp_path / name
        upright.convert(mode).save(path)
        assert ask(path)[0] == pytest.approx(expected(weights, path), abs=1e-4), name


def write_bad_files(folder):
    files = [folder / name for name in ("words.jpg", "empty.png", "cut off.jpg", "bomb.png", "line.png")]
    words, empty, cut, bomb, line = files
    words.write_text("This is no photograph.", encoding="utf-8")
    empty.touch()
    Image.effect_noise((300, 300), 60).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    Image.new("1", (9000, 9000)).save(bomb)  # 81 million pixels in some kilobytes: Pillow alone would only warn
    assert bomb.stat().st_size < 50_000
    Image.new("L", (1, 5000)).save(line)  # resized to the input's height it would have 5000 times as many pixels
    return files


def test_bad_file_ends_in_a_sentence_and_the_next_one_is_read(ask, bird, tmp_path):
    before, _ = ask(bird)
    for path in write_bad_files(tmp_path):
        with pytest.raises(AppError) as caught:
            ask(path)
        text = str(caught.value)
        assert path.name in text, text
        assert "/" not in text, "no path of the server's"
        assert len(text) < 300, text
        assert ask(bird)[0] == before


@pytest.mark.parametrize("settings", [dict(width=0), dict(width=1e9), dict(threshold=-1), dict(partition="chance")])
def test_settings_out_of_range_are_refused(ask, bird, settings):
    with pytest.raises(AppError):
        ask(bird, **settings)


def test_large_upload_is_refused_and_not_kept(server, tmp_path):
    upload = f"{server.url}gradio_api/upload"

    def kept():
        return {path for path in (server.root / "tmp").rglob("*") if path.is_file() and path.stat().st_size > MEGABYTE}

    before = kept()
    answer = httpx.post(upload, files=dict(files=("large.png", bytes(21 * MEGABYTE))), timeout=60)
    assert answer.status_code == 413
    assert kept() == before
    assert httpx.post(upload, files=dict(files=("small.png", bytes(19 * MEGABYTE))), timeout=60).status_code == 200


def forge(server, photograph):
    """A request as no page makes it: the events that answer it."""
    call = f"{server.url}gradio_api/call/explain"
    event = httpx.post(call, json=dict(data=[photograph, 0.2, 1.0, "expected"]), timeout=30).json()["event_id"]
    return httpx.get(f"{call}/{event}", timeout=30).text


def test_only_uploads_are_read(server, ask, bird, tmp_path):
    """A request can name any path, of an image of this computer, of a device, of a file that is not there."""
    before, _ = ask(bird)
    paths = [bird, tmp_path / "absent.png", "/dev/ptmx", __file__, server.root, f"{server.root}/../../etc/hostname"]
    meta = dict(_type="gradio.FileData")
    answers = [forge(server, dict(path=str(path))) for path in paths]
    assert len(set(answers)) == 1, "whether a file is there is not told"
    assert "event: error" in answers[0]
    for path in (*paths, "http://192.0.2.1/a.png"):
        assert "event: complete" not in forge(server, dict(path=str(path), meta=meta))
    assert ask(bird)[0] == before


def test_nothing_is_downloaded(script):
    async def move(path):
        return path

    keep = script.keep_local(move)
    assert asyncio.run(keep("/tmp/a.png")) == "/tmp/a.png"
    assert asyncio.run(keep(None)) is None
    for address in ("http://example.org/a.png", "HTTPS://example.org/a.png"):
        with pytest.raises(script.gr.Error):
            asyncio.run(keep(address))


def test_other_names_are_not_answered(server, weights, tmp_path):
    """By DNS rebinding a page of the web asks this server under the page's own name."""
    for path in ("", "config", "gradio_api/upload"):
        answer = httpx.get(server.url + path, headers=dict(Host="rebinding.example:7860"))
        assert answer.status_code == 400, path
    port = httpx.URL(server.url).port
    assert httpx.get(server.url, headers=dict(Host=f"localhost:{port}")).status_code == 200


def test_names_of_a_server_for_others(script):
    assert set(script.own_names("127.0.0.1")) == {"127.0.0.1", "localhost", "["}
    every = script.own_names("0.0.0.0")
    assert {each.address for some in psutil.net_if_addrs().values() for each in some} <= set(every)
    assert script.parse_args(["--allow-host", "birds.example.org"]).allow_host == ["birds.example.org"]


def test_uploads_together_are_bounded(server, script, ask, bird):
    before, _ = ask(bird)
    content = bytes(19 * MEGABYTE)
    for number in range(script.MAX_UPLOADS // len(content) + 3):
        files = dict(files=(f"{number}.png", content[number:]))
        assert httpx.post(f"{server.url}gradio_api/upload", files=files, timeout=60).status_code == 200
    kept = [path.stat().st_size for path in (server.root / "tmp").rglob("*") if path.is_file()]
    assert sum(kept) <= script.MAX_UPLOADS + 2 * MEGABYTE
    assert ask(bird)[0] == before

    def chunks():
        yield b"no length"

    assert httpx.post(f"{server.url}gradio_api/upload", content=chunks()).status_code == 411


def test_drawn_birds_stay_when_room_is_made(script, tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(bytes(100))
        os.utime(tmp_path / f"{number}.png", (number, number))
    monkeypatch.setattr(script, "MAX_UPLOADS", 250)
    script.BoundedUploads(None, tmp_path, {tmp_path / "0.png"}).make_room()
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "1.png", "2.png"}
    script.BoundedUploads(None, tmp_path, set()).make_room()
    assert {path.name for path in tmp_path.iterdir()} == {"1.png", "2.png"}


def test_a_stuck_image_does_not_stop_others(script, weights, bird, tmp_path, monkeypatch):
    """In this process, where one request can be made to hang."""
    free, explain = threading.Event(), script.explain

    def hang(classifier, photograph, *settings):
        if Path(photograph).name == "stuck.png":
            free.wait(60)
        return explain(classifier, photograph, *settings)

    monkeypatch.setattr(script, "explain", hang)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page"))
    (tmp_path / "page").mkdir()
    classifier = Classifier.from_pretrained(weights)
    page = script.create_page(classifier, tmp_path / "page", threading.Semaphore(script.AT_ONCE))
    page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        client = Client(page.local_url, verbose=False, analytics_enabled=False, download_files=False)
        stuck = shutil.copy(bird, tmp_path / "stuck.png")
        waiting = client.submit(handle_file(str(stuck)), 0.2, 1, "expected", api_name="/explain")
        label, *_ = client.submit(handle_file(str(bird)), 0.2, 1, "expected", api_name="/explain").result(timeout=30)
        assert label["label"] in NAMES
        assert not waiting.done()
    finally:
        free.set()
        page.close(verbose=False)


def test_environment_of_proxies_is_restored(script, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.delenv("no_proxy", raising=False)
    with script.direct_connections():
        assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "*"
    assert os.environ["NO_PROXY"] == "localhost"
    assert "no_proxy" not in os.environ


def test_listens_on_this_computer_only_and_sends_nothing_out(server):
    connections = psutil.Process(server.process.pid).net_connections()
    assert {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    config = httpx.get(f"{server.url}config").json()
    assert config["analytics_enabled"] is False
    assert not config.get("share_url")
    assert httpx.get(f"{server.url}gradio_api/file={SCRIPT}").status_code == 403


def test_without_weights_it_knows_drawn_birds_and_only_the_temporary_folder_is_written(tmp_path):
    server, bird = start(tmp_path), tmp_path / "bird.png"
    client = Client(server.url, verbose=False, analytics_enabled=False, download_files=False)
    draw_bird(np.random.default_rng(1), 1, 8, 200).image.save(bird)
    label, *_ = client.predict(handle_file(str(bird)), 0.2, 1, "expected", api_name="/explain")
    assert label["label"] == Classifier("s3n_test_resnet").label_names[1]
    (folder,) = (path for path in (tmp_path / "tmp").iterdir() if path.name.startswith("s3n-demo-"))
    assert [path.name for path in folder.rglob("bird.png")] == ["bird.png"], "where the upload lies"
    assert folder.stat().st_mode & 0o077 == 0, "others of this computer cannot look into it"

    def outside():
        written = [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents]
        return [path for path in written if "matplotlib" not in str(path) and path != bird]  # its list of fonts

    assert outside() == []
    stop(server)
    assert not folder.exists()
    assert outside() == []


def test_starts_behind_a_proxy_on_another_address_and_ends_in_order_while_it_computes(tmp_path):
    """Its own address is asked directly, with a proxy of any kind in the environment."""
    nowhere = dict(http_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9", ALL_PROXY="socks5://127.0.0.1:9")
    torch.manual_seed(0)
    model = S3N("resnet50", num_classes=len(NAMES)).eval()  # slow enough to be met at work
    config = dict(input_size=(3, 448, 448), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bicubic")
    folder = save(model, tmp_path / "weights", label_names=NAMES, data_config=config)
    server = start(tmp_path, "--weights", folder, "--host", "127.0.0.2", **nowhere)
    process = psutil.Process(server.process.pid)
    listening = {each.laddr.ip for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.2"}
    with httpx.Client(trust_env=False) as visitor:
        assert visitor.get(server.url).status_code == 200

    client = Client(server.url, verbose=False, analytics_enabled=False, download_files=False)
    draw_bird(np.random.default_rng(1), 1, 4, 448).image.save(tmp_path / "bird.png")
    for _ in range(3):
        client.submit(handle_file(str(tmp_path / "bird.png")), 0.2, 1, "expected", api_name="/explain")
    idle = process.cpu_times().user
    while process.cpu_times().user < idle + 0.7:
        time.sleep(0.05)
    stop(server)
    assert not list((tmp_path / "tmp").glob("s3n-demo-*"))


# starting


def test_weights_that_do_not_do_are_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    plain = tmp_path / "plain"
    save_for_hf(timm.create_model("test_resnet", num_classes=3), plain, safe_serialization=True)
    for weights, named in (("no-such-folder", "no-such-folder"), (plain, "S3N")):
        text = call("demo.py", "--weights", weights, ok=False)
        assert named in text.splitlines()[-1]
        assert "Traceback" not in text


def test_taken_port_is_said(server, weights):
    port = httpx.URL(server.url).port
    text = call("demo.py", "--weights", weights, "--port", port, ok=False)
    assert str(port) in text.splitlines()[-1]
    assert "Traceback" not in text


# models of other kinds


@pytest.mark.parametrize("options", [
    dict(preset="original"),
    dict(attention="response"),
    dict(attention="saliency"),
    dict(branches="O"),
    dict(branches="O+C", answer="mean"),
])
def test_page_for_every_kind_of_model(script, bird, tmp_path, options):
    torch.manual_seed(0)
    model = S3N("test_resnet", num_classes=3, **options).eval()
    if options == dict(preset="original"):
        model.set_epoch(0)  # as train.py saves it in the first epochs
    classifier = Classifier.from_pretrained(save(model, tmp_path / "weights"))
    before = {name: value.clone() for name, value in classifier.model.state_dict().items()}
    page = script.create_page(classifier, tmp_path, threading.Semaphore(script.AT_ONCE))
    sliders = {each["props"]["label"]: each["props"]["visible"] for each in page.config["components"]
               if each["type"] in ("slider", "dropdown")}
    sparse = options.get("attention", "sparse") == "sparse" and options.get("branches") != "O"
    assert sliders == {
        "Entropy gate δ": sparse or options.get("attention") == "response",
        "Attention width": sparse,
        "Partition": sparse,
    }
    answer, single, picture = script.explain(classifier, bird, 0.5, 2.0, "all")
    assert list(answer) == ["0", "1", "2"]
    assert sum(answer.values()) == pytest.approx(1)
    assert picture.width > 800
    assert sum(single.values()) == pytest.approx(1)  # every kind has the original branch
    adjusted = script.adjust(classifier.model, 0.5, 2.0, "all")
    assert adjusted.partition == "all"
    for name, value in classifier.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_classes_of_one_name_have_a_bar_each(script, bird, tmp_path):
    torch.manual_seed(0)
    model = S3N("test_resnet", num_classes=3).eval()
    classifier = Classifier.from_pretrained(save(model, tmp_path / "weights", label_names=["wren", "jay", "wren"]))
    answer, *_ = script.explain(classifier, bird, 0.5, 1.0, "expected")
    assert sum(answer.values()) == pytest.approx(1)
    assert len(answer) == 3
    assert classifier.label_names == ["wren", "jay", "wren"]


# in a browser


@pytest.fixture(scope="module")
def browser():
    reason = "needs a browser: pip install playwright, and Debian's package chromium"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip(reason)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """The page as a visitor sees it."""

    def __init__(self, browser, url):
        self.page = browser.new_page(viewport=dict(width=1280, height=900))
        self.page.set_default_timeout(30_000)
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(error))
        self.page.goto(url)

    def picture(self):
        return self.page.locator("#picture img")

    def see(self, before=None):
        """The address of the picture, once it is there and another one than before."""
        self.picture().wait_for()
        self.page.wait_for_function(
            "before => { const image = document.querySelector('#picture img');"
            " return image && image.complete && image.naturalWidth > 800 && image.src !== before; }", arg=before)
        return self.picture().get_attribute("src")

    def upload(self, path):
        self.page.locator("#photograph input[type=file]").set_input_files(path)

    def prediction(self):
        return self.page.locator("#prediction").inner_text()


@pytest.fixture
def page(browser, server):
    page = Page(browser, server.url)
    yield page
    assert page.errors == []
    assert all(url.startswith((server.url, "data:", "blob:")) for url in page.requests), page.requests
    page.page.close()


def test_visitor_sees_a_drawn_bird_and_moves_everything(page, bird, weights):
    first = page.see()  # the page opens with an example
    page.upload(bird)
    seen = page.see(first)
    name = next(iter(expected(weights, bird)))
    page.page.locator("#prediction", has_text=name).wait_for()
    assert page.prediction().count("%") == 5

    for label, keys in (("Entropy gate", "Home"), ("Attention width", "End")):
        slider = page.page.locator("input[type=range]").and_(page.page.get_by_label(label, exact=False))
        slider.focus()
        slider.press(keys)
        seen = page.see(seen)
    page.page.get_by_label("Partition").click()
    page.page.get_by_role("option", name="all").click()
    page.see(seen)
    chances = expected(weights, bird, threshold=0, width=3, partition="all")
    page.page.locator("#prediction", has_text=next(iter(chances))).wait_for()


def test_visitor_drags_a_slider(page):
    seen = page.see()
    slider = page.page.locator("input[type=range]").nth(1)
    box = slider.bounding_box()
    page.page.mouse.move(box["x"] + box["width"] * 0.27, box["y"] + box["height"] / 2)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2, steps=8)
    page.page.mouse.up()
    page.see(seen)


def test_visitor_returns_to_photographs_of_the_gallery(page, bird, weights):
    gallery = page.page.locator("#gallery .gallery-item")
    seen = page.see()
    assert gallery.count() == 6  # the drawn birds
    gallery.nth(1).click()
    seen = page.see(seen)
    page.upload(bird)
    uploaded = page.see(seen)
    page.page.locator("#prediction", has_text=next(iter(expected(weights, bird)))).wait_for()
    answer = page.prediction()
    gallery.nth(6).wait_for()

    gallery.nth(2).click()
    seen = page.see(uploaded)
    assert gallery.count() == 7, "only uploads are added"
    gallery.first.click()  # the newest comes first
    page.see(seen)
    page.page.locator("#prediction", has_text=next(iter(expected(weights, bird)))).wait_for()
    assert page.prediction() == answer


def test_gallery_keeps_the_drawn_birds_and_the_newest_uploads(script, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(script.MAX_GALLERY + 2)]
    for path in paths:
        path.touch()
    drawn, shown = [str(path) for path in paths[:script.EXAMPLES]], None
    for path in paths[script.EXAMPLES:]:
        shown, seen = script.add_photograph(str(path), shown or drawn)
        assert shown == seen
    assert shown == [*map(str, reversed(paths[script.EXAMPLES + 2:])), *drawn]
    assert script.add_photograph(shown[1], shown)[0] == shown
    assert script.add_photograph(None, shown)[0] == shown, "the page was emptied"

    Path(shown[2]).unlink()
    assert script.add_photograph(None, shown)[0] == [*shown[:2], *shown[3:]]
    for index in (2, len(shown), -1, "0", None):
        with pytest.raises(gradio.Error):
            script.choose_photograph(shown, gradio.SelectData(None, dict(index=index, value=None)))
    assert script.choose_photograph(shown, gradio.SelectData(None, dict(index=0, value=None))) == shown[0]


def test_visitor_uploads_a_photograph(page, weights):
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"{PHOTOGRAPHS} holds the photographs, and is not there")
    path = sorted(PHOTOGRAPHS.glob("*/*.jpg"))[7]
    first = page.see()
    page.upload(path)
    page.see(first)
    page.page.locator("#prediction", has_text=next(iter(expected(weights, path)))).wait_for()


def test_visitor_is_told_of_a_bad_file_and_goes_on(page, bird, tmp_path):
    def dismiss(path):
        toast = page.page.locator(".toast-body", has_text=path.name)
        toast.wait_for()
        assert toast.inner_text().count(path.name) == 1, "said once"
        toast.locator(".toast-close").click()
        toast.wait_for(state="detached")

    page.see()
    for path in write_bad_files(tmp_path)[::4]:  # one that is no image, one of a shape that is refused
        page.upload(path)
        dismiss(path)
        page.picture().wait_for(state="detached")  # nothing of another photograph beside it
        assert page.prediction().count("%") == 0
        page.upload(bird)
        seen = page.see()

    large = tmp_path / "large.png"
    large.write_bytes(bytes(21 * MEGABYTE))
    page.upload(large)
    dismiss(large)
    page.upload(bird)
    page.see()
    page.page.locator("input[type=range]").nth(1).press("End")
    page.see(seen)
