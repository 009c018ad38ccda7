"""compile_triton.py SM DTYPE: compile every Triton kernel for sm_<SM>, in bf16, fp16 or fp32.

It needs no GPU. It prints a line for each: name, dtype, bytes of shared memory, registers a thread,
bytes of stack a thread, and instructions that read a uniform register that nothing wrote.
"""

from __future__ import annotations

import re
import sys
import tempfile
from typing import Any

import triton
from gdn.backends.triton.channel_forward import chunk_matrices_kernel, chunk_rows_kernel
from gdn.backends.triton.channel_gradients import channel_gradients_kernel
from gdn.backends.triton.channel_prepare import decay_rows_kernel, prepare_channels_kernel
from gdn.backends.triton.channel_sums import sum_gates_kernel
from gdn.backends.triton.combine_pieces import combine_pieces_kernel
from gdn.backends.triton.decode import COUNTS, decode_kernel
from gdn.backends.triton.forgetting import find_chunks_kernel
from gdn.backends.triton.key_gradients import key_gradients_kernel
from gdn.backends.triton.launch import Stage, choose_configuration, prepared_channels
from gdn.backends.triton.matrix_gradients import matrix_gradients_kernel
from gdn.backends.triton.norm_gradients import norm_gradients_kernel
from gdn.backends.triton.pool import POOL_COUNTS
from gdn.backends.triton.prepare import prepare_kernel
from gdn.backends.triton.query_gradients import query_gradients_kernel
from gdn.backends.triton.reverse_scan import reverse_scan_kernel
from gdn.backends.triton.scan import scan_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from uniform_registers import run_tool, unset_registers

SHARED_MEMORY = {80: 166_912, 90: 232_448}

# Kernel arguments by type. Pointers that are not named here point to the call's dtype.
FLOAT32 = {"transfers", "from_zero", "initial_state", "final_state", "state_in", "state_out"}
FLOAT32 |= {"piece_states", "grad_final", "grad_initial", "factors", "g", "beta", "A_log"}
FLOAT32 |= {"dt_bias", "row_scales", "dG_from_o", "dg", "dbeta", "dA_log", "ddt_bias", "state"}
FLOAT32 |= {"into", "pool", "checkpoints", "channel_decays", "products", "grad_rows", "row_sums"}
INT32 = {"N", "T", "chunks_per_sequence", "pieces_per_sequence", "piece_chunks"}
INT32 |= {"slot_stride", "into_stride", *POOL_COUNTS, *COUNTS}
TABLES = {"cu_seqlens", "indices", "accepted", "written"}
TABLES |= {"checkpoint_offsets", "checkpoint_indices", "first_chunks", "found"}

# Constants. A kernel takes those that it names.
COMMON: dict[str, Any] = {"H": 16, "HV": 32, "K": 128, "V": 128, "C": 64, "BK": 128, "VARLEN": True}
COMMON |= {"L2_NORM": True, "FUSED_GATE": True, "LOWER_BOUND": None, "FUSED_SIGMOID": True}
COMMON |= {"BETA_SCALE": 1.0, "SAVE": True, "POOL": False, "CHANNELS": False, "BD": 32}
COMMON |= {"WEAK": False}
COMMON |= {"Q_STRIDES": (0, 2048, 128), "K_STRIDES": (0, 2048, 128), "V_STRIDES": (0, 4096, 128)}
COMMON |= {"G_STRIDES": (0, 32, 1), "BETA_STRIDES": (0, 32, 1)}
NO_POOL = dict.fromkeys(
    ("pool", "indices", "fresh", "checkpoint_offsets", "checkpoint_indices", "checkpoints")
)
SCAN: dict[str, Any] = {"V_FIRST": False, "HAS_INITIAL": True, "STORE_FINAL": True, "OUTPUT": True}
SCAN |= {"STORE_STATES": False, "TRANSFER": False, "CUT": False, "CLEAR_TAIL": True}
SCAN |= {"first_chunks": None}
SCAN |= {"POOL_V_FIRST": False, "CHECKPOINTS": 0}
POOL_SCAN = SCAN | {"HAS_INITIAL": False, "STORE_FINAL": False, "POOL": True, "CHECKPOINTS": 2}
POOL_SCAN |= {"checkpoints": None}
SCAN |= NO_POOL
TRANSFER_SCAN = {name: x for name, x in SCAN.items() if name != "first_chunks"}
TRANSFER_SCAN |= {"OUTPUT": False, "TRANSFER": True, "CUT": True, "HAS_INITIAL": False}
SCAN_FOR_STATES = SCAN | {"OUTPUT": False, "STORE_STATES": True, "CUT": True, "STORE_FINAL": False}
REVERSE_SCAN: dict[str, Any] = {
    "V_FIRST": False,
    "HAS_GRAD_FINAL": True,
    "STORE_GRAD_INITIAL": True,
}
REVERSE_SCAN |= {"STORE_STATES": True, "CUT": False, "chunks_that_matter": None}
COMBINE: dict[str, Any] = {
    "V_FIRST": False,
    "HAS_STATE_IN": True,
    "STORE_STATE_OUT": True,
    "REVERSE": False,
}
POOL_COMBINE = COMBINE | {"HAS_STATE_IN": False, "STORE_STATE_OUT": False, "POOL": True}
COMBINE |= NO_POOL
DECODE: dict[str, Any] = {"V_FIRST": False, "SPECULATIVE": False, "LEADING": True}
DECODE |= {"FIRST_COLUMN": 1, "UNIT": 8, "CLEAR_TAIL": False}
DECODE |= {"accepted": None, "cu_seqlens": None, "written": None}
SPECULATIVE = {"V_FIRST": False, "SPECULATIVE": True, "LEADING": False, "FIRST_COLUMN": 0}
SPECULATIVE |= {"UNIT": 8, "CLEAR_TAIL": True}
CHANNELS = {"CHANNELS": True, "G_STRIDES": (0, 4096, 128)}
NO_A_LOG = {"A_log": None, "LOWER_BOUND": -5.0}
KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (prepare_kernel, {}),
    (prepare_kernel, NO_A_LOG),
    (scan_kernel, SCAN),
    (scan_kernel, SCAN_FOR_STATES),
    (scan_kernel, TRANSFER_SCAN),
    (find_chunks_kernel, {"REVERSE": True}),
    (scan_kernel, POOL_SCAN),
    (combine_pieces_kernel, COMBINE),
    (combine_pieces_kernel, POOL_COMBINE),
    (reverse_scan_kernel, REVERSE_SCAN),
    (query_gradients_kernel, {}),
    (key_gradients_kernel, {}),
    (decode_kernel, DECODE),
    (decode_kernel, DECODE | {"V_FIRST": True}),
    (decode_kernel, DECODE | {"UNIT": 1}),
    (decode_kernel, SPECULATIVE),
    (decay_rows_kernel, CHANNELS),
    (scan_kernel, SCAN | CHANNELS),
    (scan_kernel, SCAN_FOR_STATES | CHANNELS),
    (reverse_scan_kernel, REVERSE_SCAN | CHANNELS),
    (matrix_gradients_kernel, CHANNELS),
    (channel_gradients_kernel, CHANNELS),
    (channel_gradients_kernel, CHANNELS | NO_A_LOG | {"WEAK": True}),
    (norm_gradients_kernel, CHANNELS),
    (decode_kernel, DECODE | CHANNELS),
]
OTHER_KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (prepare_channels_kernel, CHANNELS),
    (prepare_channels_kernel, CHANNELS | NO_A_LOG | {"WEAK": True}),
]
BFLOAT16_KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (sum_gates_kernel, CHANNELS),
    (sum_gates_kernel, CHANNELS | NO_A_LOG),
    (chunk_matrices_kernel, CHANNELS),
    (chunk_rows_kernel, CHANNELS),
]
"""What float16 and float32 calls run (OTHER_KERNELS), and bfloat16 calls in place of it."""


def type_of(name: str, dtype: str, channels: bool) -> str:
    """Triton's name for the type of a run-time argument."""
    if name in INT32:
        return "i32"
    if name == "scale":
        return "fp32"
    if name in TABLES:
        return "*i32"
    if name == "fresh":
        return "*i1"
    if name == "selectors" or (name == "gate_parts" and dtype != "fp32"):
        return "*bf16"
    if name == "grad_matrices" or (name == "R" and channels):
        return "*bf16" if dtype == "bf16" else "*fp32"
    return "*fp32" if name in FLOAT32 else f"*{dtype}"


def compile_for(sm: int, kernel: Any, flags: dict[str, Any], dtype: str) -> str:
    """One line of the output."""
    name, itemsize = kernel.fn.__name__, {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]
    configuration = choose_configuration(
        name, COMMON["BK"], itemsize, 32, SHARED_MEMORY[sm], "CHANNELS" in flags
    )
    if name == "prepare_channels_kernel":
        flags = flags | {"BD": prepared_channels(COMMON["BK"], itemsize, SHARED_MEMORY[sm])}
    taken = {n: x for n, x in (COMMON | flags).items() if n in kernel.arg_names}
    stage = Stage(kernel, 1, configuration, **taken)
    constants = stage.kernel_constants
    arguments = [n for n in kernel.arg_names if n not in constants]
    signature = {n: type_of(n, dtype, "CHANNELS" in flags) for n in arguments}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if (signature[n].startswith("*") and not kernel.params[i].do_not_specialize_on_alignment)
        or n in ("slot_stride", "into_stride")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"maxnreg": None} | stage.options
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        unset = len(unset_registers(run_tool("nvdisasm", "-c", file.name)))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return f"{name} {dtype} {compiled.metadata.shared} {found[1]} {found[2]} {unset}"


if __name__ == "__main__":
    for kernel, flags in KERNELS + (BFLOAT16_KERNELS if sys.argv[2] == "bf16" else OTHER_KERNELS):
        print(compile_for(int(sys.argv[1]), kernel, flags, sys.argv[2]), flush=True)
