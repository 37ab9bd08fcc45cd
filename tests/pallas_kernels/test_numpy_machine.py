# SPDX-License-Identifier: Apache-2.0
"""The interpreter refuses what a GPU would do without a word."""

import numpy as np
import pytest

from pallas_kernels.numpy_machine import NumpyMachine, run

pytestmark = pytest.mark.one_version  # numpy alone


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


# Shared memory of the following: two tiles of eight tokens, arrivals behind them.
TILE, ARRIVAL = 256, 512


@pytest.fixture
def warpgroup():
    """Four warps, with an arrival that one thread and its copies make a turn of."""
    machine = NumpyMachine(threads=128, block=(0, 0), shared=520)
    machine.start_arrivals(machine.word(ARRIVAL), 2, threads=1)
    machine.barrier()
    return machine


def copy(machine, *, place=0, words=32, count=32, arrival=ARRIVAL, nbytes=128):
    """One thread copies words and says how many bytes come."""
    source = machine.pointer(np.arange(words, dtype=np.uint32), machine.word(0))

    def body():
        machine.expect(machine.word(arrival), nbytes)
        machine.copy_words(machine.word(place), source, count, machine.word(arrival))

    machine.one_thread(machine.warp < 1, body)


def copy_tile(machine, place=0, arrival=ARRIVAL):
    """One thread copies eight tokens of ones."""
    copy_tokens(machine, np.ones((8, 64), np.float16), place=place, arrival=arrival)


def copy_tokens(machine, tokens, *, first=0, place=0, arrival=ARRIVAL):
    """One thread copies eight tokens."""

    def body():
        words = [machine.word(value) for value in (place, first, 0, arrival)]
        machine.expect(words[3], 1024)
        machine.copy_tokens(words[0], tokens, *words[1:3], 8, words[3])

    machine.one_thread(machine.warp < 1, body)


def multiply(machine, place=0, step=0, sums=None):
    """A product of ones with the tile at a place."""
    ones = [machine.word(0x3C003C00)] * 4
    return machine.wgmma("float16", [ones], machine.word(place), step, sums, 8)


def test_copies_are_seen_once_they_are_waited_for(warpgroup):
    machine = warpgroup
    copy(machine)
    with pytest.raises(ValueError, match="nobody has written"):
        machine.shared_load(machine.thread % 32)
    machine.wait_for(machine.word(ARRIVAL), machine.word(0))
    assert machine.shared_load(machine.thread % 32).tolist() == list(range(32)) * 4
    machine.wait_for(machine.word(ARRIVAL), machine.word(0))  # once more: in no time
    copy(machine, place=32)
    machine.wait_for(machine.word(ARRIVAL), machine.word(1))


def test_copies_that_are_not_aligned_or_leave_their_array(warpgroup):
    with pytest.raises(IndexError, match="32 words from 0 to 2 of shared memory"):
        copy(warpgroup, place=2)
    fresh = NumpyMachine(threads=128, block=(0, 0), shared=520)
    fresh.start_arrivals(fresh.word(ARRIVAL), 1, threads=1)
    with pytest.raises(IndexError, match="words to 32 of an array of 28"):
        copy(fresh, words=28)


def test_waiting_for_the_wrong_turn(warpgroup):
    copy(warpgroup)
    with pytest.raises(ValueError, match=r"turn \[1\] of an arrival that has had 1"):
        warpgroup.wait_for(warpgroup.word(ARRIVAL), warpgroup.word(1))
    with pytest.raises(ValueError, match=r"turn \[0\] of an arrival that has had 0"):
        warpgroup.wait_for(warpgroup.word(ARRIVAL + 2), warpgroup.word(0))  # nobody arrives there


def test_bytes_that_never_come(warpgroup):
    copy(warpgroup, nbytes=256)
    with pytest.raises(ValueError, match="expects 256 bytes, copies bring 128"):
        warpgroup.wait_for(warpgroup.word(ARRIVAL), warpgroup.word(0))


def test_expecting_before_the_last_turn_was_waited_for(warpgroup):
    copy(warpgroup)
    with pytest.raises(ValueError, match="told again what to expect before it was waited for"):
        copy(warpgroup, place=32)


def test_threads_that_never_arrive(warpgroup):
    warpgroup.start_arrivals(warpgroup.word(516), 1, threads=4)
    warpgroup.one_thread(warpgroup.warp < 3, lambda: warpgroup.arrive(warpgroup.word(516)))
    with pytest.raises(ValueError, match="3 threads arrive where 4 are waited for"):
        warpgroup.wait_for(warpgroup.word(516), warpgroup.word(0))
    warpgroup.one_thread(warpgroup.warp < 1, lambda: warpgroup.arrive(warpgroup.word(516)))
    warpgroup.wait_for(warpgroup.word(516), warpgroup.word(0))


def test_arrivals_start_at_one_place(warpgroup):
    with pytest.raises(ValueError, match="different places"):
        warpgroup.start_arrivals(warpgroup.thread, 1, threads=1)


def test_tokens_beyond_the_last_are_zeros(warpgroup):
    copy_tokens(warpgroup, np.ones((5, 64), np.float16), first=2)
    warpgroup.wait_for(warpgroup.word(ARRIVAL), warpgroup.word(0))
    for token in range(8):
        words = warpgroup.shared_load(warpgroup.thread % 32 + 32 * token)
        assert set(words.tolist()) == {0x3C003C00 if token < 3 else 0}
    with pytest.raises(
        IndexError, match="tokens at 128 of shared memory, must be a multiple of 256"
    ):
        copy_tile(warpgroup, place=128)


def test_wgmma_of_what_was_waited_for(warpgroup):
    copy_tile(warpgroup)
    with pytest.raises(ValueError, match="that nobody has written"):
        multiply(warpgroup)
    warpgroup.wait_for(warpgroup.word(ARRIVAL), warpgroup.word(0))
    sums = multiply(warpgroup)
    with pytest.raises(TypeError):
        warpgroup.plus(sums[0][0], warpgroup.real(1.0))  # it is under way
    sums = multiply(warpgroup, step=1, sums=sums)
    ((total, *_),) = warpgroup.wait(0, sums)
    assert total.tolist() == [32.0] * 128
    with pytest.raises(IndexError, match="one multiple of 256 a warpgroup"):
        multiply(warpgroup, place=128)


def test_wgmma_sees_copies_and_not_what_threads_wrote(warpgroup):
    for first in range(0, 256, 128):
        warpgroup.shared_store(warpgroup.thread + first, warpgroup.word(0x3C003C00))
    with pytest.raises(ValueError, match="it sees copies alone"):
        multiply(warpgroup)
    warpgroup.barrier()
    with pytest.raises(ValueError, match="it sees copies alone"):
        multiply(warpgroup)
    copy_tile(warpgroup)
    warpgroup.wait_for(warpgroup.word(ARRIVAL), warpgroup.word(0))
    ((total, *_),) = warpgroup.wait(0, multiply(warpgroup))
    assert total.tolist() == [16.0] * 128


def test_nothing_is_written_to_what_a_wgmma_may_still_read(warpgroup):
    machine, free = warpgroup, warpgroup.word(516)
    machine.start_arrivals(free, 1, threads=4)
    copy_tile(machine)
    machine.wait_for(machine.word(ARRIVAL), machine.word(0))
    sums = multiply(machine)
    with pytest.raises(ValueError, match="a wgmma may still be reading"):
        copy_tile(machine, arrival=ARRIVAL + 2)
    machine.start_arrivals(machine.word(ARRIVAL + 2), 1, threads=1)
    machine.wait(0, sums)  # these threads; others may not have come so far
    with pytest.raises(ValueError, match="a wgmma may still be reading"):
        machine.shared_store(machine.thread, machine.word(0))
    machine.one_thread(machine.warp < 4, lambda: machine.arrive(free))
    with pytest.raises(ValueError, match="a wgmma may still be reading"):
        copy_tile(machine, arrival=ARRIVAL + 2)
    machine.start_arrivals(machine.word(ARRIVAL + 2), 1, threads=1)
    machine.wait_for(free, machine.word(0))
    copy_tile(machine, arrival=ARRIVAL + 2)


@pytest.mark.parametrize("late", [False, True])
def test_no_copy_begins_to_what_is_loaded_after_it_was_freed(warpgroup, late):
    machine, free = warpgroup, warpgroup.word(516)
    machine.start_arrivals(free, 1, threads=4)
    copy(machine)
    machine.wait_for(machine.word(ARRIVAL), machine.word(0))
    machine.shared_load(machine.thread % 32)
    machine.one_thread(None, lambda: machine.arrive(free))
    if late:
        machine.shared_load(machine.thread % 32)
    machine.wait_for(free, machine.word(0))
    if not late:
        copy(machine)
        return
    with pytest.raises(
        ValueError, match="a copy begins to where threads may still be loading from"
    ):
        copy(machine)
    machine.barrier()
    machine.start_arrivals(machine.word(ARRIVAL), 1, threads=1)
    copy(machine)


def test_a_barrier_frees_what_was_waited_for_and_no_more(warpgroup):
    copy_tile(warpgroup)
    copy_tile(warpgroup, TILE, ARRIVAL + 2)
    for arrival in (ARRIVAL, ARRIVAL + 2):
        warpgroup.wait_for(warpgroup.word(arrival), warpgroup.word(0))
    sums = warpgroup.wait(1, multiply(warpgroup, TILE, sums=multiply(warpgroup)))
    warpgroup.barrier()
    warpgroup.shared_store(warpgroup.thread, warpgroup.word(0))
    with pytest.raises(ValueError, match="a wgmma may still be reading"):
        warpgroup.shared_store(warpgroup.thread, warpgroup.word(0), TILE)
    with pytest.raises(TypeError):
        warpgroup.times(sums[0][0], warpgroup.real(1.0))


def test_matrices_are_transposed_among_lanes(machine):
    machine.shared_store(machine.thread, machine.thread)
    machine.shared_store(machine.thread, machine.thread + 32, 32)
    machine.barrier()
    rows = machine.thread % 16 * 4
    words = machine.shared_load_matrices(rows)
    for matrix, part in enumerate(words):
        assert part.tolist() == [32 * (matrix % 2) + lane for lane in range(32)]
    with pytest.raises(IndexError, match="a row of 4 words of shared memory at 2"):
        machine.shared_load_matrices(rows + 2)


def test_rows_that_are_not_aligned(machine):
    with pytest.raises(IndexError, match="a row of 4 words of shared memory at 2"):
        machine.shared_load_row(machine.word(0), 4, 2)


def test_a_condition_for_one_thread_of_a_warp_does_not_part_it(warpgroup):
    with pytest.raises(ValueError, match="parts the warp"):
        warpgroup.one_thread(warpgroup.thread < 1, lambda: None)


def test_loads_where_a_condition_holds(machine):
    array = np.arange(8, dtype=np.uint32)
    pointer = machine.pointer(array, machine.thread)
    loaded = pointer.load_where(2, machine.thread < 6)
    assert loaded.tolist() == [2, 3, 4, 5, 6, 7, *[0] * 26]
    with pytest.raises(IndexError, match="word 8 of an array of 8"):
        pointer.load_where(2, machine.thread < 7)


@pytest.fixture
def two_warpgroups():
    return NumpyMachine(threads=256, block=(0, 0), shared=1024)


def rows_of_results(machine):
    """Each warp writes matrices whose columns are tokens: element [g, token] is 10 token + g."""
    lane = machine.thread % 32
    g, token = lane // 4, lane % 4 * 2
    pair = [(10 * (token + e) + g + 100 * machine.warp % 1000).astype(np.float32) for e in range(2)]
    words = [machine.half_pair("float16", *pair)] * 2
    place = machine.warp // 4 * 512 + lane % 8 * 32
    sixteenth = (machine.warp % 4 * 2 + lane // 8 % 2) ^ (lane % 8)
    machine.shared_store_matrices(place + sixteenth * 4, words)


def copied_out(machine, warpgroup, *, outputs=64):
    """What a warpgroup copies out, of eight tokens, six of which exist."""
    out = np.full((6, outputs), np.nan, np.float16)
    start, zero = machine.word(512 * warpgroup), machine.word(0)
    machine.one_thread(
        (machine.warp < 4 * warpgroup + 1) & (machine.word(4 * warpgroup) < machine.warp + 1),
        lambda: machine.copy_out(start, out, zero, zero, 8),
    )
    return out


def test_matrices_leave_as_rows_of_tokens(two_warpgroups):
    machine = two_warpgroups
    rows_of_results(machine)
    machine.warpgroup_barrier()
    out = copied_out(machine, 1)
    for token, output in np.ndindex(6, 64):
        warp = 4 + output // 16
        assert out[token, output] == 10 * token + output % 8 + 100 * warp
    assert copied_out(machine, 0, outputs=40).shape == (6, 40)


def test_copies_out_are_waited_for(two_warpgroups):
    machine = two_warpgroups
    rows_of_results(machine)
    with pytest.raises(ValueError, match="without a barrier after it was written"):
        copied_out(machine, 0)
    machine.warpgroup_barrier()
    copied_out(machine, 0)
    with pytest.raises(ValueError, match="a copy out may still be reading"):
        rows_of_results(machine)
    machine.wait_for_copies_out()
    with pytest.raises(ValueError, match="a copy out may still be reading"):
        rows_of_results(machine)  # who began the copy has waited; the others may not know yet
    machine.warpgroup_barrier()
    rows_of_results(machine)


def test_products_that_there_are_not(machine):
    ones = [[machine.word(0x01010101)] * 4]
    with pytest.raises(ValueError, match="no product of 40 tokens of int8"):
        machine.wgmma("int8", ones, machine.word(0), 0, None, 40)
    with pytest.raises(ValueError, match="no product of 20 tokens of float16"):
        machine.wgmma("float16", ones, machine.word(0), 0, None, 20)


def test_pointers_go_further_than_a_word_counts(machine):
    """Not one array of more than 2**32 words, but a place that would come round to it again."""
    pointer = machine.pointer(np.arange(64, dtype=np.uint32), machine.thread)
    assert pointer.advanced(machine.word(2), each=16).load(0, 1)[0].tolist() == list(range(32, 64))
    with pytest.raises(IndexError):
        pointer.advanced(machine.word(2**16), each=2**16).load(0, 1)


def test_a_warpgroup_sees_its_own_words_and_no_others(two_warpgroups):
    machine = two_warpgroups
    machine.shared_store(machine.thread, machine.thread)
    machine.warpgroup_barrier()
    assert machine.shared_load(machine.thread ^ 1)[0] == 1
    with pytest.raises(ValueError, match="that another warpgroup has written for itself"):
        machine.shared_load(machine.thread ^ 128)
    with pytest.raises(ValueError, match="overwrites word 128 of another warpgroup"):
        machine.shared_store(machine.thread ^ 128, machine.thread)
    fresh = NumpyMachine(threads=256, block=(0, 0), shared=256)
    fresh.shared_store(fresh.thread, fresh.thread)
    fresh.barrier()
    assert fresh.shared_load(fresh.thread ^ 128)[0] == 128


def test_two_parts_take_turns():
    machine, brought = NumpyMachine(threads=256, block=(3, 5), shared=1032), []
    array = np.arange(2048, dtype=np.uint32)
    machine.start_arrivals(machine.word(1024), 1, threads=1)
    machine.start_arrivals(machine.word(1026), 1, threads=4)
    machine.barrier()

    def read(part):
        for turn in range(3):
            part.wait_for(part.word(1024), part.word(turn))
            brought.append(part.shared_load(part.thread)[:2].tolist())
            part.one_thread(None, lambda: part.arrive(part.word(1026)))

    def copy(part):
        assert part.thread.tolist() == list(range(128, 256))
        for turn in range(3):
            part.wait_for(part.word(1026), part.word(turn + 1))

            def begin(turn=turn):
                part.expect(part.word(1024), 512)
                place = part.pointer(array, part.word(128 * turn))
                part.copy_words(part.word(0), place, 128, part.word(1024))

            part.one_thread(part.warp < 5, begin)

    machine.parted(128, (64, 32), read, copy)
    assert brought == [[0, 1], [128, 129], [256, 257]]
    assert machine.thread.size == 256
    assert machine.block[1].tolist() == [5] * 256


@pytest.mark.parametrize("stuck", ["first", "rest", "both"])
def test_a_part_that_waits_for_what_nobody_does(stuck):
    machine = NumpyMachine(threads=256, block=(0, 0), shared=8)
    machine.start_arrivals(machine.word(0), 2, threads=4)
    machine.barrier()

    def program(name, own):
        def run(part):
            if stuck in (name, "both"):
                part.wait_for(part.word(own), part.word(0))

        return run

    with pytest.raises(ValueError, match="of an arrival that has had 0 is waited for"):
        machine.parted(128, (64, 32), program("first", 0), program("rest", 2))


def test_what_a_part_refuses_is_raised():
    machine = NumpyMachine(threads=256, block=(0, 0), shared=8)
    machine.start_arrivals(machine.word(4), 1, threads=4)
    machine.barrier()
    with pytest.raises(ValueError, match="that nobody has written"):
        machine.parted(
            128,
            (64, 32),
            lambda part: part.wait_for(part.word(4), part.word(0)),
            lambda part: part.shared_load(part.word(0)),
        )
    with pytest.raises(ValueError, match="registers for 128 of 256 threads"):
        machine.parted(128, (300, 250), lambda part: None, lambda part: None)
