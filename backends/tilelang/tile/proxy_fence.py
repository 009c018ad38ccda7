"""Fences between what threads write to shared memory and what products and copies read there.

TileLang puts one before every product that follows any other access to shared memory, a load too.
Each makes a warp wait until all its stores are done, 50 cycles of a walk's chunk. The walks do
without those and say where they need one.
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
"""CUDA that goes before a kernel, after which TileLang's own fences are none."""


@T.macro
def fence() -> None:
    """What this thread wrote, products and copies see after the next barrier."""
    T.call_extern("handle", "gdn_fence")
