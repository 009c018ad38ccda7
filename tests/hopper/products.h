// Products on the tensor cores, by a warpgroup.
#pragma once
#include "copies.h"

namespace tl {
struct GmmaDescriptor { // start, leading and stride offset in units of 16 bytes, and the layout
  uint64_t start = 0, leading = 0, stride = 0, layout = 0;
  GmmaDescriptor operator+(int64_t by) const { auto d = *this; d.start += by; return d; }
  operator uint64_t() const { return start | leading << 16 | stride << 32 | layout << 62; }
};
template <int layout, int leading, int stride, class T>
void initialize_wgmma_descriptor(GmmaDescriptor &d, T *p) {
  if (at(p) % 16) fail("an operand needs 16 bytes' alignment");
  d = {uint64_t(at(p)) / 16, leading, stride, layout};
}
template <class T> void increase_descriptor_offset(GmmaDescriptor &d, T bytes) { d.start += bytes >> 4; }

// Element (i, k) of an operand with its 16 k along rows of shared memory, or (transposed) down them.
template <class T> float operand(uint64_t d, bool transposed, int i, int k) {
  int start = int(d & 0x3fff) * 16, leading = int(d >> 16 & 0x3fff) * 16, stride = int(d >> 32 & 0x3fff) * 16;
  int mode = 4 - int(d >> 62), width = 16 << mode, columns = width / 2; // bytes and elements of a row
  int address = transposed ? start + i / columns * leading + i % columns * 2 + k / 8 * stride + k % 8 * width
                           : start + i / 8 * stride + i % 8 * width + k * 2;
  return float(*(T *)(shared_memory + swizzle(address, mode)));
}
template <class T, int N, class A>
void multiply(float *const *c, bool adds, uint64_t b, bool transposed, A a) {
  float left[64][16], right[N][16];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 64; ++i) left[i][k] = a(i, k);
    for (int j = 0; j < N; ++j) right[j][k] = operand<T>(b, transposed, j, k);
  }
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < N; ++j) {
      float &to = c[i / 16 * 32 + i % 8 * 4 + j % 8 / 2][j / 8 * 4 + i / 8 % 2 * 2 + j % 2], sum = 0;
      for (int k = 0; k < 16; ++k) sum += left[i][k] * right[j][k];
      to = adds ? to + sum : sum;
    }
}
template <DataType type> using Type = std::conditional_t<type == DataType::kFloat16, half_t, bfloat16_t>;
inline void issue(Warpgroup &group, const std::function<void()> &product) {
  block->late ? group.batches.back().push_back(product) : product();
}
template <DataType TA, DataType, DataType, int, int N, int, bool across, bool down, int, int>
void wgmma_ss(uint64_t a, uint64_t b, uint32_t *c, bool adds) {
  Warpgroup &group = block->groups[block->now / 128];
  group.c[block->now % 128] = (float *)c;
  meet(group.meeting, 128, [&] {
    std::vector<float *> to(group.c, group.c + 128);
    issue(group, [=] {
      multiply<Type<TA>, N>(to.data(), adds, b, down, [&](int i, int k) {
        return operand<Type<TA>>(a, across, i, k);
      });
    });
  });
}
template <DataType TA, DataType, DataType, int, int N, int, bool, bool down, int, int>
void wgmma_rs(const uint32_t *a, uint64_t b, uint32_t *c, bool adds) {
  Warpgroup &group = block->groups[block->now / 128];
  group.a[block->now % 128] = a, group.c[block->now % 128] = (float *)c;
  meet(group.meeting, 128, [&] {
    std::vector<float *> to(group.c, group.c + 128);
    std::vector<const uint32_t *> from(group.a, group.a + 128);
    issue(group, [=] {
      multiply<Type<TA>, N>(to.data(), adds, b, down, [&](int i, int k) {
        auto words = (const Type<TA> *)from[i / 16 * 32 + i % 8 * 4 + k % 8 / 2];
        return float(words[k / 8 * 4 + i / 8 % 2 * 2 + k % 2]);
      });
    });
  });
}
// Of a warp: c += a b, a [16, 16] and b [16, 8].
template <DataType TA, DataType, DataType, int, int, int, bool, bool>
void mma_sync(float *c, const uint32_t *a, const uint32_t *b) {
  using T = Type<TA>;
  const void *left[32], *right[32];
  std::copy_n(gather(a), 32, left), std::copy_n(gather(b), 32, right);
  for (int e = 0; e < 4; ++e) {
    int i = lane() / 4 + e / 2 * 8, j = lane() % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k) {
      int from = k % 8 / 2, part = k / 8;
      c[e] += ((T *)left[i % 8 * 4 + from])[part * 4 + i / 8 * 2 + k % 2] *
              ((T *)right[j * 4 + from])[part * 2 + k % 2];
    }
  }
  meet(warp().meeting, 32, [] {});
}
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() {
  Warpgroup &group = block->groups[block->now / 128];
  meet(group.meeting, 128, [&] { group.batches.emplace_back(); });
}
template <int left> void wait_wgmma() {
  Warpgroup &group = block->groups[block->now / 128];
  meet(group.meeting, 128, [&] {
    while (int(group.batches.size()) > left + 1) {
      for (auto &product : group.batches.front()) product();
      group.batches.erase(group.batches.begin());
    }
  });
}
} // namespace tl
