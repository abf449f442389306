"""Checkpoints of flat ranges: every rank writes the ranges that it owns, and any layout reads the ranges that it needs.

A step's folder holds one safetensors file per rank, and manifest.json with every tensor's global shape and the places
of its ranges. The folder is written under a temporary name and renamed when it is complete; `latest` is replaced last.
Nothing is unpickled.

    manifest   description of a checkpoint, read without trust
    files      tensor files: written with their digest, and verified
    folders    checkpoints of a run: found, completed, kept and removed
    inventory  list of everything in a run's folder of checkpoints
    sharded_state  training state as flat ranges, through which checkpoints read and write it
    snapshot   copy of a rank's state in host memory
    writer     from snapshots to files, while training continues
    ranges     ranges of tensors, read from the files that hold them
    reader     from files to the training state of any layout
    matching   check that a checkpoint belongs to a model
    resume_point  checkpoint from which a run resumes
    verification  check that everything is as it was written
    tools/     commands for users: list, inspect, compare, remove, export
"""
