"""A trial of a kernel on this machine, once, before use: it must write the portable code's bytes.

Each instruction set has its own code, and no test machine has them all; a compiler or an emulator may err as well.
Wrong codes would be stored as good ones, so a kernel that fails is not used. It takes some 20 ms.
"""

import numpy as np
import torch

from kvstore.kernels.cpu import DTYPES, Along, CpuKernel, LearnedGroup, Phases, Rotary, Rows, Turns

TOKENS, HEADS, HEAD_DIM = 70, 2, 64
"""Two groups of means, the second one short."""
TURNED = (
    (70, 2, 64, 64, Rotary(64, interleaved=False)),
    (10, 2, 64, 64, Rotary(32, interleaved=True)),
    (8, 2, 80, 16, Rotary(20, interleaved=False)),
    (7, 2, 96, 32, Rotary(96, interleaved=True)),
    (10, 1, 128, 128, Rotary(128, interleaved=False)),
    (5, 1, 256, 128, Rotary(256, interleaved=True)),
)
"""Tokens, heads, head_dim, its rotation's size, and which channels turn: all or some, half apart or neighbours."""
LANES = 24
PHASES = Phases(1, (1, 2, 4), 2.0, 0.01, 0.001)


def agree(kernel: CpuKernel, portable: CpuKernel) -> bool:
    """Whether both give the same bytes for a sample: each codec, both ways, each input type, keys and values."""
    samples = _samples()
    if not all(_bytes(kernel, x) == _bytes(portable, x) and _same_turned(kernel, portable, x) for x in samples):
        return False
    return _symbols(kernel) == _symbols(portable) and all(
        _learned(kernel, x.dtype) == _learned(portable, x.dtype) for x in samples
    )


def _samples() -> list[torch.Tensor]:
    """Values of magnitudes up to a million times apart, with a few outliers, some zeros, half of them negative."""
    at = np.arange(TOKENS * HEADS * HEAD_DIM)  # numpy: torch would start its threads for it
    wave = np.sin(at * at * 0.37) * np.exp(4 * np.sin(at * 0.011))
    x = torch.from_numpy(wave.astype(np.float32))
    x[::257] *= 100
    x[::251] = 0
    return [x.to(dtype) for dtype in DTYPES]


def _bytes(kernel: CpuKernel, x: torch.Tensor) -> list[bytes] | None:
    whole = Rows(1, TOKENS, HEADS, HEAD_DIM, x.numel(), HEAD_DIM, 64, 0)
    made: list[torch.Tensor] = [kernel.kv_content(x, whole, Rotary(HEAD_DIM, interleaved=True))]
    made.append(kernel.kv_distance(x, x.flip(0), whole))
    coded = kernel.nf4_encode(x)
    if coded is None:
        return None
    values = torch.empty_like(x)
    kernel.nf4_decode(coded[0], coded[1], values)
    made += [*coded, values]
    for size, block, groups in ((HEAD_DIM, 32, 2), (HEAD_DIM, 64, 0)):
        rows = Rows(1, TOKENS, HEADS, HEAD_DIM, x.numel(), size, block, groups)
        means = None
        if groups:
            codes, scales, means, content = kernel.kv_means(x, rows, Rotary(HEAD_DIM, interleaved=False))
            made += [codes, scales, means, *([] if content is None else [content])]
        both = _there_and_back(kernel, x, rows, means, None)
        if both is None:
            return None
        made += both
    return [_raw(part) for part in made]


def _same_turned(kernel: CpuKernel, portable: CpuKernel, x: torch.Tensor) -> bool:
    return all(_turned_bytes(kernel, x, *how) == _turned_bytes(portable, x, *how) for how in TURNED)


def _turned_bytes(
    kernel: CpuKernel, x: torch.Tensor, tokens: int, inner: int, d: int, size: int, rotary: Rotary
) -> list[bytes] | None:
    """What nf4-kv2 does with rows of d: values, and keys under still and under turning means."""
    x = x[: tokens * inner * d]
    values = Rows(1, tokens, inner, d, x.numel(), size, 64, 0)
    made = _there_and_back(kernel, x, values, None, None)
    if made is None:
        return None
    keys = Rows(1, tokens, inner, d, x.numel(), size, 32, 2 if tokens > 64 else 1)
    made += [*kernel.kv_phases(x, keys, rotary, PHASES), *kernel.kv_along(x, keys, Along(1, 3, 10.0, 0.0))]
    for turns in (None, _some_turn(rotary, inner)):
        keyed = _keyed(kernel, x, keys, rotary, turns)
        if keyed is None:
            return None
        made += keyed
    return [_raw(part) for part in made]


def _keyed(
    kernel: CpuKernel, x: torch.Tensor, rows: Rows, rotary: Rotary, turns: Turns | None
) -> list[torch.Tensor] | None:
    tangents = None if turns is None else turns.tangents
    still, turned, gains, content = kernel.kv_sums(x, rows, rotary, tangents, content=True)
    codes, scales, made = kernel.kv_code_means(rows, turns, still, turned)
    means = kernel.kv_expand_eights(rows, codes, scales)
    both = _there_and_back(kernel, x, rows, means, turns)
    if both is None:
        return None
    sums = [still] if turns is None else [still, turned, gains]  # gains are written with tangents alone
    return [*sums, *([] if content is None else [content]), codes, scales, made, means, *both]


def _some_turn(rotary: Rotary, inner: int) -> Turns:
    """Fast and slow pairs, turning either way; of each head other ones turn, and some do not."""
    pairs = rotary.channels // 2
    at = torch.arange(pairs, dtype=torch.float32, device="cpu")
    tangents = torch.exp2(-at * (10 / pairs)) * (1 - 2 * (at % 3 == 1).to(torch.float32))
    masks = [[(0xB6, 0xFF, 0x7D)[(head + byte) % 3] for byte in range(-(-pairs // 8))] for head in range(inner)]
    return Turns(rotary, tangents[None], torch.tensor([masks], dtype=torch.uint8, device="cpu"))


def _there_and_back(
    kernel: CpuKernel, x: torch.Tensor, rows: Rows, means: torch.Tensor | None, turns: Turns | None
) -> list[torch.Tensor] | None:
    coded = kernel.kv_encode(x, rows, means, turns)
    if coded is None:
        return None
    values = torch.zeros_like(x)
    kernel.kv_decode(coded[:3], means, rows, values, turns)
    return [*coded, values]


def _symbols(kernel: CpuKernel) -> list[bytes] | None:
    """A stream of symbols and what it is read as: lanes in runs of sixteen and of fewer, rare and usual symbols."""
    counts = np.ones((2, 256), np.uint16)
    counts[0, 128] += 4096 - 256
    counts[1, 100:116] += (4096 - 256) // 16
    starts = (np.cumsum(counts, axis=1) - counts).astype(np.uint16)
    columns = np.stack([np.repeat(np.arange(256, dtype=np.uint8), of) for of in counts])
    own = np.arange(2)[:, None]
    inside = np.arange(4096, dtype=np.uint32) - starts[own, columns]
    slots = columns | (counts[own, columns].astype(np.uint32) - 1) << np.uint32(8) | inside << np.uint32(20)
    at = np.arange(60 * 41).reshape(60, 41)
    symbols = ((at * at * 7 // 11) % 256).astype(np.uint8)
    symbols[::2, ::3] = 128
    classes = (np.arange(60) % 5 == 0).astype(np.uint8)
    stream = kernel.rans_encode(symbols, classes, counts, starts, LANES)
    if stream is None:
        return None
    read = kernel.rans_decode(np.frombuffer(stream, np.uint8), symbols.shape, classes, slots, LANES)
    return None if read is None else [stream, read.tobytes()]


def _learned(kernel: CpuKernel, dtype: torch.dtype) -> list[bytes]:
    """Groups of kv-learned: pairs half apart and neighbours, rows and tokens that no tile divides, an escape."""
    made = []
    for heads, d, tokens, pairs, near in ((2, 21, 37, 10, 0), (1, 64, 65, 8, 1), (1, 16, 1, 0, 0)):
        n = 2 * heads * d
        wave = torch.from_numpy(np.sin(np.arange(n * n + n + 2 * tokens * d) * 0.37).astype(np.float32))
        live = np.arange(0, n, 2, dtype=np.int32)
        columns = ((np.arange(live.size * tokens) * 31) % 255 + 1).astype(np.uint8).reshape(live.size, tokens)
        columns[live.size // 2, tokens // 2] = 0
        of = torch.tensor([0, 0], dtype=torch.int32, device="cpu")
        values = torch.arange(-128, 128, dtype=torch.float32, device="cpu").repeat(40)
        out = torch.zeros(2, tokens, heads, d, dtype=dtype, device="cpu")
        turn = wave[n * n + n :]
        places = (values, wave, wave[n * n :], turn, turn[tokens * d :], of)
        group = LearnedGroup(
            2, heads, d, tokens, tokens * heads * d, live.size, *(x.data_ptr() for x in places), pairs, near
        )
        kernel.learned_decode(group, columns, live, np.zeros(live.size, np.uint8), np.array([300], np.int16), out)
        made.append(_raw(out))
    return made


def _raw(part: torch.Tensor) -> bytes:
    return part.view(torch.uint8).numpy().tobytes()
