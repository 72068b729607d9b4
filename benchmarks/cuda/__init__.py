"""The CUDA suite: correctness and speed of merging and scoring on a GPU, in one call.

``suite`` runs the parts and reports them. Each part is a function ``part_<name>(inputs)`` that returns its figures:
``equal`` in ``equality``, ``merge`` in ``merging``, ``scoring`` in ``scoring``, ``study``, ``memory`` and ``vllm`` in
``studies``, ``faults`` in ``faults``. They share ``inputs``, the models and eval tasks, and ``measuring``, the clocks
and counters.
"""
