// What the kernels that TileLang generates call, on a CPU: a block at a time, its threads fibers of
// one thread, to see what they compute and whether they wait for what they read.
//
// What a GPU does on its own time (products of tensor cores, copies of TMA) happens here either at
// once (`late` = false) or as late as its waits allow, and threads run in ascending or descending
// order; one warp, `slow`, goes on only when all others wait. What is right in all these worlds neither
// reads too early nor overwrites too soon.
#pragma once
#include "numbers.h"

struct Dim { int x, y, z; };
inline Dim blockIdx, threadIdx;
// 227 KB for a thread block, less the one that its barriers round up to.
alignas(1024) inline uchar shared_memory[226 * 1024];

struct Mbarrier {
  int count = 0, pending = 0, bytes = 0, parity = 0;
  std::vector<std::function<void()>> copies; // TMA loads that have not happened yet
  void turn() {
    if (pending || bytes) return;
    parity ^= 1, pending = count;
  }
};
struct Meeting { int arrived = 0, generation = 0; };
struct Warp { Meeting meeting; const void *given[2][32]; uint32_t words[2][32]; };
struct Warpgroup {
  Meeting meeting;
  const uint32_t *a[128];
  float *c[128];
  std::vector<std::vector<std::function<void()>>> batches{1}; // the last is not yet committed
};
struct Block {
  int threads, now = 0, left = 0;
  long moved = 0;
  bool late;
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<bool> done;
  std::vector<Warp> warps;
  std::vector<Warpgroup> groups;
  std::vector<Mbarrier> mbarriers;
  std::vector<Meeting> named;
  std::vector<std::vector<std::function<void()>>> stores; // of a thread: TMA stores not yet read
};
inline Block *block;
inline const std::function<void()> *body;

static std::string wrong;
// Say what is wrong; the thread that calls this, if one does, never goes on.
inline void fail(const std::string &what) {
  if (wrong.empty()) wrong = what;
  if (!block) return;
  wrong += "; block " + std::to_string(blockIdx.x) + " " + std::to_string(blockIdx.y) + " " +
           std::to_string(blockIdx.z) + ", thread " + std::to_string(block->now);
  swapcontext(&block->fibers[block->now], &block->scheduler);
}
template <class Ready> void until(Ready ready) {
  while (!ready()) swapcontext(&block->fibers[block->now], &block->scheduler);
  ++block->moved;
}
// Wait for `count` threads of the same meeting; the last to come does `work`.
template <class Work> void meet(Meeting &meeting, int count, Work work) {
  int generation = meeting.generation;
  if (++meeting.arrived == count) work(), meeting.arrived = 0, ++meeting.generation, ++block->moved;
  else until([&] { return meeting.generation != generation; });
}
inline void enter() {
  (*body)();
  for (auto &store : block->stores[block->now]) store();
  block->done[block->now] = true, --block->left, ++block->moved;
}
inline void run_block(int width, int threads, bool late, int slow, const std::function<void()> &kernel) {
  Block b{.threads = threads, .left = threads, .late = late};
  b.fibers.resize(threads), b.done.resize(threads), b.stores.resize(threads);
  b.warps.resize(threads / 32), b.groups.resize((threads + 127) / 128), b.named.resize(16);
  b.stacks.assign(threads, std::vector<char>(1 << 16));
  block = &b, body = &kernel;
  memset(shared_memory, 0xff, sizeof shared_memory); // NaN, so that what nobody wrote shows
  for (int t = 0; t < threads; ++t) {
    getcontext(&b.fibers[t]);
    b.fibers[t].uc_stack.ss_sp = b.stacks[t].data(), b.fibers[t].uc_stack.ss_size = b.stacks[t].size();
    b.fibers[t].uc_link = &b.scheduler;
    makecontext(&b.fibers[t], enter, 0);
  }
  for (int idle = 0; b.left && wrong.empty();) {
    long before = b.moved;
    for (int i = 0; i < threads && wrong.empty(); ++i) {
      b.now = late ? threads - 1 - i : i, threadIdx = {b.now % width, b.now / width, 0};
      if (!b.done[b.now] && (b.now / 32 != slow || idle)) swapcontext(&b.scheduler, &b.fibers[b.now]);
    }
    idle = before == b.moved ? idle + 1 : 0;
    if (b.left && idle > 1 && wrong.empty()) wrong = "deadlock: every thread waits";
  }
  block = nullptr;
}
inline int lane() { return block->now % 32; }
inline Warp &warp() { return block->warps[block->now / 32]; }
inline int at(const void *p) {
  auto offset = (const uchar *)p - shared_memory;
  if (offset < 0 || offset >= long(sizeof shared_memory)) fail("not in shared memory");
  return int(offset);
}
inline int swizzle(int address, int mode) { // mode: bits that take part; 3 for rows of 128 bytes
  return address ^ (address >> 7 & ((1 << mode) - 1)) << 4;
}

inline void __syncthreads() { meet(block->named[0], block->threads, [] {}); }
inline void __syncwarp(uint = ~0u) { meet(warp().meeting, 32, [] {}); }
inline uint32_t exchange(uint32_t word, int from) {
  Warp &w = warp();
  int slot = w.meeting.generation % 2;
  w.words[slot][lane()] = word;
  meet(w.meeting, 32, [] {});
  return w.words[slot][from];
}
template <class T> T shuffle(T x, int from) {
  return bits<T>(exchange(bits<uint32_t>(x), from >= 0 && from < 32 ? from : lane()));
}
template <class T> T __shfl_xor_sync(uint, T x, int by, int = 32) { return shuffle(x, lane() ^ by); }
template <class T> T __shfl_up_sync(uint, T x, int by, int = 32) { return shuffle(x, lane() - by); }
template <class T> T __shfl_down_sync(uint, T x, int by, int = 32) { return shuffle(x, lane() + by); }
template <class T> T __shfl_sync(uint, T x, int from, int = 32) { return shuffle(x, from); }
inline uint __reduce_min_sync(uint, uint x) {
  for (int by = 16; by; by /= 2) x = std::min(x, __shfl_xor_sync(~0u, x, by));
  return x;
}
inline uint __reduce_max_sync(uint, uint x) {
  for (int by = 16; by; by /= 2) x = std::max(x, __shfl_xor_sync(~0u, x, by));
  return x;
}
inline int atomicAdd(int *at, int by) { return (*at += by) - by; }
inline float __uint_as_float(uint x) { return bits<float>(x); }
inline uint __float_as_uint(float x) { return bits<uint>(x); }
