"""The rows of benchmarks/balance.py: what balances each run, and what its records come to."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """How the experts of one run are balanced.

    Attributes:
        method: The router, and what balances it.
        w_importance: Weight of CV^2(importance).
        w_load: Weight of CV^2(load).
        switch_aux: Weight of the Switch loss.
        bias_rate: Update rate of the loss-free bias at the start of the run.
    """

    method: str
    w_importance: float = 0.0
    w_load: float = 0.0
    switch_aux: float = 0.0
    bias_rate: float = 0.0

    @property
    def router(self) -> str:
        """As the configuration names it."""
        return self.method.split(",")[0]

    @property
    def is_balanced(self) -> bool:
        """Whether anything balances it."""
        return any((self.w_importance, self.w_load, self.switch_aux, self.bias_rate))

    def options(self, num_steps: int) -> list[str]:
        """The training options of the row."""
        weights = {
            "importance_cv2_coef": self.w_importance,
            "load_cv2_coef": self.w_load,
            "switch_aux_coef": self.switch_aux,
            "bias_update_rate": self.bias_rate,
        }
        options = [f"--model.moe.router={self.router}"]
        options += [f"--model.moe.{name}={weight}" for name, weight in weights.items()]
        if self.bias_rate:
            # A long run takes the paper's constant 1e-3. Here the bias has a few hundred updates in all: large ones
            # while the router moves fast, 1e-3 at the end.
            points = [[0, 1.0], [num_steps // 3, 1.0], [num_steps * 4 // 5, 1e-3 / self.bias_rate]]
            options.append(f"--model.moe.coef_schedules={json.dumps({'bias_update_rate': points})}")
        return options


ROWS = (
    Row("noisy_topk, none"),
    Row("noisy_topk, CV² losses", 0.2, 0.0),
    Row("noisy_topk, CV² losses", 0.0, 0.2),
    Row("noisy_topk, CV² losses", 0.1, 0.1),
    Row("noisy_topk, CV² losses", 0.01, 0.01),
    Row("noisy_topk, CV² losses", 1.0, 1.0),
    Row("softmax_topk, none"),
    Row("softmax_topk, Switch loss", switch_aux=0.01),
    Row("sigmoid_topk, none"),
    Row("sigmoid_topk, loss-free bias", bias_rate=0.02),
)


@dataclass(frozen=True)
class RowResult:
    """What a row's run came to; all but loss are means over the last tenth of its steps.

    Attributes:
        w_importance: Of the row.
        w_load: Of the row.
        method: Of the row.
        loss: Cross-entropy of the held-out text at the end, in nats a token.
        cv_importance: CV of an expert's sum of gates in a step.
        cv_load: CV of its load in a step: with noisy_topk the smooth estimate, as in the paper, else the tokens.
        max_over_mean: Tokens of a step that went to the busiest expert over the mean.
        max_violation: MaxVio of a step, max_over_mean - 1.
        train_loss: Cross-entropy in training, in nats a token.
        switch_aux: Of the row.
        bias_rate: Of the row.
        seconds: The run took.
        violations: MaxVio of every step.
    """

    w_importance: float
    w_load: float
    method: str
    loss: float
    cv_importance: float
    cv_load: float
    max_over_mean: float
    max_violation: float
    train_loss: float
    switch_aux: float
    bias_rate: float
    seconds: float
    violations: list[float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those of every step."""
        values = asdict(self)
        del values["violations"]
        return values


def read_result(row: Row, records: Sequence[dict[str, Any]], seconds: float) -> RowResult:
    """The figures of a run from its records, one a step."""
    last = records[-max(1, len(records) // 10) :]

    def mean(figure: Callable[[dict[str, Any]], float]) -> float:
        return sum(figure(record) for record in last) / len(last)

    max_violation = mean(lambda record: record["moe/max_violation"])
    return RowResult(
        w_importance=row.w_importance,
        w_load=row.w_load,
        method=row.method,
        loss=records[-1]["val/cross_entropy"],
        cv_importance=mean(lambda record: record["moe/importance_cv2"] ** 0.5),
        cv_load=mean(lambda record: record["moe/load_cv2"] ** 0.5),
        max_over_mean=1.0 + max_violation,
        max_violation=max_violation,
        train_loss=mean(lambda record: record["train/cross_entropy"]),
        switch_aux=row.switch_aux,
        bias_rate=row.bias_rate,
        seconds=round(seconds, 1),
        violations=[record["moe/max_violation"] for record in records],
    )


def claims_of(results: Sequence[RowResult]) -> list[dict[str, Any]]:
    """What the experiment is to show, and whether this run of it does.

    Returns:
        For each: claim, in words with its figures; holds.
    """

    def noisy(w_importance: float, w_load: float) -> RowResult:
        weights = (w_importance, w_load)
        return next(r for r in results if r.method.startswith("noisy_topk") and (r.w_importance, r.w_load) == weights)

    without, balanced = noisy(0.0, 0.0), noisy(0.1, 0.1)
    bias = next(result for result in results if result.bias_rate)
    cv_falls = [without.cv_importance / balanced.cv_importance, without.cv_load / balanced.cv_load]
    return [
        {
            "claim": f"From (0, 0) to (0.1, 0.1) CV(importance) falls {cv_falls[0]:.0f}-fold and CV(load) "
            f"{cv_falls[1]:.0f}-fold (in the paper 51- and 60-fold).",
            "holds": min(cv_falls) >= 10,
        },
        {
            "claim": f"From (0, 0) to (0.1, 0.1) max/mean falls from {without.max_over_mean:.2f} to "
            f"{balanced.max_over_mean:.2f} (in the paper from 17.80 to 1.14).",
            "holds": without.max_over_mean >= 5 and balanced.max_over_mean <= 1.2,
        },
        {
            "claim": f"The loss at (0.1, 0.1) is no worse than at (0, 0): {balanced.loss:.3f} against "
            f"{without.loss:.3f}.",
            "holds": balanced.loss <= without.loss,
        },
        {
            "claim": f"MaxVio with the loss-free bias is at most 0.1 on average: {bias.max_violation:.3f}.",
            "holds": bias.max_violation <= 0.1,
        },
    ]
