// What is used of torch's stable C interface (torch/csrc/stable/c/shim.h), declared here: the library is
// built without torch's headers, and is told where these functions are (library.py).
#pragma once

#include <stdint.h>

extern "C" {

// An argument or a result of an operator: a number's bits; a TorchTensor or TorchList with its owner's
// rights; of an optional one, null or where its value stands, in memory of its own.
typedef uint64_t TorchValue;
typedef void *TorchTensor;
typedef void *TorchList;
typedef void *TorchLibrary;

// Takes the arguments from the stack and leaves the results there.
typedef void (*TorchKernel)(TorchValue *stack, uint64_t num_arguments, uint64_t num_results);

// In the order of library.py's names. They answer 0, or failed; the last two are null before torch 2.13.
struct TorchFunctions {
    int32_t (*library_init_impl)(const char *space, const char *dispatch_key, const char *file,
                                 uint32_t line, TorchLibrary *);
    int32_t (*library_impl)(TorchLibrary, const char *name, TorchKernel, uint64_t version);
    int32_t (*call_dispatcher)(const char *name, const char *overload, TorchValue *stack,
                               uint64_t version);
    void (*check)(bool is_true, const char *function, const char *file, uint32_t line,
                  const char *message);  // throws if it is not
    int32_t (*get_num_threads)(uint32_t *);
    int32_t (*get_data_ptr)(TorchTensor, void **);
    int32_t (*get_dim)(TorchTensor, int64_t *);
    int32_t (*get_sizes)(TorchTensor, int64_t **);
    int32_t (*get_strides)(TorchTensor, int64_t **);
    int32_t (*get_dtype)(TorchTensor, int32_t *);
    int32_t (*get_device_type)(TorchTensor, int32_t *);
    int32_t (*empty_strided)(int64_t ndim, const int64_t *sizes, const int64_t *strides,
                             int32_t dtype, int32_t device_type, int32_t device_index,
                             TorchTensor *);
    int32_t (*delete_tensor)(TorchTensor);
    int32_t (*list_size)(TorchList, size_t *);
    int32_t (*list_get_item)(TorchList, size_t place, TorchValue *);
    int32_t (*delete_list)(TorchList);
    int32_t (*device_type_cpu)();
    int32_t (*dtype_float32)();
    int32_t (*dtype_bfloat16)();
    int32_t (*dtype_float16)();
    int32_t (*dtype_int64)();
    int32_t (*dtype_int32)();
    int32_t (*dtype_uint8)();
    int32_t (*delete_value)(TorchValue *);
    const char *(*error)();
};

}  // extern "C"
