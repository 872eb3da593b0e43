"""Hydra's door to packed sweeps.

Hydra imports whatever is here at the start of every application on the machine, ours
or not: these modules import Hydra and the standard library, nothing else.
"""
