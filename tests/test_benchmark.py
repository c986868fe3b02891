import json

import pytest
from scripts import command, run

SMALL = ("--backbone", "test_resnet", "--sizes", 64, "-b", 2, "--peaks", 5, "--workers", 0, "--seconds", 0.01,
         "--min-rounds", 1, "--max-rounds", 1, "--cpu-threads", 1)


def test_sections_measure_what_they_say(tmp_path):
    output = tmp_path / "speed.json"
    printed = run(command("benchmark.py", "stage", "model", "data", *SMALL, "--output", output))
    results = json.loads(output.read_text())
    assert [row["kind"] for row in results["stage"]] == ["forward", "forward + backward"]
    # time is not to be trusted in a test, the outputs of what is timed side by side are: loops, and our stage
    assert all(row["largest_difference"] < 1e-3 for row in results["stage"])
    # of three passes one is held at a time in a forward, and all in a training step
    forward, training = (row["megabytes"] for row in results["model"])
    assert 0 < forward < training
    assert results["data"][0]["steps"] == 1
    assert 0 < results["data"][0]["computes_percent"] <= 100
    assert "soak" not in results
    assert "times bare" in printed


@pytest.mark.parametrize(("words", "message"), [
    (["rungs"], "unknown section 'rungs'"),
    (["stage", "--peaks", "101"], "can be 100 at most"),
    (["--seconds", "0"], "--seconds must be positive"),
    (["--backbone", "no_such_model"], "is not a timm model"),
])
def test_wrong_arguments_are_named(words, message):
    assert message in run(command("benchmark.py", *words), ok=False)
