"""Other libraries' attention on the tensors of this one: `run.py`, and an adapter for each peer.

An adapter module has ``NAME``, ``available(device) -> (bool, version or reason)`` and
``offers(problem) -> Iterator[Offer]`` (see ``problem.py``). It calls the peer's public functions.
"""
