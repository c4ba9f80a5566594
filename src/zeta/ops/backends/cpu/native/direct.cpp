// Calls that take torch's tensors as they are, for work so short that writing a record in Python takes
// longer: attention with common masks and biases, linear layers of a few rows, and rotations.
//
// Here, unlike behind abi.h, everything is checked: whatever is not plainly right is answered with
// ZETA_NOT_PLAIN, and Python goes its longer way, which has the errors.
//
// Compiled for any x86-64 processor, as library.cpp is.

#include "plain_call.h"
#include "plain_projection.h"
#include "plain_rotation.h"
#include "python_tensors.h"

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

bool is_none(PyObject *object) { return object == &_Py_NoneStruct; }

bool read_or_none(PyObject *object, Operand &to) { return is_none(object) || read(object, to); }

// Whether every number that Python gave was one.
bool were_numbers() {
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
}

constexpr int NUM_CALL_OPTIONS = 3, NUM_SCORE_OPTIONS = 14;

bool read_scores(PyObject *const *options, Plain &to) {
    if (!is_a(options[2], &PyFloat_Type) || !is_a(options[4], &PyFloat_Type)) return false;
    to.causal = PyLong_AsLong(options[0]);
    to.window = PyLong_AsLong(options[1]);
    to.softcap = PyFloat_AsDouble(options[2]);
    to.softcap_first = PyLong_AsLong(options[3]);
    to.dropout_p = PyFloat_AsDouble(options[4]);
    to.dropout_threshold = PyLong_AsLong(options[5]);
    to.seed = PyLong_AsLong(options[6]);
    if (!were_numbers()) return false;
    Operand *const tensors[] = {&to.padding, &to.keep,    &to.offsets, &to.table,
                                &to.buckets, &to.slopes, &to.dense};
    for (int i = 0; i < 7; ++i)
        if (!read_or_none(options[7 + i], *tensors[i])) return false;
    return !to.keep.is_given() || to.keep.is_bool();
}

// False where something is not plainly right. `objects`: query, key, value and out. `options`: the scale
// or None; as numbers the precision and the number of threads; and those of the scores, or only whether
// keys after a query are hidden.
bool read_call(PyObject *const *objects, PyObject *const *options, intptr_t num_options,
               Plain &to) {
    if (!read(objects[0], to.query) || !read(objects[1], to.key) || !read(objects[2], to.value) ||
        !read(objects[3], to.out))
        return false;
    to.has_scale = !is_none(options[0]);
    if (to.has_scale && !is_a(options[0], &PyFloat_Type)) return false;
    if (to.has_scale) to.scale = PyFloat_AsDouble(options[0]);
    to.precision = PyLong_AsLong(options[1]);
    to.num_threads = PyLong_AsLong(options[2]);
    if (!were_numbers()) return false;
    options += NUM_CALL_OPTIONS;
    num_options -= NUM_CALL_OPTIONS;
    if (num_options == NUM_SCORE_OPTIONS) return read_scores(options, to);
    if (num_options != 1) return false;
    to.causal = PyLong_AsLong(options[0]);
    return were_numbers();
}

// attend(query, key, value, out, options ...)
PyObject *attend(PyObject *, PyObject *const *arguments, intptr_t count) {
    Plain given;
    Numbers numbers;
    ZetaCall call{};
    if (count < 4 + NUM_CALL_OPTIONS || !read_call(arguments, arguments + 4, count - 4, given) ||
        !make_call(call, given, numbers))
        return answer(ZETA_NOT_PLAIN);
    return answer(run_beside_python([&] { return run_forward(call); }));
}

// The same; its log-sum-exp, or an answer.
PyObject *attend_with_lse(PyObject *, PyObject *const *arguments, intptr_t count) {
    Plain given;
    Numbers numbers;
    ZetaCall call{};
    if (count < 4 + NUM_CALL_OPTIONS || !read_call(arguments, arguments + 4, count - 4, given) ||
        !make_call(call, given, numbers))
        return answer(ZETA_NOT_PLAIN);
    Made made;
    Owned *lse = made.add(ZETA_FLOAT32, 3, given.query.shape);
    if (!lse) return answer(ZETA_NO_MEMORY);
    call.lse_BHT = static_cast<float *>(lse->data());
    const int64_t found = run_beside_python([&] { return run_forward(call); });
    return found == ZETA_DONE ? made.give(0) : answer(found);
}

// differentiate(query, key, value, out, log-sum-exp, gradient of out, and, to be written, those of query,
// key and value, and of offsets and a dense bias or None, options ...)
PyObject *differentiate(PyObject *, PyObject *const *arguments, intptr_t count) {
    Plain given;
    PlainGradients gradients;
    Numbers numbers;
    ZetaCall call{};
    const int before = 11;
    if (count < before + NUM_CALL_OPTIONS ||
        !read_call(arguments, arguments + before, count - before, given) ||
        !read(arguments[4], gradients.lse) || !read(arguments[5], gradients.grad_out) ||
        !read(arguments[6], gradients.query) || !read(arguments[7], gradients.key) ||
        !read(arguments[8], gradients.value) || !read_or_none(arguments[9], gradients.offsets) ||
        !read_or_none(arguments[10], gradients.dense) || !make_call(call, given, numbers) ||
        !add_gradients(call, given, gradients))
        return answer(ZETA_NOT_PLAIN);
    return answer(run_beside_python([&] { return zeta_backward(&call); }));
}

// The call of layers of x, without the layers; false where x is not for it. `numbers`: the most rows and
// the number of threads.
bool read_numbers(PyObject *const *numbers, ZetaProjection &call, const Operand &x) {
    const int64_t most_rows = PyLong_AsLong(numbers[0]), num_threads = PyLong_AsLong(numbers[1]);
    return were_numbers() && begin_projection(call, x, most_rows, num_threads);
}

// The next layer: its weight, and its bias or None.
ZetaLayer *read_layer(ZetaProjection &call, PyObject *const *objects) {
    Operand weight, bias{};
    if (!read(objects[0], weight) || !read_or_none(objects[1], bias)) return nullptr;
    return add_layer(call, weight, bias);
}

// project(x, out, most_rows, num_threads, weight, bias or None)
PyObject *project(PyObject *, PyObject *const *arguments, intptr_t count) {
    Operand x, out;
    ZetaProjection call{};
    if (count != 6 || !read(arguments[0], x) || !read(arguments[1], out) ||
        !read_numbers(arguments + 2, call, x))
        return answer(ZETA_NOT_PLAIN);
    ZetaLayer *layer = read_layer(call, arguments + 4);
    if (!layer || !out.ndim || out.shape[out.ndim - 1] != layer->features ||
        out.numel() != call.rows * layer->features || !out.is_contiguous() ||
        out.dtype() != call.dtype)
        return answer(ZETA_NOT_PLAIN);
    layer->out = out.address();
    return answer(run_beside_python([&] { return run_projection(call); }));
}

// project_heads(x, head_dim, most_rows, num_threads, weight, bias or None, ...):
// x (B, L, width); a tuple of (B, heads, L, head_dim), or an answer.
PyObject *project_heads(PyObject *, PyObject *const *arguments, intptr_t count) {
    const intptr_t before = 4;
    Operand x;
    ZetaProjection call{};
    if (count <= before || (count - before) % 2 || (count - before) / 2 > ZETA_MOST_LAYERS ||
        !read(arguments[0], x) || x.ndim != 3 || !read_numbers(arguments + 2, call, x))
        return answer(ZETA_NOT_PLAIN);
    const int64_t head_dim = PyLong_AsLong(arguments[1]);
    if (!were_numbers() || head_dim < 1) return answer(ZETA_NOT_PLAIN);
    Made made;
    for (intptr_t i = before; i < count; i += 2) {
        ZetaLayer *layer = read_layer(call, arguments + i);
        if (!layer || layer->features % head_dim) return answer(ZETA_NOT_PLAIN);
        const int64_t shape[] = {x.shape[0], x.shape[1], layer->features / head_dim, head_dim};
        Owned *heads = made.add(call.dtype, 4, shape);
        if (!heads) return answer(ZETA_NO_MEMORY);
        heads->swap_dimensions(1, 2);
        layer->out = heads->data();
    }
    const int64_t found = run_beside_python([&] { return run_projection(call); });
    return found == ZETA_DONE ? made.give_all() : answer(found);
}

// rotate(interleaved, inverse, num_threads, x, out, cosines, sines, and of a second tensor the same)
PyObject *rotate(PyObject *, PyObject *const *arguments, intptr_t count) {
    const intptr_t before = 3, of_one = 4;
    if (count != before + of_one && count != before + ZETA_MOST_TURNED * of_one)
        return answer(ZETA_NOT_PLAIN);
    ZetaRotation call{};
    call.interleaved = PyLong_AsLong(arguments[0]);
    call.inverse = PyLong_AsLong(arguments[1]);
    call.num_threads = PyLong_AsLong(arguments[2]);
    if (!were_numbers()) return answer(ZETA_NOT_PLAIN);
    for (intptr_t i = before; i < count; i += of_one) {
        Operand x, out, cos, sin;
        if (!read(arguments[i], x) || !read(arguments[i + 1], out) ||
            !read(arguments[i + 2], cos) || !read(arguments[i + 3], sin) ||
            !add_turned(call, x, out, cos, sin))
            return answer(ZETA_NOT_PLAIN);
    }
    return answer(run_beside_python([&] { return run_rotation(call); }));
}

PyMethodDef methods[] = {{"attend", attend, METH_FASTCALL, nullptr},
                         {"attend_with_lse", attend_with_lse, METH_FASTCALL, nullptr},
                         {"differentiate", differentiate, METH_FASTCALL, nullptr},
                         {"project", project, METH_FASTCALL, nullptr},
                         {"project_heads", project_heads, METH_FASTCALL, nullptr},
                         {"rotate", rotate, METH_FASTCALL, nullptr}};

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

ZETA_EXPORT int64_t zeta_num_builtins(void) { return sizeof methods / sizeof *methods; }

// After torch was met: a builtin by its number, in the order above.
ZETA_EXPORT PyObject *zeta_builtin(int64_t number) {
    return PyCFunction_NewEx(&methods[number], nullptr, nullptr);
}

}  // extern "C"
