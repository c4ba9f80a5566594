// DLPack's table for exchange in C (DLPack 1.3: the type of a tensor has it as
// `__dlpack_c_exchange_api__`), declared here: the library is built without torch's headers, and runs
// beside any version of it.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

struct PyObject;

enum { kDLCPU = 1 };
enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

struct DLTensor {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

// A tensor with an owner, who lets go of it by `deleter`.
struct DLManagedTensorVersioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(DLManagedTensorVersioned *);
    uint64_t flags;
    DLTensor tensor;
};

// Functions answer 0, or set Python's error. Those that are not used stand as pointers.
struct DLPackExchangeAPI {
    uint32_t major, minor;
    DLPackExchangeAPI *previous;
    void *allocate, *managed_from_object;
    int (*object_from_managed)(DLManagedTensorVersioned *, PyObject **);
    int (*tensor_from_object)(PyObject *, DLTensor *);  // borrows; null where it is not offered
    void *current_stream;
};

}  // extern "C"
