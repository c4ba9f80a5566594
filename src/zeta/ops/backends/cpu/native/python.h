// What is used of Python's stable ABI, declared here: the library is built without Python's headers, and
// runs beside any version of it.
//
// The functions are weak. They are there whenever Python can see them; `has_python` asks.
#pragma once

#include <stdint.h>

extern "C" {

struct PyObject;
struct PyThreadState;
struct PyTypeObject;

// A builtin that takes its arguments as they stand on the stack: METH_FASTCALL.
typedef PyObject *(*PyFunction)(PyObject *self, PyObject *const *arguments, intptr_t count);
struct PyMethodDef {
    const char *name;
    PyFunction function;
    int flags;
    const char *doc;
};
enum { METH_FASTCALL = 0x80 };

#define ZETA_PYTHON __attribute__((weak))
ZETA_PYTHON PyObject *PyCFunction_NewEx(PyMethodDef *, PyObject *self, PyObject *module);
ZETA_PYTHON void *PyCapsule_GetPointer(PyObject *, const char *name);
ZETA_PYTHON PyObject *PyObject_GetAttrString(PyObject *, const char *name);
ZETA_PYTHON PyObject *PyObject_Type(PyObject *);
ZETA_PYTHON PyObject *PyTuple_New(intptr_t length);
ZETA_PYTHON int PyTuple_SetItem(PyObject *, intptr_t place, PyObject *item);  // takes the item
ZETA_PYTHON PyObject *PyLong_FromLong(long);
ZETA_PYTHON long PyLong_AsLong(PyObject *);
ZETA_PYTHON double PyFloat_AsDouble(PyObject *);
ZETA_PYTHON PyObject *PyErr_Occurred(void);
ZETA_PYTHON void PyErr_Clear(void);
ZETA_PYTHON void Py_IncRef(PyObject *);
ZETA_PYTHON void Py_DecRef(PyObject *);
ZETA_PYTHON PyThreadState *PyEval_SaveThread(void);
ZETA_PYTHON void PyEval_RestoreThread(PyThreadState *);
ZETA_PYTHON extern PyObject _Py_NoneStruct;
ZETA_PYTHON extern PyTypeObject PyFloat_Type;
#undef ZETA_PYTHON

}  // extern "C"

inline bool has_python() { return PyCFunction_NewEx && PyEval_SaveThread; }
