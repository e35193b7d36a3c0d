"""The compiled kernel: the reference's bytes on every instruction set this machine has, for every input.

`make sanitize` runs this file with the kernel under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import ctypes
import os
import threading

import pytest
import torch

from kvstore.kernels import best, cpu, reference, reference_content
from kvstore.kernels import reference_kv as kv
from kvstore.kernels import reference_turn as turn
from kvstore.kernels.tables import table

KERNELS = cpu.kernels()
if not KERNELS:
    pytest.skip("the compiled kernel is not installed (make kernel)", allow_module_level=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 2, 31, 63, 64, 65, 127, 4096, 100_001]
SHAPES = [
    (2, 100, 3, 64),
    (1, 1, 1, 64),
    (1, 7, 2, 80),
    (3, 256, 2, 128),
    (1, 70, 1, 33),
    (2, 40, 3, 100),
    (1, 90, 1, 4),
]


def ids(kernel):
    return cpu.ISAS[kernel.isa]


def bits(x):
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=KERNELS, ids=ids)
def kernel(request):
    return request.param


@pytest.mark.parametrize("scale", [1.0, 1e-39, 2e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_codes_scales_and_decoded_bits_are_the_reference_s(kernel, dtype, scale):
    for n in SIZES:
        x = torch.randn(n, generator=torch.Generator().manual_seed(n)).clamp(-3, 3).mul(scale).to(dtype)
        codes, absmax = reference.quantize(x)
        mine = kernel.nf4_encode(x)
        expected = codes, absmax, reference.sums(x, codes, absmax)
        assert [bits(part) for part in mine] == [bits(part) for part in expected]
        expected, out = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
        kernel.nf4_decode(codes, absmax, out)
        assert bits(out) == bits(reference.dequantize(codes, absmax, expected))


@pytest.mark.parametrize("b", [1, 255, 256, 257, 5000])
def test_nested_scales_are_the_reference_s_bytes(kernel, b):
    sums = torch.randint(0, 1 << 20, (3, b), generator=torch.Generator().manual_seed(b), dtype=torch.int32)
    random = torch.rand(b, generator=torch.Generator().manual_seed(b))
    for absmax in (random, random.pow(8) * 1e3, torch.full((b,), 2.5), torch.zeros(b)):
        codes, nested, offset, squares = kernel.nf4_scales(absmax, sums)
        expected = reference.quantize_scales(absmax)
        assert bits(codes) == bits(expected[0])
        assert bits(nested) == bits(expected[1])
        assert offset == expected[2]
        decoded = reference.dequantize_scales(*expected)
        assert squares.sum(dim=0).tolist() == pytest.approx(reference.squares(absmax, sums, decoded).tolist(), rel=1e-9)


def test_every_float_near_a_threshold_gets_the_reference_s_code(kernel):
    """All floats within 4,096 steps of each threshold, of zero and of one, and a sweep between."""
    centres = torch.cat((table("thresholds", torch.device("cpu")), torch.tensor([1.0, -1.0])))
    steps = torch.arange(-4096, 4096, dtype=torch.int32)
    near = (centres.view(torch.int32)[:, None] + steps).view(-1).view(torch.float32)
    z = torch.cat((near, torch.linspace(-1, 1, 1 << 20), torch.logspace(-45, 0, 1 << 12), torch.zeros(2)))
    z = z.clamp(-1, 1)
    # One 1.0 a block makes the scale, and so the factor, exactly 1: the kernel sees these very floats.
    body = torch.nn.functional.pad(z, (0, -z.numel() % 63)).view(-1, 63)
    x = torch.cat((torch.ones(body.shape[0], 1), body), dim=1).view(-1)
    codes, _absmax, _sums = kernel.nf4_encode(x)
    assert bits(codes) == bits(reference.packed(reference.codes_of(x)))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes alone for all, in the portable form; a busy machine takes many times that
def test_every_float_in_one_unit_gets_the_reference_s_code(kernel):
    """All 2^31 floats of magnitude up to 1, against thresholds by bisection; a sixteenth outside `make torture`."""
    thresholds = table("thresholds", torch.device("cpu"))
    step = 63 << 14
    for start in range(0, 0x3F800001, step if "KVSTORED_TORTURE" in os.environ else 16 * step):
        magnitude = torch.arange(start, min(start + step, 0x3F800001), dtype=torch.int32).view(torch.float32)
        body = torch.nn.functional.pad(magnitude, (0, -magnitude.numel() % 63)).view(-1, 63)
        for sign in (1.0, -1.0):
            x = torch.cat((torch.ones(body.shape[0], 1), body * sign), dim=1).view(-1)
            codes, _absmax, _sums = kernel.nf4_encode(x)
            expected = torch.bucketize(x, thresholds, out_int32=True).to(torch.uint8)
            assert bits(codes) == bits(reference.packed(expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_reported(kernel, bad):
    for at in (0, 63, 64, 129):
        x = torch.ones(130)
        x[at] = bad
        assert kernel.nf4_encode(x) is None
        rows = cpu.Rows(1, 1, 1, 130, 130, 2, 64, 0)
        assert kernel.kv_encode(x, rows, None) is None


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_rows_are_the_reference_s_bytes(kernel, dtype, shape, role):
    """Also when the rows are a view behind a kept token, whose memory must not be touched."""
    g = torch.Generator().manual_seed(shape[1])
    full = (torch.randn(shape, generator=g) + 3 * torch.randn(shape[-1], generator=g)).to(dtype)
    skip = 1 if shape[1] > 4 else 0
    body = full[:, skip:]
    outer, tokens, inner, d = body.shape
    size, block = kv.rotation_size(d), kv.KEY_BLOCK if role == "key" else kv.VALUE_BLOCK
    groups = kv.group_count(tokens) if role == "key" else 0
    rows = cpu.Rows(outer, tokens, inner, d, shape[1] * inner * d, size, block, groups)
    plain = body.to(torch.float32).contiguous()
    means, centre = None, torch.zeros(1)
    if groups:
        expected = kv.group_means(plain)
        *mine, means, untold = kernel.kv_means(body, rows)
        assert untold is None
        assert [bits(part) for part in mine] == [bits(part) for part in expected]
        assert bits(kernel.kv_expand(rows, *expected)) == bits(means)
        centre = kv.expand_means(*expected, tokens)
        plain = plain - centre
    coded = kv.encode_rotated(kv.rotate(plain, size).reshape(-1), block)
    mine = kernel.kv_encode(body, rows, means)
    assert [bits(p) for p in mine] == [bits(p) for p in (coded.codes, coded.scales, coded.tops, coded.error)]
    flat = kv.decode_rotated(coded, block, size)[: plain.numel()]
    values = kv.rotate(flat, size).view(plain.shape)
    out = torch.full(shape, 7.0, dtype=dtype)
    kernel.kv_decode(mine[:3], means, rows, out[:, skip:])
    assert bits(out[:, skip:]) == bits((values + centre if groups else values).to(dtype))
    assert (out[:, :skip] == 7).all()


def coded_at_random(shape, block, seed):
    """Codes, scales and tops of any rows, and means of them: (coded, means, rows)."""
    g = torch.Generator().manual_seed(seed)
    outer, tokens, inner, d = shape
    blocks = -(-outer * tokens * inner * d // block)
    codes = torch.randint(0, 256, (blocks * block // 2,), generator=g, dtype=torch.uint8)
    scales = torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8)
    tops = torch.full((-(-blocks // 256),), 127 << 6, dtype=torch.int16)
    rows = cpu.Rows(outer, tokens, inner, d, tokens * inner * d, kv.rotation_size(d), block, kv.group_count(tokens))
    return (codes, scales, tops), torch.randn(outer, rows.groups, inner, d, generator=g), rows


@pytest.mark.parametrize(
    "shape", [(2, 130, 3, 64), (1, 96, 8, 128), (1, 70, 1, 192), (3, 9, 5, 64), (1, 40, 3, 80)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_heads_means_turn_and_whole_rows_are_decoded_as_the_reference_does(kernel, dtype, shape):
    """Tiles of 256 blocks begin and end inside rows; of the pairs of a head some stand still, or all but eight."""
    outer, _, inner, d = shape
    all_turn, neighbours = cpu.Rotary(d, interleaved=False), cpu.Rotary(d // 4 * 2, interleaved=True)
    for seed, (rotary, only) in enumerate(
        ((all_turn, slice(None)), (neighbours, slice(None)), (all_turn, slice(2, 3)))
    ):
        coded, means, rows = coded_at_random(shape, (64, kv.KEY_BLOCK)[seed % 2], seed)
        g = torch.Generator().manual_seed(seed)
        chosen = torch.randint(0, 256, (2, outer, inner, -(-rotary.channels // 16)), generator=g, dtype=torch.uint8)
        turning = torch.zeros_like(chosen[0])
        turning[..., only] = (chosen[0] & chosen[1])[..., only]
        turns = cpu.Turns(rotary, torch.rand(outer, rotary.channels // 2, generator=g), turning)
        mine, expected = torch.empty(2, *shape, dtype=dtype)
        kernel.kv_decode(coded, means, rows, mine, turns)
        turn.kv_decode(coded, means, rows, expected, turns)
        assert bits(mine) == bits(expected)


@pytest.mark.parametrize("d", [64, 128])
def test_what_lies_between_two_bfloat16_becomes_the_even_one(kernel, d):
    shape = (1, 80, 3, d)
    (codes, scales, tops), means, rows = coded_at_random(shape, 64, 5)
    codes.fill_(0x77)  # levels of 0: the mean alone is left
    between = ((means.view(torch.int32) & -0x10000) | 0x8000).view(torch.float32)
    means = torch.where(means > 1.0, between, means)
    mine, expected = torch.empty(2, *shape, dtype=torch.bfloat16)
    kernel.kv_decode((codes, scales, tops), means, rows, mine)
    turn.kv_decode((codes, scales, tops), means, rows, expected)
    assert bits(mine) == bits(expected)


@pytest.mark.parametrize("shape", [*(of for of in SHAPES if of[1] >= 8), (2, 90, 2, 160), (1, 65, 1, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_keys_show_of_their_means_is_the_reference_s(kernel, dtype, shape):
    """Bit for bit, but for deviations over all tokens: which are kept and how pairs turn decides bytes."""
    g = torch.Generator().manual_seed(shape[1])
    outer, tokens, inner, d = shape
    t = torch.arange(tokens, dtype=torch.float32)[:, None, None]
    x = (torch.randn(shape, generator=g) + 9 * torch.cos(0.7 * t + torch.arange(d))).to(dtype)
    rows = cpu.Rows(
        outer, tokens, inner, d, tokens * inner * d, kv.rotation_size(d), kv.KEY_BLOCK, kv.group_count(tokens)
    )
    lag = max(1, min(tokens, 64) // 2)
    for rotary in (cpu.Rotary(d // 2 * 2, interleaved=False), cpu.Rotary(d // 4 * 2, interleaved=True)):
        how = cpu.Phases(1, (1, max(1, lag // 4), lag), 2.0, 0.4, 0.001)
        mine, expected = kernel.kv_phases(x, rows, rotary, how), turn.kv_phases(x, rows, rotary, how)
        assert [bits(part) for part in mine] == [bits(part) for part in expected]
        tangents = torch.rand(outer, rotary.channels // 2, generator=g)
        mine, expected = kernel.kv_sums(x, rows, rotary, tangents), turn.kv_sums(x, rows, rotary, tangents)
        assert [bits(part) for part in mine[:3]] == [bits(part) for part in expected[:3]]
    how = cpu.Along(1, 3, 1e3, 0.1)
    mine, expected = kernel.kv_along(x, rows, how), turn.kv_along(x, rows, how)
    assert bits(mine[0]) == bits(expected[0])
    assert bool((mine[1] > 0).any())
    assert torch.allclose(mine[1], expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(2, 70, 3, 64), (1, 9, 2, 256), (3, 8, 40, 128)], ids=str)
def test_errors_of_blocks_are_summed_head_by_head(kernel, shape):
    outer, tokens, inner, d = shape
    rows = cpu.Rows(outer, tokens, inner, d, tokens * inner * d, kv.rotation_size(d), kv.KEY_BLOCK, 1)
    error = torch.rand(outer * tokens * inner * d // kv.KEY_BLOCK, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(kernel.kv_missed(rows, error), turn.kv_missed(rows, error), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 1, 64), (1, 150, 2, 200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_content_and_distance_are_the_reference_s(kernel, dtype, shape):
    """And bit for bit the portable kernel's; with the means of a group as without them."""
    g = torch.Generator().manual_seed(shape[1])
    t = torch.arange(shape[1], dtype=torch.float32)[:, None, None]
    x = (torch.randn(shape, generator=g) + 20 * torch.cos(0.7 * t + torch.arange(shape[-1]))).to(dtype)
    y = x + torch.randn(shape, generator=g).to(dtype)
    outer, tokens, inner, d = shape
    groups = kv.group_count(tokens)
    rows = cpu.Rows(outer, tokens, inner, d, tokens * inner * d, kv.rotation_size(d), kv.KEY_BLOCK, groups)
    for rotary in (cpu.STILL, cpu.Rotary(d // 2 * 2, interleaved=False), cpu.Rotary(d // 4 * 2, interleaved=True)):
        mine, expected = kernel.kv_content(x, rows, cpu.STILL, rotary), reference_content.energies(x, rotary)
        assert torch.allclose(mine[1], expected, rtol=1e-3)
        assert bits(mine) == bits(KERNELS[0].kv_content(x, rows, cpu.STILL, rotary))
        if groups:
            assert bits(kernel.kv_means(x, rows, rotary)[3]) == bits(mine[1])
    assert torch.allclose(kernel.kv_distance(x, y, rows), reference_content.distances(x, y), rtol=1e-5)
    assert bits(kernel.kv_distance(x, y, rows)) == bits(KERNELS[0].kv_distance(x, y, rows))


@pytest.mark.parametrize("d", [64, 128, 8192])
def test_values_between_two_bfloat16_are_rounded_to_the_even_one(kernel, d):
    """Ties, which random values hardly ever are: levels of zero leave the means alone, every float with half a unit."""
    rows = cpu.Rows(1, 8, 1, d, 8 * d, kv.rotation_size(d), kv.KEY_BLOCK, 1)
    codes = torch.full((8 * d // 2,), 0x77, dtype=torch.uint8)
    scales, tops = torch.full((8 * d // 32,), 255, dtype=torch.uint8), torch.full((-(-8 * d // 8192),), 8000).short()
    for first in range(0, 1 << 16, d):
        high = torch.arange(first, first + d, dtype=torch.int32).clamp(max=0xFFFF)
        means = ((high << 16) | 0x8000).view(torch.float32)
        means = torch.where(torch.isfinite(means), means, 1.0).view(1, 1, 1, d)
        out = torch.empty(1, 8, 1, d, dtype=torch.bfloat16)
        kernel.kv_decode((codes, scales, tops), means, rows, out)
        assert bits(out) == bits((means + 0.0).expand(out.shape).to(torch.bfloat16)), first


def test_scales_between_two_bfloat16_are_rounded_to_the_even_one(kernel):
    high = torch.arange(0x3F00, 0x4100, dtype=torch.int32)
    absmax = ((high << 16) | 0x8000).view(torch.float32)
    codes = torch.arange(256, dtype=torch.uint8).repeat(absmax.numel() * 32 // 256)
    out = torch.empty(absmax.numel() * 64, dtype=torch.bfloat16)
    kernel.nf4_decode(codes, absmax, out)
    assert bits(out) == bits(reference.dequantize(codes, absmax, torch.empty_like(out)))


def test_many_threads_write_the_same_bytes_as_one(kernel):
    x = torch.randn(1 << 21, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kernel.nf4_encode(x)
        torch.set_num_threads(3)
        three = kernel.nf4_encode(x)
        out = torch.empty_like(x)
        kernel.nf4_decode(*three[:2], out)
    finally:
        torch.set_num_threads(before)
    assert [bits(part) for part in one] == [bits(part) for part in three]
    assert bits(out) == bits(reference.dequantize(*one[:2], torch.empty_like(x)))


def test_a_thread_that_stays_single_is_never_split_and_nobody_else_with_it(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    large = torch.empty(cpu.THREADED_NBYTES, dtype=torch.uint8)
    counts: list[int] = []

    def work() -> None:
        cpu.stay_single()
        counts.append(cpu._threads(large))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [*counts, cpu._threads(large), cpu._threads(large[1:])] == [1, 3, 1]


def test_arguments_that_make_no_sense_are_refused():
    library = cpu.LIBRARY
    rows = [
        cpu.Rows(0, 1, 1, 64, 64, 64, 64, 0),
        cpu.Rows(1, 1, 1, 64, 64, 48, 64, 0),
        cpu.Rows(1, 1, 1, 64, 64, 256, 64, 0),
        cpu.Rows(1, 1, 1, 64, 64, 64, 16, 0),
        cpu.Rows(1, 1, 1, 64, 32, 64, 64, 0),
        cpu.Rows(1, 1, 1, 64, 64, 64, 64, 2),
    ]
    for row in rows:
        assert library.kvk_kv_encode(0, 1, 0, 0, row, 0, None, 0, 0, 0, 0) == 2
    good = cpu.Rows(1, 70, 2, 64, 70 * 128, 64, 32, 1)
    x, sums = torch.zeros(70 * 128), torch.zeros(70 * 128)
    for rotary in (0, 1, 63, 66, -2):
        turns = cpu._Turns(sums.data_ptr(), sums.data_ptr(), rotary, 0)
        at = (x.data_ptr(), good, turns)
        assert library.kvk_kv_phases(0, 1, 0, *at, cpu.Phases(1, (1, 2, 3)), 0, 0, 0, 0) == 2
        assert library.kvk_kv_sums(0, 1, 0, *at, 0, 0, 0, 0) == 2
        assert library.kvk_kv_encode(0, 1, 0, x.data_ptr(), good, 0, turns, 0, 0, 0, 0) == 2
        assert library.kvk_kv_decode(0, 1, 0, 0, 0, 0, 0, turns, good, 0) == 2
        assert library.kvk_kv_code_means(0, 1, good, turns, 0, 0, 0, 0, 0) == 2
    many = cpu.Rows(1, 300, 2, 64, 300 * 128, 64, 32, 1)
    still = cpu._Turns(None, None, 64, 0)
    assert library.kvk_kv_sums(0, 1, 0, 0, many, still, 0, 0, 0, 0) == 2, "a last group of 300 tokens"
    assert library.kvk_kv_sums(0, 1, 0, 0, good, None, 0, 0, 0, 0) == 2
    for sampled, lags in ((2, (1, 2, 3)), (0, (1, 2, 3)), (1, (1, 0, 3))):
        assert library.kvk_kv_phases(0, 1, 0, 0, good, still, cpu.Phases(sampled, lags), 0, 0, 0, 0) == 2
    for first, every in ((-1, 1), (69, 1), (0, 0)):
        assert library.kvk_kv_along(0, 1, 0, 0, good, cpu.Along(first, every, 1, 1), 0, 0) == 2
    assert library.kvk_kv_missed(cpu.Rows(1, 8, 1, 48, 8 * 48, 16, 32, 1), 0, 0) == 2, "blocks over two heads"
    for rotary in (65, 66, -2):
        assert library.kvk_kv_content(0, 1, 0, 0, good, 2, (ctypes.c_int32 * 4)(64, 0, rotary, 0), 0) == 2
    assert library.kvk_nf4_encode(99, 1, 0, 0, 64, 0, 0, 0) == 2
    assert library.kvk_nf4_encode(0, 1, 9, 0, 64, 0, 0, 0) == 2
    assert library.kvk_nf4_encode(0, 1, 0, 0, -1, 0, 0, 0) == 2


def test_a_kernel_with_wrong_bytes_is_not_used(caplog):
    """Not every machine's instruction set has been before a test: AVX-512's had to be believed."""
    if len(KERNELS) < 2:
        pytest.skip("one instruction set here: there is none to compare")
    assert best(KERNELS) is KERNELS[-1]

    class Wrong(cpu.CpuKernel):
        def kv_decode(self, coded, means, rows, out, turns=None):
            super().kv_decode(coded, means, rows, out, turns)
            out.view(-1)[4711] = out.view(-1)[4711] * 1.0001 + 1

    wrong = Wrong(KERNELS[-1].library, KERNELS[-1].isa)
    assert best([*KERNELS[:-1], wrong]) is KERNELS[-2]
    assert f"instructions={cpu.ISAS[wrong.isa]}" in caplog.text
    assert best(KERNELS[:1]) is KERNELS[0]
    assert best([]) is None


OUTPUTS = {
    "kv_phases": 4,
    "kv_along": 2,
    "kv_sums": 4,
    "kv_code_means": 3,
    "kv_expand_eights": 1,
    "kv_encode": 4,
    "kv_decode": 1,
}


def with_a_wrong_byte(operation, at, applies):
    """The best kernel, one bit of one output wrong where applies(rows, type, turning)."""
    right = getattr(cpu.CpuKernel, operation)

    def wrong(self, *args, **more):
        made = right(self, *args, **more)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        rows = next(x for x in args if isinstance(x, cpu.Rows))
        turning = any(isinstance(x, cpu.Turns) for x in args) or (operation == "kv_sums" and len(tensors) == 2)
        x = args[3] if operation == "kv_decode" else tensors[0]
        if applies(rows, x.dtype, turning):
            given = x if made is None else made if isinstance(made, torch.Tensor) else made[at]
            given.view(torch.uint8).view(-1)[-2 if given.element_size() > 1 else -1] ^= 1  # of a bool too
        return made

    return type("Wrong", (cpu.CpuKernel,), {operation: wrong})(KERNELS[-1].library, KERNELS[-1].isa)


@pytest.mark.skipif(len(KERNELS) < 2, reason="one instruction set here: there is none to compare")
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("operation", "at"), [(name, at) for name, n in OUTPUTS.items() for at in range(n)])
def test_a_kernel_with_one_wrong_bit_in_an_operation_of_turning_means_is_not_used(operation, at, d):
    turns = operation in {"kv_code_means", "kv_encode", "kv_decode"} or (operation == "kv_sums" and at)
    due = DTYPES[(at + d // 16) % 3] if operation not in {"kv_code_means", "kv_expand_eights"} else None

    def applies(rows, dtype, turning):
        return rows.d == d and due in {None, dtype} and rows.groups > 0 and (turning or not turns)

    assert best([*KERNELS[:-1], with_a_wrong_byte(operation, at, applies)]) is KERNELS[-2]


@pytest.mark.skipif(len(KERNELS) < 2, reason="one instruction set here: there is none to compare")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_a_kernel_with_one_wrong_bit_in_values_or_under_still_means_is_not_used(d, dtype):
    for operation in ("kv_encode", "kv_decode"):
        for block in (32, 64):
            wrong = with_a_wrong_byte(
                operation,
                0,
                lambda rows, type_, turning, block=block: (
                    (rows.d, rows.block, type_) == (d, block, dtype) and not turning
                ),
            )
            assert best([*KERNELS[:-1], wrong]) is KERNELS[-2]
