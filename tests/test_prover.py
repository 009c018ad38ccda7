"""Compiles without Z3's theory of integers: the code is the same, and no other compile sees it."""

from __future__ import annotations

import os
import re
import signal
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("tilelang")
import tilelang
import z3
from gdn.backends.tilelang import BACKEND, compile, prover
from processes import fork

from gdn import calls
from gdn.testing import Case, make_inputs

HEADS: dict[str, Any] = {"H": 2, "HV": 4, "K": 128, "V": 128, "dtype": torch.bfloat16}
CASE = Case("compile", T=70, l2norm=True, gates="model", **HEADS)


def source(function: Any) -> tuple[str, str]:
    """The CUDA source of a kernel and the C source of its host function, with names in the order
    in which they appear. TileLang places buffers that no rule orders by addresses, so their places
    are left out."""
    target = tilelang.tvm.target.Target(compile.TARGET)
    with tilelang.tvm.transform.PassContext(opt_level=3, config=compile._OWN_BARRIERS), target:
        made = tilelang.lower(function, target=target, enable_host_codegen=True)
    return rename(made.kernel_source), rename(made.rt_mod.inspect_source())


def rename(text: str) -> str:
    names: dict[str, str] = {}
    places = [x for x in text.splitlines() if "buf_dyn_shmem" in x]
    for line in places:
        if declared := re.match(r"\s*\S+ (\w+) = ", line):
            names[declared.group(1)] = "buffer"
    return re.sub(
        r"\b[A-Za-z_]\w*\b",
        lambda found: names.setdefault(found.group(), f"NAME{len(names)}"),
        "\n".join(x for x in text.splitlines() if x not in places),
    )


KERNELS = ("prepare", "scan", "gate_sums", "recompute_states", "reverse_scan", "gradients")


@pytest.mark.parametrize("name", KERNELS)
def test_the_source_is_the_same_without_integers(name: str) -> None:
    inputs = make_inputs(CASE, "meta")
    tokens = [inputs.pop(x) for x in ("q", "k", "v", "g", "beta")]
    jobs = BACKEND.jobs(calls.make(*tokens, inputs, False), True)
    kernel, statics = next(job for job in jobs if job[0].name == name)
    function = kernel.compiled.build(**statics)
    usual, quick = set(), set()
    for _ in range(3):  # once in fifty compiles TileLang writes another order
        usual.add(source(function))
        with prover.without_integers():
            assert z3.get_param(prover.SETTING) == prover.WITHOUT
            quick.add(source(function))
        if usual & quick:
            break
    assert usual & quick
    assert z3.get_param(prover.SETTING) != prover.WITHOUT


def test_kernels_that_place_their_own_barriers_compile_without_integers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `compile.kernel` sets is what TVM's passes ask Z3 with."""
    seen: list[tuple[str, bool]] = []

    def lower(*_: Any, **__: Any) -> None:
        other = prover._OtherCompile()  # TVM makes one at the begin of a compile
        other.finish(None)
        seen.append((z3.get_param(prover.SETTING), other.counted))

    monkeypatch.setattr(compile.tilelang, "compile", lower)
    compile.kernel(lambda: None, own_barriers=True)()
    compile.kernel(lambda: None)()
    assert seen == [(prover.WITHOUT, False), ("6", True)]


def test_another_compile_waits_and_has_all_of_z3() -> None:
    seen: list[str] = []

    def compile_other() -> None:
        session = prover._OtherCompile()
        seen.append(z3.get_param(prover.SETTING))
        session.finish(None)

    other = threading.Thread(target=compile_other)
    with prover.without_integers():
        prover._OtherCompile().finish(None)  # of this thread: it does not wait for itself
        other.start()
        other.join(0.2)
        assert other.is_alive()
        assert not seen
    other.join(30)
    assert seen == ["6"]


def test_kernels_compile_as_usual_beside_another_compile() -> None:
    session = prover._OtherCompile()
    with prover.without_integers():
        assert z3.get_param(prover.SETTING) == "6"
    session.finish(None)
    with prover.without_integers(), prover.without_integers():
        assert z3.get_param(prover.SETTING) == "0"
    assert z3.get_param(prover.SETTING) == "6"


def test_the_outer_of_two_stays_without_integers() -> None:
    with prover.without_integers():
        with prover.without_integers():
            pass
        assert prover._here.quick


def test_a_fork_has_all_of_z3_and_waits_for_nobody() -> None:
    inside, done = threading.Event(), threading.Event()

    def compile_slowly() -> None:
        with prover.without_integers():
            inside.set()
            done.wait(60)

    other = threading.Thread(target=compile_slowly)
    other.start()
    assert inside.wait(60)

    def compile_both_ways() -> None:
        signal.alarm(30)
        prover._OtherCompile().finish(None)
        with prover.without_integers():
            assert z3.get_param(prover.SETTING) == "0"
        assert z3.get_param(prover.SETTING) == "6"

    process = fork(compile_both_ways)
    done.set()
    other.join(60)
    assert os.waitpid(process, 0)[1] == 0
    assert z3.get_param(prover.SETTING) == "6"
