"""Checkpoints of flat ranges: every rank writes what it owns, and any layout reads what it needs.

A step's folder holds one safetensors file a rank and manifest.json with every tensor's global shape and where its
ranges are. It is written under a temporary name and renamed when complete; `latest` is replaced last. Nothing is
unpickled.

    manifest   what a checkpoint says of itself, read without trust
    files      tensor files: written with their digest, and verified
    folders    the checkpoints of a run: found, completed, kept and removed
    snapshot   a copy of a rank's state in host memory
    writer     snapshots to files, while training goes on
    ranges     ranges of tensors, read from the files that hold them
    reader     files to the training state of any layout
    matching   whether a checkpoint is of a model
    resume_point  which checkpoint a run resumes from
    verification  whether everything is as it was written
    tools/     for people: list, inspect, compare, remove, export
"""
