"""astra.lapack: the bits of scipy's wrappers, and other threads run while LAPACK does.

scipy's own wrappers are the reference. A few seconds.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from scipy.linalg import LinAlgError, eigh_tridiagonal, eigvalsh_tridiagonal
from scipy.linalg import lapack as wrappers

from astra import lapack
from astra.errors import AstraError

MOST_TURNS_LOCKED = 3  # of another thread, during a call that holds the lock


def draw_symmetric(size: int) -> np.ndarray:
    """Return a symmetric matrix, (size, size), in LAPACK's order."""
    half = np.random.default_rng(size).standard_normal((size, size))
    return np.asfortranarray(half + half.T)


def assert_same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(wanted).tobytes()


def multiply_by_wrapper(reflectors: np.ndarray, tau: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return `H vectors` as scipy's wrapper of ormqr computes it."""
    product = vectors.copy()
    factors = ("L", "N", reflectors[1:, :-1], tau, vectors[1:])
    _, workspace, _ = wrappers.dormqr(*factors, lwork=-1)
    product[1:], _, info = wrappers.dormqr(*factors, lwork=int(workspace[0]))
    assert info == 0
    return product


@pytest.mark.parametrize("size", [1, 2, 7, 100, 300])
def test_results_are_the_bits_of_scipys_wrappers(size: int) -> None:
    matrix = draw_symmetric(size)
    before = matrix.copy()
    workspace, _ = wrappers.dsytrd_lwork(size, lower=1)
    *wanted, info = wrappers.dsytrd(matrix, lower=1, lwork=int(workspace))
    assert info == 0
    found = lapack.reduce_to_tridiagonal(matrix)
    for one, other in zip(found, wanted, strict=True):
        assert_same_bits(one, other)
    reflectors, diagonal, off_diagonal, tau = found
    values = lapack.compute_eigenvalues(diagonal, off_diagonal)
    assert_same_bits(values, eigvalsh_tridiagonal(diagonal, off_diagonal))
    for start, end in {(0, size), (0, 1), (size // 3, size // 3 + (size + 1) // 2)}:
        vectors = lapack.compute_eigenvectors(diagonal, off_diagonal, start, end)
        wanted_vectors = eigh_tridiagonal(
            diagonal,
            off_diagonal,
            select="i",
            select_range=(start, end - 1),
            lapack_driver="stemr",
        )[1]
        assert_same_bits(vectors, wanted_vectors)
        product = lapack.multiply_reflectors(reflectors, tau, vectors)
        if size > 1:  # else there are no reflectors, and H is the identity
            wanted_vectors = multiply_by_wrapper(reflectors, tau, wanted_vectors)
        assert_same_bits(product, wanted_vectors)
    assert_same_bits(matrix, before)
    for one, other in zip(found, wanted, strict=True):  # no call changed its inputs
        assert_same_bits(one, other)


@contextmanager
def count_turns() -> Iterator[list[int]]:
    """Count, in the one entry of the list, how often another thread has had the lock.

    The thread takes the lock again after each wait of a millisecond. A call that holds the lock
    throughout leaves it a turn or two, at the call's start and end, however slow the machine is.
    """
    turns, stop = [0], threading.Event()

    def take_turns() -> None:
        while not stop.wait(0.001):
            turns[0] += 1

    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        yield turns
    finally:
        stop.set()
        thread.join()


def test_other_threads_run_during_every_routine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts inside the calls of LAPACK alone: numpy's copies release the lock too.

    Each call takes a tenth of a second or more: about a hundred turns on an idle machine.
    """
    load, most = lapack._load_routine, {}

    def load_counted(name: str) -> Callable[..., None]:
        def run(*pointers: object) -> None:
            before = turns[0]
            load(name)(*pointers)
            most[name] = max(most.get(name, 0), turns[0] - before)

        return run

    monkeypatch.setattr(lapack, "_load_routine", load_counted)
    long = np.random.default_rng(0).standard_normal(6000)
    with count_turns() as turns:
        reflectors, diagonal, off_diagonal, tau = lapack.reduce_to_tridiagonal(draw_symmetric(1200))
        lapack.compute_eigenvalues(long, long[1:])
        vectors = lapack.compute_eigenvectors(diagonal, off_diagonal, 0, 1200)
        lapack.multiply_reflectors(reflectors, tau, np.tile(vectors, 3))
    assert most.keys() == lapack.SIGNATURES.keys()
    assert min(most.values()) > MOST_TURNS_LOCKED, most


def test_scipys_wrapper_holds_the_lock() -> None:
    """So the count notices a call that does. Where this fails, scipy needs astra.lapack no more."""
    matrix = draw_symmetric(1200)
    with count_turns() as turns:
        before = turns[0]
        wrappers.dsytrd(matrix, lower=1, lwork=32 * 1200, overwrite_a=1)  # without a copy
        assert turns[0] - before <= MOST_TURNS_LOCKED


def test_failures_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="float32"):
        lapack.reduce_to_tridiagonal(draw_symmetric(3).astype(np.float32))
    with pytest.raises(ValueError, match="contiguous"):
        lapack._call("dsytrd", "L", 3, np.ones((3, 6))[:, ::2], 3, *[np.ones(3)] * 4, 3)

    def fail(*pointers: int) -> None:
        ctypes.c_int.from_address(pointers[-1]).value = 3

    monkeypatch.setattr(lapack, "_load_routine", lambda _: fail)
    with pytest.raises(LinAlgError, match="sytrd: info 3"):
        lapack.reduce_to_tridiagonal(draw_symmetric(3))


def test_a_routine_with_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lapack.SIGNATURES, "dsterf", "iddii")
    with pytest.raises(AstraError, match="scipy's dsterf has the signature void"):
        lapack._load_routine("dsterf")
