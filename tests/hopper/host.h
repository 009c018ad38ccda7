/* What the host code that TileLang generates needs of TVM. */
#include <stdint.h>
#include <stddef.h>
typedef struct {
  int32_t type_index;
  uint32_t zero_padding;
  union { int64_t v_int64; double v_float64; void *v_ptr; };
} TVMFFIAny;
typedef struct { int32_t device_type, device_id; } DLDevice;
typedef struct { uint8_t code, bits; uint16_t lanes; } DLDataType;
typedef struct {
  void *data; DLDevice device; int32_t ndim; DLDataType dtype; int64_t *shape, *strides; uint64_t byte_offset;
} DLTensor;
enum { kTVMFFINone = 0 };
int TVMBackendGetFuncFromEnv(void *library, const char *name, void **found);
int TVMFFIFunctionCall(void *function, TVMFFIAny *args, int32_t number, TVMFFIAny *result);
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);
