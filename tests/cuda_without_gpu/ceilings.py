"""How much work a step may give a GPU, case by case. A change that adds work has to raise a number here, with a reason.

The model has two layers, of which one has experts. So a number of this table is nearly what one layer adds, and the
optimizer's part on top. Where DeepSpeed asks, the number is that of DeepSpeed 0.19.8.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """What a run is like.

    Attributes:
        world: GPUs.
        experts: Ranks that share the experts.
        stage: ZeRO stage; 0: decoding.
        accumulation: Micro-batches of a step.
        dispatch: parallel.dispatch.
        precision: train.precision.
        recompute: Whether train.recompute is block.
        documents: Whether documents are isolated.
        router: model.moe.router.
        node: GPUs of a node.
        plant: A mistake that is made on purpose, from `steps.PLANTS`.
    """

    world: int
    experts: int
    stage: int = 1
    accumulation: int = 1
    dispatch: str = "flat"
    precision: str = "bf16"
    recompute: bool = False
    documents: bool = False
    router: str = "softmax_topk"
    node: int = 8
    plant: str = ""


@dataclass(frozen=True)
class Ceiling:
    """The most that a step may do.

    Attributes:
        waits: Waits of the host for the device.
        launches: Kernel launches, estimated.
        wide_mib: MiB of fp32 copies of 16-bit tensors.
        wide_products: Matrix products with fp32 operands.
        reason: Where they come from.
    """

    waits: int
    launches: int
    wide_mib: float
    wide_products: int
    reason: str


_OURS = "one wait a layer whose rows travel, for the split sizes of its all-to-alls"
_NORM = "one wait of DeepSpeed, which asks whether the norm is finite"
_ROUTER = "the router's product is in fp32, of its input and gradients"
CEILINGS = {
    "ZeRO 1, 1 GPU": (
        Layout(1, 1),
        Ceiling(1, 460, 25, 3, f"{_NORM}; a rank alone updates all weights, from gradients in fp32; {_ROUTER}"),
    ),
    "ZeRO 1, 8 GPUs, EP 8": (Layout(8, 8), Ceiling(2, 510, 1.1, 3, f"{_OURS}; {_NORM}; {_ROUTER}")),
    "ZeRO 2, accumulation 2, unique, noisy router": (
        Layout(16, 8, stage=2, accumulation=2, dispatch="unique", router="noisy_topk"),
        Ceiling(3, 1310, 4.2, 12, f"two micro-batches: {_OURS}; {_NORM}; {_ROUTER}, twice with its noise"),
    ),
    "ZeRO 3, accumulation 2, recomputation, documents": (
        Layout(16, 8, stage=3, accumulation=2, recompute=True, documents=True),
        Ceiling(11, 1380, 4.2, 8, f"two micro-batches, each twice forward: {_OURS}; 7 waits of DeepSpeed; {_ROUTER}"),
    ),
    "ZeRO 1, two levels": (
        Layout(16, 16, dispatch="two_level", node=4),
        Ceiling(2, 670, 1.1, 3, f"{_OURS}, of both levels at once; {_NORM}; {_ROUTER}"),
    ),
    "ZeRO 1, fp16": (
        Layout(8, 8, precision="fp16"),
        Ceiling(3, 510, 1.1, 3, f"{_OURS}; {_NORM}; one for the counts of experts: torch has no kernel in fp16"),
    ),
    "decoding, no row for this rank": (
        Layout(8, 8, stage=0),
        Ceiling(1, 245, 0.1, 1, f"{_OURS}; the token's few rows in fp32 for the router"),
    ),
}


@dataclass(frozen=True)
class Registers:
    """The most registers of a thread, for every GPU.

    Attributes:
        most: Number of registers.
        reason: What needs them.
    """

    most: int
    reason: str


# Up to 32 registers, all 2,048 threads of a multiprocessor are resident; 64 leave half of them, enough for loads of 16
# bytes to fill the memory's bandwidth.
REGISTERS = {
    "triton_kernels": {
        "_gather_kernel": Registers(24, "two loads of 16 bytes in flight"),
        "_sum_kernel": Registers(48, "16 fp32 sums, beside the loads"),
        "_swiglu_kernel": Registers(40, "both halves in fp32"),
        "_swiglu_gradients_kernel": Registers(80, "gate, up, slope and a sum in fp32, for 16 columns"),
    },
    "triton_tokens": {
        "_rotate_kernel": Registers(64, "both halves, cosine and sine in fp32, for 16 pairs"),
        "_cross_entropy_kernel": Registers(64, "a running maximum and sum for each of 16 columns"),
        "_choose_kernel": Registers(48, "64-bit ranks of 4 experts"),
    },
}
