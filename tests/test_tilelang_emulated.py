"""What TileLang's kernels compute, without a GPU: `hopper` runs the generated CUDA on the CPU. The
op is compared with the definition, in two worlds: in the early one, copies and products happen at
once; in the late one, only when the kernels wait for them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_agreement
import test_close_keys
import test_decode
import test_distributed
import test_padded_packs
import test_strided_inputs
import torch
from hopper import emulate
from support import assert_close, compile_together, poisoned_memory, run, truth  # noqa: F401
from test_float16_ranges import LARGE_STATES, LARGE_VALUES, RAW_ROWS, check_ranges

import gdn
from gdn.testing import CASES, CLOSE_KEYS, Case, make_inputs, with_gradients
from gdn.testing.decode import STEPS

pytest.importorskip("tilelang")
if shutil.which("nvcc") is None or shutil.which("g++") is None:
    pytest.skip("no nvcc or no g++", allow_module_level=True)

from gdn.backends.common import chunking
from gdn.backends.tilelang import TileLangBackend, piece_lengths, streams
from gdn.backends.tilelang import memory_rounds as rounds
from gdn.backends.tilelang import plan as tilelang_plan
from gdn.backends.tilelang.backward import plan as backward
from gdn.backends.tilelang.decode import plan as decode
from gdn.backends.tilelang.forward import pieces
from gdn.backends.tilelang.forward import plan as forward
from gdn.backends.tilelang.kernels import Job
from test_agreement import same_dtype  # noqa: F401

from gdn.problem import Call

SUITE = {
    "head-dim-128": torch.bfloat16,
    "correlated-keys": torch.float16,
    "strong-decay": torch.bfloat16,  # dbeta as the difference of large numbers
    "wide-values": torch.bfloat16,
    "olmo-head-dims": torch.bfloat16,
}
CHECKED = [replace(case, dtype=SUITE[case.name]) for case in CASES if case.name in SUITE]
CHECKED += [
    Case(
        "three-packed-fused", lengths=(33, 0, 128, 5), H=1, HV=3, dtype=torch.bfloat16,
        state_v_first=True, fused=True,
    )
]  # fmt: skip
LARGE = Case("two-warpgroups", T=100, B=17, HV=4, K=128, V=128, dtype=torch.bfloat16)
CUT = replace(LARGE, name="cut", T=1550, B=1, H=1, HV=2, gates="weak")
GROUPED = Case(
    "grouped", T=250, H=2, HV=4, K=128, V=128, dtype=torch.bfloat16, fused=True, gates="model"
)
ALONE = replace(GROUPED, name="alone", H=3, HV=3, T=200, fused=False)
DECODED = (
    "one-token", "packed", "speculative", "float16-pool", "padded-pack", "padded-pack-out",
    "sixteen-tokens", "no-leading-column-packed", "last-elsewhere", "each-elsewhere",
    "wide-values", "olmo-head-dims",
)  # fmt: skip
SUMMARY = replace(CHECKED[0], T=70, H=1, HV=2)  # with kernels that other tests compile too
WORLDS = pytest.mark.parametrize("late", [False, True], ids=["early", "late"])


class Emulated(TileLangBackend):
    """The backend, with its kernels on the CPU."""

    name = "emulated"
    capabilities = replace(TileLangBackend.capabilities, devices=("cpu",), min_sm=None, max_sm=None)


def three_blocks(call: Any, chunks: int) -> tuple[int, int]:
    """The launch of `prepare` for a call with many chunks a thread block."""
    H, HV = call.q.shape[2], call.v.shape[2]
    return min(3, chunks * H), HV // H


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernels of all tests are compiled."""
    return tmp_path_factory.mktemp("hopper")


@pytest.fixture
def world(
    folder: Path, clean_registry: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """A function that registers the backend in the late or the early world. `edit` changes the CUDA
    of its kernels; the warp `slow` runs only when all others wait."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(streams, "_aside", lambda device: stream)
    # few SMs: a thread block takes many chunks
    monkeypatch.setattr("gdn.backends.tilelang.backward.jobs.sm_count", lambda device: 3)
    monkeypatch.setattr(forward, "choose_prepare_grid", three_blocks)

    def enter(late: bool, edit: Callable[[str], str] = str, slow: int = -1) -> None:
        def entries(jobs: list[Job]) -> list[Callable[..., None]]:
            return [emulate(kernel, folder, late, edit, slow) for kernel in compile_together(*jobs)]

        for module in (forward, backward, decode):
            monkeypatch.setattr(module, "launchers", entries)
        monkeypatch.setattr(tilelang_plan, "compile_all", lambda needed, every: None)
        gdn.register_backend(Emulated(), replace=True)

    return enter


@WORLDS
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_agrees_with_the_definition(
    request: pytest.FixtureRequest,
    world: Callable[..., None],
    case: Case,
    late: bool,
    same_dtype: str,  # noqa: F811
) -> None:
    """Outputs and all gradients, as the shared suite has it."""
    world(late)
    test_agreement.test_agrees_with_the_definition(request, "emulated", case, "cpu", same_dtype)


def check(case: Case, inputs: dict[str, Any]) -> None:
    expected = truth(case)
    for name, value in run("emulated", case, inputs).items():
        assert_close(name, value, expected[name], case.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cosine-1-beta-2", "long-equal-keys"])
def test_close_keys_cost_no_more_than_rounding(
    world: Callable[..., None], name: str, dtype: torch.dtype
) -> None:
    world(late=True)
    (case,) = (replace(case, dtype=dtype) for case in CLOSE_KEYS if case.name == name)
    test_close_keys.check_against_rounding("emulated", case, with_gradients(make_inputs(case)))


@pytest.mark.parametrize("case", [RAW_ROWS, LARGE_STATES, LARGE_VALUES], ids=lambda case: case.name)
def test_float16_ranges(world: Callable[..., None], case: Case) -> None:
    world(late=True)
    check_ranges("emulated", case)


def test_float16_ranges_in_pieces(
    world: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    world(late=False)
    for module in (pieces, piece_lengths):
        monkeypatch.setattr(module, "piece_length", lambda call, rows: 64)
    check_ranges("emulated", LARGE_STATES)


@WORLDS
def test_two_warpgroups(world: Callable[..., None], late: bool) -> None:
    world(late)
    check(LARGE, make_inputs(LARGE))


@WORLDS
@pytest.mark.parametrize("initial", [False, True])
def test_prepare_runs_beside_the_scan_of_the_segment_before(
    world: Callable[..., None], monkeypatch: pytest.MonkeyPatch, late: bool, initial: bool
) -> None:
    world(late)
    monkeypatch.setattr(forward, "MIN_SEGMENT_CHUNKS", 2)
    case = replace(LARGE, T=300, B=2, initial_state=initial)
    check(case, make_inputs(case))


@WORLDS
def test_pieces_scanned_in_parallel(world: Callable[..., None], late: bool) -> None:
    """Forward and backward."""
    world(late)
    check(CUT, with_gradients(make_inputs(CUT)))


@WORLDS
def test_long_pieces_are_halved(
    world: Callable[..., None], monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    world(late)
    monkeypatch.setattr(pieces, "MIN_HALF_PIECE_CHUNKS", 1)
    inputs = make_inputs(CUT)
    assert forward.choose_pieces(Call(**{"scale": 1.0} | inputs), False) == (256, 2)
    check(CUT, inputs)


@pytest.mark.parametrize(
    ("B", "T", "initial", "shares"),
    [(1, 250, True, (1, 4)), (2, 190, False, (1, 2)), (5, 70, True, (2, 1))],
    ids=["parts", "sequences-and-parts", "sequences"],
)
def test_backward_in_rounds(
    world: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    B: int,
    T: int,
    initial: bool,
    shares: tuple[int, int],
) -> None:
    world(late=False)
    monkeypatch.setattr(rounds, "MIN_ROUND_BYTES", 1)
    monkeypatch.setattr(rounds, "sm_count", lambda device: 3)
    case = replace(GROUPED, B=B, T=T, initial_state=initial)
    inputs = with_gradients(make_inputs(case))
    assert rounds.round_shape(Call(**{"scale": 1.0} | inputs)) == shares
    check(case, inputs)


@pytest.mark.parametrize("case", [GROUPED, ALONE], ids=lambda case: case.name)
@pytest.mark.parametrize("slow", [0, 5, 8, 9, 10, 12, 13, 14])
def test_a_warp_may_be_slow(world: Callable[..., None], slow: int, case: Case) -> None:
    """Warps of every role; in `gradients` those of all warpgroups, the producer and a dv warp."""
    world(late=True, slow=slow)
    check(case, with_gradients(make_inputs(case)))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pieces"])
def test_tokens_past_the_last_sequence(
    world: Callable[..., None], monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    """Outputs and gradients there are zero."""
    world(late=False)
    if cut:
        monkeypatch.setattr(chunking, "MIN_PIECE_CHUNKS", 1)
    case = Case("padded", lengths=(33, 0, 130), H=1, HV=2, dtype=torch.bfloat16, fused=True)
    test_padded_packs.check("emulated", case, "cpu", 100)


@pytest.mark.parametrize("name", ["projected", "heads_first"])
def test_strides_do_not_matter(world: Callable[..., None], name: str) -> None:
    world(late=False)
    change = getattr(test_strided_inputs, name)
    test_strided_inputs.test_strides_do_not_matter(
        "emulated", "cpu", torch.bfloat16, CHECKED[-1], change
    )


@pytest.mark.parametrize("name", DECODED)
def test_decode_agrees_with_the_definition(world: Callable[..., None], name: str) -> None:
    world(late=False)
    case = next(case for case in STEPS if case.name == name)
    test_decode.test_agrees_with_the_definition("emulated", "cpu", case, torch.bfloat16)


@WORLDS
def test_summaries_of_context_parallelism(world: Callable[..., None], late: bool) -> None:
    """N, M and N', which a rank sends."""
    world(late)
    for check_summary in (
        test_distributed.test_a_summary_gives_the_final_state_from_any_state,
        test_distributed.test_a_summary_of_gradients_gives_that_of_the_initial_state,
    ):
        check_summary(SUMMARY, "emulated", "cpu")


SMALL = replace(LARGE, name="small", B=1, T=130)


@pytest.mark.parametrize(
    ("waits", "late"),
    [
        ("k_ready[0].wait((k_loads[0] & 1));", True),
        ("tl::wait_wgmma<0>();", True),
        ("tl::__sync_thread_partial(1, 128);", False),
    ],
    ids=["copy", "product", "threads"],
)
def test_a_missing_wait_shows(world: Callable[..., None], waits: str, late: bool) -> None:
    """The tests above can fail."""
    world(late, lambda source: source.replace(waits, ""))
    with pytest.raises((AssertionError, RuntimeError)):
        check(SMALL, make_inputs(SMALL))


def test_a_store_past_a_tensor_shows(world: Callable[..., None]) -> None:
    world(False, lambda source: source.replace("scan_factors[", "scan_factors[-1 + ", 1))
    with pytest.raises(RuntimeError, match="past a tensor"):
        check(SMALL, make_inputs(SMALL))


def test_a_lost_arrival_is_a_deadlock(world: Callable[..., None]) -> None:
    world(False, lambda source: source.replace("q_ready[0].arrive();", ""))
    with pytest.raises(RuntimeError, match="deadlock"):
        check(SMALL, make_inputs(SMALL))
