/*
 * The compiled fold: ckpt_ema._compiled.
 *
 * Only the C library and CPython's limited API of 3.10, so that one build serves every later Python.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Return which vector instructions are used on this processor. */
static PyObject *
vector(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing))
{
    const char *name = "plain";
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
        && __builtin_cpu_supports("bmi2")) {
        name = "x86-64-v3";
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl")) {
            name = "x86-64-v4";
        }
    }
#elif defined(__aarch64__)
    name = "neon"; /* every processor of this kind has it */
#endif
    return PyUnicode_FromString(name);
}

static PyMethodDef functions[] = {
    {"vector", vector, METH_NOARGS, PyDoc_STR("Return which vector instructions are used.")},
    {NULL, NULL, 0, NULL},
};

static int
fill(PyObject *module)
{
    return PyModule_AddStringConstant(module, "VERSION", CKPT_EMA_VERSION);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)fill},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ckpt_ema._compiled",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__compiled(void)
{
    return PyModuleDef_Init(&definition);
}
