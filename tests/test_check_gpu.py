"""examples/check_gpu.py, which is for a GPU, on the CPU."""

import json

import check_gpu
import pytest
import torch


def test_every_section_is_measured_and_kept(tmp_path, capsys):
    words = ["--device", "cpu", "--small", "--output", str(tmp_path / "check.json")]
    assert check_gpu.main(words) == 0
    results = json.loads((tmp_path / "check.json").read_text())
    assert set(check_gpu.SECTIONS) < set(results)
    assert all(row["difference"] == 0 for row in results["parity"]), "the CPU differs from itself"
    assert {row["what"] for row in results["parity"]} >= {"peaks", "joint", "gradients", "grids", "beta"}
    assert [row["kind"] for row in results["samplers"]] == ["forward", "forward + backward"]
    assert {(row["precision"], row["kind"]) for row in results["model"]} == {
        (precision, kind) for precision in ("float32", "bf16") for kind in ("forward", "training step")}
    assert [row["classes"] for row in results["memory"]] == [10_000, 10_000]
    assert all(row["megabytes"] > 0 for row in results["memory"])
    assert "times plain" in capsys.readouterr().out


def test_a_device_that_computes_otherwise_fails(tmp_path, monkeypatch, capsys):
    run, calls = check_gpu.run_stage, []

    def wrong(x, response):
        calls.append(x.device)
        parts = run(x, response)
        return dict(parts, grids=parts["grids"] + 0.01 * (len(calls) > 1))

    monkeypatch.setattr(check_gpu, "run_stage", wrong)
    assert check_gpu.main(["parity", "--device", "cpu", "--small"]) == 1
    assert "differ in grids." in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["rungs"], "unknown section 'rungs'"),
    (["--backbone", "no_such_model"], "is not a timm model"),
    (["--device", "cpu", "--seconds", "0"], "--seconds must be positive"),
])
def test_wrong_arguments_are_named(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        check_gpu.main(words)
    assert message in capsys.readouterr().err


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        check_gpu.main([])
    assert "torch sees no GPU here" in capsys.readouterr().err
