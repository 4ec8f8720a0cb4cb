"""LAPACK's routines for symmetric eigenproblems, called with Python's global lock released.

scipy's wrappers (f2py) hold the lock until LAPACK returns, long for a large matrix. Meanwhile no other
thread of the process runs, such as the one that tells other processes that this one lives.
ctypes releases the lock during a call.

The routines are the ones that scipy calls. scipy documents `scipy.linalg.cython_lapack` as its
LAPACK for Cython, and Cython exports every function of it as a capsule: an address with its C
signature, which is checked here. No other interface of scipy gives addresses. All arguments, and
the sizes of workspaces, from which LAPACK derives the sizes of its blocks, are those of scipy's
wrappers, so the results are the same bits.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.linalg import LinAlgError, cython_lapack

from astra.errors import AstraError

Argument = str | int | float | np.ndarray
# What each argument points to: c is char, i is int, d is double. The last argument is info.
SIGNATURES = {
    "dsytrd": "cididdddii",
    "dstevd": "cidddidiiii",
    "dstemr": "cciddddiiiddiiiidiiii",
    "dormqr": "cciiididdidii",
}


def reduce_to_tridiagonal(
    matrix: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the tridiagonal form of a symmetric matrix, `matrix = H T H^T`, from sytrd.

    Args:
        matrix: (d, d), fp64; its lower triangle is read.

    Returns:
        The reflectors of H below the first subdiagonal, (d, d); the diagonal of T, (d,); its
        off-diagonal, (d - 1,); and the scales of the reflectors, (d - 1,).

    Raises:
        LinAlgError: LAPACK fails. So do the functions below.
    """
    size = len(matrix)
    reflectors = np.array(matrix, order="F")
    diagonal, off_diagonal, tau = np.empty(size), np.empty(size - 1), np.empty(size - 1)

    def call(work: np.ndarray, lwork: int) -> None:
        _call("dsytrd", "L", size, reflectors, size, diagonal, off_diagonal, tau, work, lwork)

    _call_with_best_workspace(call)
    return reflectors, diagonal, off_diagonal, tau


def compute_eigenvalues(diagonal: np.ndarray, off_diagonal: np.ndarray) -> np.ndarray:
    """Return all eigenvalues of a tridiagonal matrix, ascending, from stevd: (d,)."""
    values, destroyed = diagonal.copy(), off_diagonal.copy()
    vectors, work, iwork = np.empty(1), np.empty(1), np.empty(1, np.intc)
    _call("dstevd", "N", len(values), values, destroyed, vectors, 1, work, 1, iwork, 1)
    return values


def compute_eigenvectors(
    diagonal: np.ndarray, off_diagonal: np.ndarray, start: int, end: int
) -> np.ndarray:
    """Return eigenvectors start to end - 1 of a tridiagonal matrix, from stemr: (d, end - start).

    Args:
        start, end: 0-based numbers in ascending order of eigenvalue; start is below end.
    """
    size, count = len(diagonal), end - start
    destroyed = diagonal.copy(), np.append(off_diagonal, 0.0)  # stemr wants d entries of both
    num_found = np.zeros(1, np.intc)
    values, vectors = np.empty(size), np.empty((size, count), order="F")
    support, tries_accuracy = np.empty(2 * count, np.intc), np.ones(1, np.intc)
    # stemr has no blocks: the least sizes of its workspaces are the best ones.
    work, iwork = np.empty(18 * size), np.empty(10 * size, np.intc)
    selection = "V", "I", size, *destroyed, 0.0, 1.0, start + 1, end
    found = num_found, values, vectors, size, count, support, tries_accuracy
    _call("dstemr", *selection, *found, work, len(work), iwork, len(iwork))
    return vectors[:, : num_found[0]]


def multiply_reflectors(reflectors: np.ndarray, tau: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return `H columns`, (d, r), from ormqr, with H as reduce_to_tridiagonal returned it."""
    product = columns.copy(order="F")
    # H leaves the first row as it is: its reflectors start one row below the diagonal. Copies as
    # scipy's wrapper makes them, since columns at other distances might be summed otherwise.
    below_first = np.array(columns[1:], order="F")
    shifted = np.array(reflectors[1:, :-1], order="F")
    rows, leading = len(tau), max(1, len(tau))
    sizes = rows, columns.shape[1], rows

    def call(work: np.ndarray, lwork: int) -> None:
        factors = shifted, leading, tau, below_first, leading
        _call("dormqr", "L", "N", *sizes, *factors, work, lwork)

    _call_with_best_workspace(call)
    product[1:] = below_first
    return product


def _call_with_best_workspace(call: Callable[[np.ndarray, int], None]) -> None:
    """Run `call(work, lwork)` with the workspace that LAPACK names as the best."""
    best = np.empty(1)
    call(best, -1)  # asks for the size and computes nothing else
    lwork = int(best[0])
    call(np.empty(lwork), lwork)


def _call(name: str, *arguments: Argument) -> None:
    """Call a LAPACK routine on pointers to `arguments` and to info, without the global lock.

    Raises:
        LinAlgError: info is not 0.
    """
    info = np.zeros(1, np.intc)
    pointers = []
    for kind, argument in zip(SIGNATURES[name], (*arguments, info), strict=True):
        pointers.append(_point_at(argument, kind))
    _load_routine(name)(*pointers)
    if info[0]:
        raise LinAlgError(f"{name[1:]}: info {info[0]}")


def _point_at(argument: Argument, kind: str) -> object:
    """Return a pointer to `argument`, of a kind of SIGNATURES; of an array to its first entry."""
    if isinstance(argument, np.ndarray):
        if argument.dtype != {"i": np.intc, "d": np.float64}[kind]:
            raise TypeError(f"an array of {argument.dtype} where LAPACK takes {kind!r}")
        if not argument.flags.f_contiguous:
            raise ValueError("an array that is not contiguous by columns, as LAPACK takes it")
        return argument.ctypes.data
    match kind:
        case "c":
            return ctypes.byref(ctypes.c_char(argument.encode()))
        case "i":
            return ctypes.byref(ctypes.c_int(argument))
    return ctypes.byref(ctypes.c_double(argument))


@cache
def _load_routine(name: str) -> Callable[..., None]:
    """Return a LAPACK routine of scipy that takes pointers and is called without the global lock.

    Raises:
        AstraError: its arguments are not those of SIGNATURES, for example 64-bit integers.
    """
    capsule = cython_lapack.__pyx_capi__[name]
    # Own prototypes: those of ctypes.pythonapi's attributes are shared by the whole process.
    get_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
        ("PyCapsule_GetName", ctypes.pythonapi)
    )
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    signature = get_name(capsule)
    # For example "void (char *, int *, __pyx_t_5scipy_6linalg_13cython_lapack_d *)".
    result, _, listed = signature.decode().rstrip(")").partition(" (")
    kinds = ""
    for argument in listed.split(", "):
        base = argument.removesuffix(" *")
        is_double = base.endswith("cython_lapack_d")
        kinds += "d" if is_double else {"char": "c", "int": "i"}.get(base, "?")
    if result != "void" or kinds != SIGNATURES[name]:
        raise AstraError(
            f"scipy's {name} has the signature {signature.decode()}, which this version cannot "
            "call; install the scipy of requirements.txt"
        )
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(kinds))
    return prototype(get_pointer(capsule, signature))
