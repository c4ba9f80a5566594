// Calls that take torch's tensors as they are, for work so short that writing a record in Python takes
// longer: attention with common masks and biases, and linear layers of a few rows.
//
// Here, unlike behind abi.h, everything is checked: whatever is not plainly right is answered with
// ZETA_NOT_PLAIN, and Python goes its longer way, which has the errors.
//
// Compiled for any x86-64 processor, as library.cpp is.

#include "direct_scores.h"

namespace {

PyObject *answer(int64_t number) { return PyLong_FromLong(static_cast<long>(number)); }

// Calls `pass()` while other threads of Python go on.
template <class Pass>
int64_t run_beside_python(const Pass &pass) {
    PyThreadState *state = PyEval_SaveThread();
    const int64_t found = pass();
    PyEval_RestoreThread(state);
    return found;
}

struct AttentionOperands {
    Operand query, key, value, out;
    Numbers looked_up;
};

constexpr int NUM_CALL_OPTIONS = 4;

// Reads the operands, and makes the call of them; false where they are not plainly right. `options`:
// the scale or None; as numbers the precision, the instruction set and the number of threads; and those
// of the scores, or only whether keys after a query are hidden.
bool read_call(ZetaCall &call, AttentionOperands &operands, PyObject *const *objects,
               PyObject *const *options, intptr_t num_options) {
    if (num_options != NUM_CALL_OPTIONS + 1 && num_options != NUM_CALL_OPTIONS + NUM_SCORE_OPTIONS)
        return false;
    auto &[query, key, value, out, looked_up] = operands;
    if (!query.read(objects[0]) || !key.read(objects[1]) || !value.read(objects[2]) ||
        !out.read(objects[3]))
        return false;
    call.bytes = sizeof call;
    call.dtype = query.dtype();
    const bool has_scale = !is_none(options[0]);
    if (has_scale && !is_a(options[0], &PyFloat_Type)) return false;
    call.scale = has_scale ? PyFloat_AsDouble(options[0]) : 0;
    call.precision = PyLong_AsLong(options[1]);
    call.isa = PyLong_AsLong(options[2]);
    call.num_threads = PyLong_AsLong(options[3]);
    if (!were_numbers() || !query.are_rows() || !key.are_rows() || !value.are_rows() ||
        !out.are_rows() || key.dtype() != call.dtype || value.dtype() != call.dtype ||
        out.dtype() != call.dtype || !have_same_sizes(query, out) ||
        !have_same_sizes(key, value) || query.shape[0] != key.shape[0] ||
        query.shape[1] % key.shape[1] || query.shape[3] != key.shape[3] ||
        query.shape[3] > ZETA_MOST_FEATURES)
        return false;
    call.batch = query.shape[0];
    call.heads = query.shape[1];
    call.key_heads = key.shape[1];
    call.target = query.shape[2];
    call.source = key.shape[2];
    call.head_dim = call.value_dim = query.shape[3];
    if (!has_scale) call.scale = 1 / __builtin_sqrt(static_cast<double>(call.head_dim));
    call.query = query.rows();
    call.key = key.rows();
    call.value = value.rows();
    call.out = out.rows();
    if (num_options > NUM_CALL_OPTIONS + 1)
        return read_scores(call, options + NUM_CALL_OPTIONS, looked_up);
    call.causal = PyLong_AsLong(options[NUM_CALL_OPTIONS]);
    return were_numbers();
}

// A number for each query: float32 (B, H, T).
bool read_lse(ZetaCall &call, PyObject *object) {
    Operand lse;
    if (!lse.read(object) || lse.dtype() != ZETA_FLOAT32 || !lse.is_contiguous() ||
        lse.numel() != call.batch * call.heads * call.target)
        return false;
    call.lse_BHT = reinterpret_cast<float *>(lse.address());
    return true;
}

int64_t run_attention(const ZetaCall &call) {
    const ZetaPasses *passes = zeta_passes_of(call.isa);
    if (!passes) return ZETA_NO_PROCESSOR;
    const int64_t most =
        passes == &zeta_passes_amx ? ZETA_STEP_ROWS_BESIDE_TILES : ZETA_STEP_ROWS;
    const ZetaPass pass =
        call.target * call.heads <= most * call.key_heads ? passes->decode : passes->forward;
    return run_beside_python([&] { return pass(&call); });
}

// attend(query, key, value, out, options ...)
PyObject *attend(PyObject *, PyObject *const *arguments, intptr_t count) {
    AttentionOperands operands;
    ZetaCall call{};
    if (count < 4 || !read_call(call, operands, arguments, arguments + 4, count - 4))
        return answer(ZETA_NOT_PLAIN);
    return answer(run_attention(call));
}

// The same; its log-sum-exp, or an answer.
PyObject *attend_with_lse(PyObject *, PyObject *const *arguments, intptr_t count) {
    AttentionOperands operands;
    ZetaCall call{};
    if (count < 4 || !read_call(call, operands, arguments, arguments + 4, count - 4))
        return answer(ZETA_NOT_PLAIN);
    Made made;
    Owned *lse = made.add(ZETA_FLOAT32, 3, operands.query.shape);
    if (!lse) return answer(ZETA_NO_MEMORY);
    call.lse_BHT = static_cast<float *>(lse->data());
    const int64_t found = run_attention(call);
    return found == ZETA_DONE ? made.give(0) : answer(found);
}

// Rows of the dtype and sizes of others.
bool read_rows_like(ZetaRows &to, PyObject *object, const Operand &like) {
    Operand rows;
    if (!rows.read(object) || !rows.are_rows() || rows.dtype() != like.dtype() ||
        !have_same_sizes(rows, like))
        return false;
    to = rows.rows();
    return true;
}

// differentiate(query, key, value, out, log-sum-exp, gradient of out, and, to be written, those of query,
// key and value, and of offsets and a dense bias or None, options ...)
PyObject *differentiate(PyObject *, PyObject *const *arguments, intptr_t count) {
    AttentionOperands operands;
    ZetaCall call{};
    const int before = 11;
    if (count < before ||
        !read_call(call, operands, arguments, arguments + before, count - before) ||
        !read_lse(call, arguments[4]) ||
        !read_rows_like(call.grad_out, arguments[5], operands.out) ||
        !read_rows_like(call.grad_query, arguments[6], operands.query) ||
        !read_rows_like(call.grad_key, arguments[7], operands.key) ||
        !read_rows_like(call.grad_value, arguments[8], operands.value) ||
        !read_grad_offsets(call, arguments[9]) ||
        !read_grad_dense(call, arguments[10], arguments[count - 1]))
        return answer(ZETA_NOT_PLAIN);
    return answer(run_beside_python([&] { return zeta_backward(&call); }));
}

// The call of layers of x, without the layers; false where x is not for it. `numbers`: the most rows,
// the instruction set and the number of threads.
bool begin_projection(ZetaProjection &call, const Operand &x, PyObject *const *numbers) {
    const int64_t most_rows = PyLong_AsLong(numbers[0]);
    call.dtype = x.dtype();
    call.isa = PyLong_AsLong(numbers[1]);
    call.num_threads = PyLong_AsLong(numbers[2]);
    if (!were_numbers() || !x.ndim || !x.numel() || !x.is_contiguous()) return false;
    call.width = call.x_row = x.shape[x.ndim - 1];
    call.rows = x.numel() / call.width;
    call.x = x.address();
    return call.rows <= most_rows && call.rows <= ZETA_MOST_ROWS;
}

// The next layer of the call, which still has to be told where its output goes.
ZetaLayer *add_layer(ZetaProjection &call, PyObject *weight_object, PyObject *bias_object) {
    Operand weight, bias;
    if (!weight.read(weight_object) || weight.ndim != 2 || weight.shape[1] != call.width ||
        !weight.shape[0] || !weight.is_dense_at(1) || weight.dtype() != call.dtype)
        return nullptr;
    ZetaLayer &layer = call.layers[call.num_layers++];
    layer = {weight.address(), nullptr, nullptr, weight.strides[0], weight.shape[0],
             weight.shape[0]};
    if (is_none(bias_object)) return &layer;
    if (!bias.read(bias_object) || bias.ndim != 1 || bias.shape[0] != weight.shape[0] ||
        !bias.is_dense_at(0) || bias.dtype() != call.dtype)
        return nullptr;
    layer.bias = bias.address();
    return &layer;
}

int64_t run_projection(const ZetaProjection &call) {
    const ZetaPasses *passes = zeta_passes_of(call.isa);
    if (!passes) return ZETA_NO_PROCESSOR;
    return run_beside_python([&] { return passes->project(&call); });
}

// project(x, out, most_rows, instruction_set, num_threads, weight, bias or None)
PyObject *project(PyObject *, PyObject *const *arguments, intptr_t count) {
    Operand x, out;
    ZetaProjection call{};
    if (count != 7 || !x.read(arguments[0]) || !out.read(arguments[1]) ||
        !begin_projection(call, x, arguments + 2))
        return answer(ZETA_NOT_PLAIN);
    ZetaLayer *layer = add_layer(call, arguments[5], arguments[6]);
    if (!layer || !out.ndim || out.shape[out.ndim - 1] != layer->features ||
        out.numel() != call.rows * layer->features || !out.is_contiguous() ||
        out.dtype() != call.dtype)
        return answer(ZETA_NOT_PLAIN);
    layer->out = out.address();
    return answer(run_projection(call));
}

// project_heads(x, head_dim, most_rows, instruction_set, num_threads, weight, bias or None, ...):
// x (B, L, width); a tuple of (B, heads, L, head_dim), or an answer.
PyObject *project_heads(PyObject *, PyObject *const *arguments, intptr_t count) {
    const intptr_t before = 5;
    Operand x;
    ZetaProjection call{};
    if (count <= before || (count - before) % 2 || (count - before) / 2 > ZETA_MOST_LAYERS ||
        !x.read(arguments[0]) || x.ndim != 3 || !begin_projection(call, x, arguments + 2))
        return answer(ZETA_NOT_PLAIN);
    const int64_t head_dim = PyLong_AsLong(arguments[1]);
    if (!were_numbers() || head_dim < 1) return answer(ZETA_NOT_PLAIN);
    Made made;
    for (intptr_t i = before; i < count; i += 2) {
        ZetaLayer *layer = add_layer(call, arguments[i], arguments[i + 1]);
        if (!layer || layer->features % head_dim) return answer(ZETA_NOT_PLAIN);
        const int64_t shape[] = {x.shape[0], x.shape[1], layer->features / head_dim, head_dim};
        Owned *heads = made.add(call.dtype, 4, shape);
        if (!heads) return answer(ZETA_NO_MEMORY);
        heads->swap_dimensions(1, 2);
        layer->out = heads->data();
    }
    const int64_t found = run_projection(call);
    return found == ZETA_DONE ? made.give_all() : answer(found);
}

PyMethodDef methods[] = {{"attend", attend, METH_FASTCALL, nullptr},
                         {"attend_with_lse", attend_with_lse, METH_FASTCALL, nullptr},
                         {"differentiate", differentiate, METH_FASTCALL, nullptr},
                         {"project", project, METH_FASTCALL, nullptr},
                         {"project_heads", project_heads, METH_FASTCALL, nullptr}};

}  // namespace

extern "C" {

// Reads torch's table, of the types of its tensors; 0 where they cannot be read so. With Python's
// lock held, as for those below.
ZETA_EXPORT int64_t zeta_meet_torch(PyObject *tensor, PyObject *parameter) {
    if (!has_python()) return 0;
    PyObject *capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    const void *found = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
    if (capsule) Py_DecRef(capsule);  // The type keeps it.
    if (!found) {
        PyErr_Clear();
        return 0;
    }
    auto *table = static_cast<const DLPackExchangeAPI *>(found);
    while (table && table->major > 1) table = table->previous;
    if (!table || table->major != 1 || !table->tensor_from_object ||
        !table->object_from_managed)
        return 0;
    exchange = table;
    Py_IncRef(tensor);
    Py_IncRef(parameter);
    tensor_types[0] = tensor;
    tensor_types[1] = parameter;
    return 1;
}

// After torch was met: a builtin by its number, in the order above.
ZETA_EXPORT PyObject *zeta_builtin(int64_t number) {
    return PyCFunction_NewEx(&methods[number], nullptr, nullptr);
}

}  // extern "C"
