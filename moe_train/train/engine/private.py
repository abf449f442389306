"""Private names of DeepSpeed that the engine uses, to be checked with every new version of DeepSpeed.

`tests/train/engine/test_private.py` compares this list with the code of this folder and the installed DeepSpeed.
"""

PRIVATE = {
    # Overridden in groups.ExpertEngine:
    "_configure_distributed_model": "decides that the model has experts; casts buffers, which is undone",
    "_validate_zero3_moe_compatibility": "refuses expert layers of other classes under ZeRO-3",
    "_do_optimizer_sanity_check": "chooses the optimizer class by precision and stage",
    # Filled in groups.join_process_groups, by the name that expert parameters carry:
    "_EXPERT_PARALLEL_GROUP": "process group of the ranks that share the experts",
    "_EXPERT_PARALLEL_GROUP_RANKS": "its ranks",
    "_EXPERT_DATA_PARALLEL_GROUP": "process group of the ranks that hold the same experts",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS": "its ranks",
    "__compatible_ops__": "which operators can be built; one that needs a minute is switched off",
    # Read in fragments.MappedState, ZeRO 1 and 2:
    "_hp_mapping": "where a parameter is in the flat fp32 partition; None: another rank has all of it",
    "_index_in_param_group": "under which its gradient is kept",
    # Read and called in fragments.PartitionedState, ZeRO 3:
    "_get_fp32_opt_state_partition": "this rank's share of a weight or moment in fp32",
    "_partition_all_parameters": "lets go of gathered parameters, as its step does",
    "_reassign_or_swap_out_partitioned_parameters": "copies fp32 shares to the working weights",
    # Replaced and called in direct_gradients.DirectGradients, ZeRO 1 and 2:
    "_use_compact_grad_partition_buffer": "whether micro-batches are added up in a flat fp32 partition",
    "_get_compact_grad_partition_slice": "a parameter's range of that partition",
    # Replaced in update_gate.UpdateGate:
    "_update_scale": "is called between the norm and the update",
    "_get_norm_groups": "gives ZeRO 3's norms",
    # Without an underscore, but documented nowhere:
    "scaled_global_norm": "replaced in update_gate.UpdateGate: gives the norm of ZeRO 1 and 2",
    "reduce_independent_p_g_buckets_and_remove_grads": "replaced: puts a gradient into a bucket, to be reduced",
    "check_overflow": "replaced: looks for gradients that are not finite, before the norm",
    "unscale_and_clip_grads": "replaced: divides a group's flat gradients",
    "averaged_gradients": "gradients of this rank's partition by group, between the backward pass and the update",
    "GradPartitionBufferGroup": "parts of a flat partition of gradients, which is then not made again",
    "get_gradient_for_reduction": "a parameter's gradient, or its fp32 sum over micro-batches",
    "clear_grad_attribute": "lets go of that",
    "real_dp_process_group": "for each parameter group, the ranks that hold the same parameters",
    "clip_grad": "the norm from which gradients are clipped",
    "grad_scale": "set on torch's fused optimizers: gradients are divided by it during the update",
    "overflow": "set in update_gate.UpdateGate: the update is left out",
    "loss_scaler": "its min_scale is read, and its cur_scale set on resume",
    "single_partition_of_fp32_groups": "flat fp32 partitions of ZeRO 1 and 2",
    "fp32_partitioned_groups_flat": "flat fp32 partitions of ZeRO 3",
    "fp16_partitioned_groups_flat": "flat working partitions of ZeRO 3",
    "persistent_parameters": "parameters that ZeRO 3 does not divide, and gathers after the update",
    "update_lp_params": "copies fp32 partitions to the working weights of ZeRO 1 and 2",
    "get_lp_grad_fragment": "this rank's part of a gradient under ZeRO 1 and 2",
    "get_local_fp32_grad_for_param": "this rank's part of a gradient under ZeRO 3",
    "has_moe_layers": "set in groups.ExpertEngine: gradients of experts are reduced apart",
    "ds_tensor": "a parameter's own part under ZeRO 3",
    "ds_process_group": "the ranks that share a parameter under ZeRO 3",
}
