"""TileLang's decode kernels, compiled for sm_90a without a GPU: no register is spilled, states move
16 bytes at a time, calls bind their arguments. test_decode.py checks on a GPU what they compute."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from gdn.problem import Step
from gdn.testing.decode import STEPS, StepCase, as_step, make_step

tilelang = pytest.importorskip("tilelang")
if shutil.which("nvcc") is None:
    pytest.skip("no nvcc", allow_module_level=True)

from gdn.backends.tilelang.compile import TARGET  # noqa: E402
from gdn.backends.tilelang.decode.kernel import decode_kernel  # noqa: E402
from gdn.backends.tilelang.decode.plan import DecodePlan  # noqa: E402

NO_SPILLS = ["-Xptxas", "--warn-on-spills,--warning-as-error"]
LAYERS = [
    StepCase(
        f"{states}-{str(pool).removeprefix('torch.')}-{'VK' if v_first else 'KV'}",
        B=states // 8, HV=8, K=128, V=128, dtype=torch.bfloat16, pool=pool, fused=True,
        state_v_first=v_first,
    )
    for states in (8, 512)
    for pool in (torch.float32, torch.bfloat16)
    for v_first in (False, True)
]  # fmt: skip
DRAFTED = StepCase("drafted", lengths=(2, 1, 3), slots="each", dtype=torch.float16, fused=True)
UNALIGNED = StepCase("unaligned", B=2, padding=3, dtype=torch.float16, state_v_first=True)
CHANNELS = [
    replace(case, name=f"channels-{case.name}", per_channel=True, gate_lower_bound=bound)
    for case, bound in ((LAYERS[0], None), (LAYERS[5], -5.0), (LAYERS[6], None))
]
WIDE = [replace(case, name=f"wide-{case.name}", V=256) for case in LAYERS[4:6]]
OLMO = [replace(case, name=f"olmo-{case.name}", K=96, V=192) for case in LAYERS]
CASES = {case.name: case for case in (*LAYERS, DRAFTED, UNALIGNED, *CHANNELS, *WIDE, *OLMO)}


def plan_of(case: StepCase) -> tuple[DecodePlan, Step]:
    step = as_step(make_step(case))
    return DecodePlan(step), step


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(name: str) -> None:
    case = CASES[name]
    plan, _ = plan_of(case)
    assert plan.wide == (case is not UNALIGNED)
    program = decode_kernel.build(**plan.statics, shape=plan.shapes[plan.wide], wide=plan.wide)
    compiled = tilelang.compile(
        program, target=TARGET, execution_backend="tvm_ffi", compile_flags=NO_SPILLS
    )
    source = compiled.get_kernel_source()
    assert ("load_global_128((&(state[" in source) == plan.wide
    assert ("store_global_128((&(state[" in source) == plan.wide
    if case.per_channel:
        assert "load_global_128((&(g_[" in source
        assert "load_global_128((&(bias[" in source


@pytest.mark.parametrize("name", ["one-token", "packed", "speculative", "channels"])
def test_calls_bind_their_arguments(name: str) -> None:
    """Shapes, strides and dtypes are accepted, down to the device."""
    case = next(case for case in STEPS if case.name == name)
    plan, step = plan_of(replace(case, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="input q device_type mismatch"):
        plan.decode(step)
