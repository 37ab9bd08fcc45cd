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
        machine.shared_store(machine.thread // 2, machine.word(1))


def test_reading_without_a_barrier(machine):
    machine.shared_store(machine.thread, machine.word(1))
    with pytest.raises(ValueError, match="without a barrier"):
        machine.shared_load(machine.thread)
    machine.barrier()
    assert machine.shared_load(machine.thread).tolist() == [1] * 32
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


def test_mma_int8_is_a_product_of_integers(machine, rng):
    a, b = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((16, 32), (32, 8)))
    c = rng.integers(-(2**20), 2**20, (16, 8)).astype(np.int32)
    g, quad = np.arange(32) // 4, np.arange(32) % 4

    def word(rows):
        return np.ascontiguousarray(rows).view(np.uint32).reshape(-1)

    run = np.arange(4)
    left = [
        word(a[g[:, None] + 8 * (i % 2), 4 * quad[:, None] + run + 16 * (i // 2)]) for i in range(4)
    ]
    right = [word(b[4 * quad[:, None] + run + 16 * i, g[:, None]]) for i in range(2)]
    places = [(g + 8 * (i // 2), 2 * quad + i % 2) for i in range(4)]
    product = a.astype(np.int32) @ b.astype(np.int32) + c
    parts = machine.mma_int8(left, right, [c[place].view(np.uint32) for place in places])
    for place, part in zip(places, parts, strict=True):
        np.testing.assert_array_equal(part.view(np.int32), product[place])
        np.testing.assert_array_equal(machine.rounded(part), product[place].astype(np.float32))


def test_words_taken_apart(machine):
    a, b = machine.word(0x33221100), machine.word(0x77665544)
    assert machine.bytes_of(a, b, 0x7210)[0] == 0x77221100
    assert machine.bytes_of(a, b, 0x5150)[0] == 0x55115500
    assert machine.lifted(a, 0x000F000F, machine.word(0x43004300))[0] == 0x43024300
    pair = machine.e4m3_as_half(machine.word(0x01C03808), "low")  # 2**-6, 1, -2, 2**-9
    assert machine.half_as_real("float16", pair, "low")[0] == 2.0**-6
    assert machine.half_as_real("float16", pair, "high")[0] == 1
    high = machine.e4m3_as_half(machine.word(0x01C03808), "high")
    assert machine.half_as_real("float16", high, "low")[0] == -2
    assert machine.half_as_real("float16", high, "high")[0] == 2.0**-9


def test_elements_outside_an_array(machine):
    with pytest.raises(IndexError, match="element 31 of an array of 31"):
        machine.real_at(np.zeros(31, np.float16), machine.thread)


def test_every_block_of_a_grid_runs():
    seen = []
    run(lambda m: seen.append(tuple(int(b[0]) for b in m.block)), grid=(2, 3), threads=32, shared=1)
    assert sorted(seen) == [(x, y) for x in range(2) for y in range(3)]
