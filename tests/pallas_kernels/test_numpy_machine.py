# SPDX-License-Identifier: Apache-2.0
"""The interpreter refuses what a GPU would do without a word."""

import numpy as np
import pytest

from pallas_kernels.numpy_machine import NumpyMachine, run


@pytest.fixture
def machine():
    return NumpyMachine(threads=32, block=(0, 0), shared=64)


def test_reads_outside_an_array(machine):
    array = np.zeros(40, np.float32)
    machine.pointer(array, machine.thread).load(8, 1)
    with pytest.raises(IndexError, match="words 9 to 40 of an array of 40"):
        machine.pointer(array, machine.thread).load(9, 1)


def test_vectors_that_are_not_aligned(machine):
    with pytest.raises(IndexError, match="a vector of 4 words at 2"):
        machine.pointer(np.zeros(256, np.float32), machine.thread * 4).load(2, 4)


def test_two_threads_write_one_place(machine):
    with pytest.raises(ValueError, match="threads 0 and 1 race for word 0"):
        machine.shared_store(machine.thread // 2, machine.real(1.0))


def test_reading_without_a_barrier(machine):
    machine.shared_store(machine.thread, machine.real(1.0))
    with pytest.raises(ValueError, match="without a barrier"):
        machine.shared_load(machine.thread)
    machine.barrier()
    assert machine.shared_load(machine.thread).tolist() == [1.0] * 32
    with pytest.raises(ValueError, match="nobody has written"):
        machine.shared_load(machine.thread + 1)


def test_storing_twice(machine):
    out = np.full(64, np.nan, np.float32)
    where = machine.thread < 32
    machine.store(out, machine.thread, machine.real(1.0), where)
    with pytest.raises(ValueError, match="stored to twice"):
        machine.store(out, machine.thread, machine.real(1.0), where)
    with pytest.raises(ValueError, match="two threads store to one place"):
        machine.store(out, machine.thread // 2 + 32, machine.real(1.0), where)


def test_threads_that_have_left_a_loop_keep_what_they_carry(machine):
    count = machine.minimum(machine.thread, 3)
    (total,) = machine.loop(count, [machine.word(0)], lambda i, carry: [carry[0] + i + 1])
    assert total.tolist() == [0, 1, 3] + [6] * 29


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_mma_is_a_matrix_product(machine, half, rng):
    dtype = np.dtype(half) if half == "float16" else np.dtype("bfloat16")
    a, b, c = (
        rng.integers(-4, 5, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8))
    )
    g, quad = np.arange(32) // 4, np.arange(32) % 4

    def pair(matrix, rows, columns):
        both = np.stack([matrix[r, c] for r, c in zip(rows, columns, strict=True)], -1)
        return np.ascontiguousarray(both.astype(dtype)).view(np.uint32).reshape(-1)

    left = [
        pair(a, (g + 8 * (i % 2),) * 2, (2 * quad + 8 * (i // 2), 2 * quad + 1 + 8 * (i // 2)))
        for i in range(4)
    ]
    right = [pair(b, (2 * quad + 8 * i, 2 * quad + 1 + 8 * i), (g, g)) for i in range(2)]
    sums = [c[g + 8 * (i // 2), 2 * quad + i % 2] for i in range(4)]
    product = a @ b + c
    for i, part in enumerate(machine.mma(half, left, right, sums)):
        np.testing.assert_array_equal(part, product[g + 8 * (i // 2), 2 * quad + i % 2])


def test_every_block_of_a_grid_runs():
    seen = []
    run(lambda m: seen.append(tuple(int(b[0]) for b in m.block)), grid=(2, 3), threads=32, shared=1)
    assert sorted(seen) == [(x, y) for x in range(2) for y in range(3)]
