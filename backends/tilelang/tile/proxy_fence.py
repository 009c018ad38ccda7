"""Fences that let WGMMA and TMA read what threads wrote to shared memory.

TileLang places a fence before every product that follows any other access to shared memory, even a
load. A fence makes a warp wait for all its stores: 50 cycles a chunk in a scan. The scans switch
TileLang's fences off and place their own.
"""

import tilelang.language as T

PRELUDE = """
#include <tl_templates/cuda/barrier.h>
__device__ __forceinline__ void gdn_fence() { tl::fence_proxy_async(); }
namespace tl {
__device__ __forceinline__ void gdn_no_fence() {}
}
#define fence_proxy_async gdn_no_fence
"""
"""CUDA that goes before a kernel: it makes TileLang's own fences do nothing."""


@T.macro
def fence() -> None:
    """Make this thread's stores to shared memory visible to the products and copies that follow the
    next barrier."""
    T.call_extern("handle", "gdn_fence")
