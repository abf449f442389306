"""The peak of a device: measured on a CPU, from a table for a GPU that is known."""

import pytest
import torch

from moe_train.host import peak
from moe_train.host.peak import peak_flops


def test_a_cpu_is_measured():
    flops = peak_flops(torch.device("cpu"), "fp32")
    assert 1e8 < flops < 1e14  # a core of the last decades and a large server


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 9.89e14),
        ("NVIDIA H200 NVL", 8.35e14),
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA H100 PCIe", 7.56e14),
        ("NVIDIA H100 NVL", 8.35e14),
        ("NVIDIA GH200 480GB", 9.89e14),
        ("NVIDIA H20", 1.48e14),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("AMD Instinct MI300X", 1.307e15),
    ],
)
def test_a_known_gpu_is_looked_up(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda", 0), "bf16") == flops


def test_what_is_not_known_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another")
    asked = []
    monkeypatch.setattr(peak, "_measured", lambda device, dtype: asked.append(dtype) or 5.0)
    assert peak_flops(torch.device("cuda", 0), "bf16") == 5.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    assert peak_flops(torch.device("cuda", 0), "fp32") == 5.0  # the table is of 16 bits
    assert asked == [torch.bfloat16, torch.float32]
