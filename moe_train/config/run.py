"""Settings of a run: parallelism, optimizer, loop, checkpoints, telemetry."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError, model_validator

from moe_train.config.base import Section, SectionWithParts
from moe_train.config.paths import UserPath
from moe_train.config.registry import PartName, check_part

ALARM_FIELDS = (  # in telemetry
    "dead_after_steps",
    "max_violation_alarm",
    "entropy_alarm",
    "kappa_alarm",
    "information_alarm",
    "alarm_after_steps",
)

RecomputedPart = Literal["none", "attention", "experts", "block"]
"""Part of a block that the backward pass computes again."""


class ParallelConfig(Section):
    """Layout of the model over ranks."""

    expert_parallel_size: PositiveInt | Literal["auto"] = "auto"
    """Ranks that share the experts of a layer; auto: the largest number that divides experts and ranks and stays within
    a node, or with dispatch two_level takes whole nodes."""
    zero_stage: int = Field(1, ge=1, le=3)
    """Stage of DeepSpeed ZeRO: 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where master weights, optimizer states and the update are. none: on the rank's device; cpu: in pinned memory of
    the host (ZeRO-Offload), for a model whose states do not fit the devices. Gradients go to the host and weights back,
    and the cores of the rank make the update. The numbers are the same. On a machine that trains on its CPU, device and
    host are the same memory, so that it saves nothing there."""
    dispatch: str = "flat"
    """How tokens travel to experts on other ranks. flat: one row per assignment. unique: one row for each rank that a
    token has experts on; it saves more bytes the more experts a token has. two_level: one row for each node, then one
    row for each rank of the node; if the ranks that share the experts are all on one node, it is the same as unique."""
    ranks_per_node: PositiveInt | Literal["auto"] = "auto"
    """Ranks per node, between which traffic is cheap; only for dispatch two_level. auto: the ranks of a host, as the
    launcher reports them."""
    chunks: PositiveInt | Literal["auto"] = "auto"
    """Number of chunks of a micro-batch's tokens; one chunk travels while the experts compute another. auto: as many as
    have enough rows each. Like dispatch and payload, it has no effect if every rank has all experts."""
    payload: Literal["model", "bf16", "fp8"] = "model"
    """Number format in which rows and their gradients travel between ranks. model: unchanged; bf16: rounded to bf16,
    only for precision fp32; fp8: e4m3 with one scale per row. Every all-to-all rounds them; two_level rounds twice each
    way."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of a sequence (context parallelism), for sequences whose activations do not fit one
    rank. They are consecutive ranks. train.sequence_length must be a multiple of twice this number, and
    train.micro_batch_size is the number of sequences that these ranks have together."""
    context_exchange: Literal["all_gather", "gather_once", "ring"] = "all_gather"
    """How the keys and values of a shared sequence reach the other ranks. all_gather: all at once, for each layer and
    pass; gather_once: all at once, for all layers that read them (model.kv_layers), which keeps them in memory; ring:
    from rank to rank while attention computes, so that a rank holds those of two ranks at a time. The numbers are the
    same."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu (gloo) or cuda (NCCL); auto: cuda if a device is visible. A host with NVIDIA GPUs that torch cannot use is
    refused; DS_ACCELERATOR=cpu or cpu trains on its CPU."""
    threads_per_rank: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of one rank; auto: the cores of the node, divided among its ranks."""
    network_interface: str | None = None
    """Network interface of every host through which ranks reach each other, for gloo and NCCL, such as eth0 or ib0.
    None: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME if set, else the interface of the route to rank 0's host."""
    timeout_seconds: PositiveInt = 600
    """Seconds after which a collective operation that is not complete counts as an error. On CUDA they are at least 120
    more than train.step_timeout_seconds: NCCL ends a process without a report, and so comes after the watchdog."""
    peer_timeout_seconds: int = Field(20, ge=5)
    """Seconds without a heartbeat after which a rank counts as lost: the others name it and end with exit code 70. A
    separate thread sends the heartbeats, also while the rank computes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_part("dispatchers", self.dispatch, "dispatch")
        if self.context_parallel_size == 1 and self.differs("context_exchange"):
            raise ValueError(
                f"context_exchange ({self.context_exchange!r}) has no effect with context_parallel_size (1): every "
                "rank has whole sequences"
            )
        return self


class OptimConfig(SectionWithParts):
    """The optimizer and the schedule of its learning rate."""

    part_group = "optimizers"

    name: str = "adamw"
    """Optimizer. adamw: AdamW with decoupled weight decay; muon: the same for embedding, head, norms, routers and
    vectors, and orthogonalised momentum for the matrices of the blocks (Jordan 2024). An optimizer of another package
    is given by its name. An optimizer's own settings are under its name, beside this field."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    router_lr_factor: PositiveFloat | Literal["auto"] = "auto"
    """Factor of the learning rate of the routers' maps. auto: with CV^2 terms of balance_scope step, 0.05 /
    (learning_rate x model.hidden_size), or 1 if that is less; otherwise 1. An update of Adam moves a logit by up to
    learning_rate x hidden_size. With the lag of scope step, larger moves than 0.05 throw the load from side to side."""
    min_learning_rate_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the peak; not for schedule constant."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after warm-up. cosine: falls like a cosine to the end; wsd: constant, then falls linearly over the
    last steps; constant: does not change."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up from zero."""
    decay_fraction: float = Field(0.2, gt=0.0, le=1.0)
    """Share of all steps in which wsd decays; only for schedule wsd."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay rate of Adam's first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay rate of Adam's second moment."""
    epsilon: PositiveFloat = 1e-8
    """Constant that is added to Adam's denominator."""
    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled weight decay of matrices; norms and biases have none."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Bound to which the global gradient norm, over all ranks and experts, is clipped; 0: no clipping."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_part("optimizers", self.name, "name")
        for name, values in self.part_settings.items():
            if name != self.name:
                raise ValueError(f"{name} ({values}) has no effect: name is {self.name!r}")
        if self.differs("decay_fraction") and self.schedule != "wsd":
            raise ValueError(
                f"decay_fraction ({self.decay_fraction}) has no effect with schedule {self.schedule!r}: it is for wsd"
            )
        if self.differs("min_learning_rate_ratio") and self.schedule == "constant":
            raise ValueError(
                f"min_learning_rate_ratio ({self.min_learning_rate_ratio}) has no effect with schedule 'constant'"
            )
        return self


class TrainConfig(Section):
    """The training loop."""

    run_dir: UserPath
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, logs/, summary.json."""
    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    micro_batch_size: PositiveInt | Literal["auto"] = 8
    """Sequences of one rank, or of ranks that share sequences, in one forward and backward pass; auto: the largest
    number up to 8 that divides a rank's share of global_batch_size."""
    global_batch_size: PositiveInt | None = None
    """Sequences of one optimizer step over all ranks; None: micro_batch_size x ranks, no gradient accumulation (ranks
    that share sequences count as one)."""
    sequence_length: PositiveInt = 256
    """Tokens of one sequence."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the model; auto: bf16 if the hardware has it, else fp32. Master weights are fp32."""
    recompute: RecomputedPart = "none"
    """Part of a block whose activations are not kept, but computed again in the backward pass. attention: the norm and
    the sequence mixer, of any kind; experts: the norm and the feed-forward layer, with or without experts, whose rows
    then travel again; block: both. The numbers stay the same."""
    recompute_every: PositiveInt = 1
    """Recomputation only in every recompute_every-th block (1: in all; 2: in the blocks 1, 3, 5, ... counted from 0),
    for less time and more memory."""
    recompute_activations: bool | None = None
    """Earlier form of recompute: true is block, false is none."""
    loss_chunk_tokens: PositiveInt | None = None
    """Tokens of a rank whose logits exist at a time, in training and in validation; the loss stays the same within
    rounding. None: all of a micro-batch if its logits take up to 512 MiB, else as many as take 256 MiB, at least 256
    tokens."""
    compile: bool = False
    """True: torch.compile compiles attention, norms, dense feed-forward layers and shared experts for training; it does
    not compile routers, dispatch and experts. It needs a C++ compiler, on CUDA also triton, and ZeRO stage 1 or 2. The
    first step takes half a minute or more longer. A step and its gradients stay the same within rounding."""
    seed: int = 0
    """Seed of initial weights, sample order and router noise."""
    log_every: PositiveInt = 10
    """Steps between progress lines; on a terminal, a progress bar replaces them."""
    validate_every: int = Field(0, ge=0)
    """Steps between validations; 0: only at the end."""
    validation_sequences: PositiveInt | None = 128
    """Held-out sequences per periodic validation, spread over the held-out text; None: all, as in the validation at the
    end."""
    profile_steps: int = Field(0, ge=0)
    """Number of steps that torch.profiler traces on every rank, beginning with the third step after a start; traced
    steps are slower. The traces are in profile/ of the run folder; the four steps of MoE layers are named ranges. 0:
    none."""
    sample_tokens: int = Field(64, ge=0)
    """Tokens of the text sampled at the end; 0: none."""
    max_grad_norm_ratio: float | None = Field(10.0, gt=1.0)
    """A step is skipped if its gradient norm is more than this many times the median of the last 128 steps taken, once
    32 are known; None: a step is skipped only if its loss or a gradient is not finite."""
    max_skipped_steps: PositiveInt = 5
    """Skipped steps in a row after which the run goes back to the last checkpoint and passes over the data since then.
    If this happens again before the next checkpoint, the run ends with a diagnosis."""
    step_timeout_seconds: PositiveInt = 600
    """Seconds after which a step that has not ended counts as hanging: every rank writes where it is, and the run ends
    with exit code 70, so that a launcher can start it again."""
    lock_wait_seconds: float = Field(90.0, ge=0.0)
    """Longest time that a start waits for a run folder in which another run is at work; then it ends with exit code 2.
    A run that is dead on this host is replaced at once, one on another host after 60 seconds without a sign of life."""

    @model_validator(mode="before")
    @classmethod
    def _take_recompute_activations(cls, values: Any) -> Any:
        given = values.get("recompute_activations") if isinstance(values, dict) else None
        if given is None:
            return values
        try:
            part = "block" if TypeAdapter(bool).validate_python(given) else "none"
        except ValidationError:
            return values  # said of the field
        if values.get("recompute", part) != part:
            raise ValueError(
                f"recompute ({values['recompute']!r}) and recompute_activations ({given}), which means {part!r}, "
                "contradict each other: give recompute alone"
            )
        return values | {"recompute": part, "recompute_activations": None}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.recompute == "none" and self.differs("recompute_every"):
            raise ValueError(
                f"recompute_every ({self.recompute_every}) has no effect with recompute ('none'): nothing is recomputed"
            )
        if self.micro_batch_size == "auto" and self.global_batch_size is None:
            raise ValueError("micro_batch_size ('auto') needs global_batch_size: it is a part of it")
        if self.differs("validation_sequences") and self.validate_every == 0:
            raise ValueError(
                f"validation_sequences ({self.validation_sequences}) has no effect with validate_every (0): it is for "
                "periodic validation; the one at the end takes all held-out text"
            )
        return self


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: steps cause none, only every_minutes and the end do."""
    every_minutes: float = Field(30.0, ge=0.0, allow_inf_nan=False)
    """Minutes of training after which a checkpoint is saved, counted from the last save, by the clock of rank 0; 0:
    time causes none. It acts beside every."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep; older ones are removed after a newer one is complete."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that are a multiple of this number are kept too; 0: none."""
    asynchronous: bool = True
    """True: a save copies the state to host memory, and training continues while it is written; False: training
    waits."""
    on_error: Literal["continue", "stop"] = "continue"
    """What happens after a failed save, for example on a full disk. continue: the error is reported, the last good
    checkpoint stays, and the next save is tried when it is due (the last save of the run must succeed); stop: the run
    ends."""
    resume: UserPath = "auto"
    """Checkpoint to resume from. auto: the newest valid checkpoint of the run folder, if there is one; never: none, and
    a run folder with checkpoints is refused; or a path: the folder of a run or of its checkpoints (the newest one),
    latest in the latter, or the folder of one checkpoint."""
    init_from: UserPath | None = None
    """Checkpoint whose weights alone a new run begins with, at step 0 with new moments: the folder of a run, of its
    checkpoints or of one checkpoint, of the same model and tokenizer. It counts until the run has a checkpoint of its
    own; None: the initial values."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise ValueError(
                f"init_from ({self.init_from!r}) and resume ({self.resume!r}) both name a checkpoint to begin with: "
                "leave one out"
            )
        if self.keep_every and self.every == 0:
            raise ValueError(f"keep_every ({self.keep_every}) has no effect with every (0): no save is at a known step")
        if self.every and self.keep_every % self.every:
            raise ValueError(f"keep_every ({self.keep_every}) must be a multiple of every ({self.every})")
        return self


class TelemetryConfig(SectionWithParts):
    """Records for TensorBoard and metrics.jsonl, and warnings."""

    part_group = "sinks"

    every: PositiveInt = 10
    """Steps between written records. Tokens per expert, and the figures computed from them, cover all steps since the
    last record. For a step that is neither written nor shown, telemetry reduces nothing and waits for nothing."""
    sinks: tuple[PartName, ...] = ("tensorboard",)
    """Sinks that get the records, besides metrics.jsonl: tensorboard, and sinks of other packages, by their names. A
    sink's own settings are under its name, beside this field."""
    tensorboard: bool = True
    """False: TensorBoard gets no records, whatever sinks says."""
    experts: bool = True
    """True: the records contain the load, balance and traffic of experts; False: they do not, and nothing is summed or
    timed for them, except the sums that a loss needs."""
    dead_after_steps: PositiveInt = 100
    """Steps without a token after which an expert counts as dead, with a warning."""
    max_violation_alarm: PositiveFloat | None = None
    """MaxVio above which a layer gets a warning; None: 2, or if that is less, half of num_experts / top_k - 1, which is
    MaxVio if all tokens choose the same experts."""
    entropy_alarm: float = Field(0.05, ge=0.0, lt=1.0)
    """Mean entropy of a router's distribution below which its layer gets a warning, as a share of ln(num_experts); 0:
    no warning."""
    kappa_alarm: float = Field(0.1, ge=0.0, lt=1.0)
    """Agreement of a noisy router with its own choice without noise, scaled so that dice have 0 (moe/clean_kappa),
    below which its layer gets a warning after warm-up: it routes at random; 0: no warning."""
    information_alarm: float = Field(0.02, ge=0.0, lt=1.0)
    """Share of the choice of experts that the token's id explains (val/expert_information), below which a layer gets a
    warning after warm-up; 0: no warning."""
    alarm_after_steps: PositiveInt = 100
    """Steps for which a figure must be out of bounds before the warning."""

    @property
    def active_sinks(self) -> tuple[str, ...]:
        """Names of the sinks that are opened."""
        return tuple(name for name in dict.fromkeys(self.sinks) if name != "tensorboard" or self.tensorboard)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.sinks:
            check_part("sinks", name, "sinks")
        for name, values in self.part_settings.items():
            if name not in self.sinks:
                raise ValueError(f"{name} ({values}) has no effect: it is not among sinks ({list(self.sinks)})")
        for name in ALARM_FIELDS:
            if not self.experts and self.differs(name):
                raise ValueError(f"{name} ({getattr(self, name)}) has no effect with experts (False)")
        return self
