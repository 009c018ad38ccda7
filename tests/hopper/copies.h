// Barriers in memory and TMA; tiles between shared memory and registers.
#pragma once
#include "block.h"

struct CUtensorMap {
  char *data;
  int64_t rank, size, dims[5], strides[5];
  int32_t box[5], swizzled;
};
static_assert(sizeof(CUtensorMap) <= 128);

struct Barrier {
  uint64_t number;
  Mbarrier &state() {
    if (number >= block->mbarriers.size()) fail("a barrier that was not made");
    return block->mbarriers[number];
  }
  void init(int count) {
    number = block->mbarriers.size();
    block->mbarriers.push_back({.count = count, .pending = count});
  }
  void arrive() {
    if (--state().pending < 0) fail("more arrivals than a barrier was made for");
    state().turn(), ++block->moved;
  }
  void arrive(int) { arrive(); } // programs of a cluster do the same: one stands for all
  void expect_transaction(int bytes) { state().bytes += bytes; }
  void arrive_and_expect_tx(int bytes) { expect_transaction(bytes), arrive(); }
  void wait(int parity) {
    until([&] {
      Mbarrier &m = state();
      if (m.parity == parity && !m.pending) { // all that is missing is what was copied late
        auto copies = std::move(m.copies);
        m.copies.clear();
        for (auto &copy : copies) copy();
      }
      return m.parity != parity;
    });
  }
};
// Call do_(global address or null, offset in the tile) for every element of a box.
template <class Do> void each(const CUtensorMap &map, const int *corner, Do do_) {
  int index[5] = {};
  for (int64_t n = 0;; ++n) {
    char *from = map.data;
    for (int d = 0; d < map.rank; ++d) {
      int64_t x = corner[d] + index[d];
      from = from && x >= 0 && x < map.dims[d] ? from + x * map.strides[d] : nullptr;
    }
    do_(from, n * map.size);
    int d = 0;
    while (d < map.rank && ++index[d] == map.box[d]) index[d++] = 0;
    if (d == map.rank) return;
  }
}
inline int bytes_of(const CUtensorMap &map) {
  int64_t n = map.size;
  for (int d = 0; d < map.rank; ++d) n *= map.box[d];
  return int(n);
}

namespace tl {
enum class DataType { kFloat16, kBFloat16, kFloat32 };
template <int N> bool tl_shuffle_elect() { return N ? threadIdx.x % N == 0 : threadIdx.x == 0; }
inline void prefetch_tma_descriptor(const CUtensorMap &) {}
inline void fence_barrier_init() {}
inline void fence_proxy_async() {}
inline void cluster_sync() { __syncthreads(); }
inline void warpgroup_fence_operand(const void *, int) {}
template <class T> void warpgroup_fence_operand(T &) {}
template <int> void warpgroup_reg_alloc() {}
template <int> void warpgroup_reg_dealloc() {}
inline void __sync_thread_partial(int id, int count) { meet(block->named[id], count, [] {}); }
inline void __named_barrier_arrive(int id, int count) {
  Meeting &m = block->named[id];
  if (++m.arrived == count) m.arrived = 0, ++m.generation;
  ++block->moved;
}
inline uint2 load_global_64(const void *p) { return *(const uint2 *)p; }
inline uint4 load_global_128(const void *p) { return *(const uint4 *)p; }
inline void store_global_64(void *p, uint2 x) { *(uint2 *)p = x; }
inline void store_global_128(void *p, uint4 x) { *(uint4 *)p = x; }
template <class T> T warp_reduce_sum(T x) {
  for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
  return x;
}

template <class... Corner>
void tma_load(const CUtensorMap &given, Barrier &full, const void *to, Corner... corner) {
  CUtensorMap map = given;
  std::vector<int> where{int(corner)...};
  int first = at(to), number = int(full.number);
  if (first % 128) fail("TMA needs 128 bytes' alignment");
  auto copy = [=] {
    each(map, where.data(), [&](char *from, int64_t offset) {
      uchar *there = shared_memory + swizzle(int(first + offset), map.swizzled);
      from ? (void)memcpy(there, from, map.size) : (void)memset(there, 0, map.size);
    });
    Mbarrier &m = block->mbarriers[number];
    m.bytes -= bytes_of(map), m.turn(), ++block->moved;
  };
  block->late ? full.state().copies.push_back(copy) : copy();
}
template <class... Corner> void tma_store(const CUtensorMap &given, const void *from, Corner... corner) {
  CUtensorMap map = given;
  std::vector<int> where{int(corner)...};
  int first = at(from);
  auto copy = [=] {
    each(map, where.data(), [&](char *to, int64_t offset) {
      if (to) memcpy(to, shared_memory + swizzle(int(first + offset), map.swizzled), map.size);
    });
  };
  block->late ? block->stores[block->now].push_back(copy) : copy();
}
inline void tma_store_arrive() {}
template <int left, bool = true> void tma_store_wait() {
  auto &stores = block->stores[block->now];
  while (int(stores.size()) > left) stores.front()(), stores.erase(stores.begin());
}

// Tiles of 8 x 8 between shared memory and registers.
inline const void *const *gather(const void *row) {
  Warp &w = warp();
  int slot = w.meeting.generation % 2;
  w.given[slot][lane()] = row;
  meet(w.meeting, 32, [] {});
  return w.given[slot];
}
inline uint16_t *element(const void *const *rows, int tile, int row, int column) {
  return (uint16_t *)rows[8 * tile + row] + column;
}
template <bool transposed> void load_tiles(const void *row, void *to) {
  auto rows = gather(row);
  for (int tile = 0; tile < 4; ++tile)
    for (int e = 0; e < 2; ++e) {
      int i = lane() / 4, j = 2 * (lane() % 4) + e;
      ((uint16_t *)to)[2 * tile + e] = *(transposed ? element(rows, tile, j, i) : element(rows, tile, i, j));
    }
}
template <bool transposed> void store_tiles(const void *row, const int (&words)[4]) {
  auto rows = gather(row);
  for (int tile = 0; tile < 4; ++tile)
    for (int e = 0; e < 2; ++e) {
      int i = lane() / 4, j = 2 * (lane() % 4) + e;
      *(transposed ? element(rows, tile, j, i) : element(rows, tile, i, j)) = ((uint16_t *)(words + tile))[e];
    }
}
inline void ptx_ldmatrix_x4(const void *row, void *to) { load_tiles<false>(row, to); }
inline void ptx_ldmatrix_x4_trans(const void *row, void *to) { load_tiles<true>(row, to); }
inline void ptx_stmatrix_m8n8_x4(void *row, int a, int b, int c, int d) {
  store_tiles<false>(row, {a, b, c, d});
}
inline void ptx_stmatrix_m8n8_x4_trans(void *row, int a, int b, int c, int d) {
  store_tiles<true>(row, {a, b, c, d});
}
} // namespace tl
