"""The examples run and print what their docstrings promise."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import models
import pytest
import torch

import gdn

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    """An example as a module; examples are not installed. They import their neighbours."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("cached", "drafts"), [(0, 0), (3, 3)], ids=["plain", "reuse-guess"])
def test_serving_together_equals_serving_alone(
    backend: str, device: str, cached: int, drafts: int
) -> None:
    """Seven requests on three rows, against one at a time: continuous batching alone, and with what
    the backend can of cached prefixes and speculative steps."""
    generate = load("generate")
    torch.manual_seed(0)
    model = generate.Model(2, 32, 1, 2, 16, 16).to(device)
    able = generate.find_features(model)[backend]
    if "steps" not in able or (cached and len(able) == 1):
        pytest.skip(f"{backend} does not claim these steps")
    cached, drafts = cached * ("prefixes" in able), drafts * ("drafts" in able)
    written = []
    for slots, *options in ((3, cached, drafts), (1, 0, 0)):
        requests = generate.make_requests(7, 70, 6, shared=64 if cached else 0)
        server = generate.Server(model, slots, *options)
        with gdn.use_backend(backend):
            server.serve(requests)
        prompts = sum(len(request.prompt) for request in requests)
        assert server.prefill.tokens + server.reused == prompts
        assert server.decode.tokens == sum(request.length - 1 for request in requests)
        assert (server.reused >= 4 * 64) == (options[0] > 0)  # all but the first three
        assert (server.guessed > 0) == (options[1] > 0)
        written.append([request.written for request in requests])
        assert all(len(r.written) == r.length for r in requests)
    assert written[0] == written[1]


def test_tokens_are_those_of_requests_alone(capsys: pytest.CaptureFixture[str]) -> None:
    generate = load("generate")
    options = ["--requests", "6", "--slots", "4", "--prompt", "70", "--length", "5"]
    generate.main([*options, "--backends", "torch", "--batch-invariant"])
    assert "6 of 6 requests as alone" in capsys.readouterr().out


def test_generate_prints_a_line_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    generate = load("generate")
    options = ["--requests", "2", "--slots", "2", "--prompt", "9", "--length", "3"]
    generate.main([*options, "--backends", "torch"])
    assert "torch: prefill" in capsys.readouterr().out


def test_qwen_runs_by_itself_on_a_cpu() -> None:
    """Without a download, and gdn generates the same tokens as transformers."""
    models.modelling("qwen3_5")
    command = [sys.executable, str(EXAMPLES / "qwen.py"), "--length", "4", "--repeats", "1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    rows = [line for line in ran.stdout.splitlines() if line.startswith("| 1 x 512 | 4 |")]
    assert [row.split(" | ")[2] for row in rows] == ["unpatched", "gdn"]
    assert all(row.endswith("| 4 of 4 |") for row in rows)


@pytest.mark.parametrize("what", ["stack", "checkpoint"])
def test_qwen_stacks_layers_and_loads_checkpoints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, what: str
) -> None:
    models.modelling("qwen3_5")
    models.make_plain(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    qwen = load("qwen")
    if what == "stack":
        monkeypatch.setattr(qwen, "QWEN_4B", qwen.QWEN_4B | {"hidden_size": 64})
        options = ["--stack", "2", "--prompt", "9", "70"]
        expected = ["1 x 9", "1 x 9", "1 x 70", "1 x 70"]
    else:
        models.make_model("qwen3_5", "cpu").save_pretrained(tmp_path)
        models.make_tokenizer().save_pretrained(tmp_path)
        options = ["--model", str(tmp_path), "--text", "w3 w4 w5", "--batch", "2", "--compile"]
        expected = ["2 x 3"] * 4
    qwen.main([*options, "--length", "3", "--repeats", "1", "--backend", "torch"])
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.endswith("| 3 of 3 |")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == expected
    engines = [row.split(" | ")[2] for row in rows]
    assert (engines[2:] == ["unpatched, compiled", "gdn, compiled"]) == (what == "checkpoint")
    assert (" w" in out.splitlines()[-1]) == (what == "checkpoint")
    with pytest.raises(SystemExit):
        qwen.main(["--text", "Why?"])


@pytest.mark.parametrize(("gates", "steps"), [("head", 300), ("channel", 150)])
def test_recall_is_learned(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    gates: str,
    steps: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recall = load("train_recall")
    picture = tmp_path / "curves.png"
    options = ["--backends", "torch", "--gates", gates]
    assert recall.main([*options, "--steps", str(steps), "--plot", str(picture)]) == 0
    assert "torch: loss 0.0" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    assert recall.main([*options, "--steps", "3"]) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("gates", ["head", "channel"])
def test_recall_is_learned_alike_by_every_backend(gates: str) -> None:
    recall = load("train_recall")
    assert {"triton", "torch"} <= set(recall.able("cuda", gates))
    assert recall.main(["--gates", gates]) == 0


def test_hybrid_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = ["--width", "64", "--layers", "4", "--length", "64", "--batch", "2", "--steps", "3"]
    picture, file = tmp_path / "curves.png", tmp_path / "curves.json"
    hybrid = load("train_hybrid")
    hybrid.main([*sizes, "--backends", "torch,auto", "--json", str(file), "--plot", str(picture)])
    report = json.loads(file.read_text())
    losses, again = (report["runs"][name]["losses"] for name in ("torch", "auto"))
    assert len(losses) == 3
    assert again == pytest.approx(losses, abs=1e-3)
    assert len(set(losses)) == 3
    assert all(report["best_loss"] < loss < 6 for loss in losses)  # log 64 is 4.2
    out = " ".join(capsys.readouterr().out.split())
    assert f"{report['parameters']:,} parameters" in out
    (printed,) = re.findall(r"torch: loss (\d+\.\d+)", out)
    assert float(printed) == pytest.approx(sum(losses) / 3, abs=2e-4)  # four digits of each
    assert picture.stat().st_size > 10_000
    monkeypatch.setattr(hybrid, "train", None)  # not called
    hybrid.main([*sizes, "--backends", "auto,torch", "--runs", str(file)])
    assert f"torch: loss {printed} at the end" in " ".join(capsys.readouterr().out.split())
    for wrong, why in (
        (["--steps", "2"], "must have 2 steps"),
        (["--json", "x"], "of this machine"),
    ):
        with pytest.raises(SystemExit):
            hybrid.main([*sizes, *wrong, "--runs", str(file)])
        assert why in capsys.readouterr().err


def test_exact_predictor_of_the_chains_of_the_hybrid() -> None:
    """With one successor it misses at the first visit of each token alone. Its loss falls to the
    entropy of four shares, 1/2 + 1/3 + 1/4, as chains become long."""
    load("train_hybrid")
    markov = sys.modules["markov"]
    generator = torch.Generator().manual_seed(0)
    chains, held = markov.make_chains(32, 65, 16, 1, generator)
    misses = [len(set(chain[:-1].tolist())) for chain in chains]
    expected = sum(n * math.log(h) for n, h in zip(misses, held.tolist(), strict=True))
    assert markov.best_loss(chains, held, 1) == pytest.approx(expected / 32 / 64, rel=1e-5)
    chains, held = markov.make_chains(64, 4001, 8, 4, generator)
    assert all(len(set(c.tolist())) <= h for c, h in zip(chains, held.tolist(), strict=True))
    assert markov.best_loss(chains, held, 4) == pytest.approx(13 / 12, abs=0.05)


def test_long_training_has_the_losses_of_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    """Over gloo, and over NCCL with a GPU for each process."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = ["--steps", "3", "--sequences", "2", "--pairs", "8"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(EXAMPLES / "train_long.py"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in one.items():
        monkeypatch.setenv(name, str(value))
    load("train_long").main(options)
    lines = [text.strip().splitlines()[-1] for text in (out.stdout, capsys.readouterr().out)]
    losses = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in lines]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # printed with four digits
    assert abs(losses[0][1] - losses[0][0]) > 0.01
