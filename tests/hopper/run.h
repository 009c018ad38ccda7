// After a kernel's source: what its host code asks TVM for, and the launch. KERNEL is its name,
// DYNAMIC whether it takes its shared memory at the launch.
extern "C" {
#include "host.h"
}
#include <utility>

template <class T> T argument(const TVMFFIAny &x) {
  if constexpr (std::is_pointer_v<T>) return (T)x.v_ptr;
  else if constexpr (std::is_same_v<T, CUtensorMap>) return *(CUtensorMap *)x.v_ptr;
  else if constexpr (std::is_floating_point_v<T>) return T(x.v_float64);
  else return T(x.v_int64);
}
static bool late;
static int slow;
// The kernel's own arguments, then a cluster in three dimensions, if it has one, blocks in one to
// three, threads in three, and bytes.
template <class... P, size_t... I>
void launch(void (*kernel)(P...), const TVMFFIAny *a, int number, std::index_sequence<I...>) {
  int after = number - 3 - DYNAMIC, first = sizeof...(P), blocks[3] = {1, 1, 1};
  if (after - first > 3) first += 3;
  int width = int(a[after].v_int64);
  int threads = width * int(a[after + 1].v_int64);
  for (int i = first; i < after; ++i) blocks[i - first] = int(a[i].v_int64);
  if (DYNAMIC && a[number - 1].v_int64 > long(sizeof shared_memory)) return fail("too much shared memory");
  std::function<void()> body = [&] { kernel(argument<P>(a[I])...); };
  for (int z = 0; z < blocks[2]; ++z)
    for (int y = 0; y < blocks[1]; ++y)
      for (int x = 0; x < blocks[0]; ++x) {
        blockIdx = {x, y, z};
        if (wrong.empty()) run_block(width, threads, late, slow, body);
      }
}
template <class... P> void launch(void (*kernel)(P...), const TVMFFIAny *a, int number) {
  launch(kernel, a, number, std::index_sequence_for<P...>{});
}
static void create_tensor_map(const TVMFFIAny *a) {
  auto &map = *(CUtensorMap *)a[0].v_ptr;
  int rank = int(a[2].v_int64);
  map.rank = rank, map.data = (char *)a[3].v_ptr, a += 4;
  if ((uintptr_t)map.data % 16) fail("TMA needs tensors aligned to 16 bytes");
  for (int d = 0; d < rank; ++d) {
    map.dims[d] = a[d].v_int64, map.strides[d] = a[rank + d].v_int64;
    map.box[d] = int(a[2 * rank + d].v_int64);
    if (d && (map.strides[d] % 16 || !map.strides[d])) fail("TMA needs strides of 16 bytes");
    if (map.box[d] > 256 || a[3 * rank + d].v_int64 != 1) fail("a box that TMA does not have");
  }
  map.size = map.strides[0], map.swizzled = int(a[4 * rank + 1].v_int64);
  if (map.swizzled && map.box[0] * map.size > 16 << map.swizzled) fail("a box wider than its swizzle");
}
extern "C" {
int TVMBackendGetFuncFromEnv(void *, const char *name, void **found) {
  *found = new std::string(name);
  return 0;
}
int TVMFFIFunctionCall(void *function, TVMFFIAny *a, int32_t number, TVMFFIAny *) {
  auto &name = *(std::string *)function;
  if (name == "__tvm_tensormap_create_tiled") create_tensor_map(a);
  else if (name != "__tvm_set_device") launch(KERNEL, a, number);
  return 0;
}
void TVMFFIErrorSetRaisedFromCStr(const char *, const char *what) { fail(what); }
int32_t __tvm_ffi_main(void *, void *args, int number, void *result);
// What was wrong, or null.
const char *run(TVMFFIAny *args, int number, bool late_, int slow_) {
  TVMFFIAny result{};
  late = late_, slow = slow_, wrong.clear();
  __tvm_ffi_main(nullptr, args, number, &result);
  return wrong.empty() ? nullptr : wrong.c_str();
}
}
