"""Settings of the Mixture-of-Experts layers: experts, router, capacity and balance."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from moe_train.config.base import SectionWithParts
from moe_train.config.registry import check_part

BalanceWeight = Literal[
    "importance_cv2_coef", "load_cv2_coef", "switch_aux_coef", "z_loss_coef", "bias_update_rate"
]  # the fields that weigh a way to balance, each of which may have a schedule
CapacityFactor = Annotated[float, Field(gt=0.0)]
SchedulePoints = tuple[tuple[int, float], ...]  # step, factor

# Fields for generation, with which experts take all their tokens. With a capacity, padding and prefill chunks would
# change which tokens an expert has room for.
DROPLESS: dict[str, Any] = {
    "capacity_factor": None,
    "eval_capacity_factor": None,
    "capacity_scope": "sequence",
    "drop_policy": "probability",
}


class MoEConfig(SectionWithParts):
    """The Mixture-of-Experts layers: experts, router, capacity and balance terms."""

    part_group = "routers"

    num_experts: PositiveInt = 8
    """Number of experts of one MoE layer, over all ranks."""
    top_k: PositiveInt = 2
    """Number of experts that every token is sent to."""
    intermediate_size: PositiveInt | None = None
    """Inner width of one expert's SwiGLU; None: model.intermediate_size."""
    num_shared_experts: int = Field(0, ge=0)
    """Number of dense SwiGLU experts of the same width that every token passes; their output is added to the output of
    the chosen experts."""
    router: str = "noisy_topk"
    """noisy_topk: logits, which start at zero, with learned noise (Shazeer et al. 2017); softmax_topk: softmax without
    noise (Mixtral); sigmoid_topk: the score of an expert does not depend on the other experts (DeepSeek-V3); switch:
    one expert, and its softmax probability is the gate (Switch Transformer). A router of another package is given by
    its name; its own settings are under that name, beside this field."""
    noise_epsilon: float = Field(1e-2, gt=0.0)
    """Smallest standard deviation of the router's noise, in logits; only for router noisy_topk."""
    input_jitter: float = Field(0.0, ge=0.0, lt=1.0)
    """Jitter of the router's input: in training it is multiplied by random factors, uniform between 1 - input_jitter
    and 1 + input_jitter; 0: no jitter."""
    renormalize_gates: bool | None = None
    """True: the gates of the chosen experts sum to one; False: the gates are scores among all experts; None: False for
    router switch, else True."""
    num_groups: PositiveInt = 1
    """Number of groups of consecutive experts; a token may use only its best groups. Only for router sigmoid_topk."""
    top_k_groups: PositiveInt | None = None
    """Number of groups that a token may use; the score of a group is the sum of its two best experts' scores. Required
    if num_groups is above 1."""
    routed_scaling_factor: PositiveFloat = 1.0
    """Factor of all gates; only for router sigmoid_topk."""
    capacity_factor: CapacityFactor | None = None
    """Most tokens that an expert takes in training, as a multiple of the mean, tokens x top_k / num_experts. The expert
    adds nothing to further tokens, which keep their residual stream. None: dropless."""
    eval_capacity_factor: CapacityFactor | None = None
    """Most tokens that an expert takes in evaluation, as a multiple of the mean. None: dropless. Generation is always
    dropless."""
    capacity_scope: Literal["sequence", "micro_batch"] = "sequence"
    """Tokens that share a capacity. sequence: the tokens of one sequence, so that results are the same in every layout
    of ranks; micro_batch: in training, all tokens of a rank's micro-batch, so that results depend on the layout."""
    drop_policy: Literal["probability", "position"] = "probability"
    """Assignments that are dropped if an expert has more than its capacity. probability: those with the lowest gates;
    position: those of the last tokens."""
    importance_cv2_coef: float = Field(0.1, ge=0.0)
    """Weight of CV^2(importance) in the loss; importance is the sum of an expert's gates over tokens. If it is not
    given, but switch_aux_coef or bias_update_rate is, it is 0."""
    load_cv2_coef: float = Field(0.1, ge=0.0)
    """Weight of CV^2(load) in the loss; load is the smooth estimate of an expert's token count. It needs router
    noisy_topk. If it is not given, it is 0 with other routers, and also if switch_aux_coef or bias_update_rate is
    given."""
    balance_scope: Literal["step", "micro_step", "rank"] = "step"
    """Tokens that importance and load are summed over before CV^2 is formed. step: those of the whole optimizer step;
    the gradient is taken at the sums of the last step, so that it is the same however a step is split over ranks and
    micro-batches. micro_step (or global): those of all ranks in a micro-step; rank (or local): those of a rank's
    micro-batch. With the last two, the loss depends on gradient accumulation."""
    switch_aux_coef: float = Field(0.0, ge=0.0)
    """Weight of the Switch / GShard loss, num_experts x sum of f p, where f is an expert's share of the assignments and
    p its mean probability. The loss is 1 when balanced, and num_experts / top_k when all tokens choose the same
    experts."""
    switch_scope: Literal["step", "micro_batch", "sequence", "global"] = "step"
    """Tokens that f and p are computed from. step: p from those of the whole optimizer step, f from those of the last
    step; micro_batch: those of a rank's micro-batch; sequence: those of each sequence; global: those of all ranks in a
    micro-step."""
    z_loss_coef: float = Field(0.0, ge=0.0)
    """Weight of the mean squared logsumexp of the router's logits (1e-3 in ST-MoE)."""
    bias_update_rate: float = Field(0.0, ge=0.0)
    """Loss-free balancing: after each step, the bias of an expert rises by this number if its count is below the mean,
    and falls by it if its count is above the mean (1e-3 in arXiv 2408.15664). Experts are chosen by score plus bias;
    gates do not contain the bias."""
    balance: dict[str, dict[str, Any]] = Field({})
    """Ways to balance of other packages: the settings of each, by its name."""
    coef_schedules: dict[str, SchedulePoints] = Field({})
    """Factors of balance weights over the run: for each name of a weight (or name in balance), points [step, factor].
    The factor is linear between the points and constant outside (as JSON on the command line:
    {"switch_aux_coef": [[0, 1], [1000, 0.1]]})."""

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether the gates sum to one: renormalize_gates, or the router's default if that is None."""
        return self.router != "switch" if self.renormalize_gates is None else self.renormalize_gates

    @field_validator("balance_scope", mode="before")
    @classmethod
    def _read_earlier_names(cls, value: Any) -> Any:
        return {"global": "micro_step", "local": "rank"}.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _choose_weights(cls, values: Any) -> Any:
        """Set CV^2 weights that are not given to 0, if something else balances or the load has no gradient."""
        if not isinstance(values, dict):
            return values
        others = any(values.get(name) for name in ("switch_aux_coef", "bias_update_rate"))
        has_noise = values.get("router", "noisy_topk") == "noisy_topk"
        chosen = {"importance_cv2_coef": 0.0} if others else {}
        chosen |= {"load_cv2_coef": 0.0} if others or not has_noise else {}
        return chosen | values

    @field_validator("coef_schedules", mode="before")
    @classmethod
    def _check_points(cls, schedules: Any) -> Any:
        if schedules is None:  # a mapping without keys, as an empty section
            return {}
        if not isinstance(schedules, dict):
            raise ValueError(f"coef_schedules ({schedules!r}) must map names of weights to points [step, factor]")
        for name, points in schedules.items():
            if not (isinstance(points, list | tuple) and points and all(_is_point(point) for point in points)):
                raise ValueError(
                    f"coef_schedules.{name} ({points!r}) must be points [step, factor]: a whole number and a number, "
                    "neither below 0"
                )
        return schedules

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_part("routers", self.router, "router")
        for name, values in self.part_settings.items():
            if name != self.router:
                raise ValueError(f"{name} ({values}) has no effect: router is {self.router!r}")
        for name in self.balance:
            check_part("balance", name, "balance")
        self._check_router()
        self._check_groups()
        self._check_balance()
        self._check_schedules()
        if self.capacity_factor is None and self.eval_capacity_factor is None:
            for name in ("capacity_scope", "drop_policy"):
                if self.differs(name):
                    raise ValueError(
                        f"{name} ({getattr(self, name)!r}) has no effect without a capacity: set capacity_factor or "
                        "eval_capacity_factor"
                    )
        return self

    def _check_router(self) -> None:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must not exceed num_experts ({self.num_experts})")
        if self.router == "switch" and self.top_k != 1:
            raise ValueError(f"router 'switch' sends a token to one expert: top_k ({self.top_k}) must be 1")
        if self.top_k == 1 and self.gates_sum_to_one:
            raise ValueError(
                "top_k (1) with renormalize_gates (True) makes every gate 1, so that the router learns nothing "
                "from the task: set renormalize_gates to False, or top_k to 2 or more"
            )
        only_for = {
            "noise_epsilon": "noisy_topk",
            "num_groups": "sigmoid_topk",
            "top_k_groups": "sigmoid_topk",
            "routed_scaling_factor": "sigmoid_topk",
        }
        for name, router in only_for.items():
            if self.router != router and self.differs(name):
                raise ValueError(
                    f"{name} ({getattr(self, name)}) has no effect with router {self.router!r}: leave it out, or set "
                    f"router to {router}"
                )

    def _check_groups(self) -> None:
        groups, chosen = self.num_groups, self.top_k_groups
        if self.num_experts % groups:
            raise ValueError(f"num_experts ({self.num_experts}) must be divisible by num_groups ({groups})")
        if groups == 1:
            if chosen is not None:
                raise ValueError(f"top_k_groups ({chosen}) has no effect with num_groups (1): set num_groups too")
            return
        if chosen is None or chosen >= groups:
            raise ValueError(
                f"num_groups ({groups}) has no effect with top_k_groups ({chosen}): set top_k_groups to a number from "
                f"1 to {groups - 1}"
            )
        within = chosen * (self.num_experts // groups)
        if self.top_k > within:
            raise ValueError(
                f"top_k ({self.top_k}) must not exceed the {within} experts of top_k_groups ({chosen}) of num_groups "
                f"({groups})"
            )

    def _check_balance(self) -> None:
        for name in ("load_cv2_coef", "switch_aux_coef", "bias_update_rate"):
            if getattr(self, name) > 0 and self.top_k == self.num_experts:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) has no effect with top_k ({self.top_k}) = num_experts "
                    f"({self.num_experts}): every expert gets every token; set {name} to 0"
                )
        if self.balance_scope == "rank" and not (self.importance_cv2_coef or self.load_cv2_coef):
            raise ValueError(
                f"balance_scope ({self.balance_scope!r}) has no effect: importance_cv2_coef and load_cv2_coef are 0"
            )
        if self.switch_scope not in ("step", "global") and not self.switch_aux_coef:  # global was the default once
            raise ValueError(f"switch_scope ({self.switch_scope!r}) has no effect: switch_aux_coef is 0")

    def _check_schedules(self) -> None:
        for name, points in self.coef_schedules.items():
            shown = [list(point) for point in points]
            if name not in (*get_args(BalanceWeight), *self.balance):
                raise ValueError(
                    f"coef_schedules.{name} ({shown}): no way to balance has this name; known: "
                    f"{', '.join((*get_args(BalanceWeight), *self.balance))}"
                )
            if name not in self.balance and not getattr(self, name):
                raise ValueError(f"coef_schedules.{name} ({shown}) has no effect: {name} is 0")
            steps = [step for step, _ in points]
            if steps != sorted(set(steps)):
                raise ValueError(f"coef_schedules.{name} ({shown}) must be points [step, factor] of increasing steps")


def _is_point(value: Any) -> bool:
    if not (isinstance(value, list | tuple) and len(value) == 2) or any(isinstance(part, bool) for part in value):
        return False
    step, factor = value
    is_whole = isinstance(step, int) or (isinstance(step, float) and step.is_integer())  # 1e3 is a float in YAML, JSON
    return is_whole and isinstance(factor, int | float) and step >= 0 and factor >= 0
