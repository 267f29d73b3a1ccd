"""The native attention kernels of every instruction set against the formula in float64 and against themselves."""

import pytest
import torch
from torch import Tensor

from tessera import native
from tessera.ops.attention_strips import AttentionShape
from tessera.ops.kernels.attention import Parts, attention, attention_backward
from tests.ops.float64 import BF16, normal, relative

SETS = native.instruction_sets()
pytestmark = pytest.mark.skipif(not SETS, reason=native.problem())
every_set = pytest.mark.parametrize("isa", SETS)
BOTH = [torch.float32, BF16]


def shape(
    length: int, nope: int = 12, rope: int = 8, value: int = 12, batch: int = 2, heads: int = 3, scale: float = 0.3
) -> AttentionShape:
    return AttentionShape(batch, length, heads, nope, rope, value, scale)


def parts(s: AttentionShape, first: Tensor | None = None, size: float = 1.0, turns: int = 1) -> Parts:
    """BF16 parts that lie in wider rows at odd offsets, as a split leaves them."""
    tokens, widths = s.batch * s.length, (s.heads * (s.nope + s.rope), s.heads * (s.nope + s.value), s.rope)
    rows = [normal(tokens, width + 3, seed=i, scale=size).to(BF16)[:, 1 : width + 1] for i, width in enumerate(widths)]
    angle = normal(turns, s.length, s.rope // 2, seed=7, scale=3.0)
    return Parts(*rows, torch.polar(torch.full_like(angle, 1.1), angle), first)


def upstream(s: AttentionShape) -> Tensor:
    return normal(s.batch * s.length, s.heads * s.value, seed=9).to(BF16)


def starts(s: AttentionShape, *sizes: int) -> Tensor:
    """Documents of sizes[b] tokens in sequence b."""
    size = torch.tensor(sizes)[:, None]
    return (torch.arange(s.length)[None] // size * size).to(torch.int32)


def run(p: Parts, s: AttentionShape, isa: str, dout: Tensor | None = None) -> list[Tensor]:
    """out, log-sum-exp, dq, dkv, dk_rope."""
    out, log_sum_exp = attention(p, s, isa)
    dout = upstream(s) if dout is None else dout
    return [
        out,
        log_sum_exp,
        *attention_backward(dout, out.float(), log_sum_exp, p, s, isa),
    ]


def cut(x: Tensor) -> Tensor:
    return x.to(BF16).double()


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Interleaved pairs as complex numbers; by the parts, so that a pair's bits do not depend on its place."""
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = [even * turn.real - odd * turn.imag, even * turn.imag + odd * turn.real]
    return torch.stack(pairs, dim=-1).flatten(-2)


def formula(p: Parts, s: AttentionShape, dout: Tensor) -> list[Tensor]:
    """What `run` returns, head by head and the whole square at once, in float64; operands are rounded to BF16."""
    back = p.rotation.to(torch.complex128).conj()
    q, kv, k_rope = (x.double().view(s.batch, s.length, -1) for x in p[:3])
    key, keys = torch.arange(s.length), cut(turned(k_rope.float(), p.rotation))  # float32: it decides a rounding
    hidden = (key > key[:, None])[None].expand(s.batch, -1, -1)
    if p.first is not None:
        hidden = hidden | (key < p.first[:, :, None])
    outs, sums, dqs, dkvs, dropes = [], [], [], [], []
    for h in range(s.heads):
        q_h, kv_h = q.chunk(s.heads, dim=-1)[h], kv.chunk(s.heads, dim=-1)[h]
        q_h = torch.cat([q_h[..., : s.nope], cut(turned(q_h[..., s.nope :].float(), p.rotation))], dim=-1)
        k_h, v_h = torch.cat([kv_h[..., : s.nope], keys], dim=-1), kv_h[..., s.nope :]
        scores = (q_h @ k_h.mT * s.softmax_scale).masked_fill(hidden, -torch.inf)
        probability, do = torch.softmax(scores, dim=-1), dout.double().view(s.batch, s.length, s.heads, -1)[:, :, h]
        out = cut(cut(probability) @ v_h)
        ds = cut(probability * (do @ v_h.mT - (do * out).sum(dim=-1, keepdim=True)))
        dq, dk = ds @ k_h * s.softmax_scale, ds.mT @ q_h * s.softmax_scale
        outs.append(out)
        sums.append(torch.logsumexp(scores, dim=-1))
        dqs.append(torch.cat([dq[..., : s.nope], turned(dq[..., s.nope :], back)], dim=-1))
        dkvs.append(torch.cat([dk[..., : s.nope], cut(probability).mT @ do], dim=-1))
        dropes.append(dk[..., s.nope :])
    rows = [torch.cat(x, dim=-1).flatten(0, 1) for x in (outs, dqs, dkvs)]
    drope = turned(torch.stack(dropes).sum(dim=0), back).flatten(0, 1)
    return [rows[0], torch.stack(sums, dim=1).flatten(0, 1), rows[1], rows[2], drope]


def assert_is_the_formula(p: Parts, s: AttentionShape, isa: str) -> None:
    """FP32 sums and float64 ones fall on two sides of a rounding to BF16 now and then, P's and dS's included, which is
    one part in 256 of one of many terms; an operand that is not rounded, or one too many, changes more than a tenth of
    the elements."""
    dout = upstream(s)
    found, exact = run(p, s, isa, dout), formula(p, s, dout)
    assert (found[1].double() - exact[1]).abs().max() < 2e-6 * max(1.0, float(exact[1].abs().max()))
    for x, e in zip([found[0], *found[2:]], [exact[0], *exact[2:]], strict=True):
        assert x.dtype == BF16 and x.shape == e.shape
        assert relative(x, cut(e)) < 1e-3
        differs = (x.double() != cut(e)) & ((x - e).abs() > 1e-5 * max(1.0, float(e.abs().max())))  # sums that cancel
        assert differs.double().mean() < 0.03


@every_set
@pytest.mark.parametrize("length", [1, 2, 7, 16, 31, 32, 33, 64, 65, 150, 255, 256])
def test_each_operand_is_rounded_to_bf16_and_nothing_else_is(isa: str, length: int) -> None:
    s = shape(length)
    assert_is_the_formula(parts(s), s, isa)


@every_set
@pytest.mark.parametrize(
    "widths", [(32, 16, 32), (128, 64, 128), (20, 12, 40), (9, 6, 11), (1, 2, 1), (1, 2, 300), (40, 8, 3)]
)
def test_heads_may_have_any_widths(isa: str, widths: tuple[int, int, int]) -> None:
    s = shape(70, *widths, heads=2, scale=0.2)
    assert_is_the_formula(parts(s), s, isa)


@every_set
@pytest.mark.parametrize("sizes", [(5, 70), (1, 150), (64, 33), (32, 16)])
def test_a_query_sees_no_key_before_its_first(isa: str, sizes: tuple[int, int]) -> None:
    s = shape(150)
    assert_is_the_formula(parts(s, starts(s, *sizes)), s, isa)


@every_set
def test_first_keys_need_not_be_those_of_documents(isa: str) -> None:
    s = shape(150)
    draws = torch.rand(2, s.length, generator=torch.Generator().manual_seed(0))
    first = (draws * torch.arange(1, s.length + 1)).to(torch.int32)  # in any order, each at most its query
    assert_is_the_formula(parts(s, first), s, isa)


@every_set
def test_sequences_may_have_rotations_of_their_own(isa: str) -> None:
    s = shape(70)
    assert_is_the_formula(parts(s, turns=2), s, isa)


@every_set
@pytest.mark.parametrize("masked", [False, True])
def test_a_querys_bits_depend_on_the_keys_it_sees_alone(isa: str, masked: bool) -> None:
    s = shape(150)
    p, dout = parts(s, starts(s, 40, 70) if masked else None), upstream(s)
    whole = [x.view(s.batch, s.length, -1)[1] for x in run(p, s, isa, dout)[::2][:2]]  # out, dq
    for length in (1, 2, 3, 15, 16, 17, 32, 33, 64, 65, 100, 130, 150):
        rows = [x.reshape(s.batch, s.length, -1)[1, :length] for x in (*p[:3], dout)]
        first = None if p.first is None else p.first[1:, :length]
        alone = Parts(rows[0], rows[1], rows[2], p.rotation[:, :length], first)
        found = run(alone, shape(length, batch=1), isa, rows[3])[::2][:2]
        assert all(torch.equal(x, y[:length]) for x, y in zip(found, whole, strict=True)), length


@every_set
def test_a_document_has_the_bits_it_has_alone_wherever_it_begins_a_block(isa: str) -> None:
    s = shape(128, batch=1)
    p, dout = parts(s, starts(s, 64)), upstream(s)
    whole = run(p, s, isa, dout)
    half = shape(64, batch=1)
    for begin in (0, 64):
        rows = slice(begin, begin + 64)
        alone = Parts(p.q[rows], p.kv[rows], p.k_rope[rows], p.rotation[:, rows], None)
        for x, y in zip(run(alone, half, isa, dout[rows]), whole, strict=True):
            assert torch.equal(x, y[:, rows] if y.dtype == torch.float32 else y[rows])


@every_set
def test_results_do_not_depend_on_threads_or_on_the_batch(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = shape(70, batch=3)
    p, dout = parts(s, turns=3), upstream(s)
    monkeypatch.setattr("tessera.ops.kernels.attention._WORTH_A_THREAD", 1)
    results = []
    for threads in (1, 2, 4, 9):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(run(p, s, isa, dout))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
    rows = slice(s.length, 2 * s.length)
    alone = Parts(p.q[rows], p.kv[rows], p.k_rope[rows], p.rotation[1:2], None)
    second = run(alone, shape(70, batch=1), isa, dout[rows])
    for x, y in zip(second, results[0], strict=True):
        assert torch.equal(x, y.view(3, -1, *y.shape[1:])[1])


@every_set
def test_scores_of_any_size_are_safe(isa: str) -> None:
    s = shape(80)
    for x in run(parts(s, size=300.0), s, isa):
        assert x.isfinite().all()


@every_set
def test_a_long_sequence(isa: str) -> None:
    if isa == "portable":
        pytest.skip("takes long, and its loops are those of avx2")
    s = shape(4096, batch=1, heads=1)
    p, dout = parts(s, starts(s, 1000)), upstream(s)
    found, other = run(p, s, isa, dout), run(p, s, "torch", dout)
    for x, y in zip(found, other, strict=True):
        assert relative(x, y) < 1e-3


@every_set
def test_nothing_outside_the_parts_is_read_or_written(isa: str) -> None:
    s = shape(45, 9, 6, 11)
    p, dout = parts(s), upstream(s)
    found = run(p, s, isa, dout)
    poisoned = []
    for x in p[:3]:
        around = torch.full((len(x) + 2, x.shape[1] + 2), torch.nan, dtype=BF16)
        around[1:-1, 1:-1] = x
        poisoned.append(around[1:-1, 1:-1])
    again = run(Parts(*poisoned, p.rotation, None), s, isa, dout)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_a_kernel_that_cannot_be_is_refused() -> None:
    s = shape(5)
    p = parts(s)
    with pytest.raises(ValueError, match="mmx"):
        attention(p, s, "mmx")
    with pytest.raises(ValueError, match="bfloat16"):
        attention(Parts(p.q.float(), p.kv.float(), p.k_rope.float(), p.rotation, None), s, SETS[0])
    with pytest.raises(ValueError, match="positive"):
        attention(p, shape(5, scale=-1.0))


@pytest.mark.parametrize("dtype", BOTH)
def test_operators_have_fake_kernels(dtype: torch.dtype) -> None:
    s = shape(10)
    p = Parts(*(x.to(dtype).contiguous() for x in parts(s)[:3]), parts(s).rotation, starts(s, 3, 4))
    sizes = (s.batch, s.length, s.heads, s.nope, s.rope, s.value, s.softmax_scale, "")
    torch.library.opcheck(torch.ops.tessera.attention.default, (*p, *sizes))
    out, log_sum_exp = attention(p, s)
    arguments = (upstream(s).to(dtype), out.float(), log_sum_exp, *p, *sizes)
    torch.library.opcheck(torch.ops.tessera.attention_backward.default, arguments)
