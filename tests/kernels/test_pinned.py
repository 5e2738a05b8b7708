"""Page-locked buffers: exact sizes, handed out again only when nobody shows them."""

from __future__ import annotations

import pytest
import torch

from unsloth.kernels import pinned

MIB = 1 << 20


@pytest.fixture(autouse=True)
def locked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was locked, on a machine that locks nothing."""
    found: list[int] = []
    monkeypatch.setattr(pinned, "_buffers", [])
    monkeypatch.setattr(pinned, "_lock", lambda memory: found.append(memory.numel()))
    monkeypatch.setattr(pinned._Buffer, "release", lambda self: found.append(-self.size))
    return found


def test_pages_not_powers_of_two(locked: list[int]) -> None:
    x = torch.randn(3 * MIB // 4 + 1)
    copy = pinned.empty_like(x)
    assert locked == [3 * MIB + pinned.PAGE] == [pinned.held()]
    assert copy.data_ptr() % pinned.PAGE == 0
    assert torch.equal(copy.copy_(x), x)


def test_layout_and_dtype_are_kept() -> None:
    for x in (torch.randn(5, 7, 3).transpose(0, 2), torch.ones(3, 5, dtype=torch.bfloat16), torch.tensor(2)):
        copy = pinned.empty_like(x)
        assert copy.dtype == x.dtype and copy.shape == x.shape and copy.stride() == x.stride()
        assert torch.equal(copy.copy_(x), x)


def test_a_buffer_serves_again_when_no_tensor_shows_it(locked: list[int]) -> None:
    x = torch.zeros(1000)
    first, second = pinned.empty_like(x), pinned.empty_like(x)
    assert first.data_ptr() != second.data_ptr() and len(locked) == 2
    place, view = first.data_ptr(), first[10:].view(2, -1)
    del first
    third = pinned.empty_like(x)  # the view still shows the first one's memory
    assert third.data_ptr() not in (place, second.data_ptr()) and len(locked) == 3
    del view
    assert pinned.empty_like(x).data_ptr() == place and len(locked) == 3


def test_a_buffer_waits_for_backward() -> None:
    """Autograd holds what it saves without a Python object."""
    x = torch.zeros(1000)
    host = pinned.empty_like(x).fill_(3)
    place, weight = host.data_ptr(), torch.ones(1000, requires_grad=True)
    loss = (host * weight).sum()
    del host
    assert pinned.empty_like(x).data_ptr() != place
    loss.backward()
    assert weight.grad is not None and bool((weight.grad == 3).all())
    del loss
    assert pinned.empty_like(x).data_ptr() == place


def test_small_buffers_make_room_for_larger_ones(locked: list[int]) -> None:
    small = [pinned.empty_like(torch.zeros(1000)) for _ in range(3)]
    small.clear()
    large = [pinned.empty_like(torch.zeros(5000)) for _ in range(3)]
    assert pinned.held() == 3 * pinned.whole_pages(20_000) and locked.count(-pinned.PAGE) == 3
    large.clear()
    assert pinned.empty_like(torch.zeros(1000)).numel() == 1000 and pinned.held() == 3 * pinned.whole_pages(20_000)
    pinned.release_all()
    assert pinned.held() == 0


def test_without_locking_there_is_pinned_memory_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: torch.Tensor) -> None:
        raise RuntimeError("cudaHostRegister failed: 801")

    monkeypatch.setattr(pinned, "_lock", refused)
    with pytest.warns(UserWarning, match="in powers of two: cudaHostRegister failed"):
        assert pinned.empty_like(torch.zeros(3, 4)).shape == (3, 4)
    assert pinned.held() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_both_ways_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = torch.randn(1 << 20, device="cuda")
    host = pinned.empty_like(x)
    assert host.copy_(x, non_blocking=True).is_pinned()
    torch.cuda.synchronize()
    assert torch.equal(host, x.cpu())
