"""Host memory of snapshots on CUDA: pinned in its own size, and let go of; CUDA's runtime is played."""

from types import SimpleNamespace

import pytest
import torch

from moe_train.checkpoint.snapshot import HostMemory


class Runtime:
    """Notes what is pinned."""

    def __init__(self, code: int) -> None:
        self.code, self.pinned = code, {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.code == 0:
            self.pinned[address] = size
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


class OnCuda(torch.Tensor):
    is_cuda = True


def state(numel: int) -> SimpleNamespace:
    weight = torch.arange(numel, dtype=torch.float32).as_subclass(OnCuda)
    tensor = SimpleNamespace(name="w", shape=(numel,))
    fragment = SimpleNamespace(numel=numel, states={"weight": weight}, tensor=tensor, start=0)
    return SimpleNamespace(moments=(), fragments=lambda: [fragment], buffers=dict, optimizer_step=1, loss_scale=1.0)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Runtime:
    runtime, waits = Runtime(getattr(request, "param", 0)), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    runtime.waits = waits
    return runtime


def test_memory_is_pinned_in_its_own_size(runtime: Runtime) -> None:
    """torch's pinned memory would have the next power of two: 4,096 bytes here."""
    memory = HostMemory()
    found = memory.take(state(513)).tensors["weight/w"]
    assert list(runtime.pinned.values()) == [513 * 4]
    assert torch.equal(found, torch.arange(513, dtype=torch.float32))
    memory.take(state(100))  # fits
    assert list(runtime.pinned.values()) == [513 * 4]
    memory.take(state(1000))
    assert list(runtime.pinned.values()) == [4000], "what was pinned before is let go of"
    assert len(runtime.waits) == 3


@pytest.mark.parametrize("runtime", [2], indirect=True)
def test_where_nothing_may_be_pinned_the_copies_are_plain(runtime: Runtime) -> None:
    found = HostMemory().take(state(8)).tensors["weight/w"]
    assert runtime.pinned == {} and torch.equal(found, torch.arange(8, dtype=torch.float32))
