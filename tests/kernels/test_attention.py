"""attention: PyTorch's kernels behind one contract, against softmax(q kT) v in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.oracle import (
    DEVICE,
    IMPLEMENTATIONS,
    assert_accurate,
    assert_skips_unneeded,
    assert_symbolic,
    opcheck,
    symbolic,
)
from unsloth.kernels import attention_libraries as module
from unsloth.kernels.attention import attention
from unsloth.kernels.attention_libraries import Backend, choose_backend, forced_backend

CUDA = DEVICE == "cuda"
LIBRARIES: list[Backend] = ["cudnn", "flash"] if CUDA else ["cpu"]
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.bfloat16, torch.float16]
HALF = torch.bfloat16 if CUDA else torch.float32

# batch, query heads, key heads, queries, keys, width
SQUARES = [(2, 4, 4, 7, 7, 16), (1, 4, 2, 33, 33, 80), (2, 3, 1, 33, 33, 64)]
RECTANGLES = [(2, 4, 2, 7, 33, 16), (1, 3, 1, 33, 7, 64)]
MODEL_SIZED = [(1, 8, 2, 1024, 1024, 128), (2, 4, 4, 1000, 1000, 64)]

on_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")
each_library = pytest.mark.parametrize("library", LIBRARIES)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def runs(library: Backend, shape: tuple[int, ...]) -> bool:
    """Whether a library may be forced on a shape: cuDNN only where it would be chosen."""
    if library != "cudnn":
        return True
    return module.cudnn_is_best(*make(shape))


def make(shape: tuple[int, ...], dtype: torch.dtype = HALF, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as models make them: views of [batch, length, heads, width]."""
    batch, heads, kv_heads, queries, keys, width = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(heads: int, length: int) -> Tensor:
        return torch.randn(batch, length, heads, width, generator=generator, device=DEVICE).to(dtype).transpose(1, 2)

    return random(heads, queries), random(kv_heads, keys), random(kv_heads, keys)


def eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    mask = None if window is None else visible(q, k, causal, window)
    causal = causal and mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)


def eager_of_one_width(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    """The same with zeros beside the narrower heads, for which PyTorch has a library in place of the formula."""
    width = max(q.shape[-1], v.shape[-1])
    padded = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return eager(*padded, causal, scale, window)[..., : v.shape[-1]]


def visible(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Tensor:
    """[queries, keys], from the definition: i - window < j <= i."""
    i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    reached = i - j < (q.shape[2] if window is None else window)
    return reached & (j <= i) if causal else reached


def scores(q: Tensor, k: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    result = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    return result.masked_fill(~visible(q, k, causal, window), -torch.inf)


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    return scores(q, k, causal, scale, window).softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def length_major(x: Tensor) -> tuple[int, ...]:
    """The strides of a fresh tensor like x in [batch, length, heads, width] memory order."""
    batch, heads, length, width = x.shape
    return torch.empty(batch, length, heads, width).transpose(1, 2).stride()


def leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v again, to differentiate with respect to."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors)
    return q, k, v


def relative_error(x: Tensor, truth: Tensor) -> float:
    return float((x.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm())


def everything(implementation: str, *args: Any, grad: Tensor) -> list[Any]:
    """out, lse and the three gradients, from the operator's functions directly."""
    forward, backward = IMPLEMENTATIONS[implementation]
    outputs = forward(attention, *args)
    return [*outputs, *backward(attention, args, outputs, [grad])]


# -- accuracy ----------------------------------------------------------------------------------------------------------


@each_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_accuracy(library: Backend, dtype: torch.dtype, causal: bool) -> None:
    def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return *make(shape, dtype, seed), causal, 0.2, None

    shapes = [*SQUARES, *([] if causal else RECTANGLES), *(MODEL_SIZED if CUDA else [])]
    shapes = [shape for shape in shapes if runs(library, shape)]
    with forced_backend(library):
        assert_accurate(attention, inputs, eager, dtypes=[dtype], shapes=shapes)


@pytest.mark.skipif(CUDA, reason="the CUDA libraries have no float64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_float64_stays_float64(implementation: str, causal: bool) -> None:
    """Against the formula written out; so eager in float64, the truth of the other tests, is right as well."""
    q, k, v = make(SQUARES[1], torch.float64)
    grad = torch.randn_like(q)
    results = everything(implementation, q, k, v, causal, 0.2, None, grad=grad)
    q, k, v = leaves((q, k, v))
    out = exact(q, k, v, causal, 0.2, None)
    truth = [out, scores(q, k, causal, 0.2, None).logsumexp(-1), *torch.autograd.grad(out, (q, k, v), grad)]
    for value, expected in zip(results, truth, strict=True):
        assert value.dtype == torch.float64 and relative_error(value, expected) < 1e-14


@pytest.mark.skipif(CUDA, reason="on the CPU the library is SDPA's own")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_to_eager_on_the_cpu(dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in make(SQUARES[1], dtype))
    ours, theirs = attention(q, k, v, True, 0.2, None)[0], eager(q, k, v, True, 0.2, None)
    grad = torch.randn_like(ours)
    assert torch.equal(ours, theirs)
    for mine, yours in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (ours, theirs)), strict=True):
        assert torch.equal(mine, yours)


@each_library
@pytest.mark.parametrize("shape", [*SQUARES, *(MODEL_SIZED if CUDA else [])])
def test_logsumexp_is_natural_and_scaled(library: Backend, shape: tuple[int, ...]) -> None:
    if not runs(library, shape):
        pytest.skip(f"{library} is not chosen here")
    q, k, v = make(shape)
    with forced_backend(library):
        _, lse = attention.forward(q, k, v, True, 0.2, None)
    truth = scores(q.double(), k.double(), True, 0.2, None).logsumexp(-1)
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    assert relative_error(lse, truth) < 1e-4


@each_library
def test_one_token(library: Backend) -> None:
    """The softmax of one score is 1 whatever the score is: out is v, and q and k get no gradient."""
    q, k, v = make((2, 2, 1, 1, 1, 16))
    grad = make((2, 2, 1, 1, 1, 16), seed=1)[0]
    backend = "flash" if library == "cudnn" else library  # cuDNN refuses a single key: it is not chosen there
    assert choose_backend(q, k, v, True) == backend
    out, _, dq, dk, dv = everything("kernel", q, k, v, True, 0.2, None, grad=grad)
    assert torch.equal(out, v.expand_as(out))
    assert float(dq.abs().max()) < 1e-5 and float(dk.abs().max()) < 1e-5
    assert relative_error(dv, grad.double().sum(1, keepdim=True)) < torch.finfo(HALF).eps


def test_first_query_sees_the_first_key() -> None:
    """With more keys than queries the diagonal starts top left, as in PyTorch, in whatever runs the operator."""
    for shape in RECTANGLES:
        q, k, v = make(shape)
        truth = exact(q.double(), k.double(), v.double(), True, 0.2, None)
        assert relative_error(attention(q, k, v, True, 0.2, None)[0], truth) < 2 * torch.finfo(HALF).eps


@on_cuda
def test_libraries_share_their_statistics() -> None:
    """The backward of each understands the out and lse of the other."""
    if not runs("cudnn", MODEL_SIZED[0]):
        pytest.skip("cuDNN is not chosen here")
    q, k, v = make(MODEL_SIZED[0])
    grad = make(MODEL_SIZED[0], seed=1)[0]
    q64, k64, v64 = leaves((q, k, v))
    truth = torch.autograd.grad(exact(q64, k64, v64, True, 0.2, None), (q64, k64, v64), grad.double())
    for first, second in (("cudnn", "flash"), ("flash", "cudnn")):
        with forced_backend(first):
            out, lse = attention.forward(q, k, v, True, 0.2, None)
        with forced_backend(second):
            gradients = attention.backward(grad, q, k, v, out, lse, True, 0.2, None, [True] * 3)
        for gradient, expected in zip(gradients, truth, strict=True):
            assert relative_error(gradient, expected) < torch.finfo(HALF).eps


# -- layouts -----------------------------------------------------------------------------------------------------------


def projection(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as slices of one fused projection."""
    batch, heads, kv_heads, length, _, width = shape
    fused = torch.randn(batch, length, (heads + 2 * kv_heads) * width, device=DEVICE).to(HALF)
    parts = fused.split([heads * width, kv_heads * width, kv_heads * width], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
    return q, k, v


def head_major(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.contiguous() for x in make(shape))
    return q, k, v


def width_not_dense(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in make(shape))
    return q, k, v


def unaligned(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in make(shape))
    return q, k, v


def expanded(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values shared by all heads and sequences of the batch."""
    q, k, v = make(shape)
    return q, k[:1, :1].expand_as(k), v[:1, :1].expand_as(v)


@each_library
@pytest.mark.parametrize("make_inputs", [make, projection, head_major, width_not_dense, unaligned, expanded])
@pytest.mark.parametrize("shape", [(2, 4, 2, 33, 33, 16), (2, 1, 1, 9, 9, 16), (1, 3, 1, 5, 5, 8)])
def test_layouts(library: Backend, make_inputs: Any, shape: tuple[int, ...]) -> None:
    """Right values in the promised memory order for any strides of inputs and gradient, kernel and reference alike."""
    if not runs(library, shape):
        pytest.skip(f"{library} is not chosen here")
    q, k, v = make_inputs(shape)
    other = make(shape, seed=1)[0]
    gradients = [other, other.contiguous(), other[:1, :1, :1, :1].expand_as(other)]
    if CUDA:  # a plan cached for one layout of the gradient must not serve another
        gradients += gradients
    with forced_backend(library):
        for grad in gradients:
            truth = everything("reference", q.double(), k.double(), v.double(), True, 0.2, None, grad=grad.double())
            for implementation in IMPLEMENTATIONS:
                results = everything(implementation, q, k, v, True, 0.2, None, grad=grad)
                for value, expected in zip(results, truth, strict=True):
                    assert relative_error(value, expected) < 4 * torch.finfo(HALF).eps + 1e-6
                    assert value.stride() == (length_major(value) if value.dim() == 4 else fresh(value))


def fresh(x: Tensor) -> tuple[int, ...]:
    return torch.empty(x.shape).stride()


def test_views_of_a_fused_projection_are_read_in_place() -> None:
    for x in projection((2, 4, 2, 33, 33, 16)):
        assert module.readable(x) is x


# -- contract ----------------------------------------------------------------------------------------------------------


def test_unneeded_gradients_are_not_returned() -> None:
    with forced_backend("flash" if CUDA else "cpu"):
        assert_skips_unneeded(attention, *make(SQUARES[1]), True, 0.2, None)


@pytest.mark.parametrize("causal", [True, False])
def test_opcheck(causal: bool) -> None:
    opcheck(attention, *make((2, 4, 2, 5, 5, 16)), causal, 0.2, None)


def test_autograd() -> None:
    """Through the registered operator, also when only the keys want a gradient; lse has none."""
    for wanted in ([0], [1], [0, 1, 2]):
        q, k, v = inputs = leaves(make(SQUARES[1]), HALF)
        for i, x in enumerate(inputs):
            x.requires_grad_(i in wanted)
        out, lse = attention(q, k, v, True, 0.2, None)
        assert out.requires_grad and not lse.requires_grad
        ours = torch.autograd.grad(out.sum(), [inputs[i] for i in wanted])
        theirs = torch.autograd.grad(eager(q, k, v, True, 0.2, None).sum(), [inputs[i] for i in wanted])
        for mine, yours in zip(ours, theirs, strict=True):
            assert relative_error(mine, yours) < 2 * torch.finfo(HALF).eps


def test_one_graph_serves_all_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, True, 0.2, None)[0], backend=counter, dynamic=True)
    for length in (5, 6, 9, 17):
        q, k, v = (x.requires_grad_() for x in make((2, 4, 2, length, length, 16)))
        out = compiled(q, k, v)
        out.sum().backward()
        assert relative_error(out, eager(q, k, v, True, 0.2, None)) < 2 * torch.finfo(HALF).eps
        assert q.grad is not None and q.grad.shape == q.shape
    assert counter.frame_count == 1


def test_symbolic_shapes() -> None:
    assert_symbolic(attention, *make((2, 4, 4, 7, 7, 16)), True, 0.2, None, static=(1, 3))
    assert_symbolic(attention, *make((2, 4, 2, 7, 9, 16)), False, 0.2, None, static=(1, 3))
    with symbolic(*make((2, 4, 2, 7, 9, 16)), static=(1, 3)) as (q, k, v):
        assert "align the diagonal" in str(attention.supports(q, k, v, True, 0.2, None))


def test_supports_says_why_not() -> None:
    q, k, v = make(SQUARES[1])
    wide = make((1, 2, 2, 4, 4, 264))
    assert attention.supports(q, k, v, True, 0.2, None) is None
    assert "[batch, heads, length, width]" in str(attention.supports(q[0], k[0], v[0], True, 0.2, None))
    assert "differ in dtype" in str(attention.supports(q.double(), k, v, True, 0.2, None))
    assert "batch size" in str(attention.supports(torch.cat([q, q]), k, v, True, 0.2, None))
    assert "head sizes" in str(attention.supports(q, k[..., :40], v, True, 0.2, None))
    assert "cannot share" in str(attention.supports(q[:, :3], k, v, True, 0.2, None))
    assert "differ" in str(attention.supports(q, k, v[:, :, 1:], True, 0.2, None))
    assert "align the diagonal" in str(attention.supports(q, k[:, :, 1:], v[:, :, 1:], True, 0.2, None))
    assert attention.supports(q, k[:, :, 1:], v[:, :, 1:], False, 0.2, None) is None
    assert "int32" in str(attention.supports(q.int(), k.int(), v.int(), True, 0.2, None))
    assert "meta" in str(attention.supports(q.to("meta"), k.to("meta"), v.to("meta"), True, 0.2, None))
    with FakeTensorMode(allow_non_fake_inputs=True):  # what is refused on a GPU, asked without one
        x = torch.empty(1, 2, 4, 64, device="cuda")
        assert "not in float32" in str(attention.supports(x, x, x, True, 0.2, None))
        x = torch.empty(*wide[0].shape, device="cuda", dtype=torch.bfloat16)
        assert "264" in str(attention.supports(x, x, x, True, 0.2, None))
        x = torch.empty(1, 2, 4, 20, device="cuda", dtype=torch.bfloat16)
        assert "multiples of 8" in str(attention.supports(x, x, x, True, 0.2, None))


def test_flops_are_registered_and_causal_is_half() -> None:
    q, k, v = make((2, 4, 2, 32, 32, 16))
    product = 2 * 2 * 4 * 32 * 32 * 16
    assert attention.flops(q, k, v, False, 0.2, None) == 2 * product
    assert attention.flops(q, k, v, True, 0.2, None) == product
    with FlopCounterMode(display=False) as counter:
        out, _ = attention(q.requires_grad_(), k, v, True, 0.2, None)
        assert counter.get_total_flops() == product
        out.sum().backward()
    assert counter.get_total_flops() == product + 5 * product // 2


# -- windows -----------------------------------------------------------------------------------------------------------

WINDOWS: list[Backend] = ["flash"] if CUDA else ["cpu"]
# Longer than the blocks in which the libraries walk over keys, so that whole blocks are hidden.
LONG = [(1, 4, 2, 700, 700, 16)]


@pytest.mark.parametrize("library", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [2, 5, 64])
def test_accuracy_in_a_window(library: Backend, dtype: torch.dtype, window: int) -> None:
    def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return *make(shape, dtype, seed), True, 0.2, window

    with forced_backend(library):
        assert_accurate(attention, inputs, eager, dtypes=[dtype], shapes=[*SQUARES, *LONG])


@pytest.mark.skipif(CUDA, reason="the CUDA libraries have no float64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_window_in_float64(implementation: str) -> None:
    q, k, v = make(SQUARES[1], torch.float64)
    grad = torch.randn_like(q)
    results = everything(implementation, q, k, v, True, 0.2, 5, grad=grad)
    q, k, v = leaves((q, k, v))
    out = exact(q, k, v, True, 0.2, 5)
    truth = [out, scores(q, k, True, 0.2, 5).logsumexp(-1), *torch.autograd.grad(out, (q, k, v), grad)]
    for value, expected in zip(results, truth, strict=True):
        assert value.dtype == torch.float64 and relative_error(value, expected) < 1e-14


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_window_is_exactly_that_many_keys_wide(implementation: str) -> None:
    """The key at i - window + 1 moves query i, the one before it does not, bit for bit; nor does query i move it."""
    forward, backward = IMPLEMENTATIONS[implementation]
    q, k, v = make((1, 2, 2, 40, 40, 16))
    query, window = 30, 8
    args = q, k, v, True, 0.2, window
    outputs = forward(attention, *args)
    for key, seen in ((query - window, False), (query - window + 1, True), (query, True), (query + 1, False)):
        other = v.clone()
        other[:, :, key] += 1
        moved = forward(attention, q, k, other, *args[3:])[0][:, :, query]
        assert torch.equal(moved, outputs[0][:, :, query]) is not seen
    grad = torch.zeros_like(outputs[0])
    grad[:, :, query] = 1
    _, _, dv = backward(attention, args, outputs, [grad])
    reached = dv.abs().amax((0, 1, 3)).nonzero().flatten().tolist()  # type: ignore[union-attr]
    assert reached == list(range(query - window + 1, query + 1))


@pytest.mark.parametrize("window", [7, 8, 1000])
def test_a_window_over_the_whole_length_is_causal(window: int) -> None:
    q, k, v = make((2, 4, 2, 7, 7, 16))
    assert choose_backend(q, k, v, True, window) == choose_backend(q, k, v, True)
    assert torch.equal(attention(q, k, v, True, 0.2, window)[0], attention(q, k, v, True, 0.2, None)[0])


def test_opcheck_in_a_window() -> None:
    opcheck(attention, *make((2, 4, 2, 9, 9, 16)), True, 0.2, 3)


def test_symbolic_shapes_in_a_window() -> None:
    """Also where some lengths are shorter than the window."""
    assert_symbolic(attention, *make((2, 4, 4, 7, 7, 16)), True, 0.2, 5, static=(1, 3))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, True, 0.2, 8)[0], backend=counter, dynamic=True)
    for length in (5, 8, 9, 17):
        q, k, v = (x.requires_grad_() for x in make((2, 4, 2, length, length, 16)))
        ours = torch.autograd.grad((out := compiled(q, k, v)).sum(), (q, k, v))
        theirs = torch.autograd.grad((wanted := eager(q, k, v, True, 0.2, 8)).sum(), (q, k, v))
        for mine, yours in zip((out, *ours), (wanted, *theirs), strict=True):
            assert relative_error(mine, yours) < 4 * torch.finfo(HALF).eps + 1e-6
    assert counter.frame_count == 1


@pytest.mark.parametrize("library", WINDOWS)
def test_a_window_of_one_is_the_value_itself(library: Backend) -> None:
    q, k, v = make((2, 2, 2, 33, 33, 16))
    with forced_backend(library):
        out, _, dq, dk, dv = everything("kernel", q, k, v, True, 0.2, 1, grad=(grad := torch.randn_like(q)))
    assert torch.equal(out, v) and relative_error(dv, grad) < torch.finfo(HALF).eps
    assert float(dq.abs().max()) < 1e-5 and float(dk.abs().max()) < 1e-5


def test_a_window_that_sees_ahead_is_right_but_refused() -> None:
    """No library has it: a pass is told so, and a direct call gets the formula."""
    for shape in (SQUARES[1], *RECTANGLES):
        q, k, v = make(shape)
        assert choose_backend(q, k, v, False, 30) == "explicit"
        truth = exact(q.double(), k.double(), v.double(), False, 0.2, 30)
        assert relative_error(attention(q, k, v, False, 0.2, 30)[0], truth) < 8 * torch.finfo(HALF).eps
    q, k, v = make(SQUARES[1])
    assert attention.supports(q, k, v, True, 0.2, 5) is None
    assert attention.supports(q, k, v, False, 0.2, 5) == "window 5 without causal: no kernel"
    assert attention.supports(q, k, v, True, 0.2, 0) == "window 0 hides every key"


def test_flops_of_a_window() -> None:
    q, k, v = make((2, 4, 2, 32, 32, 16))
    by_score = 2 * 2 * 2 * 4 * 16
    assert attention.flops(q, k, v, True, 0.2, 8) == by_score * (8 * 32 - 8 * 8 // 2)
    assert attention.flops(q, k, v, True, 0.2, 32) == attention.flops(q, k, v, True, 0.2, None)
    assert attention.flops(q, k, v, True, 0.2, 99) == attention.flops(q, k, v, True, 0.2, None)
    with symbolic(q, k, v, static=(1, 3)) as (q, k, v):
        assert isinstance(attention.flops(q, k, v, True, 0.2, 8), torch.SymInt)


# -- heads of two sizes ------------------------------------------------------------------------------------------------


@each_library
@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize("window", [None, 4])
def test_values_of_another_width(library: Backend, channels: int, window: int | None) -> None:
    """As in multi-head latent attention; out has the values' width, and so has the reference's layout."""
    if library == "cudnn" and (window is not None or not runs(library, (1, 4, 2, 33, 33, max(32, channels)))):
        pytest.skip("cuDNN is not chosen here")

    def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        (q, k, _), (*_, v) = make(shape, dtype, seed), make((*shape[:5], channels), dtype, seed)
        return q, k, v, True, 0.1, window

    shapes = [(1, 4, 2, 33, 33, 32)]
    # In float32 the CPU's library is further from the truth than the formula, whatever the widths: it saves sums of
    # exponentials rounded. What is asked is that two widths add nothing to that.
    same = eager_of_one_width if library == "cpu" else eager
    with forced_backend(library):
        assert_accurate(attention, inputs, same, dtypes=DTYPES, shapes=shapes)
    opcheck(attention, *inputs(shapes[0], HALF, 0))
    q, k, v, *_ = inputs(shapes[0], HALF, 0)
    assert attention.flops(q, k, v, True, 0.2, None) == 4 * 33 * 33 * (32 + channels)
    assert attention.supports(q, k, v, True, 0.2, window) is None


# -- which library -----------------------------------------------------------------------------------------------------


def test_choice_on_the_cpu() -> None:
    q, k, v = make(SQUARES[1], torch.float32)
    q, k, v = q.cpu(), k.cpu(), v.cpu()
    assert choose_backend(q, k, v, True) == "cpu"
    assert choose_backend(q, k, v[..., :8], True) == "cpu"
    assert choose_backend(q[:, :, :0], k, v, False) == "explicit"
    with forced_backend("explicit"):
        assert choose_backend(q, k, v, True) == "explicit"
    assert choose_backend(q, k, v, True) == "cpu"


@pytest.mark.parametrize(
    ("capability", "cudnn", "length", "width", "choice"),
    [
        ((9, 0), 91900, 2048, 128, "cudnn"),
        ((9, 0), 91900, 2047, 64, "cudnn"),
        ((9, 0), 91002, 2048, 128, "cudnn"),
        ((9, 0), 91002, 2047, 128, "flash"),  # wrong results before 9.15.1
        ((9, 0), 91900, 2048, 256, "flash"),
        ((9, 0), 91900, 1, 128, "flash"),
        ((10, 0), 91900, 2048, 128, "cudnn"),
        ((12, 0), 91900, 2048, 128, "flash"),
        ((8, 0), 91900, 2048, 128, "flash"),
        ((8, 9), 91900, 2048, 200, "explicit"),
        ((7, 5), 91900, 2048, 128, "explicit"),
    ],
)
def test_choice_by_device(
    monkeypatch: pytest.MonkeyPatch, capability: Any, cudnn: int, length: int, width: int, choice: str
) -> None:
    monkeypatch.setattr(module, "_capability", lambda device: capability)
    monkeypatch.setattr(module, "_cudnn_version", lambda: cudnn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with FakeTensorMode():
        q = torch.empty(2, 8, length, width, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 2, length, width, device="cuda", dtype=torch.bfloat16)
        assert choose_backend(q, k, k, True) == choice
        narrow = "flash" if choice == "cudnn" else choice  # cuDNN takes no window
        assert choose_backend(q, k, k, True, 16) == (choice if length <= 16 else narrow)
        assert choose_backend(q.float(), k.float(), k.float(), True) == "explicit"


@on_cuda
def test_a_user_can_switch_cudnn_off() -> None:
    q, k, v = make(MODEL_SIZED[0])
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        assert choose_backend(q, k, v, True) == "flash"
