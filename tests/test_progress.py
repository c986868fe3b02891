"""Progress bars without a terminal."""

import io
import sys

from support import progress as module
from support.progress import progress
from tqdm import tqdm


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_one_line_at_the_end(capsys):
    assert list(progress(range(2000), desc="test")) == list(range(2000))
    log = capsys.readouterr().err
    assert len(log.splitlines()) == 1
    assert "test" in log
    assert "2000/2000" in log
    assert "\r" not in log


def test_a_log_gets_a_line_whenever_the_interval_is_over(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    bar = progress(total=100, desc="train", mininterval=0)
    for step in range(100):
        now[0] += 1
        bar.update()
        bar.set_postfix(loss=step)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/100")[0].split()[-1] for line in lines] == ["30", "60", "90", "100"]
    assert "loss=98" in lines[-1] or "loss=99" in lines[-1]
    bar.close()
    assert capsys.readouterr().err == "", "closed twice"


def test_other_processes_say_nothing(capsys):
    assert sum(progress([1, 2, 3], disable=True)) == 6
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress(range(3))
    assert type(bar) is tqdm
    list(bar)
    assert "\r" in sys.stderr.getvalue()
