"""The text at the end of a run: drawn from the model that was just trained."""

from moe_train.infer.decode import DecodePlan, Decoder
from moe_train.infer.sampling import Sampling
from moe_train.train.loop import Run

_TEMPERATURE = 0.7


def sample_text(run: Run) -> str | None:
    """Draw train.sample_tokens tokens from the model of a run; None where there are to be none.

    Args:
        run: The run; its model keeps its place under ZeRO.

    Collective: All ranks.
    """
    config, tokenizer = run.config, run.data.tokenizer
    if config.train.sample_tokens == 0:
        return None
    sampling = Sampling(temperature=_TEMPERATURE, seed=config.train.seed)
    plan = DecodePlan(config.train.sample_tokens, tokenizer.vocab_size, sampling, end_of_document=run.isolation_mark)
    steps = Decoder(run.engine.model, [[tokenizer.end_of_document]], plan)
    ids = [int(chosen_B) for chosen_B in steps]
    return tokenizer.decode([i for i in ids if i != tokenizer.end_of_document])
