// Operators as torch's dispatcher runs them in a compiled graph, without Python: attention, linear layers
// of a few rows. Python's kernel of the same operator does what is not plainly right for C.
//
// Compiled for any x86-64 processor, as direct.cpp is.

#include <math.h>

#include "plain_call.h"
#include "plain_projection.h"
#include "torch_tensors.h"

namespace {

// The torch whose meaning of values this is written for.
constexpr uint64_t TORCH_VERSION = uint64_t{2} << 56 | uint64_t{11} << 48;

double real(TorchValue value) {
    double number;
    memcpy(&number, &value, sizeof number);
    return number;
}

bool truth(TorchValue value) { return value & 0xff; }

// The tensors without a gradient, in the order of `Lowered.fixed`; the list keeps them, or is empty.
struct FixedTensors {
    static constexpr int NUM = 9;
    TorchValue items[NUM] = {};

    bool read(TorchValue list_value) {
        auto list = reinterpret_cast<TorchList>(list_value);
        size_t size;
        if (torch.list_size(list, &size) || (size && size != NUM)) return false;
        for (size_t place = 0; place < size; ++place)
            if (torch.list_get_item(list, place, &items[place])) return false;
        return true;
    }
};

// Numbers and tensors without a gradient, which every operator has in this order, from `stack` on.
bool read_fixed(const TorchValue *stack, Plain &to) {
    FixedTensors tensors;
    if (!tensors.read(stack[0])) return false;
    Operand seed{};
    Operand *const operands[] = {&to.slopes, &to.prefix, &to.padding, &to.document_rows,
                                 &to.document_columns, &to.keep, &to.query_positions,
                                 &to.key_positions, &seed};
    static_assert(sizeof operands / sizeof *operands == FixedTensors::NUM);
    for (int place = 0; place < FixedTensors::NUM; ++place)
        if (!read(tensor_in(tensors.items[place]), *operands[place])) return false;
    to.has_scale = true;
    to.scale = real(stack[1]);
    to.causal = truth(stack[2]);
    to.window = static_cast<int64_t>(stack[3]);
    to.softcap = real(stack[4]);
    to.softcap_first = truth(stack[5]);
    to.dropout_p = real(stack[6]);
    to.precision = truth(stack[7]);
    uint32_t num_threads;
    if (torch.get_num_threads(&num_threads)) return false;
    to.num_threads = num_threads;
    if (to.dropout_p == 0) return true;
    if (!seed.is_given() || !seed.is_int64() || seed.numel() != 1) return false;
    to.seed = *reinterpret_cast<const int64_t *>(seed.address());
    // As `dropout.threshold`.
    const double most = 4294967295.0, dropped = rint(to.dropout_p * 4294967296.0);
    to.dropout_threshold = static_cast<int64_t>(dropped < most ? dropped : most) + INT32_MIN;
    return true;
}

// Of zeta::cpu_attention: query, key, value, offsets, dense, tensors, numbers ...
int64_t attend(const TorchValue *stack, Results &results) {
    Plain given;
    Numbers numbers;
    ZetaCall call{};
    Operand lse{};
    const TorchTensor query = tensor_of(stack[0]);
    if (!read(query, given.query) || !read(tensor_of(stack[1]), given.key) ||
        !read(tensor_of(stack[2]), given.value) || !read(tensor_in(stack[3]), given.offsets) ||
        !read(tensor_in(stack[4]), given.dense) || !read_fixed(stack + 5, given) ||
        !results.add_rows(given.out, given.query, dtype_of(query)) ||
        !results.add_contiguous(lse, 3, given.query.shape, torch.dtype_float32()) ||
        !make_call(call, given, numbers))
        return ZETA_NOT_PLAIN;
    call.lse_BHT = reinterpret_cast<float *>(lse.address());
    return run_forward(call);
}

// Of zeta::cpu_attention_backward: gradient of out, of lse or null, query, key, value, out, lse,
// offsets, dense, tensors, numbers ..., whether the gradients of offsets and dense are needed.
int64_t differentiate(const TorchValue *stack, Results &results) {
    Plain given;
    PlainGradients gradients;
    Numbers numbers;
    ZetaCall call{};
    if (stack[1] || !read(tensor_of(stack[0]), gradients.grad_out) ||
        !read(tensor_of(stack[2]), given.query) || !read(tensor_of(stack[3]), given.key) ||
        !read(tensor_of(stack[4]), given.value) || !read(tensor_of(stack[5]), given.out) ||
        !read(tensor_of(stack[6]), gradients.lse) || !read(tensor_in(stack[7]), given.offsets) ||
        !read(tensor_in(stack[8]), given.dense) || !read_fixed(stack + 9, given))
        return ZETA_NOT_PLAIN;
    const int32_t dtype = dtype_of(tensor_of(stack[2])), float32 = torch.dtype_float32();
    const Operand &offsets = given.offsets, &dense = given.dense;
    const bool needs_offsets = truth(stack[17]) && offsets.is_given();
    const bool needs_dense = truth(stack[18]) && dense.is_given();
    if ((needs_offsets && offsets.ndim != 2) ||
        (needs_dense && (dense.ndim != 4 || dense.dtype() != ZETA_FLOAT32)) ||
        !results.add_rows(gradients.query, given.query, dtype) ||
        !results.add_rows(gradients.key, given.key, dtype) ||
        !results.add_rows(gradients.value, given.value, dtype) ||
        !(needs_offsets ? results.add_contiguous(gradients.offsets, 2, offsets.shape, float32)
                        : results.add_empty()) ||
        !(needs_dense ? results.add_contiguous(gradients.dense, 4, dense.shape, float32)
                      : results.add_empty()) ||
        !make_call(call, given, numbers) || !add_gradients(call, given, gradients))
        return ZETA_NOT_PLAIN;
    return zeta_backward(&call);
}

// The call of x without its layers, from the most rows.
bool begin(ZetaProjection &call, const Operand &x, TorchValue most_rows) {
    uint32_t num_threads;
    return !torch.get_num_threads(&num_threads) &&
           begin_projection(call, x, static_cast<int64_t>(most_rows), num_threads);
}

// The next layer, from its weight and its optional bias.
ZetaLayer *read_layer(ZetaProjection &call, const TorchValue *stack) {
    Operand weight{}, bias{};
    if (!read(tensor_of(stack[0]), weight) || !read(tensor_in(stack[1]), bias)) return nullptr;
    return add_layer(call, weight, bias);
}

// Of zeta::cpu_project: x, weight, bias, most rows.
int64_t project(const TorchValue *stack, Results &results) {
    Operand x{}, out{};
    ZetaProjection call{};
    const TorchTensor of_x = tensor_of(stack[0]);
    if (!read(of_x, x) || !begin(call, x, stack[3]) || x.ndim > Results::MOST_DIMENSIONS)
        return ZETA_NOT_PLAIN;
    ZetaLayer *layer = read_layer(call, stack + 1);
    if (!layer) return ZETA_NOT_PLAIN;
    int64_t sizes[Results::MOST_DIMENSIONS];
    for (int dimension = 0; dimension < x.ndim; ++dimension) sizes[dimension] = x.shape[dimension];
    sizes[x.ndim - 1] = layer->features;
    if (!results.add_contiguous(out, x.ndim, sizes, dtype_of(of_x))) return ZETA_NO_MEMORY;
    layer->out = out.address();
    return run_projection(call);
}

// Of zeta::cpu_project_three: x (B, L, width); weight and bias, three times; head_dim, most rows.
int64_t project_three(const TorchValue *stack, Results &results) {
    Operand x{};
    ZetaProjection call{};
    const TorchTensor of_x = tensor_of(stack[0]);
    const auto head_dim = static_cast<int64_t>(stack[7]);
    if (!read(of_x, x) || x.ndim != 3 || head_dim < 1 || !begin(call, x, stack[8]))
        return ZETA_NOT_PLAIN;
    for (int number = 0; number < 3; ++number) {
        ZetaLayer *layer = read_layer(call, stack + 1 + 2 * number);
        if (!layer || layer->features % head_dim) return ZETA_NOT_PLAIN;
        const int64_t length = x.shape[1], features = layer->features;
        const int64_t sizes[] = {x.shape[0], features / head_dim, length, head_dim};
        const int64_t strides[] = {length * features, head_dim, features, 1};
        Operand out{};
        if (!results.add(out, 4, sizes, strides, dtype_of(of_x))) return ZETA_NO_MEMORY;
        layer->out = out.address();
    }
    return run_projection(call);
}

// An operator, and how it is computed here.
struct Operator {
    const char *name;
    const char *in_python;
    const char *failed;
    const char *kinds;  // of its arguments: a tensor, an optional one, a list of them; then numbers
    int64_t (*compute)(const TorchValue *stack, Results &results);
};

constexpr Operator OPERATORS[] = {
    {"cpu_attention_kernel", "zeta::cpu_attention_python",
     "cpu_attention failed, as logged above", "tttool", attend},
    {"cpu_attention_backward_kernel", "zeta::cpu_attention_backward_python",
     "cpu_attention_backward failed, as logged above", "totttttool", differentiate},
    {"cpu_project_kernel", "zeta::cpu_project_python", "cpu_project failed, as logged above",
     "tto", project},
    {"cpu_project_three_kernel", "zeta::cpu_project_three_python",
     "cpu_project_three failed, as logged above", "ttototo", project_three},
};

void release_list(TorchValue list_value) {
    FixedTensors tensors;
    tensors.read(list_value);
    for (TorchValue item : tensors.items) release_optional(item);
    torch.delete_list(reinterpret_cast<TorchList>(list_value));
}

void release_arguments(TorchValue *stack, const char *kinds) {
    for (; *kinds; ++kinds, ++stack) {
        if (*kinds == 't') torch.delete_tensor(tensor_of(*stack));
        if (*kinds == 'o') release_optional(*stack);
        if (*kinds == 'l') release_list(*stack);
    }
}

// Whether it is done; then the results are on the stack in place of the arguments.
bool run(const Operator &operation, TorchValue *stack) {
    Results results;
    if (operation.compute(stack, results) != ZETA_DONE) return false;
    release_arguments(stack, operation.kinds);
    results.give(stack);
    return true;
}

// Nothing here may have a destructor: what torch throws would pass it by.
void run_here_or_in_python(const Operator &operation, TorchValue *stack) {
    if (!run(operation, stack) &&
        torch.call_dispatcher(operation.in_python, "", stack, TORCH_VERSION))
        torch.check(false, operation.name, "operators.cpp", 0,
                    torch.error ? torch.error() : operation.failed);
}

template <int number>
void kernel(TorchValue *stack, uint64_t, uint64_t) {
    run_here_or_in_python(OPERATORS[number], stack);
}

constexpr TorchKernel KERNELS[] = {kernel<0>, kernel<1>, kernel<2>, kernel<3>};
static_assert(sizeof KERNELS / sizeof *KERNELS == sizeof OPERATORS / sizeof *OPERATORS);

}  // namespace

extern "C" {

// Makes these the kernels of torch's CPU tensors, for as long as the process lives; 0 where torch
// refuses.
ZETA_EXPORT int64_t zeta_register_operators(const TorchFunctions *functions) {
    torch = *functions;
    TorchLibrary library;
    if (torch.library_init_impl("zeta", "CPU", "operators.cpp", 0, &library)) return 0;
    int number = 0;
    for (TorchKernel kernel : KERNELS)
        if (torch.library_impl(library, OPERATORS[number++].name, kernel, TORCH_VERSION)) return 0;
    return 1;
}

}  // extern "C"
