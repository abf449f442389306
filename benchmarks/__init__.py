"""Benchmarks of moe_train: `python -m benchmarks.NAME --help`, from the root of the repository.

balance          routing with and without balance losses (Shazeer et al. 2017, Table 6, scaled down)
balance_scope    balance over the step beside balance over a micro-step: skipped steps and loss
checkpoint       saving and loading beside plain copies of the same bytes
expert_parallel  bytes and time of each dispatch over several ranks
forms            parallel forms of TTT and RWKV beside their loops over tokens
hidden_decoding  hidden copies beside the plain model: attention, prefill, decoding, cache, loss
house            size and order of the source, and what one needs to read and change in it
kills            a run that is killed again and again, against one that never is
kv_cache         cache size and decoding speed when fewer layers and heads own keys and values
launcher_kills   launchers that are killed at random moments: what is left of them, and whether the run goes on
layout_matrix    every layout's checkpoint loaded in every layout
long_context     memory and time of documents and windows over the length of a row, beside a mask of all pairs
mixers           sequence mixers and hybrids: quality, recall, speed, decode state
moe_layer        one MoE layer beside DeepSpeed's, Hugging Face's and a dense bound
parity           every balance term and router in every split of a step over ranks and micro-batches
pictures         the README's pictures of TensorBoard
plan_check       `moe-train plan` against real runs
scaling          time over experts, tokens and layers
speculative      how much faster a draft model makes decoding, beside the formula
telemetry        what recording expert load costs
train            the whole trainer beside Hugging Face's Mixtral
truth            who keeps the same numbers in every layout: this trainer and its peers

Each folder holds run.py (options, entry), rows.py (what is measured) and report.py (what is shown). A small benchmark
is run.py alone. runner/ holds what they share, results/ what they wrote, NOTES.md what was learned.
"""
